"""One 64-bit processor of the wide lanes: shifter, multiplier and adder in three stages."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .lanes import TARGET_BITS
from .microprogram import BITS, MULTIPLICAND_BITS, MULTIPLIER_BITS, WideOperation

__all__ = ["WideLane"]

HALF = MULTIPLIER_BITS // 2     # digits of the product's operands: 3 x 2 products of 16 bits
assert MULTIPLICAND_BITS == 3 * HALF


def _highest_one(value):
    """Whether a value (2, 4, 8, .. bits) has a one, and the index of its highest."""
    if len(value) == 2:
        return value.any(), value[1]
    middle = len(value) // 2
    (low, low_index), (high, high_index) = _highest_one(value[:middle]), _highest_one(value[middle:])
    return low | high, Cat(Mux(high, high_index, low_index), high)


class WideLane(wiring.Component):
    """Executes an instruction per cycle; :mod:`hw.microprogram` says what each means.

    Attributes
    ----------
    op : In(5)  a WideOperation. a, b : In(signed(64))  its operands; all three from registers.
    serial : In(64)  the result of DIVIDE and SQRT, which are computed outside, with their operands.
    magnitude : Out(64)  for RANGE: abs(a), one cycle after the operands.
    result : Out(signed(64))  two cycles after the operands; holds nothing useful for END, RANGE and WRITE.

    The result is a sum, ``x + y``, of two registers: rounding adds a bit, MUL two partial sums, BIT_LENGTH 1 to the
    index of the highest one, the others 0.
    """

    def __init__(self):
        super().__init__({"op": In(WideOperation), "a": In(signed(BITS)), "b": In(signed(BITS)), "serial": In(BITS),
                          "magnitude": Out(BITS), "result": Out(signed(BITS))})

    def elaborate(self, platform):
        m = Module()
        op, a, b = self.op, self.a, self.b

        def register(name, shape=1):
            return Signal(shape, name=name, reset_less=True)

        # First stage: sum or difference, partial products, what the shifter and the limits must do.
        ranging = op.matches(WideOperation.RANGE, WideOperation.BIT_LENGTH)
        minus, addend = Signal(), Signal(signed(BITS))
        m.d.comb += [minus.eq(Mux(ranging, a[-1],
                                  op.matches(WideOperation.SUB, WideOperation.MIN, WideOperation.MAX))),
                     addend.eq(Mux(ranging, a, b))]
        total = register("total", signed(BITS + 1))
        m.d.sync += total.eq(Mux(ranging, 0, a) + Mux(minus, ~addend, addend) + minus)

        a_digits = (a[:HALF], a[HALF:2 * HALF], a[2 * HALF:3 * HALF].as_signed())
        b_digits = (b[:HALF], b[HALF:2 * HALF].as_signed())
        products = [[register(f"product{i}{k}", (x * y).shape()) for k, y in enumerate(b_digits)]
                    for i, x in enumerate(a_digits)]
        for row, x in zip(products, a_digits, strict=True):
            m.d.sync += [product.eq(x * y) for product, y in zip(row, b_digits, strict=True)]

        # A left shift by k is a right shift by 64 - k of the word above 64 zeros and one more bit, the round bit.
        right, distance, vanishes = register("right"), register("distance", 7), register("vanishes")
        small = b[6:] == b[-1].replicate(BITS - 6)      # -64 to 63
        m.d.sync += [
            right.eq(b[-1]),
            distance.eq(Mux(small & ~(b[-1] & (b[:6] == 0)), BITS - b[:6], Mux(b[-1], BITS - 1, 0))),
            vanishes.eq((op == WideOperation.ROUND) & b[-1] & (~small | (b[1:6] == 0))),
        ]
        code, above, below = register("code", 2), register("above"), register("below")
        m.d.sync += [code.eq(b[:2]), above.eq(0), below.eq(0)]
        for k, bits in enumerate(TARGET_BITS):
            high = a[bits - 1:]
            with m.If((op == WideOperation.CLIP) & (b == k)):
                m.d.sync += [above.eq(~a[-1] & high.any()), below.eq(a[-1] & (~high.all() | (a[:bits - 1] == 0)))]
        kept, other = register("kept", BITS), register("other", BITS)
        m.d.sync += [kept.eq(Mux((op == WideOperation.GATE) & (b <= 0), 0, a)),
                     other.eq(Mux(op.matches(WideOperation.DIVIDE, WideOperation.SQRT), self.serial, b))]
        op1 = register("op1", WideOperation)
        m.d.sync += op1.eq(op)

        # Second stage: the two summands of the result.
        some, highest = _highest_one(total[:BITS])
        simple = Signal(BITS)
        with m.Switch(op1):
            with m.Case(WideOperation.ADD, WideOperation.SUB):
                m.d.comb += simple.eq(total)
            with m.Case(WideOperation.MOVE, WideOperation.SQRT, WideOperation.DIVIDE):
                m.d.comb += simple.eq(other)
            with m.Case(WideOperation.MIN):
                m.d.comb += simple.eq(Mux(total < 0, kept, other))
            with m.Case(WideOperation.MAX):
                m.d.comb += simple.eq(Mux(total < 0, other, kept))
            with m.Case(WideOperation.BIT_LENGTH):
                m.d.comb += simple.eq(highest)        # and 1 in y: 0 has no highest one
            with m.Default():
                limit = Signal(BITS - 1)
                for k, bits in enumerate(TARGET_BITS):
                    with m.If(code == k):
                        m.d.comb += limit.eq((1 << bits - 1) - 1)
                m.d.comb += simple.eq(Mux(above, limit, Mux(below, Cat(Const(1, 1), ~limit[1:], Const(1, 1)), kept)))

        shifted = Signal(BITS + 1)
        m.d.comb += shifted.eq(Mux(right, Cat(Const(0, 1), kept, kept[-1].replicate(BITS)),
                                   Cat(Const(0, BITS + 1), kept)) >> distance)
        (p00, p01), (p10, p11), (p20, p21) = products
        x, y = register("x", BITS), register("y", BITS)
        m.d.sync += [x.eq(simple), y.eq((op1 == WideOperation.BIT_LENGTH) & some)]
        with m.If(op1 == WideOperation.MUL):
            m.d.sync += [x.eq(Cat(p00[:HALF], Cat(p00[HALF:], p11[:2 * HALF]) + p10)),
                         y.eq(Cat(Const(0, HALF), p01[:HALF], (p01 >> HALF) + p20 + Cat(Const(0, HALF), p21[:HALF])))]
        with m.If(op1.matches(WideOperation.SHIFT, WideOperation.ROUND)):
            m.d.sync += [x.eq(Mux(vanishes, 0, shifted[1:])),
                         y.eq((op1 == WideOperation.ROUND) & right & ~vanishes & shifted[0])]

        # Third stage.
        m.d.comb += [self.magnitude.eq(total), self.result.eq(x + y)]
        return m
