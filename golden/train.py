"""Training: `build` a network, run `step`s, evaluate, keep checkpoints, and write what a run leaves in its folder.

A folder holds `digests.jsonl` and `history.jsonl` (a line a step), `checkpoint.npz` (after each epoch and on Ctrl-C),
`summary.json` and `training.png`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from golden import data as data_module
from golden.dfp import Dfp
from golden.errors import InputError
from golden.execution import Execution, Record
from golden.float32 import Float
from golden.networks import network as describe
from golden.niti import Niti
from golden.range import bit_length, max_magnitude
from golden.schedules import learning_rate  # noqa: F401  (part of this module's interface)
from golden.wage import Wage

METHODS: dict[str, type[Execution]] = {"niti": Niti, "niti-2020": Niti, "wage": Wage, "dfp": Dfp, "float": Float}
DIGESTS, HISTORY, CHECKPOINT, SUMMARY = "digests.jsonl", "history.jsonl", "checkpoint.npz", "summary.json"


class Interrupted(Exception):
    """Training stopped on request; its folder can be resumed."""


def build(
    method: str,
    model: str,
    seed: int,
    *,
    data: str = "digits",
    batch: int | None = None,
    methods: dict[str, type[Execution]] = METHODS,
    **options,
) -> Execution:
    """A freshly initialised network. Options are the method's own (`weight_bits`, ...), see its class, and
    `rates`, see `golden.schedules.parse`.

    `methods` names the class of each method, for executions other than the golden one.
    """
    if method not in methods:
        raise InputError(f"unknown method {method!r}: choose from {', '.join(methods)}")
    cls = methods[method]
    for name in options:
        if name not in (*cls.options, "rates"):
            known = ", ".join((*cls.options, "rates"))
            raise InputError(f"method {method} has no option {name!r}: its options are {known}")
    network = cls(method, describe(model, data), seed, batch=batch, **options)
    network.chosen_options = options
    return network


def step(network: Execution, images, labels, **options) -> Record:
    """One training step on raw uint8 images (or converted `(mantissas, exponent)`): the record of its tensors."""
    return network.step(images, labels, **options)


@dataclass
class Evaluation:
    loss: float
    accuracy: float
    predictions: np.ndarray


def evaluate(network: Execution, images: np.ndarray, labels: np.ndarray) -> Evaluation:
    """Loss, accuracy and predictions in file order, at the training batch size."""
    predictions, total = [], 0.0
    for chunk, target, counted in data_module.evaluation_batches(images, labels, network.batch):
        logits, exponent = network.forward(chunk)
        predictions.append(logits[:counted].argmax(axis=1))
        total += network.loss(logits[:counted], exponent, target) * counted
    predictions = np.concatenate(predictions)
    return Evaluation(total / len(labels), float((predictions == labels).mean()), predictions)


# Checkpoints ------------------------------------------------------------------------------------------------


def save_checkpoint(network: Execution, out: Path, augment: bool | int = False) -> None:
    """Write DIR/checkpoint.npz; an interrupted write leaves the previous one."""
    state = network.host_state()
    about = {
        "method": network.method,
        "model": network.description.name,
        "data": network.data.name,
        "batch": network.batch,
        "seed": network.seed,
        "options": network.chosen_options,
        "augment": augment,
        "step": network.step_index,
        "exponents": {name: int(exponent) for name, (_, exponent) in state.items()},
    }
    arrays = {name: array for name, (array, _) in state.items()}
    partial = Path(out) / (CHECKPOINT + ".partial")
    with partial.open("wb") as file:
        np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
    os.replace(partial, Path(out) / CHECKPOINT)


def load_checkpoint(out: Path, methods: dict[str, type[Execution]] = METHODS) -> tuple[Execution, bool | int]:
    """The network saved in DIR, and its run's augmentation. `methods` as for `build`."""
    path = Path(out) / CHECKPOINT
    if not path.is_file():
        raise InputError(f"nothing to resume: {out} has no {CHECKPOINT}")
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            arrays = {name: file[name] for name in file.files if name != "about"}
        network = build(
            about["method"],
            about["model"],
            about["seed"],
            data=about["data"],
            batch=about["batch"],
            methods=methods,
            **about["options"],
        )
        if list(arrays) != list(network.state):
            raise KeyError("tensors")
        for name, array in arrays.items():
            if array.shape != network.state[name][0].shape or array.dtype != network.state[name][0].dtype:
                raise KeyError(name)
            network.state[name] = array, about["exponents"][name]
        network.step_index = about["step"]
        return network, about["augment"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}): start the run again") from None


def _continue_lines(path: Path, count: int) -> list[dict]:
    """Cut a file of one line a step to `count` lines and return them."""
    lines = path.read_text().splitlines()[:count] if path.is_file() else []
    if len(lines) < count:
        raise InputError(f"cannot resume: {path} has {len(lines)} of {count} steps")
    path.write_text("".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines]


class _StopRequest:
    """Ctrl-C or SIGTERM between two steps; a second one takes effect at once."""

    def __enter__(self):
        self.requested = False
        self.previous = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.previous[number] = signal.signal(number, self._request)
            except ValueError:  # not in the main thread: the caller keeps control of signals
                break
        return self

    def _request(self, number, frame):
        self.requested = True
        signal.signal(number, self.previous[number])

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# Training ---------------------------------------------------------------------------------------------------


class Progress:
    """One line an epoch, and a live line on a terminal."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self.shown = 0.0

    def update(self, text: str) -> None:
        if self.live and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            print(f"\r{text}\x1b[K", end="", file=self.stream, flush=True)

    def line(self, text: str) -> None:
        print(f"\r{text}\x1b[K" if self.live else text, file=self.stream, flush=True)


def bit_widths(record: Record) -> dict[str, int]:
    """Bits, sign included, that each integer tensor of a record uses."""
    return {
        name: bit_length(max_magnitude(tensor)) + 1
        for name, tensor in record.items()
        if isinstance(tensor, np.ndarray) and tensor.dtype.kind == "i"
    }


def train(
    network: Execution,
    dataset: data_module.Dataset,
    steps: int,
    out: Path,
    *,
    progress: Progress | None = None,
    augment: bool | int = False,
) -> dict:
    """Train until the absolute step `steps` and write the folder `out`; returns the summary.

    `augment` may be a number: of the epochs, from the first on, whose images are augmented. A network that has steps
    behind it continues the run of the folder. Raises `Interrupted` on Ctrl-C.
    """
    if steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    if steps <= network.step_index:
        raise InputError(f"this run already has {network.step_index} steps: ask for more than that")
    progress = progress or Progress()
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if network.step_index == 0:
            for name in (DIGESTS, HISTORY, CHECKPOINT, SUMMARY):
                (out / name).unlink(missing_ok=True)
        _continue_lines(out / DIGESTS, network.step_index)
        history = _continue_lines(out / HISTORY, network.step_index)
        with (out / DIGESTS).open("a") as digests, (out / HISTORY).open("a") as lines, _StopRequest() as stop:
            while network.step_index < steps:
                _train_epoch(network, dataset, steps, history, digests, lines, stop, progress, augment)
                save_checkpoint(network, out, augment)
                if stop.requested:
                    raise Interrupted(f"stopped after step {network.step_index}: continue with --resume {out}")
        summary = _summary(network, dataset, history)
        (out / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror or error}") from None
    return summary


def _train_epoch(network, dataset, steps, history, digests, lines, stop, progress, augment) -> None:
    """Train to the end of the epoch, to `steps` or to a stop request, whichever comes first."""
    epoch, first = divmod(network.step_index, network.steps_per_epoch)
    seconds = 0.0
    of_epoch = history[len(history) - first :] if first else []
    augmented = augment is True or epoch < augment
    batches = data_module.batches(dataset, network.seed, epoch, network.batch, first, augmented)
    for count, (images, labels) in enumerate(batches, 1):
        started = time.perf_counter()
        record = network.step(images, labels)
        seconds += time.perf_counter() - started
        logits = record["logits"]
        line = {
            "step": network.step_index - 1,
            "loss": network.loss(logits, record["logits.exponent"], labels),
            "accuracy": float((logits.argmax(axis=1) == labels).mean()),
        }
        of_epoch.append(line)
        history.append(line)
        digests.write(json.dumps({"step": line["step"], "weights": network.digest()}) + "\n")
        loss, accuracy = (float(np.mean([entry[key] for entry in of_epoch])) for key in ("loss", "accuracy"))
        rate = count * network.batch / seconds
        done = network.step_index >= steps or first + count == network.steps_per_epoch
        try:
            if done and not stop.requested:
                test = evaluate(network, dataset.test_images, dataset.test_labels)
                line |= {"epoch": epoch, "test_loss": test.loss, "test_accuracy": test.accuracy}
                line |= {"samples_per_second": rate, "bits": bit_widths(record)}
                progress.line(
                    f"epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.4f}, test accuracy {test.accuracy:.4f}, "
                    f"{rate:.0f} samples/s"
                )
        finally:
            # The step is done even where its evaluation was not.
            lines.write(json.dumps(line) + "\n")
        progress.update(
            f"epoch {epoch} step {network.step_index}/{steps} loss {loss:.4f} accuracy {accuracy:.4f} "
            f"{rate:.0f} samples/s"
        )
        if done or stop.requested:
            break
    digests.flush()
    lines.flush()


def _summary(network: Execution, dataset: data_module.Dataset, history: list[dict]) -> dict:
    last = history[-1]
    return {
        "method": network.method,
        "model": network.description.name,
        "data": dataset.name,
        "batch": network.batch,
        "steps": network.step_index,
        "seed": network.seed,
        "final_loss": last["loss"],
        "test_loss": last["test_loss"],
        "test_accuracy": last["test_accuracy"],
        "macs": network.description.training_macs(network.batch) * network.step_index,
        "samples_per_second": last["samples_per_second"],
    }
