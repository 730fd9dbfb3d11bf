"""Shared control block between Python and the C++ loop: one description, both languages.

The block is a small memory-mapped file. It starts with one 64-bit little-endian word per name of `FIELDS`,
then `MESSAGE_BYTES` of text (the first protocol violation), then `MAX_REGIONS` pairs (address, bytes) of
snapshot regions. `c_header()` gives the same layout to `main.cpp`, so that the two cannot differ.
"""

import mmap
from pathlib import Path

import numpy as np

MESSAGE_BYTES = 512
MAX_REGIONS = 1024
TAGS, ACTIVITIES, EVENTS = 4096, 16, 1 << 16
ACTIVITY_BYTES = 8 * (2 * TAGS * ACTIVITIES + 1 + EVENTS)
"""The activity file: counts of cycles by [product, vector engine][tag][activity], then the number of events, then
the events: cycle << 20 | engine << 19 | (0: idle, else tag + 1), all as 64-bit words."""

FIELDS = {
    # Written by Python before the run; the memory settings may also change while it runs.
    "memory_bytes": "size of the memory file",
    "latency": "cycles from an accepted address (or last write beat) to the first response, at least 1",
    "read_rate": "bytes per cycle of read data at most; 0: one beat per cycle",
    "write_rate": "bytes per cycle of write data at most; 0: one beat per cycle",
    "stall": "probability of a stall per channel and cycle, in 1/65536",
    "seed": "seed of the stalls",
    "outstanding": "bursts accepted per direction before the first completes",
    "error_first": "first byte address answered with SLVERR",
    "error_bytes": "length of that range; 0: none",
    "external_memory": "1: the AXI inputs belong to the test, the built-in memory stays off",
    "step_address": "address of the word whose write ends a training step; all ones: none",
    "regions": "number of snapshot regions in use",
    "slots": "snapshots that the ring holds",
    "slot_bytes": "bytes of one ring slot, header included",
    "ring_blocks": "1: a full ring stops the clock until a reader frees a slot; 0: the snapshot is dropped",
    "cycle_limit": "the simulation ends at this cycle; 0: never",
    "trace_first": "first cycle written to the waveform (debug flavour)",
    "trace_last": "last cycle written to the waveform; 0: none",
    "parent": "process to live with: the simulation ends when it is gone; 0: ignore",
    # Requests while it runs.
    "sleep": "1: Python sleeps until the interrupt pin changes or its next timer is due; cleared on waking",
    "stop": "1: please end after the current doorbell; 2: end now",
    "ring_tail": "snapshots read so far",
    # Written by C++.
    "pid": "process of the simulation",
    "beat_bytes": "bytes of one AXI data beat of this model",
    "cycle": "rising clock edges so far",
    "read_beats": "read data beats transferred",
    "write_beats": "write data beats transferred",
    "read_bursts": "read bursts accepted",
    "write_bursts": "write bursts accepted",
    "last_beat": "cycle of the last data beat",
    "interrupts": "rising edges of the interrupt pin",
    "steps": "writes of the step word",
    "ring_head": "snapshots written so far",
    "ring_dropped": "snapshots dropped because the ring was full",
    "violations": "AXI protocol violations by the core; the first one's text is in the message",
    "hazards": "bursts that touch bytes of a burst of the other direction still in flight",
    "hazard_address": "address of the first of those",
    "loop_nanoseconds": "wall time spent with Python asleep",
    "loop_cycles": "cycles of that time",
    "wall_nanoseconds": "wall time since the first rising edge, Python's work between doorbells included",
    "cpu_nanoseconds": "processor time of the simulation's process over that time",
}
HEADER_WORDS = 64
SIZE = HEADER_WORDS * 8 + MESSAGE_BYTES + MAX_REGIONS * 16
NEVER = 2**64 - 1
"""Value of `step_address` that no write matches."""

SLOT_HEADER = ("step", "cycle", "read_beats", "write_beats", "interrupts", "value", "spare0", "spare1")
"""64-bit words in front of the regions' bytes of a ring slot; `value` is the word the core wrote."""
SLOT_HEADER_BYTES = 8 * len(SLOT_HEADER)

assert len(FIELDS) <= HEADER_WORDS


def c_header():
    """The layout as C++ text."""
    lines = [
        "// Generated from sim/control.py",
        "#pragma once",
        "#include <cstdint>",
        "enum Field : unsigned {",
    ]
    lines += [f"    F_{name} = {index}," for index, name in enumerate(FIELDS)]
    lines += [
        "};",
        f"constexpr unsigned kHeaderWords = {HEADER_WORDS};",
        f"constexpr unsigned kMessageBytes = {MESSAGE_BYTES};",
        f"constexpr unsigned kMaxRegions = {MAX_REGIONS};",
        f"constexpr unsigned kTags = {TAGS};",
        f"constexpr unsigned kActivities = {ACTIVITIES};",
        f"constexpr unsigned kEvents = {EVENTS};",
        f"constexpr unsigned kActivityBytes = {ACTIVITY_BYTES};",
        f"constexpr unsigned kControlBytes = {SIZE};",
        f"constexpr unsigned kSlotHeaderWords = {len(SLOT_HEADER)};",
        "",
    ]
    return "\n".join(lines)


class Control:
    """The block in a file at `path`; every field of `FIELDS` is an integer attribute, read and written in
    place."""

    def __init__(self, path, *, create=False):
        path = Path(path)
        if create:
            path.write_bytes(bytes(SIZE))
        with open(path, "r+b") as file:
            view = mmap.mmap(file.fileno(), SIZE)
        words = np.frombuffer(view, "<u8")
        object.__setattr__(self, "_view", view)
        object.__setattr__(self, "_words", words[:HEADER_WORDS])
        object.__setattr__(self, "_regions", words[(HEADER_WORDS * 8 + MESSAGE_BYTES) // 8 :])
        if create:
            self.step_address = NEVER
            self.latency = 1
            self.outstanding = 8

    def __getattr__(self, name):
        try:
            return int(self._words[_INDEX[name]])
        except KeyError:
            raise AttributeError(f"the control block has no field {name!r}") from None

    def __setattr__(self, name, value):
        if name not in _INDEX:
            raise AttributeError(f"the control block has no field {name!r}")
        self._words[_INDEX[name]] = value

    @property
    def message(self):
        """Text of the first protocol violation, empty if there was none."""
        start = HEADER_WORDS * 8
        return bytes(self._view[start : start + MESSAGE_BYTES]).split(b"\0")[0].decode(errors="replace")

    def set_regions(self, regions):
        """Set the (address, bytes) regions of a snapshot; returns the ring slot size they need."""
        if len(regions) > MAX_REGIONS:
            raise ValueError(f"{len(regions)} snapshot regions are too many: the limit is {MAX_REGIONS}")
        for index, (address, size) in enumerate(regions):
            self._regions[2 * index] = address
            self._regions[2 * index + 1] = size
        slot = SLOT_HEADER_BYTES + sum(size for _, size in regions)
        self.regions = len(regions)
        self.slot_bytes = -(-slot // 64) * 64
        return self.slot_bytes

    def get_regions(self):
        """The (address, bytes) regions of a snapshot."""
        return self._regions[: 2 * self.regions].reshape(-1, 2).tolist()


_INDEX = {name: index for index, name in enumerate(FIELDS)}
