"""The integer softmax cross-entropy of dynamic fixed point: int32 logits in, probabilities minus labels out."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .divider import Divider
from .loss import LOG2_E

__all__ = ["Softmax", "LOG2_E", "OCTAVE", "OCTAVES", "PROBABILITY_BITS", "EXPONENTIALS"]

OCTAVE = 256
OCTAVES = 31
PROBABILITY_BITS = 15
EXPONENTIALS = [round(2 ** (16 - f / OCTAVE)) for f in range(OCTAVE)]
LARGEST_LEFT = 13
DISTANCE_BITS = 33
SCALED_BITS = DISTANCE_BITS + 16
TERM_BITS = 17
CLASS_BITS = 10
LABEL_BITS = 16
EXPONENT_BITS = 16


class Softmax(wiring.Component):
    """The sums of ``golden.dfp.softmax_gradient`` before they are rounded to int8 (docs/arithmetic.md).

    Parameters
    ----------
    config : the core; V = ``config.vector``.
    max_classes : largest number of classes, 2 to 1023.

    Attributes
    ----------
    exponent : In(signed(16)), of the logits. classes : In(10), 2..max_classes. Both are held from a sample's first
        logits until its last results have left.
    logits : In(stream of V x signed(32)): ceil(classes / V) vectors per sample, class 0 in lane 0 of the first; lanes
        beyond ``classes`` are ignored.
    label : In(stream of unsigned(16)), one per sample, taken at its end. A label that is no class marks none.
    error : Out(stream like ``logits``): probability * 2**15, minus 2**15 at the label; lanes beyond
        ``classes`` are zero.

    How it works, one class at a time: store the logits and find the largest; distances to it times log2(e), shifted to
    octaves with 8 fraction bits, give powers of two from a table of 256 entries, whose sum is taken; the same again,
    each power divided by the sum. A power takes five cycles, a division 17.

    Cycles per sample, unstalled: about classes * 30 + vectors + 10.
    """

    def __init__(self, config: CoreConfig, max_classes: int = 128):
        if not 2 <= max_classes < 1 << CLASS_BITS:
            raise ValueError(f"Softmax takes max_classes of 2 to {(1 << CLASS_BITS) - 1}, not {max_classes}")
        self.lanes = config.vector
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

        position, lane = Signal(CLASS_BITS), Signal(range(self.lanes))
        largest, total, dividing = Signal(signed(32)), Signal(sum_bits), Signal()
        distance, scaled = Signal(DISTANCE_BITS), Signal(SCALED_BITS)
        shift = Signal(signed(EXPONENT_BITS + 1))
        octaves = Signal(SCALED_BITS + LARGEST_LEFT)
        bounded, octave, term = Signal(range(OCTAVES * OCTAVE + 1)), Signal(range(OCTAVES + 1)), Signal(TERM_BITS)
        result = Signal(signed(PROBABILITY_BITS + 2))
        last = Signal()
        # Beyond the distance's bits a shift changes nothing any more.
        left = Mux(shift < -LARGEST_LEFT, LARGEST_LEFT, -shift)[:4]
        right = Mux(shift > SCALED_BITS, SCALED_BITS, shift)[:6]
        m.d.comb += [
            last.eq(position + 1 == self.classes), read.addr.eq(position), write.addr.eq(position),
            shift.eq(7 - self.exponent),
            octaves.eq(Mux(shift < 0, scaled << left, scaled >> right)),
            power.addr.eq(bounded % OCTAVE), term.eq(power.data >> octave),
            divider.i.payload.numerator.eq(term << PROBABILITY_BITS),
            divider.i.payload.denominator.eq(total),
            result.eq(divider.o.payload.quotient
                      - Mux(self.label.payload == position, 1 << PROBABILITY_BITS, 0)),
        ]
        vector, full = self.error.payload, self.error.valid

        def advance(state, done):
            """Next class of this pass, or on to ``done``."""
            m.d.sync += position.eq(Mux(last, 0, position + 1))
            m.next = state
            with m.If(last):
                m.next = done

        with m.FSM():
            with m.State("LOAD"):
                m.d.sync += dividing.eq(0)
                with m.If(self.logits.valid):
                    logit = Signal(signed(32))
                    m.d.comb += [logit.eq(self.logits.payload[lane]), write.en.eq(1), write.data.eq(logit),
                                 self.logits.ready.eq(last | lane.all())]
                    m.d.sync += [lane.eq(Mux(last, 0, lane + 1)), total.eq(0)]
                    with m.If((position == 0) | (logit > largest)):
                        m.d.sync += largest.eq(logit)
                    advance("LOAD", "READ")
            with m.State("READ"):
                m.next = "DISTANCE"
            with m.State("DISTANCE"):
                m.d.sync += distance.eq(largest - read.data)
                m.next = "SCALE"
            with m.State("SCALE"):
                m.d.sync += scaled.eq(distance * LOG2_E)
                m.next = "OCTAVES"
            with m.State("OCTAVES"):
                m.d.sync += bounded.eq(Mux(octaves > OCTAVES * OCTAVE, OCTAVES * OCTAVE, octaves))
                m.next = "POWER"
            with m.State("POWER"):
                m.d.sync += octave.eq(bounded // OCTAVE)
                m.next = "TERM"
            with m.State("TERM"):
                with m.If(~dividing):
                    m.d.sync += total.eq(total + term)
                    advance("READ", "READ")
                    with m.If(last):
                        m.d.sync += dividing.eq(1)
                with m.Else():
                    m.d.comb += divider.i.valid.eq(1)
                    with m.If(divider.i.ready):
                        m.next = "QUOTIENT"
            with m.State("QUOTIENT"):
                with m.If(divider.o.valid & self.label.valid & ~full):
                    m.d.comb += [divider.o.ready.eq(1), self.label.ready.eq(last)]
                    m.d.sync += [vector[lane].eq(result), lane.eq(Mux(last, 0, lane + 1)),
                                 full.eq(last | lane.all())]
                    advance("READ", "LAST")
            with m.State("LAST"):
                with m.If(~full | self.error.ready):
                    m.next = "LOAD"
        with m.If(full & self.error.ready):
            m.d.sync += [full.eq(0), vector.eq(0)]
        return m
