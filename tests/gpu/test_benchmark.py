"""The benchmark's pieces run, resume where they stopped and compare equal networks."""

import json

import numpy as np
import pytest
import torch

from golden.errors import InputError
from golden.networks import MODELS, network
from gpu import benchmark
from gpu.__main__ import main


@pytest.fixture(autouse=True)
def cpu_operations(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")


@pytest.mark.parametrize("model", MODELS)
def test_float_networks_have_the_shapes_and_parameters_of_the_description(model):
    description = network(model, "cifar-10" if model in ("vgg-small-7", "wage-vgg7", "resnet-20") else "synthetic")
    h, w, c = description.input_shape
    built = benchmark.FloatNetwork(description)
    assert built(torch.zeros(2, c, h, w)).shape == (2, description.classes)
    weights = sum(p.numel() for n, p in built.named_parameters() if "bn" not in n)
    assert weights == sum(int(np.prod(layer.weight_shape)) for layer in description.weight_layers)


def test_pieces_are_measured_once_and_a_stopped_run_continues(tmp_path, capsys, monkeypatch):
    flags = ["bench", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path)]
    assert main([*flags, "--minutes", "0"]) == 0
    assert "11 pieces are left: the same command continues" in capsys.readouterr().err
    every = benchmark.Benchmark.pieces

    def some(self):
        wanted = ("product 64x800x512", "tiny-cnn conv1 gradient", "tiny-cnn conv1 error")
        return {name: piece for name, piece in every(self).items() if name.startswith(wanted)}

    monkeypatch.setattr(benchmark.Benchmark, "pieces", some)
    assert main(flags) == 0
    first, output = json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr()
    assert len(first["pieces"]) == 3 and output.err.splitlines() == list(first["pieces"])
    assert all(rate > 0 for piece in first["pieces"].values() for rate in piece["rates"].values())
    assert output.out.count("of bf16") == 6
    monkeypatch.setattr(benchmark.Benchmark, "alternate", None)
    assert main(flags) == 0  # nothing is left to measure
    assert json.loads((tmp_path / "gpu.json").read_text()) == first


def test_out_of_memory_ends_one_piece_only(tmp_path, capsys, monkeypatch):
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory")

    pieces = {"large": fail, "small": lambda: {"unit": "x/s", "rates": {"ours": 1.0, "bf16": 2.0}}}
    monkeypatch.setattr(benchmark.Benchmark, "pieces", lambda self: pieces)
    content = benchmark.run(tmp_path, "cpu")
    assert content["pieces"]["large"] == {"failed": "out of memory"} and "0.50 of bf16" in capsys.readouterr().out


@pytest.mark.slow
def test_whole_steps_are_measured(tmp_path):
    measured = benchmark.Benchmark(torch.device("cpu"), "small", seconds=0).step("niti", "tiny-cnn", "synthetic", 16)
    assert set(measured["rates"]) == {"ours", "float32"} and min(measured["rates"].values()) > 0


def test_bad_size_is_one_line(capsys):
    with pytest.raises(InputError, match="small or full"):
        benchmark.run("unused", "cpu", "huge")
