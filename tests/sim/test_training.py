"""Whole training steps on the simulated core."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import golden.__main__
import golden.train
from golden import data as data_module
from hw.config import PRESETS
from hw.descriptor import Opcode, encode
from hw.errors import ErrorCode
from sim import doorbells, verilator
from sim.__main__ import main
from sim.doorbells import generated_verilog
from sim.layout import PixelTensor, WeightTensor
from sim.session import simulate
from sim.shared import MemorySettings, SimulationError
from sim.tiling import Geometry, gradient
from sim.train import train
from sim.verilator import lint


def _train(core, tmp_path, method="niti", model="mlp", steps=12, batch=32, settings=None, seed=1, **options):
    network = golden.train.build(method, model, seed, data="digits", batch=batch, **options)
    return train(PRESETS[core], network, data_module.load("digits"), steps, tmp_path, settings=settings,
                 intermediates=True, log=lambda line: None)


def _digests(folder):
    return [json.loads(line)["weights"] for line in (folder / "digests.jsonl").read_text().splitlines()]


def test_the_command_trains_the_digits_mlp_like_golden(tmp_path, capsys):
    assert main(["train", "--steps", "12", "--core", "tiny", "--seed", "3", "--out", str(tmp_path / "sim")]) == 0
    assert golden.__main__.main(["train", "--steps", "12", "--seed", "3", "--out", str(tmp_path / "golden")]) == 0
    assert _digests(tmp_path / "sim") == _digests(tmp_path / "golden")
    summary = json.loads((tmp_path / "sim" / "summary.json").read_text())
    assert summary["bit_exact"] is True and not summary["not_compared"]
    # mlp: logits and its exponent; per layer activation, error, weights with exponents, and the gradient.
    assert summary["tensors_compared"] == 12 * (2 + 2 * 7)
    assert summary["test_accuracy"] == summary["golden_accuracy"]
    # All twelve steps of one doorbell: the host wrote state and batch once, and nothing else.
    assert summary["doorbells"] == 1
    assert set(summary["host_writes"]) == {"fc0.weight", "fc1.weight", "weight exponents", "images", "labels",
                                           "exponents", "program"}
    assert (tmp_path / "sim" / "report.html").stat().st_size > 10_000
    passes = {(row["layer"], row["pass"]) for row in json.loads((tmp_path / "sim" / "cycles.json").read_text())}
    assert {("fc0", "forward"), ("fc1", "error"), ("fc0", "gradient"), ("fc1", "loss"), ("fc0", "update")} <= passes


@pytest.mark.parametrize("core, method, model, batch, options", [
    ("tiny", "niti-2020", "mlp", 20, {}),
    ("tiny", "niti", "mlp", 32, {"weight_bits": 16}),
    ("tiny", "niti", "tiny-cnn", 5, {}),
    ("tiny", "wage", "mlp", 32, {}),
    # Seed 5: the largest error of a layer is where ReLU was inactive, so the order of masks and maximum shows.
    ("tiny", "wage", "tiny-cnn", 5, {"master_limit": 127, "seed": 5}),
    ("tiny", "dfp", "mlp", 8, {}),
    pytest.param("tiny", "dfp", "tiny-cnn-bn", 2, {"rounding": "nearest"}, marks=pytest.mark.slow),
    pytest.param("small", "wage", "mlp", 32, {}, marks=pytest.mark.slow),
    pytest.param("wide", "wage", "tiny-cnn", 8, {}, marks=pytest.mark.slow),
    pytest.param("wide", "niti-2020", "tiny-cnn", 8, {}, marks=pytest.mark.slow),
    pytest.param("small", "niti", "tiny-cnn", 32, {}, marks=pytest.mark.slow),
])
def test_networks_are_bit_exact(tmp_path, core, method, model, batch, options):
    summary = _train(core, tmp_path, method, model, steps=3, batch=batch, **options)
    assert summary["bit_exact"] and summary["steps"] == 3


@pytest.mark.parametrize("method, model, batch, options", [
    ("niti", "tiny-cnn", 5, {"weight_bits": 16}), ("wage", "tiny-cnn", 5, {}), ("dfp", "mlp", 8, {}),
])
def test_a_core_for_one_method_is_bit_exact_and_refuses_others(tmp_path, capsys, method, model, batch, options):
    config = PRESETS["tiny"].replace(name="mine", methods=(method,))
    network = golden.train.build(method, model, 1, data="digits", batch=batch, **options)
    summary = train(config, network, data_module.load("digits"), 2, tmp_path, intermediates=True, test_images=20,
                    floating=False, log=lambda line: None)
    assert summary["bit_exact"] and summary["steps"] == 2
    core = tmp_path / "mine.toml"
    core.write_text(f'rows = 4\ncolumns = 4\nmethods = ["{method}"]\n')
    other = "wage" if method == "niti" else "niti"
    assert main(["train", "--core", str(core), "--method", other, "--out", str(tmp_path / "other")]) == 1
    assert f"core 'mine' is built for {method}, not for {other}" in capsys.readouterr().err
    assert not (tmp_path / "other" / "checkpoint").exists()


def test_wage_of_zero_weights_has_zero_errors_and_no_update(tmp_path):
    """Sums, errors below the loss and gradients are all zero: the core says so and changes no weight."""
    dataset = data_module.load("digits")
    network = golden.train.build("wage", "tiny-cnn", 1, data="digits", batch=5)
    for name, (array, exponent) in network.state.items():
        network.state[name] = np.zeros_like(array), exponent
    summary = train(PRESETS["tiny"], network, dataset, 2, tmp_path, intermediates=True, test_images=0,
                    log=lambda line: None)
    assert summary["bit_exact"] and summary["zero_tensors"]
    assert not any(array.any() for array, _ in network.state.values())
    assert not _train("tiny", tmp_path / "weights", "wage", steps=1)["zero_tensors"]


@pytest.mark.parametrize("model", ["mlp", "tiny-cnn"])
def test_zero_and_saturating_tensors(tmp_path, model):
    """Images without any signal, and images and weights at the ends of their ranges."""
    dataset = data_module.load("digits")
    edges = np.where(np.arange(dataset.train_images.size).reshape(dataset.train_images.shape) // 3 % 2, 16, 0)
    for name, images, extreme in (("zero", np.zeros_like(dataset.train_images), False),
                                  ("edges", edges.astype(np.uint8), True)):
        network = golden.train.build("niti", model, 1, data="digits", batch=8)
        if extreme:
            for key, (array, exponent) in network.state.items():
                network.state[key] = np.where(array < 0, -127, 127).astype(array.dtype), exponent
        summary = train(PRESETS["tiny"], network, dataclasses.replace(dataset, train_images=images), 2, tmp_path / name,
                        intermediates=True, test_images=0, log=lambda line: None)
        assert summary["bit_exact"] and "test_accuracy" not in summary


@pytest.mark.parametrize("method", ["niti", "dfp"])
def test_an_exponent_beyond_16_bits_stops_the_core_as_it_stops_golden(tmp_path, method):
    dataset = data_module.load("digits")
    network = golden.train.build(method, "mlp", 1, data="digits", batch=8)
    network.state["fc0.weight"] = network.state["fc0.weight"][0], 32767
    with pytest.raises(SimulationError, match="stopped with EXPONENT_SATURATED .* descriptor at 0x"):
        train(PRESETS["tiny"], network, dataset, 1, tmp_path, test_images=0, floating=False, log=lambda line: None)
    with pytest.raises(OverflowError, match="16 bits"):
        network.step(*next(data_module.batches(dataset, 1, 0, 8, 0)))


def test_memory_timing_changes_cycles_but_no_bit(tmp_path):
    digests, cycles = [], []
    for name, settings in (("fast", MemorySettings(latency=1, outstanding=64)),
                           ("slow", MemorySettings(latency=150, read_rate=4, write_rate=4, outstanding=4)),
                           ("random", MemorySettings(latency=30, stall=0.4, seed=7, outstanding=16))):
        summary = _train("tiny", tmp_path / name, model="tiny-cnn", batch=5, steps=2, settings=settings)
        digests.append(_digests(tmp_path / name))
        cycles.append(summary["cycles"])
    assert digests[0] == digests[1] == digests[2]
    assert len(set(cycles)) == 3


def test_errors_stop_the_core_and_name_the_descriptor(tmp_path):
    """Illegal descriptor, address outside the window, AXI error response, overflow; after each the core works again."""
    config = PRESETS["tiny"]
    end = encode(Opcode.END)

    def product(feed=(), **sections):
        g = Geometry(name="layer", n=4, h=1, w=1, ci=4, co=4, kh=1, kw=1, ho=1, wo=1)
        pixels, weights = PixelTensor((4, 1, 1, 4), 4), WeightTensor((4, 1, 1, 4), 4, "int32")
        (block,) = gradient(config, g, 0x8000, pixels, 0x8100, pixels, 0x8200, weights, 1)
        merged = {name: {**block.sections[name], **sections.get(name, {})} for name in block.sections}
        merged["feed"] |= dict(feed)
        return encode(Opcode.PRODUCT, **merged)

    good, limit = product(), 0x20000
    # Three sums of 60,000 products of 127 * 127 each, the later two added to the first, leave int32.
    long = {"pixels0": 1, "pixels1": 1, "pixels2": 60_000, "a_pixel2": 0, "b_pixel2": 0, "column_step": 0, "last": 0}
    programs = {
        "good": good + end,
        "opcode": good + bytes([77]) + bytes(255),
        "field": good + product(feed={"tiles1": 0}),
        "window": good + product(load_a={"address": limit}),
        "store": good + product(store={"address": limit + 0x400}),
        "response": good + product(load_a={"address": 0x9000}),
        "overflow": good + product(feed=long) + product(feed={**long, "first": 0}) * 2 + end,
    }
    places = {name: 0x1000 * (k + 1) for k, name in enumerate(programs)}

    def prepare(memory):
        memory.write("errors", 0x8000, np.full(16, 127, np.int8))
        memory.write("inputs", 0x8100, np.full(16, 127, np.int8))
        for name, image in programs.items():
            memory.write(name, places[name], image)

    order = ["good", "opcode", "good", "field", "window", "good", "store", "response", "good", "overflow", "good"]
    result = simulate(
        verilator.build(generated_verilog(config)), "tests.sim.core_scenarios:errors",
        {"programs": [[places[name], limit] for name in order], "window": [0, limit]}, out=tmp_path, prepare=prepare,
        settings=MemorySettings(size=0x40000, latency=2, errors=(0x9000, 0x100)), cycle_limit=100_000_000)
    expected = {"opcode": ErrorCode.ILLEGAL_DESCRIPTOR, "field": ErrorCode.ILLEGAL_DESCRIPTOR,
                "window": ErrorCode.READ_OUTSIDE_WINDOW, "store": ErrorCode.WRITE_OUTSIDE_WINDOW,
                "response": ErrorCode.READ_FAILED, "overflow": ErrorCode.ACCUMULATOR_OVERFLOW}
    for name, values in zip(order, result.value, strict=True):
        error = bool(values["STATUS"] & 4)
        assert error == (name != "good"), (name, values)
        if error:
            assert values["ERROR_CODE"] == expected[name], name
            assert values["ERROR_DESCRIPTOR"] == places[name] + 256 * (3 if name == "overflow" else 1), name
    by_name = dict(zip(order, result.value, strict=True))
    assert by_name["window"]["ERROR_ADDRESS"] == limit
    assert by_name["store"]["ERROR_ADDRESS"] == limit + 0x400


@pytest.mark.parametrize("arguments, message", [
    (["--method", "nitty"], "unknown method 'nitty'"),
    (["--method", "float"], "does not run method 'float'"),
    (["--method", "wage", "--widths", "28CC"], "runs wage with widths 2888 only, not 28CC"),
    (["--model", "mlpp"], "unknown model 'mlpp'"),
    (["--data", "digit"], "unknown data 'digit'"),
    (["--core", "huge"], "unknown core 'huge'"),
    (["--batch", "2000"], "--batch must be 1..1440"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--test-images", "-1"], "--test-images must be 0 or more"),
    (["--data", "mnist", "--data-dir", "nowhere"], "nowhere"),
    (["--model", "tiny-resnet"], "no rule for BatchNorm"),
])
def test_bad_arguments_get_one_line(tmp_path, capsys, arguments, message):
    assert main(["train", "--steps", "1", *arguments, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error


def _one_line(capsys, *parts):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in ("error: ", *parts)), error


def test_a_missing_compiler_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["train", "--core", "tiny", "--steps", "1", "--out", str(tmp_path)]) == 1
    _one_line(capsys, "CXX=no-such-compiler does not work: install one (Debian: apt-get install g++) or set CXX")


@pytest.mark.parametrize("where", ["doorbells", "memory", "cache"])
def test_a_full_disk_is_one_line(tmp_path, capsys, monkeypatch, where):
    """While the batches, the simulated memory or the Verilog are written."""
    full = OSError(28, "No space left on device")

    def refuse(*arguments):
        raise full

    if where == "doorbells":
        monkeypatch.setattr(doorbells.Plan, "piece", refuse)
        parts = f"cannot write to {tmp_path}: No space left on device; when that is mended, start again",
    elif where == "memory":
        monkeypatch.setattr(os, "posix_fallocate", refuse)
        parts = "the disk of ", "has no room for "
    else:
        monkeypatch.setenv("INTRAIN_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(Path, "write_text", refuse)
        parts = "cannot write to the cache ", "No space left on device; set INTRAIN_CACHE to a folder with space"
    assert main(["train", "--core", "tiny", "--steps", "1", "--out", str(tmp_path)]) == 1
    _one_line(capsys, *parts)


@pytest.mark.slow
def test_two_simulations_share_an_empty_cache(tmp_path):
    """Both build the same core at once; one waits for the other, and both train."""
    environment = {**os.environ, "INTRAIN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "sim", "train", "--core", "tiny", "--steps", "4", "--test-images", "0", "--out"]
    root = Path(__file__).resolve().parents[2]
    both = [subprocess.Popen([*command, str(tmp_path / name)], cwd=root, env=environment, stderr=subprocess.PIPE,
                             stdout=subprocess.DEVNULL, text=True) for name in "ab"]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert sum("built in" in error for error in errors) == 1
    assert _digests(tmp_path / "a") == _digests(tmp_path / "b")


@pytest.mark.parametrize("compare", ["full", "digests"])
def test_both_comparisons_see_the_same_run(tmp_path, compare):
    network = golden.train.build("niti", "mlp", 1, data="digits", batch=32)
    summary = train(PRESETS["tiny"], network, data_module.load("digits"), 3, tmp_path, compare=compare, test_images=40,
                    floating=False, log=lambda line: None)
    assert summary["bit_exact"] and summary["comparison"] == compare and "float_accuracy" not in summary
    assert summary["tensors_compared"] == 3 * (2 * 2 if compare == "digests" else 16) and summary["test_images"] == 40
    assert _digests(tmp_path)[-1] == network.digest()
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    names = {"logits", "fc0.weight", "fc1.weight"}
    assert all(line["loss"] == line["golden"] for line in lines)
    assert set(lines[0]["bits"]) == names if compare == "digests" else set(lines[0]["bits"]) > names
    timing = summary["timing"]
    assert timing["simulated_cycles"] > 3 * summary["cycles_per_step"] and timing["comparing_processor_seconds"] > 0


@pytest.mark.parametrize("core", ["tiny", "wide"])
def test_generated_verilog_is_lint_clean(core):
    assert not lint(generated_verilog(PRESETS[core]))
