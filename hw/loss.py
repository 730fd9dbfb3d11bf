"""The integer cross-entropy error of niti: int8 logits in, int8 errors out."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .class_walk import CLASS_BITS, ClassWalk, data_only
from .config import CoreConfig
from .divider import Divider

__all__ = ["NitiLoss", "LOG2_E", "SMALLEST_EXPONENT", "LARGEST_EXPONENT", "TAYLOR_EXPONENT", "OCTAVES",
           "PROBABILITY_BITS"]

LOG2_E = 47274             # log2(e) * 2**15
SMALLEST_EXPONENT = -20
LARGEST_EXPONENT = 4
TAYLOR_EXPONENT = -7       # at and below it: second-order series instead of powers of two
OCTAVES = 10
PROBABILITY_BITS = 11
EXPONENT_BITS = 16
LABEL_BITS = 16


class NitiLoss(wiring.Component):
    """``golden.niti.loss_gradient`` with ``pseudo_stochastic`` rounding (contract section 5, NITI 4.1 to 4.3).

    Parameters
    ----------
    config : the core. Logits and errors come in parts of ``config.lanes`` elements: all parts of ceil(classes / V)
        vectors, V = ``config.vector``.
    max_classes : largest number of classes, 2 to 1023.
    dividers : divisions in flight, 1 to 16.

    Attributes
    ----------
    exponent : In(signed(16)), of the logits. classes : In(10), 2..max_classes; a smaller or larger count gives
        undefined errors. Both are held from a sample's first logits until its last errors have left.
    logits : In(stream of ArrayLayout(signed(8), lanes)), channel 0 in lane 0 of a sample's first; lanes beyond
        ``classes`` are ignored.
    label : In(stream of unsigned(16)), one per sample, taken at its end. A label that is no class leaves every class
        with its probability, as if the sample belonged to none.
    error : Out(stream like ``logits``), lanes beyond ``classes`` zero. Its exponent is 0 by definition, 1.0 is 128.

    How it works. Store the logits and find the largest (the power's exponent grows with the logit, so the largest logit
    gives the largest exponent); sum the weights p, one class per cycle; then compute each p again and divide it by the
    sum, 12 quotient bits; write the rounded errors over the logits, the label's last, because it needs the sum of all
    quotients; send them. Divisions begin in a fixed rhythm, so that nothing in between ever waits. The weight is
    computed in a pipeline of eight stages with one 8x16 multiplier and one shifter, shared by both branches:

    * powers: abs(a) * LOG2_E >> 15, shifted left by exponent + 6, 6 bits dropped: both truncations are toward zero;
    * series: 2**(1-2e) | a**2 (they share no bit) +- abs(a) << (1 - e).

    Cycles per sample, unstalled: classes * (5 + ceil(14 / dividers)) + parts + about 40: two to store a logit, one
    for the sum, two to send an error.
    """

    def __init__(self, config: CoreConfig, max_classes: int = 128, *, dividers: int = 4):
        if not 2 <= max_classes < 1 << CLASS_BITS:
            raise ValueError(f"NitiLoss takes max_classes of 2 to {(1 << CLASS_BITS) - 1}, not {max_classes}")
        if not 1 <= dividers <= 16:
            raise ValueError(f"NitiLoss takes 1 to 16 dividers, not {dividers}")
        self.lanes, self.parts = config.lanes, config.parts
        self.max_classes = max_classes
        self.dividers = dividers
        vector = stream.Signature(data.ArrayLayout(signed(8), self.lanes))
        super().__init__({
            "exponent": In(signed(EXPONENT_BITS)),
            "classes": In(CLASS_BITS),
            "logits": In(vector),
            "label": In(stream.Signature(LABEL_BITS)),
            "error": Out(vector),
        })

    def elaborate(self, platform):
        m = Module()
        weight_bits = 2 - 2 * SMALLEST_EXPONENT
        sum_bits = weight_bits + (self.max_classes - 1).bit_length()
        quotient_bits = PROBABILITY_BITS + 1

        # Settings; constant during a sample, so registers cost no latency.
        exponent = data_only(signed(6))
        taylor, amount = data_only(), data_only(range(14))
        one = data_only(weight_bits)
        label, inside = data_only(LABEL_BITS), data_only()
        m.d.sync += [
            exponent.eq(Mux(self.exponent < SMALLEST_EXPONENT, SMALLEST_EXPONENT,
                            Mux(self.exponent > LARGEST_EXPONENT, LARGEST_EXPONENT, self.exponent))),
            taylor.eq(exponent <= TAYLOR_EXPONENT),
            amount.eq(Mux(taylor, TAYLOR_EXPONENT - exponent, exponent + 6)),
            one.eq(Const(2) << ((-2 * exponent)[:6])),
            inside.eq(label < self.classes),
        ]

        m.submodules.values = values = Memory(shape=8, depth=self.max_classes, init=[])
        write, read = values.write_port(), values.read_port()
        walk = ClassWalk(m, self.parts, self.classes, self.logits, self.label, self.error)
        position = walk.position
        m.d.comb += read.addr.eq(position)

        # Weights. Stage k holds what entered k + 1 cycles ago; `head` marks the largest logit.
        enter, enter_head = Signal(), Signal()
        valid, head, negative = Signal(8), Signal(8), data_only(4)
        logit, largest_logit, operand = data_only(signed(8)), data_only(signed(8)), Signal(signed(8))
        magnitude1, magnitude2, factor = data_only(8), data_only(8), data_only(LOG2_E.bit_length())
        product, narrowed = data_only(24), data_only(8)
        square3, square4, shifted = data_only(15), data_only(15), data_only(21)
        power, largest, octave = data_only(signed(13)), data_only(signed(13)), data_only(signed(15))
        series5, series6, weight = data_only(weight_bits), data_only(weight_bits), data_only(weight_bits)
        absolute = Mux(operand < 0, -operand, operand)[:8]
        term = Cat(Const(0, 8), shifted)
        m.d.comb += operand.eq(Mux(head[0], largest_logit, read.data.as_signed()))
        m.d.sync += [
            valid.eq(Cat(enter, valid)), head.eq(Cat(enter_head, head)), negative.eq(Cat(operand[-1], negative)),
            magnitude1.eq(absolute), factor.eq(Mux(taylor, absolute, LOG2_E)),
            product.eq(magnitude1 * factor), magnitude2.eq(magnitude1),
            narrowed.eq(Mux(taylor, magnitude2, product[15:23])), square3.eq(product),
            shifted.eq(narrowed << amount), square4.eq(square3),
            power.eq(Mux(negative[3], -shifted[6:18], shifted[6:18])),
            series5.eq((one | square4) + (term ^ negative[3].replicate(weight_bits)) + negative[3]),
            octave.eq(power - largest + OCTAVES), series6.eq(series5),
            # Below the largest power less the octaves nothing is left; 2**octave - 1 has ones below bit `octave`.
            weight.eq(Mux(taylor, series6, Cat(~octave[-1] & (octave[:4] > k) for k in range(OCTAVES)))),
        ]
        with m.If(valid[5] & head[5]):
            m.d.sync += largest.eq(power)
        total, weighed, dividing = data_only(sum_bits), Signal(), Signal()
        m.d.comb += weighed.eq(valid[7] & ~head[7])
        with m.If(weighed & ~dividing):
            m.d.sync += total.eq(total + weight)

        # Divisions, in turn. A divider is idle again before its next turn comes.
        interval = -(-(quotient_bits + 2) // self.dividers)
        pause = Signal(range(max(2, interval)))
        turn = Signal(range(max(2, self.dividers)))
        with m.If(weighed & dividing):
            m.d.sync += turn.eq(Mux(turn == self.dividers - 1, 0, turn + 1))
        finished, quotient = 0, 0
        for k in range(self.dividers):
            m.submodules[f"divider{k}"] = divider = Divider(weight_bits + PROBABILITY_BITS, sum_bits, quotient_bits)
            m.d.comb += [divider.i.payload.numerator.eq(weight << PROBABILITY_BITS),
                         divider.i.payload.denominator.eq(total), divider.o.ready.eq(1),
                         divider.i.valid.eq(weighed & dividing & (turn == k))]
            finished = finished | divider.o.valid
            quotient = quotient | (divider.o.payload.quotient & divider.o.valid.replicate(quotient_bits))

        # Errors: quotients rounded by pseudo_stochastic with shift 4; for the label minus the sum of the others.
        gradient, rounded, error = data_only(quotient_bits), Signal(8), data_only(8)
        found, of_label, writes, negates = Signal(), Signal(), Signal(), data_only()
        collected, target = data_only(CLASS_BITS), data_only(CLASS_BITS)
        sum_of_others = data_only(quotient_bits)
        others, summed, addend = Signal(), Signal(), data_only(quotient_bits)      # the sum is a cycle behind
        m.d.comb += [rounded.eq(gradient[4:] + (gradient[2:4] > gradient[:2])),
                     others.eq(found & (collected != label))]
        m.d.sync += [
            gradient.eq(quotient), found.eq(finished), of_label.eq(0),
            error.eq(Mux(rounded[-1], 127, rounded)),
            writes.eq(others | (of_label & inside)), negates.eq(of_label),
            target.eq(Mux(of_label, label, collected)), summed.eq(others), addend.eq(gradient),
        ]
        with m.If(found):
            m.d.sync += collected.eq(collected + 1)
        with m.If(summed):
            m.d.sync += sum_of_others.eq(sum_of_others + addend)
        m.d.comb += [write.en.eq(writes), write.addr.eq(target), write.data.eq(Mux(negates, -error, error))]

        exceeds, first = Signal(), Signal()
        m.d.sync += exceeds.eq(0)
        with m.If(exceeds):
            m.d.sync += largest_logit.eq(logit)

        with m.FSM():
            with m.State("LOAD"):
                m.d.sync += [logit.eq(self.logits.payload[walk.lane]), first.eq(position == 0),
                             label.eq(self.label.payload), dividing.eq(0), total.eq(0)]
                walk.load(self.logits.valid & self.label.valid)
            with m.State("STORE"):
                m.d.comb += [write.en.eq(1), write.addr.eq(position), write.data.eq(logit)]
                m.d.sync += exceeds.eq(first | (largest_logit < logit))
                walk.store("HEAD")
            with m.State("HEAD"):
                m.d.comb += [enter.eq(1), enter_head.eq(1)]
                m.next = "SUM"
            with m.State("SUM"):
                m.d.comb += enter.eq(1)
                m.d.sync += [collected.eq(0), sum_of_others.eq(0), pause.eq(0)]
                walk.advance("SUM", "DRAIN")
            with m.State("DRAIN"):
                with m.If(~valid.any()):
                    m.d.sync += dividing.eq(1)
                    m.next = "DIVIDE"
            with m.State("DIVIDE"):
                m.d.sync += pause.eq(Mux(pause == interval - 1, 0, pause + 1))
                with m.If(pause == 0):
                    m.d.comb += enter.eq(1)
                    walk.advance("DIVIDE", "COLLECT")
            with m.State("COLLECT"):
                with m.If(collected == self.classes):
                    m.next = "LABEL"
            with m.State("LABEL"):
                walk.take_label()
                m.d.sync += [gradient.eq(sum_of_others), of_label.eq(1)]
                m.next = "ROUND"
            with m.State("ROUND"):
                m.next = "WRITE"
            with m.State("WRITE"):
                m.next = "SEEK"
            with m.State("SEEK"):
                m.next = "SEND"
            with m.State("SEND"):
                with m.If(~self.error.valid):
                    walk.place(read.data, "SEEK")
            walk.parts_without_classes("HEAD")
        return m
