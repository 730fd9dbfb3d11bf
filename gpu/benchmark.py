"""Speed of the kernels and of whole training steps beside torch's float ones, alternating in one run.

Every piece (one shape or one network) takes turns between its candidates, so that other load falls on all of them.
Results go to DIR/gpu.json after each piece; a run that stops, or that `--minutes` ends, continues there.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from golden.data import data_set
from golden.errors import InputError
from golden.networks import INPUT, Add, BatchNorm, Conv2d, Flatten, GlobalAveragePool, Linear, MaxPool, Network, Relu
from golden.networks import network as describe
from gpu import devices
from gpu.execution import build
from gpu.train import out_of_memory

FILE = "gpu.json"
SIZES = ("small", "full")
Pieces = dict[str, Callable[[], dict]]


class FloatNetwork(nn.Module):
    """A network description in floating point, channels first."""

    def __init__(self, description: Network):
        super().__init__()
        self.description = description
        modules = {}
        for layer in description.layers:
            match layer:
                case Conv2d():
                    modules[layer.name] = nn.Conv2d(
                        layer.input_shape[2], layer.channels, layer.kernel, layer.stride, layer.padding, bias=False
                    )
                case Linear():
                    modules[layer.name] = nn.Linear(layer.fan_in, layer.features, bias=False)
                case BatchNorm():
                    modules[layer.name] = nn.BatchNorm2d(layer.output_shape[-1])
        self.parts = nn.ModuleDict(modules)

    def forward(self, x):
        values = {INPUT: x}
        for layer in self.description.layers:
            x = values[layer.source]
            match layer:
                case Relu():
                    x = F.relu(x)
                case MaxPool():
                    x = F.max_pool2d(x, layer.size)
                case GlobalAveragePool():
                    x = x.mean(dim=(2, 3))
                case Flatten():
                    x = x.flatten(1)
                case Add():
                    x = x + values[layer.other]
                case Linear():
                    x = self.parts[layer.name](x.flatten(1))
                case _:
                    x = self.parts[layer.name](x)
            values[layer.name] = x
        return x


class Benchmark:
    """Pieces for one device. `small` shapes exercise everything in seconds; `full` ones are the published claims."""

    def __init__(self, device: torch.device, size: str, seconds: float = 2.0):
        if size not in SIZES:
            raise InputError(f"--size must be {' or '.join(SIZES)}, got {size!r}")
        self.device, self.size, self.seconds = device, size, seconds
        self.ops = devices.operations(device)
        self.cuda = device.type == "cuda"

    def pieces(self) -> Pieces:
        """Name -> measurement."""
        small = self.size == "small"
        result: Pieces = {}
        products = [(64, 800, 512), (512, 512, 512)] if small else [(8192, 8192, 8192), (4096, 1152, 128)]
        for shape in products:
            result["product " + "x".join(map(str, shape))] = lambda shape=shape: self.product(*shape)
        model, batch = ("tiny-cnn", 8) if small else ("vgg-small-7", 256)
        for layer in describe(model, "cifar-10").layers:
            if isinstance(layer, Conv2d):
                for way in ("forward", "error", "gradient"):
                    name = f"{model} {layer.name} {way}, batch {batch}"
                    result[name] = lambda layer=layer, way=way: self.convolution(layer, way, batch)
        if small:
            steps = [("niti", "lenet", "mnist", 64), ("wage", "wage-lenet", "mnist", 64), ("dfp", "lenet", "mnist", 64)]
        else:
            steps = [("niti", "vgg-small-7", "cifar-10", 1024), ("wage", "wage-vgg7", "cifar-10", 1024)]
            steps += [("dfp", "resnet-20", "cifar-10", 1024), ("niti", "lenet", "mnist", 64)]
        for step in steps:
            result["step {} {} {}, batch {}".format(*step)] = lambda step=step: self.step(*step)
        return result

    def alternate(self, candidates: dict[str, Callable[[], object]], work: float, unit: str) -> dict:
        """Rates (work per second: median, best) of the candidates, which take turns for about `seconds` each."""
        for function in candidates.values():
            for _ in range(3):
                self._time(function)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        processor = dict.fromkeys(candidates, 0.0)
        end = time.perf_counter() + self.seconds * len(candidates)
        while time.perf_counter() < end or len(times["ours"]) < 5:
            for name, function in candidates.items():
                used = time.process_time()
                times[name].append(self._time(function))
                processor[name] += time.process_time() - used
        result = {"unit": unit, "turns": len(times["ours"])}
        result["rates"] = {name: work / statistics.median(values) for name, values in times.items()}
        result["best"] = {name: work / min(values) for name, values in times.items()}
        if not self.cuda:
            # Unlike wall time, processor time hardly depends on what else the machine does.
            result["per_processor_second"] = {
                name: work * len(times[name]) / seconds for name, seconds in processor.items()
            }
        return result

    def _time(self, function) -> float:
        if not self.cuda:
            started = time.perf_counter()
            function()
            return time.perf_counter() - started
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def _int8(self, *shape):
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=self.device)

    def product(self, m: int, k: int, n: int) -> dict:
        """a[m][k] @ b[n][k].T: ours with its largest magnitude, torch's int8 product, bf16."""
        a, b = self._int8(m, k), self._int8(n, k)
        a16, b16 = a.bfloat16(), b.bfloat16()
        candidates = {
            "ours": lambda: self._with_maximum(self.ops.linear(a, b)),
            "torch int8": lambda: torch._int_mm(a, b.T),
            "bf16": lambda: a16 @ b16.T,
        }
        return self.alternate(candidates, 2 * m * k * n / 1e12, "Tops/s")

    def _with_maximum(self, x):
        """On a GPU the product's kernel has it already; elsewhere it is computed here."""
        return x if hasattr(x, "largest") else (x, self.ops.maximum(x))

    def convolution(self, layer: Conv2d, way: str, batch: int) -> dict:
        """One pass of a convolution with its largest magnitude, beside bf16 of the vendor's library."""
        h, w, ci = layer.input_shape
        ho, wo, co = layer.output_shape
        x, e = self._int8(batch, h, w, ci), self._int8(batch, ho, wo, co)
        weight = self._int8(*layer.weight_shape)
        strides = layer.stride, layer.padding
        x16, e16, w16 = (t.bfloat16().permute(0, 3, 1, 2) for t in (x, e, weight))
        ours = {
            "forward": lambda: self.ops.conv2d(x, weight, *strides),
            "error": lambda: self.ops.conv2d_error(e, weight, (h, w), *strides),
            "gradient": lambda: self.ops.conv2d_gradient(e, x, layer.kernel, *strides),
        }[way]
        reference = {
            "forward": lambda: F.conv2d(x16, w16, None, *strides),
            "error": lambda: torch.nn.grad.conv2d_input(x16.shape, w16, e16, *strides),
            "gradient": lambda: torch.nn.grad.conv2d_weight(x16, w16.shape, e16, *strides),
        }[way]
        candidates = {"ours": lambda: self._with_maximum(ours()), "bf16": reference}
        return self.alternate(candidates, 2 * layer.macs(batch) / 1e12, "Tops/s")

    def step(self, method: str, model: str, data: str, batch: int) -> dict:
        """Whole training steps of one batch: ours, and the network in compiled bf16 autocast or, on a CPU, float32."""
        network = build(method, model, 1, data=data, batch=batch, ops=self.ops)
        images, labels = self._batch(data, batch)
        candidates = {
            "ours": lambda: network.step(images, labels),
            "bf16 compiled" if self.cuda else "float32": self._float_step(model, data, images, labels),
        }
        return self.alternate(candidates, batch, "images/s")

    @staticmethod
    def _batch(data: str, batch: int):
        rng, info = np.random.default_rng(0), data_set(data)
        return rng.integers(0, 256, (batch, *info.shape), dtype=np.uint8), rng.integers(0, info.classes, batch)

    def _float_step(self, model, data, images, labels):
        network = FloatNetwork(describe(model, data)).to(self.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
        run = torch.compile(network, mode="max-autotune") if self.cuda else network
        scale = data_set(data).scale

        def step():
            # From the raw images, as ours: moving and scaling them is part of the step.
            x = torch.from_numpy(images).to(self.device).permute(0, 3, 1, 2).float() / scale - 0.5
            y = torch.from_numpy(labels).to(self.device)
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16) if self.cuda else contextlib.nullcontext():
                loss = F.cross_entropy(run(x).float(), y)
            loss.backward()
            optimizer.step()
            loss.item()  # ours reads the logits

        return step


def _about(device: torch.device, size: str) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "size": size, "torch": torch.__version__, "threads": torch.get_num_threads()}


def _previous(path: Path, about: dict) -> dict:
    """Finished pieces of an earlier run under the same conditions."""
    try:
        content = json.loads(path.read_text())
        return content["pieces"] if content["about"] == about else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def table(content: dict) -> str:
    """The results as text: rates and our share of each reference."""
    about = content["about"]
    lines = ["{device}, {size} sizes, torch {torch}, {threads} threads".format(**about), ""]
    for name, piece in content["pieces"].items():
        if "failed" in piece:
            lines.append(f"{name:44} {piece['failed']}")
            continue
        for kind in ("rates", "per_processor_second"):
            if kind not in piece:
                continue
            rates = piece[kind]
            parts = [f"{rate:.4g} {candidate}" for candidate, rate in rates.items()]
            others = [candidate for candidate in rates if candidate != "ours"]
            shares = [f"{rates['ours'] / rates[candidate]:.2f} of {candidate}" for candidate in others]
            label, unit = (name, piece["unit"]) if kind == "rates" else ("  per processor second", "")
            lines.append(f"{label:44} {', '.join(parts)} {unit}: {', '.join(shares)}".replace(" :", ":"))
    return "\n".join(lines)


def run(out: Path, device: str = "auto", size: str | None = None, minutes: float = 9.0, seconds: float = 2.0) -> dict:
    """Measure what is missing in DIR/gpu.json for at most about `minutes`; write it and print the table.

    `size` None takes `full` on a GPU and `small` on a CPU.
    """
    chosen = devices.choose(device)
    size = size or ("full" if chosen.type == "cuda" else "small")
    benchmark = Benchmark(chosen, size, seconds)
    about, path = _about(chosen, size), Path(out) / FILE
    content = {"about": about, "pieces": _previous(path, about)}
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * minutes
    waiting = [name for name in benchmark.pieces() if name not in content["pieces"]]
    for name, measure in benchmark.pieces().items():
        if name not in waiting or time.monotonic() > end:
            continue
        print(name, file=sys.stderr, flush=True)
        try:
            content["pieces"][name] = measure()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            content["pieces"][name] = {"failed": "out of memory"}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, path)
    print(table(content))
    missing = [name for name in benchmark.pieces() if name not in content["pieces"]]
    if missing:
        print(f"{len(missing)} pieces are left: the same command continues", file=sys.stderr)
    return content
