"""Writes vectors of int8, int16 or int32 elements to memory along five nested loops."""

from __future__ import annotations

from amaranth.hdl import Module, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect

from .address_stream import AddressStream
from .config import CoreConfig
from .fifo import Fifo
from .interfaces import ADDRESS_BITS, WriteClient
from .vector_reader import LEVELS

__all__ = ["VectorWriter"]


class VectorWriter(wiring.Component):
    """Stores one vector per iteration of five nested loops, in parts of L elements.

    Elements must already fit the target's width; higher bits are dropped. Parts must be aligned to their own size.
    Consecutive parts of the same line leave as one write with byte strobes.

    Attributes
    ----------
    start : In(1)  begin at the first iteration; only when ``done``.
    width : In(2)  element size: 0 = one byte, 1 = two, 2 = four. Stable from ``start`` until ``done``.
    count, address, stride : loop counts, first byte address, byte strides; stable like ``width``.
    discard : In(1)  take the vectors, but write nothing. Stable from ``start`` until ``done``.
    vector : In stream of L x signed(32), L = ``config.lanes``. Parts beyond the last iteration are not accepted.
    client : WriteClient.
    done : Out(1)  every vector of the run was handed over to the client (``client.idle`` tells when they are
        acknowledged). High before the first run.

    Throughput: one part per cycle as long as the client accepts lines, the first three cycles after
    ``start``. Latency: a line is offered one cycle after its last part.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            "start": In(1),
            "discard": In(1),
            "width": In(2),
            "count": In(16).array(LEVELS),
            "address": In(ADDRESS_BITS),
            "stride": In(signed(ADDRESS_BITS)).array(LEVELS),
            "vector": In(stream.Signature(data.ArrayLayout(signed(32), config.lanes))),
            "client": Out(WriteClient(config)),
            "done": Out(1, init=1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes, parts = self.config.lanes, self.config.parts
        lane_bits = lanes.bit_length() - 1

        m.submodules.addresses = addresses = AddressStream(LEVELS + (parts > 1))
        if parts > 1:
            stride = Signal(range(4 * lanes + 1), reset_less=True)       # right before the first step
            m.d.sync += stride.eq(lanes << self.width)
            m.d.comb += [addresses.count[LEVELS].eq(parts), addresses.stride[LEVELS].eq(stride)]
        # The place of the next part; the addresses are one ahead, without a gap, so that no comparison delays a part
        # and a line is known to be whole with its last part.
        # The loops stand at their counts and strides, far from the port: a queue makes two steps of the way back.
        m.submodules.places = places = Fifo(addresses.item.payload.shape(), 2, fall_through=True)
        connect(m, addresses.item, places.input)
        out, item = self.client.line, places.output
        following = item.payload.address[lane_bits + 2:]
        line, placed = Signal.like(following), Signal()
        position, final = Signal(2), Signal()
        running, whole, ends, accept, leave = Signal(), Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            addresses.load.eq(self.start), addresses.start.eq(self.address), item.ready.eq(~placed | accept),
            *(addresses.count[k].eq(self.count[k]) for k in range(LEVELS)),
            *(addresses.stride[k].eq(self.stride[k]) for k in range(LEVELS)),
            ends.eq(final | (line != following)), out.valid.eq(whole), leave.eq(whole & out.ready),
            self.vector.ready.eq(placed & (~whole | out.ready)),
            accept.eq(self.vector.valid & self.vector.ready),
        ]
        with m.If(item.ready):
            m.d.sync += [placed.eq(item.valid), line.eq(following), final.eq(item.payload.last),
                         position.eq(item.payload.address[lane_bits:lane_bits + 2])]

        # Which quarters of the line this part covers, and every byte at its place.
        quarters = Signal(4)
        image = Signal(self.config.line_bits)
        with m.Switch(self.width):
            with m.Case(0):
                m.d.comb += quarters.eq(1 << position)
            with m.Case(1):
                m.d.comb += quarters.eq(0b11 << (position & 0b10))
            with m.Default():
                m.d.comb += quarters.eq(0b1111)
        for byte in range(self.config.line_bytes):
            lane = self.vector.payload[byte % lanes]
            half = self.vector.payload[byte // 2 % lanes]
            word = self.vector.payload[byte // 4]
            place = image.word_select(byte, 8)
            with m.Switch(self.width):
                with m.Case(0):
                    m.d.comb += place.eq(lane[:8])
                with m.Case(1):
                    m.d.comb += place.eq(half.as_unsigned().word_select(byte % 2, 8))
                with m.Default():
                    m.d.comb += place.eq(word.as_unsigned().word_select(byte % 4, 8))

        strobes, content = Signal(self.config.line_bytes), Signal(self.config.line_bits, reset_less=True)
        address = Signal.like(line, reset_less=True)
        m.d.comb += [out.payload.address.eq(address), out.payload.data.eq(content), out.payload.strobe.eq(strobes)]
        # What is at the next part's place moves into the line before it is valid: the enable does not look at that.
        for q in range(4):
            with m.If(self.vector.ready & quarters[q]):
                m.d.sync += content.word_select(q, 8 * lanes).eq(image.word_select(q, 8 * lanes))
        with m.If(leave):
            m.d.sync += [whole.eq(0), strobes.eq(0)]
            with m.If(~running):
                m.d.sync += self.done.eq(1)
        with m.If(accept):
            m.d.sync += [whole.eq(ends & ~self.discard), address.eq(line)]
            for q in range(4):
                with m.If(quarters[q] & ~self.discard):
                    m.d.sync += strobes.word_select(q, lanes).eq((1 << lanes) - 1)
            with m.If(final):
                m.d.sync += [running.eq(0), self.done.eq(self.discard)]
        with m.If(self.start):
            m.d.sync += [running.eq(1), self.done.eq(0)]
        return m
