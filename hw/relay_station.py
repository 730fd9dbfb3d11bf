"""Relay station: a stage of a long way, with no gate from one end to the other."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .skid_buffer import SkidBuffer

__all__ = ["RelayStation"]


class RelayStation(wiring.Component):
    """Passes items of ``shape`` on a cycle later: a register, and a skid buffer that cuts the way back.

    Attributes
    ----------
    input : In(stream of shape), whose ready comes from a register and looks at nothing else.
    output : Out(stream of shape).

    One item per cycle, latency 1, room for two (Carloni et al. 2001, "Theory of Latency-Insensitive Design").
    """

    def __init__(self, shape):
        super().__init__({"input": In(stream.Signature(shape)), "output": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.skid = skid = SkidBuffer(self.input.p.shape())
        there, item = Signal(), Signal.like(self.input.p, reset_less=True)
        m.d.comb += [self.input.ready.eq(skid.input.ready), skid.input.valid.eq(there), skid.input.payload.eq(item)]
        with m.If(skid.input.ready):
            m.d.sync += [there.eq(self.input.valid), item.eq(self.input.payload)]
        wiring.connect(m, skid.output, wiring.flipped(self.output))
        return m
