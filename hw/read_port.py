"""Read channel of the memory port: many clients, one AXI4 read master."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, ResetInserter, ResetSignal, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .axi import INCR, Axi4Read
from .coalescer import BURST_LINES, Coalescer, burst_layout, line_layout
from .config import CoreConfig
from .errors import CLIENT_BITS, ERROR_BITS, ErrorCode, ErrorLatch
from .fifo import SHALLOW, Fifo
from .interfaces import ADDRESS_BITS, ReadClient, line_address_bits
from .local_reset import local_reset
from .round_robin import RoundRobin
from .skid_buffer import SkidBuffer
from .window import Window

__all__ = ["OUTSTANDING_LINES", "READ_PATIENCE", "ReadPort"]

OUTSTANDING_LINES = 256   # lines in flight: at one line per cycle more than twice 128 cycles of latency
READ_PATIENCE = 2         # cycles a burst waits for a line that may extend it


class ReadPort(wiring.Component):
    """Reads lines for several clients.

    Each client's consecutive lines become bursts; the bursts of all clients take turns on the read address channel
    (one per cycle, all with ID 0, so data comes back in order). Up to 256 lines are in flight.

    Parameters
    ----------
    config : core configuration; a line takes ``line_bytes / beat_bytes`` beats.
    depths : one entry per client: lines of its response FIFO. A request is accepted only while room for its line is
        reserved; FIFO depths two above the memory's latency sustain one line per cycle (of more than 16 lines, 3 are
        margin). 0: no FIFO, the client takes every response in the cycle it comes (its ready is not looked at).

    Attributes
    ----------
    clients : In(ReadClient).array(n).
    axi : Out(Axi4Read).
    window_base, window_limit : In(32)  bytes that may be read, limit exclusive; change only while quiet.
    reset : In(1)  soft reset, at least one cycle.
    clear : In(1)  forgets the error.
    error, error_code, error_address, error_client : first error since ``clear``: READ_OUTSIDE_WINDOW (the request is
        dropped) or READ_FAILED; the byte address of the line and the client's number.
    quiet : Out(1)  nothing is queued and no AXI transaction is in flight.

    After an error or a soft reset the port halts: it accepts no request, drops all queued requests and responses, and
    takes what memory still sends. It resumes when memory owes nothing, ``reset`` is low and the error is cleared.

    Latency: four cycles from a request that ends a burst to ARVALID, one from the last beat of a line to a
    response without FIFO, three with FIFO.
    """

    def __init__(self, config: CoreConfig, depths: list[int]):
        if not 1 <= len(depths) <= 1 << CLIENT_BITS:
            raise ValueError(f"a read port serves 1 to {1 << CLIENT_BITS} clients, not {len(depths)}")
        for depth in depths:
            if depth < 0:
                raise ValueError(f"the depth of a response FIFO is at least 0 (none), not {depth}")
        self.config = config
        self.depths = tuple(depths)
        super().__init__({
            "clients": In(ReadClient(config)).array(len(depths)), "axi": Out(Axi4Read(config)),
            "window_base": In(ADDRESS_BITS), "window_limit": In(ADDRESS_BITS), "reset": In(1), "clear": In(1),
            "error": Out(1), "error_code": Out(ERROR_BITS), "error_address": Out(ADDRESS_BITS),
            "error_client": Out(CLIENT_BITS), "quiet": Out(1)})

    def elaborate(self, platform):
        m = Module()
        count = len(self.clients)
        address_bits = line_address_bits(self.config)
        offset_bits = ADDRESS_BITS - address_bits
        beats = self.config.line_bytes // self.config.beat_bytes

        m.submodules.window = window = Window(self.config, count)
        m.submodules.errors = errors = ErrorLatch(count + 1)
        arbiter = RoundRobin(count)
        resting = Signal()
        m.d.sync += resting.eq(self.quiet)
        m.submodules.arbiter = ResetInserter(resting)(arbiter)        # no doorbell depends on the one before
        m.submodules.addresses = addresses = Fifo(burst_layout(self.config), 4, fall_through=True)
        # Bursts whose data is to come: client, and the line address for error reports.
        expected_shape = data.StructLayout({"address": address_bits, "client": CLIENT_BITS})
        m.submodules.expected = expected = Fifo(expected_shape, OUTSTANDING_LINES)

        halted, calm, outstanding = Signal(), Signal(), Signal(range(OUTSTANDING_LINES + 1))
        outside, failed = Signal(count), Signal()       # requests outside the window; an error response
        m.d.comb += [
            window.base.eq(self.window_base), window.limit.eq(self.window_limit), errors.clear.eq(self.clear),
            self.error.eq(errors.error), self.error_code.eq(errors.code), self.error_address.eq(errors.address),
            self.error_client.eq(errors.client),
        ]
        m.d.sync += calm.eq(self.quiet & halted)
        stays = halted & ~(calm & ~errors.found)
        # From the next cycle on: halted; its queues are empty, after an error, which is late, a cycle later.
        stops = Signal()
        lasts = self.reset | stays
        m.d.comb += stops.eq(lasts | ResetSignal(allow_reset_less=True))
        m.d.sync += halted.eq(lasts | outside.any() | failed)

        # The line that arrived last, in one cycle, and whose it is.
        line, delivered = Signal(self.config.line_bits, reset_less=True), Signal(count)
        bursts, nothing_queued = [], []
        for i, (client, depth) in enumerate(zip(self.clients, self.depths, strict=True)):
            coalescer = Coalescer(self.config, READ_PATIENCE)
            m.submodules[f"coalescer{i}"] = local_reset(m, f"coalescer{i}", coalescer, stops)
            # Its ready is a register: the way back from the arbiter ends here.
            burst = SkidBuffer(burst_layout(self.config))
            m.submodules[f"burst{i}"] = local_reset(m, f"burst{i}", burst, stops)
            wiring.connect(m, coalescer.burst, burst.input)
            bursts.append(burst.output)
            # Requests come into registers, whose ready is one too, and rest in another while they are compared with the
            # window.
            offered = Fifo(client.request.payload.shape(), 2, fall_through=True)
            m.submodules[f"request{i}"] = local_reset(m, f"request{i}", offered, stops)
            asked, inside = Signal(name=f"asked{i}"), Signal(name=f"inside{i}")
            from_base, below_limit = Signal(name=f"from_base{i}"), Signal(name=f"below_limit{i}")
            line_asked = Signal(line_layout(self.config), name=f"line{i}")
            after = Signal(address_bits, name=f"after{i}")
            is_outside = Signal(name=f"is_outside{i}")       # of the cycle before
            m.d.sync += is_outside.eq(outside[i] & ~halted & ~self.clear)
            nothing_queued.append(~offered.output.valid & ~asked & coalescer.empty & ~burst.output.valid)
            # Not halted, in a register for each client, because its way to `ready` is long. After an error, which is
            # late, it falls a cycle later: a request that is taken then is lost with those before it.
            admits = Signal(name=f"admits{i}", attrs={"keep": 1})
            m.d.sync += admits.eq(~lasts)
            reserved, may_request = Signal(range(depth + 1), name=f"reserved{i}"), Signal(init=1, name=f"room{i}")
            leaves, accepted = Signal(name=f"leaves{i}"), Signal(name=f"accepted{i}")
            m.d.comb += [
                inside.eq(from_base & below_limit),
                # A line outside the window stays until the error it is has halted the port.
                leaves.eq(coalescer.line.ready & may_request & inside), accepted.eq(asked & leaves),
                offered.input.valid.eq(client.request.valid & admits),
                offered.input.payload.eq(client.request.payload),
                client.request.ready.eq(offered.input.ready & admits), offered.output.ready.eq(~asked | leaves),
                coalescer.line.valid.eq(asked & may_request & inside),
                # Room comes back by itself when more lines are reserved than the burst being collected holds.
                coalescer.hold.eq(asked & ~may_request if depth >= 2 * BURST_LINES else 0),
                coalescer.line.payload.eq(line_asked),
                window.lines[i].eq(offered.output.payload),
                outside[i].eq(asked & ~inside), errors.sources[i].valid.eq(is_outside),
                errors.sources[i].report.code.eq(ErrorCode.READ_OUTSIDE_WINDOW),
                errors.sources[i].report.address.eq(line_asked.address << offset_bits),
                errors.sources[i].report.client.eq(i),
            ]
            with m.If(offered.output.ready):
                m.d.sync += [asked.eq(offered.output.valid), line_asked.address.eq(offered.output.payload),
                             line_asked.follows.eq(offered.output.payload == after), from_base.eq(window.from_base[i]),
                             below_limit.eq(window.below_limit[i])]
                with m.If(offered.output.valid):
                    m.d.sync += after.eq(offered.output.payload + 1)
            with m.If(halted):
                m.d.sync += asked.eq(0)
            if depth == 0:
                m.d.comb += [client.response.valid.eq(delivered[i]), client.response.payload.eq(line)]
                continue
            responses = Fifo(self.config.line_bits, depth)
            m.submodules[f"responses{i}"] = local_reset(m, f"responses{i}", responses, stops)
            m.d.comb += [responses.input.valid.eq(delivered[i]), responses.input.payload.eq(line)]
            if depth > SHALLOW:
                # A client's ready comes late and would reach the memory blocks, which stand far away.
                buffer = SkidBuffer(self.config.line_bits)
                m.submodules[f"response{i}"] = local_reset(m, f"response{i}", buffer, stops)
                wiring.connect(m, responses.output, buffer.input)
                responses = buffer
            wiring.connect(m, responses.output, wiring.flipped(client.response))
            # The client stands far away: that it takes a line comes by a register.
            taken_late = Signal(name=f"taken_late{i}")
            m.d.sync += taken_late.eq(client.response.valid & client.response.ready & ~halted)
            if depth > SHALLOW:
                # The count stands at the memory, far from the requests: they come by a register too, for which it
                # leaves a margin.
                accepted_late = Signal(name=f"accepted_late{i}")
                m.d.sync += [accepted_late.eq(accepted & ~halted),
                             reserved.eq(reserved + accepted_late - taken_late), may_request.eq(reserved < depth - 3)]
            else:
                m.d.sync += [reserved.eq(reserved + accepted - taken_late),
                             may_request.eq(Mux(accepted, reserved < depth - 1, reserved != depth))]
            with m.If(halted):
                m.d.sync += [reserved.eq(0), may_request.eq(1)]

        # Choose a burst per cycle, remember whose it is, and queue it for the address channel.
        # Lines count as outstanding from a cycle later to a cycle later, and `room` is of the cycle before: both leave
        # it a margin.
        may_issue, issued = Signal(), Signal()
        recent, extra = Signal(), Signal.like(addresses.input.payload.extra)
        room = Signal()
        m.d.sync += room.eq(Mux(issued, outstanding <= OUTSTANDING_LINES - 3 * BURST_LINES,
                                Mux(recent, outstanding <= OUTSTANDING_LINES - 2 * BURST_LINES,
                                    outstanding <= OUTSTANDING_LINES - BURST_LINES)))
        m.d.comb += [
            may_issue.eq(addresses.input.ready & room),
            issued.eq(arbiter.valid & may_issue), arbiter.serve.eq(may_issue),
            addresses.input.valid.eq(issued), expected.input.valid.eq(recent),
            arbiter.requests.eq(Cat(burst.valid for burst in bursts)),
        ]
        with m.Switch(arbiter.choice):
            for i, burst in enumerate(bursts):
                with m.Case(i):
                    m.d.comb += [addresses.input.payload.eq(burst.payload), burst.ready.eq(issued)]
        head = addresses.output.payload
        m.d.comb += [
            self.axi.arvalid.eq(addresses.output.valid), addresses.output.ready.eq(self.axi.arready),
            self.axi.araddr.eq(head.address << offset_bits),
            self.axi.arlen.eq(Cat(Const(beats - 1, beats.bit_length() - 1), head.extra)),
            self.axi.arsize.eq(self.config.beat_bytes.bit_length() - 1), self.axi.arburst.eq(INCR),
        ]

        # Assemble beats into lines. Every beat is taken: room was reserved.
        beat = Signal(range(beats)) if beats > 1 else Const(0, 1)
        index = Signal(range(BURST_LINES))
        taken, line_end, line_ended = Signal(), Signal(), Signal()
        # Of the cycle before:
        is_failed, failed_line, failed_client = Signal(), Signal(address_bits), Signal(CLIENT_BITS)
        m.d.sync += [is_failed.eq(failed & ~halted & ~self.clear), failed_client.eq(expected.output.payload.client),
                     failed_line.eq(expected.output.payload.address + index)]
        m.d.comb += [
            self.axi.rready.eq(expected.output.valid), taken.eq(self.axi.rvalid & self.axi.rready),
            line_end.eq(taken & (beat == beats - 1)), expected.output.ready.eq(taken & self.axi.rlast),
            failed.eq(taken & (self.axi.rresp != 0)), errors.sources[count].valid.eq(is_failed),
            errors.sources[count].report.code.eq(ErrorCode.READ_FAILED),
            errors.sources[count].report.address.eq(failed_line << offset_bits),
            errors.sources[count].report.client.eq(failed_client),
            self.quiet.eq((outstanding == 0) & ~recent & Cat(nothing_queued).all()),
        ]
        # Whether a request is outside comes from far away: a line that ends in that very cycle is good, and delivered.
        m.d.sync += delivered.eq(Cat(line_end & ~lasts & ~failed & (expected.output.payload.client == i)
                                     for i in range(count)))
        with m.If(taken):
            m.d.sync += line.word_select(beat, 8 * self.config.beat_bytes).eq(self.axi.rdata)
            if beats > 1:
                m.d.sync += beat.eq(beat + 1)      # wraps: a power of two
        with m.If(line_end):
            m.d.sync += index.eq(Mux(self.axi.rlast, 0, index + 1))
        m.d.sync += [recent.eq(issued), line_ended.eq(line_end), extra.eq(addresses.input.payload.extra),
                     expected.input.payload.client.eq(arbiter.choice),
                     expected.input.payload.address.eq(addresses.input.payload.address),
                     outstanding.eq(outstanding + Mux(recent, extra + 1, 0) - line_ended)]
        return m
