"""Golden's methods with tensors on a device: the flow of a step is golden's, operations and arithmetic are torch's."""

from __future__ import annotations

import numpy as np
import torch

import golden.dfp
import golden.niti
import golden.wage
from golden.errors import InputError
from golden.execution import EXPONENT_LIMIT, Execution, Record
from golden.random import Purpose, stream
from golden.train import build as golden_build
from golden.train import load_checkpoint as golden_load_checkpoint
from gpu.graph import WARM_UP, CapturedStep, CudaGraph
from gpu.ops import Ops
from gpu.rounding import Draw


def to_host(value):
    """A tensor as a numpy array (exponents: int); anything else unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.cpu().numpy() if value.ndim else int(value)


class DeviceRecord(Record):
    """A record whose tensors are fetched when they are read: before the next step, which may reuse their memory.

    Of several workers it holds this worker's images, and the logits of all.
    """

    def __getitem__(self, name):
        value = to_host(super().__getitem__(name))
        if name.endswith("exponent") and abs(value) > EXPONENT_LIMIT:
            raise OverflowError(f"{name} {value} exceeds 16 bits")
        return value

    def items(self):
        return [(name, self[name]) for name in self]

    def values(self):
        return [self[name] for name in self]


class OnDevice(Execution):
    """What the methods share on a device. A network starts on the host; `place` moves it."""

    family: str
    before_step: tuple[int, dict] | None = None  # index and state when the latest step began
    graph: type | None = None  # how steps are captured: CudaGraph, or None where they are not
    captured: CapturedStep | None = None
    captured_kind: tuple | None = None  # what a captured step took from the host

    def place(self, ops: Ops) -> OnDevice:
        """Move the state to the device of `ops`; every step after that computes there. Returns the network."""
        if self.batch is not None and self.batch < ops.group.size:
            raise InputError(f"--batch must be at least the number of workers, {ops.group.size}, got {self.batch}")
        self.ops = ops
        self.rules = ops.rules[self.family](ops)
        # dfp waits for maxima within a step, which a graph cannot.
        self.graph = CudaGraph if ops.captures and self.family != "dfp" else None
        self.state = {name: (ops.tensor(array), exponent) for name, (array, exponent) in self.state.items()}
        return self

    def step(self, images, labels, intermediates: bool = False) -> Record:
        self.before_step = self.step_index, dict(self.state)
        self.keeps_intermediates = intermediates
        return super().step(images, labels, intermediates)

    def _step(self, x, exponent, labels, trace):
        if self.graph is None or self.keeps_intermediates:
            return super()._step(x, exponent, labels, trace)
        if self.family == "niti":
            exponent = self.ops.scalar(exponent)
        kind = self.learning_rate(), None if isinstance(exponent, torch.Tensor) else exponent
        if kind != self.captured_kind:
            self.captured_kind, self.captured, self.uncaptured_steps = kind, None, 0
        if self.uncaptured_steps < WARM_UP:
            self.uncaptured_steps += 1
            return super()._step(x, exponent, labels, trace)
        if self.captured is None:
            self.captured = CapturedStep(self, super()._step, self.graph, x, exponent, labels)
        trace.record.update(self.captured.run(x, exponent, labels))

    def check_exponent(self, exponent):
        """An exponent that only the device knows is checked when its record is read."""
        return exponent if isinstance(exponent, torch.Tensor) else super().check_exponent(exponent)

    def host_state(self):
        return {name: (to_host(tensor), exponent) for name, (tensor, exponent) in self.state.items()}

    def _place(self, batch: np.ndarray) -> torch.Tensor:
        self.placed_batch = len(batch)
        return self.ops.tensor(batch[self.ops.group.shard(len(batch))])

    def _collect(self, record: Record) -> Record:
        record["logits"] = self.ops.group.gather(record["logits"], self.placed_batch)
        collected = DeviceRecord(record)
        collected.required = record.required
        return collected


class Niti(OnDevice, golden.niti.Niti):
    family = "niti"


class Wage(OnDevice, golden.wage.Wage):
    family = "wage"

    def _draw(self, layer, shape):
        return Draw(self.seed, self.step_index, stream(layer.index, Purpose.GRADIENT))


BATCH_STREAMS = (
    Purpose.ACTIVATION,
    Purpose.ERROR,
    Purpose.LOSS,
    Purpose.BATCH_NORM_GRADIENT,
    Purpose.RESIDUAL_ADD,
)


class Dfp(OnDevice, golden.dfp.Dfp):
    family = "dfp"

    def _draw(self, index, purpose, shape, offset=0):
        if purpose in BATCH_STREAMS:
            # Words belong to positions in the whole batch.
            offset += self.ops.group.shard(self.batch).start * int(np.prod(shape[1:], dtype=np.int64))
        return Draw(self.seed, self.step_index, stream(index, purpose), offset)


METHODS: dict[str, type[OnDevice]] = {"niti": Niti, "niti-2020": Niti, "wage": Wage, "dfp": Dfp}


def build(method: str, model: str, seed: int, *, ops: Ops | None = None, **options) -> OnDevice:
    """`golden.train.build` on the device of `ops` (default: the CPU)."""
    return golden_build(method, model, seed, methods=METHODS, **options).place(ops or Ops())


def load_checkpoint(out, ops: Ops | None = None) -> tuple[OnDevice, bool | int]:
    """A run of `golden`, `sim` or `gpu` saved in a folder, on the device of `ops`; and its augmentation."""
    network, augment = golden_load_checkpoint(out, METHODS)
    return network.place(ops or Ops()), augment
