"""Max-pooling of consecutive vectors."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, Value, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .interfaces import data_register

__all__ = ["WINDOW", "MaxPool", "pooled"]

WINDOW = 4
"""Vectors of a pooling window: 2 x 2 pixels in row-major order."""


def pooled(lanes: int) -> data.StructLayout:
    """The maxima of a window, lane by lane, and the numbers 0..3 of the vectors that hold them."""
    return data.StructLayout({"value": data.ArrayLayout(signed(32), lanes), "choice": data.ArrayLayout(2, lanes)})


class MaxPool(wiring.Component):
    """Turns every 4 consecutive vectors into their lane-wise maximum and the position of its first occurrence.

    Parameters
    ----------
    lanes : elements per cycle.
    parts : parts of ``lanes`` elements in which a vector comes, one after the other, and a result leaves: 1 or 2.

    Attributes
    ----------
    input : In stream of ``lanes`` x signed(32). output : Out stream of ``pooled(lanes)``.

    Throughput: one part per cycle, but a window of two parts takes 10 cycles: results leave every other. Latency: three
    cycles from the last vector of a window to the result.
    """

    def __init__(self, lanes: int, parts: int = 1):
        if lanes < 1:
            raise ValueError(f"max-pooling needs at least one lane, not {lanes}")
        if parts not in (1, 2):
            raise ValueError(f"max-pooling takes vectors in 1 or 2 parts, not {parts}")
        self.lanes, self.parts = lanes, parts
        super().__init__({"input": In(stream.Signature(data.ArrayLayout(signed(32), lanes))),
                          "output": Out(stream.Signature(pooled(lanes)))})

    def elaborate(self, platform):
        m = Module()
        count, opens = Signal(range(WINDOW * self.parts)), Signal(init=1)      # opens: at the first vector of a window
        position = count >> self.parts - 1
        # `vacant`, the complement of `there`, is what moves every bit of the vector.
        vector, there, vacant = Signal.like(self.input.payload, reset_less=True), Signal(), Signal(init=1)
        best = [Signal(self.output.payload.shape(), name=f"best{k}", reset_less=True) for k in range(self.parts)]
        complete, go = Signal(), Signal(init=1)
        # Of `best` the first is that of the last part, the last that of the part at hand. A complete window moves to
        # the output when that is empty, which it is long before the next one is complete. `go`, a register, says that
        # there is no complete window, or an empty output for it; it may be a cycle late, as it does not look at the
        # output's ready.
        full = Signal()
        m.d.comb += [full.eq(there & (position == WINDOW - 1)), self.input.ready.eq(~there | go)]
        m.d.sync += go.eq(~Mux(go, full & (complete | self.output.valid), self.output.valid))
        with m.If(self.input.ready):
            m.d.sync += [there.eq(self.input.valid), vacant.eq(~self.input.valid)]
        with m.If(vacant | go):
            m.d.sync += vector.eq(self.input.payload)
        with m.If(go):
            m.d.sync += complete.eq(full)
        with m.If(there & go):
            m.d.sync += [count.eq(count + 1), opens.eq((count + 1)[self.parts - 1:][:2] == 0), best[0].eq(best[-1]),
                         *(after.eq(before) for before, after in zip(best, best[1:], strict=False))]
            for i in range(self.lanes):
                lead = Signal(signed(33), name=f"lead{i}")      # its sign is at hand sooner than a comparison
                m.d.comb += lead.eq(best[-1].value[i] - vector[i])
                with m.If(opens | lead[-1]):
                    m.d.sync += [best[0].value[i].eq(vector[i]), best[0].choice[i].eq(position)]
        payload = data_register(m, Value.cast(self.output.payload))
        empty = Signal(init=1)       # the complement of output.valid, for the same reason as `vacant`
        with m.If(~self.output.valid):
            m.d.sync += [self.output.valid.eq(complete), empty.eq(~complete)]
        with m.Elif(self.output.ready):
            m.d.sync += [self.output.valid.eq(0), empty.eq(1)]
        with m.If(empty):
            m.d.sync += payload.eq(best[0])
        return m
