"""Programs of wage and niti, descriptor by descriptor in numpy, against golden: what the compiler wrote, in seconds."""

import dataclasses

import numpy as np
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


@pytest.mark.parametrize("method, weight", [("niti", 64), ("dfp", 256)])
def test_a_maximum_that_is_a_power_of_two(method, weight):
    """Only there niti's shift, by ceil_log2 of niti's sums, and dfp's, by the bit length of its weights, differ."""
    dataset = data.load("digits")
    images = np.full_like(dataset.train_images, 5)       # 1 as niti's int8
    images[:, 0, 0] = 16
    network = golden.train.build(method, "mlp", 1, data="digits", batch=4)
    array, exponent = network.state["fc0.weight"]
    array = np.zeros_like(array)
    array[0, 1:5] = weight
    network.state["fc0.weight"] = array, exponent
    run_model("tiny", network, dataclasses.replace(dataset, train_images=images), 1, inference=False)


def test_wage_masters_at_the_edges():
    """Masters that round beyond the ternary weights, and some that one update takes to the next weight. With these the
    largest error of fc0 belongs to a clipped activation, so it shows whether that is masked before the maximum.
    """
    network = golden.train.build("wage", "mlp", 0, data="digits", batch=4, master_limit=127)
    rng = np.random.default_rng(0)
    for name, (array, exponent) in network.state.items():
        network.state[name] = rng.choice([-127, -33, -31, 31, 33, 127], array.shape).astype(array.dtype), exponent
    run_model("tiny", network, data.load("digits"), 2, inference=False)
