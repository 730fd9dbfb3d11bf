"""A small device with the core's top-level ports, to test the simulation infrastructure without the core.

It copies BLOCKS blocks of BEATS data beats each from SOURCE to TARGET with bursts that never cross 4 KB,
writes the number of blocks done to the word at STEP after every block, and raises the interrupt at the end
or at a bus error.
"""

from amaranth import C, Cat, Module, Mux, Signal
from amaranth.back import verilog
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from scenarios import DOORBELL, MODE, MODES, STATUS


class Copier(wiring.Component):
    """`beat_bytes` is the width of the AXI master's data; registers are the byte offsets above.

    Writing DOORBELL starts, writing STATUS clears DONE, ERROR and the interrupt. One read burst of at most
    16 beats is in flight at a time and is written back before the next. The MODE register makes it misbehave,
    see `scenarios.MODES`.
    """

    def __init__(self, beat_bytes):
        self._beat = beat_bytes
        width = 8 * beat_bytes
        super().__init__(
            {
                "irq": Out(1),
                "trace_product": Out(3),
                "trace_product_tag": Out(16),
                "trace_vector": Out(3),
                "trace_vector_tag": Out(16),
                "s_axi_awaddr": In(12),
                "s_axi_awprot": In(3),
                "s_axi_awvalid": In(1),
                "s_axi_awready": Out(1),
                "s_axi_wdata": In(32),
                "s_axi_wstrb": In(4),
                "s_axi_wvalid": In(1),
                "s_axi_wready": Out(1),
                "s_axi_bresp": Out(2),
                "s_axi_bvalid": Out(1),
                "s_axi_bready": In(1),
                "s_axi_araddr": In(12),
                "s_axi_arprot": In(3),
                "s_axi_arvalid": In(1),
                "s_axi_arready": Out(1),
                "s_axi_rdata": Out(32),
                "s_axi_rresp": Out(2),
                "s_axi_rvalid": Out(1),
                "s_axi_rready": In(1),
                "m_axi_awid": Out(4),
                "m_axi_awaddr": Out(32),
                "m_axi_awlen": Out(8),
                "m_axi_awsize": Out(3),
                "m_axi_awburst": Out(2),
                "m_axi_awvalid": Out(1),
                "m_axi_awready": In(1),
                "m_axi_wdata": Out(width),
                "m_axi_wstrb": Out(beat_bytes),
                "m_axi_wlast": Out(1),
                "m_axi_wvalid": Out(1),
                "m_axi_wready": In(1),
                "m_axi_bid": In(4),
                "m_axi_bresp": In(2),
                "m_axi_bvalid": In(1),
                "m_axi_bready": Out(1),
                "m_axi_arid": Out(4),
                "m_axi_araddr": Out(32),
                "m_axi_arlen": Out(8),
                "m_axi_arsize": Out(3),
                "m_axi_arburst": Out(2),
                "m_axi_arvalid": Out(1),
                "m_axi_arready": In(1),
                "m_axi_rid": In(4),
                "m_axi_rdata": In(width),
                "m_axi_rresp": In(2),
                "m_axi_rlast": In(1),
                "m_axi_rvalid": In(1),
                "m_axi_rready": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        log_beat = self._beat.bit_length() - 1
        registers = {name: Signal(32, name=name) for name in ("source", "target", "beats", "blocks", "step")}
        source, target, beats, blocks, step = registers.values()
        busy, done, error = Signal(), Signal(), Signal()
        mode = Signal(len(MODES))
        broken = {name: mode[bit] for bit, name in enumerate(MODES)}
        start = Signal()

        # AXI4-Lite slave: an access is taken when address (and data) are there and the response slot is free.
        write = Signal()
        m.d.comb += [
            write.eq(self.s_axi_awvalid & self.s_axi_wvalid & ~self.s_axi_bvalid),
            self.s_axi_awready.eq(write),
            self.s_axi_wready.eq(write),
            self.s_axi_arready.eq(self.s_axi_arvalid & ~self.s_axi_rvalid),
        ]
        with m.If(self.s_axi_bvalid & self.s_axi_bready):
            m.d.sync += self.s_axi_bvalid.eq(0)
        with m.If(self.s_axi_rvalid & self.s_axi_rready):
            m.d.sync += self.s_axi_rvalid.eq(0)
        with m.If(write):
            m.d.sync += self.s_axi_bvalid.eq(1)
            with m.Switch(self.s_axi_awaddr):
                for index, register in enumerate(registers.values()):
                    with m.Case(4 * index):
                        m.d.sync += register.eq(self.s_axi_wdata)
                with m.Case(DOORBELL):
                    m.d.comb += start.eq(1)
                with m.Case(MODE):
                    m.d.sync += mode.eq(self.s_axi_wdata)
                with m.Case(STATUS):
                    m.d.sync += [done.eq(0), error.eq(0)]
        with m.If(self.s_axi_arready):
            m.d.sync += self.s_axi_rvalid.eq(1)
            with m.Switch(self.s_axi_araddr):
                for index, register in enumerate(registers.values()):
                    with m.Case(4 * index):
                        m.d.sync += self.s_axi_rdata.eq(register)
                with m.Case(STATUS):
                    m.d.sync += self.s_axi_rdata.eq(Cat(busy, done, error))
                with m.Default():
                    m.d.sync += self.s_axi_rdata.eq(0)
        m.d.comb += self.irq.eq(done | error)

        buffer = [Signal(8 * self._beat, name=f"buffer{i}") for i in range(16)]
        head = Signal(5)
        length = Signal(5)
        left = Signal(32)
        block = Signal(32)
        # As the core's: what the two engines do (0: idle) for which tag; here only one, its tag the block.
        m.d.comb += [self.trace_product.eq(busy), self.trace_product_tag.eq(10 + block)]
        with m.If(broken["eager"]):
            m.d.comb += self.m_axi_bready.eq(1)
        read_at, write_at = Signal(32), Signal(32)
        read_room, write_room = Signal(13), Signal(13)  # beats up to the next 4 KB boundary
        page = 4096 >> log_beat
        m.d.comb += [
            read_room.eq(page - read_at[log_beat:12]),
            write_room.eq(page - write_at[log_beat:12]),
            self.m_axi_arsize.eq(log_beat),
            self.m_axi_awsize.eq(log_beat),
            self.m_axi_arburst.eq(1),
            self.m_axi_awburst.eq(1),
            self.m_axi_araddr.eq(read_at),
            self.m_axi_arlen.eq(length - 1),
            self.m_axi_awlen.eq(length - 1),
            self.m_axi_awaddr.eq(write_at),
        ]
        chosen = 16
        for limit in (left, *(Mux(broken["crosses"], 16, room) for room in (read_room, write_room))):
            chosen = Mux(limit < chosen, limit, chosen)

        with m.FSM():
            with m.State("IDLE"):
                with m.If(start):
                    m.d.sync += [
                        busy.eq(1),
                        read_at.eq(source),
                        write_at.eq(target),
                        left.eq(beats),
                        block.eq(0),
                    ]
                    m.next = "PLAN"
            with m.State("PLAN"):
                m.d.sync += [length.eq(chosen), head.eq(0)]
                m.next = "READ_ADDRESS"
            with m.State("READ_ADDRESS"):
                toggle = Signal()
                m.d.sync += toggle.eq(~toggle)
                m.d.comb += self.m_axi_arvalid.eq(toggle | ~broken["drops"])
                with m.If(self.m_axi_arvalid & self.m_axi_arready):
                    m.next = "READ"
            with m.State("READ"):
                m.d.comb += self.m_axi_rready.eq(1)
                with m.If(self.m_axi_rvalid):
                    m.d.sync += head.eq(head + 1)
                    with m.Switch(head):
                        for index, entry in enumerate(buffer):
                            with m.Case(index):
                                m.d.sync += entry.eq(self.m_axi_rdata)
                    with m.If(self.m_axi_rresp != 0):
                        m.d.sync += error.eq(1)
                    with m.If(self.m_axi_rlast):
                        m.d.sync += head.eq(0)
                        m.next = "WRITE_ADDRESS"
            with m.State("WRITE_ADDRESS"):
                m.d.comb += self.m_axi_awvalid.eq(~error)
                with m.If(error):
                    m.d.sync += busy.eq(0)
                    m.next = "IDLE"
                with m.Elif(self.m_axi_awready):
                    m.next = "WRITE"
            with m.State("WRITE"):
                m.d.comb += [
                    self.m_axi_wvalid.eq(1),
                    self.m_axi_wstrb.eq(Mux(broken["changes"] & ~self.m_axi_wready, 1, -1)),
                    self.m_axi_wlast.eq(head == Mux(broken["last"], 1, length - 1)),
                ]
                with m.Switch(head):
                    for index, entry in enumerate(buffer):
                        with m.Case(index):
                            m.d.comb += self.m_axi_wdata.eq(entry)
                with m.If(self.m_axi_wready):
                    m.d.sync += head.eq(head + 1)
                    with m.If(head == length - 1):
                        m.next = "RESPONSE"
            with m.State("RESPONSE"):
                m.d.comb += self.m_axi_bready.eq(1)
                with m.If(self.m_axi_bvalid | broken["eager"]):
                    m.d.sync += [
                        left.eq(left - length),
                        read_at.eq(read_at + (length << log_beat)),
                        write_at.eq(write_at + (length << log_beat)),
                    ]
                    m.next = "PLAN"
                    with m.If(self.m_axi_bresp != 0):
                        m.d.sync += [error.eq(1), busy.eq(0)]
                        m.next = "IDLE"
                    with m.Elif(left == length):
                        m.d.sync += block.eq(block + 1)
                        m.next = "STEP_ADDRESS"
            with m.State("STEP_ADDRESS"):
                m.d.comb += [
                    self.m_axi_awvalid.eq(1),
                    self.m_axi_awlen.eq(0),
                    self.m_axi_awaddr.eq(Cat(C(0, log_beat), step[log_beat:])),
                ]
                with m.If(self.m_axi_awready):
                    m.next = "STEP"
            with m.State("STEP"):
                m.d.comb += [
                    self.m_axi_wvalid.eq(1),
                    self.m_axi_wlast.eq(1),
                    self.m_axi_wstrb.eq(0xF << step[:log_beat]),
                    self.m_axi_wdata.eq(block << (step[:log_beat] << 3)),
                ]
                with m.If(self.m_axi_wready):
                    m.next = "STEP_RESPONSE"
            with m.State("STEP_RESPONSE"):
                m.d.comb += self.m_axi_bready.eq(1)
                with m.If(self.m_axi_bvalid):
                    m.d.sync += left.eq(beats)
                    m.next = "PLAN"
                    with m.If(block == blocks):
                        m.d.sync += [busy.eq(0), done.eq(1)]
                        m.next = "IDLE"
        return m


def copier_verilog(beat_bytes):
    return verilog.convert(Copier(beat_bytes), name="intrain", emit_src=False)
