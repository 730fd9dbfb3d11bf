"""Layer products and their error and gradient forms, in exact integers.

Layouts: activations and errors `[n][h][w][c]` (or `[n][features]`), convolution weights `[co][kh][kw][ci]`,
linear weights `[out][in]`. Operands are integer arrays with magnitudes up to `limit` (default 127: symmetric
int8); results are int32, or int64 where a sum has more than 133,144 products of 127 * 127.

Products run through float32 BLAS: a partial sum of at most 2**24 / (limit_a * limit_b) products is an integer
of magnitude at most 2**24, so every intermediate value is exact whatever order BLAS adds in. Longer sums are
split there and the parts added as integers.
"""

from __future__ import annotations

import numpy as np

from golden.range import max_magnitude

EXACT_FLOAT32 = 1 << 24
SAFE_PRODUCTS = (2**31 - 1) // 127**2
_BLOCK_BYTES = 64 << 20


def _accumulator_type(products: int, limit: int):
    return np.int32 if products * limit <= 2**31 - 1 else np.int64


def matmul(a: np.ndarray, b: np.ndarray, limit_a: int = 127, limit_b: int = 127) -> np.ndarray:
    """Exact a[m][k] @ b[k][n] of integers with |a| <= limit_a and |b| <= limit_b: int32 or int64."""
    a = a.astype(np.float32, copy=False)
    b = b.astype(np.float32, copy=False)
    products, limit = a.shape[1], max(limit_a * limit_b, 1)
    part = EXACT_FLOAT32 // limit
    if part == 0:
        raise ValueError(f"operands of magnitude {limit_a} and {limit_b} do not fit float32 products")
    out_type = _accumulator_type(products, limit)
    total = None
    for start in range(0, max(products, 1), part):
        partial = (a[:, start : start + part] @ b[start : start + part]).astype(out_type)
        total = partial if total is None else np.add(total, partial, out=total)
    return total


# Linear -----------------------------------------------------------------------------------------------------


def linear(x: np.ndarray, w: np.ndarray, limit_w: int = 127) -> np.ndarray:
    """Forward: x[n][in], w[out][in] -> [n][out]."""
    return matmul(x, w.T, limit_b=limit_w)


def linear_error(e: np.ndarray, w: np.ndarray, limit_w: int = 127) -> np.ndarray:
    """Error of the input: e[n][out], w[out][in] -> [n][in]."""
    return matmul(e, w, limit_b=limit_w)


def linear_gradient(e: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Gradient of the weights: e[n][out], x[n][in] -> [out][in]."""
    return matmul(e.T, x)


# Convolution ------------------------------------------------------------------------------------------------


def conv2d_shape(height: int, width: int, kernel: int, stride: int, padding: int) -> tuple[int, int]:
    """Output height and width of a square kernel."""
    return (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1


def _pad(x: np.ndarray, padding: int) -> np.ndarray:
    if padding == 0:
        return x
    n, h, w, c = x.shape
    padded = np.zeros((n, h + 2 * padding, w + 2 * padding, c), x.dtype)
    padded[:, padding:-padding, padding:-padding] = x
    return padded


def _columns(x: np.ndarray, kernel: int, stride: int, padding: int) -> np.ndarray:
    """The receptive fields of x as float32 rows: [n * ho * wo][kh * kw * ci]."""
    n, h, w, c = x.shape
    ho, wo = conv2d_shape(h, w, kernel, stride, padding)
    x = _pad(x, padding)
    columns = np.empty((n, ho, wo, kernel, kernel, c), np.float32)
    for i in range(kernel):
        for j in range(kernel):
            columns[:, :, :, i, j] = x[:, i : i + stride * ho : stride, j : j + stride * wo : stride]
    return columns.reshape(n * ho * wo, kernel * kernel * c)


def _blocks(images: int, floats_per_image: int):
    """Ranges of images whose column matrix stays within the block size."""
    block = max(1, min(images, _BLOCK_BYTES // (4 * floats_per_image)))
    for start in range(0, images, block):
        yield slice(start, min(start + block, images))


def conv2d(x: np.ndarray, w: np.ndarray, stride: int = 1, padding: int = 0, limit_w: int = 127) -> np.ndarray:
    """Forward: x[n][h][w][ci], w[co][k][k][ci] -> [n][ho][wo][co]."""
    n, height, width, ci = x.shape
    co, kernel = w.shape[:2]
    ho, wo = conv2d_shape(height, width, kernel, stride, padding)
    matrix = w.reshape(co, -1).T.astype(np.float32)
    y = np.empty((n, ho, wo, co), _accumulator_type(matrix.shape[0], 127 * limit_w))
    for block in _blocks(n, ho * wo * matrix.shape[0]):
        y[block] = matmul(_columns(x[block], kernel, stride, padding), matrix, limit_b=limit_w).reshape(
            -1, ho, wo, co
        )
    return y


def conv2d_error(
    e: np.ndarray,
    w: np.ndarray,
    input_shape: tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    limit_w: int = 127,
) -> np.ndarray:
    """Error of the input: e[n][ho][wo][co], w[co][k][k][ci] -> [n][h][w][ci] for input_shape (h, w)."""
    n, ho, wo, co = e.shape
    kernel, ci = w.shape[1], w.shape[3]
    height, width = input_shape
    matrix = w.reshape(co, -1).astype(np.float32)
    # One input pixel collects at most 127 * (the sum of |w| over outputs and taps of its channel).
    bound = 127 * int(np.abs(w.astype(np.int64)).sum(axis=(0, 1, 2)).max())
    carrier = np.float32 if bound <= EXACT_FLOAT32 else np.float64
    x_error = np.empty((n, height, width, ci), _accumulator_type(co * kernel * kernel, 127 * limit_w))
    for block in _blocks(n, ho * wo * matrix.shape[1]):
        parts = matmul(e[block].reshape(-1, co), matrix, limit_b=limit_w)
        parts = parts.reshape(-1, ho, wo, kernel, kernel, ci)
        padded = np.zeros((len(parts), height + 2 * padding, width + 2 * padding, ci), carrier)
        for i in range(kernel):
            for j in range(kernel):
                padded[:, i : i + stride * ho : stride, j : j + stride * wo : stride] += parts[:, :, :, i, j]
        x_error[block] = padded[:, padding : padding + height, padding : padding + width]
    return x_error


def conv2d_gradient(
    e: np.ndarray, x: np.ndarray, kernel: int, stride: int = 1, padding: int = 0
) -> np.ndarray:
    """Gradient of the weights: e[n][ho][wo][co], x[n][h][w][ci] -> [co][k][k][ci]."""
    n, ho, wo, co = e.shape
    ci = x.shape[3]
    taps = kernel * kernel * ci
    total = np.zeros((co, taps), _accumulator_type(n * ho * wo, 127 * 127))
    for block in _blocks(n, ho * wo * taps):
        total += matmul(e[block].reshape(-1, co).T, _columns(x[block], kernel, stride, padding))
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
        choice[tap > y] = k
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
