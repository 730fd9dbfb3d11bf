"""The part of memory the host allows the core to touch."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .interfaces import ADDRESS_BITS, line_address_bits

__all__ = ["Window"]


class Window(wiring.Component):
    """Says which of several lines lie wholly inside ``base <= byte address < limit``.

    Attributes
    ----------
    base, limit : In(32)  byte addresses; they take effect in the cycle after a change.
    lines : In(line address).array(count).
    from_base, below_limit : Out(count)  combinational; both are set for a line inside. Apart, so that a register each
        takes a comparison's carry as it is.
    """

    def __init__(self, config: CoreConfig, count: int):
        self.offset_bits = ADDRESS_BITS - line_address_bits(config)
        super().__init__({"base": In(ADDRESS_BITS), "limit": In(ADDRESS_BITS),
                          "lines": In(line_address_bits(config)).array(count),
                          "from_base": Out(count), "below_limit": Out(count)})

    def elaborate(self, platform):
        m = Module()
        line_bits = ADDRESS_BITS - self.offset_bits
        first, end = Signal(line_bits + 1), Signal(line_bits)
        round_up = Const((1 << self.offset_bits) - 1, self.offset_bits)
        m.d.sync += [first.eq((self.base + round_up) >> self.offset_bits), end.eq(self.limit >> self.offset_bits)]
        # Written as `<`, which is a carry chain: yosys makes a tree of gates beside it for the `=` of `>=`.
        m.d.comb += [self.from_base.eq(Cat(~(line < first) for line in self.lines)),
                     self.below_limit.eq(Cat(line < end for line in self.lines))]
        return m
