"""The elementwise stages of the vector engine, one vector per cycle."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, ResetInserter, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect

from golden.random import INDEX_MULTIPLIER, MASK
from golden.rounding import Rounding

from .config import CoreConfig
from .fifo import Fifo
from .loop_nest import LoopNest
from .random_words import RandomWords
from .round_shift import ROUNDING_BITS, SHIFT_SHAPE, RoundShift
from .skid_buffer import SkidBuffer

__all__ = ["CHANNEL_BITS", "DRAWING", "ROUNDINGS", "TARGET_BITS", "Lanes", "lane_settings", "lane_state", "roundings",
           "target_bits"]

ROUNDINGS = tuple(rule for rule in Rounding if rule is not Rounding.STOCHASTIC_MAGNITUDE)
"""Rules the lanes implement: all that a method uses on tensors. STOCHASTIC_MAGNITUDE is for niti's loss with a draw."""

DRAWING = tuple(rule for rule in ROUNDINGS if rule.needs_draw)
"""Those that take a random word per element."""

TARGET_BITS = (8, 16, 32)
"""Bits of a result, by the code in the descriptor's width fields."""

_METHOD_ROUNDINGS = {
    "niti": (Rounding.NEAREST, Rounding.PSEUDO_STOCHASTIC),
    "wage": (Rounding.TRUNCATE, Rounding.HALF_EVEN, Rounding.STOCHASTIC_16),
    "dfp": (Rounding.TRUNCATE, Rounding.HALF_UP, Rounding.STOCHASTIC),
}
_METHOD_BITS = {"niti": (8, 16), "wage": (8, 32), "dfp": (8, 16, 32)}


def roundings(config: CoreConfig) -> tuple[Rounding, ...]:
    """Those of ``ROUNDINGS`` that the core's methods use."""
    return tuple(rule for rule in ROUNDINGS if any(rule in _METHOD_ROUNDINGS[method] for method in config.methods))


def target_bits(config: CoreConfig) -> tuple[int, ...]:
    """Those of ``TARGET_BITS`` that the core's methods use."""
    return tuple(bits for bits in TARGET_BITS if any(bits in _METHOD_BITS[method] for method in config.methods))


QUEUE = 32
"""Vectors in the queues of rounded elements, of results and of random words: more than the pipelines hold, and deep
enough for block RAM, as each would take 400 LUTs of LUT RAM (with 8 lanes)."""

CHANNEL_BITS = 10
"""Of a channel's number, where labels are compared with it."""


def lane_state() -> data.StructLayout:
    """What the stages did to an element, as a byte in memory has it in its low bits; source 2 reads it back.

    position : of the maximum in its pooling window (0 without pooling). clipped : the value, after ReLU if there is
    one, left the range of the target before it was rounded. inactive : it was not above zero.
    """
    return data.StructLayout({"position": 2, "clipped": 1, "inactive": 1})


def lane_settings() -> data.StructLayout:
    """What the stages do; stable while vectors of a descriptor are under way.

    shift : right shift; below 0 an exact left shift. rounding : ``Rounding.code``. width : of the results, index into
    ``TARGET_BITS``. draw : the rule is one of ``DRAWING``. subtract : take the rounded result from source 1.
    label : take the target off at the label's channel. relu, mask, unpool, blocked, limit, label_log2 : as in the
    descriptor.
    """
    return data.StructLayout({"shift": SHIFT_SHAPE, "rounding": ROUNDING_BITS, "width": 2, "draw": 1, "subtract": 1,
                              "label": 1, "relu": 1, "mask": 1, "unpool": 1, "blocked": 2, "limit": 7,
                              "label_log2": 5})


def _room(m, name: str, limit: int, enters, leaves):
    """A register: fewer than ``limit`` items have entered that have not left."""
    inside, room = Signal(range(limit + 1), name=f"{name}_inside"), Signal(init=1, name=f"{name}_room")
    with m.If(enters & ~leaves):
        m.d.sync += [inside.eq(inside + 1), room.eq(inside != limit - 1)]
    with m.Elif(leaves & ~enters):
        m.d.sync += [inside.eq(inside - 1), room.eq(1)]
    return room


class Lanes(wiring.Component):
    """Shift, round, saturate; then ReLU, mask and unpool, or a subtraction; then a limit.

    ======== ============================================================================================
    round    y = saturate(round(x / 2**shift))
    relu     y = max(y, 0)
    mask     y = 0 where the element of source 1 is not above 0
    unpool   y = 0 where the low bits of the element of source 2 are not the position in the pooling window
    blocked  y = 0 where the element of source 2 has one of these bits of `lane_state` set: clipped, inactive
    subtract y = element of source 1 - y
    label    y = y - 2**label_log2 in the channel of the sample's label; loop 4 counts vectors of V channels
    limit    y is clipped to +-limit, or to the target's width if that is 0
    ======== ============================================================================================

    The position is ``2 * (index of loop 2) + (index of loop 4)`` of the five loops: with loops (.., row pair, row
    in pair, column pair, column in pair) the pixels of a plane are walked in memory order.

    Rules that draw take ``golden.random.word(seed, step, stream, index + lane)`` for each element of source 0 (its top
    16 bits for STOCHASTIC_16). Index times INDEX_MULTIPLIER is ``random_start`` plus the loops' ``random_stride``s, so
    any order of the elements gets the words of their logical places.

    A core has the rules and widths that its methods use (:func:`roundings`, :func:`target_bits`), random words if one
    of these rules draws, and states if wage is among the methods; without, ``words`` never come and ``state`` is 0.

    Attributes
    ----------
    start : In(1)  restart the loops, and with ``draw`` compute the key; no vector may be under way.
    count : In(16).array(5)  loop counts, stable.
    settings : In(lane_settings()).
    seed, step, stream : In(32), of the random words. random_start, random_stride : In(32), see above. All stable.
    x, other, choice : In streams of L x signed(32), L = ``config.lanes``: sources 0, 1 and 2. ``other`` is taken with
        ``mask`` and ``subtract``, and once per sample with ``label``; ``choice`` with ``unpool`` or ``blocked``; else
        they are left alone.
    pooled : In(2).array(L)  with ``x``: its place in the pooling window, for ``state``.
    label : In(8)  with ``other``: the class of the sample.
    words : Out stream of L x 32 bits: the random words of the vectors that ``x`` does not take, for another user.
    output : Out stream of L x signed(32). state : Out(ArrayLayout(lane_state(), L)), with it.
    starved : Out(1)  a stage could work on but lacks a vector of a source.

    A vector enters the rounder, and the stages after it, only if there is room for it in the queue behind them, so
    neither ever waits.

    Throughput: one vector per cycle. Latency: RoundShift.latency + 11 cycles. With ``draw`` the first vector is taken
    RandomWords.key_latency + RandomWords.latency + 2 cycles after ``start`` at the earliest.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        vectors = stream.Signature(data.ArrayLayout(signed(32), config.lanes))
        super().__init__({
            "start": In(1), "count": In(16).array(5), "settings": In(lane_settings()),
            "seed": In(32), "step": In(32), "stream": In(32), "random_start": In(32), "random_stride": In(32).array(5),
            "x": In(vectors), "other": In(vectors), "choice": In(vectors), "output": Out(vectors),
            "pooled": In(2).array(config.lanes), "label": In(8),
            "words": Out(stream.Signature(data.ArrayLayout(32, config.lanes))),
            "state": Out(data.ArrayLayout(lane_state(), config.lanes)), "starved": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        settings, output = self.settings, self.output
        lanes_count = self.config.lanes
        lane_bits = lanes_count.bit_length() - 1
        rules, widths, states = roundings(self.config), target_bits(self.config), "wage" in self.config.methods
        m.submodules.round = rounder = RoundShift(lanes_count, rules, width=32, target_bits=widths, flags=states)
        m.submodules.nest = nest = self._nest(m, {"channel": CHANNEL_BITS})
        m.d.comb += [nest.stride_channel[4].eq(self.config.vector),
                     *(stride.eq(lanes_count) for stride in nest.stride_channel[5:])]

        # The loops are loaded for two cycles, because a command without stages leaves them amid their way.
        started, begin, load = Signal(), Signal(), Signal()
        m.d.sync += [started.eq(self.start), begin.eq(started), load.eq(self.start | started)]
        drawn = Signal(init=1)       # this vector's random words are there, or it needs none
        if rounder.needs_draw:
            self._random_words(m, rounder, drawn, load, begin)

        pooled = self.pooled         # beside its element through the pipeline of the rounder
        for k in range(RoundShift.latency + 1 if states else 0):
            later = [Signal(2, name=f"pooled{k + 1}_{i}", reset_less=True) for i in range(lanes_count)]
            m.d.sync += [after.eq(before) for after, before in zip(later, pooled, strict=True)]
            pooled = later

        # The rounder runs freely into a queue with room for all vectors that are in it.
        flags = {"clipped": 1, "positive": 1, "pooled": 2} if states else {}
        element = data.StructLayout({"y": signed(max(widths)), **flags})
        m.submodules.rounded = queue = Fifo(data.ArrayLayout(element, lanes_count), QUEUE)
        # Whether a vector goes on is late, so the queue does not look at it.
        m.submodules.rounded_buffer = rounded = SkidBuffer(queue.output.payload.shape())
        connect(m, queue.output, rounded.input)
        enter, step, leaves = Signal(), Signal(), Signal()
        rounder_room = _room(m, "rounder", QUEUE, enter, step)
        entered, x = Signal(), Signal.like(self.x.payload, reset_less=True)
        shift = Signal.like(settings.shift, reset_less=True)      # right before the first vector enters
        m.d.sync += [entered.eq(enter), x.eq(self.x.payload), shift.eq(settings.shift)]
        m.d.comb += [
            self.x.ready.eq(rounder_room & drawn), enter.eq(self.x.valid & self.x.ready),
            rounder.i_valid.eq(entered), rounder.x.eq(x), rounder.shift.eq(shift),
            rounder.rounding.eq(settings.rounding),
            queue.input.valid.eq(rounder.o_valid), rounded.output.ready.eq(step),
        ]
        with m.Switch(settings.width):
            for k, bits in enumerate(widths):
                with m.Case(TARGET_BITS.index(bits)):
                    m.d.comb += rounder.target.eq(k)
        for i in range(lanes_count):
            into = queue.input.payload[i]
            m.d.comb += into.y.eq(rounder.o[i])
            if states:
                m.d.comb += [into.clipped.eq(rounder.clipped[i]), into.positive.eq(rounder.positive[i]),
                             into.pooled.eq(pooled[i])]

        # Four stages behind the queue: choice of the operands, their difference, its comparison, the limit. They run
        # freely, too, into the queue of results.
        limited = data.StructLayout({"values": output.payload.shape(), "states": self.state.shape()})
        m.submodules.results = results = Fifo(limited, QUEUE)
        results_room = _room(m, "results", QUEUE, step, leaves)
        chosen, subtracted, measured = Signal(), Signal(), Signal()     # that a vector is in the stage
        into_results = Signal(limited, reset_less=True)
        need_other, need_choice, complete, paused = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            complete.eq((self.other.valid | ~need_other) & (self.choice.valid | ~need_choice) & ~paused),
            step.eq(rounded.output.valid & complete & results_room), leaves.eq(output.valid & output.ready),
            self.other.ready.eq(step & need_other & (~settings.label | nest.at_last[4:].all())),
            self.choice.ready.eq(step & need_choice),
            self.starved.eq((rounder_room & ~self.x.valid) | (rounded.output.valid & results_room & ~complete)),
            # The loops follow a cycle later, except that labels need them at once: their vectors come in every other.
            nest.load.eq(load), nest.begin.eq(begin), nest.step.eq(chosen),
            output.valid.eq(results.output.valid), results.output.ready.eq(output.ready),
            output.payload.eq(results.output.payload.values), self.state.eq(results.output.payload.states),
            results.input.payload.eq(into_results),
        ]
        m.d.sync += [need_other.eq(settings.mask | settings.subtract | settings.label),
                     # A label is seen a cycle after it came.
                     paused.eq(settings.label & (step | ~self.other.valid)),
                     need_choice.eq(settings.unpool | settings.blocked.any())]
        position = Cat(~nest.at_first[4], ~nest.at_first[2])
        bound, least, target = Signal(31), Signal(signed(32)), Signal(32)
        m.d.sync += least.eq(-bound)
        with m.Switch(settings.width):
            for code, bits in enumerate(TARGET_BITS):
                with m.Case(code):
                    m.d.sync += bound.eq((1 << bits - 1) - 1)
        with m.If(settings.limit != 0):
            m.d.sync += bound.eq(settings.limit)
        m.d.sync += target.eq(1 << settings.label_log2)
        label = Signal(8, reset_less=True)      # a register, because the label's way here is long
        m.d.sync += label.eq(self.label)
        here = Signal()              # this vector holds the label's channel
        m.d.comb += here.eq(settings.label & (nest.value_channel[lane_bits:] == label[lane_bits:]))
        m.d.sync += [chosen.eq(step), subtracted.eq(chosen), measured.eq(subtracted), results.input.valid.eq(measured)]
        for i in range(lanes_count):
            head = rounded.output.payload[i]
            y, other = head.y, self.other.payload[i]
            source2 = data.View(lane_state(), self.choice.payload[i].as_unsigned()[:lane_state().size])
            # Not `<=`, for which yosys makes a carry chain of 32 bits, although only the sign and zero matter.
            zero = ((settings.relu & (y < 0)) | (settings.mask & ((other < 0) | (other == 0)))
                    | (settings.blocked & Cat(source2.clipped, source2.inactive)).any())
            minuend, subtrahend = (Signal(signed(32), name=f"{name}_{i}", reset_less=True)
                                   for name in ("minuend", "subtrahend"))
            labelled, zeroed = Signal(name=f"labelled_{i}"), Signal(name=f"zeroed_{i}")
            unpooled, place = Signal(name=f"unpooled_{i}"), Signal(2, name=f"place_{i}", reset_less=True)
            difference = Signal(signed(34), name=f"difference_{i}", reset_less=True)
            nothing = Signal(name=f"nothing_{i}", reset_less=True)      # never with a label
            value, above, below = (Signal(shape, name=f"{name}_{i}", reset_less=True) for name, shape in (
                ("value", signed(34)), ("above", 1), ("below", 1)))
            state = [Signal(lane_state(), name=f"state{k}_{i}", reset_less=True) for k in range(3)]
            # The limits, which do not change during a command, beside the lane.
            high, low = (Signal.like(limit, name=f"{name}_{i}", reset_less=True, attrs={"keep": 1})
                         for name, limit in (("high", bound), ("low", least)))
            m.d.sync += [
                high.eq(bound), low.eq(least),
                minuend.eq(Mux(settings.subtract, other, y)), zeroed.eq(~settings.subtract & zero),
                place.eq(source2.position),
                subtrahend.eq(Mux(settings.subtract, y, 0)), labelled.eq(here & (label[:lane_bits] == i)),
                difference.eq(minuend - Mux(labelled, target, subtrahend)), nothing.eq(zeroed | unpooled),
                value.eq(Mux(nothing, 0, difference)), above.eq(~nothing & (high < difference)),
                below.eq(~nothing & (difference < low)),
                into_results.values[i].eq(Mux(above, high, Mux(below, low, value))),
            ]
            m.d.comb += unpooled.eq(settings.unpool & ~settings.subtract & (place != position))
            if states:
                m.d.sync += [state[0].position.eq(head.pooled), state[0].inactive.eq(~head.positive),
                             state[0].clipped.eq(head.clipped & (head.positive | ~settings.relu)),
                             state[1].eq(state[0]), state[2].eq(state[1]), into_results.states[i].eq(state[2])]
        return m

    def _nest(self, m, values):
        """The five loops, and one more over the parts of a vector."""
        parts = self.config.parts
        nest = LoopNest(5 + (parts > 1), values)
        m.d.comb += [*(nest.count[k].eq(self.count[k]) for k in range(5)),
                     *(count.eq(parts) for count in nest.count[5:])]
        return nest

    def _random_words(self, m, rounder, drawn, load, begin):
        """Random words run ahead of the vectors into a queue with room for all that are on the way."""
        settings, lanes_count = self.settings, self.config.lanes
        m.submodules.random = random = RandomWords(lanes_count)
        m.submodules.random_nest = random_nest = self._nest(m, {"product": 32})
        # The loops run ahead by one, so that whether a word is asked for, which is late, reaches no register of theirs.
        place = data.StructLayout({"product": 32, "last": 1})
        m.submodules.random_ahead = ahead = ResetInserter(load)(SkidBuffer(place))
        drawing = Signal()           # words remain to be asked for
        m.submodules.drawn = queue = Fifo(random.words.shape(), QUEUE)
        # Whether a vector enters is late, so the queue does not look at it.
        m.submodules.drawn_buffer = buffer = SkidBuffer(random.words.shape())
        connect(m, queue.output, buffer.input)
        words, taken = buffer.output, Signal()
        words_room = _room(m, "words", QUEUE, random.i_valid, taken)
        m.d.comb += [
            random.seed.eq(self.seed), random.step.eq(self.step), random.stream.eq(self.stream),
            random.load.eq(self.start & settings.draw),
            random.product.eq(ahead.output.payload.product), random.i_valid.eq(drawing & random.ready & words_room),
            queue.input.valid.eq(random.o_valid), queue.input.payload.eq(random.words),
            words.ready.eq((self.x.valid & self.x.ready & settings.draw) | self.words.ready),
            taken.eq(queue.output.valid & queue.output.ready),
            self.words.valid.eq(words.valid), self.words.payload.eq(words.payload),
            random_nest.load.eq(load), random_nest.begin.eq(begin),
            random_nest.start_product.eq(self.random_start),
            ahead.input.valid.eq(1), ahead.input.payload.product.eq(random_nest.value_product),
            ahead.input.payload.last.eq(random_nest.last), ahead.output.ready.eq(random.i_valid),
            random_nest.step.eq(ahead.input.ready), drawn.eq(~settings.draw | words.valid),
        ]
        m.d.comb += [*(random_nest.stride_product[k].eq(self.random_stride[k]) for k in range(5)),
                     *(stride.eq(lanes_count * INDEX_MULTIPLIER & MASK) for stride in random_nest.stride_product[5:])]
        with m.If(self.start):
            m.d.sync += drawing.eq(settings.draw)
        with m.Elif(random.i_valid & ahead.output.payload.last):
            m.d.sync += drawing.eq(0)
        sixteen = settings.rounding == Rounding.STOCHASTIC_16.code
        for i in range(lanes_count):
            draw = Signal.like(rounder.draw[i], name=f"draw{i}", reset_less=True)
            m.d.sync += draw.eq(Mux(sixteen, words.payload[i][16:], words.payload[i]))
            m.d.comb += rounder.draw[i].eq(draw)
