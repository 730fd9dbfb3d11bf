"""The CPU device: operations and arithmetic against golden, and whole trainings bit for bit."""

import numpy as np
import pytest
import torch

from golden import ops as golden_ops
from golden import random, rounding
from golden.rounding import Rounding
from gpu.ops import PRODUCTS, Ops, _is_exact, fastest_product, float32_product, int8_product
from gpu.rounding import Draw, _mix32, round_to, signed_word
from tests.gpu.compare import compare

NETWORKS = [
    ("niti", "mlp", "digits", 32, {}),
    ("niti-2020", "mlp", "digits", 32, {}),
    ("niti", "mlp", "digits", 32, {"weight_bits": 16}),
    ("niti", "lenet", "synthetic", 4, {}),
    ("niti-2020", "lenet", "synthetic", 4, {}),
    ("niti", "tiny-cnn", "digits", 32, {}),
    ("wage", "wage-lenet", "synthetic", 4, {}),
    ("wage", "mlp", "digits", 32, {"widths": "488C", "master_limit": 100}),
    ("dfp", "tiny-cnn-bn", "digits", 16, {}),
    ("dfp", "tiny-cnn", "digits", 16, {"rounding": "nearest"}),
    ("dfp", "tiny-resnet", "digits", 8, {}),
]


@pytest.mark.parametrize("method,model,dataset,batch,options", NETWORKS)
def test_training_equals_golden(method, model, dataset, batch, options):
    compare(Ops(), method, model, dataset, batch, 20, **options)


@pytest.mark.parametrize("product", PRODUCTS)
def test_both_products_give_the_bits(product):
    compare(Ops(product=product), "niti", "tiny-cnn", "digits", 32, 3)


def test_extreme_products_are_exact_or_rejected():
    a, b = torch.full((20, 3000), -127, dtype=torch.int8), torch.full((3000, 24), 127, dtype=torch.int8)
    for product in PRODUCTS:
        assert (Ops(product=product).matmul(a, b) == -3000 * 127**2).all()
    assert _is_exact(float32_product) and fastest_product() in PRODUCTS
    assert not _is_exact(lambda a, b: int8_product(a, b).clamp(-(2**15), 2**15))


def test_long_sums_use_64_bits():
    k = golden_ops.SAFE_PRODUCTS + 7
    a, b = torch.full((1, k), 127, dtype=torch.int8), torch.full((k, 1), 127, dtype=torch.int8)
    for product in PRODUCTS:
        total = Ops(product=product).matmul(a, b)
        assert total.dtype == torch.int64 and int(total) == k * 127**2
    with pytest.raises(OverflowError, match="use a smaller batch"):
        Ops().require_int32(total, "gradient")


SHAPES = [  # n, h, w, ci, co, kernel, stride, padding
    (2, 7, 6, 3, 5, 3, 1, 1),
    (1, 8, 8, 4, 20, 3, 2, 1),
    (3, 5, 9, 1, 7, 5, 1, 0),
    (2, 6, 6, 17, 4, 1, 2, 0),
    (1, 9, 7, 8, 3, 3, 3, 2),
    (2, 4, 4, 5, 6, 2, 1, 3),
    (3, 1, 2, 4, 5, 3, 1, 1),
]


def convolution(shape, rng):
    n, h, w, ci, co, kernel, stride, padding = shape
    ho, wo = golden_ops.conv2d_shape(h, w, kernel, stride, padding)
    x, weight, e = (
        rng.integers(-127, 128, s, dtype=np.int8) for s in ((n, h, w, ci), (co, kernel, kernel, ci), (n, ho, wo, co))
    )
    return x, weight, e, (kernel, stride, padding)


def check_convolution(ops, shape):
    x, w, e, (kernel, stride, padding) = convolution(shape, np.random.default_rng(1))
    tx, tw, te = (ops.tensor(a) for a in (x, w, e))
    assert np.array_equal(ops.conv2d(tx, tw, stride, padding), golden_ops.conv2d(x, w, stride, padding))
    assert np.array_equal(
        ops.conv2d_error(te, tw, x.shape[1:3], stride, padding),
        golden_ops.conv2d_error(e, w, x.shape[1:3], stride, padding),
    )
    assert np.array_equal(
        ops.conv2d_gradient(te, tx, kernel, stride, padding),
        golden_ops.conv2d_gradient(e, x, kernel, stride, padding),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_passes(shape):
    check_convolution(Ops(), shape)


def test_blocks_of_images_change_nothing(monkeypatch):
    monkeypatch.setattr("gpu.ops._BLOCK_BYTES", 1)
    check_convolution(Ops(), SHAPES[0])
    check_convolution(Ops(), SHAPES[1])


def check_pooling(ops, size, dtype):
    rng = np.random.default_rng(size)
    x = rng.integers(-3, 4, (2, 4 * size, 2 * size, 5)).astype(dtype)  # few values: many ties
    y, choice = ops.max_pool(ops.tensor(x), size)
    expected, expected_choice = golden_ops.max_pool(x, size)
    assert np.array_equal(y, expected) and np.array_equal(choice, expected_choice)
    e = rng.integers(-127, 128, expected.shape, dtype=np.int8)
    error = ops.max_pool_error(ops.tensor(e), choice, size)
    assert np.array_equal(error, golden_ops.max_pool_error(e, expected_choice, size))


@pytest.mark.parametrize("size,dtype", [(2, np.int8), (3, np.int32), (1, np.int8)])
def test_pooling(size, dtype):
    check_pooling(Ops(), size, dtype)


def test_random_words_of_every_device():
    index = torch.arange(3, 2000, dtype=torch.int32)
    key = random.key(7, 11, 5)
    hashed = _mix32((index * signed_word(random.INDEX_MULTIPLIER)) ^ signed_word(key))
    expected = random.words(7, 11, 5, (1997,), 3)
    assert np.array_equal(hashed.numpy().view(np.uint32), expected)
    assert np.array_equal(Draw(7, 11, 5, 3).words(index).numpy().view(np.uint32), expected)


RULES = [
    Rounding.NEAREST,
    Rounding.HALF_UP,
    Rounding.HALF_EVEN,
    Rounding.PSEUDO_STOCHASTIC,
    Rounding.STOCHASTIC,
    Rounding.STOCHASTIC_16,
]


def operands(maximum, rng):
    x = rng.integers(-maximum, maximum + 1, 600)
    x[:40] = np.arange(-20, 20) * max(maximum // 64, 1)
    x[40:44] = maximum, -maximum, 0, -1
    return x


def check_rounding(function, rule, maximum, shift, dtype):
    """function: round_to of a device, called with a Draw."""
    x = operands(maximum, np.random.default_rng(shift)).astype(dtype)
    draw = Draw(1, 2, 3, 5) if rule.needs_draw else None
    words = None
    if rule.needs_draw:
        words = random.words(1, 2, 3, x.shape, 5)
        words = words >> 16 if rule is Rounding.STOCHASTIC_16 else words
    expected = rounding.round_to(rule, x, maximum, shift, 8, words)
    got = function(rule, torch.from_numpy(x), maximum, shift, 8, draw)
    assert got.dtype == torch.int8 and np.array_equal(got, expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "maximum,shift,dtype",
    [(127, 0, np.int32), (200, 1, np.int32), (2**15, 9, np.int32), (2**31 - 1, 24, np.int32), (2**40, 31, np.int64)],
)
def test_rounding(rule, maximum, shift, dtype):
    check_rounding(round_to, rule, maximum, shift, dtype)
