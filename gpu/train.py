"""Training on a device by golden's loop, files and checkpoints; nothing is lost when memory or a worker is."""

from __future__ import annotations

from pathlib import Path

import torch

import golden.train
from golden.errors import InputError
from golden.train import CHECKPOINT, DIGESTS
from gpu.execution import OnDevice
from gpu.parallel import WorkerLost


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def train(network: OnDevice, dataset, steps: int, out: Path, *, augment: bool = False) -> dict:
    """`golden.train.train`. A lost worker or a lack of memory leaves a checkpoint of the last whole step."""
    try:
        return golden.train.train(network, dataset, steps, out, augment=augment)
    except WorkerLost:
        reason = "a worker stopped answering"
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = f"out of memory on {network.ops.device} with batch {network.batch}"
    if not _save(network, Path(out), augment):
        raise InputError(f"{reason}: nothing was trained; use a smaller --batch or fewer workers")
    raise InputError(f"{reason} in step {network.step_index}: continue with --resume {out}")


def _save(network: OnDevice, out: Path, augment: bool) -> bool:
    """Checkpoint the state before the step that failed; whether there is one to resume."""
    written = len((out / DIGESTS).read_text().splitlines()) if (out / DIGESTS).is_file() else 0
    if network.step_index == 0 or written < network.step_index:
        return (out / CHECKPOINT).is_file()
    network.state = dict(network.before_step)
    golden.train.save_checkpoint(network, out, augment)
    return True
