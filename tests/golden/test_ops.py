"""Every product, error and gradient against plain loops over int64."""

import numpy as np
import pytest

from golden import ops

RNG = np.random.default_rng(5)


def int8(*shape):
    return RNG.integers(-127, 128, shape).astype(np.int8)


def reference_conv(x, w, stride, padding):
    n, h, wd, ci = x.shape
    co, k = w.shape[:2]
    ho, wo = (h + 2 * padding - k) // stride + 1, (wd + 2 * padding - k) // stride + 1
    y = np.zeros((n, ho, wo, co), np.int64)
    for b, i, j, o, di, dj in np.ndindex(n, ho, wo, co, k, k):
        r, c = i * stride + di - padding, j * stride + dj - padding
        if 0 <= r < h and 0 <= c < wd:
            y[b, i, j, o] += sum(int(x[b, r, c, q]) * int(w[o, di, dj, q]) for q in range(ci))
    return y


def reference_conv_backward(e, x, w, stride, padding):
    n, h, wd, ci = x.shape
    co, k = w.shape[:2]
    ex, dw = np.zeros(x.shape, np.int64), np.zeros(w.shape, np.int64)
    for b, i, j, o, di, dj in np.ndindex(n, *e.shape[1:3], co, k, k):
        r, c = i * stride + di - padding, j * stride + dj - padding
        if 0 <= r < h and 0 <= c < wd:
            ex[b, r, c] += int(e[b, i, j, o]) * w[o, di, dj].astype(np.int64)
            dw[o, di, dj] += int(e[b, i, j, o]) * x[b, r, c].astype(np.int64)
    return ex, dw


GEOMETRIES = [
    # n, h, w, ci, co, kernel, stride, padding
    (2, 6, 6, 1, 3, 3, 1, 0),
    (2, 5, 7, 3, 4, 3, 1, 1),
    (1, 8, 8, 5, 2, 5, 1, 2),
    (2, 7, 7, 4, 3, 3, 2, 1),
    (1, 8, 6, 6, 2, 3, 2, 1),
    (2, 4, 4, 4, 5, 1, 1, 0),
    (2, 6, 6, 4, 5, 1, 2, 0),
    (1, 5, 5, 2, 2, 5, 1, 0),
    (1, 6, 6, 4, 2, 2, 2, 0),
]


@pytest.mark.parametrize("n,h,w,ci,co,k,stride,padding", GEOMETRIES)
def test_convolution_and_its_gradients(n, h, w, ci, co, k, stride, padding):
    x, weight = int8(n, h, w, ci), int8(co, k, k, ci)
    y = ops.conv2d(x, weight, stride, padding)
    assert y.dtype == np.int32
    assert (y == reference_conv(x, weight, stride, padding)).all()
    e = int8(*y.shape)
    ex, dw = reference_conv_backward(e, x, weight, stride, padding)
    assert (ops.conv2d_error(e, weight, (h, w), stride, padding) == ex).all()
    assert (ops.conv2d_gradient(e, x, k, stride, padding) == dw).all()


def test_convolution_in_blocks_of_images(monkeypatch):
    x, w = int8(5, 6, 6, 4), int8(3, 3, 3, 4)
    e = int8(5, 6, 6, 3)
    whole = ops.conv2d(x, w, 1, 1), ops.conv2d_error(e, w, (6, 6), 1, 1), ops.conv2d_gradient(e, x, 3, 1, 1)
    monkeypatch.setattr(ops, "_BLOCK_BYTES", 2 * 4 * 36 * 36)
    parts = ops.conv2d(x, w, 1, 1), ops.conv2d_error(e, w, (6, 6), 1, 1), ops.conv2d_gradient(e, x, 3, 1, 1)
    assert all((a == b).all() for a, b in zip(whole, parts, strict=True))


def test_linear_and_its_gradients():
    x, w, e = int8(7, 30), int8(11, 30), int8(7, 11)
    x64, w64, e64 = (a.astype(np.int64) for a in (x, w, e))
    assert (ops.linear(x, w) == x64 @ w64.T).all()
    assert (ops.linear_error(e, w) == e64 @ w64).all()
    assert (ops.linear_gradient(e, x) == e64.T @ x64).all()


@pytest.mark.parametrize("products", [1039, 1040, 1041, 3000, 133_144])
def test_long_sums_are_exact_at_full_scale(products):
    """All operands at +-127, where a float32 sum of more than 1040 products would round."""
    a = np.full((1, products), 127, np.int8)
    b = np.full((products, 2), 127, np.int8)
    b[:, 1] = -127
    b[-1, 0] = 126
    result = ops.matmul(a, b)
    assert result.dtype == np.int32
    assert result.tolist() == [[127 * 127 * products - 127, -127 * 127 * products]]


def test_sums_beyond_32_bits_are_carried_in_64_and_refused_as_32():
    a, b = np.full((1, 140_000), 127, np.int8), np.full((140_000, 1), 127, np.int8)
    result = ops.matmul(a, b)
    assert result.dtype == np.int64 and result.item() == 140_000 * 127 * 127
    with pytest.raises(OverflowError, match="fc0.gradient exceeds 32 bits"):
        ops.require_int32(result, "fc0.gradient")
    assert ops.require_int32(np.array([2**31 - 1]), "x").dtype == np.int32


def test_error_products_beyond_float32_are_exact():
    """More than 2**24 in one input pixel: the taps must not be added in float32."""
    e = np.full((1, 8, 8, 64), 127, np.int8)
    w = np.full((64, 5, 5, 2), 127, np.int8)
    w[0, 0, 0, 0] = 126
    ex, _ = reference_conv_backward(e, np.zeros((1, 8, 8, 2), np.int8), w, 1, 2)
    assert ex.max() > 2**24
    assert (ops.conv2d_error(e, w, (8, 8), 1, 2) == ex).all()


def test_operands_too_large_for_float32_are_refused():
    with pytest.raises(ValueError, match="do not fit float32"):
        ops.matmul(np.ones((1, 2), np.int32), np.ones((2, 1), np.int32), 2**15, 2**15)


@pytest.mark.parametrize("size", [2, 3])
def test_max_pool_takes_the_first_maximum_in_row_major_order(size):
    x = RNG.integers(-3, 4, (3, 2 * size, 3 * size, 4)).astype(np.int8)
    y, choice = ops.max_pool(x, size)
    e = int8(*y.shape)
    routed = np.zeros(x.shape, np.int64)
    for b, i, j, c in np.ndindex(*y.shape):
        window = x[b, i * size : (i + 1) * size, j * size : (j + 1) * size, c].reshape(-1).tolist()
        first = window.index(max(window))
        assert y[b, i, j, c] == max(window) and choice[b, i, j, c] == first
        routed[b, i * size + first // size, j * size + first % size, c] = e[b, i, j, c]
    assert (ops.max_pool_error(e, choice, size) == routed).all()


def test_relu_passes_errors_where_its_input_is_positive():
    x = np.array([[-2, 0, 1, 127]], np.int8)
    assert ops.relu(x).tolist() == [[0, 0, 1, 127]]
    assert ops.relu_error(np.array([[5, -6, 7, -8]], np.int8), x).tolist() == [[0, 0, 7, -8]]


def test_global_sum():
    x = int8(2, 4, 3, 5)
    assert (ops.global_sum(x) == x.astype(np.int64).sum(axis=(1, 2))).all()
    e = int8(2, 5)
    assert (ops.global_sum_error(e, 4, 3) == np.repeat(np.repeat(e[:, None, None], 4, 1), 3, 2)).all()
