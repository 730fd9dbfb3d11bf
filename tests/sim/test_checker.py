"""The comparison with golden: it passes on golden's own tensors and fails on one wrong byte of any of them."""

import numpy as np
import pytest

import golden.train
from golden import data as data_module
from hw.config import PRESETS
from hw.scalar import STEP
from sim import compiler
from sim.checker import Checker, Mismatch
from sim.shared import Snapshot


def _network():
    return golden.train.build("niti", "tiny-cnn", 1, data="digits", batch=8)


def _setting():
    dataset = data_module.load("digits")
    images, labels = next(iter(data_module.batches(dataset, 1, 0, 8, 0)))
    compiled = compiler.compile_training(PRESETS["tiny"], _network(), batch=8, capacity=2, steps=2, rate=5)
    return compiled, images, labels


def _snapshot(compiled, record, checker, step=0):
    """What a correct core would leave in memory."""
    scalars = np.zeros(64, "<i4")
    scalars[STEP] = step
    for name, register in compiled.scalars.items():
        scalars[register] = record[name]
    regions = [compiled.dump.layout.pack(scalars)]
    for name, tensor in checker.tensors.items():
        regions.append(tensor.region.layout.pack(np.asarray(record[name])))
    return Snapshot(step, 1000, 0, 0, 0, step, tuple(np.frombuffer(region, np.uint8).copy() for region in regions))


def test_golden_tensors_pass_and_are_counted():
    compiled, images, labels = _setting()
    checker = Checker(compiled, _network())
    record = _network().step(images, labels)
    line = checker.step(_snapshot(compiled, record, checker), images, labels)
    assert checker.compared == len(record.required)
    assert not checker.not_compared
    assert line["loss"] == line["golden"]
    other = _network()
    other.step(images, labels)
    assert line["weights"] == other.digest()


def test_one_wrong_byte_of_any_tensor_is_found():
    compiled, images, labels = _setting()
    record = _network().step(images, labels, intermediates=True)
    names = list(Checker(compiled, _network(), intermediates=True).tensors)
    assert {"logits", "conv1.activation", "conv0.error", "conv1.gradient", "fc0.weight", "conv0.accumulator",
            "conv1.error_accumulator"} <= set(names)
    for number, name in enumerate(names):
        checker = Checker(compiled, _network(), intermediates=True)
        snapshot = _snapshot(compiled, record, checker)
        raw = snapshot.regions[1 + number]
        raw[0] ^= 1                          # the first byte is channel 0 of the first pixel or weight
        with pytest.raises(Mismatch, match=rf"step 0, layer {name.split('.')[0]}, .* index \[0.* expected .* got .* at "
                                           r"cycle 1000, seed 1"):
            checker.step(snapshot, images, labels)


def test_one_wrong_exponent_is_found():
    compiled, images, labels = _setting()
    record = _network().step(images, labels)
    for name, register in compiled.scalars.items():
        checker = Checker(compiled, _network())
        snapshot = _snapshot(compiled, record, checker)
        snapshot.regions[0].view("<i4")[register] += 1
        with pytest.raises(Mismatch, match=name.split(".")[0]):
            checker.step(snapshot, images, labels)


def test_a_skipped_step_is_found():
    compiled, images, labels = _setting()
    checker = Checker(compiled, _network())
    record = _network().step(images, labels)
    with pytest.raises(Mismatch, match="says it made step 3, expected step 0"):
        checker.step(_snapshot(compiled, record, checker, step=3), images, labels)


def test_digests_find_a_wrong_state_and_name_the_tensor():
    compiled, images, labels = _setting()
    record = _network().step(images, labels)
    names = list(Checker(compiled, _network(), compare="digests").tensors)
    assert names == ["logits", "conv0.weight", "conv1.weight", "fc0.weight"]
    for number, name in enumerate(names[1:], 1):
        checker = Checker(compiled, _network(), compare="digests")
        snapshot = _snapshot(compiled, record, checker)
        snapshot.regions[1 + number][0] ^= 1
        with pytest.raises(Mismatch, match=rf"step 0, layer {name.split('.')[0]}, tensor weight, index \[0") as found:
            checker.step(snapshot, images, labels)
        assert (found.value.step, found.value.name, found.value.cycle) == (0, name, 1000)
    for name in ("conv1.weight.exponent", "fc0.weight.exponent"):
        checker = Checker(compiled, _network(), compare="digests")
        snapshot = _snapshot(compiled, record, checker)
        snapshot.regions[0].view("<i4")[compiled.scalars[name]] += 1
        with pytest.raises(Mismatch, match=name.split(".")[0]):
            checker.step(snapshot, images, labels)
    checker = Checker(compiled, _network(), compare="digests")
    checker.step(_snapshot(compiled, record, checker), images, labels)
    assert checker.compared == 2 * 3
    with pytest.raises(ValueError, match="compare is 'some': use one of full, digests"):
        Checker(compiled, _network(), compare="some")


@pytest.mark.parametrize("method", ["niti", "niti-2020", "wage"])
def test_programs_hold_nothing_that_depends_on_data(method):
    """Another seed means other weights, exponents, images and shifts; the program stays the same."""
    images = []
    for seed in (1, 2):
        network = golden.train.build(method, "tiny-cnn", seed, data="digits", batch=8)
        compiled = compiler.compile_training(PRESETS["small"], network, batch=8, capacity=10, steps=10, rate=5)
        images.append(compiled.program.image)
    assert images[0] == images[1]


@pytest.mark.parametrize("core", ["tiny", "small", "base", "wide"])
@pytest.mark.parametrize("model, data", [("mlp", "digits"), ("mlp", "mnist"), ("lenet", "mnist"),
                                         ("tiny-cnn", "digits"), ("bench-cnn", "synthetic"), ("wage-lenet", "mnist")])
def test_networks_fit_every_core_and_regions_are_apart(core, model, data):
    network = golden.train.build("wage" if "wage" in model else "niti", model, 1, data=data, batch=32)
    compiled = compiler.compile_training(PRESETS[core], network, batch=32, capacity=3, steps=2, rate=4)
    regions = sorted(compiled.regions.values(), key=lambda region: region.address)
    for before, after in zip(regions, regions[1:], strict=False):
        assert before.end <= after.address
    assert regions[-1].end <= compiled.memory_bytes
    inference = compiler.compile_inference(PRESETS[core], network, batch=32, capacity=3, steps=3)
    for name, region in inference.regions.items():
        assert name == "program" or region == compiled.regions[name]


def test_methods_and_networks_the_core_cannot_run_are_refused():
    with pytest.raises(compiler.CompileError, match="does not run method 'float'"):
        compiler.compile_training(PRESETS["tiny"], golden.train.build("float", "mlp", 1), batch=32, capacity=1, steps=1,
                                  rate=5)
    network = golden.train.build("niti", "mlp", 1, batch=32)
    with pytest.raises(compiler.CompileError, match="'small-dfp' is built for dfp, not for niti: choose another"):
        compiler.compile_training(PRESETS["small-dfp"], network, batch=32, capacity=1, steps=1, rate=5)
    with pytest.raises(compiler.CompileError, match="a doorbell runs 1 to 4 steps, not 5"):
        compiler.compile_training(PRESETS["tiny"], network, batch=32, capacity=4, steps=5, rate=5)
