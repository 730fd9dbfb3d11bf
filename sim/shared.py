"""The files that Python and the C++ loop share: memory, control block, ring of step snapshots.

They live in shared memory when it has room (no disk traffic), else in the temporary folder, and are removed
at the end; what a killed process left is removed by the next one.
"""

import errno
import hashlib
import mmap
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import control


class SimulationError(Exception):
    """One line that says what went wrong in a simulation and what to do."""


@dataclass(frozen=True)
class MemorySettings:
    """The memory beside the core. Rates are bytes per cycle and direction (0: a beat per cycle), `stall` is
    the probability that a channel pauses for a cycle, `errors` a (first byte, bytes) range answered with
    SLVERR."""

    size: int = 64 << 20
    latency: int = 32
    read_rate: int = 0
    write_rate: int = 0
    stall: float = 0.0
    seed: int = 1
    outstanding: int = 8
    errors: tuple = (0, 0)
    external: bool = False

    def __post_init__(self):
        rules = [
            ("size", 0 < self.size <= 1 << 32 and self.size % 4096 == 0, "a multiple of 4096 up to 2**32"),
            ("latency", 1 <= self.latency < 1 << 20, "1 cycle or more"),
            ("read_rate", self.read_rate >= 0, "0 or more bytes per cycle"),
            ("write_rate", self.write_rate >= 0, "0 or more bytes per cycle"),
            ("stall", 0 <= self.stall < 1, "a probability below 1"),
            ("outstanding", 1 <= self.outstanding <= 255, "1 to 255 bursts"),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise ValueError(f"memory {name} is {getattr(self, name)!r}: use {rule}")


@dataclass(frozen=True)
class SnapshotPlan:
    """What to record when the core writes the word at `step_address`: the (address, bytes) `regions`. `slots`
    snapshots are kept until read; with `blocks` the clock waits for a reader in another process, without it a
    snapshot that finds the ring full is dropped and the run fails."""

    step_address: int
    regions: tuple = ()
    slots: int = 16
    blocks: bool = False


@dataclass(frozen=True)
class Snapshot:
    """State of memory after step `step` of this run (counted from 0): `regions` are byte arrays in plan
    order, valid until the snapshot is released. `value` is the word that the core wrote."""

    step: int
    cycle: int
    read_beats: int
    write_beats: int
    interrupts: int
    value: int
    regions: tuple


@dataclass(frozen=True)
class HostWrite:
    """One entry of the host's log; `doorbell` counts the doorbells rung before it."""

    doorbell: int
    cycle: int
    name: str
    address: int
    size: int
    sha256: str


def _base_folder(size):
    """Shared memory if `size` bytes fit with some room to spare, else the temporary folder."""
    for folder in ("/dev/shm", tempfile.gettempdir()):
        try:
            if shutil.disk_usage(folder).free > size + (64 << 20) and os.access(folder, os.W_OK):
                return Path(folder)
        except OSError:
            continue
    raise SimulationError(
        f"neither shared memory nor {tempfile.gettempdir()} has {size >> 20} MB free for the "
        "simulated memory: free some, set TMPDIR, or use a smaller memory"
    )


def _remove_left_overs(base):
    for folder in base.glob("intrain-run-*"):
        process = folder.name.split("-")[2]
        if process.isdigit() and not Path(f"/proc/{process}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _allocate(path, size):
    with open(path, "wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise SimulationError(f"the disk of {path.parent} has no room for {size >> 20} MB") from None
            raise


class RunFolder:
    """Folder of one run's shared files. `create` makes it and owns it (use `with`), `RunFolder(path)` joins
    it."""

    def __init__(self, path):
        self.path = Path(path)
        self.control = control.Control(self.path / "control.bin")
        self.memory = Memory(self.path / "memory.bin", self.control)
        words = np.memmap(self.path / "activity.bin", "<u8", "r")
        counts = 2 * control.TAGS * control.ACTIVITIES
        self.activity = words[:counts].reshape(2, control.TAGS, control.ACTIVITIES)
        self._events = words[counts:]
        ring = self.path / "snapshots.bin"
        self._ring = np.memmap(ring, np.uint8, "r") if ring.exists() else None
        self._owner = False

    @classmethod
    def create(cls, settings, plan=None):
        ring_bytes = 0
        if plan:
            slot = control.SLOT_HEADER_BYTES + sum(size for _, size in plan.regions)
            ring_bytes = plan.slots * -(-slot // 64) * 64
        base = _base_folder(settings.size + ring_bytes)
        _remove_left_overs(base)
        path = Path(tempfile.mkdtemp(prefix=f"intrain-run-{os.getpid()}-", dir=base))
        try:
            _allocate(path / "memory.bin", settings.size)
            _allocate(path / "activity.bin", control.ACTIVITY_BYTES)
            block = control.Control(path / "control.bin", create=True)
            block.memory_bytes = settings.size
            block.parent = os.getpid()
            for name in ("latency", "read_rate", "write_rate", "seed", "outstanding"):
                setattr(block, name, getattr(settings, name))
            block.stall = round(settings.stall * 65536)
            block.error_first, block.error_bytes = settings.errors
            block.external_memory = settings.external
            if plan:
                _allocate(path / "snapshots.bin", ring_bytes)
                block.step_address = plan.step_address
                block.set_regions(plan.regions)
                block.slots = plan.slots
                block.ring_blocks = plan.blocks
            folder = cls(path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        folder._owner = True
        return folder

    def close(self):
        if self._owner:
            shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def events(self):
        """When the engines changed what they work on: rows of (cycle, engine, tag or -1 for idle)."""
        words = self._events[1 : 1 + int(self._events[0])].astype(np.int64)
        return np.stack([words >> 20, words >> 19 & 1, (words & 0x7FFFF) - 1], axis=1)

    def snapshots(self):
        """Yield the snapshots written since the last call, oldest first; a slot is freed when the next is
        asked."""
        block = self.control
        while block.ring_tail < block.ring_head:
            yield self._snapshot(block.ring_tail)
            block.ring_tail += 1
        if block.ring_dropped:
            raise SimulationError(
                f"{block.ring_dropped} step snapshots were lost: the ring holds {block.slots}; ask for "
                "more slots or fewer steps per doorbell"
            )

    def _snapshot(self, number):
        block = self.control
        start = number % block.slots * block.slot_bytes
        header = dict(
            zip(
                control.SLOT_HEADER,
                self._ring[start : start + control.SLOT_HEADER_BYTES].view("<u8").tolist(),
                strict=True,
            )
        )
        offset = start + control.SLOT_HEADER_BYTES
        regions = []
        for _, size in block.get_regions():
            regions.append(self._ring[offset : offset + size])
            offset += size
        return Snapshot(*(header[name] for name in control.SLOT_HEADER[:6]), tuple(regions))


class Memory:
    """The simulated memory, at no cost per cycle. Reading is free (`view`, `read`); the only way to write is
    `write`, which logs every access with the number of doorbells rung so far."""

    def __init__(self, path, block):
        self._control = block
        with open(path, "r+b") as file:
            self._writable = np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)
        self.view = self._writable.view()
        self.view.flags.writeable = False
        self.doorbells = 0
        self.log = []

    def write(self, name, address, data):
        """Write bytes or an array (its C-order bytes) at a byte address; `name` says what it is in the
        log."""
        data = np.frombuffer(data, np.uint8) if isinstance(data, bytes | bytearray) else np.ascontiguousarray(data)
        data = data.reshape(-1).view(np.uint8)
        if address < 0 or address + data.size > self.view.size:
            raise SimulationError(
                f"{name}: {data.size} bytes at {address:#x} do not fit a memory of {self.view.size} bytes"
            )
        self._writable[address : address + data.size] = data
        digest = hashlib.sha256(data).hexdigest()
        self.log.append(HostWrite(self.doorbells, self._control.cycle, name, int(address), int(data.size), digest))

    def digest(self):
        """SHA-256 of all of it."""
        return hashlib.sha256(self.view).hexdigest()

    def read(self, address, count, dtype=np.uint8):
        """A copy of `count` elements at a byte address."""
        dtype = np.dtype(dtype)
        size = count * dtype.itemsize
        if address < 0 or address + size > self.view.size:
            raise SimulationError(f"{size} bytes at {address:#x} lie outside a memory of {self.view.size} bytes")
        return self.view[address : address + size].copy().view(dtype)
