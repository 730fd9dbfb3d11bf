"""The integer softmax cross-entropy of dynamic fixed point: int32 logits in, probabilities minus labels out."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .class_walk import CLASS_BITS, ClassWalk, data_only
from .config import CoreConfig
from .divider import Divider
from .loss import LOG2_E

__all__ = ["Softmax", "LOG2_E", "OCTAVE", "OCTAVES", "PROBABILITY_BITS", "EXPONENTIALS"]

OCTAVE = 256
OCTAVES = 31               # and more leave nothing of a power
PROBABILITY_BITS = 15
EXPONENTIALS = [round(2 ** (16 - f / OCTAVE)) for f in range(OCTAVE)]
LARGEST_LEFT = 13          # a shift beyond it, or to the right beyond the bits, changes nothing any more
COARSE = 8                 # the shifter's first stage moves by multiples of it
FRACTION_BITS = (OCTAVE - 1).bit_length()
DISTANCE_BITS = 33
SCALED_BITS = DISTANCE_BITS + 16
TERM_BITS = 17
LABEL_BITS = 16
EXPONENT_BITS = 16


class Softmax(wiring.Component):
    """The sums of ``golden.dfp.softmax_gradient`` before they are rounded to int8 (docs/arithmetic.md).

    Parameters
    ----------
    config : the core. Logits and errors come in parts of ``config.lanes`` elements: all parts of ceil(classes / V)
        vectors, V = ``config.vector``.
    max_classes : largest number of classes, 2 to 1023.

    Attributes
    ----------
    exponent : In(signed(16)), of the logits. classes : In(10), 2..max_classes. Both are held from a sample's first
        logits until its last results have left.
    logits : In(stream of lanes x signed(32)), class 0 in lane 0 of a sample's first; lanes beyond ``classes`` are
        ignored.
    label : In(stream of unsigned(16)), one per sample, taken at its end. A label that is no class marks none.
    error : Out(stream like ``logits``): probability * 2**15, minus 2**15 at the label; lanes beyond
        ``classes`` are zero.

    How it works: store the logits and find the largest; distances to it times log2(e), shifted to octaves with 8
    fraction bits, give powers of two from a table of 256 entries, which replace the logits while their sum is taken
    (a pipeline, one class per cycle); then each power is divided by the sum, one after the other.

    Cycles per sample, unstalled: about classes * 24 + parts + 15: two to store a logit, one for its power, 21 for the
    division.
    """

    def __init__(self, config: CoreConfig, max_classes: int = 128):
        if not 2 <= max_classes < 1 << CLASS_BITS:
            raise ValueError(f"Softmax takes max_classes of 2 to {(1 << CLASS_BITS) - 1}, not {max_classes}")
        self.lanes, self.parts = config.lanes, config.parts
        self.max_classes = max_classes
        vector = stream.Signature(data.ArrayLayout(signed(32), self.lanes))
        super().__init__({
            "exponent": In(signed(EXPONENT_BITS)), "classes": In(CLASS_BITS), "logits": In(vector),
            "label": In(stream.Signature(LABEL_BITS)), "error": Out(vector),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.values = values = memory.Memory(shape=signed(32), depth=self.max_classes, init=[])
        write, read = values.write_port(), values.read_port()
        m.submodules.table = table = memory.Memory(shape=TERM_BITS, depth=OCTAVE, init=EXPONENTIALS)
        power = table.read_port()
        sum_bits = TERM_BITS + (self.max_classes - 1).bit_length()
        m.submodules.divider = divider = Divider(TERM_BITS + PROBABILITY_BITS, sum_bits, PROBABILITY_BITS + 1)

        # What follows from the settings is in registers, as is everything that comes from outside.
        shift_bits = SCALED_BITS + LARGEST_LEFT
        amount = data_only(range(shift_bits + 1))
        offset = 7 + LARGEST_LEFT
        none, most, between = data_only(), data_only(), data_only(amount.shape())
        m.d.sync += [
            none.eq(self.exponent > offset), most.eq(self.exponent < offset - shift_bits),
            between.eq(offset - self.exponent), amount.eq(Mux(none, 0, Mux(most, shift_bits, between))),
        ]

        walk = ClassWalk(m, self.parts, self.classes, self.logits, self.label, self.error)
        position = walk.position
        logit, largest, first, exceeds = data_only(signed(32)), data_only(signed(32)), Signal(), Signal()
        collected = Signal(CLASS_BITS)      # values written in this pass
        m.d.comb += [read.addr.eq(position), write.addr.eq(collected)]
        with m.If(write.en):
            m.d.sync += collected.eq(collected + 1)
        m.d.sync += exceeds.eq(0)
        with m.If(exceeds):
            m.d.sync += largest.eq(logit)

        # Powers: `stages` says in which registers there is one.
        raising = Signal()
        stages = Signal(12)
        value, difference, distance = data_only(signed(32)), data_only(DISTANCE_BITS), data_only(DISTANCE_BITS)
        half = DISTANCE_BITS // 2
        low, high = data_only(half + 16), data_only(DISTANCE_BITS - half + 16)
        low_there, high_there = data_only(low.shape()), data_only(high.shape())
        scaled, coarse = data_only(SCALED_BITS), data_only(shift_bits)
        kept = FRACTION_BITS + OCTAVES.bit_length() + COARSE - 1
        octaves, beyond = data_only(kept), data_only()
        octave, raised, octave_there = data_only(5), data_only(TERM_BITS), data_only(5)
        total, term = data_only(sum_bits), data_only(TERM_BITS)
        fine = (COARSE - 1).bit_length()
        m.d.sync += [
            stages.eq(Cat(raising, stages)),
            value.eq(read.data),
            difference.eq(largest - value), distance.eq(difference),        # the multiplier may be far
            low.eq(distance[:half] * LOG2_E), high.eq(distance[half:] * LOG2_E),
            low_there.eq(low), high_there.eq(high),
            scaled.eq(low_there + (high_there << half)),
            coarse.eq(Cat(Const(0, LARGEST_LEFT), scaled) >> Cat(Const(0, fine), amount[fine:])),
            octaves.eq(coarse[:kept] >> amount[:fine]), beyond.eq(coarse[kept:].any()),
            octave.eq(Mux(beyond | octaves[FRACTION_BITS + 5:].any(), OCTAVES, octaves[FRACTION_BITS:])),
            raised.eq(power.data), octave_there.eq(octave),
            term.eq(raised >> octave_there),
        ]
        m.d.comb += [power.addr.eq(octaves), write.data.eq(Mux(stages[-1], term, logit))]
        with m.If(stages[-1]):
            m.d.comb += write.en.eq(1)
            m.d.sync += total.eq(total + term)

        # Divisions. The label is held for many cycles; a register takes it, because its way here is long.
        dividend = data_only(TERM_BITS)
        label, at_label = data_only(LABEL_BITS), Signal()
        arrived, label_there = Signal(), Signal()       # with the label, with the comparison
        result = data_only(signed(PROBABILITY_BITS + 2))
        m.d.sync += [label.eq(self.label.payload), arrived.eq(self.label.valid), at_label.eq(label == position),
                     label_there.eq(arrived), dividend.eq(read.data)]
        m.d.comb += [
            divider.i.payload.numerator.eq(dividend << PROBABILITY_BITS),
            divider.i.payload.denominator.eq(total),
        ]

        with m.FSM():
            with m.State("LOAD"):
                m.d.sync += [logit.eq(self.logits.payload[walk.lane]), first.eq(position == 0), total.eq(0)]
                walk.load(self.logits.valid)
            with m.State("STORE"):
                m.d.comb += write.en.eq(1)
                m.d.sync += exceeds.eq(first | (largest < logit))
                with m.If(walk.last):
                    m.d.sync += collected.eq(0)
                walk.store("POWERS")
            with m.State("POWERS"):
                m.d.comb += raising.eq(1)
                walk.advance("POWERS", "DRAIN")
            with m.State("DRAIN"):
                with m.If(~stages.any()):
                    m.d.sync += collected.eq(0)
                    m.next = "READ"
            with m.State("READ"):
                m.next = "FETCH"
            with m.State("FETCH"):
                m.next = "DIVIDE"
            with m.State("DIVIDE"):
                m.d.comb += divider.i.valid.eq(1)
                m.next = "QUOTIENT"
            with m.State("QUOTIENT"):
                m.d.comb += divider.o.ready.eq(label_there)
                m.d.sync += result.eq(divider.o.payload.quotient - (at_label << PROBABILITY_BITS))
                with m.If(divider.o.valid & label_there):
                    m.next = "PLACE"
            with m.State("PLACE"):
                with m.If(~self.error.valid):
                    walk.place(result, "READ")
                    with m.If(walk.last):
                        walk.take_label()
            walk.parts_without_classes("POWERS")
        return m
