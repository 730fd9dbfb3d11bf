"""Max-pooling of consecutive vectors."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["WINDOW", "MaxPool", "pooled"]

WINDOW = 4
"""Vectors of a pooling window: 2 x 2 pixels in row-major order."""


def pooled(lanes: int) -> data.StructLayout:
    """The maxima of a window, lane by lane, and the numbers 0..3 of the vectors that hold them."""
    return data.StructLayout({"value": data.ArrayLayout(signed(32), lanes), "choice": data.ArrayLayout(2, lanes)})


class MaxPool(wiring.Component):
    """Turns every 4 consecutive vectors into their lane-wise maximum and the position of its first occurrence.

    Attributes
    ----------
    input : In stream of ``lanes`` x signed(32). output : Out stream of ``pooled(lanes)``.

    Throughput: one input vector per cycle. Latency: three cycles from the last vector of a window to the result.
    """

    def __init__(self, lanes: int):
        if lanes < 1:
            raise ValueError(f"max-pooling needs at least one lane, not {lanes}")
        self.lanes = lanes
        super().__init__({"input": In(stream.Signature(data.ArrayLayout(signed(32), lanes))),
                          "output": Out(stream.Signature(pooled(lanes)))})

    def elaborate(self, platform):
        m = Module()
        position = Signal(range(WINDOW))
        # `vacant`, the complement of `there`, is what moves every bit of the vector.
        vector, there, vacant = Signal.like(self.input.payload, reset_less=True), Signal(), Signal(init=1)
        best, complete, go = Signal.like(self.output.payload, reset_less=True), Signal(), Signal(init=1)
        # A complete window moves to the output when that is empty, which it is long before the next one is complete.
        # `go`, a register, says that there is no complete window, or an empty output for it; it may be a cycle late, as
        # it does not look at the output's ready.
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
            m.d.sync += position.eq(Mux(position == WINDOW - 1, 0, position + 1))
            for i in range(self.lanes):
                with m.If((position == 0) | (vector[i] > best.value[i])):
                    m.d.sync += [best.value[i].eq(vector[i]), best.choice[i].eq(position)]
        empty = Signal(init=1)       # the complement of output.valid, for the same reason as `vacant`
        with m.If(~self.output.valid):
            m.d.sync += [self.output.valid.eq(complete), empty.eq(~complete)]
        with m.Elif(self.output.ready):
            m.d.sync += [self.output.valid.eq(0), empty.eq(1)]
        with m.If(empty):
            m.d.sync += self.output.payload.eq(best)
        return m
