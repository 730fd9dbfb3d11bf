"""What every method shares: state, step counter, digests, prediction, and the record of a step."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod

import numpy as np

from golden import ops
from golden.data import check_batch, check_labels, data_set
from golden.errors import InputError
from golden.networks import Network
from golden.schedules import learning_rate, parse

EXPONENT_LIMIT = 2**15 - 1


def digest(state: dict[str, tuple[np.ndarray, int]]) -> str:
    """SHA-256 over trained state: of each tensor the little-endian C-order bytes, then the exponent as int32."""
    sha = hashlib.sha256()
    for array, exponent in state.values():
        sha.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        sha.update(np.int32(exponent).astype("<i4").tobytes())
    return sha.hexdigest()


class Record(dict):
    """Tensors of one step by name. `required` lists the names that every execution must produce."""

    required: tuple[str, ...] = ()


class Trace:
    """What a forward pass leaves for the backward pass, and the record under construction."""

    def __init__(self, intermediates: bool):
        self.record = Record()
        self.inputs: dict[str, np.ndarray] = {}
        self.weights: dict[str, tuple[np.ndarray, int]] = {}
        self.choices: dict[str, np.ndarray] = {}
        self.masks: dict[str, np.ndarray] = {}
        self.clipped: dict[str, np.ndarray] = {}
        self.statistics: dict[str, object] = {}
        self.optional: dict[str, np.ndarray] = {}
        self._keep = intermediates

    def intermediate(self, name: str, tensor: np.ndarray) -> None:
        """Record a tensor that other executions may fuse away."""
        if self._keep:
            self.optional[name] = tensor


class Execution(ABC):
    """A network being trained by a method.

    `state` maps tensor names, in network order, to (array, exponent). `step_index` is the absolute training
    step. The batch size is fixed by `batch` or by the first step: the tensors' exponents depend on it.

    The flow of a step calls layer operations through `ops` and the method's arithmetic through `rules` (both by the
    names of the golden modules), so that an execution on another device replaces them and keeps the flow.
    """

    ops = ops
    rules: object = None

    unsupported: tuple[type, ...] = ()
    options: tuple[str, ...] = ()

    def __init__(self, method: str, description: Network, seed: int, *, batch: int | None = None,
                 rates: str | None = None):
        for layer in description.layers:
            if isinstance(layer, self.unsupported):
                raise InputError(
                    f"method {method} has no rule for {type(layer).__name__} ({layer.name} of "
                    f"{description.name}): use dfp or float, or a network without it"
                )
        if not 0 <= seed < 2**32:
            raise InputError(f"--seed must be 0..{2**32 - 1}, got {seed}")
        self.method = method
        self.description = description
        self.data = data_set(description.data)
        self.seed = seed
        self.batch = None
        self.rates = rates
        if rates is not None:
            parse(method, rates)
        self.chosen_options: dict = {}
        self.step_index = 0
        self.state: dict[str, tuple[np.ndarray, int]] = {}
        if batch is not None:
            self.set_batch(batch)

    # Supplied by methods

    @abstractmethod
    def convert(self, images: np.ndarray) -> tuple[np.ndarray, int]:
        """Raw uint8 images [n][h][w][c] -> (int8 mantissas [n][h][w][c], exponent)."""

    @abstractmethod
    def _forward(self, x: np.ndarray, exponent: int, trace: Trace) -> tuple[np.ndarray, int]:
        """Logits and their exponent; every tensor on the way goes into ``trace``."""

    @abstractmethod
    def _step(self, x: np.ndarray, exponent: int, labels: np.ndarray, trace: Trace) -> None:
        """One training step: the state becomes that after it; every tensor goes into ``trace``."""

    # Replaced by executions on another device

    def _place(self, batch: np.ndarray):
        """Images or labels of a batch, where the step computes."""
        return batch

    def _collect(self, record: Record) -> Record:
        """A finished record, readable with numpy."""
        return record

    # Shared

    def set_batch(self, batch: int) -> None:
        self.batch = check_batch(batch, self.data.train)

    @property
    def steps_per_epoch(self) -> int:
        return self.data.train // self.batch

    @property
    def epoch(self) -> int:
        return self.step_index // self.steps_per_epoch

    def learning_rate(self, epoch: int | None = None):
        """The schedule's value for an epoch (default: that of the current step)."""
        return learning_rate(self.method, self.description.name, self.epoch if epoch is None else epoch,
                             self.data.name, self.rates)

    def check_images(self, images) -> None:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.shape[1:] != self.description.input_shape or len(images) == 0:
            raise InputError(
                f"images must be uint8 [n]{list(self.description.input_shape)}, got {images.dtype} {list(images.shape)}"
            )

    def check_exponent(self, exponent: int) -> int:
        """Exponents are signed 16 bit; golden refuses what the hardware flags."""
        if not -EXPONENT_LIMIT - 1 <= exponent <= EXPONENT_LIMIT:
            raise OverflowError(f"exponent {exponent} exceeds 16 bits")
        return exponent

    def _input(self, images) -> tuple[np.ndarray, int]:
        if not isinstance(images, tuple):
            return self.convert(np.asarray(images))
        x, exponent = np.asarray(images[0]), int(images[1])
        if x.dtype != np.int8 or x.shape[1:] != self.description.input_shape or (x.size and x.min() == -128):
            raise InputError(
                f"converted images must be int8 -127..127 [n]{list(self.description.input_shape)}, "
                f"got {x.dtype} {list(x.shape)}"
            )
        return x, exponent

    def forward(self, images) -> tuple[np.ndarray, int]:
        """(logits [n][classes], exponent) of raw or converted images, with the current weights."""
        x, exponent = self._input(images)
        logits, exponent = self._forward(self._place(x), exponent, Trace(False))
        return self._collect(Record(logits=logits))["logits"], exponent

    def predict(self, images) -> np.ndarray:
        """The class of each image: the first largest logit."""
        return self.forward(images)[0].argmax(axis=1)

    def loss(self, logits: np.ndarray, exponent: int, labels: np.ndarray) -> float:
        """Mean cross-entropy of logits * 2**exponent in float64; for reporting only."""
        z = np.ldexp(np.asarray(logits, np.float64), exponent)
        z -= z.max(axis=1, keepdims=True)
        return float((np.log(np.exp(z).sum(axis=1)) - z[np.arange(len(z)), labels]).mean())

    def step(self, images, labels, intermediates: bool = False) -> Record:
        """One training step; its record. `intermediates` also records tensors that are not required."""
        x, exponent = self._input(images)
        labels = check_labels(labels, self.description.classes)
        if labels.shape != (len(x),):
            raise InputError(f"{len(x)} images but labels of shape {labels.shape}")
        if self.batch is None:
            self.set_batch(len(x))
        if len(x) != self.batch:
            raise InputError(f"this network trains with batches of {self.batch}, got {len(x)} images")
        trace = Trace(intermediates)
        self._step(self._place(x), exponent, self._place(labels), trace)
        trace.record.required = tuple(trace.record)
        trace.record.update(trace.optional)
        self.step_index += 1
        return self._collect(trace.record)

    def host_state(self) -> dict[str, tuple[np.ndarray, int]]:
        """The state as numpy arrays."""
        return self.state

    def digest(self) -> str:
        """SHA-256 over all trained state in network order."""
        return digest(self.host_state())
