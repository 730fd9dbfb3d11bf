"""Write channel of the memory port: many clients, one AXI4 write master."""

from __future__ import annotations

from functools import reduce
from operator import or_

from amaranth.hdl import Cat, Const, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .axi import INCR, Axi4Write
from .coalescer import BURST_LINES, Coalescer, burst_layout, line_layout
from .config import CoreConfig
from .errors import CLIENT_BITS, ERROR_BITS, ErrorCode, ErrorLatch
from .fifo import Fifo
from .interfaces import ADDRESS_BITS, WriteClient, data_register, line_address_bits
from .round_robin import RoundRobin
from .skid_buffer import SkidBuffer
from .window import Window

__all__ = ["BUFFER_LINES", "WRITE_PATIENCE", "WritePort"]

BUFFER_LINES = 32          # data held per client: one burst being sent, one being collected
OUTSTANDING_LINES = 256    # lines between choosing their burst and memory's acknowledgement
ADDRESSES, SENDING = 4, 15  # bursts chosen, whose address, whose data is to go out; one more each as a margin
WRITE_PATIENCE = 3         # cycles a burst waits for a line that may extend it; requantized lines come every fourth


class WritePort(wiring.Component):
    """Writes lines for several clients.

    Each client's consecutive lines become bursts, which go out only when all their data is buffered; bursts of all
    clients take turns (ID 0, so memory acknowledges in order). One line per cycle, whether addresses are
    consecutive or not.

    Parameters
    ----------
    config : core configuration; a line takes ``line_bytes / beat_bytes`` beats.
    clients : number of clients.

    Attributes
    ----------
    clients : In(WriteClient).array(n). ``idle`` is low from the cycle after a line was taken until it, and all
        before it, are acknowledged.
    axi : Out(Axi4Write).
    window_base, window_limit : In(32)  bytes that may be written, limit exclusive; change only while quiet.
    reset : In(1)  soft reset, at least one cycle.
    clear : In(1)  forgets the error.
    error, error_code, error_address, error_client : first error since ``clear``: WRITE_OUTSIDE_WINDOW (the line is
        dropped) or WRITE_FAILED; the byte address of the line or of the failed burst, and the client's number.
    quiet : Out(1)  every line taken has been acknowledged.

    After an error or a soft reset the port takes no further line, but lines taken before are written: whole bursts
    are promised to memory. Only those that a client gave behind one outside the window are dropped with it. The port
    resumes when all are acknowledged, ``reset`` is low and the error is cleared.

    Latency: five cycles from a line that ends a burst to AWVALID and WVALID.
    """

    def __init__(self, config: CoreConfig, clients: int):
        if not 1 <= clients <= 1 << CLIENT_BITS:
            raise ValueError(f"a write port serves 1 to {1 << CLIENT_BITS} clients, not {clients}")
        self.config = config
        super().__init__({
            "clients": In(WriteClient(config)).array(clients), "axi": Out(Axi4Write(config)),
            "window_base": In(ADDRESS_BITS), "window_limit": In(ADDRESS_BITS), "reset": In(1), "clear": In(1),
            "error": Out(1), "error_code": Out(ERROR_BITS), "error_address": Out(ADDRESS_BITS),
            "error_client": Out(CLIENT_BITS), "quiet": Out(1)})

    def elaborate(self, platform):
        m = Module()
        config, count = self.config, len(self.clients)
        address_bits = line_address_bits(config)
        offset_bits = ADDRESS_BITS - address_bits
        beats = config.line_bytes // config.beat_bytes

        burst = burst_layout(config)
        order = data.StructLayout({"client": CLIENT_BITS, "burst": burst})
        turn = data.StructLayout({"extra": range(BURST_LINES), "of": count, "shows": count})
        body = data.StructLayout({"data": config.line_bits, "strobe": config.line_bytes})
        m.submodules.window = window = Window(config, count)
        m.submodules.errors = errors = ErrorLatch(count + 1)
        arbiter = RoundRobin(count)
        resting = Signal()
        m.d.sync += resting.eq(self.quiet)
        m.submodules.arbiter = ResetInserter(resting)(arbiter)        # no doorbell depends on the one before
        m.submodules.addresses = addresses = Fifo(burst, ADDRESSES + 1, fall_through=True)
        m.submodules.sending = sending = Fifo(turn, SENDING + 1, fall_through=True)
        m.submodules.expected = expected = Fifo(order, OUTSTANDING_LINES)   # bursts to be acknowledged

        halted, calm, outstanding = Signal(), Signal(), Signal(range(OUTSTANDING_LINES + 1))
        outside, failed = Signal(count), Signal()       # lines outside the window; an error response
        acknowledged, acknowledged_lines = Signal(), Signal(range(BURST_LINES + 1))
        m.d.comb += [
            window.base.eq(self.window_base), window.limit.eq(self.window_limit), errors.clear.eq(self.clear),
            self.error.eq(errors.error), self.error_code.eq(errors.code), self.error_address.eq(errors.address),
            self.error_client.eq(errors.client), self.quiet.eq(Cat(client.idle for client in self.clients).all()),
        ]
        m.d.sync += calm.eq(self.quiet & halted)
        stays = halted & ~(calm & ~errors.found)
        m.d.sync += halted.eq(self.reset | outside.any() | failed | stays)

        bursts, buffers = [], []
        for i, client in enumerate(self.clients):
            m.submodules[f"coalescer{i}"] = coalescer = Coalescer(config, WRITE_PATIENCE)
            m.submodules[f"buffer{i}"] = buffer = Fifo(body, BUFFER_LINES)
            # Its ready is a register: the way back from the arbiter ends here.
            m.submodules[f"burst{i}"] = ready_burst = SkidBuffer(burst)
            wiring.connect(m, coalescer.burst, ready_burst.input)
            bursts.append(ready_burst.output)
            buffers.append(buffer)
            # A line's data goes to its place at once. Its address comes into a queue and rests in a register behind it
            # while it is compared with the window.
            m.submodules[f"line{i}"] = offered = Fifo(client.line.payload.address.shape(), 4, fall_through=True)
            taken = Signal(line_layout(config), name=f"taken{i}", reset_less=True)
            held, inside = Signal(name=f"held{i}"), Signal(name=f"inside{i}")
            from_base, below_limit = Signal(name=f"from_base{i}"), Signal(name=f"below_limit{i}")
            dropping = Signal(name=f"dropping{i}")
            after = Signal(address_bits, name=f"after{i}")
            pending = Signal(range(OUTSTANDING_LINES + BUFFER_LINES + BURST_LINES), name=f"pending{i}")
            leaves, kept = Signal(name=f"leaves{i}"), Signal(name=f"kept{i}")
            # There is room, in both queues, for the line that comes now and for one that came in the cycle before;
            # and the port is not halted. After a failure, which is late, that falls a cycle later.
            roomy, open_ = Signal(name=f"roomy{i}"), Signal(name=f"open{i}")
            room = (offered.level <= 2) & (buffer.level <= BUFFER_LINES - 2)
            m.d.sync += [roomy.eq(room), open_.eq(room & ~(self.reset | outside.any() | stays))]
            m.d.comb += [
                inside.eq(from_base & below_limit),
                # A line outside the window stays until the error it is has halted the port.
                leaves.eq(coalescer.line.ready & inside), kept.eq(held & leaves),
                client.line.ready.eq(open_),
                offered.input.valid.eq(client.line.valid & open_), buffer.input.valid.eq(client.line.valid & open_),
                offered.input.payload.eq(client.line.payload.address), offered.output.ready.eq(~held | leaves),
                buffer.input.payload.data.eq(client.line.payload.data),
                buffer.input.payload.strobe.eq(client.line.payload.strobe),
                buffer.clear.eq(calm & halted),          # of the data of lines that were dropped
                window.lines[i].eq(offered.output.payload),
                # A full buffer empties by itself: it holds more than the burst that is being collected.
                coalescer.hold.eq(~roomy),
                coalescer.line.valid.eq(held & inside), coalescer.line.payload.eq(taken),
                outside[i].eq(held & ~inside), errors.sources[i].valid.eq(outside[i] & ~halted),
                errors.sources[i].report.code.eq(ErrorCode.WRITE_OUTSIDE_WINDOW),
                errors.sources[i].report.address.eq(taken.address << offset_bits),
                errors.sources[i].report.client.eq(i),
            ]
            with m.If(leaves | (halted & ~inside)):
                m.d.sync += held.eq(0)
            address = offered.output.payload
            with m.If(offered.output.valid & offered.output.ready):
                m.d.sync += after.eq(address + 1)
            with m.If(offered.output.ready):
                m.d.sync += [held.eq(offered.output.valid), from_base.eq(window.from_base[i] & ~dropping),
                             below_limit.eq(window.below_limit[i]),
                             taken.address.eq(address), taken.follows.eq(address == after)]
            with m.If(calm):
                m.d.sync += dropping.eq(0)
            with m.If(outside[i]):
                m.d.sync += dropping.eq(1)
            m.d.sync += client.idle.eq((pending == 0) & ~held & ~offered.output.valid & ~offered.input.valid)
            mine = acknowledged & (expected.output.payload.client == i)
            m.d.sync += pending.eq(pending + kept - Mux(mine, acknowledged_lines, 0))

        # Choose a burst per cycle and queue it for the address, data and response channels.
        # Their lines count as outstanding a cycle later, `room` and what the queues hold are of the cycle before: all
        # leave a margin.
        may_issue, issued = Signal(), Signal()
        recent, extra = Signal(), Signal.like(addresses.input.payload.extra)
        room, queues_room = Signal(), Signal()
        m.d.sync += queues_room.eq((addresses.level < ADDRESSES) & (sending.level < SENDING))
        m.d.sync += room.eq(Mux(issued, outstanding <= OUTSTANDING_LINES - 3 * BURST_LINES,
                                Mux(recent, outstanding <= OUTSTANDING_LINES - 2 * BURST_LINES,
                                    outstanding <= OUTSTANDING_LINES - BURST_LINES)))
        m.d.comb += [
            may_issue.eq(queues_room & room),
            issued.eq(arbiter.valid & may_issue), arbiter.serve.eq(may_issue),
            arbiter.requests.eq(Cat(burst.valid for burst in bursts)),
            sending.input.payload.extra.eq(addresses.input.payload.extra),
            *(flags[i].eq(arbiter.choice == i) for i in range(count)
              for flags in (sending.input.payload.of, sending.input.payload.shows)),
            addresses.input.valid.eq(issued), sending.input.valid.eq(issued), expected.input.valid.eq(recent),
        ]
        with m.Switch(arbiter.choice):
            for i, chosen in enumerate(bursts):
                with m.Case(i):
                    m.d.comb += [addresses.input.payload.eq(chosen.payload), chosen.ready.eq(issued)]
        head = addresses.output.payload
        m.d.comb += [
            self.axi.awvalid.eq(addresses.output.valid), addresses.output.ready.eq(self.axi.awready),
            self.axi.awaddr.eq(head.address << offset_bits),
            self.axi.awlen.eq(Cat(Const(beats - 1, beats.bit_length() - 1), head.extra)),
            self.axi.awsize.eq(config.beat_bytes.bit_length() - 1), self.axi.awburst.eq(INCR),
        ]

        # Send the lines of the first burst in turn from its client's buffer, a beat per cycle.
        m.submodules.line = line = SkidBuffer(data.StructLayout({"body": body, "last": 1}))
        beat, sent = Signal(range(beats)) if beats > 1 else Const(0, 1), Signal(range(BURST_LINES))
        current = sending.output.payload         # `of` decides, `shows`, its copy, is what every bit of a line sees
        next_line, next_beat, line_end = Signal(), Signal(), Signal()
        there = [buffer.output.valid & current.of[i] for i, buffer in enumerate(buffers)]
        m.d.comb += [
            line.input.payload.body.eq(reduce(or_, (
                buffer.output.payload.as_value() & current.shows[i].replicate(body.size)
                for i, buffer in enumerate(buffers)))),
            line.input.payload.last.eq(sent == current.extra),
            line.input.valid.eq(sending.output.valid & Cat(there).any()),
            next_line.eq(line.input.valid & line.input.ready),
            sending.output.ready.eq(next_line & line.input.payload.last),
            next_beat.eq((~self.axi.wvalid | self.axi.wready) & line.output.valid),
            line_end.eq(beat == beats - 1), line.output.ready.eq(next_beat & line_end),
        ]
        for i, buffer in enumerate(buffers):
            m.d.comb += buffer.output.ready.eq(sending.output.valid & line.input.ready & current.of[i])
        with m.If(next_line):
            m.d.sync += sent.eq(Mux(line.input.payload.last, 0, sent + 1))
        wdata, wstrb = data_register(m, self.axi.wdata), data_register(m, self.axi.wstrb)
        with m.If(self.axi.wready):
            m.d.sync += self.axi.wvalid.eq(0)
        with m.If(next_beat):
            m.d.sync += [
                self.axi.wvalid.eq(1), self.axi.wlast.eq(line_end & line.output.payload.last),
                wdata.eq(line.output.payload.body.data.word_select(beat, 8 * config.beat_bytes)),
                wstrb.eq(line.output.payload.body.strobe.word_select(beat, config.beat_bytes)),
            ]
            if beats > 1:
                m.d.sync += beat.eq(beat + 1)      # wraps: a power of two

        oldest = expected.output.payload
        m.d.comb += [
            self.axi.bready.eq(expected.output.valid), acknowledged.eq(self.axi.bvalid & self.axi.bready),
            expected.output.ready.eq(acknowledged), acknowledged_lines.eq(oldest.burst.extra + 1),
            failed.eq(acknowledged & (self.axi.bresp != 0)), errors.sources[count].valid.eq(failed & ~halted),
            errors.sources[count].report.code.eq(ErrorCode.WRITE_FAILED),
            errors.sources[count].report.address.eq(oldest.burst.address << offset_bits),
            errors.sources[count].report.client.eq(oldest.client),
        ]
        m.d.sync += [recent.eq(issued), extra.eq(addresses.input.payload.extra),
                     expected.input.payload.client.eq(arbiter.choice),
                     expected.input.payload.burst.eq(addresses.input.payload),
                     outstanding.eq(outstanding + Mux(recent, extra + 1, 0) - Mux(acknowledged, acknowledged_lines, 0))]
        return m
