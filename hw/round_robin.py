"""Round-robin choice between requesters."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["RoundRobin"]


class RoundRobin(wiring.Component):
    """Chooses one of ``count`` requesters; the one chosen last comes last in the next choice.

    Attributes
    ----------
    requests : In(count)  bit i: requester i wants to be chosen.
    advance : In(1)  the choice of this cycle is used.
    valid, choice : Out  whether there is a request, and the number of the chosen one (combinational).
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"round robin needs at least one requester, not {count}")
        self.count = count
        super().__init__({"requests": In(count), "advance": In(1),
                          "valid": Out(1), "choice": Out(range(max(count, 2)))})

    def elaborate(self, platform):
        m = Module()
        last = Signal(range(max(self.count, 2)))
        m.d.comb += self.valid.eq(self.requests.any())
        with m.Switch(last):
            for k in range(self.count):
                with m.Case(k):
                    for distance in reversed(range(1, self.count + 1)):
                        candidate = (k + distance) % self.count
                        with m.If(self.requests[candidate]):
                            m.d.comb += self.choice.eq(candidate)
        with m.If(self.advance & self.valid):
            m.d.sync += last.eq(self.choice)
        return m
