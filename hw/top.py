"""The generated Verilog's top level: the core behind a registered reset."""

from __future__ import annotations

from amaranth.hdl import Cat, ClockDomain, ClockSignal, Module, ResetSignal, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In

from .config import CoreConfig
from .core import Core

__all__ = ["Top"]


class Top(wiring.Component):
    """:class:`hw.core.Core` with ``clk`` and ``rst`` as ports.

    ``rst`` is synchronous and active high, for one cycle or more. The core sees it from a register, one cycle later and
    two longer, as its engines are reset a cycle after its ports and their units another. So the input drives few
    flip-flops instead of every one of the core, and a simulator need not evaluate the core again for each change of an
    input. Until the core has left reset, handshakes on all ports are held off.
    """

    def __init__(self, config: CoreConfig):
        self.core = Core(config)
        super().__init__({"clk": In(1), "rst": In(1), **self.core.signature.members})

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain()
        m.domains.reset = ClockDomain(reset_less=True)
        before, reset = Signal(2, init=-1), Signal(init=1)
        m.d.reset += [before.eq(Cat(self.rst, before)), reset.eq(self.rst | before.any())]
        m.d.comb += [ClockSignal("sync").eq(self.clk), ClockSignal("reset").eq(self.clk), ResetSignal("sync").eq(reset)]
        m.submodules.core = self.core
        for name, member in self.core.signature.members.items():
            outer, inner = getattr(self, name), getattr(self.core, name)
            if member.flow == In:
                m.d.comb += inner.eq(outer)
            elif name.endswith(("valid", "ready")):
                m.d.comb += outer.eq(inner & ~reset)
            else:
                m.d.comb += outer.eq(inner)
        return m
