"""A device with the core's top-level ports made of the real registers, read port and write port: it copies memory."""

from __future__ import annotations

from amaranth.back import verilog
from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import Out

from hw.axi import Axi4Lite, Axi4Master, connect_flat, flat_members
from hw.config import CoreConfig
from hw.interfaces import ADDRESS_BITS, line_address_bits
from hw.read_port import ReadPort
from hw.registers import Registers
from hw.write_port import WritePort

__all__ = ["CopyTop", "copy_top_verilog"]


class CopyTop(wiring.Component):
    """On start it copies 2 * SEED lines from byte address PROGRAM to byte address STEP.

    Client 0 copies the first half in ascending, client 1 the second half in descending order, so that full bursts and
    isolated lines share the port.
    """

    def __init__(self, config: CoreConfig, depth: int = 192):
        self.config, self.depth = config, depth
        super().__init__({**flat_members("s_axi", Axi4Lite().flip()), **flat_members("m_axi", Axi4Master(config)),
                          "irq": Out(1)})

    def elaborate(self, platform):
        m = Module()
        offset_bits = ADDRESS_BITS - line_address_bits(self.config)
        m.submodules.registers = registers = Registers(self.config, 2)
        m.submodules.read_port = reads = ReadPort(self.config, [self.depth] * 2)
        m.submodules.write_port = writes = WritePort(self.config, 2)
        connect_flat(m, self, "s_axi", registers.bus)
        connect_flat(m, self, "m_axi", reads.axi)
        connect_flat(m, self, "m_axi", writes.axi)
        count, source, target = Signal(24), registers.program >> offset_bits, registers.step >> offset_bits
        running, clear = Signal(), registers.soft_reset
        m.d.comb += [count.eq(registers.seed), self.irq.eq(registers.interrupt)]
        for port in (reads, writes):
            m.d.comb += [port.window_base.eq(registers.window_base), port.window_limit.eq(registers.window_limit),
                         port.reset.eq(clear), port.clear.eq(clear)]

        finished = Signal(2)
        for i in range(2):
            asked, written = Signal(25, name=f"asked{i}"), Signal(25, name=f"written{i}")

            def position(k, i=i):
                return k if i == 0 else 2 * count - 1 - k

            reader, writer = reads.clients[i], writes.clients[i]
            m.d.comb += [
                reader.request.valid.eq(running & (asked != count)),
                reader.request.payload.eq(source + position(asked)),
                writer.line.valid.eq(running & reader.response.valid),
                reader.response.ready.eq(running & writer.line.ready),
                writer.line.payload.address.eq(target + position(written)),
                writer.line.payload.data.eq(reader.response.payload), writer.line.payload.strobe.eq(-1),
                finished[i].eq((written == count) & writer.idle),
            ]
            with m.If(reader.request.valid & reader.request.ready):
                m.d.sync += asked.eq(asked + 1)
            with m.If(writer.line.valid & writer.line.ready):
                m.d.sync += written.eq(written + 1)
            with m.If(registers.start):
                m.d.sync += [asked.eq(0), written.eq(0)]
            with m.If(registers.counter_select == i):
                m.d.comb += registers.counter.eq(written)

        failed = reads.error | writes.error
        m.d.comb += [
            registers.done.eq(running & finished.all()), registers.idle.eq(reads.quiet & writes.quiet),
            registers.error.eq(failed),
            registers.error_code.eq(Mux(reads.error, reads.error_code, writes.error_code)),
            registers.error_address.eq(Mux(reads.error, reads.error_address, writes.error_address)),
        ]
        with m.If(registers.start):
            m.d.sync += running.eq(1)
        with m.Elif(registers.done | failed | registers.soft_reset):
            m.d.sync += running.eq(0)
        return m


def copy_top_verilog(config: CoreConfig) -> str:
    return verilog.convert(CopyTop(config), name="intrain", emit_src=False)
