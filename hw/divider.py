"""Unsigned integer division, one quotient bit per cycle."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Divider"]


class Divider(wiring.Component):
    """``quotient, remainder = divmod(numerator, denominator)`` of unsigned integers, by restoring division.

    Parameters
    ----------
    numerator_bits, denominator_bits : widths of the operands.
    quotient_bits : width of the quotient, at most (and by default) ``numerator_bits``. With fewer bits the caller
        guarantees ``numerator < denominator << quotient_bits``, and the division takes fewer cycles.

    Attributes
    ----------
    i : In(stream of {numerator, denominator}).
    o : Out(stream of {quotient, remainder}). Division by zero gives a quotient of all ones and no useful remainder.

    Latency: ``quotient_bits + 1`` cycles from an operand's transfer to ``o.valid``. The next operands are taken in the
    cycle after a result has left, so a division takes ``quotient_bits + 2`` cycles in a row of them.
    """

    def __init__(self, numerator_bits: int, denominator_bits: int, quotient_bits: int | None = None):
        quotient_bits = numerator_bits if quotient_bits is None else quotient_bits
        if not 1 <= quotient_bits <= numerator_bits or denominator_bits < 1:
            raise ValueError(f"Divider needs operands of at least one bit and a quotient of 1 to {numerator_bits} "
                             f"bits, not {numerator_bits}/{denominator_bits} -> {quotient_bits}")
        if numerator_bits - quotient_bits > denominator_bits:
            raise ValueError(f"Divider: a quotient of {quotient_bits} bits is too narrow for a numerator of "
                             f"{numerator_bits} and a denominator of {denominator_bits} bits; it needs "
                             f"{numerator_bits - denominator_bits} bits or more")
        self.numerator_bits = numerator_bits
        self.denominator_bits = denominator_bits
        self.quotient_bits = quotient_bits
        # State, visible to proofs.
        self.denominator = Signal(denominator_bits, reset_less=True)
        self.remainder = Signal(denominator_bits, reset_less=True)   # below the denominator, unless that is zero
        # Numerator bits leave at the top, quotient bits enter below.
        self.digits = Signal(quotient_bits, reset_less=True)
        self.left = Signal(range(quotient_bits + 1), reset_less=True)   # iterations to go
        self.busy = Signal()
        super().__init__({
            "i": In(stream.Signature(data.StructLayout({"numerator": numerator_bits,
                                                        "denominator": denominator_bits}))),
            "o": Out(stream.Signature(data.StructLayout({"quotient": quotient_bits,
                                                         "remainder": denominator_bits}))),
        })

    def elaborate(self, platform):
        m = Module()
        denominator, remainder, digits, left, busy = (self.denominator, self.remainder, self.digits, self.left,
                                                      self.busy)
        partial = Cat(digits[-1], remainder)
        difference = Signal(self.denominator_bits + 2)
        m.d.comb += difference.eq(partial - denominator)
        fits = ~difference[-1]
        with m.If(busy & (left != 0)):
            m.d.sync += [left.eq(left - 1), digits.eq(Cat(fits, digits))]
            with m.If(fits):
                m.d.sync += remainder.eq(difference)
            with m.Else():
                m.d.sync += remainder.eq(partial)

        m.d.comb += [
            self.o.valid.eq(busy & (left == 0)),
            self.o.payload.quotient.eq(digits),
            self.o.payload.remainder.eq(remainder),
            self.i.ready.eq(~busy),
        ]
        with m.If(self.o.valid & self.o.ready):
            m.d.sync += busy.eq(0)
        with m.If(~busy):
            m.d.sync += busy.eq(self.i.valid)
            m.d.sync += [
                left.eq(self.quotient_bits),
                denominator.eq(self.i.payload.denominator),
                digits.eq(self.i.payload.numerator[:self.quotient_bits]),
                remainder.eq(self.i.payload.numerator[self.quotient_bits:]),
            ]
        return m
