"""One step of a run again, with waves: ``python -m sim replay DIR --step N``, and by itself after a mismatch."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import deque
from pathlib import Path

import numpy as np

import golden.train
from golden import data as data_module
from hw.core import COUNTERS
from hw.descriptor import DESCRIPTOR_BYTES
from hw.scalar import STEP

from . import doorbells, trace, verilator, waves
from .checker import Checker, Mismatch
from .disassembler import producers, symbols, text
from .session import simulate
from .shared import SimulationError, SnapshotPlan
from .train import DIGESTS, load, memory_settings

__all__ = ["replay"]

WINDOW_CYCLES, MARGIN = 20_000, 100
"""Cycles in the waveform at most, and around the pass of interest."""


@dataclasses.dataclass
class Played:
    """What a simulation of some steps showed: the program, the first difference, cycle ranges of the last step."""

    compiled: object
    mismatch: Mismatch | None
    start: int
    end: int
    events: np.ndarray

    def span(self, tag: int | None) -> tuple[int, int]:
        """First and last cycle of a tag's work in the last step (None: of the step)."""
        following = dict.fromkeys((0, 1), self.end)
        found = []
        for cycle, engine, what in self.events[::-1].tolist():
            if self.start <= cycle <= self.end and tag is not None and what == tag:
                found += [cycle, following[engine]]
            following[engine] = cycle
        return (min(found), min(max(found), self.end)) if found else (self.start, self.end)


def _network_at(resumed, dataset, step: int, folder: Path):
    """Golden's network before ``step``, from the checkpoint or from the start, checked with the run's digests."""
    network = resumed.network
    if network.step_index > step:
        run = resumed.run
        network = golden.train.build(run["method"], run["model"], run["seed"], data=run["data"], batch=run["batch"],
                                     **run["options"])
    while network.step_index < step:
        epoch, position = divmod(network.step_index, network.steps_per_epoch)
        for images, labels in data_module.batches(dataset, network.seed, epoch, network.batch, position):
            network.step(images, labels)
            if network.step_index == step:
                break
    lines = (folder / DIGESTS).read_text().splitlines() if (folder / DIGESTS).exists() else []
    if 0 < step <= len(lines) and json.loads(lines[step - 1])["weights"] != network.digest():
        raise SimulationError(f"{folder / DIGESTS} has another digest of step {step - 1} than golden makes now: "
                              "was the run made by another version?")
    return network


def _play(resumed, network, dataset, last: int, out: Path, flavour: str, log, window=None) -> Played:
    """Simulate the network's next step to step ``last`` as one doorbell, comparing everything."""
    programs = doorbells.Programs(resumed.config, network, dataset, max(resumed.steps, last + 1))
    first = network.step_index
    (doorbell,) = doorbells.training_doorbells(network, dataset, last + 1, programs.capacity)
    compiled = programs.of(doorbell)
    plan = doorbells.Plan(out / "run")
    plan.add(compiled, doorbell, network, compiled.state(network.state))
    plan.close()
    (out / "run" / "records.jsonl").unlink(missing_ok=True)
    checker = Checker(compiled, network, intermediates=True)
    batches, cycles, found = deque(doorbell.batches), [0], []

    def consume(snapshot):
        cycles.append(snapshot.cycle)
        images, labels = batches.popleft()
        if not found:
            try:
                checker.step(snapshot, images, labels)
            except Mismatch as mismatch:            # the rest of the step is of interest, too
                found.append(mismatch)

    build = verilator.build(doorbells.generated_verilog(resumed.config), flavour=flavour, log=log)
    settings = dataclasses.replace(memory_settings(resumed.run), size=programs.memory_bytes)
    result = simulate(
        build, "sim.scenario:run",
        {"folder": str((out / "run").resolve()), "window": [0, settings.size], "limit": 1 << 40, "seed": network.seed,
         "counters": len(COUNTERS)}, out=out, settings=settings, consumer=consume, waves=window,
        plan=SnapshotPlan(compiled.dump.address + 4 * STEP, checker.regions, slots=4, blocks=True))
    number = found[0].step - first + 1 if found else len(cycles) - 1
    return Played(compiled, found[0] if found else None, cycles[number - 1], cycles[number], result.events)


def _producers(compiled, mismatch: Mismatch) -> list[int]:
    """Numbers of the descriptors that made the wrong element."""
    if mismatch.name not in {*compiled.tensors, *compiled.scalars}:
        return []
    return producers(compiled, mismatch.name, mismatch.index)


def replay(folder: Path, step: int, *, known: Mismatch | None = None, data_dir: str | None = None, log=print) -> Path:
    """Simulate step ``step`` of the run in ``folder`` again, comparing every tensor, and write DIR/replay-N with
    waves.fst, view.gtkw, trace.json and the listing of the program.

    The step is played alone, from golden's state before it; if a ``known`` mismatch does not show that way, from the
    start of its doorbell. Waves show the pass that made the first wrong element, or the step's beginning. Returns the
    new folder; ``log`` gets what was found.
    """
    folder = Path(folder)
    resumed = load(folder)
    if not 0 <= step < resumed.steps:
        raise SimulationError(f"--step must be 0 to {resumed.steps - 1}, the steps of this run, got {step}")
    dataset = data_module.load(resumed.run["data"], data_dir or resumed.run["data_dir"])
    out = folder / f"replay-{step}"
    plan = folder / "run" / "doorbells.json"
    entries = json.loads(plan.read_text()) if plan.exists() else []
    starts = [entry["step"] for entry in entries
              if entry["kind"] == "training" and entry["step"] <= step < entry["step"] + entry["steps"]]

    def play(first, flavour, window=None):
        network = _network_at(load(folder), dataset, first, folder)
        return _play(resumed, network, dataset, step, out, flavour, log, window)

    first = step
    played = play(first, "fast")
    if known and not played.mismatch and starts and starts[0] < step:
        log(f"step {step} alone is right; playing it from step {starts[0]}, where its doorbell starts")
        first = starts[0]
        played = play(first, "fast")
    tag, program, wrong = None, played.compiled.program, played.mismatch or known
    numbers = _producers(played.compiled, wrong) if wrong else []
    if numbers:
        block = program.blocks[numbers[0]]
        tag = program.first_tag + program.tags.index((block.layer, block.step))
        log("made by")
    for number in numbers:
        start = number * DESCRIPTOR_BYTES
        raw = program.image[start:start + DESCRIPTOR_BYTES]
        log("\n".join(text(raw, number, program.address + start, symbols(played.compiled))))
    if played.mismatch:
        log(f"replayed: {played.mismatch}")
    elif known:
        log("replayed without a difference: it depends on what ran before this doorbell")
    else:
        log(f"replayed: every tensor of step {step} is golden's")
    begin, end = played.span(tag)
    window = max(1, begin - MARGIN), min(end + MARGIN, begin - MARGIN + WINDOW_CYCLES)
    traced = play(first, "debug", window)
    if bool(traced.mismatch) != bool(played.mismatch):
        log("the debug build, whose registers start at random, " + (f"differs: {traced.mismatch}" if traced.mismatch
                                                                    else "shows no difference"))
    what = " ".join(program.tags[tag - program.first_tag]) if tag is not None else f"step {step}"
    names = {program.first_tag + number: " ".join(key) for number, key in enumerate(program.tags)}
    waves.write_view(out / "view.gtkw", doorbells.generated_verilog(resumed.config), "intrain", f"intrain: {what}",
                     *window, begin)
    trace.write_trace(out / "trace.json", traced.events, names, traced.end)
    part = "" if window[1] > end else f" (the first of {end - begin:,})"
    log(f"waves of {what}, cycles {window[0]:,} to {window[1]:,}{part}: gtkwave {shlex.quote(str(out / 'view.gtkw'))}")
    return out
