"""Integer square root, one result bit per cycle."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["SquareRoot"]


class SquareRoot(wiring.Component):
    """``root = floor(sqrt(x))`` and ``remainder = x - root**2`` of an unsigned integer, by digit recurrence.

    Parameters
    ----------
    bits : width of x, even.

    Attributes
    ----------
    i : In(stream of unsigned(bits)).
    o : Out(stream of {root: bits / 2, remainder: bits / 2 + 1}).

    Latency: ``bits / 2 + 1`` cycles from a transfer to ``o.valid``; the next operand is taken in the cycle after a
    result has left.
    """

    def __init__(self, bits: int):
        if bits < 2 or bits % 2:
            raise ValueError(f"SquareRoot takes an even number of bits, 2 or more, not {bits}")
        self.bits = bits
        count = bits // 2
        # State, visible to proofs.
        self.root = Signal(count, reset_less=True)           # bits found so far
        self.remainder = Signal(count + 1, reset_less=True)  # (part of x consumed so far) - root**2, at most 2 * root
        self.digits = Signal(bits, reset_less=True)          # the rest of x; two bits leave at the top
        self.left = Signal(range(count + 1), reset_less=True)  # iterations to go
        self.busy = Signal()
        super().__init__({
            "i": In(stream.Signature(bits)),
            "o": Out(stream.Signature(data.StructLayout({"root": count, "remainder": count + 1}))),
        })

    def elaborate(self, platform):
        m = Module()
        count = self.bits // 2
        root, remainder, digits, left, busy = self.root, self.remainder, self.digits, self.left, self.busy

        # (2 * root + 1)**2 = 4 * root**2 + 4 * root + 1: the next bit is 1 if the remainder covers the last two terms.
        partial = Cat(digits[-2:], remainder)
        difference = Signal(count + 4)
        m.d.comb += difference.eq(partial - Cat(Const(1, 2), root))
        fits = ~difference[-1]
        with m.If(busy & (left != 0)):
            m.d.sync += [left.eq(left - 1), root.eq(Cat(fits, root)), digits.eq(digits << 2)]
            with m.If(fits):
                m.d.sync += remainder.eq(difference)
            with m.Else():
                m.d.sync += remainder.eq(partial)

        m.d.comb += [
            self.o.valid.eq(busy & (left == 0)),
            self.o.payload.root.eq(root),
            self.o.payload.remainder.eq(remainder),
            self.i.ready.eq(~busy),
        ]
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += busy.eq(0)
        with m.If(~busy):
            m.d.sync += [busy.eq(self.i.valid), left.eq(count), digits.eq(self.i.payload), root.eq(0), remainder.eq(0)]
        return m
