"""Triton kernels: int8 products and implicit convolutions with int32 sums, and what follows them.

Scalars that depend on data (largest magnitudes, exponents, shifts, keys of random words) stay in device memory, so a
step needs no answer from the device. All integers are exact: int32 wherever a bound allows it, else int64. With
TRITON_INTERPRET=1 in the environment the kernels run on a CPU, slowly. Rounding rules are those of golden.rounding.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from golden.rounding import Rounding

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

NEAREST = tl.constexpr(Rounding.NEAREST.code)
HALF_UP = tl.constexpr(Rounding.HALF_UP.code)
HALF_EVEN = tl.constexpr(Rounding.HALF_EVEN.code)
PSEUDO_STOCHASTIC = tl.constexpr(Rounding.PSEUDO_STOCHASTIC.code)
STOCHASTIC = tl.constexpr(Rounding.STOCHASTIC.code)
STOCHASTIC_16 = tl.constexpr(Rounding.STOCHASTIC_16.code)


def _tuned(key, reset):
    """Tile sizes measured per shape; the interpreter takes small fixed ones from its caller."""
    if INTERPRETED:
        return lambda kernel: kernel
    sizes = (
        (128, 256, 128, 8, 3),
        (128, 128, 128, 8, 3),
        (128, 128, 64, 4, 4),
        (64, 64, 64, 4, 4),
        (128, 32, 64, 4, 4),
    )
    configurations = [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
        for m, n, k, warps, stages in sizes
    ]
    return triton.autotune(configurations, key=key, reset_to_zero=reset)


# Parts ------------------------------------------------------------------------------------------------------


@triton.jit
def _bit_length(x):
    """Bit length of a scalar below 2**62; 0 for 0 and negative numbers."""
    return tl.sum(((x.to(tl.int64) >> tl.arange(0, 64)) > 0).to(tl.int32), axis=0)


@triton.jit
def _ceil_log2(maximum):
    return _bit_length(maximum.to(tl.int64) - 1)


@triton.jit
def _nearest_log2(maximum):
    """Of a positive scalar."""
    m = maximum.to(tl.int64)
    p = _bit_length(m) - 1
    return p + tl.where(m * m > (tl.full((), 1, tl.int64) << (2 * p + 1)), 1, 0)


@triton.jit
def _word(index, key):
    """The contract's random word of an element index."""
    a = (index.to(tl.uint32) * tl.full((), 0x9E3779B9, tl.uint32)) ^ key.to(tl.uint32)
    a = (a + tl.full((), 0x7ED55D16, tl.uint32)) + (a << 12)
    a = (a ^ tl.full((), 0xC761C23C, tl.uint32)) ^ (a >> 19)
    a = (a + tl.full((), 0x165667B1, tl.uint32)) + (a << 5)
    a = (a + tl.full((), 0xD3A2646C, tl.uint32)) ^ (a << 9)
    a = (a + tl.full((), 0xFD7046C5, tl.uint32)) + (a << 3)
    return (a ^ tl.full((), 0xB55A4F09, tl.uint32)) ^ (a >> 16)


@triton.jit
def _round(x, shift, word, RULE: tl.constexpr):
    """x / 2**shift before saturation, in the type of x. No intermediate needs more bits than x, but for draws."""
    one = tl.full((), 1, x.dtype)
    shift = shift.to(x.dtype)
    mask = (one << shift) - one
    previous = tl.maximum(shift - 1, 0)
    if RULE == HALF_UP:
        return tl.where(shift > 0, (x >> shift) + ((x >> previous) & 1), x)
    elif RULE == HALF_EVEN:
        quotient = x >> shift
        discarded = x & mask
        half = one << previous
        up = (discarded > half) | ((discarded == half) & ((quotient & 1) == 1))
        return tl.where(shift > 0, quotient + up.to(x.dtype), x)
    elif RULE == STOCHASTIC:
        noise = tl.where(shift > 0, (word.to(tl.int64) & 0xFFFFFFFF) >> (32 - shift), 0)
        return (x + noise.to(x.dtype)) >> shift
    else:
        magnitude = tl.abs(x)
        discarded = magnitude & mask
        if RULE == NEAREST:
            up = (shift > 0) & (((magnitude >> previous) & 1) == 1)
        elif RULE == PSEUDO_STOCHASTIC:
            half = shift >> 1
            up = (discarded >> half) > ((magnitude & ((one << half) - one)) << (shift & 1))
        else:
            draw = ((word.to(tl.int64) >> 16) & 0xFFFF).to(x.dtype)
            up = (discarded << tl.maximum(16 - shift, 0)) > (draw << tl.maximum(shift - 16, 0))
        rounded = (magnitude >> shift) + up.to(x.dtype)
        return tl.where(x < 0, -rounded, rounded)


@triton.jit
def _raise_maximum(maximum, values):
    """Atomically raise a scalar in memory to the largest magnitude of a tile."""
    largest = tl.max(tl.max(tl.abs(values), axis=1), axis=0)
    tl.atomic_max(maximum, largest)


# Products ---------------------------------------------------------------------------------------------------


@_tuned(["m", "n", "k"], ["maximum"])
@triton.jit
def matmul(
    a, b, c, maximum, m, n, k, a_row, a_column, b_row, b_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """c[m][n] int32 = a[m][k] @ b[k][n] of int8, and the largest magnitude of c. STEPS >= k / BLOCK_K, 0: computed."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    a_tile = a + rows[:, None].to(tl.int64) * a_row + depth[None, :] * a_column
    b_tile = b + depth[:, None] * b_row + columns[None, :].to(tl.int64) * b_column
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(STEPS if STEPS else tl.cdiv(k, BLOCK_K)):
        inside = depth + step * BLOCK_K < k
        left = tl.load(a_tile, mask=(rows < m)[:, None] & inside[None, :], other=0)
        right = tl.load(b_tile, mask=inside[:, None] & (columns < n)[None, :], other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
        a_tile += BLOCK_K * a_column
        b_tile += BLOCK_K * b_row
    _raise_maximum(maximum, total)
    place = c + rows[:, None].to(tl.int64) * n + columns[None, :]
    tl.store(place, total, mask=(rows < m)[:, None] & (columns < n)[None, :])


@triton.jit
def _source_pixel(row, column, i, j, height, width, stride, padding, TRANSPOSED: tl.constexpr):
    """The pixel of the (height, width) operand that tap (i, j) of a result pixel reads, and whether it exists."""
    if TRANSPOSED:
        y, x = row + padding - i, column + padding - j
        exists = (y >= 0) & (x >= 0) & (y % stride == 0) & (x % stride == 0)
        y, x = y // stride, x // stride
    else:
        y, x = row * stride + i - padding, column * stride + j - padding
        exists = (y >= 0) & (x >= 0)
    return y, x, exists & (y < height) & (x < width)


@_tuned(["m", "co", "ci", "kernel"], ["maximum"])
@triton.jit
def convolve(
    x, w, y, maximum, m, height, width, ci, ho, wo, co, kernel, stride, padding,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """y[p][co] int32 over m = n * ho * wo pixels from x[n][height][width][ci] and w[co][kernel][kernel][ci], int8.

    TRANSPOSED is the error pass: x is the error at the outputs, y the error at the inputs, w is given as
    [ci of the layer][kernel][kernel][co of the layer]. Also the largest magnitude of y.
    """
    pixels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    image, within = pixels // (ho * wo), pixels % (ho * wo)
    row, column = within // wo, within % wo
    depth = kernel * kernel * ci
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(STEPS if STEPS else tl.cdiv(depth, BLOCK_K)):
        element = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tap, channel = element // ci, element % ci
        i, j = tap // kernel, tap % kernel
        v, h, exists = _source_pixel(
            row[:, None], column[:, None], i[None, :], j[None, :], height, width, stride, padding, TRANSPOSED
        )
        exists = exists & (pixels < m)[:, None] & (element < depth)[None, :]
        place = ((image[:, None].to(tl.int64) * height + v) * width + h) * ci + channel[None, :]
        left = tl.load(x + place, mask=exists, other=0)
        weight = w + channels[None, :] * depth + element[:, None]
        right = tl.load(weight, mask=(element < depth)[:, None] & (channels < co)[None, :], other=0)
        total = tl.dot(left, right, total, out_dtype=tl.int32)
    _raise_maximum(maximum, total)
    place = y + pixels[:, None].to(tl.int64) * co + channels[None, :]
    tl.store(place, total, mask=(pixels < m)[:, None] & (channels < co)[None, :])


@_tuned(["pixels", "co", "ci", "kernel"], ["out"])
@triton.jit
def convolve_gradient(
    e, x, out, pixels, height, width, ci, ho, wo, co, kernel, stride, padding, part,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """out[co][kernel][kernel][ci] += sum over pixels of e[p][co] * x[tap of p][ci]; out is int32 or int64 zeros.

    Programs along axis 2 take `part` pixels each, at most golden.ops.SAFE_PRODUCTS, and add integers atomically.
    """
    channels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    element = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = kernel * kernel * ci
    tap, channel = element // ci, element % ci
    i, j = tap // kernel, tap % kernel
    first = tl.program_id(2) * part
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(STEPS if STEPS else tl.cdiv(part, BLOCK_K)):
        offset = step * BLOCK_K + tl.arange(0, BLOCK_K)
        pixel = first + offset
        inside = (pixel < pixels) & (offset < part)
        error = tl.load(
            e + pixel[:, None].to(tl.int64) * co + channels[None, :],
            mask=inside[:, None] & (channels < co)[None, :],
            other=0,
        )
        image, within = pixel // (ho * wo), pixel % (ho * wo)
        row, column = within // wo, within % wo
        v, h, exists = _source_pixel(
            row[:, None], column[:, None], i[None, :], j[None, :], height, width, stride, padding, False
        )
        exists = exists & inside[:, None] & (element < depth)[None, :]
        place = ((image[:, None].to(tl.int64) * height + v) * width + h) * ci + channel[None, :]
        operand = tl.load(x + place, mask=exists, other=0)
        total = tl.dot(tl.trans(error), operand, total, out_dtype=tl.int32)
    place = out + channels[:, None].to(tl.int64) * depth + element[None, :]
    tl.atomic_add(place, total.to(out.dtype.element_ty), mask=(channels < co)[:, None] & (element < depth)[None, :])


# Elements ---------------------------------------------------------------------------------------------------


@triton.jit
def largest(x, maximum, n, BLOCK: tl.constexpr):
    """Raise `maximum` (the type of x, at least int32) to the largest magnitude of x[n]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + index, mask=index < n, other=0).to(maximum.dtype.element_ty)
    tl.atomic_max(maximum, tl.max(tl.abs(values), axis=0))


@triton.jit
def niti_requantize(
    acc, out, maximum, exponent, exponent_out, n, minimum_shift, RULE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """golden.niti.requantize: the shift follows from the largest magnitude in memory."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    shift = _ceil_log2(tl.load(maximum)) - 7
    shift = tl.where(shift > 0, tl.maximum(shift, minimum_shift), 0)
    x = tl.load(acc + index, mask=index < n, other=0)
    rounded = _round(x, shift, x, RULE)
    tl.store(out + index, tl.minimum(tl.maximum(rounded, -127), 127).to(tl.int8), mask=index < n)
    if tl.program_id(0) == 0:
        tl.store(exponent_out, tl.load(exponent) + shift)


@triton.jit
def niti_weight_gradient(acc, out, maximum, n, bits, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """golden.niti.weight_gradient."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = _ceil_log2(tl.load(maximum))
    x = tl.load(acc + index, mask=index < n, other=0).to(tl.int64)
    rounded = _round(x, tl.maximum(b - bits, 0), x, PSEUDO_STOCHASTIC)
    rounded = tl.where(b == 0, 0, tl.minimum(tl.maximum(rounded, -LIMIT), LIMIT))
    tl.store(out + index, rounded.to(out.dtype.element_ty), mask=index < n)


@triton.jit
def subtract(w, g, out, n, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """out = clip(w - g, -LIMIT, LIMIT); out may be w."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    difference = tl.load(w + index, mask=index < n, other=0).to(tl.int64) - tl.load(g + index, mask=index < n, other=0)
    difference = tl.minimum(tl.maximum(difference, -LIMIT), LIMIT)
    tl.store(out + index, difference.to(out.dtype.element_ty), mask=index < n)


@triton.jit
def shift_round(
    x, out, key, n, first, shift, LIMIT: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Rounding by a shift that the host knows; stochastic rules use the words of stream `key` from index `first`."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + index, mask=index < n, other=0).to(tl.int64)
    word = _word(index + first, tl.load(key))
    rounded = _round(value, tl.full((), shift, tl.int32), word, RULE)
    rounded = tl.minimum(tl.maximum(rounded, -LIMIT), LIMIT)
    tl.store(out + index, rounded.to(out.dtype.element_ty), mask=index < n)


@triton.jit
def wage_activation(
    acc, out, blocked, n, SHIFT: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """golden.wage.quantize_activation."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(acc + index, mask=index < n, other=0).to(tl.int64)
    rounded = _round(x, tl.full((), SHIFT, tl.int32), x, HALF_EVEN)
    tl.store(out + index, tl.minimum(tl.maximum(rounded, -LIMIT), LIMIT).to(tl.int8), mask=index < n)
    tl.store(blocked + index, tl.abs(x) > (LIMIT << SHIFT), mask=index < n)


@triton.jit
def wage_error(raw, out, maximum, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """golden.wage.quantize_error, by the largest magnitude in memory."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(maximum)
    shift = _nearest_log2(tl.maximum(m, 1)) - (BITS - 1)
    x = tl.load(raw + index, mask=index < n, other=0).to(tl.int64)
    left = x << tl.maximum(-shift, 0).to(tl.int64)
    rounded = tl.where(shift > 0, _round(x, tl.maximum(shift, 0), x, HALF_EVEN), left)
    LIMIT: tl.constexpr = (1 << (BITS - 1)) - 1
    rounded = tl.minimum(tl.maximum(rounded, -LIMIT), LIMIT)
    tl.store(out + index, rounded.to(out.dtype.element_ty), mask=index < n)


@triton.jit
def wage_step(acc, master, out, maximum, key, n, log2_rate, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """golden.wage.weight_step and update in one: out = clip(master - step); out may be master."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    shift = _nearest_log2(tl.maximum(tl.load(maximum), 1)) - log2_rate
    x = tl.load(acc + index, mask=index < n, other=0).to(tl.int64)
    word = _word(index, tl.load(key))
    rounded = _round(x, tl.maximum(shift, 0), word, STOCHASTIC_16)
    step = tl.where(shift > 0, rounded, x << tl.maximum(-shift, 0).to(tl.int64))
    result = tl.load(master + index, mask=index < n, other=0).to(tl.int64) - step
    result = tl.minimum(tl.maximum(result, -LIMIT), LIMIT)
    tl.store(out + index, result.to(out.dtype.element_ty), mask=index < n)


@triton.jit
def relu_error(e, x, out, n, BLOCK: tl.constexpr):
    """The error where the input is positive, else 0."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    error = tl.load(e + index, mask=index < n, other=0)
    positive = tl.load(x + index, mask=index < n, other=0) > 0
    tl.store(out + index, tl.where(positive, error, tl.zeros_like(error)), mask=index < n)


@triton.jit
def max_pool(x, y, choice, n, ho, wo, c, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum of SIZE x SIZE windows of x[images][ho * SIZE][wo * SIZE][c] and the position of the first maximum."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel, column, row = index % c, index // c % wo, index // (c * wo)
    source = (row * SIZE * wo * SIZE + column * SIZE) * c + channel
    best = tl.load(x + source, mask=index < n, other=0)
    chosen = tl.zeros((BLOCK,), tl.int32)
    for k in tl.static_range(1, SIZE * SIZE):
        place = source + ((k // SIZE) * wo * SIZE + k % SIZE) * c
        value = tl.load(x + place, mask=index < n, other=0)
        chosen = tl.where(value > best, k, chosen)
        best = tl.maximum(value, best)
    tl.store(y + index, best, mask=index < n)
    tl.store(choice + index, chosen.to(tl.uint8), mask=index < n)


@triton.jit
def max_pool_error(e, choice, out, n, ho, wo, c, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Routes each error to the position that max_pool chose; the others are 0."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel, column, row = index % c, index // c % wo, index // (c * wo)
    target = (row * SIZE * wo * SIZE + column * SIZE) * c + channel
    error = tl.load(e + index, mask=index < n, other=0)
    chosen = tl.load(choice + index, mask=index < n, other=0).to(tl.int32)
    for k in tl.static_range(SIZE * SIZE):
        place = target + ((k // SIZE) * wo * SIZE + k % SIZE) * c
        tl.store(out + place, tl.where(chosen == k, error, tl.zeros_like(error)), mask=index < n)


# Losses -----------------------------------------------------------------------------------------------------


@triton.jit
def _truncating_shift(x, shift):
    """x / 2**shift toward zero."""
    magnitude = tl.abs(x) >> shift
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def niti_loss(
    logits, exponent, labels, out, classes, SMALLEST: tl.constexpr, LARGEST: tl.constexpr, TAYLOR: tl.constexpr,
    LOG2_E: tl.constexpr, OCTAVES: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """golden.niti.loss_gradient, one program a row. Both forms of the probabilities are computed, one is used."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < classes
    a = tl.load(logits + row * classes + column, mask=inside, other=0).to(tl.int64)
    e = tl.minimum(tl.maximum(tl.load(exponent), SMALLEST), LARGEST).to(tl.int64)
    one = tl.full((), 1, tl.int64)
    u = _truncating_shift(a * LOG2_E, tl.full((), 15, tl.int64))
    s = tl.where(e >= 0, u << tl.maximum(e, 0), _truncating_shift(u, tl.maximum(-e, 0)))
    top = tl.max(tl.where(inside, s, -(one << 40)), axis=0)
    octave = tl.minimum(tl.maximum(s - (top - OCTAVES), 0), OCTAVES)
    # The shift of the series is used for negative exponents only.
    f = tl.maximum(1 - e, 0)
    series = (one << (2 * f - 1 + (f == 0).to(tl.int64))) + a * (one << f) + a * a
    p = tl.where(inside, tl.where(e > TAYLOR, (one << octave) - 1, series), 0)
    g = (p << BITS) // tl.sum(p, axis=0)
    label = tl.load(labels + row)
    g = tl.where(column == label, g - tl.sum(g, axis=0), g)
    rounded = _round(g, tl.full((), SHIFT, tl.int32), g, PSEUDO_STOCHASTIC)
    rounded = tl.minimum(tl.maximum(rounded, -127), 127)
    tl.store(out + row * classes + column, rounded.to(tl.int8), mask=inside)


@triton.jit
def label_error(logits, labels, out, n, classes, ONE: tl.constexpr, BLOCK: tl.constexpr):
    """out = logits, minus ONE at the label of each row."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(logits + index, mask=index < n, other=0)
    label = tl.load(labels + index // classes, mask=index < n, other=-1)
    tl.store(out + index, tl.where(label == index % classes, value - ONE, value), mask=index < n)
