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
    i_valid, o_valid : a vector enters, a vector leaves; there is no back-pressure.
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

    All inputs belong to the vector presented with them. Latency: 6 cycles (``RoundShift.latency``).

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

    latency = 6

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

        def stage(name, value, **options):
            """`value` one cycle later. Only what says that a vector is there is reset."""
            register = Signal(value.shape(), name=name, reset_less=name[:5] != "valid", **options)
            m.d.sync += register.eq(value)
            return register

        def later(name, value, first, last):
            """`value`, valid in stage `first`, as stages `first` to `last` have it."""
            line = {first: value}
            for k in range(first, last):
                line[k + 1] = stage(f"{name}{k + 1}", line[k])
            return line

        def above(bound, bits, name):
            """Bit k: bound > k, so the mask 2**bound - 1."""
            mask = Signal(bits, name=name)
            m.d.comb += mask.eq(Cat(bound > k for k in range(min(bits, (1 << len(bound)) - 1))))
            return mask

        m.d.comb += self.o_valid.eq(later("valid", self.i_valid, 0, self.latency)[self.latency])

        # What the rule selects, decoded once for all lanes.
        rule1 = {}
        for rule in Rounding:
            if not has[rule] or len(self.roundings) == 1:
                rule1[rule] = Const(has[rule])
            else:
                rule1[rule] = stage(f"{rule.name.lower()}1", self.rounding == rule.code)
        psr1, magnitude1 = rule1[Rounding.PSEUDO_STOCHASTIC], rule1[Rounding.STOCHASTIC_MAGNITUDE]
        psr2 = stage("pseudo_stochastic2", psr1)
        even = later("half_even", rule1[Rounding.HALF_EVEN] & Const(1), 1, 3)
        target = later("target", self.target, 0, 5)
        left = later("left", self.shift[-1], 0, 4)

        # Masks of stage 2 for the fields of PSEUDO_STOCHASTIC and STOCHASTIC_MAGNITUDE, and the one of stage 3. Left
        # shifts use none of them.
        shift1, odd1 = stage("shift1", self.shift), stage("odd1", self.shift[0])
        low_shift1 = stage("low_shift1", above(self.shift[:6], 64, "low_shift"))   # 2**shift - 1
        low_half1, upper_mask1 = low_shift1[1::2], low_shift1[:word:2]   # for half and for ceil(shift / 2)
        upper_mask2 = stage("upper_mask2", upper_mask1)

        # Masks of stage 4, from the shift alone.
        wrapped1 = stage("wrapped1", above(self.shift[:log], word, "wrapped"))
        kept = wrapped1[::-1]     # the low bits of the rotated word that did not wrap round are 0 in it
        segment = shift1 >> log   # -1: left shift below N; 0: right shift below N; 1: N to 2N - 1
        whole_mask, fraction_mask, rest_mask = Signal(word), Signal(word), Signal(word)
        with m.Switch(segment):
            with m.Case(-1):
                m.d.comb += [whole_mask.eq(kept), rest_mask.eq(~kept)]
            with m.Case(0):
                m.d.comb += [whole_mask.eq(~kept), fraction_mask.eq(kept)]
            with m.Case(1):
                m.d.comb += [fraction_mask.eq(~kept), rest_mask.eq(kept)]
            with m.Default():     # -2: everything overflows
                m.d.comb += rest_mask.eq(~0)
        alternative1 = (psr1 | magnitude1) & ~left[1]
        is_alternative3 = later("is_alternative", alternative1, 1, 3)[3]
        with m.If(alternative1):  # its comparison has no sticky bit; it never shifts left
            m.d.comb += rest_mask.eq(0)
        whole_mask, fraction_mask, rest_mask = (later(f"{name}_mask", mask, 1, 3)[3] for name, mask in (
            ("whole", whole_mask), ("fraction", fraction_mask), ("rest", rest_mask)))

        largest = max(self.target_bits)
        fine = log // 2           # bits of the rotation in stage 2; the others are stage 3's
        for i in range(self.lanes):
            # Stage 1: magnitude.
            x = self.x[i]
            sign = x[-1]
            a1 = stage(f"a1_{i}", ((x ^ sign.replicate(self.width)) + sign)[:self.width])
            negative = later(f"negative_{i}_", sign, 0, 5)
            draw1 = stage(f"draw1_{i}", self.draw[i]) if self.needs_draw else None
            # Shift amounts of the lane's own: shared, they would have hundreds of readers far apart. `keep` makes
            # synthesis leave the copies alone (see hw/synthesis.py).
            own1 = stage(f"own_shift1_{i}", self.shift, attrs={"keep": 1})
            own2 = stage(f"own_shift2_{i}", own1, attrs={"keep": 1})

            # Stage 2: rotate by the low bits of the shift; thresholds that do not need the quotient.
            padded = Cat(a1, Const(0, word - self.width)) if self.width < word else a1
            rotated2 = stage(f"rotated2_{i}", (Cat(padded, padded) >> own1[:fine])[:word])
            just_below, exact = (1 << (word - 1)) - 1, 1 << (word - 1)
            threshold, low = Signal(word, name=f"threshold_{i}"), Signal(name=f"threshold_low_{i}")
            m.d.comb += [threshold.eq(~0), low.eq(1)]      # never exceeded
            with m.If(rule1[Rounding.NEAREST]):
                m.d.comb += threshold.eq(just_below)
            if has[Rounding.HALF_UP]:
                with m.If(rule1[Rounding.HALF_UP]):
                    m.d.comb += [threshold.eq(Mux(negative[1], exact, just_below)), low.eq(~negative[1])]
            if has[Rounding.STOCHASTIC]:
                with m.If(rule1[Rounding.STOCHASTIC]):
                    m.d.comb += [threshold.eq((draw1 ^ (~negative[1]).replicate(32)) << (word - 32)),
                                 low.eq(~negative[1])]
            if has[Rounding.STOCHASTIC_16]:
                with m.If(rule1[Rounding.STOCHASTIC_16]):
                    m.d.comb += [threshold.eq(draw1[:16] << (word - 16)), low.eq(0)]
            field = Signal(word, name=f"field_{i}")
            if has_magnitude:
                with m.If(magnitude1):
                    m.d.comb += [threshold.eq(draw1), low.eq(0), field.eq(padded & low_shift1[:word])]
            if has_psr:
                with m.If(psr1):
                    m.d.comb += [threshold.eq((padded & low_half1) << odd1), low.eq(0),
                                 field.eq(padded >> own1[1:3])]
            threshold2, low2 = stage(f"threshold2_{i}", threshold), stage(f"threshold_low2_{i}", low)

            # Stage 3: rotate by the high bits of the shift.
            rotated = stage(f"rotated3_{i}", (Cat(rotated2, rotated2) >> Cat(Const(0, fine), own2[fine:log]))[:word])
            threshold, low = stage(f"threshold3_{i}", threshold2), stage(f"threshold_low3_{i}", low2)
            if has_psr or has_magnitude:
                field2 = stage(f"field2_{i}", field)
                upper = (field2 >> Cat(Const(0, 2), own2[3:6]))[:word // 2] & upper_mask2
                if has_magnitude:
                    alternative = stage(f"alternative3_{i}", Mux(psr2, upper, field2))
                else:
                    alternative = stage(f"alternative3_{i}", upper)
            else:
                alternative = Const(0, word)

            # Stage 4: the parts of the rotated word.
            whole = stage(f"whole4_{i}", rotated & whole_mask)
            sticky = stage(f"sticky4_{i}", (rotated & rest_mask).any())
            discarded = stage(f"discarded4_{i}", Mux(is_alternative3, alternative, rotated & fraction_mask))
            if has[Rounding.HALF_EVEN]:
                parity = rotated[0] & whole_mask[0]
                threshold = Mux(even[3], Cat(parity.replicate(word - 1), ~parity), threshold)
                low = Mux(even[3], parity, low)
            threshold, low = stage(f"threshold4_{i}", threshold), stage(f"threshold_low4_{i}", low)

            # Stage 5: the one comparison, and the range check.
            exceeded = Signal(name=f"exceeded_{i}")
            # The sign of a difference is one carry chain; yosys makes more of the operator `>`.
            m.d.comb += exceeded.eq((Cat(low, threshold) - Cat(sticky, discarded))[-1])
            up = stage(f"up5_{i}", exceeded & ~left[4])
            full = Signal(name=f"full_{i}")
            with m.Switch(target[4]):
                for k, bits in enumerate(self.target_bits):
                    with m.Case(k):
                        m.d.comb += full.eq(whole[bits - 1:].any() | whole[:bits - 1].all() | (left[4] & sticky))
            full5 = stage(f"full5_{i}", full)
            whole5 = stage(f"whole5_{i}", whole[:largest - 1])

            if self.flags:
                beyond = Signal(name=f"beyond_{i}")
                some = stage(f"some4_{i}", (rotated & ~whole_mask).any())  # a fraction, or what a left shift pushed out
                with m.Switch(target[4]):
                    for k, bits in enumerate(self.target_bits):
                        with m.Case(k):
                            m.d.comb += beyond.eq(whole[bits - 1:].any()
                                                  | (some & (left[4] | whole[:bits - 1].all())))
                positive = ~negative[3] & rotated.any()
                m.d.comb += [self.clipped[i].eq(later(f"clipped_{i}_", beyond, 4, 6)[6]),
                             self.positive[i].eq(later(f"positive_{i}_", positive, 3, 6)[6])]

            # Stage 6: -(w + up) = ~w + not up, so one adder serves both signs.
            minus = negative[5]
            rounded = ((whole5 ^ minus.replicate(largest)) + (minus ^ up))[:largest]
            limit = Signal(signed(largest), name=f"limit_{i}")
            with m.Switch(target[5]):
                for k, bits in enumerate(self.target_bits):
                    with m.Case(k):
                        bound = (1 << (bits - 1)) - 1
                        m.d.comb += limit.eq(Mux(minus, -bound, bound))
            m.d.comb += self.o[i].eq(stage(f"o_{i}", Mux(full5, limit.as_unsigned(), rounded)))
        return m
