"""One 64-bit processor of the wide lanes: shifter, multiplier and adder in three stages."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .lanes import TARGET_BITS
from .microprogram import BITS, MULTIPLICAND_BITS, MULTIPLIER_BITS, WideOperation

__all__ = ["WideLane", "lane_control", "decoded"]

HALF = MULTIPLIER_BITS // 2     # digits of the product's operands: 3 x 2 products of 16 bits
assert MULTIPLICAND_BITS == 3 * HALF
GROUP = 8                       # bits of which the first stage finds the highest one
FINE = 3                        # low bits of a shift distance, which the second stage heeds

_FLAGS = {
    "sum": (WideOperation.ADD, WideOperation.SUB),
    "subtract": (WideOperation.SUB, WideOperation.MIN, WideOperation.MAX),
    "move": (WideOperation.MOVE,), "serial": (WideOperation.SQRT, WideOperation.DIVIDE), "root": (WideOperation.SQRT,),
    "multiply": (WideOperation.MUL,), "shift": (WideOperation.SHIFT, WideOperation.ROUND),
    "round": (WideOperation.ROUND,), "clip": (WideOperation.CLIP,), "least": (WideOperation.MIN,),
    "most": (WideOperation.MAX,), "gate": (WideOperation.GATE,), "length": (WideOperation.BIT_LENGTH,),
    "range": (WideOperation.RANGE,), "write": (WideOperation.WRITE,),
}
lane_control = data.StructLayout(dict.fromkeys(_FLAGS, 1))
"""An operation, decoded: a bit for each kind of work."""


def decoded(op):
    """The bits of ``lane_control`` for a WideOperation."""
    return Cat(op.matches(*operations) for operations in _FLAGS.values())


def _highest(halves):
    """Whether any of 2, 4, 8, .. pairs (some, index) has a one, and the index of the highest, from those pairs."""
    if len(halves) == 1:
        return halves[0]
    middle = len(halves) // 2
    (low, low_index), (high, high_index) = _highest(halves[:middle]), _highest(halves[middle:])
    below = Mux(high, high_index, low_index) if len(low_index) else ()      # no Verilog signal without bits
    return low | high, Cat(below, high)


class WideLane(wiring.Component):
    """Executes an instruction per cycle; :mod:`hw.microprogram` says what each means.

    Attributes
    ----------
    control : In(lane_control)  the operation. a, b : In(signed(64))  its operands. minus : In(1)  b is subtracted; for
        RANGE, a is negative. All from registers.
    serial : In(64)  the result of DIVIDE and SQRT, which are computed outside, with their operands.
    magnitude : Out(64)  for RANGE: abs(a), one cycle after the operands.
    result : Out(signed(64))  two cycles after the operands; holds nothing useful for END, RANGE and WRITE.

    The result is a sum, ``x + y``, of two registers: rounding adds a bit, MUL two partial sums, BIT_LENGTH 1 or 2 to
    the index of the highest one, the others 0. CLIP heeds the two low bits of b.
    """

    def __init__(self):
        super().__init__({"control": In(lane_control), "a": In(signed(BITS)), "b": In(signed(BITS)), "minus": In(1),
                          "serial": In(BITS), "magnitude": Out(BITS), "result": Out(signed(BITS))})

    def elaborate(self, platform):
        m = Module()
        control, a, b = self.control, self.a, self.b
        negative = a[-1]

        def register(name, shape=1):
            return Signal(shape, name=name, reset_less=True)

        # First stage: sum or difference, partial products, the coarse shift, what the limits must do.
        total = register("total", signed(BITS + 1))
        addend = (Mux(control.range, a, b) ^ self.minus.replicate(BITS))[:BITS]
        m.d.sync += total.eq((a[:] & ~control.range.replicate(BITS)).as_signed() + addend.as_signed() + self.minus)

        a_digits = (a[:HALF], a[HALF:2 * HALF], a[2 * HALF:3 * HALF].as_signed())
        b_digits = (b[:HALF], b[HALF:2 * HALF].as_signed())
        products = [[register(f"product{i}{k}", (x * y).shape()) for k, y in enumerate(b_digits)]
                    for i, x in enumerate(a_digits)]
        for row, x in zip(products, a_digits, strict=True):
            m.d.sync += [product.eq(x * y) for product, y in zip(row, b_digits, strict=True)]

        # A shift by b, -64 to 63, is a right shift by 64 - (b modulo 64) = 1 + ~b of a word twice as wide, of which the
        # 1 is in the wiring. One more bit, below the result's, rounds.
        right = b[-1]
        small = b[6:] == right.replicate(BITS - 6)
        distance = ~b[:6]
        funnel, fine = register("funnel", BITS + (1 << FINE)), register("fine", FINE)
        shifts, rounds, ones = register("shifts"), register("rounds"), register("ones")
        m.d.sync += [
            funnel.eq(Mux(right, Cat(a, negative.replicate(BITS)), Cat(Const(0, BITS), a))
                      >> Cat(Const(0, FINE), distance[FINE:])),
            fine.eq(distance),
            shifts.eq(control.shift & small & ~(control.round & right & (b[1:6] == 0))),
            rounds.eq(control.round & right),
            ones.eq(control.shift & ~control.round & right & ~small & negative),
        ]
        code, above, below = register("code", 2), register("above"), register("below")
        m.d.sync += [code.eq(b[:2]), above.eq(0), below.eq(0)]
        for k, bits in enumerate(TARGET_BITS):
            high = a[bits - 1:]
            with m.If(control.clip & (b[:2] == k)):
                m.d.sync += [above.eq(~negative & high.any()),
                             below.eq(negative & (~high.all() | (a[:bits - 1] == 0)))]
        kept, other = register("kept", BITS), register("other", BITS)
        m.d.sync += [kept.eq(a), other.eq(Mux(control.serial, self.serial, b))]
        keeps, moves = register("keeps"), register("moves")
        m.d.sync += [keeps.eq(control.clip | (control.gate & ~right & b.any())),
                     moves.eq(control.move | control.serial)]
        flags = {name: register(name) for name in ("sum", "least", "most", "multiply", "length")}
        m.d.sync += [flag.eq(control[name]) for name, flag in flags.items()]
        # The magnitude of a negative number is one longer than its complement if it is a power of two.
        complement = Signal(BITS)
        groups = []
        m.d.comb += complement.eq(a ^ negative.replicate(BITS))
        for k in range(0, BITS, GROUP):
            some, index = register(f"some{k}"), register(f"index{k}", (GROUP - 1).bit_length())
            found = _highest([(bit, Const(0, 0)) for bit in complement[k:k + GROUP]])
            m.d.sync += [some.eq(found[0]), index.eq(found[1])]
            groups.append((some, index))
        longer = register("longer")
        m.d.sync += longer.eq(negative & ~(a[:-1] & ~a[1:]).any())

        # Second stage: the two summands of the result.
        some, highest = _highest(groups)
        shifted = Signal(BITS + 1)
        m.d.comb += shifted.eq(funnel >> fine)
        less = total[-1]
        stays = Signal()
        m.d.comb += stays.eq(Mux(less, flags["least"], flags["most"]) | (keeps & ~above & ~below))
        replaced = Signal()
        m.d.comb += replaced.eq(Mux(less, flags["most"], flags["least"]) | moves)
        # Limits, and the sign alone after a long right shift.
        limit = Cat((Mux(code <= k - 1, below, above) if k else above).replicate(bits - 1 - start)
                    for k, (start, bits) in enumerate(zip((0, 7, 15), TARGET_BITS, strict=True)))
        limit = Cat(above | below, limit[1:], below.replicate(BITS - len(limit))) | ones.replicate(BITS)
        (p00, p01), (p10, p11), (p20, p21) = products
        multiplied = Cat(p00[:HALF], (Cat(p00[HALF:], p11[:2 * HALF]) + p10)[:3 * HALF])
        x, y = register("x", BITS), register("y", BITS)
        chosen = limit
        for flag, value in ((flags["sum"], total[:BITS]), (stays, kept), (replaced, other), (shifts, shifted[1:]),
                            (flags["multiply"], multiplied), (flags["length"], highest)):
            chosen = chosen | (value & flag.replicate(len(value)))
        m.d.sync += [x.eq(chosen), y.eq(Mux(flags["length"], some + longer, shifts & rounds & shifted[0]))]
        with m.If(flags["multiply"]):
            m.d.sync += y.eq(Cat(Const(0, HALF), p01[:HALF], (p01 >> HALF) + p20 + Cat(Const(0, HALF), p21[:HALF])))

        # Third stage.
        m.d.comb += [self.magnitude.eq(total), self.result.eq(x + y)]
        return m
