"""Data parallel training with torch.distributed: worker 0 drives, the others follow.

Worker 0 runs the ordinary training loop; each step and evaluation batch goes to the followers with its images and
labels, and every worker computes its shard. Only integer sums and maxima are exchanged, so any number of workers
gives the same bits. Started by `torchrun --nproc-per-node N -m gpu train ...`; NCCL between GPUs, gloo between CPUs.
"""

from __future__ import annotations

import contextlib
import os
import signal
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from golden.errors import InputError
from gpu.group import Group

STOP, STEP, FORWARD = range(3)


class WorkerLost(InputError):
    """Another worker no longer answers."""


@contextlib.contextmanager
def _answered():
    """torch reports a lost connection as RuntimeError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        raise WorkerLost("a worker stopped answering") from None


class Workers(Group):
    """The workers of a torchrun. `timeout` bounds how long a live but silent worker is waited for."""

    def __init__(self, device: torch.device, timeout: timedelta = timedelta(minutes=15)):
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timeout)
            # Commands and batches are in host memory.
            self.control = dist.new_group(backend="gloo", timeout=timeout)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"cannot join the other workers: {str(error).splitlines()[0]}") from None
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()

    def maximum(self, value: int) -> int:
        return int(self.maximum_(torch.tensor(value, dtype=torch.int64, device=self.device)))

    def maximum_(self, tensor):
        with _answered():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def sum_(self, tensor):
        with _answered():
            dist.all_reduce(tensor)
        return tensor

    def gather(self, part, batch: int):
        whole = torch.zeros((batch, *part.shape[1:]), dtype=torch.int32, device=part.device)
        whole[self.shard(batch)] = part
        return self.sum_(whole).to(part.dtype)

    def send(self, command: int, images: np.ndarray | None = None, labels: np.ndarray | None = None) -> None:
        """From worker 0: what all do next. Images are uint8, labels int64."""
        shape = (0, 0, 0, 0) if images is None else images.shape
        with _answered():
            dist.broadcast(torch.tensor([command, *shape]), 0, self.control)
            if images is not None:
                dist.broadcast(torch.from_numpy(np.ascontiguousarray(images)), 0, self.control)
            if labels is not None:
                dist.broadcast(torch.from_numpy(np.ascontiguousarray(labels, np.int64)), 0, self.control)

    def receive(self) -> tuple[int, np.ndarray | None, np.ndarray | None]:
        """On the other workers: the command, images and labels that worker 0 sent."""
        with _answered():
            header = torch.zeros(5, dtype=torch.int64)
            dist.broadcast(header, 0, self.control)
            command, *shape = header.tolist()
            if command == STOP:
                return command, None, None
            images = torch.empty(shape, dtype=torch.uint8)
            dist.broadcast(images, 0, self.control)
            if command == FORWARD:
                return command, images.numpy(), None
            labels = torch.empty(shape[0], dtype=torch.int64)
            dist.broadcast(labels, 0, self.control)
            return command, images.numpy(), labels.numpy()


def requested() -> bool:
    """Whether this process is one of several workers of a torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def drive(network, workers: Workers) -> None:
    """On worker 0: make the network's `step` and `forward` those of all workers."""
    # torchrun terminates the others when a worker dies; training stops at SIGTERM, saving its state must not.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    step, forward = network.step, network.forward

    def shared_step(images, labels, **options):
        workers.send(STEP, images, labels)
        return step(images, labels, **options)

    def shared_forward(images):
        workers.send(FORWARD, images)
        return forward(images)

    network.step, network.forward = shared_step, shared_forward


def follow(network, workers: Workers) -> None:
    """On the other workers: compute what worker 0 sends until it says stop. Ctrl-C reaches them through worker 0."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        command, images, labels = workers.receive()
        if command == STOP:
            return
        if command == STEP:
            network.step(images, labels)
        else:
            network.forward(images)
