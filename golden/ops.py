"""Layer products and their error and gradient forms, in exact integers.

Layouts: activations and errors `[n][h][w][c]` (or `[n][features]`), convolution weights `[co][kh][kw][ci]`,
linear weights `[out][in]`. Integer operands have magnitudes up to a `limit` (default 127: symmetric int8);
results are int32, or int64 where the sum of that many products could leave 32 bits. Floating-point operands
(method `float`) are multiplied as they are.

Integer products run through float32 BLAS: a partial sum of at most 2**24 / (limit_a * limit_b) products is an
integer of magnitude at most 2**24, so every intermediate value is exact whatever order BLAS adds in. Longer
sums are split there and the parts added as integers.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import as_strided

from golden.range import max_magnitude

EXACT_FLOAT32 = 1 << 24
SAFE_PRODUCTS = (2**31 - 1) // 127**2
_BLOCK_BYTES = 64 << 20


def _accumulator_type(operand: np.ndarray, products: int, limit: int):
    if operand.dtype.kind == "f":
        return operand.dtype
    return np.dtype(np.int32 if products * limit <= 2**31 - 1 else np.int64)


def _product(a: np.ndarray, b: np.ndarray, limit: int) -> np.ndarray:
    """a @ b of float32 arrays that hold integers whose products are at most `limit`: exact, float32 or
    integer.
    """
    products = a.shape[1]
    part = EXACT_FLOAT32 // limit
    if products <= part:
        return a @ b
    if part == 0:
        raise ValueError(f"products of magnitude {limit} do not fit float32")
    total = (a[:, :part] @ b[:part]).astype(np.int32 if products * limit <= 2**31 - 1 else np.int64)
    for start in range(part, products, part):
        np.add(total, a[:, start : start + part] @ b[start : start + part], out=total, casting="unsafe")
    return total


def matmul(a: np.ndarray, b: np.ndarray, limit_a: int = 127, limit_b: int = 127) -> np.ndarray:
    """a[m][k] @ b[k][n] of integers with |a| <= limit_a and |b| <= limit_b, exact: int32 or int64."""
    if a.dtype.kind == "f":
        return a @ b
    limit = limit_a * limit_b
    product = _product(a.astype(np.float32), b.astype(np.float32), limit)
    return product.astype(_accumulator_type(a, a.shape[1], limit), copy=False)


# Linear -----------------------------------------------------------------------------------------------------


def linear(x: np.ndarray, w: np.ndarray, limit_w: int = 127) -> np.ndarray:
    """Forward: x[n][in], w[out][in] -> [n][out]."""
    return matmul(x, w.T, limit_b=limit_w)


def linear_error(e: np.ndarray, w: np.ndarray, limit_e: int = 127, limit_w: int = 127) -> np.ndarray:
    """Error of the input: e[n][out], w[out][in] -> [n][in]."""
    return matmul(e, w, limit_e, limit_w)


def linear_gradient(e: np.ndarray, x: np.ndarray, limit_e: int = 127) -> np.ndarray:
    """Gradient of the weights: e[n][out], x[n][in] -> [out][in]."""
    return matmul(e.T, x, limit_e)


# Convolution ------------------------------------------------------------------------------------------------


def conv2d_shape(height: int, width: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Output height and width of a square kernel."""
    return (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1


def _columns(x: np.ndarray, kernel: int, stride: int, padding: int) -> np.ndarray:
    """The receptive fields of x as float32 rows: [n * ho * wo][kh * kw * ci]."""
    n, height, width, c = x.shape
    ho, wo = conv2d_shape(height, width, kernel, stride, padding)
    padded = np.zeros((n, height + 2 * padding, width + 2 * padding, c), np.float32)
    padded[:, padding : padding + height, padding : padding + width] = x
    if kernel == stride == 1:
        return padded.reshape(-1, c)
    if c < 4:
        # Rows of few channels copy slowly one receptive field at a time: fill tap by tap and transpose for
        # free.
        taps = np.empty((kernel, kernel, c, n, ho, wo), np.float32)
        for i in range(kernel):
            for j in range(kernel):
                tap = padded[:, i : i + stride * ho : stride, j : j + stride * wo : stride]
                taps[i, j] = tap.transpose(3, 0, 1, 2)
        return taps.reshape(kernel * kernel * c, n * ho * wo).T
    image, row, pixel, channel = padded.strides
    rows = as_strided(
        padded,
        (n, ho, wo, kernel, kernel * c),
        (image, stride * row, stride * pixel, row, channel),
        writeable=False,
    )
    return rows.reshape(n * ho * wo, kernel * kernel * c)


def _blocks(images: int, floats_per_image: int):
    """Ranges of images whose column matrix stays within the block size."""
    block = max(1, min(images, _BLOCK_BYTES // (4 * floats_per_image)))
    for start in range(0, images, block):
        yield slice(start, min(start + block, images))


def conv2d(x: np.ndarray, w: np.ndarray, stride: int = 1, padding: int = 0, limit_w: int = 127) -> np.ndarray:
    """Forward: x[n][h][w][ci], w[co][k][k][ci] -> [n][ho][wo][co]."""
    n, height, width, _ = x.shape
    co, kernel = w.shape[:2]
    ho, wo = conv2d_shape(height, width, kernel, stride, padding)
    matrix = w.reshape(co, -1).T.astype(np.float32)
    taps = len(matrix)
    y = np.empty((n, ho, wo, co), _accumulator_type(x, taps, 127 * limit_w))
    for block in _blocks(n, ho * wo * taps):
        columns = _columns(x[block], kernel, stride, padding)
        product = columns @ matrix if x.dtype.kind == "f" else _product(columns, matrix, 127 * limit_w)
        y[block] = product.reshape(-1, ho, wo, co)
    return y


def conv2d_error(
    e: np.ndarray,
    w: np.ndarray,
    input_shape: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    limit_e: int = 127,
    limit_w: int = 127,
) -> np.ndarray:
    """Error of the input: e[n][ho][wo][co], w[co][k][k][ci] -> [n][h][w][ci] for input_shape (h, w)."""
    n, ho, wo, co = e.shape
    kernel, ci = w.shape[1], w.shape[3]
    height, width = input_shape
    exact = e.dtype.kind != "f"
    if exact:
        # An input pixel collects at most limit_e * (the sum of |w| over the outputs and taps of its channel).
        bound = limit_e * int(np.abs(w.astype(np.int64)).sum(axis=(0, 1, 2)).max())
        carrier = np.float32 if bound <= EXACT_FLOAT32 else np.float64
    else:
        carrier = e.dtype
    taps = [[np.ascontiguousarray(w[:, i, j], np.float32) for j in range(kernel)] for i in range(kernel)]
    x_error = np.empty((n, height, width, ci), _accumulator_type(e, co * kernel * kernel, limit_e * limit_w))
    for block in _blocks(n, max(ho * wo, height * width) * max(co, ci)):
        rows = e[block].reshape(-1, co).astype(np.float32, copy=False)
        images = len(e[block])
        padded = np.zeros((images, height + 2 * padding, width + 2 * padding, ci), carrier)
        for i in range(kernel):
            for j in range(kernel):
                part = _product(rows, taps[i][j], limit_e * limit_w) if exact else rows @ taps[i][j]
                target = padded[:, i : i + stride * ho : stride, j : j + stride * wo : stride]
                np.add(target, part.reshape(images, ho, wo, ci), out=target, casting="unsafe")
        x_error[block] = padded[:, padding : padding + height, padding : padding + width]
    return x_error


def conv2d_gradient(
    e: np.ndarray, x: np.ndarray, kernel: int, stride: int = 1, padding: int = 0, limit_e: int = 127
) -> np.ndarray:
    """Gradient of the weights: e[n][ho][wo][co], x[n][h][w][ci] -> [co][k][k][ci]."""
    n, ho, wo, co = e.shape
    ci = x.shape[3]
    taps = kernel * kernel * ci
    total = np.zeros((co, taps), _accumulator_type(e, n * ho * wo, limit_e * 127))
    for block in _blocks(n, ho * wo * taps):
        columns = _columns(x[block], kernel, stride, padding)
        rows = e[block].reshape(-1, co).astype(np.float32, copy=False).T
        part = rows @ columns if e.dtype.kind == "f" else _product(rows, columns, limit_e * 127)
        np.add(total, part, out=total, casting="unsafe")
    return total.reshape(co, kernel, kernel, ci)


# Layers without parameters ----------------------------------------------------------------------------------


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def relu_error(e: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The error where the layer's input x is above 0, else 0."""
    return e * (x > 0)


def _taps(x: np.ndarray, size: int):
    """The size * size strided views of non-overlapping windows, in row-major window order."""
    return [x[:, i::size, j::size] for i in range(size) for j in range(size)]


def max_pool(x: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Maximum of size x size windows and the row-major position (uint8) of the first maximum in each."""
    taps = _taps(x, size)
    y = taps[0].copy()
    choice = np.zeros(y.shape, np.uint8)
    for k, tap in enumerate(taps[1:], 1):
        # k grows, so the latest larger tap is the largest k.
        np.maximum(choice, (tap > y).view(np.uint8) * np.uint8(k), out=choice)
        np.maximum(y, tap, out=y)
    return y, choice


def max_pool_error(e: np.ndarray, choice: np.ndarray, size: int) -> np.ndarray:
    """Routes each error to the position that max_pool chose."""
    n, h, w, c = e.shape
    x_error = np.empty((n, h * size, w * size, c), e.dtype)
    for k, tap in enumerate(_taps(x_error, size)):
        np.multiply(e, choice == k, out=tap)
    return x_error


def global_sum(x: np.ndarray) -> np.ndarray:
    """Sum over height and width, int32: the global average times the area."""
    return x.sum(axis=(1, 2), dtype=np.int32)


def global_sum_error(e: np.ndarray, height: int, width: int) -> np.ndarray:
    """Every pixel receives the error of its channel."""
    return np.broadcast_to(e[:, None, None, :], (len(e), height, width, e.shape[1])).copy()


def require_int32(x: np.ndarray, what: str) -> np.ndarray:
    """x as int32; sums that leave the range are an error, never wrapped."""
    if x.dtype == np.int32:
        return x
    if max_magnitude(x) > 2**31 - 1:
        raise OverflowError(f"{what} exceeds 32 bits: use a smaller batch")
    return x.astype(np.int32)
