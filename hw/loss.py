"""The integer cross-entropy error of niti: int8 logits in, int8 errors out."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

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
CLASS_BITS = 10
LABEL_BITS = 16


class NitiLoss(wiring.Component):
    """``golden.niti.loss_gradient`` with ``pseudo_stochastic`` rounding (contract section 5, NITI 4.1 to 4.3).

    Parameters
    ----------
    config : the core; ``config.vector`` is the number V of int8 lanes of a vector.
    max_classes : largest number of classes, 2 to 1023.
    dividers : divisions in flight, 1 to 16.

    Attributes
    ----------
    exponent : In(signed(16)), of the logits. classes : In(10), 2..max_classes; a smaller or larger count gives
        undefined errors. Both are held from a sample's first logits until its last errors have left.
    logits : In(stream of ArrayLayout(signed(8), V)): ceil(classes / V) vectors per sample, channel 0 in lane 0 of the
        first; lanes beyond ``classes`` are ignored.
    label : In(stream of unsigned(16)), one per sample, taken at its end. A label that is no class leaves every class
        with its probability, as if the sample belonged to none.
    error : Out(stream like ``logits``), lanes beyond ``classes`` zero. Its exponent is 0 by definition, 1.0 is 128.

    How it works. One class per cycle: store the logits and find the largest (the power's exponent grows with the
    logit, so the largest logit gives the largest exponent); sum the weights p; then compute each p again and divide it
    by the sum, 12 quotient bits; write the rounded errors over the logits, the label's last, because it needs the sum
    of all quotients; send them. The weight is computed in a pipeline of five stages with one 8x16 multiplier and one
    shifter, shared by both branches:

    * powers: abs(a) * LOG2_E >> 15, shifted left by exponent + 6, 6 bits dropped: both truncations are toward zero;
    * series: 2**(1-2e) | a**2 (they share no bit) +- abs(a) << (1 - e).

    Cycles per sample, unstalled: classes * (3 + max(1, 13 / dividers)) + vectors + about 30.
    """

    def __init__(self, config: CoreConfig, max_classes: int = 128, *, dividers: int = 4):
        if not 2 <= max_classes < 1 << CLASS_BITS:
            raise ValueError(f"NitiLoss takes max_classes of 2 to {(1 << CLASS_BITS) - 1}, not {max_classes}")
        if not 1 <= dividers <= 16:
            raise ValueError(f"NitiLoss takes 1 to 16 dividers, not {dividers}")
        self.lanes = config.vector
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

        # Settings of the branches; constant during a sample, so registers cost no latency.
        exponent = Signal(signed(6))
        taylor, amount = Signal(), Signal(range(14))
        one = Signal(weight_bits)
        m.d.comb += exponent.eq(Mux(self.exponent < SMALLEST_EXPONENT, SMALLEST_EXPONENT,
                                    Mux(self.exponent > LARGEST_EXPONENT, LARGEST_EXPONENT, self.exponent)))
        m.d.sync += [
            taylor.eq(exponent <= TAYLOR_EXPONENT),
            amount.eq(Mux(exponent <= TAYLOR_EXPONENT, TAYLOR_EXPONENT - exponent, exponent + 6)),
            one.eq(Const(2) << ((-2 * exponent)[:6])),
        ]

        m.submodules.values = values = Memory(shape=8, depth=self.max_classes, init=[])
        write, read = values.write_port(), values.read_port()
        position, following = Signal(CLASS_BITS), Signal(CLASS_BITS)
        m.d.comb += [following.eq(position), read.addr.eq(following)]
        m.d.sync += position.eq(following)     # read.data is always the value at `position`
        lane = Signal(range(self.lanes))
        last = Signal()
        m.d.comb += last.eq(position + 1 == self.classes)

        # Weights. Stage k holds what entered k flowing cycles ago; `head` marks the largest logit.
        flow = Signal()
        enter, enter_head = Signal(), Signal()
        largest_logit = Signal(signed(8))
        operand = Signal(signed(8))
        m.d.comb += operand.eq(Mux(enter_head, largest_logit, read.data.as_signed()))
        valid = [Signal(name=f"valid{k}") for k in range(1, 6)]
        head = [Signal(name=f"head{k}") for k in range(1, 6)]
        negative = [Signal(name=f"negative{k}") for k in range(1, 4)]
        magnitude1, magnitude2 = Signal(8), Signal(8)
        product = Signal(24)
        square, shifted = Signal(15), Signal(21)
        above, largest = Signal(signed(14)), Signal(signed(13))
        series, weight = Signal(weight_bits), Signal(weight_bits)
        power = Mux(negative[2], -shifted[6:18], shifted[6:18])
        octave = Signal(signed(14))
        m.d.comb += octave.eq(above + OCTAVES)
        with m.If(flow):
            for chain, value in ((valid, enter), (head, enter_head), (negative, operand[-1])):
                m.d.sync += [register.eq(source)
                             for register, source in zip(chain, [value, *chain[:-1]], strict=True)]
            m.d.sync += [
                magnitude1.eq(Mux(operand < 0, -operand, operand)),
                product.eq(magnitude1 * Mux(taylor, magnitude1, LOG2_E)),
                magnitude2.eq(magnitude1),
                shifted.eq(Mux(taylor, magnitude2, product[15:23]) << amount),
                square.eq(product[:15]),
                above.eq(power - largest),
                series.eq(Mux(negative[2], (one | square) - (shifted << 8), (one | square) + (shifted << 8))),
                weight.eq(series),
            ]
            with m.If(valid[2] & head[2]):
                m.d.sync += largest.eq(power)
            with m.If(~taylor):
                m.d.sync += weight.eq(Mux(octave < 0, 0, (Const(1, OCTAVES + 1) << octave[:4]) - 1))
        weighed = Signal()
        m.d.comb += weighed.eq(valid[4] & ~head[4])

        # Divisions, in turn.
        total = Signal(sum_bits)
        dividing = Signal()
        turn, turn_out = Signal(range(self.dividers)), Signal(range(self.dividers))
        accepted, finished = Signal(), Signal()
        quotient = Signal(PROBABILITY_BITS + 1)
        for k in range(self.dividers):
            m.submodules[f"divider{k}"] = divider = Divider(weight_bits + PROBABILITY_BITS, sum_bits,
                                                            PROBABILITY_BITS + 1)
            m.d.comb += [divider.i.payload.numerator.eq(weight << PROBABILITY_BITS),
                         divider.i.payload.denominator.eq(total)]
            with m.If(turn == k):
                m.d.comb += [divider.i.valid.eq(weighed & dividing), accepted.eq(divider.i.valid & divider.i.ready)]
            with m.If(turn_out == k):
                m.d.comb += [divider.o.ready.eq(1), finished.eq(divider.o.valid),
                             quotient.eq(divider.o.payload.quotient)]
        with m.If(accepted):
            m.d.sync += turn.eq(Mux(turn == self.dividers - 1, 0, turn + 1))
        with m.If(finished):
            m.d.sync += turn_out.eq(Mux(turn_out == self.dividers - 1, 0, turn_out + 1))
        m.d.comb += flow.eq(~dividing | ~weighed | accepted)

        # Errors: quotients rounded by pseudo_stochastic with shift 4; for the label minus the sum of the others.
        collected = Signal(CLASS_BITS)
        sum_of_others = Signal(PROBABILITY_BITS + 1)
        at_label = Signal()
        m.d.comb += at_label.eq(collected == self.label.payload)
        gradient, rounded, error = Signal(PROBABILITY_BITS + 1), Signal(8), Signal(8)
        m.d.comb += [
            gradient.eq(quotient),
            rounded.eq(gradient[4:] + (gradient[2:4] > gradient[:2])),
            error.eq(Mux(rounded[-1], 127, rounded)),
        ]

        vector = Signal(self.error.payload.shape())
        full = Signal()
        m.d.comb += [self.error.valid.eq(full), self.error.payload.eq(vector)]

        with m.FSM():
            with m.State("LOAD"):
                with m.If(self.logits.valid & self.label.valid):
                    logit = Signal(signed(8))
                    m.d.comb += [
                        logit.eq(self.logits.payload[lane]),
                        write.en.eq(1), write.addr.eq(position), write.data.eq(logit),
                        following.eq(position + 1),
                        self.logits.ready.eq(last | lane.all()),
                    ]
                    m.d.sync += lane.eq(lane + 1)
                    with m.If((position == 0) | (logit > largest_logit)):
                        m.d.sync += largest_logit.eq(logit)
                    with m.If(last):
                        m.d.comb += following.eq(0)
                        m.d.sync += [lane.eq(0), total.eq(0)]
                        m.next = "HEAD"
            with m.State("HEAD"):
                m.d.comb += [enter.eq(1), enter_head.eq(1)]
                m.next = "SUM"
            with m.State("SUM"):
                m.d.comb += [enter.eq(1), following.eq(position + 1)]
                with m.If(last):
                    m.d.comb += following.eq(0)
                    m.next = "DRAIN"
            with m.State("DRAIN"):
                with m.If(~Cat(valid).any()):
                    m.d.sync += [collected.eq(0), sum_of_others.eq(0)]
                    m.next = "DIVIDE"
            with m.State("DIVIDE"):
                m.d.comb += [dividing.eq(1), enter.eq(1)]
                with m.If(flow):
                    m.d.comb += following.eq(position + 1)
                    with m.If(last):
                        m.d.comb += following.eq(0)
                        m.next = "COLLECT"
            with m.State("COLLECT"):
                m.d.comb += dividing.eq(1)
                with m.If(collected == self.classes):
                    m.next = "LABEL"
            with m.State("LABEL"):
                m.d.comb += [
                    gradient.eq(sum_of_others), self.label.ready.eq(1),
                    write.en.eq(self.label.payload < self.classes), write.addr.eq(self.label.payload),
                    write.data.eq(-error),
                ]
                m.next = "REWIND"
            with m.State("REWIND"):     # reads value 0, which the label may just have changed
                m.next = "SEND"
            with m.State("SEND"):
                with m.If(~full):
                    m.d.sync += [vector[lane].eq(read.data), lane.eq(lane + 1), full.eq(last | lane.all())]
                    m.d.comb += following.eq(Mux(last, 0, position + 1))
                    with m.If(last):
                        m.d.sync += lane.eq(0)
                        m.next = "LAST"
                with m.Elif(self.error.ready):
                    m.d.sync += [vector.eq(0), full.eq(0)]
            with m.State("LAST"):
                with m.If(self.error.ready):
                    m.d.sync += [vector.eq(0), full.eq(0)]
                    m.next = "LOAD"

        with m.If(weighed & ~dividing):
            m.d.sync += total.eq(total + weight)
        with m.If(finished):
            m.d.sync += collected.eq(collected + 1)
            with m.If(~at_label):
                m.d.sync += sum_of_others.eq(sum_of_others + quotient)
                m.d.comb += [write.en.eq(1), write.addr.eq(collected), write.data.eq(error)]
        return m
