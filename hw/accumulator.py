"""Below the array: sums over several tiles, and the queue of finished results."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .interfaces import NO_BYPASS, data_register

__all__ = ["Accumulator", "AccumulatorColumn", "REUSE", "control_layout"]

SUM_BITS = 32
# A column's pipeline: read the entry, clear or register it, add, write.
CLEAR, WRITE = 1, 3
REUSE = WRITE + 1      # cycles until an entry may be used again


def control_layout(config: CoreConfig) -> data.StructLayout:
    """The word that accompanies each vector of sums: what the accumulator does with it.

    valid : there is a vector. index : entry to add to. init : start from zero. final : the sum is a result.
    """
    return data.StructLayout({"valid": 1, "index": (config.accumulator_entries - 1).bit_length(),
                              "init": 1, "final": 1})


class AccumulatorColumn(wiring.Component):
    """Memory, adder and result memory of one column.

    The sum of the data of cycle t is written at t + 3; the entry may be read again at t + 4.

    Attributes
    ----------
    data : In(signed(32)); index : In  entry to read, in the same cycle.
    init : In(1)  one cycle later.
    write, write_index, final, slot : In  three cycles later; where the sum goes.
    overflow : Out(1)  with ``write``: the sum wrapped.
    read_slot : In  result : Out(signed(32))  the result that was there, one cycle later.
    """

    def __init__(self, config: CoreConfig):
        self.entries, self.result_entries = config.accumulator_entries, config.result_entries
        super().__init__({
            "data": In(signed(SUM_BITS)), "index": In(range(self.entries)), "init": In(1),
            "write": In(1), "write_index": In(range(self.entries)),
            "final": In(1), "slot": In(range(self.result_entries)), "overflow": Out(1),
            "read_slot": In(range(self.result_entries)), "result": Out(signed(SUM_BITS)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.entries = entries = Memory(shape=signed(SUM_BITS), depth=self.entries, init=[], attrs=NO_BYPASS)
        m.submodules.results = results = Memory(shape=signed(SUM_BITS), depth=self.result_entries, init=[],
                                                attrs=NO_BYPASS)
        read, write = entries.read_port(), entries.write_port()
        fetch, deliver = results.read_port(), results.write_port()

        def register(name):
            return Signal(signed(SUM_BITS), name=name, reset_less=True)

        # The memory's output is slow, so it is registered before the adder.
        data0, data1, entry, total = (register(name) for name in ("data0", "data1", "entry", "sum"))
        following, wrapped = Signal(signed(SUM_BITS)), Signal(reset_less=True)
        m.d.comb += [read.addr.eq(self.index), read.en.eq(1), following.eq(entry + data1)]
        m.d.sync += [
            data0.eq(self.data), data1.eq(data0), entry.eq(Mux(self.init, 0, read.data)), total.eq(following),
            # Both operands have one sign and the sum has the other.
            wrapped.eq((entry[-1] == data1[-1]) & (entry[-1] != following[-1])),
        ]
        m.d.comb += self.overflow.eq(wrapped & self.write)
        m.d.comb += [
            write.addr.eq(self.write_index), write.data.eq(total), write.en.eq(self.write),
            deliver.addr.eq(self.slot), deliver.data.eq(total), deliver.en.eq(self.write & self.final),
            fetch.addr.eq(self.read_slot), fetch.en.eq(1), self.result.eq(fetch.data),
        ]
        return m


class Accumulator(wiring.Component):
    """Adds the array's sums to entries of one memory per column and queues the finished ones.

    Column j works j cycles after column 0, as its data arrive, with the same control word: nothing is deskewed.
    A result line is whole when the last column has written it. One vector per cycle.

    The user guarantees: the same ``index`` at the earliest REUSE cycles later (an entry's sum is written in the
    fourth cycle), and a reserved place for every ``final`` vector, so the array never has to wait.

    Parameters
    ----------
    config : gives ``columns``, ``accumulator_entries`` and ``result_entries``.

    Attributes
    ----------
    control : In(control_layout(config))  accompanies column 0 of ``data``.
        entry[index] = (init ? 0 : entry[index]) + data; with ``final`` the sum is a result as well.
    data : In(32 C bits)  array of signed sums; column j is j cycles late.
    result : Out(stream of 32 C bits)  vectors in the order of their control words, one per cycle, or one in two cycles
        where a vector is longer than a line;
        the first C + 5 cycles after its control word.
    reserve : In(1)  takes one place; legal while ``room`` is not 0.
    room : Out(range(result_entries + 1))  places neither reserved nor taken, as of the cycle before; one that is
        vacated counts a cycle later.
    overflow : Out(1)  pulse: a sum left the range of int32 (contract section 1: an error; the sum wraps).
    busy : Out(1)  a control word is on its way; low: all sums have landed and any overflow was reported.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            "control": In(control_layout(config)),
            "data": In(data.ArrayLayout(signed(SUM_BITS), config.columns)),
            "result": Out(stream.Signature(SUM_BITS * config.columns)),
            "reserve": In(1), "room": Out(range(config.result_entries + 1)),
            "overflow": Out(1), "busy": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        columns, places = self.config.columns, self.config.result_entries

        # words[k]: the control word k cycles late, with the place of its result. Column j does step s at j + s.
        slot = Signal(range(places))
        with m.If(self.control.valid & self.control.final):
            m.d.sync += slot.eq(slot + 1)
        members = {name: field.shape for name, field in self.control.shape()} | {"slot": slot.shape()}
        words = [Signal(data.StructLayout(members), name=f"word{k}") for k in range(columns + WRITE)]
        m.d.comb += words[0].eq(Cat(self.control, slot))
        for earlier, later in zip(words, words[1:], strict=False):
            m.d.sync += later.eq(earlier)

        read_slot = Signal(range(places))
        overflows, results = [], []
        for j in range(columns):
            column = AccumulatorColumn(self.config)
            m.submodules[f"column{j}"] = column
            written = words[j + WRITE]
            m.d.comb += [
                column.data.eq(self.data[j]), column.index.eq(words[j].index),
                column.init.eq(words[j + CLEAR].init), column.write.eq(written.valid),
                column.write_index.eq(written.index), column.final.eq(written.final),
                column.slot.eq(written.slot),
                column.read_slot.eq(read_slot),
            ]
            results.append(column.result)
            overflows.append(column.overflow)
        reporting = Signal()
        m.d.sync += [self.overflow.eq(Cat(overflows).any()), reporting.eq(words[-1].valid)]
        m.d.comb += self.busy.eq(Cat(word.valid for word in words).any() | reporting)

        # The result memories' outputs are slow and have a register behind them: the stream's payload. While a line
        # waits for it, its place is read again and again and stays taken. What is late, `free`, only chooses.
        landed, fetch, fetched, moved = Signal(), Signal(), Signal(), Signal()
        lines, present = Signal(range(places + 1)), Signal()           # landed and not fetched; not 0
        next_slot, held_slot = Signal.like(read_slot), Signal.like(read_slot)
        room, vacated = Signal(range(places + 1), init=places), Signal()
        # A result that leaves in two lines takes two cycles, so its successor need not come in the next one.
        at_once = self.result.ready if self.config.result_lines == 1 else 0
        free = ~self.result.valid | at_once
        m.d.comb += [
            landed.eq(words[-1].valid & words[-1].final), fetch.eq(present & (~fetched | free)),
            moved.eq(fetched & free), read_slot.eq(Mux(fetched & ~free, held_slot, next_slot)), self.room.eq(room),
        ]
        m.d.sync += [
            lines.eq(Mux(fetch, lines + landed - 1, lines + landed)),
            present.eq(landed | (lines > 1) | ((lines == 1) & ~fetch)),
            vacated.eq(moved), room.eq(room - self.reserve + vacated),
        ]
        with m.If(fetch):
            m.d.sync += [next_slot.eq(next_slot + 1), held_slot.eq(next_slot), fetched.eq(1)]
        with m.Elif(free):
            m.d.sync += fetched.eq(0)
        result = data_register(m, self.result.payload)
        # The complement of result.valid, so that what moves every bit of a line has another net than the rest.
        vacant = Signal(init=1)
        with m.If(self.result.valid & self.result.ready):
            m.d.sync += [self.result.valid.eq(0), vacant.eq(1)]
        with m.If(free):
            m.d.sync += [self.result.valid.eq(fetched), vacant.eq(~fetched)]
        with m.If(vacant | at_once):
            m.d.sync += result.eq(Cat(results))
        return m
