"""What a run rings the doorbell for: groups of steps, their programs, and the files the scenario works from."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from pathlib import Path

import numpy as np

import golden.train
from golden import data as data_module
from hw import verilog
from hw.config import CoreConfig

from . import compiler, verilator
from .disassembler import symbols

__all__ = ["Doorbell", "Plan", "Programs", "generated_verilog", "inference_doorbells", "training_doorbells"]

STEPS_PER_DOORBELL = 45
BATCH_BYTES = 64 << 20
"""Memory for batches: with large images fewer steps share a doorbell."""


def _generator_digest() -> bytes:
    sources = sorted(Path(verilog.__file__).parent.glob("*.py"))
    sources += [Path(golden.train.__file__).parent / name for name in ("rounding.py", "random.py")]
    digest = hashlib.sha256(importlib.metadata.version("amaranth").encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.digest()


# Taken with the import: sources that change later are not the ones that generate in this process.
GENERATOR = _generator_digest()


def generated_verilog(config: CoreConfig) -> str:
    """The core's Verilog, from the cache if the generator has not changed."""
    key = hashlib.sha256(GENERATOR + repr(config).encode())
    path = verilator.cache_folder() / f"verilog-{key.hexdigest()[:24]}.v"
    if not path.exists():
        text = verilog.generate(config)[0]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{time.time_ns()}.part")
            partial.write_text(text)
            partial.replace(path)
        except OSError as error:
            raise verilator.BuildError(f"cannot write to the cache {path.parent}: {error.strerror}; set INTRAIN_CACHE "
                                       "to a folder with space") from None
    return path.read_text()


@dataclasses.dataclass
class Doorbell:
    """Consecutive steps that share a program: all at one learning rate."""

    first: int
    batches: list                    # (images, labels)
    rate: object                     # of golden.schedules; None: inference
    counted: list[int] = dataclasses.field(default_factory=list)


def training_doorbells(network, dataset, steps: int, capacity: int):
    """The doorbells of the network's next step to step ``steps`` - 1: cut where the learning rate changes and at the
    capacity."""
    current = None
    per_epoch = network.steps_per_epoch
    for step in range(network.step_index, steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or step == network.step_index:
            batches = data_module.batches(dataset, network.seed, epoch, network.batch, position)
        rate = network.learning_rate(epoch)
        if current is None or len(current.batches) == capacity or current.rate != rate:
            if current:
                yield current
            current = Doorbell(step, [], rate)
        current.batches.append(next(batches))
    if current:
        yield current


def inference_doorbells(network, images, labels, capacity: int):
    """The doorbells that classify ``images`` at the training batch size."""
    chunks = list(data_module.evaluation_batches(images, labels, network.batch)) if len(labels) else []
    for k in range(0, len(chunks), capacity):
        part = chunks[k:k + capacity]
        labels = [np.resize(labels, network.batch) for _, labels, _ in part]
        yield Doorbell(k, [(images, label) for (images, _, _), label in zip(part, labels, strict=True)], None,
                       [counted for _, _, counted in part])


class Programs:
    """The programs of a run: one per number of steps and learning rate, all with memory for ``capacity`` batches."""

    def __init__(self, config: CoreConfig, network, dataset, steps: int):
        self.config, self.network = config, network
        image_bytes = network.batch * int(np.prod(network.description.input_shape))
        self.capacity = max(1, min(STEPS_PER_DOORBELL, BATCH_BYTES // image_bytes,
                                   max(steps, -(-len(dataset.test_labels) // network.batch))))
        self.made: dict[tuple[int, int | None], compiler.Compiled] = {}

    def of(self, doorbell: Doorbell) -> compiler.Compiled:
        key = len(doorbell.batches), doorbell.rate
        if key not in self.made:
            sizes = dict(batch=self.network.batch, capacity=self.capacity, steps=key[0])
            self.made[key] = (compiler.compile_inference(self.config, self.network, **sizes) if doorbell.rate is None
                              else compiler.compile_training(self.config, self.network, **sizes, rate=doorbell.rate))
        return self.made[key]

    @property
    def layout(self) -> compiler.Compiled:
        """A training program of one step: all training programs have their tensors where it has them."""
        rate = self.network.learning_rate(0)
        return compiler.compile_training(self.config, self.network, batch=self.network.batch, capacity=self.capacity,
                                         steps=1, rate=rate)

    @property
    def memory_bytes(self) -> int:
        return max(4096, *(compiled.memory_bytes for compiled in self.made.values()))


class Plan:
    """The doorbells as files for the scenario: doorbells.json (what to write where, and the program's address) and
    doorbells.bin (the bytes); program-N.bin are the different programs, programs.json names what they refer to."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: list[dict] = []
        self.symbols: dict[str, dict] = {}
        self.size = 0
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("program-*.bin"):
            old.unlink()
        self.data = (folder / "doorbells.bin").open("wb")

    def piece(self, name: str, address: int, data: bytes) -> list:
        self.data.write(data)
        self.size += len(data)
        return [name, address, self.size - len(data), len(data)]

    def add(self, compiled: compiler.Compiled, doorbell: Doorbell, network, state=()):
        """``state`` are (region, bytes) pairs to write before this doorbell."""
        converted = [network.convert(images) for images, _ in doorbell.batches]
        writes = [self.piece(region.name, region.address, bytes(data)) for region, data in state]
        batches = compiled.batches([images for images, _ in converted], [labels for _, labels in doorbell.batches],
                                   [exponent for _, exponent in converted])
        writes += [self.piece(region.name, region.address, data) for region, data in batches]
        writes.append(self.piece("program", compiled.program.address, compiled.program.image))
        self.entries.append({"program": compiled.program.address, "step": doorbell.first, "writes": writes,
                             "kind": "inference" if doorbell.rate is None else "training",
                             "steps": len(doorbell.batches), "inputs": ["images", "labels", "exponents"]})
        key = hashlib.sha256(compiled.program.image).hexdigest()
        if key not in self.symbols:
            (self.folder / f"program-{len(self.symbols)}.bin").write_bytes(compiled.program.image)
            kind = "forward pass" if doorbell.rate is None else "training step"
            title = (f"{kind} x {len(doorbell.batches)}: {network.method} {network.description.name}, batch "
                     f"{network.batch}, core {compiled.config.name}")
            self.symbols[key] = symbols(compiled, title).to_json()

    def close(self):
        self.data.close()
        (self.folder / "doorbells.json").write_text(json.dumps(self.entries))
        (self.folder / "programs.json").write_text(json.dumps(self.symbols))
