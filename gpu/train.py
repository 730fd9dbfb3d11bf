"""Training on a device by golden's loop, files and checkpoints; nothing is lost when memory or a worker is."""

from __future__ import annotations

from pathlib import Path

import torch

import golden.train
from golden.errors import InputError
from golden.train import CHECKPOINT, DIGESTS, HISTORY
from gpu.execution import OnDevice
from gpu.parallel import WorkerLost


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)


def train(network: OnDevice, dataset, steps: int, out: Path, *, augment: bool | int = False) -> dict:
    """`golden.train.train`. A lost worker or a lack of memory leaves a checkpoint of the last whole step."""
    try:
        return golden.train.train(network, dataset, steps, out, augment=augment)
    except WorkerLost:
        reason = "a worker stopped answering"
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        reason = f"out of memory on {network.ops.device} with batch {network.batch}"
    step = network.step_index
    if not _save(network, Path(out), augment):
        raise InputError(f"{reason}: nothing was trained; use a smaller --batch or fewer workers")
    raise InputError(f"{reason} in step {step}: continue with --resume {out}")


def _save(network: OnDevice, out: Path, augment: bool | int) -> bool:
    """Checkpoint the last state whose steps are all on file; whether there is one to resume."""
    files = [out / DIGESTS, out / HISTORY]
    written = min(len(path.read_text().splitlines()) if path.is_file() else 0 for path in files)
    begun, before = network.before_step or (0, None)
    between_steps = network.step_index > begun and written >= network.step_index
    if not between_steps:
        # A captured step has overwritten the state it began with.
        if begun == 0 or written < begun or network.captured is not None:
            return (out / CHECKPOINT).is_file()
        network.state, network.step_index = dict(before), begun
    golden.train.save_checkpoint(network, out, augment)
    return True
