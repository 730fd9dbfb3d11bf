"""First in, first out queue of stream items."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Shape, Signal, Value
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .interfaces import NO_BYPASS, data_register

__all__ = ["Fifo", "SHALLOW"]

SHALLOW = 16        # items that a LUT RAM holds


class Fifo(wiring.Component):
    """Queue of items of ``shape``: a memory of ``depth`` items and an output register.

    Its ready, a register, is high whenever fewer than ``depth`` items are held. One item in and one out per cycle (with
    depth 1 every other cycle); latency two cycles, three for more than 16 items: those need block RAM, whose output is
    too late in a cycle for anything but a register, so there are two registers behind each other.

    With ``fall_through`` an item that finds the memory empty goes to the output register at once: latency one cycle.

    No item is read in the cycle in which it is written (amaranth.lib.fifo's queues do not tell synthesis so).

    Attributes
    ----------
    input : In(stream of shape); output : Out(stream of shape).
    level : Out  items held, at most depth + 2.
    clear : In(1)  drops everything held, and an item put in the same cycle.
    """

    def __init__(self, shape, depth: int, *, fall_through: bool = False):
        if depth < 1:
            raise ValueError(f"a queue needs a depth of at least 1, not {depth}")
        if fall_through and depth > SHALLOW:
            raise ValueError(f"only a queue of at most {SHALLOW} items can let them fall through, not one of {depth}")
        self.depth, self.fall_through = depth, fall_through
        super().__init__({"input": In(stream.Signature(shape)), "output": Out(stream.Signature(shape)),
                          "level": Out(range(depth + 3)), "clear": In(1)})

    def elaborate(self, platform):
        m = Module()
        output, payload = self.output, data_register(m, Value.cast(self.output.payload))
        rows = 1 << (self.depth - 1).bit_length()
        attributes = NO_BYPASS | ({"ram_style": "block"} if self.depth > SHALLOW else {})
        m.submodules.memory = memory = Memory(shape=Shape.cast(self.input.payload.shape()).width, depth=rows, init=[],
                                              attrs=attributes)
        write = memory.write_port()
        stored, room, some = Signal(range(self.depth + 1)), Signal(init=1), Signal()
        put, get, free, falls = Signal(), Signal(), Signal(), Signal()
        # The complement of output.valid, so that what moves every bit of the payload has another net than the queue.
        vacant, moves = Signal(init=1), Signal()
        m.d.comb += [
            self.input.ready.eq(room), put.eq(self.input.valid & room & ~falls),
            free.eq(~output.valid | output.ready), moves.eq(vacant | output.ready),
            write.data.eq(self.input.payload),
        ]
        if self.depth <= SHALLOW:
            read = memory.read_port(domain="comb")
            m.d.comb += [get.eq(some & free), self.level.eq(stored + output.valid)]
            # What moves an item's bits looks at no valid, which is late: while there is room, whatever comes is
            # written over the first free row, and counts only once the address goes on.
            m.d.comb += write.en.eq(room)
            first, comes = read.data, some
            if self.fall_through:
                first, comes = Mux(some, read.data, Value.cast(self.input.payload)), some | self.input.valid
                m.d.comb += falls.eq(self.input.valid & ~some & free)
            with m.If(moves):
                m.d.sync += payload.eq(first)
            with m.If(free):
                m.d.sync += [output.valid.eq(comes), vacant.eq(~comes)]
        else:
            read, fetched = memory.read_port(), Signal()
            m.d.comb += [write.en.eq(put), get.eq(some & (~fetched | free)), read.en.eq(get),
                         self.level.eq(stored + fetched + output.valid)]
            with m.If(moves):
                m.d.sync += payload.eq(read.data)
            with m.If(free):
                m.d.sync += [output.valid.eq(fetched), vacant.eq(~fetched), fetched.eq(0)]
            with m.If(get):
                m.d.sync += fetched.eq(1)
            with m.If(self.clear):
                m.d.sync += fetched.eq(0)
        if rows > 1:
            with m.If(put):
                m.d.sync += write.addr.eq(write.addr + 1)
            with m.If(get):
                m.d.sync += read.addr.eq(read.addr + 1)
        with m.If(put & ~get):
            m.d.sync += [stored.eq(stored + 1), some.eq(1), room.eq(stored != self.depth - 1)]
        with m.Elif(get & ~put):
            m.d.sync += [stored.eq(stored - 1), room.eq(1), some.eq(stored != 1)]
        with m.If(self.clear):
            m.d.sync += [write.addr.eq(0), read.addr.eq(0), stored.eq(0), some.eq(0), room.eq(1), output.valid.eq(0),
                         vacant.eq(1)]
        return m
