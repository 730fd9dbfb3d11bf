"""Shift-round-saturate lanes: all of golden.rounding behind one barrel rotator and one comparator."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.rounding import Rounding

__all__ = ["RoundShift", "SHIFT_SHAPE", "ROUNDING_BITS"]

SHIFT_SHAPE = signed(7)
ROUNDING_BITS = 4


class RoundShift(wiring.Component):
    """``saturate(round(x / 2**shift), bits)`` for a vector of lanes, one vector per cycle.

    Bit-exact to :class:`golden.rounding.Rounding` and :func:`golden.rounding.saturate` (contract section 3).

    Parameters
    ----------
    lanes : elements of a vector.
    roundings : the rules that can be selected at run time, any of :class:`golden.rounding.Rounding`.
    width : bits of a signed input element, 2 to 64; -2**(width-1) is a legal input.
    target_bits : the widths of a result that can be selected at run time, for example ``(8,)`` or ``(8, 16, 32)``.
        A result is always symmetric: +-(2**(bits-1) - 1).
    flags : also tell which inputs exceeded the range, and their sign.

    Attributes
    ----------
    enable : In(1), initially 1. With 0 the whole pipeline holds.
    i_valid, o_valid : a vector enters, a vector leaves; no back-pressure other than ``enable``.
    x : In(ArrayLayout(signed(width), lanes)).
    shift : In(signed(7)), -64..63, shared by the lanes. Below 0: exact left shift by -shift, whatever the rule.
    rounding : In(4), ``Rounding.code``; a code outside ``roundings`` truncates. Ignored if there is only one rule.
    target : In, index into ``target_bits``.
    draw : In(ArrayLayout(32, lanes)), present when a rule needs it. STOCHASTIC takes the contract's word,
        STOCHASTIC_16 and STOCHASTIC_MAGNITUDE their draw in the low bits (the caller takes the top 16 bits of a
        word, and bounds the other one to 0..2**shift-1). STOCHASTIC with a shift above 32 is outside the contract.
    o : Out(ArrayLayout(signed(max(target_bits)), lanes)).
    clipped, positive : Out(lanes), with ``flags``, beside ``o``: abs(x) exceeds limit * 2**shift (equality does not);
        x is above 0.

    All inputs belong to the vector presented with them. Latency: 4 enabled cycles (``RoundShift.latency``).

    How it works. Every rule is sign-magnitude: with A = abs(x), the magnitude of the result is (A >> shift) + up.
    Rotating A right by ``shift`` modulo N (N = 32 or 64 bits) leaves the quotient in the low bits and the discarded
    fraction, aligned to the top, in the rest. For shifts above N the rotated word is the fraction itself, and the
    wrapped bits below it can only make it larger: they are one `sticky` bit. For left shifts the wrapped bits are the
    overflow. Which bits are which depends on the shift alone, so the masks are made once for all lanes. Then
    up = (fraction, sticky) > (threshold, low bit), with

    ====================  =====================================================================
    NEAREST               just below one half
    HALF_UP               just below one half; one half for negative x
    HALF_EVEN             just below one half if the quotient is odd, else one half
    STOCHASTIC            the draw for negative x, else its complement: adding it would carry out
    STOCHASTIC_16         the draw in the upper 16 bits
    STOCHASTIC_MAGNITUDE  the draw; compared with the fraction aligned to the bottom
    PSEUDO_STOCHASTIC     the lower discarded bits; compared with the upper ones, aligned to the bottom
    ====================  =====================================================================
    """

    latency = 4

    def __init__(self, lanes: int, roundings, *, width: int = 32, target_bits: tuple[int, ...] = (8,),
                 flags: bool = False):
        if lanes < 1:
            raise ValueError(f"RoundShift needs at least one lane, not {lanes}")
        if not 2 <= width <= 64:
            raise ValueError(f"RoundShift takes inputs of 2 to 64 bits, not {width}")
        if not target_bits or not all(2 <= bits <= width for bits in target_bits):
            raise ValueError(f"RoundShift's target_bits must be one or more widths from 2 to the input's {width}, "
                             f"not {target_bits}")
        self.roundings = frozenset(Rounding.of(rule) for rule in roundings)
        if not self.roundings:
            raise ValueError("RoundShift needs at least one rounding rule")
        self.lanes = lanes
        self.width = width
        self.target_bits = tuple(target_bits)
        self.flags = flags
        self.needs_draw = any(rule.needs_draw for rule in self.roundings)
        members = {
            "enable": In(1, init=1),
            "i_valid": In(1),
            "x": In(data.ArrayLayout(signed(width), lanes)),
            "shift": In(SHIFT_SHAPE),
            "rounding": In(ROUNDING_BITS),
            "target": In(range(len(target_bits))),
            "o_valid": Out(1),
            "o": Out(data.ArrayLayout(signed(max(target_bits)), lanes)),
        }
        if self.needs_draw:
            members["draw"] = In(data.ArrayLayout(unsigned(32), lanes))
        if flags:
            members |= {"clipped": Out(lanes), "positive": Out(lanes)}
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        word = 32 if self.width <= 32 else 64    # N of the docstring
        log = (word - 1).bit_length()
        has = {rule: rule in self.roundings for rule in Rounding}
        has_psr, has_magnitude = has[Rounding.PSEUDO_STOCHASTIC], has[Rounding.STOCHASTIC_MAGNITUDE]

        def stage(name, value):
            """`value` one enabled cycle later."""
            register = Signal(value.shape(), name=name)
            with m.If(self.enable):
                m.d.sync += register.eq(value)
            return register

        valid = self.i_valid
        for k in range(self.latency):
            valid = stage(f"valid{k + 1}", valid)
        m.d.comb += self.o_valid.eq(valid)

        # What the rule selects, decoded once for all lanes.
        selected = {}
        for rule in Rounding:
            if not has[rule]:
                selected[rule] = Const(0)
            elif len(self.roundings) == 1:
                selected[rule] = Const(1)
            else:
                selected[rule] = Signal(name=f"is_{rule.name.lower()}")
                m.d.comb += selected[rule].eq(self.rounding == rule.code)
        rule1 = {rule: stage(f"{rule.name.lower()}1", s) if isinstance(s, Signal) else s
                 for rule, s in selected.items()}

        # Masks of stage 3, from the shift alone.
        shift1, target1 = stage("shift1", self.shift), stage("target1", self.target)
        rotation1 = shift1[:log]
        kept = Signal(word)       # the low bits of the rotated word that did not wrap round
        m.d.comb += kept.eq(Const(-1, signed(word + 1)).as_unsigned()[:word] >> rotation1)
        segment = shift1 >> log   # -1: left shift below N; 0: right shift below N; 1: N to 2N - 1
        whole_mask, fraction_mask, rest_mask = Signal(word), Signal(word), Signal(word)
        with m.Switch(segment):
            with m.Case(-1):
                m.d.comb += [whole_mask.eq(~kept), rest_mask.eq(kept)]
            with m.Case(0):
                m.d.comb += [whole_mask.eq(kept), fraction_mask.eq(~kept)]
            with m.Case(1):
                m.d.comb += [fraction_mask.eq(kept), rest_mask.eq(~kept)]
            with m.Default():     # -2: everything overflows
                m.d.comb += rest_mask.eq(~0)
        whole_mask, fraction_mask = stage("whole_mask2", whole_mask), stage("fraction_mask2", fraction_mask)
        rest_mask, left2 = stage("rest_mask2", rest_mask), stage("left2", shift1[-1])
        target2 = stage("target2", target1)
        target3 = stage("target3", target2)

        # Masks of stage 2 for the fields of PSEUDO_STOCHASTIC and STOCHASTIC_MAGNITUDE.
        half = shift1[1:6]
        odd = shift1[0] & ~shift1[-1]
        low_half = ((Const(1, 33) << half) - 1)[:32]                          # 2**half - 1
        upper_mask = Mux(shift1[-1], 0, (low_half << odd) | odd)[:word // 2]  # 2**ceil(shift / 2) - 1
        low_shift = ((Const(1, 65) << shift1[:6]) - 1)[:word]

        psr1, magnitude1 = rule1[Rounding.PSEUDO_STOCHASTIC], rule1[Rounding.STOCHASTIC_MAGNITUDE]
        is_alternative = stage("is_alternative2", (psr1 | magnitude1) & ~shift1[-1])
        is_even2 = stage("is_half_even2", rule1[Rounding.HALF_EVEN] & Const(1))

        largest = max(self.target_bits)
        for i in range(self.lanes):
            # Stage 1: magnitude.
            x = self.x[i]
            a1 = stage(f"a1_{i}", Mux(x < 0, -x, x)[:self.width])
            negative1 = stage(f"negative1_{i}", x[-1])
            draw1 = stage(f"draw1_{i}", self.draw[i]) if self.needs_draw else None

            # Stage 2: rotate; thresholds that do not need the quotient.
            padded = Cat(a1, Const(0, word - self.width)) if self.width < word else a1
            rotated = stage(f"rotated2_{i}", (Cat(padded, padded) >> rotation1)[:word])
            below, exact = (1 << (word - 1)) - 1, 1 << (word - 1)
            threshold, low = Signal(word, name=f"threshold_{i}"), Signal(name=f"threshold_low_{i}")
            alternative = Signal(word, name=f"alternative_{i}")
            m.d.comb += [threshold.eq(~0), low.eq(1)]      # never exceeded
            with m.If(rule1[Rounding.NEAREST]):
                m.d.comb += threshold.eq(below)
            if has[Rounding.HALF_UP]:
                with m.If(rule1[Rounding.HALF_UP]):
                    m.d.comb += [threshold.eq(Mux(negative1, exact, below)), low.eq(~negative1)]
            if has[Rounding.STOCHASTIC]:
                with m.If(rule1[Rounding.STOCHASTIC]):
                    m.d.comb += [threshold.eq((draw1 ^ (~negative1).replicate(32)) << (word - 32)),
                                 low.eq(~negative1)]
            if has[Rounding.STOCHASTIC_16]:
                with m.If(rule1[Rounding.STOCHASTIC_16]):
                    m.d.comb += [threshold.eq(draw1[:16] << (word - 16)), low.eq(0)]
            if has_magnitude:
                with m.If(magnitude1):
                    m.d.comb += [threshold.eq(draw1), low.eq(0), alternative.eq(padded & low_shift)]
            if has_psr:
                with m.If(psr1):
                    lower = (padded & low_half) << odd
                    upper = (padded >> half)[:word // 2] & upper_mask
                    m.d.comb += [threshold.eq(lower), low.eq(0), alternative.eq(upper)]
            threshold, low = stage(f"threshold2_{i}", threshold), stage(f"threshold_low2_{i}", low)
            alternative2 = stage(f"alternative2_{i}", alternative) if has_psr or has_magnitude else Const(0, word)
            negative2 = stage(f"negative2_{i}", negative1)

            # Stage 3: quotient, range check, and the one comparison.
            rest = (rotated & rest_mask).any()
            whole = Signal(word, name=f"whole_{i}")
            m.d.comb += whole.eq(rotated & whole_mask)
            discarded = Mux(is_alternative, alternative2, rotated & fraction_mask)
            sticky = rest & ~is_alternative
            parity = whole[0]
            if has[Rounding.HALF_EVEN]:
                threshold = Mux(is_even2, Cat(parity.replicate(word - 1), ~parity), threshold)
                low = Mux(is_even2, parity, low)
            above = Signal(name=f"above_{i}")
            m.d.comb += above.eq(Cat(sticky, discarded) > Cat(low, threshold))
            up = stage(f"up3_{i}", above & ~left2)
            full = Signal(name=f"full_{i}")
            with m.Switch(target2):
                for k, bits in enumerate(self.target_bits):
                    with m.Case(k):
                        m.d.comb += full.eq(whole[bits - 1:].any() | whole[:bits - 1].all() | (left2 & rest))
            full3 = stage(f"full3_{i}", full)
            whole3 = stage(f"whole3_{i}", whole[:largest - 1])
            negative3 = stage(f"negative3_{i}", negative2)

            if self.flags:
                beyond = Signal(name=f"beyond_{i}")
                some = (rotated & ~whole_mask).any()       # a fraction, or what a left shift pushed out
                with m.Switch(target2):
                    for k, bits in enumerate(self.target_bits):
                        with m.Case(k):
                            m.d.comb += beyond.eq(whole[bits - 1:].any()
                                                  | (some & (left2 | whole[:bits - 1].all())))
                positive = ~negative2 & rotated.any()
                m.d.comb += [
                    self.clipped[i].eq(stage(f"clipped_{i}", stage(f"clipped3_{i}", beyond))),
                    self.positive[i].eq(stage(f"positive_{i}", stage(f"positive3_{i}", positive))),
                ]

            # Stage 4: -(w + up) = ~w + not up, so one adder serves both signs.
            sign = negative3.replicate(largest)
            rounded = ((whole3 ^ sign) + (negative3 ^ up))[:largest]
            limit = Signal(signed(largest), name=f"limit_{i}")
            with m.Switch(target3):
                for k, bits in enumerate(self.target_bits):
                    with m.Case(k):
                        bound = (1 << (bits - 1)) - 1
                        m.d.comb += limit.eq(Mux(negative3, -bound, bound))
            m.d.comb += self.o[i].eq(stage(f"o_{i}", Mux(full3, limit.as_unsigned(), rounded)))
        return m
