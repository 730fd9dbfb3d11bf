"""Choosing where a training computes, with one line for each reason why it cannot."""

from __future__ import annotations

import os

import torch

from golden.errors import InputError
from gpu.group import ALONE, Group
from gpu.ops import Ops

DEVICES = ("auto", "cpu", "cuda")
CAPABILITY = (8, 0)  # int8 tensor cores as Triton compiles for them


def choose(name: str) -> torch.device:
    """The device of `--device`; of several GPUs the one of this worker (LOCAL_RANK)."""
    if name not in DEVICES:
        raise InputError(f"--device must be {', '.join(DEVICES)}, got {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "no usable CUDA GPU was found"
        raise InputError(f"--device cuda: {reason}: use --device cpu, or install a CUDA build of torch and a driver")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise InputError(f"worker {index} of this machine has no GPU, there are {count}: start {count} workers")
    capability = torch.cuda.get_device_capability(index)
    if capability < CAPABILITY:
        if name == "auto":
            return torch.device("cpu")
        raise InputError(
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}, the int8 "
            f"kernels need {CAPABILITY[0]}.{CAPABILITY[1]}: use --device cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def operations(device: torch.device, group: Group = ALONE) -> Ops:
    """The layer operations for a device: kernels on a GPU, and on a CPU where Triton interprets them."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return Ops(device, group)
    try:
        from gpu.device import GpuOps
    except ImportError as error:
        raise InputError(f"--device cuda needs triton ({error}): pip install triton") from None
    return GpuOps(device, group)
