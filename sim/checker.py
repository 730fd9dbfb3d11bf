"""Comparison of the core's memory after each step with golden's."""

from __future__ import annotations

import numpy as np

from golden.execution import digest
from golden.range import bit_length
from hw.scalar import STEP

from . import compiler
from .shared import SimulationError

__all__ = ["COMPARISONS", "Checker", "Mismatch"]

COMPARISONS = ("full", "digests")
"""full: every required tensor of every step; digests: the trained state after every step, and the logits' loss."""


class Mismatch(SimulationError):
    """The core and golden differ; the message names the place.

    ``step`` and ``name`` (golden's record name) say where, ``index`` which element of a tensor is wrong first (None
    for exponents), ``cycle`` when the step ended.
    """

    def __init__(self, message: str, step: int = 0, name: str = "", index: tuple | None = None, cycle: int = 0):
        super().__init__(message)
        self.step, self.name, self.index, self.cycle = step, name, index, cycle


class Checker:
    """Compares snapshots of the core's memory with golden's steps, and keeps what the report shows.

    ``expected`` is the golden network; it makes the step that a snapshot shows. With ``compare`` "full" required
    tensors are compared, with ``intermediates`` also what the core materialises beyond them; with "digests" only
    the state's digest, and where that differs the first wrong tensor of the state is named.
    """

    def __init__(self, compiled: compiler.Compiled, expected, *, compare: str = "full", intermediates: bool = False):
        if compare not in COMPARISONS:
            raise ValueError(f"compare is {compare!r}: use one of {', '.join(COMPARISONS)}")
        self.compiled, self.expected = compiled, expected
        self.full, self.intermediates = compare == "full", intermediates and compare == "full"
        # The first layer's input was written by the host; the scenario checks that it is still there.
        self.tensors = {name: tensor for name, tensor in compiled.tensors.items() if tensor.region.name != "images"}
        if not self.full:
            self.tensors = {name: self.tensors[name] for name in ("logits", *expected.state)}
        elif not intermediates:
            self.tensors = {name: tensor for name, tensor in self.tensors.items()
                            if not name.endswith(("accumulator", "choice"))}
        self.compared = 0
        self.not_compared: set[str] = set()

    @property
    def regions(self) -> tuple[tuple[int, int], ...]:
        """(address, bytes) to snapshot: the scalar registers, then the tensors."""
        regions = [self.compiled.dump, *(tensor.region for tensor in self.tensors.values())]
        return tuple((region.address, region.nbytes) for region in regions)

    def raw(self, snapshot, name: str) -> np.ndarray:
        """A tensor's bytes as they lie in the core's memory."""
        return snapshot.regions[1 + list(self.tensors).index(name)]

    def memory_state(self, snapshot) -> dict[str, np.ndarray]:
        """A copy of the trained state's bytes and of the scalar registers, by region name: what a later run can start
        from."""
        state = {self.tensors[name].region.name: self.raw(snapshot, name).copy() for name in self.expected.state}
        return {**state, self.compiled.dump.name: snapshot.regions[0].copy()}

    def step(self, snapshot, images, labels) -> dict:
        """Make golden's step and compare; returns the step's line for the report."""
        step = self.expected.step_index
        record = self.expected.step(images, labels, intermediates=self.intermediates)
        scalars = np.frombuffer(snapshot.regions[0], "<i4")
        executed = {name: int(scalars[register]) for name, register in self.compiled.scalars.items()}
        executed |= {name: tensor.unpack(raw) for (name, tensor), raw
                     in zip(self.tensors.items(), snapshot.regions[1:], strict=True)}
        if scalars[STEP] != step:
            raise Mismatch(f"the core says it made step {scalars[STEP]}, expected step {step}", step)
        state = {name: (executed[name], executed[f"{name}.exponent"]) for name in self.expected.state}
        found = digest(state)
        if self.full:
            self._compare_record(step, record, executed, snapshot.cycle)
        else:
            self._compare_state(step, found, state, snapshot.cycle)
        logits, exponent = executed["logits"], executed["logits.exponent"]
        return {"step": step, "weights": found, "cycle": snapshot.cycle,
                "loss": self.expected.loss(logits, exponent, labels),
                "golden": self.expected.loss(record["logits"], record["logits.exponent"], labels),
                "bits": {name: bit_length(max(int(value.max()), -int(value.min()))) + 1
                         for name, value in executed.items() if isinstance(value, np.ndarray)}}

    def _compare_record(self, step, record, executed, cycle):
        for name, expected in record.items():
            if name not in executed:
                if name not in self.compiled.tensors:
                    self.not_compared.add(name)
                self.compared += name in self.compiled.tensors
                continue
            self._compare(step, name, executed[name], expected, cycle)
            self.compared += 1

    def _compare_state(self, step, found, state, cycle):
        if found != self.expected.digest():
            for name, (tensor, exponent) in self.expected.state.items():
                self._compare(step, name, state[name][0], tensor, cycle)
                self._compare(step, f"{name}.exponent", state[name][1], exponent, cycle)
        self.compared += 2 * len(state)

    def _compare(self, step: int, name: str, got, expected, cycle: int):
        layer, _, tensor = name.partition(".")
        where = f"step {step}, layer {layer}, tensor {tensor or 'logits'}"
        tail = f"at cycle {cycle}, seed {self.expected.seed}"
        if not isinstance(got, np.ndarray):
            if got != expected:
                raise Mismatch(f"{where}: expected {expected}, got {got} {tail}", step, name, None, cycle)
            return
        expected = np.asarray(expected).reshape(got.shape)
        if not np.array_equal(got, expected):
            wrong = np.argwhere(got != expected)
            index = tuple(int(i) for i in wrong[0])
            raise Mismatch(f"{where}, index {list(index)}: expected {expected[index]}, got {got[index]} {tail} "
                           f"({len(wrong)} of {got.size} elements differ)", step, name, index, cycle)
