"""Product engine: operand buffers, weight ring, feeder, array, accumulator and store, working on overlapping blocks."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from .accumulator import Accumulator
from .array import SystolicArray
from .config import CoreConfig
from .descriptor import Mode, Opcode
from .feeder import Activity, Feeder, result_control
from .interfaces import ADDRESS_BITS, ReadClient, WriteClient, data_register
from .local_reset import local_reset
from .operand_buffer import OperandBuffer
from .sequencer import DescriptorRegister, descriptor_word
from .shared_fold import SharedFold
from .store import Store, range_result
from .weight_ring import WeightRing

__all__ = ["ProductEngine", "StreamRegister", "reached"]


def reached(count, target):
    """A wrapping 16-bit completion count has reached a target that lies less than 2**15 ahead of or behind it."""
    return ~(count - target)[15]


class StreamRegister(wiring.Component):
    """One-entry buffer: takes a payload when empty and shows it until it is accepted.

    The payload stays stable while a unit works on it; a new one is taken the cycle after its release.
    """

    def __init__(self, shape):
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.i.ready.eq(~self.o.valid)
        payload = data_register(m, self.o.payload)
        vacant = Signal(init=1)       # the complement of o.valid, which moves every bit
        with m.If(vacant):            # the payload follows its source until it is valid: a short enable
            m.d.sync += payload.eq(self.i.payload)
        with m.If(self.i.valid & self.i.ready):
            m.d.sync += [self.o.valid.eq(1), vacant.eq(0)]
        with m.Elif(self.o.ready):
            m.d.sync += [self.o.valid.eq(0), vacant.eq(1)]
        return m


class ProductEngine(wiring.Component):
    """Runs PRODUCT descriptors in order.

    Loading block k + 1, computing block k and storing the results of block k - 1 overlap: each unit takes its part of
    a descriptor as soon as it is free and the descriptor's dependencies are met.

    Attributes
    ----------
    words, address : descriptors from the sequencer.
    iteration : In(1) restarts the completion counts.
    vector_completed : In(16) completed vector and scalar descriptors of this iteration.
    read_a, read_b, read_weights, write : memory clients.
    range : maxima of finished results, for the scalar registers.
    fed, stored : Out(16) blocks of this iteration whose last vector was issued / whose results are in memory, as of the
        cycle before.
    idle : Out(1) everything issued is complete.
    overflow : Out(1) pulse, an int32 sum wrapped.
    descriptor, loading, storing : Out(32) byte addresses of the blocks being fed, loaded and stored.
    activity, tag : what the array did in the cycle before, for which layer and pass.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            "words": In(stream.Signature(descriptor_word)), "address": In(ADDRESS_BITS),
            "iteration": In(1), "vector_completed": In(16),
            "read_a": Out(ReadClient(config)), "read_b": Out(ReadClient(config)),
            "read_weights": Out(ReadClient(config)), "write": Out(WriteClient(config)),
            "range": Out(range_result), "fed": Out(16), "stored": Out(16), "idle": Out(1), "overflow": Out(1),
            "descriptor": Out(ADDRESS_BITS), "loading": Out(ADDRESS_BITS),
            "storing": Out(ADDRESS_BITS),
            "activity": Out(Activity), "tag": Out(16),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.decode = decode = DescriptorRegister(Opcode.PRODUCT)
        buffer_a, buffer_b = OperandBuffer(config, config.rows), OperandBuffer(config, config.columns)
        shared_fold, weights, feeder = SharedFold(config), WeightRing(config), Feeder(config)
        array, accumulator, store = SystolicArray(config, result_control(config)), Accumulator(config), Store(config)
        for name, unit in (("buffer_a", buffer_a), ("buffer_b", buffer_b), ("shared_fold", shared_fold),
                           ("weight_ring", weights), ("array", array), ("accumulator", accumulator), ("store", store),
                           ("feeder", feeder)):
            m.submodules[name] = local_reset(m, name, unit)

        connect(m, flipped(self.words), decode.words)
        m.d.comb += decode.address.eq(self.address)
        connect(m, buffer_a.fold, shared_fold.clients[0])
        connect(m, buffer_b.fold, shared_fold.clients[1])
        connect(m, flipped(self.read_a), buffer_a.memory)
        connect(m, flipped(self.read_b), buffer_b.memory)
        connect(m, flipped(self.read_weights), weights.memory)
        connect(m, flipped(self.write), store.memory)

        # Each unit takes its part of the descriptor once; the descriptor leaves when all have. Counts only grow while
        # a descriptor waits, so it may still start in the cycle after they have reached what it waits for.
        runnable = Signal()
        m.d.sync += runnable.eq((decode.valid | decode.arriving) & ~decode.release
                                & reached(self.vector_completed, decode.header.wait_vector)
                                & reached(self.fed, decode.header.wait_product)
                                & reached(self.stored, decode.header.wait_product))
        feed_shape = data.StructLayout({"command": feeder.command.p.shape(), "tag": 16, "address": ADDRESS_BITS})
        parts = {
            "load_a": (buffer_a.command.p.shape(), [(lambda p: p, decode.load_a)]),
            "load_b": (buffer_b.command.p.shape(), [(lambda p: p, decode.load_b)]),
            "weights": (weights.command.p.shape(), [
                (lambda p: p.mode, decode.feed.mode), (lambda p: p.weights, decode.weights),
                *((lambda p, k=k: p.tiles[k], decode.feed[f"tiles{k}"]) for k in range(4))]),
            "feed": (feed_shape, [
                (lambda p: p.command.feed, decode.feed), (lambda p: p.command.load_a, decode.load_a.enable),
                (lambda p: p.command.load_b, decode.load_b.enable), (lambda p: p.tag, decode.header.tag),
                (lambda p: p.address, decode.held_address)]),
            "store": (store.command.p.shape(), [
                (lambda p: p.enable, decode.feed.last), (lambda p: p.store, decode.store)]),
        }
        taken = Signal(len(parts))
        takes = []
        registers = {}
        for k, (name, (shape, fields)) in enumerate(parts.items()):
            m.submodules[f"{name}_command"] = register = StreamRegister(shape)
            registers[name] = register
            m.d.comb += [register.i.valid.eq(runnable & ~taken[k]),
                         *(select(register.i.p).eq(value) for select, value in fields)]
            takes.append(register.i.valid & register.i.ready)
        m.d.comb += decode.release.eq(taken.all())
        m.d.sync += taken.eq(Mux(decode.release, 0, taken | Cat(takes)))
        with m.If(takes[0]):
            m.d.sync += self.loading.eq(decode.held_address)
        with m.If(takes[-1]):
            m.d.sync += self.storing.eq(decode.held_address)

        connect(m, registers["load_a"].o, buffer_a.command)
        connect(m, registers["load_b"].o, buffer_b.command)
        connect(m, registers["weights"].o, weights.command)
        connect(m, registers["store"].o, store.command)
        feed = registers["feed"].o
        m.d.comb += [
            feeder.command.valid.eq(feed.valid), feed.ready.eq(feeder.command.ready),
            feeder.command.p.eq(feed.p.command), self.descriptor.eq(feed.p.address),
            buffer_a.address.eq(feeder.a_address), buffer_a.load.eq(feeder.a_load),
            buffer_a.wanted.eq(feeder.a_wanted), buffer_a.read.eq(feeder.a_read),
            buffer_a.advance.eq(feeder.a_advance), feeder.a_available.eq(buffer_a.available),
            feeder.a_data.eq(buffer_a.data),
            buffer_b.address.eq(feeder.b_address), buffer_b.load.eq(feeder.b_load),
            buffer_b.wanted.eq(feeder.b_wanted), buffer_b.read.eq(feeder.b_read),
            buffer_b.advance.eq(feeder.b_advance), feeder.b_available.eq(buffer_b.available),
            feeder.b_data.eq(buffer_b.data),

            weights.enable.eq(feeder.weights_enable), weights.take.eq(feeder.weights_take),
            feeder.weights_ready.eq(weights.ready),

            feeder.array_empty.eq(array.empty), array.mode.eq(feeder.mode), array.left.eq(feeder.left),
            array.boundary.eq(feeder.boundary),
            array.top.eq(Mux(feeder.mode == Mode.GRADIENT, feeder.top, weights.vector)),
            array.left_weight.eq(weights.vector), array.shift.eq(weights.shift),
            array.control_in.eq(feeder.control),

            accumulator.control.eq(array.control_out), accumulator.data.eq(array.column),
            accumulator.reserve.eq(feeder.reserve), feeder.room.eq(accumulator.room),
            self.overflow.eq(accumulator.overflow),
        ]
        # Until all parts are taken the decoder may still hold the block that is being fed.
        part = list(parts).index("feed")
        m.d.sync += feeder.next_same_mode.eq(runnable & ~taken[part] & ~takes[part] & feed.valid
                                             & (decode.feed.mode == feed.p.command.feed.mode))
        connect(m, accumulator.result, store.result)
        m.d.comb += self.range.eq(store.range)

        issued = Signal(16)
        fed, stored = Signal(), Signal()
        m.d.sync += [fed.eq(feeder.done), stored.eq(store.done), issued.eq(issued + decode.release),
                     self.fed.eq(self.fed + fed), self.stored.eq(self.stored + stored)]
        with m.If(self.iteration):
            m.d.sync += [self.fed.eq(0), self.stored.eq(0), issued.eq(0)]
        m.d.comb += self.idle.eq(~decode.valid & ~decode.arriving & (self.fed == issued) & (self.stored == issued))

        # The tag of the block at work, or of the one that waits for a dependency.
        m.d.sync += [self.activity.eq(feeder.activity), self.tag.eq(Mux(feed.valid, feed.p.tag, decode.header.tag))]
        with m.If(~feed.valid):
            m.d.sync += self.activity.eq(Mux(decode.valid, Activity.DEPENDENCY, Activity.IDLE))
        return m
