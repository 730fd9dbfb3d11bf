"""Test accuracy of the integer methods beside float32 at equal epochs: `python -m golden accuracy`, `make accuracy`.

Every run keeps its folder under DIR/runs. A finished run is not repeated and an interrupted one is continued, so a
long comparison can be stopped at any time.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from golden.data import data_set, load
from golden.errors import InputError
from golden.train import CHECKPOINT, SUMMARY, build, load_checkpoint, train

INTEGER = ("niti", "niti-2020", "wage", "dfp")


@dataclass(frozen=True)
class Comparison:
    """One row group: a network on a data set, the methods that can run it, and how long."""

    data: str
    model: str
    epochs: int
    methods: tuple[str, ...] = (*INTEGER, "float")

    def runs(self, seeds: int) -> Iterator[tuple[str, int]]:
        yield from ((method, seed) for method in self.methods for seed in range(1, seeds + 1))


QUICK = (
    Comparison("digits", "mlp", 10),
    Comparison("digits", "tiny-cnn", 10),
    Comparison("digits", "tiny-cnn-bn", 10, ("dfp", "float")),
    Comparison("digits", "tiny-resnet", 10, ("dfp", "float")),
)
FULL = tuple(
    comparison
    for data in ("mnist", "fashion-mnist")
    for comparison in (
        Comparison(data, "mlp", 10),
        Comparison(data, "lenet", 8, ("niti", "dfp", "float")),
        Comparison(data, "wage-lenet", 20, ("wage", "float")),
    )
)


def _measure(comparison: Comparison, method: str, seed: int, out: Path, datasets: dict, data_dir) -> dict:
    """The summary of one run, trained, continued or found in its folder."""
    folder = out / "runs" / f"{comparison.data}-{comparison.model}-{method}-{seed}"
    batch = data_set(comparison.data).batch
    steps = comparison.epochs * (data_set(comparison.data).train // batch)
    if (folder / SUMMARY).is_file():
        summary = json.loads((folder / SUMMARY).read_text())
        if summary["steps"] == steps:
            return summary
    if comparison.data not in datasets:
        datasets[comparison.data] = load(comparison.data, data_dir)
    if (folder / CHECKPOINT).is_file():
        network, _ = load_checkpoint(folder)
    else:
        network = build(method, comparison.model, seed, data=comparison.data, batch=batch)
    print(f"{comparison.data} {comparison.model} {method} seed {seed}", file=sys.stderr)
    return train(network, datasets[comparison.data], steps, folder)


def _row(comparison: Comparison, method: str, accuracies: list[float], reference: float | None) -> dict:
    return {
        "data": comparison.data,
        "model": comparison.model,
        "epochs": comparison.epochs,
        "method": method,
        "accuracies": accuracies,
        "mean": statistics.fmean(accuracies),
        "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        "versus_float": None if reference is None else statistics.fmean(accuracies) - reference,
    }


def markdown(rows: list[dict]) -> str:
    """The comparison as a table in percent."""
    lines = [
        "| data | network | epochs | method | seeds | test accuracy % | deviation | minus float |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        difference = (
            "" if row["versus_float"] is None or row["method"] == "float" else f"{100 * row['versus_float']:+.2f}"
        )
        lines.append(
            f"| {row['data']} | {row['model']} | {row['epochs']} | {row['method']} | {len(row['accuracies'])} "
            f"| {100 * row['mean']:.2f} | {100 * row['deviation']:.2f} | {difference} |"
        )
    return "\n".join(lines) + "\n"


def compare(out: Path, *, full: bool = False, data_dir=None, seeds: int = 3) -> list[dict]:
    """Run the comparison; writes DIR/accuracy.json, accuracy.md and accuracy.png, and prints the table."""
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    datasets, rows = {}, []
    for comparison in QUICK + FULL if full else QUICK:
        accuracies = {}
        for method, seed in comparison.runs(seeds):
            summary = _measure(comparison, method, seed, Path(out), datasets, data_dir)
            accuracies.setdefault(method, []).append(summary["test_accuracy"])
        reference = statistics.fmean(accuracies["float"]) if "float" in accuracies else None
        rows += [_row(comparison, method, values, reference) for method, values in accuracies.items()]
    Path(out, "accuracy.json").write_text(json.dumps(rows, indent=2) + "\n")
    Path(out, "accuracy.md").write_text(markdown(rows))
    print(markdown(rows), end="")
    try:
        from golden.plots import plot_accuracy
    except ImportError:
        print("no figure: matplotlib is not installed", file=sys.stderr)
    else:
        plot_accuracy(rows, Path(out))
    return rows
