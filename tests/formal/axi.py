"""AXI4 rules on the memory port, AXI4-Lite rules on the register port (AMBA AXI specification, IHI 0022).

The memory and the host are free, within the same rules. The ports are those of a core with two beats per line, with
bursts of at most 2 lines instead of 16 and 3 lines in flight instead of 256, so that bounded runs reach both limits
with two bursts in flight.
"""

from __future__ import annotations

from unittest import mock

from amaranth.hdl import Assert, Assume, Cat, Const, Elaboratable, Module, Mux, Signal

from .harness import (
    BY_BITS,
    Fault,
    Proof,
    after,
    anyconst,
    anyseq,
    check_order,
    check_stream,
    delayed,
    elaborated,
    free_inputs,
    held,
    latest,
)

LINES, BURST_LINES = 3, 2
BURSTS = LINES
LINE_BYTES, BEAT_BYTES = 16, 8


def _config():
    from hw.config import CoreConfig
    return CoreConfig(name="formal", rows=4, columns=4, beat_bytes=BEAT_BYTES)


def _port(m, name, *arguments):
    module = latest(f"hw.{name}")
    dut = (module.ReadPort if name == "read_port" else module.WritePort)(_config(), *arguments)
    coalescer = latest("hw.coalescer")
    small = {"OUTSTANDING_LINES": LINES, "BURST_LINES": BURST_LINES, "Coalescer": coalescer.Coalescer}
    if name == "write_port":
        small["BUFFER_LINES"] = 2 * BURST_LINES
    with mock.patch.multiple(latest("hw.coalescer"), BURST_LINES=BURST_LINES):      # also for burst_layout
        m.submodules.dut = elaborated(dut, **{name: small | {"burst_layout": coalescer.burst_layout}})
    return dut


class _Queue:
    """The specification's own list, first in, first out; more than `depth` entries are a failure."""

    def __init__(self, m, depth, push, value, pop):
        self.level, items = Signal(range(depth + 1)), [Signal(len(value)) for _ in range(depth)]
        left = self.level - pop
        for k, item in enumerate(items):
            moved = Mux(pop, items[k + 1] if k + 1 < depth else 0, item)
            m.d.sync += item.eq(Mux(push & (left == k), value, moved))
        m.d.sync += self.level.eq(left + push)
        m.d.comb += Assert(~push | (left != depth), "too many bursts in flight")
        self.head = items[0]


def _check_bursts(m, axi, prefix):
    """The rules of an address channel; the bursts of this core are whole lines, counting up, of ID 0."""
    valid, ready, identity, address, length, size, burst = (getattr(axi, prefix + name) for name in (
        "valid", "ready", "id", "addr", "len", "size", "burst"))
    stays, stable = held(m, valid, ready, Cat(identity, address, length, size, burst))
    m.d.comb += [
        Assert(stays, "the address's valid fell before ready"), Assert(stable, "the address changed before ready"),
        Assert(~valid | (address[:12] + (length + 1) * BEAT_BYTES <= 4096), "a burst crosses 4 KB"),
        Assert(~valid | ((address[:4] == 0) & length[0] & (size == 3) & (burst == 1) & (identity == 0)),
               "no whole lines"),
    ]


def _memory(m, axi):
    """The read channel's other side: answers bursts in order with RLAST on the last beat; `data` is left open."""
    taken, beat = axi.rvalid & axi.rready, Signal(8)
    bursts = _Queue(m, BURSTS, axi.arvalid & axi.arready, Cat(axi.arlen, axi.araddr), taken & axi.rlast)
    m.d.sync += beat.eq(Mux(taken, Mux(axi.rlast, 0, beat + 1), beat))
    m.d.comb += [
        axi.arready.eq(anyseq(m, 1, "arready")), axi.rid.eq(0), axi.rlast.eq(beat == bursts.head[:8]),
        axi.rvalid.eq(anyseq(m, 1, "rvalid") & (bursts.level != 0)),
    ]
    return bursts, beat


class ReadRules(Elaboratable):
    """Read port under any clients, errors and soft resets."""

    def elaborate(self, platform):
        m = Module()
        dut = _port(m, "read_port", [2, 0])
        free_inputs(m, dut, keep=("axi", "window_base", "window_limit"))
        m.d.comb += [dut.window_base.eq(anyconst(m, 32, "base")), dut.window_limit.eq(anyconst(m, 32, "limit")),
                     dut.axi.rdata.eq(0), dut.axi.rresp.eq(anyseq(m, 2, "rresp"))]
        _check_bursts(m, dut.axi, "ar")
        bursts, _ = _memory(m, dut.axi)
        waits = (bursts.level != 0) & ~dut.axi.rready       # at most two cycles, for what is expected to be known
        waited = delayed(m, waits, 1) & delayed(m, waits, 2)
        m.d.comb += [Assert(~(waits & waited), "a response is not taken"),
                     Assert(~dut.quiet | ((bursts.level == 0) & ~dut.axi.arvalid), "quiet with a burst in flight")]
        return m


class ReadLines(Elaboratable):
    """Every client gets the lines that it asked for, once and in order: memory holds each beat's own address."""

    def elaborate(self, platform):
        m = Module()
        dut = _port(m, "read_port", [2, 0])
        free_inputs(m, dut, keep=("axi", "window_base", "window_limit", "reset", "clear"))
        m.d.comb += [dut.window_limit.eq(0xFFFFFFFF), dut.axi.rresp.eq(0)]
        bursts, beat = _memory(m, dut.axi)
        m.d.comb += dut.axi.rdata.eq(bursts.head[8:] + beat * BEAT_BYTES)
        for client, buffered in zip(dut.clients, (True, False), strict=True):
            # The window takes a cycle, and its last line is outside.
            m.d.comb += Assume(~client.request.valid | (after(m, 1) & ~client.request.payload.all()))
            if buffered:
                check_stream(m, client.response)
            else:
                m.d.comb += Assume(client.response.ready)
            check_order(m, client.request, client.response, bits=4, transform=lambda line: Cat(
                Const(0, 4), line, Const(0, 32), Const(8, 4), line, Const(0, 32)))
        return m


def _acknowledge(m, axi):
    """The write channel's other side, which acknowledges only bursts of which it has address and data."""
    addresses, ends, answers = Signal(5), Signal(5), Signal(5)
    m.d.sync += [addresses.eq(addresses + (axi.awvalid & axi.awready)),
                 ends.eq(ends + (axi.wvalid & axi.wready & axi.wlast)), answers.eq(answers + (axi.bvalid & axi.bready))]
    complete = (answers < addresses) & (answers < ends)
    m.d.comb += [axi.awready.eq(anyseq(m, 1, "awready")), axi.wready.eq(anyseq(m, 1, "wready")), axi.bid.eq(0),
                 axi.bvalid.eq(anyseq(m, 1, "bvalid") & complete)]
    return addresses, ends, answers, complete


class WriteRules(Elaboratable):
    """Write port under any clients, errors and soft resets. A burst of any number that the solver likes is watched."""

    def elaborate(self, platform):
        m = Module()
        dut = _port(m, "write_port", 2)
        axi = dut.axi
        free_inputs(m, dut, keep=("axi", "window_base", "window_limit"))
        m.d.comb += [dut.window_base.eq(anyconst(m, 32, "base")), dut.window_limit.eq(anyconst(m, 32, "limit")),
                     axi.bresp.eq(anyseq(m, 2, "bresp"))]
        _check_bursts(m, axi, "aw")
        addresses, ends, answers, complete = _acknowledge(m, axi)
        stays, stable = held(m, axi.wvalid, axi.wready, Cat(axi.wdata, axi.wstrb, axi.wlast))
        watched, length, beats = anyconst(m, 5, "watched_burst"), Signal(8), Signal(9)
        with m.If(axi.awvalid & axi.awready & (addresses == watched)):
            m.d.sync += length.eq(axi.awlen)
        with m.If(axi.wvalid & axi.wready & (ends == watched)):
            m.d.sync += beats.eq(beats + 1)
        known = addresses > watched
        m.d.comb += [
            Assert(stays, "the data's valid fell before ready"), Assert(stable, "the data changed before ready"),
            Assert(~(known & (ends > watched)) | (beats == length + 1), "WLAST is not at the burst's length"),
            Assert(~known | (beats <= length + 1), "more beats than the burst's length"),
            Assert(~complete | axi.bready, "an acknowledgement is not taken"),
            Assert((addresses - answers <= BURSTS) & (ends - answers <= BURSTS), "too many bursts in flight"),
            Assert(~dut.quiet | ((addresses == answers) & ~axi.awvalid & ~axi.wvalid), "quiet with a burst in flight"),
        ]
        return m


class WriteLines(Elaboratable):
    """Every line taken from a client is written once and in order, with its address, data and strobes."""

    def elaborate(self, platform):
        m = Module()
        dut = _port(m, "write_port", 1)
        axi, client = dut.axi, dut.clients[0]
        free_inputs(m, dut, keep=("axi", "window_base", "window_limit", "reset", "clear"))
        inside = after(m, 1) & ~client.line.payload.address.all()
        m.d.comb += [dut.window_limit.eq(0xFFFFFFFF), Assume(~client.line.valid | inside), axi.bresp.eq(0)]
        _acknowledge(m, axi)
        watched, kept = anyconst(m, 4, "watched_line"), Signal.like(client.line.payload)
        taken, addressed, beats = Signal(5), Signal(6), Signal(6)
        with m.If(client.line.valid & client.line.ready):
            m.d.sync += taken.eq(taken + 1)
            with m.If(taken == watched):
                m.d.sync += kept.eq(client.line.payload)
        with m.If(axi.awvalid & axi.awready):
            lines = axi.awlen[1:] + 1
            within = watched - addressed
            m.d.sync += addressed.eq(addressed + lines)
            m.d.comb += Assert(addressed + lines <= taken, "a line that nobody gave")
            with m.If((watched >= addressed) & (watched < addressed + lines)):
                m.d.comb += Assert(((axi.awaddr >> 4) + within[:4])[:28] == kept.address, "a line at a wrong address")
        with m.If(axi.wvalid & axi.wready):
            m.d.sync += beats.eq(beats + 1)
            m.d.comb += Assert(beats[1:] < taken, "data that nobody gave")
            for half in range(2):
                with m.If((beats[1:] == watched) & (beats[0] == half)):
                    m.d.comb += Assert((axi.wdata == kept.data.word_select(half, 64))
                                       & (axi.wstrb == kept.strobe.word_select(half, 8)), "wrong data or strobes")
        return m


def _follows(m, dut):
    """The bit that says that a line follows the one before is right; returns the address of the one before."""
    last = Signal.like(dut.line.payload.address)
    with m.If(dut.line.valid & dut.line.ready):
        m.d.sync += last.eq(dut.line.payload.address)
    m.d.comb += Assume(dut.line.payload.follows == (dut.line.payload.address == (last + 1)[:len(last)]))
    return last


class CoalescerPages(Elaboratable):
    """For ever: no burst, collected or offered, crosses 4 KB, and the line that may extend it is the next one."""

    def elaborate(self, platform):
        from hw.coalescer import Coalescer
        m = Module()
        m.submodules.dut = dut = Coalescer(_config(), 2)
        free_inputs(m, dut)
        check_stream(m, dut.burst)
        last = _follows(m, dut)
        for burst, present in ((dut.current, dut.held), (dut.burst.payload, dut.burst.valid)):
            m.d.comb += Assert(~present | (burst.address[:8] + burst.extra < 256), "a burst crosses 4 KB")
        end = (dut.current.address + dut.current.extra + 1)[:28]
        m.d.comb += Assert(~dut.held | ((last + 1)[:28] == end), "not the last line")
        m.d.comb += Assert(~dut.held | (dut.page_end == (end[:8] == 0)), "the page ends elsewhere")
        return m


class CoalescerLines(Elaboratable):
    """Every line is in exactly one burst, in order."""

    def elaborate(self, platform):
        m = Module()
        with mock.patch.multiple(latest("hw.coalescer"), BURST_LINES=BURST_LINES):
            dut = latest("hw.coalescer").Coalescer(_config(), 2)
            m.submodules.dut = elaborated(dut)
        free_inputs(m, dut)
        _follows(m, dut)
        watched, kept = anyconst(m, 4, "watched_line"), Signal.like(dut.line.payload.address)
        taken, given = Signal(6), Signal(6)
        with m.If(dut.line.valid & dut.line.ready):
            m.d.sync += taken.eq(taken + 1)
            with m.If(taken == watched):
                m.d.sync += kept.eq(dut.line.payload.address)
        with m.If(dut.burst.valid & dut.burst.ready):
            first, lines = dut.burst.payload.address, dut.burst.payload.extra + 1
            m.d.sync += given.eq(given + lines)
            m.d.comb += Assert(given + lines <= taken, "a line that nobody gave")
            with m.If((watched >= given) & (watched < given + lines)):
                m.d.comb += Assert(kept == (first + (watched - given)[:4])[:28], "not the line that was given")
        m.d.comb += Assert(~dut.empty | (given == taken), "empty with a line held")
        return m


class LiteRules(Elaboratable):
    """For ever, any host: one response for each access, never before it, held and unchanged until taken.

    Accesses less responses are kept as small differences; the slave takes at most one more than it answers.
    """

    def __init__(self, make):
        self.make = make

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = self.make()
        free_inputs(m, dut)
        bus = dut.bus
        written, answered = bus.bvalid & bus.bready, bus.rvalid & bus.rready
        for name, before, change, open_accesses in (
                ("aw", written, bus.awvalid & bus.awready, bus.bvalid + ~bus.awready),
                ("w", written, bus.wvalid & bus.wready, bus.bvalid + ~bus.wready),
                ("ar", answered, bus.arvalid & bus.arready, Cat(~bus.arready))):
            pending = Signal(3, name=f"{name}_pending")
            m.d.sync += pending.eq(pending + change - before)
            m.d.comb += Assert(pending == open_accesses, "responses do not match accesses")
        for valid, ready, payload in ((bus.bvalid, bus.bready, bus.bresp),
                                      (bus.rvalid, bus.rready, Cat(bus.rdata, bus.rresp))):
            stays, stable = held(m, valid, ready, payload)
            m.d.comb += [Assert(stays, "valid fell before ready"), Assert(stable, "a response changed before ready"),
                         Assert(~valid | (payload[-1:] == 0) | (payload[-2:] == 2), "no response code of AXI4-Lite")]
        return m


class SettingsProof(Elaboratable):
    """From a run's doorbell to its end, program, window and seed do not change, and there is no second doorbell."""

    def elaborate(self, platform):
        from hw.register_map import REGISTERS
        from hw.registers import Registers
        m = Module()
        m.submodules.dut = dut = Registers(_config(), 1)
        free_inputs(m, dut)
        settings = Cat(dut.program, dut.window_base, dut.window_limit, dut.seed)
        running, failed = Signal(), Signal()
        ended = dut.soft_reset | dut.done | ((failed | dut.error) & dut.idle)
        m.d.sync += failed.eq((failed | dut.error) & ~ended & (running | dut.start))
        with m.If(ended):
            m.d.sync += running.eq(0)
        with m.Elif(dut.start):
            m.d.sync += running.eq(1)
        assert {r.name for r in REGISTERS if r.idle_only} >= {"PROGRAM", "WINDOW_BASE", "WINDOW_LIMIT", "SEED"}
        m.d.comb += [Assert(~running | (settings == delayed(m, settings, 1)), "a setting changed during a run"),
                     Assert(~(running & ~ended & dut.start), "a second doorbell during a run")]
        return m


def _slave():
    from hw.registers import LiteSlave
    return LiteSlave()


def _registers():
    from hw.registers import Registers
    return Registers(_config(), 1)


_NO_PAGE = Fault("hw/coalescer.py", "| self.page_end", "")
_NO_LIMIT = (" - BURST_LINES)))", ")))")
_LITE = (Fault("hw/registers.py", "have_data & ~bus.bvalid", "have_data"),
         Fault("hw/registers.py", "bus.arready.eq(~have_read & ~bus.rvalid)", "bus.arready.eq(~have_read)"))

PROOFS = [
    Proof("coalescer/pages", CoalescerPages, 2, (
        _NO_PAGE,
        Fault("hw/coalescer.py", "room.eq(~self.burst.valid | self.burst.ready)", "room.eq(1)")), induction=True,
        quick=True),
    Proof("coalescer/lines", CoalescerLines, 9, (
        Fault("hw/coalescer.py", "(full | miss | ", "(full | "),
        Fault("hw/coalescer.py", "with m.If(held & ~close):", "with m.If(held):")),
        engine=BY_BITS),
    Proof("read_port/axi", ReadRules, 15, (
        _NO_PAGE,
        Fault("hw/read_port.py", *_NO_LIMIT),
        Fault("hw/read_port.py", "addresses.output.ready.eq(self.axi.arready)", "addresses.output.ready.eq(1)"),
        Fault("hw/read_port.py", "expected.output.ready.eq(taken & self.axi.rlast)", "expected.output.ready.eq(taken)"),
        ), engine=BY_BITS),
    Proof("read_port/lines", ReadLines, 14, (
        Fault("hw/read_port.py", "(expected.output.payload.client == i)", "(i == 0)"),
        Fault("hw/read_port.py", "line_end.eq(taken & (beat == beats - 1))", "line_end.eq(taken)")), engine=BY_BITS),
    Proof("write_port/axi", WriteRules, 18, (
        _NO_PAGE,
        Fault("hw/write_port.py", *_NO_LIMIT),
        Fault("hw/write_port.py", "(~self.axi.wvalid | self.axi.wready)", "1"),
        Fault("hw/write_port.py", "axi.wlast.eq(line_end & ", "axi.wlast.eq(")), engine=BY_BITS),
    Proof("write_port/lines", WriteLines, 12, (
        Fault("hw/write_port.py", "line.output.ready.eq(next_beat & line_end)", "line.output.ready.eq(next_beat)"),
        Fault("hw/coalescer.py", "(full | miss | ", "(full | ")), engine=BY_BITS),
    Proof("registers/axi_lite", lambda: LiteRules(_slave), 3, _LITE, induction=True, quick=True),
    Proof("registers/bus", lambda: LiteRules(_registers), 3, _LITE, induction=True),
    Proof("registers/settings", SettingsProof, 9, (
        Fault("hw/registers.py", "return values[\"STATUS\", \"busy\"] if register.idle_only else Const(0)",
              "return Const(0)"),
        Fault("hw/registers.py", 'start & ~reset & (values["STATUS", "busy"] | ', "start & ~reset & (")),
        engine=BY_BITS),
]
