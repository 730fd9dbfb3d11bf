"""RoundShift at full width against each rule's formula, written as the contract states it."""

from __future__ import annotations

from amaranth.hdl import Assert, Assume, Const, Elaboratable, Module, Mux, Signal, signed

from golden.rounding import Rounding

from .harness import Fault, Proof, after, anyseq, delayed, free_inputs

WIDTH = 32
TARGETS = (8, 16, 32)
WIDE = 66
FILE = "hw/round_shift.py"


def rule_formula(m, rule, x, shift, draw):
    """The rounded value by the contract's section 3 for shifts of 0 to 63, exact, not saturated."""
    negative = x < 0
    magnitude = Signal(WIDE)
    m.d.comb += magnitude.eq(Mux(negative, -x, x))
    size = Const(1, WIDE) << shift
    whole = magnitude >> shift
    discarded = magnitude & (size - 1)[:WIDE]
    half = (size >> 1)[:WIDE]       # 2**(shift - 1), 0 for a shift of 0

    def like_x(value):
        return Mux(negative, -value, value)
    match rule:
        case Rounding.TRUNCATE:
            return like_x(whole)
        case Rounding.NEAREST:
            return like_x((magnitude + half) >> shift)
        case Rounding.HALF_UP:
            return (x + half.as_signed()) >> shift
        case Rounding.HALF_EVEN:
            below = Mux(shift == 0, 0, half - 1)[:WIDE]
            odd = Mux(shift == 0, 0, (x >> shift)[0])
            return (x + below.as_signed() + odd) >> shift
        case Rounding.PSEUDO_STOCHASTIC:
            h = shift >> 1
            q = discarded >> h
            r = (discarded & ((Const(1, WIDE) << h) - 1)[:WIDE]) << shift[0]
            return like_x(whole + (q > r))
        case Rounding.STOCHASTIC_MAGNITUDE:
            return like_x(whole + (discarded > draw))
        case Rounding.STOCHASTIC:
            return (x + (draw >> (32 - shift)[:6])) >> shift
        case Rounding.STOCHASTIC_16:
            return like_x(whole + ((discarded << 16) > (draw[:16] << shift)))


class _Lane(Elaboratable):
    """One lane with every rule built in; all inputs are free in every cycle except what a subclass fixes."""

    rule = None             # fixed rule, or None for any code
    shift_bits = 6          # free shift, 0..63
    negative_shift = False

    def elaborate(self, platform):
        from hw.round_shift import RoundShift
        m = Module()
        m.submodules.dut = self.dut = dut = self.make(RoundShift)
        self.x, self.shift = anyseq(m, signed(WIDTH), "x"), anyseq(m, self.shift_bits, "shift")
        self.target, self.draw = anyseq(m, 2, "target"), anyseq(m, 32, "draw")
        code = anyseq(m, 4, "code") if self.rule is None else self.rule.code
        self.limit = Signal(32)
        with m.Switch(self.target):
            for k, bits in enumerate(TARGETS):
                with m.Case(k):
                    m.d.comb += self.limit.eq((1 << bits - 1) - 1)
        m.d.comb += [dut.x[0].eq(self.x), dut.rounding.eq(code), dut.target.eq(self.target),
                     dut.shift.eq(-self.shift if self.negative_shift else self.shift),
                     dut.draw[0].eq(self.draw), Assume(self.target < len(TARGETS))]
        self.known = after(m, dut.latency)
        self.specify(m)
        return m

    def make(self, unit):
        return unit(1, Rounding, width=WIDTH, target_bits=TARGETS)

    def saturated(self, m, exact):
        value, limited = Signal(exact.shape()), Signal(signed(WIDTH))
        m.d.comb += [value.eq(exact),
                     limited.eq(Mux(value > self.limit, self.limit, Mux(value < -self.limit, -self.limit, value)))]
        return limited

    def expect(self, m, expected):
        then = delayed(m, expected, self.dut.latency)
        m.d.comb += Assert(~self.known | (self.dut.o[0] == then), "wrong result")


class RuleProof(_Lane):
    """The result is the rule's formula, saturated, for every x, shift, width and draw."""

    def __init__(self, rule):
        self.rule = rule

    def specify(self, m):
        if self.rule is Rounding.STOCHASTIC:
            m.d.comb += Assume(self.shift <= 32)
        if self.rule is Rounding.STOCHASTIC_16:
            m.d.comb += Assume(self.shift <= 46)
        self.expect(m, self.saturated(m, rule_formula(m, self.rule, self.x, self.shift, self.draw)))


class LeftShiftProof(_Lane):
    """A negative shift multiplies by 2**-shift, exactly or saturated, whatever the rule (1 to 63 places)."""

    negative_shift = True

    def specify(self, m):
        m.d.comb += Assume(self.shift > 0)
        self.expect(m, self.saturated(m, self.x << self.shift))


class SymmetryProof(_Lane):
    """No input, rule code, draw or shift gives a result beyond +-(2**(bits-1) - 1) of the width asked for."""

    shift_bits = 7

    def specify(self, m):
        limit = delayed(m, self.limit, self.dut.latency)
        m.d.comb += Assert(~self.known | ((self.dut.o[0] <= limit) & (self.dut.o[0] >= -limit)), "out of range")


class ValidProof(Elaboratable):
    """A result says that it is one exactly ``latency`` cycles after its vector did."""

    def elaborate(self, platform):
        from hw.round_shift import RoundShift
        m = Module()
        m.submodules.dut = dut = RoundShift(1, [Rounding.NEAREST], width=6, target_bits=(6,))
        free_inputs(m, dut)
        m.d.comb += Assert(dut.o_valid == delayed(m, dut.i_valid, dut.latency), "valid left its vector")
        return m


_BELOW = "just_below, exact = (1 << (word - 1)) - 1, 1 << (word - 1)"
_RULE_FAULTS = {
    Rounding.TRUNCATE: ("[threshold.eq(~0), low.eq(1)]", "[threshold.eq(0), low.eq(1)]"),
    Rounding.NEAREST: (_BELOW, _BELOW.replace(") - 1,", "),")),
    Rounding.HALF_UP: ("Mux(negative[1], exact, just_below)", "just_below"),
    Rounding.HALF_EVEN: ("Cat(parity.replicate(word - 1), ~parity)", "Cat(Const(0, word - 1), Const(1, 1))"),
    Rounding.PSEUDO_STOCHASTIC: ("(padded & low_half1) << odd1", "padded & low_half1"),
    Rounding.STOCHASTIC_MAGNITUDE: ("field.eq(padded & low_shift1[:word])", "field.eq(padded)"),
    Rounding.STOCHASTIC: ("draw1 ^ (~negative[1]).replicate(32)", "draw1 ^ negative[1].replicate(32)"),
    Rounding.STOCHASTIC_16: ("draw1[:16] << (word - 16)", "draw1[:15] << (word - 16)"),
}

PROOFS = [
    *[Proof(f"round_shift/{rule.name.lower()}", lambda rule=rule: RuleProof(rule), 7,
            (Fault(FILE, *_RULE_FAULTS[rule]),),
            quick=rule in (Rounding.NEAREST, Rounding.PSEUDO_STOCHASTIC)) for rule in Rounding],
    Proof("round_shift/left_shift", LeftShiftProof, 7, (Fault(FILE, " | (left[4] & sticky))", ")"),)),
    Proof("round_shift/saturation", SymmetryProof, 7, (Fault(FILE, "whole[:bits - 1].all()", "0"),), quick=True),
    Proof("round_shift/valid", ValidProof, 9, (
        Fault(FILE, "0, self.latency)[self.latency]", "0, self.latency)[self.latency - 1]"),)),
]
