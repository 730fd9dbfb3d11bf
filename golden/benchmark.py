"""Training images per second of lenet on MNIST-sized images at batch 64, beside the same float32 network in torch."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from golden.train import build

BATCH, WARM_UP, STEPS = 64, 3, 15


def _batch() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (BATCH, 28, 28, 1), dtype=np.uint8), rng.integers(0, 10, BATCH)


def _golden(method: str):
    """A function that trains one batch."""
    network, (images, labels) = build(method, "lenet", 1, data="mnist", batch=BATCH), _batch()
    return lambda: network.step(images, labels)


def _torch():
    """The same network in torch: bias-free, SGD with momentum; None where torch is not installed."""
    try:
        import torch
        from torch import nn
    except ImportError:
        return None
    layers = (
        nn.Conv2d(1, 20, 5, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500, bias=False),
        nn.ReLU(),
        nn.Linear(500, 10, bias=False),
    )
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images, labels = _batch()
    x, y = torch.tensor(images[..., 0][:, None] / np.float32(255) - np.float32(0.5)), torch.tensor(labels)

    def step():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def measure() -> dict[str, dict[str, float]]:
    """Images per second by implementation, in wall time and in processor time.

    The implementations take turns, so that other load on the machine falls on all of them.
    """
    steps = {f"golden {method}": _golden(method) for method in ("niti", "wage", "dfp", "float")}
    reference = _torch()
    if reference is not None:
        steps["torch float32"] = reference
    wall, processor = {name: [] for name in steps}, {name: [] for name in steps}
    for turn in range(WARM_UP + STEPS):
        for name, step in steps.items():
            started, used = time.perf_counter(), time.process_time()
            step()
            if turn >= WARM_UP:
                wall[name].append(time.perf_counter() - started)
                processor[name].append(time.process_time() - used)
    return {
        name: {
            "images_per_second": BATCH / statistics.median(wall[name]),
            "best_images_per_second": BATCH / min(wall[name]),
            "images_per_processor_second": BATCH / statistics.median(processor[name]),
        }
        for name in steps
    }


def run(out: Path) -> dict:
    """Measure, print a table and write DIR/golden.json."""
    rates = measure()
    torch = rates.get("torch float32")
    print(f"lenet, 28x28 images, batch {BATCH}, {os.cpu_count()} processors\n")
    print(f"{'':16}{'images/s':>10}{'best':>10}{'per CPU s':>12}{'of torch':>10}")
    for name, rate in rates.items():
        share = f"{rate['images_per_second'] / torch['images_per_second']:.2f}" if torch else ""
        print(
            f"{name:16}{rate['images_per_second']:10.0f}{rate['best_images_per_second']:10.0f}"
            f"{rate['images_per_processor_second']:12.0f}{share:>10}"
        )
    if torch is None:
        print("torch is not installed: nothing to compare with", file=sys.stderr)
    Path(out).mkdir(parents=True, exist_ok=True)
    Path(out, "golden.json").write_text(json.dumps(rates, indent=2) + "\n")
    return rates
