"""Runs a whole program in numpy, one descriptor after the other: what a compiler wrote, without the hardware's time.

Products are `BlockModel`'s, vector passes `vector_reference`'s, scalar programs `hw.scalar.run`'s.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from hw import scalar
from hw.descriptor import ADDRESSES, DESCRIPTOR_BYTES, Opcode, decode
from tests.hw.vector_reference import Wide, execute
from tests.sim.block_model import BlockModel

__all__ = ["ProgramModel"]


@dataclasses.dataclass
class ProgramModel:
    """Memory and registers of a core that runs ``compiled`` programs. ``on_step(step)`` sees the end of each step."""

    config: object
    seed: int
    memory: np.ndarray

    def __post_init__(self):
        self.blocks = BlockModel(self.config, self.memory)
        self.wide = Wide.of(self.config.vector)
        self.blocks.scalars = self.wide.scalars

    def write(self, pieces):
        """(region, bytes) pairs as `Compiled.state` and `Compiled.batches` give them."""
        for region, data in pieces:
            self.memory[region.address:region.address + len(data)] = np.frombuffer(data, np.uint8)

    def run(self, program, step: int, on_step):
        self.memory[program.address:program.address + len(program.image)] = np.frombuffer(program.image, np.uint8)
        bases, iteration, address = [0] * 8, 0, program.address
        scalars = self.wide.scalars
        while True:
            opcode, sections = decode(self.memory[address:address + DESCRIPTOR_BYTES].tobytes())
            header = sections.get("header", {})
            for name, (section, field) in zip(("base_a", "base_b"), ADDRESSES.get(opcode, ()), strict=False):
                sections[section][field] += bases[header[name]]
            address += DESCRIPTOR_BYTES
            scalars[scalar.STEP] = step
            match opcode:
                case Opcode.END:
                    return
                case Opcode.PRODUCT:
                    self.blocks.run(sections)
                case Opcode.VECTOR:
                    fields = sections["vector"]
                    largest = execute(fields, self.memory, self.config.vector, scalars[fields["shift_register"]],
                                      self.seed, step, self.wide)
                    if fields["enable"] & 16:
                        old = 0 if fields["range_clear"] else scalars[fields["range_register"]]
                        scalars[fields["range_register"]] = max(old, largest)
                case Opcode.SCALAR:
                    self._scalar(sections["scalar"])
                case Opcode.LOOP:
                    loop = sections["loop"]
                    if loop["step"]:
                        on_step(step)
                        step += 1
                    iteration += 1
                    bases = [0] + [bases[k] + loop[f"increment{k}"] for k in range(1, 8)]
                    if iteration < loop["count"]:
                        address = loop["target"]
                    else:
                        iteration = 0

    def _scalar(self, fields):
        words = [fields[f"operation{k}"] for k in range(fields["count"])]
        if fields["microprogram"]:
            start = fields["microprogram_address"]
            self.wide.words[start:start + len(words)] = words
            return
        word = int(self.memory[fields["load"]:][:4].view("<i4")[0]) if fields["enable_load"] else 0
        values, errors = scalar.run(words, self.wide.scalars, word)
        assert not errors, errors
        self.wide.scalars[:] = values
        if fields["enable_dump"]:
            dump = np.array(values, "<i4").view(np.uint8)
            self.memory[fields["dump"]:fields["dump"] + len(dump)] = dump
