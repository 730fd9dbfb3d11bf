"""The core: registers, sequencer, product and vector engines, memory port."""

from __future__ import annotations

import enum

from amaranth.hdl import Cat, Module, Mux, ResetSignal, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out, connect, flipped

from .axi import Axi4Lite, Axi4Master, connect_flat, flat_members
from .config import CoreConfig
from .counters import Counters
from .descriptor import Opcode, offsets
from .errors import ErrorCode, ErrorLatch
from .feeder import Activity
from .interfaces import ADDRESS_BITS, ReadClient, WriteClient
from .local_reset import local_reset
from .product import ProductEngine, StreamRegister, reached
from .range_detector import range_result
from .read_port import ReadPort
from .registers import Registers
from .scalar import scalar_command
from .sequencer import FETCH_LINES, DescriptorRegister, Sequencer, descriptor_word
from .vector import VectorEngine
from .write_port import WritePort

__all__ = ["Core", "VectorActivity", "VectorQueue", "READERS", "WRITERS", "COUNTERS"]

class VectorActivity(enum.IntEnum):
    """What the vector engine does in a cycle."""
    IDLE = 0          # no descriptor
    BUSY = 1
    SOURCE = 2        # waits for data from memory
    TARGET = 3        # waits for memory to take or acknowledge data
    DEPENDENCY = 4    # waits for the product engine


#: Read clients and the lines of their response FIFOs (0: the client always has room). A vector of int32 is a line, so
#: source 0 must cover the memory's latency at one line a cycle; the others are int8 or int16. Weights come before
#: the operands, because the first tile must be shifted in before the first vector can be fed.
READERS = {"program": FETCH_LINES, "weights": 0, "load_a": 0, "load_b": 0, "source0": 192, "source1": 96, "source2": 48}
WRITERS = ("store", "target0", "target1")

#: Counters in the order of COUNTER_SELECT. The product engine is in exactly one of its states each cycle, and so is
#: the vector engine.
COUNTERS = (*(f"product_{activity.name.lower()}" for activity in Activity),
            *(f"vector_{activity.name.lower()}" for activity in VectorActivity),
            "beats_read", "beats_written")


class VectorQueue(wiring.Component):
    """Vector engine with its descriptor decoder, dependencies and completion count.

    Attributes
    ----------
    words, address : descriptors from the sequencer. iteration : In(1) restarts the completion count.
    fed, stored : In(16) progress of the product engine.
    completed : Out(16) descriptors of this iteration whose writes are acknowledged. idle : Out(1).
    descriptor : Out(32) byte address of the descriptor at work. tag : Out(16) its layer and pass.
    waiting : Out(1) a descriptor waits for the product engine.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            "words": In(stream.Signature(descriptor_word)), "address": In(ADDRESS_BITS),
            "iteration": In(1), "fed": In(16), "stored": In(16), "completed": Out(16), "idle": Out(1),
            "source0": Out(ReadClient(config)), "source1": Out(ReadClient(config)), "source2": Out(ReadClient(config)),
            "target0": Out(WriteClient(config)), "target1": Out(WriteClient(config)),
            "range": In(range_result), "step": In(32), "seed": In(32),
            "busy": Out(1), "stalled_in": Out(1), "stalled_out": Out(1), "unused": Out(1, init=1), "waiting": Out(1),
            "exponent_saturated": Out(1), "zero_range": Out(1), "illegal": Out(1),
            "descriptor": Out(ADDRESS_BITS), "tag": Out(16),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.decode = decode = DescriptorRegister(Opcode.VECTOR, Opcode.SCALAR)
        m.submodules.engine = engine = VectorEngine(self.config)
        m.submodules.vector_command = vector = StreamRegister(engine.vector.p.shape())
        m.submodules.scalar_command = scalar = StreamRegister(engine.scalar.p.shape())
        # Operations go to the scalar unit as they come; those of the next command to the other half of its memory.
        half, first = Signal(), offsets(Opcode.SCALAR)["scalar", "operation0"][0]
        with m.If(scalar.i.valid):           # only while it is taken
            m.d.sync += half.eq(~half)
        connect(m, flipped(self.words), decode.words)
        connect(m, vector.o, engine.vector)
        connect(m, scalar.o, engine.scalar)
        for name in ("source0", "source1", "source2", "target0", "target1"):
            connect(m, flipped(getattr(self, name)), getattr(engine, name))
        is_scalar, runnable = Signal(), Signal()
        free = vector.i.ready & scalar.i.ready
        # Counts only grow while a descriptor waits: it may still start in the cycle after they reached their targets.
        m.d.sync += [
            is_scalar.eq(decode.header.opcode == Opcode.SCALAR),
            runnable.eq((decode.valid | decode.arriving) & ~decode.release
                        & reached(self.fed, decode.header.wait_product)
                        & reached(self.stored, decode.header.wait_product)
                        & reached(self.completed, decode.header.wait_vector)),
        ]
        m.d.comb += [
            decode.address.eq(self.address),
            vector.i.valid.eq(runnable & free & ~is_scalar), vector.i.p.eq(decode.vector),
            scalar.i.valid.eq(runnable & free & is_scalar), scalar.i.p.half.eq(half),
            *(scalar.i.p[name].eq(decode.scalar[name]) for name, _ in scalar_command if name != "half"),
            engine.operation.valid.eq(self.words.valid & self.words.ready), engine.operation.half.eq(half),
            engine.operation.number.eq(self.words.p.index - first), engine.operation.word.eq(self.words.p.word),
            decode.release.eq(runnable & free),
            engine.range.eq(self.range), engine.step.eq(self.step), engine.seed.eq(self.seed),
        ]
        # Reports come late in a cycle; a register delays them, and the address and tag that go with them.
        address, tag, later_tag, waiting = Signal(ADDRESS_BITS), Signal(16), Signal(16), Signal()
        m.d.sync += [self.busy.eq(engine.busy), self.stalled_in.eq(engine.stalled_in),
                     self.stalled_out.eq(engine.stalled_out), self.unused.eq(engine.idle),
                     waiting.eq(decode.valid & ~runnable), self.waiting.eq(waiting),
                     later_tag.eq(tag), self.tag.eq(later_tag),        # activity is told a cycle late as it is
                     self.exponent_saturated.eq(engine.exponent_saturated), self.zero_range.eq(engine.zero_range),
                     self.illegal.eq(engine.illegal), self.descriptor.eq(address)]
        with m.If(decode.release):
            m.d.sync += [address.eq(decode.held_address), tag.eq(decode.header.tag)]
        issued, done = Signal(16), Signal()
        m.d.sync += [done.eq(engine.done), self.completed.eq(self.completed + done), issued.eq(issued + decode.release)]
        with m.If(self.iteration):
            m.d.sync += [self.completed.eq(0), issued.eq(0)]
        m.d.comb += self.idle.eq(~decode.valid & ~decode.arriving & (issued == self.completed))
        return m


class Core(wiring.Component):
    """Top level (architecture section 3): one clock, synchronous reset, flat AXI ports, interrupt.

    An error stops the core at once: engines are reset, memory transactions end, then the interrupt is raised with the
    error's code, address and descriptor. An illegal descriptor stops it only after all earlier ones are complete.

    ``trace_*`` outputs say in every cycle what the two engines do and for which layer and pass (the descriptor's
    tag); a simulator can count them, a chip leaves them open.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            **flat_members("s_axi", Axi4Lite().flip()), **flat_members("m_axi", Axi4Master(config)),
            "irq": Out(1),
            "trace_product": Out(Activity), "trace_product_tag": Out(16),
            "trace_vector": Out(VectorActivity), "trace_vector_tag": Out(16),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        engine_reset = Signal()

        registers = Registers(config, len(COUNTERS))
        sequencer, product, vector = Sequencer(config), ProductEngine(config), VectorQueue(config)
        reads, writes = ReadPort(config, list(READERS.values())), WritePort(config, len(WRITERS))
        errors, counters = ErrorLatch(6), Counters(COUNTERS)
        m.submodules.registers = registers
        restart = engine_reset | ResetSignal(allow_reset_less=True)
        m.submodules.sequencer = local_reset(m, "sequencer", sequencer, restart)
        m.submodules.product_engine = local_reset(m, "product", product, restart)
        m.submodules.vector_engine = local_reset(m, "vector", vector, restart)
        alive = Signal(attrs={"keep": 1})    # what engines report a cycle after their stop is void
        m.d.sync += alive.eq(~engine_reset)
        m.submodules.reads, m.submodules.writes = local_reset(m, "reads", reads), local_reset(m, "writes", writes)
        m.submodules.errors, m.submodules.counters = errors, counters
        connect_flat(m, self, "s_axi", registers.bus)
        connect_flat(m, self, "m_axi", reads.axi)
        connect_flat(m, self, "m_axi", writes.axi)

        clients = {"program": sequencer.memory, "load_a": product.read_a, "load_b": product.read_b,
                   "weights": product.read_weights, "source0": vector.source0, "source1": vector.source1,
                   "source2": vector.source2}
        for port, name in zip(reads.clients, READERS, strict=True):
            connect(m, clients[name], port)
        clients = {"store": product.write, "target0": vector.target0, "target1": vector.target1}
        for port, name in zip(writes.clients, WRITERS, strict=True):
            connect(m, clients[name], port)
        connect(m, sequencer.product, product.words)
        connect(m, sequencer.vector, vector.words)

        soft_reset, after_reset = registers.soft_reset, Signal()
        m.d.sync += after_reset.eq(soft_reset)
        m.d.comb += [
            engine_reset.eq(soft_reset | after_reset | errors.error),
            sequencer.start.eq(registers.start), sequencer.program.eq(registers.program),
            sequencer.limit.eq(registers.window_limit),
            sequencer.engines_idle.eq(product.idle & vector.idle),
            registers.step_advance.eq(sequencer.step_done & alive), registers.done.eq(sequencer.finished & alive),
            product.address.eq(sequencer.address), product.iteration.eq(sequencer.iteration),
            product.vector_completed.eq(vector.completed),
            vector.address.eq(sequencer.address), vector.iteration.eq(sequencer.iteration),
            vector.fed.eq(product.fed), vector.stored.eq(product.stored), vector.step.eq(registers.step),
            vector.seed.eq(registers.seed), registers.zero.eq(vector.zero_range & alive),
            vector.range.eq(product.range),
            self.irq.eq(registers.interrupt),
        ]
        for port in (reads, writes):
            port_reset = Signal(attrs={"keep": 1})      # as late as the engines' own
            m.d.sync += port_reset.eq(engine_reset)
            m.d.comb += [port.window_base.eq(registers.window_base), port.window_limit.eq(registers.window_limit),
                         port.reset.eq(port_reset), port.clear.eq(soft_reset)]

        # The first error, and the descriptor that was at work where it came from.
        read_descriptor, write_descriptor = Signal(ADDRESS_BITS), Signal(ADDRESS_BITS)
        with m.Switch(reads.error_client):
            for k, name in enumerate(READERS):
                with m.Case(k):
                    m.d.comb += read_descriptor.eq({"program": sequencer.address, "load_a": product.loading,
                                                    "load_b": product.loading, "weights": product.loading}
                                                   .get(name, vector.descriptor))
        m.d.comb += write_descriptor.eq(Mux(writes.error_client == WRITERS.index("store"), product.storing,
                                            vector.descriptor))
        descriptor = Signal(ADDRESS_BITS)
        reports = (
            (sequencer.illegal & alive, ErrorCode.ILLEGAL_DESCRIPTOR, sequencer.address, sequencer.address),
            (vector.illegal & alive, ErrorCode.ILLEGAL_DESCRIPTOR, vector.descriptor, vector.descriptor),
            (reads.error, reads.error_code, reads.error_address, read_descriptor),
            (writes.error, writes.error_code, writes.error_address, write_descriptor),
            (product.overflow & alive, ErrorCode.ACCUMULATOR_OVERFLOW, 0, product.descriptor),
            (vector.exponent_saturated & alive, ErrorCode.EXPONENT_SATURATED, 0, vector.descriptor),
        )
        for source, (valid, code, address, _) in zip(errors.sources, reports, strict=True):
            m.d.comb += [source.valid.eq(valid), source.report.code.eq(code), source.report.address.eq(address)]
        fresh, where = Signal(), Signal.like(descriptor)         # of the cycle before
        m.d.sync += [fresh.eq(Cat(valid for valid, *_ in reports).any() & ~errors.found), where.eq(reports[-1][-1])]
        for valid, *_, origin in reversed(reports[:-1]):
            with m.If(valid):
                m.d.sync += where.eq(origin)
        with m.If(fresh):
            m.d.sync += descriptor.eq(where)
        m.d.comb += [
            errors.clear.eq(soft_reset), registers.error.eq(errors.error), registers.error_code.eq(errors.code),
            registers.error_address.eq(errors.address), registers.error_descriptor.eq(descriptor),
        ]
        m.d.sync += registers.idle.eq(reads.quiet & writes.quiet & ~sequencer.running)

        m.d.comb += [
            self.trace_product.eq(product.activity), self.trace_product_tag.eq(product.tag),
            self.trace_vector_tag.eq(vector.tag),
            self.trace_vector.eq(Mux(vector.busy, VectorActivity.BUSY, Mux(
                vector.stalled_in, VectorActivity.SOURCE, Mux(vector.stalled_out, VectorActivity.TARGET, Mux(
                    vector.waiting, VectorActivity.DEPENDENCY, VectorActivity.IDLE))))),
            counters.clear.eq(registers.start),
            counters.beats_read.eq(self.m_axi_rvalid & self.m_axi_rready),
            counters.beats_written.eq(self.m_axi_wvalid & self.m_axi_wready),
        ]
        for activity in Activity:
            m.d.comb += getattr(counters, f"product_{activity.name.lower()}").eq(product.activity == activity)
        for activity in VectorActivity:
            m.d.comb += getattr(counters, f"vector_{activity.name.lower()}").eq(self.trace_vector == activity)
        m.d.comb += [counters.select.eq(registers.counter_select), registers.counter.eq(counters.count)]
        return m
