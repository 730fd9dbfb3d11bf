"""Reads vectors of int8, int16 or int32 elements from memory along five nested loops."""

from __future__ import annotations

from functools import reduce
from operator import or_

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out, connect

from .address_stream import AddressStream
from .config import CoreConfig
from .fifo import Fifo
from .interfaces import ADDRESS_BITS, ReadClient, data_register
from .skid_buffer import SkidBuffer

__all__ = ["LEVELS", "VectorReader"]

LEVELS = 5


class VectorReader(wiring.Component):
    """One vector, sign-extended to 32 bits per element, per iteration of five nested loops, in parts of L elements.

    An element has 1, 2 or 4 bytes, so a part fills a quarter, a half or all of a line and must be aligned
    to its own size; lower address bits are ignored. A line is requested only when it differs from the line of
    the part before, so loops with stride 0 and sequential narrow vectors cost no extra memory traffic.

    Parameters
    ----------
    config : the core; L = ``config.lanes``.
    ahead : parts by which requests may run ahead of the vectors; covers the memory's latency in cycles.

    Attributes
    ----------
    start : In(1)  begin at the first iteration; only when the vectors of the previous run were all taken.
    width : In(2)  element size: 0 = one byte, 1 = two, 2 = four. Stable from ``start`` to the last vector.
    count, address, stride : loop counts, first byte address, byte strides; stable like ``width``.
    single : In(1)  only the first part of each vector; stable like ``width``.
    client : ReadClient; responses wait in the memory port, so only ``request.ready`` limits the requests.
    vector : Out stream of L x signed(32).

    Throughput: one part and at most one request per cycle. Latency: first request five cycles after
    ``start``, a vector one cycle after the response it needs.
    """

    def __init__(self, config: CoreConfig, *, ahead: int = 256):
        if ahead < 2:
            raise ValueError(f"a vector reader must run ahead by at least 2 parts, not {ahead}")
        self.config = config
        self.ahead = ahead
        super().__init__({
            "start": In(1),
            "width": In(2),
            "count": In(16).array(LEVELS),
            "address": In(ADDRESS_BITS),
            "stride": In(signed(ADDRESS_BITS)).array(LEVELS),
            "single": In(1),
            "client": Out(ReadClient(config)),
            "vector": Out(stream.Signature(data.ArrayLayout(signed(32), config.lanes))),
        })

    def elaborate(self, platform):
        m = Module()
        lanes, parts = self.config.lanes, self.config.parts
        lane_bits = lanes.bit_length() - 1

        # Address side: request lines, note for each part where it lies.
        m.submodules.addresses = addresses = AddressStream(LEVELS + (parts > 1))
        if parts > 1:
            stride = Signal(range(4 * lanes + 1), reset_less=True)       # right before the first step
            m.d.sync += stride.eq(lanes << self.width)
            m.d.comb += [addresses.count[LEVELS].eq(Mux(self.single, 1, parts)), addresses.stride[LEVELS].eq(stride)]
        # The part whose request is next, and the one after it, which the addresses, without a gap, give in time. Its
        # line is compared as it comes, in small groups of bits; what they say is put together when it moves up.
        place = data.StructLayout({"quarter": 2, "ends": 1})       # ends: the next part is not of this line
        m.submodules.notes = notes = Fifo(place, self.ahead)
        # Whether a part is taken is late, so the queue does not look at it.
        m.submodules.notes_buffer = noted = SkidBuffer(place)
        connect(m, notes.output, noted.input)
        # The loops stand at their counts and strides, far from the port: a queue makes two steps of the way back.
        m.submodules.places = places = Fifo(addresses.item.payload.shape(), 2, fall_through=True)
        connect(m, addresses.item, places.input)
        issued, item = Signal(), places.output
        part = data.StructLayout({"quarter": 2, "line": ADDRESS_BITS - lane_bits - 2})
        this, following = Signal(part), Signal(part)
        # This part is there; it is not of the line before it; it is the last of all.
        waiting, fresh, final = Signal(), Signal(), Signal()
        comes, comes_first, comes_last = Signal(), Signal(), Signal()       # the next is there; is the first, the last
        coming = data.View(part, item.payload.address[lane_bits:])
        groups = [slice(k, k + 2) for k in range(0, len(this.line), 2)]
        differs, other_line = Signal(len(groups)), Signal()      # the following part's line from that before it
        m.d.comb += [
            addresses.load.eq(self.start), addresses.start.eq(self.address), item.ready.eq(~waiting | issued),
            *(addresses.count[k].eq(self.count[k]) for k in range(LEVELS)),
            *(addresses.stride[k].eq(self.stride[k]) for k in range(LEVELS)),
            other_line.eq(differs.any()), self.client.request.valid.eq(waiting & notes.input.ready & fresh),
            self.client.request.payload.eq(this.line),
            issued.eq(waiting & notes.input.ready & (~fresh | self.client.request.ready)),
            notes.input.valid.eq(issued), notes.input.payload.quarter.eq(this.quarter),
            notes.input.payload.ends.eq(final | other_line),
        ]
        with m.If(item.ready):
            m.d.sync += [
                comes.eq(item.valid), following.eq(coming), comes_first.eq(item.payload.first),
                comes_last.eq(item.payload.last),
                *(differs[k].eq(following.line[group] != coming.line[group]) for k, group in enumerate(groups)),
                waiting.eq(comes), this.eq(following), final.eq(comes_last), fresh.eq(comes_first | other_line),
            ]

        # Data side: vectors are cut out of the response, which is taken with the last of them.
        response, note = self.client.response, noted.output.payload
        current = response.payload
        vector = data_register(m, self.vector.payload)
        cutting, ends = Signal(), Signal()       # a vector is to come out of the response; it is the last
        # What it is: one of four quarters of bytes, one of two halves of 16-bit elements, or the whole line.
        quarters, halves, whole = Signal(4), Signal(2), Signal()
        free, take = Signal(), Signal()
        m.d.comb += [
            free.eq(~self.vector.valid | self.vector.ready), noted.output.ready.eq(take),
            take.eq(~cutting | (response.valid & free)), response.ready.eq(cutting & ends & free),
        ]
        with m.If(take):
            m.d.sync += [
                cutting.eq(noted.output.valid), ends.eq(note.ends), whole.eq(self.width == 2),
                *(quarters[k].eq((self.width == 0) & (note.quarter == k)) for k in range(4)),
                *(halves[k].eq((self.width == 1) & (note.quarter[1] == k)) for k in range(2)),
            ]
        # The complement of vector.valid, so that what moves every bit of the vector has another net than the rest.
        vacant = Signal(init=1)
        with m.If(free):
            m.d.sync += [self.vector.valid.eq(cutting & response.valid), vacant.eq(~(cutting & response.valid))]
        with m.If(vacant | self.vector.ready):

            def chosen(flags, i, bits):
                """The element of lane i, in parts of which one is flagged; 0 where none is."""
                parts = [current.word_select(k * lanes + i, bits) & flag.replicate(bits)
                         for k, flag in enumerate(flags)]
                return reduce(or_, parts).as_signed()

            for i in range(lanes):
                m.d.sync += vector[i].eq(chosen(quarters, i, 8) | chosen(halves, i, 16)
                                         | chosen([whole], i, 32))
        return m
