"""Figures of a training run and of an accuracy comparison (matplotlib)."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

from golden.train import HISTORY  # noqa: E402


def _smooth(values: list[float], window: int) -> list[float]:
    """Running mean, so that a loss per batch can be read."""
    return [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]


def plot_training(out: Path) -> Path:
    """Loss, accuracy and bits per tensor over the steps of the run in `out`: `training.png`."""
    history = [json.loads(line) for line in (Path(out) / HISTORY).read_text().splitlines()]
    epochs = [line for line in history if "epoch" in line]
    steps = [line["step"] + 1 for line in history]
    ends = [line["step"] + 1 for line in epochs]
    window = max(1, len(history) // 50)
    figure, (loss, accuracy, bits) = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    loss.plot(steps, _smooth([line["loss"] for line in history], window), label="training")
    loss.plot(ends, [line["test_loss"] for line in epochs], "o-", label="test")
    loss.set(xlabel="step", ylabel="loss", yscale="log")
    accuracy.plot(steps, _smooth([line["accuracy"] for line in history], window), label="training")
    accuracy.plot(ends, [line["test_accuracy"] for line in epochs], "o-", label="test")
    accuracy.set(xlabel="step", ylabel="accuracy")
    for axes in (loss, accuracy):
        axes.legend()
    names = [name for name in epochs[-1]["bits"]]
    widths = [[line["bits"].get(name, 0) for line in epochs] for name in names]
    if names:
        image = bits.imshow(widths, aspect="auto", interpolation="nearest", cmap="viridis")
        figure.colorbar(image, ax=bits, label="bits used")
        bits.set_yticks(range(len(names)), names, fontsize=max(3, min(8, 240 / len(names))))
        bits.set(xlabel="epoch")
    else:
        bits.set_axis_off()
    path = Path(out) / "training.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def plot_accuracy(rows: list[dict], out: Path) -> Path:
    """Mean and spread of test accuracy per method, a panel per network and data set: `accuracy.png`."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(f"{row['model']}, {row['data']}\n{row['epochs']} epochs", []).append(row)
    figure, panels = plt.subplots(1, len(groups), figsize=(3.2 * len(groups), 3.6), layout="constrained", squeeze=False)
    for axes, (title, members) in zip(panels[0], groups.items(), strict=True):
        for position, row in enumerate(members):
            axes.errorbar(position, 100 * row["mean"], 100 * row["deviation"], fmt="o", capsize=4)
            axes.plot([position] * len(row["accuracies"]), [100 * a for a in row["accuracies"]], ".", color="0.6")
        axes.set_xticks(range(len(members)), [row["method"] for row in members], rotation=40)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.2)
        axes.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel("test accuracy %")
    path = Path(out) / "accuracy.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
