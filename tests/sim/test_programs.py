"""Programs of wage and niti, descriptor by descriptor in numpy, against golden: what the compiler wrote, in seconds."""

import pytest

import golden.train
from golden import data
from tests.sim.test_dfp import run_model


@pytest.mark.parametrize("method, model, batch, seed, options", [
    ("wage", "mlp", 8, 1, {}),
    # Seed 5: the largest error of a layer is where ReLU was inactive, so the order of masks and maximum shows.
    ("wage", "tiny-cnn", 5, 5, {"master_limit": 127}),
    ("niti", "mlp", 8, 1, {"weight_bits": 16}),
    ("niti-2020", "mlp", 8, 1, {}),
    ("niti", "tiny-cnn", 5, 1, {}),
])
def test_programs_compute_what_golden_computes(method, model, batch, seed, options):
    network = golden.train.build(method, model, seed, data="digits", batch=batch, **options)
    assert run_model("tiny", network, data.load("digits"), 2, inference=False).compared >= 38
