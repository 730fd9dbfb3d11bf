"""The addresses of a loop nest as a stream."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from .interfaces import ADDRESS_BITS
from .loop_nest import LoopNest
from .skid_buffer import SkidBuffer

__all__ = ["AddressStream"]


class AddressStream(wiring.Component):
    """One address for each iteration of ``levels`` nested loops, level 0 outermost (:class:`hw.loop_nest.LoopNest`).

    The loops run ahead by one address, so a ready that comes late in its cycle reaches one register and not theirs.

    Attributes
    ----------
    load : In(1)  begin; only when the addresses of the run before were all taken.
    start, stride, count : In  first byte address, byte strides, loop counts; as LoopNest has them, stable from ``load``
        to the last address.
    item : Out stream of address, ``first`` and ``last`` (of all), ``ends`` (the innermost loop is at its last).

    One address per cycle, the first in the cycle after ``load``.
    """

    def __init__(self, levels: int):
        self.levels = levels
        super().__init__({
            "load": In(1), "start": In(ADDRESS_BITS), "stride": In(ADDRESS_BITS).array(levels),
            "count": In(16).array(levels),
            "item": Out(stream.Signature(data.StructLayout({"address": ADDRESS_BITS, "first": 1, "last": 1,
                                                            "ends": 1}))),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.nest = nest = LoopNest(self.levels, {"address": ADDRESS_BITS})
        m.submodules.ahead = ahead = SkidBuffer(self.item.payload.shape())
        running, into = Signal(), ahead.input
        idle = Signal(init=1, attrs={"keep": 1})       # its complement: the loops stand far from what takes addresses
        m.d.comb += [
            nest.begin.eq(self.load),
            nest.load.eq(idle),      # all the time until a run begins, because `load` may be late in its cycle
            nest.start_address.eq(self.start), nest.step.eq(into.ready),
            *(nest.count[k].eq(self.count[k]) for k in range(self.levels)),
            *(nest.stride_address[k].eq(self.stride[k]) for k in range(self.levels)),
            into.valid.eq(running), into.payload.address.eq(nest.value_address),
            into.payload.first.eq(nest.at_first.all()), into.payload.last.eq(nest.last),
            into.payload.ends.eq(nest.at_last[-1]),
        ]
        with m.If(nest.step & nest.last):
            m.d.sync += [running.eq(0), idle.eq(1)]
        with m.If(self.load):
            m.d.sync += [running.eq(1), idle.eq(0)]
        connect(m, ahead.output, flipped(self.item))
        return m
