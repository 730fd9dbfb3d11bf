"""Skid buffer: cuts the way back of a stream, whose ready becomes a register."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["SkidBuffer"]


class SkidBuffer(wiring.Component):
    """Passes items of ``shape`` on in the cycle in which they come, and keeps one that is not taken.

    Attributes
    ----------
    input : In(stream of shape), whose ready comes from a register and looks at nothing else.
    output : Out(stream of shape).

    One item per cycle, latency 0.
    """

    def __init__(self, shape):
        super().__init__({"input": In(stream.Signature(shape)), "output": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        # Three registers for one fact: every bit reads `held`, the unit before `ready`, the unit after `full`.
        ready, held, full = Signal(init=1), Signal(attrs={"keep": 1}), Signal(attrs={"keep": 1})
        kept = Signal.like(Value.cast(self.input.payload), reset_less=True)
        m.d.comb += [
            self.input.ready.eq(ready), self.output.valid.eq(self.input.valid | full),
            Value.cast(self.output.payload).eq(Mux(held, kept, self.input.payload)),
        ]
        with m.If(~held):
            m.d.sync += kept.eq(self.input.payload)
        waits = self.output.valid & ~self.output.ready
        m.d.sync += [held.eq(waits), full.eq(waits), ready.eq(~waits)]
        return m
