"""Performance counters: how many cycles each event was high since the doorbell."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .register_map import COUNTER_BITS

__all__ = ["Counters"]


class Counters(wiring.Component):
    """One counter per event.

    Parameters
    ----------
    names : events, in the order of the counters.

    Attributes
    ----------
    NAME : In(1)  for each event: its counter grows, two cycles later, by one for every cycle in which it is high.
    clear : In(1)  zeroes all. counts : Out(48).array(n).
    """

    def __init__(self, names):
        self.names = tuple(names)
        if not self.names:
            raise ValueError("counters need at least one event")
        super().__init__({**{name: In(1) for name in self.names}, "clear": In(1),
                          "counts": Out(COUNTER_BITS).array(len(self.names))})

    def elaborate(self, platform):
        m = Module()
        for k, name in enumerate(self.names):
            happened = Signal(name=f"{name}_happened")
            m.d.sync += happened.eq(getattr(self, name))
            with m.If(self.clear):
                m.d.sync += self.counts[k].eq(0)
            with m.Elif(happened):
                m.d.sync += self.counts[k].eq(self.counts[k] + 1)
        return m
