"""The Triton kernels in the interpreter, against golden."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (make test installs it)")

from golden import ops as golden_ops
from golden import random
from golden.niti import loss_gradient
from gpu.device import GpuOps, NitiRules, WageRules
from gpu.execution import build
from gpu.rounding import Draw
from tests.gpu.compare import compare
from tests.gpu.test_cpu import RULES, SHAPES, check_convolution, check_pooling, check_rounding


@pytest.fixture(scope="module")
def ops():
    return GpuOps("cpu")


@pytest.mark.parametrize(
    "method,model,dataset,batch,steps",
    [
        ("niti", "mlp", "digits", 8, 20),
        ("niti-2020", "mlp", "digits", 8, 20),
        ("wage", "mlp", "digits", 8, 20),
        ("niti", "lenet", "synthetic", 1, 2),
        ("dfp", "tiny-cnn-bn", "digits", 4, 2),
    ],
)
def test_training_equals_golden(ops, method, model, dataset, batch, steps):
    compare(ops, method, model, dataset, batch, steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method,model,dataset,batch",
    [
        ("niti", "lenet", "synthetic", 1),
        ("niti", "tiny-cnn", "digits", 2),
        ("wage", "wage-lenet", "synthetic", 1),
        ("dfp", "tiny-cnn-bn", "digits", 2),
        ("dfp", "tiny-resnet", "digits", 1),
    ],
)
def test_twenty_steps_of_convolutional_networks(ops, method, model, dataset, batch):
    compare(ops, method, model, dataset, batch, 20)


@pytest.mark.parametrize("shape", SHAPES)
def test_convolution_passes(ops, shape):
    check_convolution(ops, shape)


@pytest.mark.parametrize("m,k,n", [(1, 1, 1), (5, 33, 17), (130, 64, 70), (16, 300, 10)])
def test_product_and_its_maximum(ops, m, k, n):
    rng = np.random.default_rng(m)
    a, b = rng.integers(-127, 128, (m, k), dtype=np.int8), rng.integers(-127, 128, (n, k), dtype=np.int8)
    c = ops.linear(ops.tensor(a), ops.tensor(b))
    expected = golden_ops.linear(a, b)
    assert np.array_equal(c, expected)
    assert int(c.largest) == np.abs(expected).max() == ops.maximum(c)


def test_gradient_in_parts_and_64_bits(ops, monkeypatch):
    rng = np.random.default_rng(0)
    e, x = (rng.integers(-127, 128, (5, 20, 20, 3), dtype=np.int8) for _ in range(2))
    expected = golden_ops.conv2d_gradient(e, x, 3, 1, 1)
    gradient = ops.conv2d_gradient(ops.tensor(e), ops.tensor(x), 3, 1, 1)  # 2000 pixels: two parts
    assert gradient.dtype == torch.int32 and np.array_equal(gradient, expected)
    wide = ops.conv2d_gradient(ops.tensor(e), ops.tensor(x), 3, 1, 1, limit_e=1 << 20)
    assert wide.dtype == torch.int64 and np.array_equal(wide, expected)


@pytest.mark.parametrize("size,dtype", [(2, np.int8), (3, np.int32)])
def test_pooling(ops, size, dtype):
    check_pooling(ops, size, dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "maximum,shift,dtype", [(127, 0, np.int32), (200, 1, np.int32), (2**31 - 1, 24, np.int32), (2**40, 31, np.int64)]
)
def test_rounding(ops, rule, maximum, shift, dtype):
    check_rounding(ops.round_to, rule, maximum, shift, dtype)


@pytest.mark.parametrize("exponent", [-30, -20, -12, -8, -7, -6, -3, 0, 2, 4, 9])
def test_niti_loss_over_all_exponents(ops, exponent):
    rng = np.random.default_rng(exponent + 40)
    logits, labels = rng.integers(-127, 128, (6, 10), dtype=np.int8), rng.integers(0, 10, 6)
    error = NitiRules(ops).loss_gradient(ops.tensor(logits), exponent, ops.tensor(labels))
    assert np.array_equal(error, loss_gradient(logits, exponent, labels))


@pytest.mark.parametrize("largest", [0, 1, 90, 91, 127, 128, 181, 182, 40000, 2**31 - 1])
@pytest.mark.parametrize("rate", [3, 0, -3])
def test_wage_errors_and_updates_over_the_range(ops, largest, rate):
    from golden import wage

    rng, rules = np.random.default_rng(largest % 1000), WageRules(ops)
    raw = rng.integers(-largest, largest + 1, (4, 50)).astype(np.int32)
    raw[0, :2] = largest, -largest
    error, _ = rules.quantize_error(ops.tensor(raw))
    assert np.array_equal(error, wage.quantize_error(raw)[0])
    master = rng.integers(-64, 65, raw.shape).astype(np.int8)
    words = random.words(1, 2, 3, raw.shape)
    expected = wage.update(master, wage.weight_step(raw, rate, words >> 16))
    got = rules.update(ops.tensor(master), rules.weight_step(ops.tensor(raw), rate, Draw(1, 2, 3)))
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("method", ["niti", "wage"])
def test_a_step_never_waits_for_the_device(ops, method, monkeypatch):
    """Reading a tensor on the host inside a step would stall a GPU and forbid CUDA graphs."""
    network = build(method, "tiny-cnn", 1, batch=2, ops=ops)
    images, labels = np.full((2, 8, 8, 1), 7, np.uint8), np.array([1, 2])
    network.step(images, labels)
    inside = network._step

    def refuse(*_):
        raise AssertionError("the step read a tensor on the host")

    def guarded(*arguments):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__int__", "__bool__", "__index__", "__float__"):
                patch.setattr(torch.Tensor, name, refuse)
            inside(*arguments)

    monkeypatch.setattr(network, "_step", guarded)
    network.step(images, labels)
    monkeypatch.setattr(network.ops, "relu", lambda x: x * int(x[0, 0, 0, 0] > -200))
    with pytest.raises(AssertionError, match="read a tensor"):
        network.step(images, labels)


class Repeated:
    """Stands in for a CUDA graph: a replay runs the body again and puts its results where the first run left them."""

    captures = 0

    def __init__(self, body):
        self.body, self.result = body, None
        Repeated.captures += 1

    def replay(self):
        latest = self.body()
        if self.result is None:
            self.result = latest
        for name, value in latest.items():
            if isinstance(value, torch.Tensor):
                self.result[name].copy_(value)
        return self.result


@pytest.mark.parametrize("method", ["niti", "wage"])
def test_repeated_steps_equal_golden(ops, method, monkeypatch):
    """Images with other exponents, the random words of each step and a new learning rate reach a captured step."""
    from golden.train import build as golden_build

    monkeypatch.setattr(Repeated, "captures", 0)
    networks = golden_build(method, "mlp", 1, batch=4), build(method, "mlp", 1, batch=4, ops=ops)
    networks[1].graph = Repeated
    rng, exponents = np.random.default_rng(0), set()
    for step in range(9):
        images = rng.integers(0, 17 >> (step % 3), (4, 8, 8, 1), dtype=np.uint8)
        labels, rate = rng.integers(0, 10, 4), 3 if step < 5 else 1
        records = []
        for network in networks:
            monkeypatch.setattr(network, "learning_rate", lambda rate=rate: rate)
            records.append(network.step(images, labels))
        exponents.add(records[0]["fc0.activation.exponent"])
        assert list(records[1]) == list(records[0])
        assert all(np.array_equal(records[1][name], tensor) for name, tensor in records[0].items()), step
        assert networks[0].digest() == networks[1].digest()
    assert Repeated.captures == 2 and (method == "wage" or len(exponents) > 1)
