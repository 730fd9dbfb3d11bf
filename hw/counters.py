"""Performance counters: how many cycles each event was high since the doorbell."""

from __future__ import annotations

from amaranth.hdl import Array, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .register_map import COUNTER_BITS, MAX_COUNTERS

__all__ = ["Counters"]


class Counters(wiring.Component):
    """One counter per event.

    Registers only hold what has been counted since a counter's last turn; in its turn, once in as many cycles as there
    are counters (rounded up to a power of two), that goes to a memory. One adder serves all of them.

    Parameters
    ----------
    names : events, in the order of the counters, at most 64.

    Attributes
    ----------
    NAME : In(1)  for each event: its counter grows, two cycles later, by one for every cycle in which it is high.
    clear : In(1)  zeroes all.
    select : In  number of the counter to show. count : Out(48)  its value two cycles before; 0 if there is none.
    """

    def __init__(self, names):
        self.names = tuple(names)
        if not 1 <= len(self.names) <= MAX_COUNTERS:
            raise ValueError(f"there are 1 to {MAX_COUNTERS} performance counters, not {len(self.names)}")
        super().__init__({**{name: In(1) for name in self.names}, "clear": In(1), "select": In(range(MAX_COUNTERS)),
                          "count": Out(COUNTER_BITS)})

    def elaborate(self, platform):
        m = Module()
        slots = 1 << max(1, (len(self.names) - 1).bit_length())
        m.submodules.memory = memory = Memory(shape=COUNTER_BITS, depth=slots, init=[])
        write, old, chosen = memory.write_port(), memory.read_port(domain="comb"), memory.read_port(domain="comb")

        turn = Signal(range(slots))
        fresh = Signal(slots, init=-1)          # counters whose word in memory is of before the last clearing
        recent = [Signal(range(slots + 1), name=f"{name}_recent") for name in self.names]
        for k, (name, count) in enumerate(zip(self.names, recent, strict=True)):
            happened = Signal(name=f"{name}_happened")
            m.d.sync += [happened.eq(getattr(self, name)), count.eq(Mux(turn == k, happened, count + happened))]
            with m.If(self.clear):
                m.d.sync += count.eq(0)
        counts = Array([*recent, *[Const(0, 1)] * (slots - len(recent))])

        # In its turn a counter's word is read, in the next cycle it is written.
        before, total = Signal(COUNTER_BITS), Signal(COUNTER_BITS)
        more, slot = Signal(range(slots + 1)), Signal.like(turn)
        m.d.comb += [old.addr.eq(turn), total.eq(before + more), write.addr.eq(slot), write.data.eq(total),
                     write.en.eq(1)]
        m.d.sync += [turn.eq(turn + 1), slot.eq(turn), more.eq(counts[turn]),
                     before.eq(Mux(fresh.bit_select(turn, 1), 0, old.data)),
                     fresh.eq(Mux(self.clear, Const(-1, slots), fresh & ~(1 << turn)))]

        index, base, extra = self.select[:len(turn)], Signal(COUNTER_BITS), Signal(range(slots + 1))
        none = self.select >= len(self.names)
        m.d.comb += chosen.addr.eq(index)
        # Masked, not chosen: synthesis would make the choice of 0 a reset, which is late.
        known = ~(none | fresh.bit_select(index, 1))
        m.d.sync += [base.eq(Mux(slot == index, total, chosen.data) & known.replicate(COUNTER_BITS)),
                     extra.eq(Mux(none, 0, counts[index])), self.count.eq(base + extra)]
        return m
