"""First in, first out queue of stream items in a memory with synchronous reads."""

from __future__ import annotations

from amaranth.hdl import Module, ResetInserter, Shape, Value
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

__all__ = ["Fifo"]

SHALLOW = 16        # items that a LUT RAM holds


class Fifo(wiring.Component):
    """Queue of items of ``shape``: a memory of ``depth`` items and an output register.

    It is ready for input whenever fewer than ``depth`` items are held. One item in and one out per cycle (with depth
    1 every other cycle); latency two cycles, three for more than 16 items: those need block RAM, whose own output is
    too late in a cycle for anything else.

    Attributes
    ----------
    input : In(stream of shape); output : Out(stream of shape).
    level : Out  items held, at most depth + 2.
    clear : In(1)  drops everything held, and an item put in the same cycle.
    """

    def __init__(self, shape, depth: int):
        if depth < 1:
            raise ValueError(f"a queue needs a depth of at least 1, not {depth}")
        self.depth = depth
        super().__init__({"input": In(stream.Signature(shape)), "output": Out(stream.Signature(shape)),
                          "level": Out(range(depth + 3)), "clear": In(1)})

    def elaborate(self, platform):
        m = Module()
        fifo = SyncFIFOBuffered(width=Shape.cast(self.input.payload.shape()).width, depth=self.depth + 1)
        m.submodules.queue = ResetInserter(self.clear)(fifo)
        m.d.comb += [fifo.w_data.eq(self.input.payload), fifo.w_en.eq(self.input.valid),
                     self.input.ready.eq(fifo.w_rdy)]
        output, payload = self.output, Value.cast(self.output.payload)
        if self.depth <= SHALLOW:
            m.d.comb += [payload.eq(fifo.r_data), output.valid.eq(fifo.r_rdy), fifo.r_en.eq(output.ready),
                         self.level.eq(fifo.level)]
        else:
            m.d.comb += [fifo.r_en.eq(~output.valid | output.ready), self.level.eq(fifo.level + output.valid)]
            with m.If(fifo.r_en):
                m.d.sync += [payload.eq(fifo.r_data), output.valid.eq(fifo.r_rdy)]
            with m.If(self.clear):
                m.d.sync += output.valid.eq(0)
        return m
