"""Which lines of memory a descriptor reads and writes, from its fields (docs/program.md)."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

import numpy as np

from hw.config import CoreConfig
from hw.descriptor import DESCRIPTOR_BYTES, FORMATS, Mode, Opcode
from hw.scalar import REGISTERS
from hw.vector import Function

from .estimate import walk
from .layout import ceil_div

__all__ = ["Access", "accesses", "traffic"]


@dataclasses.dataclass(frozen=True)
class Access:
    """One stream of a descriptor: its name there, whether it writes, and the addresses of its lines in order."""

    stream: str
    write: bool
    lines: np.ndarray


def accesses(config: CoreConfig, opcode: Opcode, sections: dict) -> list[Access]:
    """The streams of one descriptor. Base registers count as zero; consecutive accesses to a line are one, as the
    core makes them. The fetch of the descriptor itself is not among them."""
    size = config.line_bytes
    fields = {label: defaultdict(int, sections.get(label, {})) for label, _ in FORMATS[opcode]}
    found = []

    def add(stream, write, addresses):
        lines = np.asarray(addresses, np.int64) // size * size
        fresh = np.concatenate([[True], np.diff(lines) != 0]) if len(lines) else []
        found.append(Access(stream, write, lines[fresh] if len(lines) else lines))

    if opcode is Opcode.PRODUCT:
        feed, weights, store = fields["feed"], fields["weights"], fields["store"]
        for name in ("load_a", "load_b"):
            load = fields[name]
            if load["enable"]:
                add(name, False, walk([load["tiles"], load["runs"], load["lines"]],
                                      [load["tile_stride"], load["run_stride"], size], load["address"]))
        if feed["mode"] != Mode.GRADIENT:
            tile = (config.columns if feed["mode"] == Mode.FORWARD else config.rows) // config.vectors_per_line
            counts, strides = [feed[f"tiles{k}"] for k in range(4)], [weights[f"stride{k}"] for k in range(4)]
            lines = walk([*counts, tile], [*strides, size], weights["address"] // size * size)
            found.append(Access("weights", False, lines))
        if feed["last"]:
            add("store", True, walk([store[f"count{k}"] for k in range(4)] + [store["run"], config.result_lines],
                                    [store[f"stride{k}"] for k in range(4)] + [4 * config.vector, size],
                                    store["address"]))
    elif opcode is Opcode.VECTOR:
        vector = fields["vector"]
        counts = [vector[f"count{k}"] for k in range(5)]
        enabled = {"source0": vector["function"] != Function.FILL, "source1": vector["enable"] & 1,
                   "source2": vector["enable"] & 2, "target0": vector["enable"] & 8, "target1": vector["enable"] & 4}
        for name, on in enabled.items():
            if on:
                write, loops = name.startswith("target"), [*counts, config.parts]
                width = {"target0": vector["target_width"], "target1": 0}.get(name, vector[f"{name}_width"])
                if write and vector["pool"]:
                    loops[3:5] = 1, 1
                if name == "source1" and vector["function"] in (
                        Function.NITI_LOSS, Function.SQUARED_ERROR, Function.SOFTMAX):
                    loops[4:] = 1, 1
                strides = [vector[f"{name}_stride{k}"] for k in range(5)] + [config.lanes << width]
                add(name, write, walk(loops, strides, vector[name]))
    elif opcode is Opcode.SCALAR:
        scalar = fields["scalar"]
        if scalar["enable_load"]:
            add("load", False, [scalar["load"]])
        if scalar["enable_dump"]:
            add("dump", True, scalar["dump"] + size * np.arange(ceil_div(4 * REGISTERS, size)))
    return found


def traffic(config: CoreConfig, program) -> dict[tuple[str, str], tuple[int, int]]:
    """(bytes read, bytes written) of one step by (layer, pass), its descriptors' own fetch included: what the
    descriptors between the prologue's barrier and the loop of a :class:`sim.program.Program` move."""
    moved = defaultdict(lambda: [0, 0])
    loops = [number for number, block in enumerate(program.blocks) if block.opcode is Opcode.LOOP]
    first = loops[-2] + 1 if len(loops) > 1 else 0
    for block in program.blocks[first:loops[-1]]:
        entry = moved[block.layer, block.step]
        entry[0] += DESCRIPTOR_BYTES
        for access in accesses(config, block.opcode, block.sections):
            entry[access.write] += len(access.lines) * config.line_bytes
    return {key: tuple(value) for key, value in moved.items()}
