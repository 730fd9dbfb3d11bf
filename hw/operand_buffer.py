"""Operand buffer: two banks of lines between memory and one edge of the array."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .address_stream import AddressStream
from .config import CoreConfig
from .descriptor import LOAD
from .interfaces import NO_BYPASS, ReadClient, data_register
from .shared_fold import FOLD_LINES, FoldClient

__all__ = ["OperandBuffer"]

class OperandBuffer(wiring.Component):
    """Loads blocks of an operand into two banks by turns and serves slices of the current one.

    A load brings ``lines`` consecutive lines for each run of each plane (descriptor section ``load``),
    stored one after the other from line 0 of a bank; with ``fold`` the packed lines of :class:`hw.fold.Fold`
    are stored instead. ``advance`` makes the next load's bank current, also before that load has begun (by at
    most 8 loads), and frees the one before. At most one load runs ahead of the current one; two before
    the first ``advance``.

    The compiler keeps loads within ``buffer_lines``; lines beyond overwrite line 0 of the same bank.

    Parameters
    ----------
    config : core configuration.
    lanes : bytes of a slice: the array's rows or columns.

    Attributes
    ----------
    command : In stream of LOAD.layout; enable = 0 is taken at once and changes nothing. Released when
        complete.
    memory : Out(ReadClient), always ready for responses. fold : Out(FoldClient).
    advance : In(1)  takes effect in the next cycle.
    address : In(16)  slice address: line * (line_bytes / lanes) + slice in line.
    load, wanted : In(1)  takes the address; without ``wanted`` there is nothing to fetch from it.
    available : Out(1)  the slice at the address taken last has arrived, or is not wanted (registered). Low for a wanted
        one before the first ``advance``. High from an ``advance``, which forgets the address, to the next ``load``,
        which comes in a later cycle.
    read : In(1)  fetches the slice at the address taken last; ``data`` holds it two cycles later.
    data : Out(8 * lanes)
    busy, stalled_in, stalled_out : Out(1)  for counters: a load is in progress; it waits for memory; a
        load waits for a free bank.

    One request, one written line and one slice per cycle.
    """

    def __init__(self, config: CoreConfig, lanes: int):
        if lanes not in (config.rows, config.columns):
            raise ValueError(f"an operand buffer of core {config.name!r} has {config.rows} or "
                             f"{config.columns} lanes, not {lanes}")
        self.config = config
        self.lanes = lanes
        super().__init__({
            "command": In(stream.Signature(LOAD.layout)),
            "memory": Out(ReadClient(config)), "fold": Out(FoldClient(config)),
            "advance": In(1), "address": In(16), "load": In(1), "wanted": In(1),
            "read": In(1),
            "available": Out(1), "data": Out(8 * lanes),
            "busy": Out(1), "stalled_in": Out(1), "stalled_out": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, load, fold = self.config, self.command.payload, self.fold
        request, response = self.memory.request, self.memory.response
        line_bits = (config.line_bytes - 1).bit_length()
        index_bits = (config.buffer_lines - 1).bit_length()
        m.submodules.addresses = addresses = AddressStream(3)
        m.submodules.ram = ram = Memory(shape=config.line_bits, depth=2 * config.buffer_lines, init=[],
                                        attrs=NO_BYPASS)
        write, read = ram.write_port(), ram.read_port()

        item = addresses.item
        # The loops start by what decides; the rest, which has more readers, by a register: the first cycle of LOAD.
        starts, begin = Signal(), Signal()
        folds = Signal()         # load.fold for what works on lines; it is right from the load's first cycle
        plain = Signal(init=1)   # its complement, so that not every bit of a line hangs on its net
        m.d.sync += [folds.eq(load.fold), plain.eq(~load.fold)]
        m.d.comb += [
            addresses.load.eq(starts), fold.start.eq(begin & load.fold),
            addresses.count[0].eq(load.tiles), addresses.count[1].eq(load.runs), addresses.count[2].eq(load.lines),
            addresses.start.eq(load.address), addresses.stride[0].eq(load.tile_stride),
            addresses.stride[1].eq(load.run_stride), addresses.stride[2].eq(config.line_bytes),
            request.payload.eq(item.payload.address[line_bits:]), response.ready.eq(1),
            fold.settings.eq(load), fold.raw.data.eq(response.payload),
            fold.raw.valid.eq(response.valid & folds),
        ]

        # Bank accounting. `lead` is the number of loads begun minus the number of advances: 0 = the latest
        # load is current, 1 = it runs ahead of the current one, below 0 = the current one has not begun.
        lead = Signal(signed(5))
        fresh = Signal(init=1)
        current = Signal(init=1)
        target = Signal()
        bank_free = Signal(init=1)                           # true a cycle late, false before the next load
        m.d.sync += [begin.eq(starts), lead.eq(Mux(begin ^ self.advance, Mux(begin, lead + 1, lead - 1), lead)),
                     bank_free.eq((lead <= fresh) & ~begin)]
        with m.If(self.advance):
            m.d.sync += [current.eq(~current), fresh.eq(0)]

        # Loading. `arrived` comes a cycle late, so a load ends when its last line is surely written or folded.
        level = Signal(range(config.buffer_lines + 1))       # lines written by the latest load
        outstanding = Signal(16)                             # lines requested and not yet known to have arrived
        arrived = Signal()
        m.d.sync += arrived.eq(Mux(folds, fold.taken, response.valid))
        # A line is written a cycle after it came, which is before its slices are known to be there.
        comes = Signal()
        line_written = data_register(m, write.data)
        m.d.comb += comes.eq(Mux(folds, fold.packed.valid, response.valid))
        m.d.sync += [write.en.eq(comes), write.addr.eq(Cat(level[:index_bits], target)),
                     line_written.eq(Mux(plain, response.payload, fold.packed.data))]
        # Places of the queue before the folding unit, less those that requested lines need: all in a plain load.
        places = Signal(range(FOLD_LINES + 1), init=FOLD_LINES)
        place = Signal(init=1)                               # places != 0
        with m.If(folds):
            m.d.sync += [places.eq(places - (request.valid & request.ready) + arrived),
                         place.eq((places > 1) | (place & ~(request.valid & request.ready)) | arrived)]
        m.d.comb += [request.valid.eq(item.valid & place), item.ready.eq(request.ready & place)]
        m.d.sync += outstanding.eq(outstanding + (request.valid & request.ready) - arrived)
        with m.If(begin):
            m.d.sync += level.eq(0)
        with m.Elif(comes & (level != config.buffer_lines)):
            m.d.sync += level.eq(level + 1)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += fold.wanted.eq(self.command.valid & load.enable & load.fold & bank_free)
                with m.If(self.command.valid & ~load.enable):
                    m.d.comb += self.command.ready.eq(1)
                with m.Elif(self.command.valid & bank_free & (fold.granted | ~load.fold)):
                    m.d.comb += starts.eq(1)
                    m.next = "LOAD"
                with m.Else():
                    m.d.comb += self.stalled_out.eq(self.command.valid)
            with m.State("LOAD"):
                m.d.comb += [self.busy.eq(1), self.stalled_in.eq((outstanding != 0) & ~response.valid & ~fold.taken),
                             fold.wanted.eq(load.fold)]
                with m.If(~begin & ~item.valid & (outstanding == 0) & ~fold.busy):
                    m.d.comb += self.command.ready.eq(1)
                    m.d.sync += target.eq(~target)
                    m.next = "IDLE"

        # Serving. Whether the next slice has arrived is known for both addresses before the late `load` chooses one.
        slices = config.line_bytes // self.lanes
        slice_bits = (slices - 1).bit_length()
        held = Signal(16)
        line = held[slice_bits:][:index_bits]

        def arrived_by_now(address):
            return ~fresh & ((lead > 0) | ((lead == 0) & ((address[slice_bits:][:index_bits] < level) | ~self.busy)))

        held_wanted = Signal()
        with m.If(self.load):
            m.d.sync += [held.eq(self.address), held_wanted.eq(self.wanted)]
        m.d.sync += self.available.eq(self.advance | Mux(self.load, arrived_by_now(self.address) | ~self.wanted,
                                                         arrived_by_now(held) | ~held_wanted))
        with m.If(self.advance):
            m.d.sync += held_wanted.eq(0)
        m.d.comb += [read.addr.eq(Cat(line, current)), read.en.eq(1)]
        # The line is held as it comes, because memory is late; the slice is chosen behind the register.
        choice, chosen = Signal(slice_bits), Signal(slice_bits, reset_less=True)
        fetched = Signal()
        m.d.sync += [choice.eq(held[:slice_bits]), fetched.eq(self.read)]
        line_register = Signal(config.line_bits, reset_less=True)
        with m.If(fetched):
            m.d.sync += [line_register.eq(read.data), chosen.eq(choice)]
        m.d.comb += self.data.eq(Array(line_register.word_select(k, 8 * self.lanes) for k in range(slices))[chosen])
        return m
