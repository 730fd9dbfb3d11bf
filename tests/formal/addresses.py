"""Address generators: what a descriptor's counts and strides imply is touched, all of it, and nothing outside.

Descriptors of up to four steps, chosen by the solver like every stall; LoopNest itself is proved in `arithmetic`. An
`eager` environment never stalls, and then all steps must be done by the last cycle of the run.
"""

from __future__ import annotations

from functools import partial

from amaranth.hdl import Assert, Assume, Elaboratable, Module, Mux, Signal

from .harness import BY_BITS, Fault, Proof, after, anyconst, anyseq, assume_stream, check_stream, delayed

DEPTH, DEPTH_IN_PARTS = 12, 15
LINE, LINE_BITS = 32, 5


def _config(parts=1):
    """A line is 32 bytes; a vector is 8, or 16 of which 8 pass at a time."""
    from hw.config import CoreConfig
    return CoreConfig(name="formal", rows=4, columns=8 * parts, lanes=8, buffer_lines=64)


class Span:
    """Loops of one or two iterations, at most two of them of two, and the smallest and largest address of any step.

    Loop k steps by `unit` << k bytes, up or down as the solver likes, so that an address shows the whole iteration.
    With `inner` the last loop steps by that many bytes, which are less than `unit`.
    """

    def __init__(self, m, levels: int, unit: int, *, inner: int = 0):
        twice, down = anyconst(m, levels, "twice"), anyconst(m, levels, "down")
        sizes = [unit << k for k in range(levels - bool(inner))] + [inner] * bool(inner)
        down = down & ((1 << levels - bool(inner)) - 1)
        self.counts = [1 + twice[k] for k in range(levels)]
        self.strides = [Mux(down[k], -size, size) for k, size in enumerate(sizes)]
        self.start, self.low, self.high, self.steps = Signal(32), Signal(32), Signal(32), Signal(3)
        up_bits, down_bits = twice & ~down, twice & down
        if inner:
            low, high = down_bits[:-1] * unit, up_bits[:-1] * unit + Mux(twice[-1], inner, 0)
        else:
            low, high = down_bits * unit, up_bits * unit
        pairs = sum(twice[k] for k in range(levels))
        m.d.comb += [self.start.eq(0x10000), self.low.eq(0x10000 - low), self.high.eq(0x10000 + high),
                     self.steps.eq(1 << pairs[:2]), Assume(pairs <= 2)]

    def line_inside(self, line, more=0):
        """Whether it lies between the first step's and the last step's, or is one of ``more`` lines after that."""
        return (line >= self.low >> LINE_BITS) & (line <= (self.high >> LINE_BITS) + more)


class _Environment:
    """Stalls as it likes, or, if the solver sets `eager`, never."""

    def __init__(self, m, depth=DEPTH):
        self.m, self.depth, self.eager = m, depth, anyconst(m, 1, "eager")

    def may(self, name):
        return anyseq(self.m, 1, name) | self.eager

    def count(self, event, name):
        counter = Signal(6, name=name)
        self.m.d.sync += counter.eq(counter + event)
        return counter

    def memory(self, client):
        """Answers a read client's requests, each at any time; returns (a request is taken, number of them before)."""
        sent, came = client.request.valid & client.request.ready, client.response.valid & client.response.ready
        requests, responses = self.count(sent, "requests"), self.count(came, "responses")
        self.m.d.comb += [client.request.ready.eq(self.may("request_ready")), client.response.payload.eq(0),
                          client.response.valid.eq(self.may("response_valid") & (responses != requests))]
        return sent, requests

    def check(self, steps, most):
        """`steps` never exceeds `most`, and reaches it."""
        self.m.d.comb += [Assert(steps <= most, "more steps than the descriptor has"),
                          Assert(~(self.eager & after(self.m, self.depth - 1)) | (steps == most), "steps are missing")]


class StreamAddresses(Elaboratable):
    """AddressStream: the addresses of its loops, each once, in order and held, without a gap, and no more of them."""

    def elaborate(self, platform):
        from hw.address_stream import AddressStream
        from hw.loop_nest import LoopNest
        m = Module()
        levels = 3
        m.submodules.dut = dut = AddressStream(levels)
        m.submodules.loops = loops = LoopNest(levels, {"address": 32})
        span, item = Span(m, levels, 8), dut.item
        taken = item.valid & item.ready
        begins, active = Signal(), Signal()
        m.d.comb += [begins.eq(~after(m, 1) | (anyseq(m, 1, "begins") & ~active)),
                     dut.load.eq(begins), loops.load.eq(begins), loops.begin.eq(begins), loops.step.eq(taken),
                     dut.start.eq(span.start), loops.start_address.eq(span.start),
                     item.ready.eq(anyseq(m, 1, "ready"))]
        for k in range(levels):
            m.d.comb += [dut.count[k].eq(span.counts[k]), dut.stride[k].eq(span.strides[k]),
                         loops.count[k].eq(span.counts[k]), loops.stride_address[k].eq(span.strides[k])]
        with m.If(taken & loops.last):
            m.d.sync += active.eq(0)
        with m.If(begins):
            m.d.sync += active.eq(1)
        check_stream(m, item)
        m.d.comb += [
            Assert(item.valid == active, "an address is missing, or one too many"),
            Assert(~item.valid | (item.payload.address == loops.value_address), "another address"),
            Assert(~item.valid | (item.payload.first == loops.at_first.all()), "first"),
            Assert(~item.valid | (item.payload.last == loops.last), "last"),
            Assert(~item.valid | (item.payload.ends == loops.at_last[levels - 1]), "ends"),
        ]
        return m


class ReaderAddresses(Elaboratable):
    """VectorReader: lines from the first to the last vector's, and exactly one vector for each step."""

    def elaborate(self, platform):
        from hw.vector_reader import VectorReader
        m = Module()
        environment = _Environment(m, DEPTH + 1)
        m.submodules.dut = dut = VectorReader(_config(), ahead=4)
        span = Span(m, 5, 8)
        sent, _ = environment.memory(dut.client)
        m.d.comb += [dut.start.eq(~after(m, 1)), dut.width.eq(anyconst(m, 2, "width")), dut.address.eq(span.start),
                     dut.vector.ready.eq(environment.may("vector_ready"))]
        for k in range(5):
            m.d.comb += [dut.count[k].eq(span.counts[k]), dut.stride[k].eq(span.strides[k])]
        environment.check(environment.count(dut.vector.valid & dut.vector.ready, "vectors"), span.steps)
        check_stream(m, dut.client.request)
        m.d.comb += Assert(~sent | span.line_inside(dut.client.request.payload), "a line outside")
        return m


class WriterAddresses(Elaboratable):
    """VectorWriter: takes exactly one vector for each step and writes no byte outside the vectors' range."""

    def __init__(self, parts=1):
        self.parts = parts

    def elaborate(self, platform):
        from hw.vector_writer import VectorWriter
        m, parts = Module(), self.parts
        environment = _Environment(m, DEPTH if parts == 1 else DEPTH_IN_PARTS)
        m.submodules.dut = dut = VectorWriter(_config(parts))
        width, span = anyconst(m, 1, "width"), Span(m, 5, 16 * parts)      # a part has 8 or 16 bytes
        m.d.comb += [dut.start.eq(~after(m, 1)), dut.width.eq(width), dut.address.eq(span.start),
                     dut.discard.eq(anyconst(m, 1, "discard")), dut.vector.valid.eq(environment.may("vector_valid")),
                     dut.client.line.ready.eq(environment.may("line_ready"))]
        for k in range(5):
            m.d.comb += [dut.count[k].eq(span.counts[k]), dut.stride[k].eq(span.strides[k])]
        taken = environment.count(dut.vector.valid & dut.vector.ready, "parts")
        environment.check(taken, span.steps * parts)
        line = dut.client.line
        assume_stream(m, dut.vector)
        check_stream(m, line)
        m.d.comb += [Assert(~(line.valid & dut.discard), "wrote what is to be discarded"),
                     Assert(~after(m, 2) | ~dut.done | (taken == span.steps * parts), "done too early")]
        for byte in range(0, LINE, 4):
            address = (line.payload.address << LINE_BITS) + byte
            m.d.comb += Assert(~(line.valid & line.payload.strobe[byte]) | (
                (address >= span.low) & (address < span.high + Mux(width, 16 * parts, 8 * parts))), "a byte outside")
        return m


class LoadAddresses(Elaboratable):
    """OperandBuffer: exactly the lines of the descriptor's runs, and the command is kept until all have arrived."""

    def elaborate(self, platform):
        from hw.operand_buffer import OperandBuffer
        m = Module()
        environment = _Environment(m)
        m.submodules.dut = dut = OperandBuffer(_config(), 4)
        span, load = Span(m, 3, 2 * LINE, inner=LINE), dut.command.payload
        sent, requests = environment.memory(dut.memory)
        finished = Signal()
        with m.If(dut.command.valid & dut.command.ready):
            m.d.sync += finished.eq(1)
            m.d.comb += Assert(requests == span.steps, "finished with requests to come")
        m.d.comb += [
            dut.command.valid.eq(~finished), load.enable.eq(1), load.address.eq(span.start),
            load.tile_stride.eq(span.strides[0]), load.run_stride.eq(span.strides[1]),
            load.tiles.eq(span.counts[0]), load.runs.eq(span.counts[1]), load.lines.eq(span.counts[2]),
            Assert(~sent | span.line_inside(dut.memory.request.payload), "a line outside"),
        ]
        environment.check(requests, span.steps)
        return m


class WeightAddresses(Elaboratable):
    """WeightRing: for each tile its one (ERROR) or two (FORWARD) lines, and none beside them."""

    def elaborate(self, platform):
        from hw.descriptor import Mode
        from hw.weight_ring import WeightRing
        m = Module()
        environment = _Environment(m)
        m.submodules.dut = dut = WeightRing(_config())
        span, command = Span(m, 4, LINE), dut.command.payload
        forward, slices = anyconst(m, 1, "forward"), anyconst(m, 1, "slice")
        sent, requests = environment.memory(dut.memory)
        finished = Signal()
        with m.If(dut.command.valid & dut.command.ready):
            m.d.sync += finished.eq(1)
            m.d.comb += Assert(requests + sent == span.steps << forward, "finished with requests to come")
        m.d.comb += [
            dut.command.valid.eq(~finished), command.mode.eq(Mux(forward, Mode.FORWARD, Mode.ERROR)),
            command.weights.address.eq(span.start + (slices << 2)), dut.enable.eq(anyseq(m, 1, "enable")),
            dut.take.eq(dut.ready & anyseq(m, 1, "take")),
            Assert(~sent | span.line_inside(dut.memory.request.payload, forward), "a line outside"),
        ]
        for k in range(4):
            m.d.comb += [command.tiles[k].eq(span.counts[k]), command.weights[f"stride{k}"].eq(span.strides[k])]
        environment.check(requests, span.steps << forward)
        return m


class StoreAddresses(Elaboratable):
    """Store: the lines of each result of the descriptor, none beside them, and done only after all of them."""

    def __init__(self, parts=1):
        self.parts = parts       # lines of a result

    def elaborate(self, platform):
        from hw.store import Store
        m, parts = Module(), self.parts
        environment = _Environment(m, DEPTH if parts == 1 else DEPTH_IN_PARTS)
        m.submodules.dut = dut = Store(_config(parts))
        span = Span(m, 5, 2 * LINE * parts, inner=LINE * parts)
        command, line = dut.command.payload, dut.memory.line
        written = line.valid & line.ready
        lines = environment.count(written, "lines")
        finished = Signal()
        with m.If(dut.done):
            m.d.sync += finished.eq(1)
            m.d.comb += Assert(lines == span.steps * parts, "done with lines to come")
        m.d.comb += [
            dut.command.valid.eq(~finished), command.enable.eq(1), command.store.address.eq(span.start),
            command.store.run.eq(span.counts[4]), dut.result.valid.eq(environment.may("result_valid")),
            line.ready.eq(environment.may("line_ready")),
            dut.memory.idle.eq(~delayed(m, written, 1) & environment.may("idle")),
            Assert(~dut.done | (dut.command.valid & dut.command.ready), "done without the command"),
            Assert(~written | span.line_inside(line.payload.address, parts - 1), "a line outside"),
        ]
        for k in range(4):
            m.d.comb += [command.store[f"count{k}"].eq(span.counts[k]),
                         command.store[f"stride{k}"].eq(span.strides[k])]
        environment.check(lines, span.steps * parts)
        return m


def _proof(name, design, *faults, depth=DEPTH):
    return Proof(name, design, depth, tuple(Fault(*fault) for fault in faults), engine=BY_BITS)


PROOFS = [
    _proof("address_stream/addresses", StreamAddresses,
           ("hw/address_stream.py", "nest.step.eq(into.ready)", "nest.step.eq(running)"),
           ("hw/address_stream.py", "m.If(nest.step & nest.last)", "m.If(nest.last)"),
           ("hw/address_stream.py", "nest.begin.eq(self.load)", "nest.begin.eq(self.load & ~into.ready)")),
    _proof("vector_reader/addresses", ReaderAddresses,
           ("hw/vector_reader.py", "item.ready.eq(~waiting | issued)", "item.ready.eq(~waiting)"),
           ("hw/vector_reader.py", "addresses.stride[k].eq(self.stride[k])", "addresses.stride[k].eq(self.stride[0])"),
           depth=DEPTH + 1),
    _proof("vector_writer/addresses", WriterAddresses,
           ("hw/vector_writer.py", "item.ready.eq(~placed | accept)", "item.ready.eq(1)"),
           ("hw/vector_writer.py", "quarters.eq(0b11 << (position & 0b10))", "quarters.eq(0b1111)")),
    _proof("vector_writer/parts", partial(WriterAddresses, 2),
           ("hw/vector_writer.py", "stride.eq(lanes << self.width)",
            "stride.eq(2 * lanes << self.width)"), depth=DEPTH_IN_PARTS),
    _proof("operand_buffer/addresses", LoadAddresses,
           ("hw/operand_buffer.py", "m.If(~begin & ~item.valid &", "m.If(~begin &"),
           ("hw/operand_buffer.py", "addresses.stride[1].eq(load.run_stride)",
            "addresses.stride[1].eq(load.tile_stride)")),
    _proof("weight_ring/addresses", WeightAddresses,
           ("hw/weight_ring.py", "m.If(requesting & item.payload.last)", "m.If(requesting)"),
           ("hw/weight_ring.py", "addresses.stride[4].eq(config.line_bytes)",
            "addresses.stride[4].eq(2 * config.line_bytes)")),
    _proof("store/addresses", StoreAddresses,
           ("hw/store.py", "addresses.count[4].eq(store.run)", "addresses.count[4].eq(store.run + 1)"),
           ("hw/store.py", "item.ready.eq((self.result.valid | resting) & line.ready)", "item.ready.eq(line.ready)")),
    _proof("store/parts", partial(StoreAddresses, 2),
           ("hw/store.py", "addresses.stride[5].eq(config.line_bytes)",
            "addresses.stride[5].eq(2 * config.line_bytes)"), depth=DEPTH_IN_PARTS),
]
