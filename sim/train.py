"""``python -m sim train``: trains on the simulated core and checks every tensor of every step against golden."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shlex
import signal
import sys
import threading
import time
from collections import deque
from pathlib import Path

import numpy as np

import golden.train
from golden.train import Interrupted
from hw.config import CoreConfig
from hw.core import COUNTERS, VectorActivity
from hw.feeder import Activity
from hw.scalar import STEP

from . import checkpoint, compiler, control, doorbells, report, trace, verilator
from .accesses import traffic
from .checker import Checker, Mismatch
from .checkpoint import CheckpointError
from .doorbells import Plan, Programs, inference_doorbells, training_doorbells
from .progress import Progress
from .session import simulate
from .shared import MemorySettings, SimulationError, SnapshotPlan

__all__ = ["Account", "Interrupted", "Resumed", "load", "train"]

SLOTS = 64
CHECKPOINT = "checkpoint"
DIGESTS, STEPS, HOST_WRITES = "digests.jsonl", "steps.jsonl", "host_writes.jsonl"
RESULTS = ("summary.json", "cycles.json", "trace.json", "report.html")
SETTINGS = MemorySettings(latency=100, outstanding=64)


@dataclasses.dataclass
class Account:
    """What a run has behind it after ``step`` steps; cycles and activity count training only."""

    step: int = 0
    doorbells: int = 0
    cycles: int = 0
    zero: bool = False               # a tensor was all zero where the method needs its maximum
    beats: list[int] = dataclasses.field(default_factory=lambda: [0, 0])
    seconds: float = 0.0
    compared: int = 0
    not_compared: list[str] = dataclasses.field(default_factory=list)
    host_writes: list[dict] = dataclasses.field(default_factory=list)
    activity: np.ndarray = dataclasses.field(
        default_factory=lambda: np.zeros((2, control.TAGS, control.ACTIVITIES), np.int64))

    def add(self, record: dict):
        """Take a training doorbell's record (see `scenario.run`)."""
        self.cycles += record["cycles"]
        self.zero |= record["zero"]
        self.beats = [total + more for total, more in zip(self.beats, record["beats"], strict=True)]
        self.count(record["activity"])
        self.host_writes += [{**entry, "doorbell": self.doorbells} for entry in record["host_writes"]]
        self.doorbells += 1

    def count(self, activity):
        """Add rows of (engine, tag, activity, cycles)."""
        for engine, tag, what, cycles in activity:
            self.activity[engine, tag, what] += cycles

    def facts(self) -> dict:
        """Everything but the activity, for JSON."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "activity"}


@dataclasses.dataclass
class Resumed:
    """A run read from the checkpoint of its folder: golden's and float's networks at that step, and its settings."""

    config: CoreConfig
    network: object
    floating: object
    account: Account
    run: dict

    @property
    def steps(self) -> int:
        return self.run["steps"]


def load(folder: Path) -> Resumed:
    """Read DIR/checkpoint; raises `CheckpointError` with one line when it is damaged or not of this run."""
    path = Path(folder) / CHECKPOINT
    facts, pieces = checkpoint.load(path)
    run = facts["run"]
    config = CoreConfig(**run["core"])
    network = golden.train.build(run["method"], run["model"], run["seed"], data=run["data"], batch=run["batch"],
                                 **run["options"])
    floating = _floating(network) if run["floating"] else None
    account = Account(**facts["account"])
    account.count(pieces["activity"])
    try:
        _restore(network, floating, account.step, config, pieces)
    except (KeyError, ValueError):
        raise CheckpointError(f"checkpoint {path} was made by another version of this program: use that version, or "
                              "start again") from None
    if account.step:
        lines = _lines(Path(folder) / DIGESTS, account.step, path)
        if json.loads(lines[-1]).get("weights") != network.digest():
            raise CheckpointError(f"checkpoint {path} is not of this run: after step {account.step} its weights differ "
                                  f"from {DIGESTS}; use the checkpoint that belongs to the folder, or start again")
    return Resumed(config, network, floating, account, run)


def _restore(network, floating, step: int, config: CoreConfig, pieces: dict):
    """Put the networks where they were after ``step`` steps, golden's from what lay in the core's memory."""
    if step:
        layout = compiler.compile_training(config, network, batch=network.batch, capacity=1, steps=1,
                                           rate=network.learning_rate(0))
        scalars = layout.dump.layout.unpack(pieces[f"memory:{layout.dump.name}"])
        for name in network.state:
            tensor = layout.tensors[name]
            network.state[name] = (tensor.unpack(pieces[f"memory:{tensor.region.name}"]).copy(),
                                   int(scalars[layout.scalars[f"{name}.exponent"]]))
    for name in floating.state if floating else ():
        floating.state[name] = pieces[f"float:{name}"], 0
    for execution in filter(None, (network, floating)):
        execution.step_index = step


def _floating(network):
    """The float32 network beside golden's, for the report's curve."""
    return golden.train.build("float", network.description.name, network.seed, data=network.description.data,
                              batch=network.batch)


def _lines(path: Path, count: int, source: Path) -> list[str]:
    """The first ``count`` lines of a file with a line a step."""
    lines = path.read_text().splitlines()[:count] if path.is_file() else []
    if len(lines) < count:
        raise CheckpointError(f"checkpoint {source} is of step {count}, but {path} has only {len(lines)} lines: "
                              "use the checkpoint that belongs to the folder, or start again")
    return lines


class Recorder:
    """Keeps a run's folder: a line a step in digests.jsonl and steps.jsonl, and a checkpoint after each doorbell.

    A doorbell's checkpoint is written once its last step is compared and its cycles are known (the scenario leaves
    them in run/records.jsonl shortly after).
    """

    def __init__(self, out: Path, run: dict, account: Account, started: float):
        self.out, self.run, self.account, self.started = out, run, account, started
        self.before = account.seconds
        self.records = out / "run" / "records.jsonl"
        self.records.unlink(missing_ok=True)
        for name in (DIGESTS, STEPS):
            lines = _lines(out / name, account.step, out / CHECKPOINT)
            (out / name).write_text("".join(line + "\n" for line in lines))
        self.lines = [json.loads(line) for line in lines]
        self.digests, self.steps = (out / DIGESTS).open("a"), (out / STEPS).open("a")
        self.taken = 0
        self.waiting: deque[tuple[dict, dict]] = deque()

    def step(self, line: dict):
        self.digests.write(json.dumps({"step": line["step"], "weights": line.pop("weights")}) + "\n")
        self.steps.write(json.dumps(line) + "\n")
        self.lines.append(line)

    def doorbell(self, pieces: dict, **facts):
        """All steps of a training doorbell are compared; ``facts`` go into the account."""
        self.waiting.append((pieces, facts))
        self.poll()

    def poll(self):
        """Write the checkpoints of doorbells whose record is there."""
        if not self.waiting or not self.records.exists():
            return
        complete = self.records.read_text().rpartition("\n")[0].splitlines()
        while self.waiting and self.taken < len(complete):
            pieces, facts = self.waiting.popleft()
            self.account.add(json.loads(complete[self.taken]))
            self.taken += 1
            for name, value in facts.items():
                setattr(self.account, name, value)
            self.save(pieces)

    def save(self, pieces: dict):
        """Write the checkpoint, after the lines that it stands on."""
        self.account.seconds = self.before + time.monotonic() - self.started
        for file in (self.digests, self.steps):
            file.flush()
            os.fsync(file.fileno())
        places = np.argwhere(self.account.activity)
        counts = self.account.activity[tuple(places.T)]
        checkpoint.save(self.out / CHECKPOINT, {**pieces, "activity": np.column_stack([places, counts])},
                        {"run": self.run, "account": self.account.facts()})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for file in (self.digests, self.steps):
            with contextlib.suppress(OSError):      # a full disk was named when the line was written
                file.close()


def _pieces(memory_state, floating) -> dict:
    """What a checkpoint holds: pieces of the core's memory, and the float network's state."""
    pieces = {f"memory:{name}": raw for name, raw in memory_state.items()}
    for name, (array, _) in (floating.state if floating else {}).items():
        pieces[f"float:{name}"] = array
    return pieces


@contextlib.contextmanager
def _own(out: Path):
    """Keep a second run out of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SimulationError(f"another run is writing to {out}: wait for it, or give another --out") from None
        yield


@contextlib.contextmanager
def _termination_as_interrupt():
    """SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def train(config: CoreConfig, network, dataset, steps: int, out: Path, *, settings: MemorySettings | None = None,
          intermediates: bool = False, compare: str = "full", floating: bool = True, test_images: int | None = None,
          data_dir: str | None = None, resumed: Resumed | None = None, log=print) -> dict:
    """Train ``network`` (golden's, fresh) up to step ``steps`` on the simulated core, then let it classify the test
    set there (or only its first ``test_images``).

    ``compare`` is one of `checker.COMPARISONS`; ``floating`` also trains the float32 network for the report;
    ``resumed`` (from `load`, with its network and config) continues the run of the folder ``out``.
    Writes digests.jsonl, steps.jsonl, cycles.json, summary.json, report.html and the checkpoint into ``out``; returns
    the summary. Raises `Mismatch` at the first difference from golden and `Interrupted` when stopped: the message
    says how to go on.
    """
    out = Path(out)
    made = network.step_index
    if steps <= made and (steps < made or (out / RESULTS[0]).exists()):
        raise SimulationError(f"this run already has {made} steps: ask for more than that")
    go_on = f"continue with python -m sim train --resume {shlex.quote(str(out))}"
    run = {"method": network.method, "model": network.description.name, "data": dataset.name, "batch": network.batch,
           "seed": network.seed, "options": network.chosen_options, "core": dataclasses.asdict(config), "steps": steps,
           "settings": dataclasses.asdict(settings or SETTINGS), "intermediates": intermediates, "compare": compare,
           "floating": floating, "test_images": test_images,
           "data_dir": str(Path(data_dir).resolve()) if data_dir else None}
    try:
        with _own(out), _termination_as_interrupt():
            try:
                return _train(config, network, dataset, steps, out, run, resumed, log)
            except KeyboardInterrupt:
                saved = checkpoint.load(out / CHECKPOINT)[0]["account"]["step"] if (out / CHECKPOINT).exists() else None
                if saved is None:
                    raise
                raise Interrupted(f"stopped after step {saved} of {steps}: {go_on}") from None
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        then = go_on if (out / CHECKPOINT).exists() else "start again"
        raise SimulationError(f"cannot write to {out}: {error.strerror or error}{where}; when that is mended, {then}"
                              ) from None


def _train(config, network, dataset, steps, out, run, resumed, log) -> dict:
    started = time.monotonic()
    verilog = doorbells.generated_verilog(config)
    run["verilog"] = hashlib.sha256(verilog.encode()).hexdigest()
    if resumed and resumed.run["verilog"] != run["verilog"]:
        raise CheckpointError(f"checkpoint {out / CHECKPOINT} was made by another version of core {config.name!r} (its "
                              "Verilog differs): use that version, or start again")
    for name in RESULTS if resumed else (*RESULTS, CHECKPOINT, DIGESTS, STEPS, HOST_WRITES):
        (out / name).unlink(missing_ok=True)
    account = resumed.account if resumed else Account()
    floating = resumed.floating if resumed else _floating(network) if run["floating"] else None

    programs = Programs(config, network, dataset, steps)
    training = list(training_doorbells(network, dataset, steps, programs.capacity))
    images = dataset.test_images[:run["test_images"]], dataset.test_labels[:run["test_images"]]
    testing = list(inference_doorbells(network, *images, programs.capacity))
    layout = programs.layout
    plan = Plan(out / "run")
    for number, doorbell in enumerate(training + testing):
        plan.add(programs.of(doorbell), doorbell, network, layout.state(network.state) if number == 0 else ())
    plan.close()
    checker = Checker(layout, network, compare=run["compare"], intermediates=run["intermediates"])
    checker.compared, checker.not_compared = account.compared, set(account.not_compared)
    batches = deque((doorbell, k, *batch) for doorbell in training + testing
                    for k, batch in enumerate(doorbell.batches))
    predictions, expected_predictions = [], []
    times = {}
    progress = Progress(account.step, sum(len(doorbell.batches) for doorbell in training),
                        sum(len(doorbell.batches) for doorbell in testing))

    def classify(snapshot, doorbell, k, images):
        logits = layout.tensors["logits"].unpack(checker.raw(snapshot, "logits"))
        expected, _ = network.forward(images)
        if not np.array_equal(logits, expected):
            raise Mismatch(f"inference batch {doorbell.first + k}: logits differ from golden's at cycle "
                           f"{snapshot.cycle}, seed {network.seed}")
        predictions.extend(logits[:doorbell.counted[k]].argmax(axis=1))
        expected_predictions.extend(expected[:doorbell.counted[k]].argmax(axis=1))

    def consume(snapshot):
        doorbell, k, images, labels = batches.popleft()
        if doorbell.rate is None:
            classify(snapshot, doorbell, k, images)
            progress.step("testing")
            times["last"] = time.monotonic()
            return
        line = checker.step(snapshot, images, labels)
        if floating:
            record = floating.step(images, labels)
            line["float"] = floating.loss(record["logits"], record["logits.exponent"], labels)
        recorder.step(line)
        if k + 1 == len(doorbell.batches):
            recorder.doorbell(_pieces(checker.memory_state(snapshot), floating), step=network.step_index,
                              compared=checker.compared, not_compared=sorted(checker.not_compared))
        progress.step("training", line["loss"])
        times["last"] = time.monotonic()

    def tick(block):
        if block.cycle:
            times.setdefault("first", time.monotonic())
        recorder.poll()
        progress.update(block.cycle, block.wall_nanoseconds / 1e9)

    with Recorder(out, run, account, started) as recorder:
        if not resumed:
            recorder.save(_pieces({}, floating))
        build = verilator.build(verilog, log=log)
        settings = dataclasses.replace(memory_settings(run), size=programs.memory_bytes)
        processor = time.process_time()
        result = simulate(
            build, "sim.scenario:run",
            {"folder": str((out / "run").resolve()), "window": [0, settings.size], "limit": 1 << 40,
             "seed": network.seed, "counters": len(COUNTERS)},
            out=out, settings=settings, consumer=consume, progress=tick,
            plan=SnapshotPlan(layout.dump.address + 4 * STEP, checker.regions, slots=SLOTS, blocks=True))
        recorder.poll()
        processor = time.process_time() - processor
    progress.close(result.cycles, result.clocked_seconds)
    if batches:
        raise KeyboardInterrupt

    summary = _summary(config, network, floating, dataset, steps, result, checker, recorder, predictions,
                       expected_predictions, build, time.monotonic() - started + recorder.before)
    summary["timing"] = {
        "simulated_cycles": result.cycles, "simulating_seconds": result.clocked_seconds,
        "comparing_seconds": times["last"] - times["first"] if len(times) == 2 else 0.0,
        "simulating_processor_seconds": result.cpu_seconds, "comparing_processor_seconds": processor}
    tags = {layout.program.first_tag + number: " ".join(key) for number, key in enumerate(layout.program.tags)}
    trace.write_trace(out / "trace.json", result.events, tags, result.cycles)
    (out / "cycles.json").write_text(json.dumps(cycle_rows(layout, account.activity, steps), indent=1) + "\n")
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report.write_report(out)
    return summary


def memory_settings(run: dict) -> MemorySettings:
    """The memory of a run, from its checkpoint."""
    return MemorySettings(**{name: tuple(value) if isinstance(value, list) else value
                             for name, value in run["settings"].items()})


def _summary(config, network, floating, dataset, steps, result, checker, recorder, predictions, expected_predictions,
             build, seconds) -> dict:
    account = recorder.account
    macs = network.description.training_macs(network.batch) * steps
    labels = dataset.test_labels[:len(predictions)]
    accuracies = {} if not predictions else {
        "test_accuracy": float((np.array(predictions) == labels).mean()),
        "golden_accuracy": float((np.array(expected_predictions) == labels).mean())}
    if predictions and floating:
        accuracies["float_accuracy"] = golden.train.evaluate(floating, dataset.test_images[:len(labels)],
                                                             labels).accuracy
    # The test set's writes come after the last training doorbell's.
    first = account.doorbells - recorder.taken
    written = account.host_writes + [
        {**entry, "doorbell": entry["doorbell"] + first} for entry in result.host_writes
        if entry["doorbell"] >= recorder.taken]
    with (recorder.out / HOST_WRITES).open("w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in written)
    names = [entry["name"] for entry in written]
    return {
        "method": network.method, "model": network.description.name, "data": dataset.name, "batch": network.batch,
        "steps": steps, "seed": network.seed, "core": config.name,
        "final_loss": recorder.lines[-1]["loss"],
        "test_images": len(predictions), **accuracies,
        "bit_exact": True,               # the first difference would have ended the run
        "comparison": recorder.run["compare"],
        "tensors_compared": checker.compared, "not_compared": sorted(checker.not_compared),
        "zero_tensors": account.zero,
        "doorbells": account.doorbells, "host_writes": {name: names.count(name) for name in dict.fromkeys(names)},
        "cycles": account.cycles, "cycles_per_step": account.cycles / steps, "macs": macs,
        "bytes_read": account.beats[0] * config.beat_bytes, "bytes_written": account.beats[1] * config.beat_bytes,
        "mac_utilization": macs / (account.cycles * config.rows * config.columns),
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


def cycle_rows(layout: compiler.Compiled, activity: np.ndarray, steps: int) -> list[dict]:
    """Cycles by layer and pass over ``steps`` training steps, from the core's trace outputs; bytes moved, from the
    descriptors."""
    rows = []
    macs, moved = layout.macs, traffic(layout.config, layout.program)
    for number, (layer, step) in enumerate(layout.program.tags):
        tag = layout.program.first_tag + number
        product, vector = activity[0, tag], activity[1, tag]
        if (layer, step) in macs:
            counts = {activity.name.lower(): int(product[activity]) for activity in Activity}
            row = {"engine": "product", "macs": macs[layer, step] * steps, "busy": counts["busy"],
                   "stalled_in": counts["operand"] + counts["weights"], "stalled_out": counts["results"],
                   "idle": counts["spacing"] + counts["drain"] + counts["dependency"], "detail": counts}
        else:
            counts = {activity.name.lower(): int(vector[activity]) for activity in VectorActivity}
            row = {"engine": "vector", "macs": 0, "busy": counts["busy"], "stalled_in": counts["source"],
                   "stalled_out": counts["target"], "idle": 0, "detail": counts}
        read, written = moved.get((layer, step), (0, 0))
        row = {"layer": layer, "pass": step, "cycles": sum(row[key] for key in (
            "busy", "stalled_in", "stalled_out", "idle")), **row,
            "bytes_read": read * steps, "bytes_written": written * steps}
        if row["cycles"]:
            rows.append(row)
    return rows
