"""Training: `build` a network, run `step`s, evaluate, and write `summary.json` and `digests.jsonl`."""

from __future__ import annotations

import json
import math
import sys
import time
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
from golden.schedules import learning_rate  # noqa: F401  (part of this module's interface)
from golden.wage import Wage

METHODS: dict[str, type[Execution]] = {"niti": Niti, "niti-2020": Niti, "wage": Wage, "dfp": Dfp, "float": Float}


def build(
    method: str, model: str, seed: int, *, data: str = "digits", batch: int | None = None, **options
) -> Execution:
    """A freshly initialised network. Options are the method's own (`weight_bits`, ...), see its class."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose from {', '.join(METHODS)}")
    return METHODS[method](method, describe(model, data), seed, batch=batch, **options)


def step(network: Execution, images, labels, **options) -> Record:
    """One training step on raw uint8 images (or converted `(mantissas, exponent)`): the record of its
    tensors.
    """
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


def train(
    network: Execution, dataset: data_module.Dataset, steps: int, out: Path, progress: Progress | None = None
) -> dict:
    """Train until the absolute step `steps`, writing DIR/digests.jsonl and DIR/summary.json; returns the
    summary.
    """
    if steps < 1:
        raise InputError(f"--steps must be at least 1, got {steps}")
    progress = progress or Progress()
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        digests = (out / "digests.jsonl").open("w")
    except OSError as error:
        raise InputError(f"cannot write to {out}: {error.strerror}") from None
    loss, seconds, samples = math.nan, 0.0, 0
    with digests:
        while network.step_index < steps:
            epoch, first = divmod(network.step_index, network.steps_per_epoch)
            losses, correct, epoch_seconds, count = 0.0, 0, 0.0, 0
            for images, labels in data_module.batches(dataset, network.seed, epoch, network.batch, first):
                started = time.perf_counter()
                record = network.step(images, labels)
                epoch_seconds += time.perf_counter() - started
                logits, exponent = record["logits"], record["logits.exponent"]
                loss = network.loss(logits, exponent, labels)
                losses += loss
                correct += int((logits.argmax(axis=1) == labels).sum())
                count += 1
                digests.write(json.dumps({"step": network.step_index - 1, "weights": network.digest()}) + "\n")
                progress.update(
                    f"epoch {epoch} step {network.step_index}/{steps} loss {losses / count:.4f} "
                    f"accuracy {correct / count / network.batch:.4f} "
                    f"{count * network.batch / epoch_seconds:.0f} samples/s"
                )
                if network.step_index >= steps:
                    break
            seconds, samples = seconds + epoch_seconds, samples + count * network.batch
            test = evaluate(network, dataset.test_images, dataset.test_labels)
            progress.line(
                f"epoch {epoch}: loss {losses / count:.4f}, accuracy {correct / count / network.batch:.4f}, "
                f"test accuracy {test.accuracy:.4f}, {count * network.batch / epoch_seconds:.0f} samples/s"
            )
    summary = {
        "method": network.method,
        "model": network.description.name,
        "data": dataset.name,
        "batch": network.batch,
        "steps": network.step_index,
        "seed": network.seed,
        "final_loss": loss,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "macs": network.description.training_macs(network.batch) * steps,
        "samples_per_second": samples / seconds,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary
