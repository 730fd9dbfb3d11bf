"""Weight ring: fetches weight tiles ahead of use and shifts them into the array."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .address_stream import AddressStream
from .config import CoreConfig
from .descriptor import WEIGHTS, Mode
from .feeder import FEED_LATENCY
from .interfaces import NO_BYPASS, ReadClient

__all__ = ["weight_command", "WeightRing"]

# tiles: counts of the four tile loops, 0 is the outermost.
weight_command = data.StructLayout({"mode": Mode, "tiles": data.ArrayLayout(16, 4),
                                    "weights": WEIGHTS.layout})


class WeightRing(wiring.Component):
    """Prefetches the weight tiles of product blocks, across blocks, and shifts them into the shadow chain.

    A tile is n rows of ``vector`` bytes, n = columns (FORWARD) or rows (ERROR), in consecutive lines.
    Its first row lies at the tile's address without the offset in a vector; the offset selects the slice
    of ``rows`` (FORWARD) or ``columns`` (ERROR) bytes taken from each row. Rows leave in descending
    order, the last row first.

    Parameters
    ----------
    config : core configuration.
    feed_latency : cycles from ``take`` to the tile's boundary at the array, 2 or 3.

    Attributes
    ----------
    command : In stream of weight_command; released when its last line is requested. GRADIENT has no tiles
        and is taken at once.
    memory : Out(ReadClient), always ready for responses: every requested line has its place in the ring.
    enable : In(1)  the next tile may begin to shift: the array is, or is going to stay, in its mode.
    shift, vector : to the array. A slice fills the low lanes; the others are not specified.
    ready : Out(1)  a tile may be taken from the next cycle on.
    take : In(1)  only while ready for more than a cycle: its boundary reaches the array ``feed_latency`` cycles later.
    busy, stalled_in, stalled_out : Out(1)  for counters: tiles are known that were not taken; the next
        one could shift but has not arrived; one is ready and not taken.

    Timing, with ``take`` in cycle 0: the boundary is at the array in cycle L = feed_latency; the next
    tile's n vectors at the earliest in cycles L + n to L + 2n - 1 (the array's contract,
    docs/core.md); its ``ready`` rises in cycle 2n - 2, so that its boundary may come with its last
    vector. Requests: one per cycle and two idle cycles per command.
    """

    def __init__(self, config: CoreConfig, *, feed_latency: int = FEED_LATENCY):
        if feed_latency not in (2, 3):
            raise ValueError(f"feed_latency must be 2 or 3 cycles, not {feed_latency}")
        self.config = config
        self.feed_latency = feed_latency
        super().__init__({
            "command": In(stream.Signature(weight_command)),
            "memory": Out(ReadClient(config)),
            "enable": In(1), "shift": Out(1), "vector": Out(8 * config.vector),
            "ready": Out(1), "take": In(1),
            "busy": Out(1), "stalled_in": Out(1), "stalled_out": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, command = self.config, self.command.payload
        request, response = self.memory.request, self.memory.response
        narrow = min(config.rows, config.columns)
        narrow_bits, vector_bits = (narrow - 1).bit_length(), (config.vector - 1).bit_length()
        parts = config.vector // narrow
        part_bits = vector_bits - narrow_bits        # may be 0, which a Verilog signal cannot have
        per_line = config.vectors_per_line
        row_bits = (per_line - 1).bit_length()       # of a row's place in its line
        ring_bits = (config.weight_lines - 1).bit_length()
        m.submodules.addresses = addresses = AddressStream(5)
        m.submodules.ram = ram = Memory(shape=config.line_bits, depth=config.weight_lines, init=[], attrs=NO_BYPASS)
        write, read = ram.write_port(), ram.read_port()
        # One record per requested tile that was not shifted; the ring never holds more tiles than this.
        record_layout = data.StructLayout({"forward": 1, "part": max(1, part_bits)})
        m.submodules.records = records = SyncFIFO(width=record_layout.size,
                                                  depth=config.weight_lines // (narrow // per_line))

        def per_mode(forward, value):
            """`value(n)` of a tile with n rows."""
            return Mux(forward, value(config.columns), value(config.rows))

        # Lines `written` to the ring and `freed` in it; `reserved`: requested and not freed, `present`: arrived.
        written, freed = Signal(ring_bits), Signal(ring_bits)
        reserved, present = Signal(ring_bits + 1), Signal(ring_bits + 1)
        requesting, freeing = Signal(), Signal(range(config.vector // per_line + 1))
        m.d.sync += [reserved.eq(reserved + requesting - freeing), present.eq(present + response.valid - freeing)]

        # Requests.
        wanted, item = Signal(record_layout), addresses.item
        m.d.comb += [
            addresses.start.eq(command.weights.address),
            *(addresses.count[k].eq(command.tiles[k]) for k in range(4)),
            *(addresses.stride[k].eq(command.weights[f"stride{k}"]) for k in range(4)),
            addresses.count[4].eq(per_mode(command.mode == Mode.FORWARD, lambda n: n // per_line)),
            addresses.stride[4].eq(config.line_bytes),
            request.valid.eq(item.valid & ~reserved[-1]), item.ready.eq(request.ready & ~reserved[-1]),
            request.payload.eq(item.payload.address[vector_bits + row_bits:]),
            requesting.eq(request.valid & request.ready),
            wanted.forward.eq(command.mode == Mode.FORWARD),
            wanted.part.eq(item.payload.address[narrow_bits:vector_bits]),
        ]
        # A tile's record follows its last request by a cycle, and is there before the lines are.
        recording, recorded = Signal(), Signal(record_layout, reset_less=True)
        m.d.sync += [recording.eq(requesting & item.payload.ends), recorded.eq(wanted)]
        m.d.comb += [records.w_data.eq(recorded), records.w_en.eq(recording)]
        with m.FSM() as fsm:
            with m.State("IDLE"):
                with m.If(self.command.valid):
                    with m.If(command.mode == Mode.GRADIENT):
                        m.d.comb += self.command.ready.eq(1)
                    with m.Else():
                        m.d.comb += addresses.load.eq(1)
                        m.next = "REQUEST"
            with m.State("REQUEST"):
                with m.If(requesting & item.payload.last):
                    m.d.comb += self.command.ready.eq(1)
                    m.next = "IDLE"
        m.d.comb += [response.ready.eq(1), write.en.eq(response.valid), write.data.eq(response.payload),
                     write.addr.eq(written)]
        with m.If(response.valid):
            m.d.sync += written.eq(written + 1)

        # Shifting: `left` counts the rows still to read, `pause` the cycles until the array permits a tile.
        record = data.View(record_layout, records.r_data)
        rows = Signal(range(config.vector + 1))
        lines = Signal(range(config.vector // per_line + 1))
        part = Signal.like(record.part)
        left = Signal(range(config.vector + 1))
        pause = Signal(range(config.vector + self.feed_latency - 3))
        fetching = Signal()
        free, complete = Signal(), Signal()
        start = Signal()
        row = Signal(range(config.vector))
        m.d.comb += [
            fetching.eq(records.r_rdy | recording | fsm.ongoing("REQUEST")),
            start.eq(free & self.enable & complete),
            records.r_en.eq(start),
            row.eq(left - 1), read.addr.eq(freed + row[row_bits:]), read.en.eq(left != 0),
            self.busy.eq(fetching | (left != 0) | self.ready),
            self.stalled_in.eq(fetching & free & self.enable & ~start),
            self.stalled_out.eq(self.ready & ~self.take),
        ]
        # Both as of the cycle before; after a start they are low until the next tile's turn.
        m.d.sync += [
            free.eq((left == 0) & (pause <= 1) & ~self.ready & ~start),
            complete.eq(records.r_rdy & (present >= per_mode(record.forward, lambda n: n // per_line)) & ~start),
        ]
        with m.If(start):
            m.d.sync += [part.eq(record.part), rows.eq(per_mode(record.forward, lambda n: n)),
                         left.eq(per_mode(record.forward, lambda n: n)),
                         lines.eq(per_mode(record.forward, lambda n: n // per_line))]
        with m.Elif(left != 0):
            m.d.sync += left.eq(left - 1)
            with m.If(left == 1):
                m.d.comb += freeing.eq(lines)
                m.d.sync += freed.eq(freed + lines)
        # From a row's read to its arrival at the array pass two cycles; those after `take` count for it.
        with m.If(left == self.feed_latency + 1):
            m.d.sync += self.ready.eq(1)
        with m.Elif(self.take):
            m.d.sync += [self.ready.eq(0), pause.eq(rows + self.feed_latency - 4)]
        with m.Elif(pause != 0):
            m.d.sync += pause.eq(pause - 1)

        # The line is held as it comes, because memory is late; the slice is chosen behind the register.
        choice, chosen = Signal(row_bits + part_bits), Signal(row_bits + part_bits, reset_less=True)
        fetched = Signal()
        m.d.sync += [choice.eq(Cat(part[:part_bits], row[:row_bits])), fetched.eq(left != 0), self.shift.eq(fetched)]
        line_register = Signal(config.line_bits, reset_less=True)
        with m.If(fetched):
            m.d.sync += [line_register.eq(read.data), chosen.eq(choice)]
        vectors = [line_register.word_select(k, 8 * config.vector) for k in range(per_line)]
        m.d.comb += self.vector.eq(Array(vector[8 * narrow * k:] for vector in vectors for k in range(parts))[chosen])
        return m
