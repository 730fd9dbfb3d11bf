"""Divider, SquareRoot, RangeDetector, the logarithms of the scalar unit, random words and LoopNest."""

from __future__ import annotations

import math

from amaranth.hdl import Assert, Assume, Cat, Const, Elaboratable, Module, Mux, Signal, signed

from .harness import Fault, Proof, after, anyconst, check_order, delayed, free_inputs


class DividerInvariant(Elaboratable):
    """At the loss unit's full width, for ever: after every iteration the consumed numerator is
    quotient * denominator + remainder with remainder < denominator, the rest is untouched, and o carries it out.

    The product is kept by its recurrence, (2 q + bit) * d = 2 q d + bit * d, which needs no multiplier.
    """

    numerator_bits, denominator_bits, quotient_bits = 53, 49, 12

    def elaborate(self, platform):
        from hw.divider import Divider
        m = Module()
        q_bits = self.quotient_bits
        m.submodules.dut = dut = Divider(self.numerator_bits, self.denominator_bits, q_bits)
        free_inputs(m, dut)
        n, d = dut.i.payload.numerator, dut.i.payload.denominator
        taken = dut.i.valid & dut.i.ready
        m.d.comb += Assume(~taken | ((n >> q_bits) < d))
        numerator = Signal(self.numerator_bits)
        product, product_before = Signal(self.numerator_bits), Signal(self.numerator_bits)
        with m.If(taken):
            m.d.sync += numerator.eq(n)
        m.d.sync += product_before.eq(product)
        started, iterated = delayed(m, taken, 1), delayed(m, dut.busy & (dut.left != 0), 1)
        with m.If(started):
            m.d.comb += product.eq(0)
        with m.Elif(iterated):
            m.d.comb += product.eq((product_before << 1) + Mux(dut.digits[0], dut.denominator, 0))
        with m.Else():
            m.d.comb += product.eq(product_before)
        rest_mask = ((Const(1, q_bits + 1) << dut.left) - 1)[:q_bits]
        m.d.comb += [
            Assert(dut.left <= q_bits, "too many iterations"),
            Assert(~dut.busy | (dut.remainder < dut.denominator), "remainder not below the denominator"),
            Assert(~dut.busy | ((numerator >> dut.left) == product + dut.remainder), "quotient * d + remainder"),
            Assert(~dut.busy | ((dut.digits >> (q_bits - dut.left)[:4]) == (numerator & rest_mask)), "digits lost"),
            Assert(~dut.o.valid | ((dut.left == 0) & dut.busy), "result before the last iteration"),
            Assert(dut.o.payload.quotient == dut.digits), Assert(dut.o.payload.remainder == dut.remainder),
        ]
        return m


class DividerResults(Elaboratable):
    """Small widths, end to end: every result is n // d and n % d, once each and in order, under any stalls."""

    def elaborate(self, platform):
        from hw.divider import Divider
        m = Module()
        m.submodules.dut = dut = Divider(4, 3)
        free_inputs(m, dut)
        m.d.comb += Assume(dut.i.payload.denominator != 0)

        def divide(item):
            n, d = item[:4], item[4:]
            return Cat((n // d)[:4], (n % d)[:3])
        check_order(m, dut.i, dut.o, transform=divide)
        return m


class SquareRootInvariant(Elaboratable):
    """At 62 bits, for ever: the consumed part of x is root**2 + remainder with remainder <= 2 * root.

    The square is kept by its recurrence, (2 r + bit)**2 = 4 r**2 + bit * (4 r + 1).
    """

    bits = 62

    def elaborate(self, platform):
        from hw.isqrt import SquareRoot
        m = Module()
        m.submodules.dut = dut = SquareRoot(self.bits)
        free_inputs(m, dut)
        x = Signal(self.bits)
        square, square_before = Signal(self.bits), Signal(self.bits)
        taken = dut.i.valid & dut.i.ready
        with m.If(taken):
            m.d.sync += x.eq(dut.i.payload)
        m.d.sync += square_before.eq(square)
        started, iterated = delayed(m, taken, 1), delayed(m, dut.busy & (dut.left != 0), 1)
        with m.If(started):
            m.d.comb += square.eq(0)
        with m.Elif(iterated):
            m.d.comb += square.eq((square_before << 2) + Mux(dut.root[0], (dut.root >> 1 << 2) + 1, 0))
        with m.Else():
            m.d.comb += square.eq(square_before)
        rest = (dut.left << 1)[:7]
        mask = ((Const(1, self.bits + 1) << rest) - 1)[:self.bits]
        m.d.comb += [
            Assert(dut.left <= self.bits // 2, "too many iterations"),
            Assert(~dut.busy | (dut.remainder <= dut.root << 1), "remainder too large: root too small"),
            Assert(~dut.busy | ((x >> rest) == square + dut.remainder), "root**2 + remainder"),
            Assert(~dut.busy | ((dut.digits >> (self.bits - rest)[:7]) == (x & mask)), "digits lost"),
            # The root so far has as many bits as there were iterations.
            Assert(~dut.busy | ((dut.root >> (self.bits // 2 - dut.left)[:6]) == 0), "root too large"),
            Assert(~dut.o.valid | ((dut.left == 0) & dut.busy), "result before the last iteration"),
            Assert(dut.o.payload.root == dut.root), Assert(dut.o.payload.remainder == dut.remainder),
        ]
        return m


class SquareRootResults(Elaboratable):
    """8 bits, end to end: floor(sqrt(x)) and x - root**2, once each and in order, under any stalls."""

    def elaborate(self, platform):
        from hw.isqrt import SquareRoot
        m = Module()
        m.submodules.dut = dut = SquareRoot(8)
        free_inputs(m, dut)

        def root(item):
            value, square = Const(0, 4), Const(0, 8)
            for k in range(1, 16):
                value, square = Mux(item >= k * k, k, value), Mux(item >= k * k, k * k, square)
            return Cat(value[:4], (item - square)[:5])
        check_order(m, dut.i, dut.o, transform=root)
        return m


class RangeProof(Elaboratable):
    """The value is the largest abs(x) since the last clear, over any vectors and gaps, for ever."""

    lanes = 4

    def elaborate(self, platform):
        from hw.range_detector import RangeDetector
        m = Module()
        m.submodules.dut = dut = RangeDetector(self.lanes)
        free_inputs(m, dut)
        largest = Signal(32)            # one vector's maximum, found lane after lane
        found = Const(0, 32)
        for lane in dut.lanes:
            magnitude = Mux(lane[31], (~lane.as_unsigned() + 1)[:32], lane.as_unsigned())
            found = Mux(magnitude > found, magnitude, found)
        m.d.comb += largest.eq(found)
        running = Signal(32)            # the specification's own maximum, `latency` - 1 cycles ahead of the unit
        so_far = Mux(dut.clear, 0, running)
        with m.If(dut.valid & (largest > so_far)):
            m.d.sync += running.eq(largest)
        with m.Else():
            m.d.sync += running.eq(so_far)
        m.d.comb += [
            Assert(dut.value == delayed(m, running, dut.latency - 1), "not the largest magnitude"),
            Assert(dut.complete == delayed(m, dut.last, dut.latency), "complete at the wrong time"),
        ]
        return m


class LogarithmProof(Elaboratable):
    """CEIL_LOG2, BIT_LENGTH and NEAREST_LOG2 of every 32-bit value, through the whole scalar unit.

    A range result writes register 5, one operation reads it and writes register 6, `select` reads that.
    """

    def __init__(self, operation):
        self.operation = operation

    def elaborate(self, platform):
        from hw.config import PRESETS
        from hw.scalar import ScalarUnit
        m = Module()
        m.submodules.dut = dut = ScalarUnit(PRESETS["tiny"])
        value = anyconst(m, 32, "value")
        cycle = Signal(4)
        m.d.sync += cycle.eq(cycle + 1)
        finished, shown = Signal(), Signal()      # shown: the value is that of the register
        m.d.sync += shown.eq(finished)
        with m.If(dut.command.ready):
            m.d.sync += finished.eq(1)
        m.d.comb += [
            dut.range.valid.eq(cycle == 0), dut.range.register.eq(5), dut.range.clear.eq(1), dut.range.value.eq(value),
            dut.command.valid.eq((cycle != 0) & ~finished), dut.command.payload.count.eq(1),
            dut.operation.valid.eq(cycle == 0), dut.operation.word.eq(self.operation | 6 << 6 | 5 << 12),
            dut.select.eq(6),
        ]
        result = dut.value
        small, exact = value == 0, Signal()
        power = (Const(1, 34) << result[:6])[:34]
        match self.operation:
            case 6:      # 2**(r-1) < v <= 2**r
                m.d.comb += exact.eq(Mux(value <= 1, result == 0, (value <= power) & ((value << 1) > power)))
            case 7:      # 2**(r-1) <= v < 2**r
                m.d.comb += exact.eq(Mux(small, result == 0, (value < power) & ((value << 1) >= power)))
            case 8:      # v**2 <= 2**(2r+1) and not v**2 <= 2**(2r-1)
                bound = Signal(34)
                with m.Switch(result[:6]):
                    for r in range(33):
                        with m.Case(r):
                            m.d.comb += bound.eq(math.isqrt(1 << 2 * r + 1))
                lower = Signal(34)
                with m.Switch(result[:6]):
                    for r in range(1, 33):
                        with m.Case(r):
                            m.d.comb += lower.eq(math.isqrt(1 << 2 * r - 1))
                m.d.comb += exact.eq(Mux(small, result == 0, (value <= bound) & (value > lower)))
        m.d.comb += [
            Assert(~shown | ((result >= 0) & (result <= 32) & exact), "wrong logarithm"),
            Assert((cycle != 14) | finished, "no result after 14 cycles"),
        ]
        return m


class RandomWordsProof(Elaboratable):
    """Every pipeline stage is the contract's statement of the stage before, the first one the keyed index.
    By induction over the stages, every word is the contract's. (Lane 0's first stage also takes the key's
    passes; the tests cover it.)"""

    def elaborate(self, platform):
        from hw.random_words import RandomWords
        m = Module()
        m.submodules.dut = dut = RandomWords(3)
        free_inputs(m, dut)
        began = after(m, 1)
        keyed = delayed(m, Cat(dut.product, dut.key), 1)
        product, key = keyed[:32], keyed[32:]
        for j, stages in enumerate(dut.mixed):
            before = [delayed(m, stage, 1) for stage in stages]
            if j:
                first = (product + (j * 0x9E3779B9 & 0xFFFFFFFF))[:32] ^ key
                m.d.comb += Assert(~began | (stages[0] == first), "wrong start")
            for k, statement in enumerate((
                    lambda a: (a + 0x7ED55D16) + (a << 12), lambda a: (a ^ 0xC761C23C) ^ (a >> 19),
                    lambda a: (a + 0x165667B1) + (a << 5), lambda a: (a + 0xD3A2646C) ^ (a << 9),
                    lambda a: (a + 0xFD7046C5) + (a << 3), lambda a: (a ^ 0xB55A4F09) ^ (a >> 16))):
                m.d.comb += Assert(~began | (stages[k + 1] == statement(before[k])[:32]), f"statement {k + 1}")
            m.d.comb += Assert(dut.words[j] == stages[-1])
        return m


class LoopNestProof(Elaboratable):
    """Every nest of three loops of 1 to 3 iterations, its first ten steps: the value is start + sum of i * stride and
    lies between the nest's smallest and largest value; the flags are right; then counters wrap.

    The strides are +-16, +-4 and +-1, so that a value shows the whole index; the unit only adds, so others follow.
    """

    levels, value_bits = 3, 9

    def elaborate(self, platform):
        from hw.loop_nest import LoopNest
        m = Module()
        m.submodules.dut = dut = LoopNest(self.levels, {"address": signed(self.value_bits)}, count_bits=2)
        start = Mux(anyconst(m, 1, "shifted"), -100, 0)
        down = [anyconst(m, 1, f"down{k}") for k in range(self.levels)]
        counts = [anyconst(m, 2, f"count{k}") for k in range(self.levels)]
        begun = after(m, 1)
        m.d.comb += [dut.load.eq(~begun), dut.begin.eq(~begun), dut.step.eq(begun), dut.start_address.eq(start)]
        at = [Signal(2, name=f"at{k}") for k in range(self.levels)]     # the specification's own counters
        ends, value, low, high = [], start, start, start
        for k in range(self.levels):
            size = 4 ** (self.levels - 1 - k)
            ends.append(Mux(counts[k] == 0, 0, counts[k] - 1)[:2])
            value = value + Mux(down[k], -(at[k] * size), at[k] * size)
            low, high = low - Mux(down[k], ends[k] * size, 0), high + Mux(down[k], 0, ends[k] * size)
            m.d.comb += [dut.count[k].eq(counts[k]), dut.stride_address[k].eq(Mux(down[k], -size, size))]
        carry = Const(1)
        for k in reversed(range(self.levels)):
            with m.If(begun & carry):
                m.d.sync += at[k].eq(Mux(at[k] == ends[k], 0, at[k] + 1))
            carry = carry & (at[k] == ends[k])
        wrapped = Signal()        # after the last iteration only zero counters are promised
        with m.If(begun & dut.last):
            m.d.sync += wrapped.eq(1)
        check = begun & ~wrapped
        first, last = Cat(a == 0 for a in at), Cat(a == e for a, e in zip(at, ends, strict=True))
        m.d.comb += [
            Assert(~check | (dut.value_address == value), "not the affine value"),
            Assert(~check | ((dut.value_address >= low) & (dut.value_address <= high)), "value out of bounds"),
            Assert(~begun | (dut.last == last.all()), "last misplaced"),
            Assert(~begun | ((dut.at_first == first) & (dut.at_last == last)), "at_first or at_last misplaced"),
        ]
        return m


class LoopNestHold(Elaboratable):
    """Without load and step, nothing moves; full widths, for ever."""

    def elaborate(self, platform):
        from hw.loop_nest import LoopNest
        m = Module()
        m.submodules.dut = dut = LoopNest(4, {"address": 32, "row": signed(16)})
        counts = [anyconst(m, 16, f"count{k}") for k in range(4)]
        free_inputs(m, dut, keep=("count",))
        m.d.comb += [dut.count[k].eq(counts[k]) for k in range(4)]
        outputs = Cat(dut.value_address, dut.value_row, dut.at_first, dut.at_last, dut.last)
        still = delayed(m, ~dut.load & ~dut.begin & ~dut.step, 1)
        m.d.comb += Assert(~still | (outputs == delayed(m, outputs, 1)), "moved without a step")
        return m


_FITS = ("fits = ~difference[-1]", "fits = ~difference[-1] & (difference != 0)")

PROOFS = [
    Proof("divider/invariant", DividerInvariant, 2, (Fault("hw/divider.py", *_FITS),), induction=True, quick=True),
    Proof("divider/results", DividerResults, 14, (
        Fault("hw/divider.py", "self.i.ready.eq(~busy)", "self.i.ready.eq(left == 0)"),
        Fault("hw/divider.py", *_FITS))),
    Proof("isqrt/invariant", SquareRootInvariant, 2, (Fault("hw/isqrt.py", *_FITS),), induction=True),
    Proof("isqrt/results", SquareRootResults, 14, (
        Fault("hw/isqrt.py", "self.i.ready.eq(~busy)", "self.i.ready.eq(left == 0)"),
        Fault("hw/isqrt.py", "partial - Cat(Const(1, 2), root)", "partial - Cat(Const(0, 2), root)"))),
    Proof("range_detector/maximum", RangeProof, 6, (
        Fault("hw/range_detector.py", "first.eq(magnitudes[2 * k + 1] < magnitudes[2 * k])",
              "first.eq(magnitudes[2 * k][1:] > magnitudes[2 * k + 1][1:])"),
        Fault("hw/range_detector.py", "with m.If(clear | ", "with m.If((clear & ~valid) | ")), induction=True),
    *[Proof(f"scalar/{name}", lambda operation=operation: LogarithmProof(operation), 16,
            (Fault("hw/scalar.py", *edit),), quick=operation == 6)
      for name, operation, edit in (
          ("ceil_log2", 6, ("length - exact", "length")),
          ("bit_length", 7, ("normalised(begun, (4, 2, 1))", "normalised(begun, (4, 2))")),
          ("nearest_log2", 8, ("SQRT2 = 0xB504F334", "SQRT2 = 0xB504F335")))],
    Proof("random_words/mix32", RandomWordsProof, 2, (
        Fault("hw/random_words.py", "a >> statement.shift", "a >> (statement.shift + 1)"),
        Fault("hw/random_words.py", "j * INDEX_MULTIPLIER & MASK", "j")), induction=True),
    Proof("loop_nest/affine", LoopNestProof, 12, (
        Fault("hw/loop_nest.py", "with m.If(self.load | (self.step & moved[k])):",
              "with m.If(self.load | (self.step & advance[k])):"),
        Fault("hw/loop_nest.py", "~self.count[k][1:].any()", "self.count[k] == 1"))),
    Proof("loop_nest/hold", LoopNestHold, 2, (
        Fault("hw/loop_nest.py", "with m.If(self.load | (self.step & moved[k])):",
              "with m.If(self.load | moved[k]):"),), induction=True, quick=True),
]
