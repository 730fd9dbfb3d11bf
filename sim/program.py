"""Program images: memory regions, descriptors, and the dependencies between the two engines."""

from __future__ import annotations

import dataclasses

from hw.descriptor import DESCRIPTOR_BYTES, Opcode, encode

from .layout import round_up

__all__ = ["Region", "ProgramBuilder", "Program", "CompileError"]


class CompileError(ValueError):
    """A network, batch or core that the compiler cannot map; says what to change."""


@dataclasses.dataclass
class Region:
    """A named piece of memory. ``layout`` packs and unpacks it; ``copies`` follow each other (one per step)."""

    name: str
    address: int
    layout: object
    copies: int = 1

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    @property
    def end(self) -> int:
        return self.address + self.copies * self.nbytes


@dataclasses.dataclass
class Block:
    """One descriptor with what it means, for listings and cycle reports."""

    opcode: Opcode
    sections: dict
    layer: str = ""
    step: str = ""         # forward, error, gradient, requantize, update, ...


@dataclasses.dataclass
class Program:
    """A finished program: bytes to write at ``address``, and the tags its descriptors carry."""

    address: int
    image: bytes
    blocks: list[Block]
    first_tag: int
    tags: list[tuple[str, str]]       # tag number, counted from first_tag -> (layer, pass)
    iterations: int


class ProgramBuilder:
    """Collects descriptors in program order and fills in their dependencies.

    Every descriptor names the tensors it reads and writes. It waits until the other engine has completed the last
    writer of what it reads, and the last writer and all readers of what it writes. Within an engine order is
    enough: vector descriptors run one at a time, and no product reads what a product wrote.
    """

    def __init__(self, first_tag: int = 0):
        self.blocks: list[Block] = []
        self.first_tag = first_tag
        self.tags: list[tuple[str, str]] = []
        self._restart()

    def _restart(self):
        """A LOOP restarts the completion counts."""
        self._body = len(self.blocks)
        self._count = {"product": 0, "vector": 0}
        self._writer: dict = {}
        self._readers: dict = {}

    def _wait(self, engine: str, reads, writes) -> dict[str, int]:
        need = {"product": 0, "vector": 0}

        def after(who):
            if who is not None and who[0] != engine:
                need[who[0]] = max(need[who[0]], who[1])
        for tensor in reads:
            after(self._writer.get(tensor))
        for tensor in writes:
            after(self._writer.get(tensor))
            for who in self._readers.get(tensor, ()):
                after(who)
        return {"wait_product": need["product"], "wait_vector": need["vector"]}

    def add(self, opcode: Opcode, sections: dict, *, layer="", step="", reads=(), writes=(), header=None):
        engine = "product" if opcode is Opcode.PRODUCT else "vector"
        key = (layer, step)
        if key not in self.tags:
            self.tags.append(key)
        fields = {"tag": self.first_tag + self.tags.index(key), **(header or {})}
        if opcode in (Opcode.PRODUCT, Opcode.VECTOR, Opcode.SCALAR):
            fields |= self._wait(engine, reads, writes)
            self._count[engine] += 1
            me = (engine, self._count[engine])
            for tensor in reads:
                self._readers.setdefault(tensor, []).append(me)
            for tensor in writes:
                self._writer[tensor] = me
                self._readers[tensor] = []
        self.blocks.append(Block(opcode, {"header": fields, **sections}, layer, step))

    def barrier(self):
        """Wait until everything so far is complete: the end of a prologue."""
        self.loop(1, {}, step=False)

    def loop(self, count: int, increments: dict[int, int], *, step: bool = True):
        """Repeat everything since the last loop or barrier ``count`` times."""
        self.blocks.append(Block(Opcode.LOOP, {"loop": {
            "count": count, "target": self._body * DESCRIPTOR_BYTES, "step": step,
            **{f"increment{base}": stride for base, stride in increments.items()}}}, step="loop"))
        self._restart()

    def end(self):
        self.blocks.append(Block(Opcode.END, {}, step="end"))

    @property
    def nbytes(self) -> int:
        return len(self.blocks) * DESCRIPTOR_BYTES

    def finish(self, address: int, iterations: int) -> Program:
        """The program as bytes to write at ``address``."""
        image = b""
        for block in self.blocks:
            sections = block.sections
            if block.opcode is Opcode.LOOP:
                sections = {"loop": {**sections["loop"], "target": address + sections["loop"]["target"]}}
            image += encode(block.opcode, **sections)
        return Program(address, image, self.blocks, self.first_tag, self.tags, iterations)


class MemoryMap:
    """Hands out line-aligned regions (4 KB aligned when large, so that bursts are not cut)."""

    def __init__(self, line_bytes: int, base: int = 0x1000):
        self.line_bytes = line_bytes
        self.next = base
        self.regions: dict[str, Region] = {}

    def add(self, name: str, layout, copies: int = 1) -> Region:
        size = layout.nbytes * copies
        self.next = round_up(self.next, 4096 if size >= 4096 else max(256, self.line_bytes))
        region = Region(name, self.next, layout, copies)
        self.regions[name] = region
        # One spare line: loads and reads may touch the line after the last vector.
        self.next += size + self.line_bytes
        return region
