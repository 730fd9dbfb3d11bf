"""Programs of dynamic fixed point, descriptor by descriptor in numpy, against golden: every tensor of some steps."""

import dataclasses

import numpy as np
import pytest

import golden.train
from golden import data as data_module
from golden import networks
from golden.networks import Add, BatchNorm, Conv2d, GlobalAveragePool, Linear, MaxPool, Relu
from hw.config import PRESETS
from sim.compiler import compile_inference, compile_training
from sim.program import CompileError
from sim.shared import Snapshot
from sim.train import Checker
from tests.sim.program_model import ProgramModel


def residual_block(data):
    """Stem, one residual block whose shortcut is the stem, average, classifier."""
    return (Conv2d(8, 3, padding=1), BatchNorm(), Relu(), Conv2d(8, 3, 1, 1), BatchNorm(), Relu(), Conv2d(8, 3, 1, 1),
            BatchNorm(), Add(source="bn2", other="relu0"), Relu(), GlobalAveragePool(), Linear(10))


@pytest.fixture(autouse=True)
def models(monkeypatch):
    monkeypatch.setitem(networks.MODELS, "block", residual_block)
    monkeypatch.setitem(networks.MODELS, "linear-bn", lambda data: (Linear(6), BatchNorm(), Relu(), Linear(10)))
    monkeypatch.setitem(networks.MODELS, "pool-relu", lambda data: (Conv2d(4, 3), MaxPool(), Relu(), Linear(10)))


def run_model(core, network, dataset, steps, *, inference=True):
    """Runs ``steps`` steps of one doorbell in the model, compares all tensors with golden; then one inference."""
    config = PRESETS[core]
    rate = network.learning_rate()
    sizes = dict(batch=network.batch, capacity=steps, steps=steps)
    compiled = compile_training(config, network, **sizes, rate=rate)
    classify = compile_inference(config, network, **(sizes | {"steps": 1}))
    model = ProgramModel(config, network.seed, np.zeros(max(compiled.memory_bytes, classify.memory_bytes), np.uint8))
    batches = [batch for batch, _ in zip(data_module.batches(dataset, network.seed, 0, network.batch, 0), range(steps),
                                         strict=False)]
    converted = [network.convert(images) for images, _ in batches]
    model.write(compiled.state(network.state))
    model.write(compiled.batches([x for x, _ in converted], [labels for _, labels in batches],
                                 [exponent for _, exponent in converted]))
    checker = Checker(compiled, network, intermediates=True)

    def on_step(step):
        regions = tuple(model.memory[address:address + size] for address, size in checker.regions)
        checker.step(Snapshot(step, 0, 0, 0, 0, 0, regions), *batches[step])

    model.run(compiled.program, 0, on_step)
    if inference:
        model.run(classify.program, steps, lambda step: None)
        logits = classify.tensors["logits"]
        region = logits.region
        expected, _ = network.forward(batches[0][0])
        assert np.array_equal(logits.unpack(model.memory[region.address:region.address + region.nbytes]), expected)
    return checker


@pytest.mark.parametrize("core, model, batch, steps, options", [
    ("tiny", "mlp", 32, 3, {}),
    ("wide", "mlp", 8, 2, {"rounding": "nearest"}),
    ("tiny", "tiny-cnn", 4, 2, {}),
    ("tiny", "tiny-cnn-bn", 2, 2, {}),
    ("tiny", "block", 2, 2, {}),
    ("wide", "block", 4, 1, {"rounding": "nearest"}),
    pytest.param("small", "tiny-resnet", 2, 1, {}, marks=pytest.mark.slow),
])
def test_programs_compute_what_golden_computes(core, model, batch, steps, options):
    network = golden.train.build("dfp", model, 1, data="digits", batch=batch, **options)
    checker = run_model(core, network, data_module.load("digits"), steps)
    assert checker.compared > 20 * steps and not checker.not_compared - {"pool0.choice", "pool1.choice"}


@pytest.mark.parametrize("model, batch", [("mlp", 4), ("tiny-cnn-bn", 2), ("linear-bn", 4), ("linear-bn", 1)])
def test_zero_images_leave_zero_tensors(model, batch):
    """No signal: all-zero sums, errors without weights to reach, variance zero. A batch of one gives batch norm
    channels with a single sample, whose variance is zero whatever the image.
    """
    dataset = data_module.load("digits")
    if batch > 1:
        dataset = dataclasses.replace(dataset, train_images=np.zeros_like(dataset.train_images))
    network = golden.train.build("dfp", model, 1, data="digits", batch=batch)
    run_model("tiny", network, dataset, 2, inference=False)


@pytest.mark.parametrize("model", ["mlp", "tiny-cnn-bn"])
def test_extreme_state_and_images(model):
    """Weights at the ends of 16 bits, images at the ends of their range, exponents of state far from usual."""
    dataset = data_module.load("digits")
    edges = np.where(np.arange(dataset.train_images.size).reshape(dataset.train_images.shape) // 3 % 2, 16, 0)
    network = golden.train.build("dfp", model, 1, data="digits", batch=2)
    for key, (array, exponent) in network.state.items():
        if key.endswith(("weight", "momentum")):
            extreme = np.where(np.arange(array.size).reshape(array.shape) % 3, 32767, -32767).astype(array.dtype)
            network.state[key] = extreme, exponent - (60 if key.endswith("momentum") else 0)
    run_model("tiny", network, dataclasses.replace(dataset, train_images=edges.astype(np.uint8)), 2, inference=False)


def test_networks_outside_the_core_are_refused():
    network = golden.train.build("dfp", "pool-relu", 1, data="digits", batch=2)
    with pytest.raises(CompileError, match="relu0: the core applies ReLU to sums"):
        compile_training(PRESETS["tiny"], network, batch=2, capacity=1, steps=1, rate=(205, -11))
