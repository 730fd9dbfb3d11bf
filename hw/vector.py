"""Vector engine: elementwise passes over tensors in memory, the loss, and the scalar unit."""

from __future__ import annotations

import enum
from functools import reduce
from operator import or_

from amaranth.hdl import Array, Cat, Const, Module, Mux, ResetInserter, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from .config import CoreConfig
from .descriptor import VECTOR
from .interfaces import ReadClient, WriteClient
from .lanes import DRAWING, TARGET_BITS, Lanes, roundings, target_bits
from .local_reset import local_reset
from .loss import NitiLoss
from .microprogram import RANGES
from .pool import MaxPool
from .range_detector import RangeDetector, range_result
from .relay_station import RelayStation
from .round_shift import SHIFT_SHAPE
from .scalar import ScalarUnit, operation_slot, scalar_command
from .skid_buffer import SkidBuffer
from .softmax import Softmax
from .vector_reader import LEVELS, VectorReader
from .vector_writer import VectorWriter
from .wide import WideLanes

__all__ = ["Function", "VectorEngine"]

MAX_SHIFT = 62
"""Where golden.rounding ends; any int32 sum of magnitude 1 rounds to 0 there, as niti demands."""

MIN_SHIFT = -64
"""Left shifts of RoundShift; from 31 on everything saturates."""


class Function(enum.IntEnum):
    """What a VECTOR descriptor computes; see :class:`VectorEngine`."""
    ELEMENTWISE = 0
    UPDATE = 1
    NITI_LOSS = 2
    FILL = 3
    SQUARED_ERROR = 4
    WIDE = 5
    SOFTMAX = 6


_METHOD_FUNCTIONS = {
    "niti": (Function.ELEMENTWISE, Function.UPDATE, Function.FILL, Function.NITI_LOSS),
    "wage": (Function.ELEMENTWISE, Function.UPDATE, Function.FILL, Function.SQUARED_ERROR),
    "dfp": (Function.ELEMENTWISE, Function.FILL, Function.WIDE, Function.SOFTMAX),
}


class VectorEngine(wiring.Component):
    """Runs VECTOR and SCALAR descriptors, one at a time, in the order in which they are presented.

    ``stages(x)`` is saturate(round(x / 2**shift), width of target 0), with shift = S[shift_register] limited to
    0..62 (with ``left`` to -64..62; golden's STOCHASTIC ends at 32) and ReLU, mask and unpool as
    :class:`hw.lanes.Lanes` describes them, limited to +-``limit`` at last. Every source has its own strides over the
    five loops, and so has the index of the random words. The functions:

    ELEMENTWISE
        target 0 = stages(source 0). Source 1 (with ``mask``) and source 2 (with ``unpool`` or ``blocked``; bytes of
        :func:`hw.lanes.lane_state`) are read at the same iterations. With ``unpool`` loops 2 and 4 count the 2 rows
        and the 2 columns of the windows. With ``pool`` loops 3 and 4 are the rows and columns of a 2 x 2 window:
        target 0 gets the maximum of each window's four results, target 1 (if enabled) the number 2 * row + column of
        its first occurrence as int8; targets do not step in loops 3 and 4. ``pool`` excludes ``mask``, ``unpool`` and
        ``blocked``. With ``state``, ``pool`` comes before the stages, and target 1 gets a lane_state for each result;
        it excludes the same, and pooling with random words.
    UPDATE
        target 0 = saturate(source 1 - saturate(round(source 0))).
    SQUARED_ERROR
        target 0 = saturate(round(source 0)) - 2**label_log2 in the channel that is the sample's label, which comes
        from source 1 as in NITI_LOSS, saturated: half the gradient of the squared distance to the one-hot label.
    NITI_LOSS
        Source 0 are int8 logits with exponent S[shift_register], target 0 the int8 errors. Loops 0 to 3 walk
        over samples, loop 4 over the ceil(classes / V) vectors of one. Source 1 holds unsigned bytes: the label
        of a sample is byte (index of loop 3) of the vector at source 1, which does not step in loop 4, so loop 3
        has at most L iterations: loops (1, 1, samples / L, L, vectors) with strides (0, 0, L, 0, 0), for example.
    FILL
        target 0 = 0.
    WIDE
        The microprogram at ``microprogram`` (:mod:`hw.microprogram`) runs once per iteration, with the vectors of
        source 0 and, as far as enabled, of sources 1 and 2 and the random words (if ``rounding`` draws). If target 0 is
        enabled, a run must write as many vectors as there are iterations. At the end S[range_register + k] = bit length
        of range k for k < ``ranges``.
    SOFTMAX
        As NITI_LOSS, but int32 logits and errors: :class:`hw.softmax.Softmax`.

    A descriptor is reported as ``illegal`` and does nothing if it breaks these rules, if its ``enable`` does not
    name exactly the sources in use and target 0, or if its ``classes`` are fewer than 2 or more than the loss unit
    takes.
    Each method of the core brings functions, roundings and target widths (:func:`hw.lanes.roundings`,
    :func:`hw.lanes.target_bits`), wage also ``state``; what no method brings is illegal, too.
    With bit 4 of ``enable`` the largest magnitude of what target 0 gets goes to a scalar register; target 0 itself may
    then be left out (ELEMENTWISE, UPDATE, SQUARED_ERROR).
    Source and target may be the same memory only where each line is read before it is written in loop order.

    Attributes
    ----------
    vector, scalar : In streams of VECTOR and scalar_command; at most one valid at a time. ``ready`` comes for one cycle
        when the fields are needed no longer, possibly before the last writes are acknowledged.
    operation : In(operation_slot)  operations of a scalar command to come.
    done : Out(1)  pulse: everything the oldest command wrote is acknowledged.
    source0, source1, source2, target0, target1 : memory clients. SCALAR uses source0 and target0.
    range, step : In  maxima from the product engine and number of the step, see :class:`hw.scalar.ScalarUnit`.
    seed : In(32)  of the random words, whose step is ``step``. Both are stable while a command runs.
    busy, stalled_in, stalled_out, idle : Out(1)  exactly one is high: in the cycle before, something moved; it waited
        for a source; it waited to write or for acknowledgement; there was no command.
    exponent_saturated, zero_range, illegal : Out(1)  pulses while a command runs.

    Vectors pass in parts of L = ``config.lanes`` elements, all parts of one before the next.

    Throughput: one part of source 0 per cycle (loss: see :class:`hw.loss.NitiLoss`). Overhead of a VECTOR
    command: about 30 cycles, with a range 3 more, plus one read and one write latency of memory. The key of the random
    words takes 31 cycles, hidden by the read latency where that is longer.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            "vector": In(stream.Signature(VECTOR.layout)),
            "scalar": In(stream.Signature(scalar_command)), "operation": In(operation_slot),
            "done": Out(1),
            "source0": Out(ReadClient(config)), "source1": Out(ReadClient(config)),
            "source2": Out(ReadClient(config)),
            "target0": Out(WriteClient(config)), "target1": Out(WriteClient(config)),
            "range": In(range_result), "step": In(32), "seed": In(32),
            "busy": Out(1), "stalled_in": Out(1), "stalled_out": Out(1), "idle": Out(1),
            "exponent_saturated": Out(1), "zero_range": Out(1), "illegal": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes_count = self.config.lanes
        command = self.vector.payload

        scalar, lanes, wide = ScalarUnit(self.config), Lanes(self.config), WideLanes(self.config)
        pool = MaxPool(lanes_count, self.config.parts)
        readers = [VectorReader(self.config) for _ in range(3)]
        writers = [VectorWriter(self.config) for _ in range(2)]
        for name, unit in (("scalar", scalar), ("lanes", lanes), ("pool", pool), ("wide", wide),
                           *((f"reader{k}", reader) for k, reader in enumerate(readers)),
                           *((f"writer{k}", writer) for k, writer in enumerate(writers))):
            m.submodules[name] = local_reset(m, name, unit)

        is_function = {function: Signal(name=f"is_{function.name.lower()}") for function in Function}
        # From registers, since half the engine hangs on them: they are right from the cycle after a command's coming.
        functions = [function for function in Function
                     if any(function in _METHOD_FUNCTIONS[method] for method in self.config.methods)]
        for function in functions:
            m.d.sync += is_function[function].eq(command.function == function)
        update, fill = is_function[Function.UPDATE], is_function[Function.FILL]
        squared, is_wide = is_function[Function.SQUARED_ERROR], is_function[Function.WIDE]
        losses = []
        for function, name, unit in ((Function.NITI_LOSS, "loss", NitiLoss), (Function.SOFTMAX, "softmax", Softmax)):
            if function in functions:
                loss = unit(self.config)
                m.submodules[name] = local_reset(m, name, loss)
                losses.append((is_function[function], loss))
        is_loss, in_lanes, draws, pool_first, pool_last = Signal(), Signal(), Signal(), Signal(), Signal()
        stages = [function for function in functions
                  if function in (Function.ELEMENTWISE, Function.UPDATE, Function.SQUARED_ERROR)]
        drawing = [rule.code for rule in roundings(self.config) if rule in DRAWING]
        m.d.sync += [
            is_loss.eq(command.function.matches(*(function for function in functions
                                                  if function in (Function.NITI_LOSS, Function.SOFTMAX)))),
            in_lanes.eq(command.function.matches(*stages)),
            draws.eq(command.function.matches(*stages, Function.WIDE) & command.rounding.matches(*drawing)),
            pool_first.eq(command.pool & command.state), pool_last.eq(command.pool & ~command.state),
        ]
        # The complement of `pool_first`, so that what chooses every bit of a vector has another net than control.
        lanes_first = Signal(init=1)
        m.d.sync += lanes_first.eq(~(command.pool & command.state))
        max_classes = min((loss.max_classes for _, loss in losses), default=0)
        legal = self._rules(m, command, is_function, in_lanes, draws, max_classes)

        # Memory clients: readers and writers, or the scalar unit, which holds its first request for a cycle.
        to_scalar = Signal()
        reading_scalar, writing_scalar = (Signal(name=name, attrs={"keep": 1}) for name in ("reading_scalar",
                                                                                          "writing_scalar"))
        m.d.sync += [reading_scalar.eq(to_scalar), writing_scalar.eq(to_scalar)]
        for port, reader in zip((self.source0, self.source1, self.source2), readers, strict=True):
            if reader is readers[0]:
                for owner, active in ((reader.client, ~reading_scalar), (scalar.read, reading_scalar)):
                    with m.If(active):
                        m.d.comb += [port.request.valid.eq(owner.request.valid),
                                     port.request.payload.eq(owner.request.payload),
                                     owner.response.valid.eq(port.response.valid),
                                     port.response.ready.eq(owner.response.ready)]
                    m.d.comb += owner.response.payload.eq(port.response.payload)
                # A reader asks for nothing while the scalar unit runs, so its ready needs no gate.
                m.d.comb += [reader.client.request.ready.eq(port.request.ready),
                             scalar.read.request.ready.eq(port.request.ready & reading_scalar)]
            else:
                connect(m, flipped(port), reader.client)
        for port, writer in zip((self.target0, self.target1), writers, strict=True):
            if writer is writers[0]:
                for owner, active in ((writer.client, ~writing_scalar), (scalar.write, writing_scalar)):
                    with m.If(active):
                        m.d.comb += [port.line.valid.eq(owner.line.valid), port.line.payload.eq(owner.line.payload)]
                    m.d.comb += owner.idle.eq(port.idle)
                m.d.comb += [writer.client.line.ready.eq(port.line.ready),
                             scalar.write.line.ready.eq(port.line.ready & writing_scalar)]
            else:
                connect(m, flipped(port), writer.client)

        # Loops. Targets do not step inside a pooling window, labels not inside a sample. Counts that depend on such
        # things are in registers; they are right before the loops begin.
        def settled(value):
            register = Signal.like(value, name="settled_count", reset_less=True)
            m.d.sync += register.eq(value)
            return register

        for k in range(LEVELS):
            count = command[f"count{k}"]
            outside = settled(Mux(command.pool, 1, count)) if k >= 3 else count
            m.d.comb += [
                wide.count[k].eq(count), lanes.count[k].eq(settled(Mux(pool_first, 1, count)) if k >= 3 else count),
                lanes.random_stride[k].eq(command[f"random_stride{k}"]),
                readers[0].count[k].eq(count), readers[0].stride[k].eq(command[f"source0_stride{k}"]),
                readers[1].count[k].eq(settled(Mux(is_loss | squared, 1, count)) if k == 4 else count),
                readers[1].stride[k].eq(command[f"source1_stride{k}"]),
                readers[2].count[k].eq(count), readers[2].stride[k].eq(command[f"source2_stride{k}"]),
                writers[0].count[k].eq(outside), writers[0].stride[k].eq(command[f"target0_stride{k}"]),
                writers[1].count[k].eq(outside), writers[1].stride[k].eq(command[f"target1_stride{k}"]),
            ]
        m.d.comb += [
            readers[0].address.eq(command.source0), readers[0].width.eq(command.source0_width),
            readers[1].single.eq(is_loss | squared),
            readers[1].address.eq(command.source1), readers[1].width.eq(command.source1_width),
            readers[2].address.eq(command.source2), readers[2].width.eq(command.source2_width),
            writers[0].address.eq(command.target0), writers[0].width.eq(command.target_width),
            writers[0].discard.eq(~command.enable[3]),
            writers[1].address.eq(command.target1),
        ]

        # Settings from the command and its scalar register.
        register, shift, exponent = scalar.value, Signal(SHIFT_SHAPE), Signal(signed(16))
        m.d.comb += [scalar.select.eq(Mux(wide.done, command.shift_register, wide.scalar_select)),
                     wide.scalar_value.eq(scalar.value)]
        least, below, above = Signal(SHIFT_SHAPE), Signal(), Signal()
        settings = lanes.settings
        m.d.comb += [
            least.eq(Mux(command.left, MIN_SHIFT, 0)),
            settings.draw.eq(draws), settings.label.eq(squared), settings.label_log2.eq(command.label_log2),
            settings.blocked.eq(command.blocked), settings.limit.eq(command.limit),
            lanes.seed.eq(self.seed), lanes.step.eq(self.step), lanes.stream.eq(command.random_stream),
            lanes.random_start.eq(command.random_start),
            settings.shift.eq(shift), settings.rounding.eq(command.rounding),
            settings.width.eq(command.target_width), settings.subtract.eq(update),
            settings.relu.eq(command.relu), settings.mask.eq(command.mask), settings.unpool.eq(command.unpool),
            wide.entry.eq(command.microprogram), wide.use.eq(Cat(1, command.enable[:2], draws)),
            wide.store_enable.eq(scalar.store_enable), wide.store_address.eq(scalar.store_address),
            wide.store_word.eq(scalar.store_word),
        ]
        for _, loss in losses:
            m.d.comb += [loss.exponent.eq(exponent), loss.classes.eq(command.classes)]

        # Sources to the lanes, the wide lanes or a loss.
        # Through relay stations, as readers stand at the memory port.
        buffers = [RelayStation(reader.vector.payload.shape()) for reader in readers]
        for k, (reader, buffer) in enumerate(zip(readers, buffers, strict=True)):
            m.submodules[f"vector{k}"] = buffer
            connect(m, reader.vector, buffer.input)
        x, other, choice = (buffer.output for buffer in buffers)
        label_lane, label = Signal(range(lanes_count)), Signal(8)
        to_lanes = Signal()
        m.d.sync += to_lanes.eq(command.function.matches(*stages) & ~(command.pool & command.state))
        # The lanes take what they need of sources 1 and 2 while there is work, the wide lanes all: these need no gate.
        routes = ((x, lanes.x, to_lanes), (other, lanes.other, Const(1)), (choice, lanes.choice, Const(1)),
                  *((source, sink, Const(1)) for source, sink in ((x, wide.x), (other, wide.y), (choice, wide.z),
                                                                  (lanes.words, wide.draw))),
                  *((x, loss.logits, active) for active, loss in losses),
                  *((other, loss.label, active) for active, loss in losses))
        # At most one route of a source is active, so its ready is a plain sum.
        for source in (x, other, choice, lanes.words):
            readies = [active & sink.ready for origin, sink, active in routes if origin is source]
            if source is x:
                readies.append(pool_first & pool.input.ready)
            m.d.comb += source.ready.eq(Cat(readies).any())
        for source, sink, active in routes:
            with m.If(active):
                m.d.comb += sink.valid.eq(source.valid)
        with m.If(pool_first):
            m.d.comb += [lanes.x.valid.eq(pool.output.valid), pool.output.ready.eq(lanes.x.ready)]
        m.d.comb += [
            lanes.x.payload.eq(Mux(lanes_first, x.payload, pool.output.payload.value)),
            wide.x.payload.eq(x.payload),
            lanes.other.payload.eq(other.payload), wide.y.payload.eq(other.payload),
            lanes.choice.payload.eq(choice.payload), wide.z.payload.eq(choice.payload),
            wide.draw.payload.eq(lanes.words.payload),
            label.eq(Value.cast(other.payload).word_select(label_lane, 32)[:8]), lanes.label.eq(label),
            *(loss.label.payload.eq(label) for _, loss in losses),
        ]
        for i in range(lanes_count):
            m.d.comb += [*(loss.logits.payload[i].eq(x.payload[i]) for _, loss in losses),
                         lanes.pooled[i].eq(Mux(lanes_first, 0, pool.output.payload.choice[i]))]
        with m.If((is_loss | squared) & other.valid & other.ready):
            last_sample = (label_lane + 1 == command.count3) | (command.count3 == 0)
            m.d.sync += label_lane.eq(Mux(last_sample, 0, label_lane + 1))

        # Results to the writers. A result leaves when both have taken their part.
        vectors = writers[0].vector.payload.shape()
        value, chosen = (stream.Signature(vectors).create(path=(name,)) for name in ("value", "chosen"))
        valid, ready, value_taken, chosen_taken, dropped = Signal(), Signal(), Signal(), Signal(), Signal()
        found = data.StructLayout({"value": value.payload.shape(), "chosen": chosen.payload.shape()})
        result, held, leaves = Signal(found), Signal(found, reset_less=True), Signal()
        waiting = Signal()       # a result is held
        # Their ready is a register: the ways back from the writers end there. A FILL always has one more result.
        start = Signal()         # a register, as are those of the units: their loops begin by it
        results = SkidBuffer(found)
        m.submodules.results = ResetInserter(start)(results)
        for k, (offered, writer) in enumerate(zip((value, chosen), writers, strict=True)):
            buffer = RelayStation(vectors)       # the writers stand at the memory port, too
            m.submodules[f"written{k}"] = ResetInserter(start)(buffer)
            connect(m, offered, buffer.input)
            connect(m, buffer.output, writer.vector)
        m.d.comb += [results.input.valid.eq(valid), results.input.payload.eq(result), ready.eq(results.input.ready)]
        m.d.comb += [
            dropped.eq(~command.enable[2]), value.payload.eq(held.value), chosen.payload.eq(held.chosen),
            value.valid.eq(waiting & ~value_taken), chosen.valid.eq(waiting & ~chosen_taken & ~dropped),
            leaves.eq((value_taken | value.ready) & (chosen_taken | chosen.ready | dropped)),
            results.output.ready.eq(~waiting | leaves),
            pool.input.payload.eq(Mux(lanes_first, lanes.output.payload, x.payload)),
        ]
        with m.If(results.output.ready):
            m.d.sync += [waiting.eq(results.output.valid), held.eq(results.output.payload)]
        with m.If(waiting):
            m.d.sync += [value_taken.eq(~leaves & (value_taken | value.ready)),
                         chosen_taken.eq(~leaves & (chosen_taken | chosen.ready))]
        for i in range(lanes_count):
            m.d.comb += result.chosen[i].eq(Mux(pool_last, pool.output.payload.choice[i],
                                                 lanes.state[i].as_value()))
        # At most one of these is active, so the result is a plain sum; in a FILL it is 0.
        direct = Signal()        # from the lanes as they come
        m.d.sync += direct.eq(command.function.matches(*stages) & ~(command.pool & ~command.state))
        origins = [(direct, lanes.output, lanes.output.payload), (pool_last, pool.output, pool.output.payload.value),
                   (is_wide, wide.output, wide.output.payload),
                   *((active, loss.error, loss.error.payload) for active, loss in losses)]
        m.d.comb += valid.eq(Cat(fill, *(active & origin.valid for active, origin, _ in origins)).any())
        for i in range(lanes_count):
            m.d.comb += result.value[i].eq(reduce(or_, (Mux(active, values[i], 0) for active, _, values in origins)))
        for active, origin, _ in origins:
            with m.If(active):
                m.d.comb += origin.ready.eq(ready)
        with m.If(pool_last):
            m.d.comb += [pool.input.valid.eq(lanes.output.valid), lanes.output.ready.eq(pool.input.ready)]
        with m.If(pool_first):
            m.d.comb += pool.input.valid.eq(x.valid)

        # The largest magnitude of the results, to the scalar registers when the product engine leaves them alone.
        m.submodules.detector = detector = RangeDetector(lanes_count)
        at_first, ranging, ranged = Signal(), Signal(), Signal()
        delivering, delivered = Signal(), Signal(range(RANGES + 1))      # the bit lengths that the wide lanes found
        range_register, range_clear = Signal.like(command.range_register), Signal()
        m.d.comb += [
            detector.valid.eq(waiting & leaves & command.enable[4]), detector.clear.eq(detector.valid & at_first),
            *(detector.lanes[i].eq(held.value[i]) for i in range(lanes_count)),
        ]
        with m.If(start):
            m.d.sync += [waiting.eq(0), value_taken.eq(0), chosen_taken.eq(0)]
            m.d.sync += [at_first.eq(1), ranging.eq(command.enable[4]),
                         range_register.eq(command.range_register), range_clear.eq(command.range_clear)]
        with m.If(detector.valid):
            m.d.sync += at_first.eq(0)
        with m.If(detector.complete):
            m.d.sync += ranged.eq(1)
        # The scalar unit takes a range in every other cycle. Those of products, which are far apart, go first.
        of_products, resting = Signal(range_result), Signal()
        m.d.sync += resting.eq(scalar.range.valid)
        with m.If(resting):
            pass
        with m.Elif(of_products.valid):
            m.d.comb += scalar.range.eq(of_products)
            m.d.sync += of_products.valid.eq(0)
        with m.Elif(ranged):
            m.d.comb += [scalar.range.valid.eq(1), scalar.range.register.eq(range_register),
                         scalar.range.clear.eq(range_clear), scalar.range.value.eq(detector.value)]
            m.d.sync += [ranged.eq(0), ranging.eq(0)]
        with m.Elif(delivering):
            m.d.comb += [scalar.range.valid.eq(1), scalar.range.register.eq(command.range_register + delivered),
                         scalar.range.clear.eq(1), scalar.range.value.eq(Array(wide.ranges)[delivered[:2]])]
            m.d.sync += delivered.eq(delivered + 1)
        with m.If(self.range.valid):
            m.d.sync += of_products.eq(self.range)

        m.d.comb += [
            scalar.operation.eq(self.operation),
            scalar.command.payload.eq(self.scalar.payload), self.scalar.ready.eq(scalar.command.ready),
            scalar.step.eq(self.step),
            self.exponent_saturated.eq(scalar.exponent), self.zero_range.eq(scalar.zero_range),
        ]
        # What the engine does is told a cycle later, as it shows in the last gates of a cycle.
        moving, blocked, starved = Signal(), Signal(), Signal()
        acts, waits, runs = Signal(), Signal(), Signal()     # at work; for acknowledgement; at what the others tell
        m.d.sync += [
            acts.eq(0), waits.eq(0), runs.eq(0),
            moving.eq((x.valid & x.ready) | (value.valid & value.ready)),
            blocked.eq(self._waits(writers[0].client.line) | self._waits(writers[1].client.line)),
            starved.eq(Mux(is_loss, (x.ready & ~x.valid) | (other.ready & ~other.valid),
                           (in_lanes & lanes.starved & ~(pool_first & x.valid)) | (is_wide & wide.starved))),
        ]
        m.d.comb += [
            self.busy.eq(acts | (runs & (moving | ~(blocked | starved)))),
            self.stalled_out.eq(waits | (runs & ~moving & blocked)),
            self.stalled_in.eq(runs & ~moving & ~blocked & starved),
            self.idle.eq(~(acts | waits | runs)),
        ]
        started = ((lanes, Const(1)), (wide, is_wide), (readers[0], ~fill), (readers[1], command.enable[0]),
                   (readers[2], command.enable[1]), (writers[0], command.enable[3] | ~is_wide),
                   (writers[1], command.enable[2]))
        starts = Signal(len(started), reset_less=True, attrs={"keep": 1})
        m.d.comb += [unit.start.eq(bit) for (unit, _), bit in zip(started, starts, strict=True)]
        m.d.sync += [start.eq(0), starts.eq(0)]
        with m.FSM():
            with m.State("IDLE"):
                with m.If(self.vector.valid):
                    m.d.sync += acts.eq(1)
                    m.next = "DECODE"
                with m.Elif(self.scalar.valid):
                    m.d.sync += acts.eq(1)
                    m.next = "SCALAR"
            with m.State("SCALAR"):
                m.d.comb += [to_scalar.eq(1), scalar.command.valid.eq(self.scalar.valid),
                             self.done.eq(scalar.done), self.illegal.eq(scalar.illegal)]
                m.d.sync += acts.eq(1)
                with m.If(scalar.done):
                    m.next = "IDLE"
            with m.State("DECODE"):
                m.d.sync += acts.eq(1)
                m.next = "SETTINGS"
            with m.State("SETTINGS"):
                m.d.sync += [acts.eq(1), exponent.eq(register), below.eq(register < least),
                             above.eq(register > MAX_SHIFT)]
                m.next = "START"
            with m.State("START"):
                m.d.sync += [acts.eq(1), shift.eq(Mux(below, least, Mux(above, MAX_SHIFT, exponent)))]
                with m.If(legal):
                    m.d.sync += [start.eq(1), starts.eq(Cat(condition for _, condition in started))]
                    m.next = "BEGIN"
                with m.Else():
                    m.d.comb += [self.illegal.eq(1), self.vector.ready.eq(1), self.done.eq(1)]
                    m.next = "IDLE"
            with m.State("BEGIN"):
                m.d.sync += acts.eq(1)
                m.next = "RUN"
            with m.State("RUN"):
                m.d.sync += runs.eq(1)
                m.d.comb += self.illegal.eq(wide.illegal)
                with m.If(writers[0].done & writers[1].done & wide.done):
                    m.d.sync += delivered.eq(0)
                    m.next = "RANGES"
                    with m.If(~is_wide):
                        m.d.comb += [self.vector.ready.eq(1), detector.last.eq(ranging)]
                        m.next = "ACKNOWLEDGE"
            with m.State("RANGES"):
                m.d.sync += acts.eq(1)
                m.d.comb += delivering.eq(delivered != command.ranges)
                with m.If(~delivering):
                    m.d.comb += self.vector.ready.eq(1)
                    m.next = "ACKNOWLEDGE"
            with m.State("ACKNOWLEDGE"):
                m.d.sync += waits.eq(1)
                with m.If(self.target0.idle & self.target1.idle & ~ranging):
                    m.d.comb += self.done.eq(1)
                    m.next = "IDLE"
        return m

    @staticmethod
    def _waits(port):
        return port.valid & ~port.ready

    def _rules(self, m, command, is_function, in_lanes, draws, max_classes):
        """The rules of the class's docstring; registered twice, because the comparisons are long."""
        vector, widths = self.config.vector, target_bits(self.config)
        elementwise, update = is_function[Function.ELEMENTWISE], is_function[Function.UPDATE]
        is_niti, is_softmax = is_function[Function.NITI_LOSS], is_function[Function.SOFTMAX]
        is_loss, fill, is_wide = is_niti | is_softmax, is_function[Function.FILL], is_function[Function.WIDE]
        squared = is_function[Function.SQUARED_ERROR]
        by_state = command.unpool | command.blocked.any()

        def holds(condition, consequence):
            return ~condition | consequence

        channels = command.count4 << (vector.bit_length() - 1)
        rules = {
            "function": in_lanes | is_loss | fill | is_wide,
            "rounding": holds(in_lanes, command.rounding.matches(*(rule.code for rule in roundings(self.config)))),
            "target": holds(in_lanes, command.target_width.matches(*map(TARGET_BITS.index, widths))),
            "stages": holds(~elementwise, ~(command.mask | command.pool | command.state | by_state))
                      & holds(~elementwise, ~command.relu),
            "ranges": holds(is_wide, command.ranges <= RANGES),
            "widths": (command.source0_width < len(TARGET_BITS)) & (command.source1_width < len(TARGET_BITS))
                      & (command.source2_width < len(TARGET_BITS))
                      & (command.target_width < len(TARGET_BITS)),
            "source1": is_wide | (command.enable[0] == (command.mask | update | is_loss | squared)),
            "source2": is_wide | (command.enable[1] == by_state),
            "choices": holds(by_state, command.source2_width == 0),
            "target1": holds(command.enable[2], command.pool | command.state),
            "target0": is_wide | command.enable[3] | (command.enable[4] & in_lanes),
            "range": holds(is_wide, ~command.enable[4]),
            "pool": holds(command.pool, ~command.mask & ~by_state
                          & (command.count3 == 2) & (command.count4 == 2)),
            "state": holds(command.state, ~command.mask & ~by_state & ~(command.pool & draws)
                           if "wage" in self.config.methods else 0),
            "label": holds(squared, (command.source1_width == 0) & (command.count3 <= self.config.lanes)),
            "unpool": holds(command.unpool, (command.count2 == 2) & (command.count4 == 2)),
            "loss": holds(is_loss, (command.source0_width == Mux(is_softmax, 2, 0)) & (command.source1_width == 0)
                          & (command.target_width == Mux(is_softmax, 2, 0))
                          & (command.count3 <= self.config.lanes)),
            "classes": holds(is_loss, (command.classes >= 2) & (command.classes <= max_classes)),
            "enough channels": holds(is_loss, channels >= command.classes),
            "no vector more": holds(is_loss, channels < command.classes + vector),
        }
        legal = Signal(init=1)
        m.d.sync += legal.eq(1)
        for name, rule in rules.items():
            flag = Signal(name=f"rule_{name.replace(' ', '_')}", init=1)
            m.d.sync += flag.eq(rule)
            with m.If(~flag):
                m.d.sync += legal.eq(0)
        return legal
