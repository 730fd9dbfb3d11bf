"""One folding unit for both operand buffers, with the raw lines that wait for it."""

from __future__ import annotations

from amaranth.hdl import Array, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .descriptor import LOAD
from .fifo import Fifo
from .fold import Fold

__all__ = ["FOLD_LINES", "FoldClient", "SharedFold"]

FOLD_LINES = 16
"""Raw lines requested ahead of the folding unit, which takes a line in as many cycles as it has bytes."""


class FoldClient(wiring.Signature):
    """A load that is folded, from the operand buffer's point of view.

    wanted : Out  the unit is asked for, from before the load until its end. granted : In  it is this client's.
    start : Out  with ``granted``: begin. settings : Out(LOAD.layout), held while ``wanted``.
    raw : Out  a line, if valid; it is taken in that cycle. At most FOLD_LINES that were not ``taken``.
    taken : In  a raw line has left the queue. packed : In  a packed line, if valid, only in that cycle.
    busy : In  as :class:`hw.fold.Fold` has it.
    """

    def __init__(self, config: CoreConfig):
        line = data.StructLayout({"valid": 1, "data": config.line_bits})
        super().__init__({
            "wanted": Out(1), "granted": In(1), "start": Out(1), "settings": Out(LOAD.layout),
            "raw": Out(line), "taken": In(1), "packed": In(line), "busy": In(1),
        })


class SharedFold(wiring.Component):
    """Gives the folding unit to one of two operand buffers for the length of a load; the first goes first.

    A layer folds one of its operands in a pass, so they rarely ask at the same time. A load that has begun ends without
    the other buffer, so neither waits for ever.

    Attributes
    ----------
    clients : In(FoldClient).array(2).
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({"clients": In(FoldClient(config)).array(2)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.fold = fold = Fold(self.config)
        m.submodules.raw = raw = Fifo(self.config.line_bits, FOLD_LINES)
        owner, owned = Signal(), Signal()
        first = Signal(init=1)       # the complement of `owner`, so that not every bit of a line hangs on its net
        # A line rests in a register before the queue, which is far from memory.
        came, arrived = Signal(), Signal(self.config.line_bits, reset_less=True)
        m.d.sync += [came.eq(0), arrived.eq(Mux(first, self.clients[0].raw.data, self.clients[1].raw.data))]
        taken, wanted = Signal(), Array(client.wanted for client in self.clients)
        with m.If(~owned):
            m.d.sync += [owned.eq(wanted[0] | wanted[1]), owner.eq(~wanted[0]), first.eq(wanted[0])]
        with m.Elif(~wanted[owner]):
            m.d.sync += owned.eq(0)

        m.d.comb += [
            fold.settings.eq(Mux(owner, self.clients[1].settings, self.clients[0].settings)),
            raw.input.valid.eq(came), raw.input.payload.eq(arrived),
            fold.line.valid.eq(raw.output.valid), fold.line.payload.eq(raw.output.payload),
            raw.output.ready.eq(fold.line.ready | ~fold.busy),       # lines after the last row are dropped
            taken.eq(raw.output.valid & raw.output.ready), fold.packed.ready.eq(1),
        ]
        for k, client in enumerate(self.clients):
            mine = owned & (owner == k)
            m.d.comb += [client.granted.eq(mine), client.taken.eq(mine & taken), client.busy.eq(mine & fold.busy),
                         client.packed.valid.eq(mine & fold.packed.valid),
                         client.packed.data.eq(fold.packed.payload)]
            with m.If(mine):
                m.d.comb += fold.start.eq(client.start)
                m.d.sync += came.eq(client.raw.valid)
        return m
