"""``python -m sim train``: trains on the simulated core and checks every tensor of every step against golden."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
from tqdm import tqdm

import golden.train
from golden import data as data_module
from golden.execution import digest
from hw import verilog
from hw.config import CoreConfig
from hw.core import COUNTERS, VectorActivity
from hw.feeder import Activity
from hw.scalar import STEP

from . import compiler, report, trace, verilator
from .session import simulate
from .shared import MemorySettings, SimulationError, SnapshotPlan

__all__ = ["Mismatch", "Checker", "generated_verilog", "train"]

SLOTS = 64
STEPS_PER_DOORBELL = 45
BATCH_BYTES = 64 << 20
"""Memory for batches: with large images fewer steps share a doorbell."""


class Mismatch(SimulationError):
    """The core and golden differ; the message names the place."""


class Checker:
    """Compares snapshots of the core's memory with golden's steps, and keeps what the report shows.

    ``expected`` is the golden network; it makes the step that a snapshot shows. Required tensors are compared;
    with ``intermediates`` also what the core materialises beyond them.
    """

    def __init__(self, compiled: compiler.Compiled, expected, *, intermediates: bool = False):
        self.compiled, self.expected, self.intermediates = compiled, expected, intermediates
        # The first layer's input was written by the host; the scenario checks that it is still there.
        self.tensors = {name: tensor for name, tensor in compiled.tensors.items() if tensor.region.name != "images"}
        if not intermediates:
            self.tensors = {name: tensor for name, tensor in self.tensors.items()
                            if not name.endswith(("accumulator", "choice"))}
        self.compared = 0
        self.not_compared: set[str] = set()

    @property
    def regions(self) -> tuple[tuple[int, int], ...]:
        """(address, bytes) to snapshot: the scalar registers, then the tensors."""
        regions = [self.compiled.dump, *(tensor.region for tensor in self.tensors.values())]
        return tuple((region.address, region.nbytes) for region in regions)

    def step(self, snapshot, images, labels) -> dict:
        """Make golden's step and compare; returns the step's line for the report."""
        step = self.expected.step_index
        record = self.expected.step(images, labels, intermediates=self.intermediates)
        scalars = np.frombuffer(snapshot.regions[0], "<i4")
        executed = {name: int(scalars[register]) for name, register in self.compiled.scalars.items()}
        executed |= {name: tensor.unpack(raw) for (name, tensor), raw
                     in zip(self.tensors.items(), snapshot.regions[1:], strict=True)}
        if scalars[STEP] != step:
            raise Mismatch(f"the core says it made step {scalars[STEP]}, expected step {step}")
        for name, expected in record.items():
            if name not in executed:
                if name not in self.compiled.tensors:
                    self.not_compared.add(name)
                self.compared += name in self.compiled.tensors
                continue
            self._compare(step, name, executed[name], expected, snapshot.cycle)
            self.compared += 1
        state = {name: (executed[name], executed[f"{name}.exponent"]) for name in self.expected.state}
        logits, exponent = executed["logits"], executed["logits.exponent"]
        return {"step": step, "weights": digest(state), "cycle": snapshot.cycle,
                "loss": self.expected.loss(logits, exponent, labels),
                "golden": self.expected.loss(record["logits"], record["logits.exponent"], labels),
                "bits": {name: int(np.abs(value.astype(np.int64)).max()).bit_length() + 1
                         for name, value in executed.items() if isinstance(value, np.ndarray)}}

    def _compare(self, step: int, name: str, got, expected, cycle: int):
        layer, _, tensor = name.partition(".")
        where = f"step {step}, layer {layer}, tensor {tensor or 'logits'}"
        tail = f"at cycle {cycle}, seed {self.expected.seed}"
        if not isinstance(got, np.ndarray):
            if got != expected:
                raise Mismatch(f"{where}: expected {expected}, got {got} {tail}")
            return
        expected = np.asarray(expected).reshape(got.shape)
        if not np.array_equal(got, expected):
            wrong = np.argwhere(got != expected)
            index = tuple(int(i) for i in wrong[0])
            raise Mismatch(f"{where}, index {list(index)}: expected {expected[index]}, got {got[index]} {tail} "
                           f"({len(wrong)} of {got.size} elements differ)")


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
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{time.time_ns()}.part")
        partial.write_text(verilog.generate(config)[0])
        partial.replace(path)
    return path.read_text()


@dataclasses.dataclass
class Doorbell:
    """Consecutive steps that share a program: all at one learning rate."""

    first: int
    batches: list                    # (images, labels)
    rate: object                     # of golden.schedules; None: inference
    counted: list[int] = dataclasses.field(default_factory=list)


def _training_doorbells(network, dataset, steps: int, capacity: int):
    """The doorbells of steps 0 .. steps - 1: cut where the learning rate changes and at the capacity."""
    current = None
    per_epoch = network.steps_per_epoch
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0:
            batches = data_module.batches(dataset, network.seed, epoch, network.batch, 0)
        rate = golden.train.learning_rate(network.method, network.description.name, epoch)
        if current is None or len(current.batches) == capacity or current.rate != rate:
            if current:
                yield current
            current = Doorbell(step, [], rate)
        current.batches.append(next(batches))
    yield current


def _inference_doorbells(network, images, labels, capacity: int):
    chunks = list(data_module.evaluation_batches(images, labels, network.batch)) if len(labels) else []
    for k in range(0, len(chunks), capacity):
        part = chunks[k:k + capacity]
        labels = [np.resize(labels, network.batch) for _, labels, _ in part]
        yield Doorbell(k, [(images, label) for (images, _, _), label in zip(part, labels, strict=True)], None,
                       [counted for _, _, counted in part])


class _Plan:
    """The doorbells as files for the scenario."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.entries: list[dict] = []
        self.size = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.data = (folder / "doorbells.bin").open("wb")

    def piece(self, name: str, address: int, data: bytes) -> list:
        self.data.write(data)
        self.size += len(data)
        return [name, address, self.size - len(data), len(data)]

    def add(self, compiled: compiler.Compiled, doorbell: Doorbell, network, state=()):
        converted = [network.convert(images) for images, _ in doorbell.batches]
        writes = [self.piece(region.name, region.address, data) for region, data in state]
        batches = compiled.batches([images for images, _ in converted], [labels for _, labels in doorbell.batches],
                                   [exponent for _, exponent in converted])
        writes += [self.piece(region.name, region.address, data) for region, data in batches]
        writes.append(self.piece("program", compiled.program.address, compiled.program.image))
        self.entries.append({"program": compiled.program.address, "step": doorbell.first, "writes": writes,
                             "inputs": ["images", "labels", "exponents"]})

    def close(self):
        self.data.close()
        (self.folder / "doorbells.json").write_text(json.dumps(self.entries))


def train(config: CoreConfig, network, dataset, steps: int, out: Path, *, settings: MemorySettings | None = None,
          intermediates: bool = False, test_images: int | None = None, log=print) -> dict:
    """Train ``network`` (golden's, fresh) for ``steps`` steps on the simulated core, then let it classify the test set
    there (or only its first ``test_images``).

    Writes digests.jsonl, steps.jsonl, cycles.json, summary.json and report.html into ``out``; returns the summary.
    Raises :class:`Mismatch` at the first difference from golden.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    floating = golden.train.build("float", network.description.name, network.seed, data=network.description.data,
                                  batch=network.batch)
    image_bytes = network.batch * int(np.prod(network.description.input_shape))
    capacity = max(1, min(STEPS_PER_DOORBELL, BATCH_BYTES // image_bytes,
                          max(steps, -(-len(dataset.test_labels) // network.batch))))

    programs: dict = {}

    def program(doorbell: Doorbell) -> compiler.Compiled:
        key = len(doorbell.batches), doorbell.rate
        if key not in programs:
            sizes = dict(batch=network.batch, capacity=capacity, steps=key[0])
            programs[key] = (compiler.compile_inference(config, network, **sizes) if doorbell.rate is None
                             else compiler.compile_training(config, network, **sizes, rate=doorbell.rate))
        return programs[key]

    training = list(_training_doorbells(network, dataset, steps, capacity))
    testing = list(_inference_doorbells(network, dataset.test_images[:test_images], dataset.test_labels[:test_images],
                                        capacity))
    plan = _Plan(out / "run")
    for number, doorbell in enumerate(training + testing):
        compiled = program(doorbell)
        plan.add(compiled, doorbell, network, compiled.state(network.state) if number == 0 else ())
    plan.close()
    layout = program(training[0])
    checker = Checker(layout, network, intermediates=intermediates)

    build = verilator.build(generated_verilog(config), log=log)
    settings = dataclasses.replace(
        settings or MemorySettings(latency=100, outstanding=64),
        size=max(4096, *(compiled.memory_bytes for compiled in programs.values())))
    batches = deque((doorbell, k, *batch) for doorbell in training + testing
                    for k, batch in enumerate(doorbell.batches))
    lines, predictions, expected_predictions = [], [], []
    digests = (out / "digests.jsonl").open("w")
    logits_place = 1 + list(checker.tensors).index("logits")
    logits_tensor = layout.tensors["logits"]
    bar = tqdm(total=len(batches), unit="step", file=sys.stderr, disable=None, desc="simulating")

    def consume(snapshot):
        doorbell, k, images, labels = batches.popleft()
        if doorbell.rate is None:
            logits = logits_tensor.unpack(snapshot.regions[logits_place])
            expected, _ = network.forward(images)
            if not np.array_equal(logits, expected):
                raise Mismatch(f"inference batch {doorbell.first + k}: logits differ from golden's at cycle "
                               f"{snapshot.cycle}, seed {network.seed}")
            predictions.extend(logits[:doorbell.counted[k]].argmax(axis=1))
            expected_predictions.extend(expected[:doorbell.counted[k]].argmax(axis=1))
        else:
            line = checker.step(snapshot, images, labels)
            record = floating.step(images, labels)
            line["float"] = floating.loss(record["logits"], record["logits.exponent"], labels)
            digests.write(json.dumps({"step": line["step"], "weights": line.pop("weights")}) + "\n")
            lines.append(line)
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {snapshot.cycle} cycles")
        bar.update()

    with digests, bar:
        result = simulate(
            build, "sim.scenario:run",
            {"folder": str((out / "run").resolve()), "window": [0, settings.size], "limit": 1 << 40,
             "seed": network.seed, "counters": len(COUNTERS)},
            out=out, settings=settings, consumer=consume,
            plan=SnapshotPlan(layout.dump.address + 4 * STEP, checker.regions, slots=SLOTS, blocks=True))
    if result.stopped:
        raise SimulationError(f"stopped by the user after {len(lines)} steps")

    summary = _summary(config, network, floating, dataset, steps, result, checker, lines, predictions,
                       expected_predictions, training, build, time.monotonic() - started, layout)
    tags = {layout.program.first_tag + number: " ".join(key) for number, key in enumerate(layout.program.tags)}
    trace.write_trace(out / "trace.json", result.events, tags, result.cycles)
    with (out / "steps.jsonl").open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    (out / "cycles.json").write_text(json.dumps(_cycles(layout, result, steps, config), indent=1) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report.write_report(out)
    return summary


def _summary(config, network, floating, dataset, steps, result, checker, lines, predictions, expected_predictions,
             training, build, seconds, layout) -> dict:
    cycles = sum(doorbell["cycles"] for doorbell in result.value[:len(training)])
    macs = network.description.training_macs(network.batch) * steps
    labels = dataset.test_labels[:len(predictions)]
    accuracies = {} if not predictions else {
        "test_accuracy": float((np.array(predictions) == labels).mean()),
        "golden_accuracy": float((np.array(expected_predictions) == labels).mean()),
        "float_accuracy": golden.train.evaluate(floating, dataset.test_images[:len(labels)], labels).accuracy}
    writes = {}
    for write in result.host_writes:
        write = write if isinstance(write, dict) else dataclasses.asdict(write)
        writes.setdefault(write["name"], []).append(write["doorbell"])
    return {
        "method": network.method, "model": network.description.name, "data": dataset.name, "batch": network.batch,
        "steps": steps, "seed": network.seed, "core": config.name,
        "final_loss": lines[-1]["loss"],
        "test_images": len(predictions), **accuracies,
        "bit_exact": True,               # the first difference would have ended the run
        "tensors_compared": checker.compared, "not_compared": sorted(checker.not_compared),
        "zero_tensors": any(doorbell["zero"] for doorbell in result.value[:len(training)]),
        "doorbells": len(training), "host_writes": {name: len(times) for name, times in writes.items()},
        "cycles": cycles, "cycles_per_step": cycles / steps, "macs": macs,
        "mac_utilization": macs / (cycles * config.rows * config.columns),
        "cycles_per_second": result.cycles_per_second,
        "clocked_cycles_per_second": result.cycles / result.clocked_seconds,
        "cpu_cycles_per_second": result.cycles / result.cpu_seconds,
        "seconds": seconds, "build_seconds": build.seconds,
        "build_cached": build.cached,
        "configuration": dataclasses.asdict(config),
        "versions": {"python": sys.version.split()[0],
                     **{name: importlib.metadata.version(name)
                        for name in ("amaranth", "cocotb", "verilator", "numpy")}},
        "commands": [f"python -m sim train --method {network.method} --model {network.description.name} "
                     f"--data {dataset.name} --batch {network.batch} --steps {steps} --seed {network.seed} "
                     f"--core {config.name}"],
    }


def _cycles(layout: compiler.Compiled, result, steps: int, config: CoreConfig) -> list[dict]:
    """Cycles by layer and pass over the training, from the core's trace outputs."""
    rows = []
    macs = layout.macs
    for number, (layer, step) in enumerate(layout.program.tags):
        tag = layout.program.first_tag + number
        product, vector = result.activity[0, tag], result.activity[1, tag]
        if (layer, step) in macs:
            counts = {activity.name.lower(): int(product[activity]) for activity in Activity}
            row = {"engine": "product", "macs": macs[layer, step] * steps, "busy": counts["busy"],
                   "stalled_in": counts["operand"] + counts["weights"], "stalled_out": counts["results"],
                   "idle": counts["spacing"] + counts["drain"] + counts["dependency"], "detail": counts}
        else:
            counts = {activity.name.lower(): int(vector[activity]) for activity in VectorActivity}
            row = {"engine": "vector", "macs": 0, "busy": counts["busy"], "stalled_in": counts["source"],
                   "stalled_out": counts["target"], "idle": 0, "detail": counts}
        row = {"layer": layer, "pass": step, "cycles": sum(row[key] for key in (
            "busy", "stalled_in", "stalled_out", "idle")), **row}
        if row["cycles"]:
            rows.append(row)
    return rows
