"""Round-robin choice between requesters."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["RoundRobin"]


class RoundRobin(wiring.Component):
    """Chooses one of ``count`` requesters, a cycle ahead: the choice is a register.

    The turn passes to the next other requester when the chosen one is served or has no request; where there is no
    other, it stays. So a requester alone is served in every cycle, and one that comes to an idle port a cycle later.

    Attributes
    ----------
    requests : In(count)  bit i: requester i wants to be served; held until it is.
    serve : In(1)  the chosen requester, if it requests, is served in this cycle.
    valid, choice : Out  whether the chosen requester requests, and its number.
    """

    def __init__(self, count: int):
        if count < 1:
            raise ValueError(f"round robin needs at least one requester, not {count}")
        self.count = count
        super().__init__({"requests": In(count), "serve": In(1),
                          "valid": Out(1), "choice": Out(range(max(count, 2)))})

    def elaborate(self, platform):
        m = Module()
        others = Signal(range(max(self.count, 2)))
        with m.Switch(self.choice):
            for k in range(self.count):
                with m.Case(k):
                    m.d.comb += [self.valid.eq(self.requests[k]), others.eq(k)]
                    for distance in reversed(range(1, self.count)):
                        candidate = (k + distance) % self.count
                        with m.If(self.requests[candidate]):
                            m.d.comb += others.eq(candidate)
        with m.If(self.serve | ~self.valid):
            m.d.sync += self.choice.eq(others)
        return m
