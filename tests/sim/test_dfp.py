"""Programs of dynamic fixed point, descriptor by descriptor in numpy, against golden: every tensor of some steps."""

import numpy as np
import pytest

import golden.train
from golden import data as data_module
from hw.config import PRESETS
from sim.compiler import compile_inference, compile_training
from sim.shared import Snapshot
from sim.train import Checker
from tests.sim.program_model import ProgramModel


def run_model(core, network, dataset, steps, *, images=None, inference=True):
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
])
def test_programs_compute_what_golden_computes(core, model, batch, steps, options):
    network = golden.train.build("dfp", model, 1, data="digits", batch=batch, **options)
    checker = run_model(core, network, data_module.load("digits"), steps)
    assert checker.compared > 20 * steps and not checker.not_compared - {"pool0.choice", "pool1.choice"}
