"""Merges consecutive lines into bursts."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .axi import PAGE_BYTES
from .config import CoreConfig
from .interfaces import line_address_bits

__all__ = ["BURST_LINES", "burst_layout", "line_layout", "Coalescer"]

BURST_LINES = 16


def burst_layout(config: CoreConfig) -> data.StructLayout:
    """First line address, and the number of lines minus one."""
    return data.StructLayout({"address": line_address_bits(config), "extra": range(BURST_LINES)})


def line_layout(config: CoreConfig) -> data.StructLayout:
    """A line's address, and whether that follows the address of the line before."""
    return data.StructLayout({"address": line_address_bits(config), "follows": 1})


class Coalescer(wiring.Component):
    """Turns line addresses into bursts of at most 16 consecutive lines that never cross 4 KB.

    A burst is handed on when it is full, when the next line does not follow it, or when ``patience`` cycles passed
    without another line. One line per cycle, also when no two lines are consecutive. Latency two cycles for a
    line that ends a burst.

    Attributes
    ----------
    line : In(stream of line_layout).
    hold : In(1)  a further line is only held up: patience does not run out.
    burst : Out(stream of burst).
    empty : Out(1)  no line is held.
    """

    def __init__(self, config: CoreConfig, patience: int):
        if patience < 1:
            raise ValueError(f"the patience of a coalescer is at least 1 cycle, not {patience}")
        self.page_bits = (PAGE_BYTES // config.line_bytes).bit_length() - 1
        self.patience = patience
        super().__init__({"line": In(stream.Signature(line_layout(config))), "hold": In(1),
                          "burst": Out(stream.Signature(burst_layout(config))), "empty": Out(1)})
        # State, visible to proofs: the burst being collected, and whether a page ends with it.
        self.current, self.held, self.page_end = Signal(burst_layout(config)), Signal(), Signal()

    def elaborate(self, platform):
        m = Module()
        current, held, line = self.current, self.held, self.line.payload
        age = Signal(range(self.patience + 1))
        full, miss, close, room = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            room.eq(~self.burst.valid | self.burst.ready),
            # Ready must not look at the address, so a full output also holds up lines that would extend.
            self.line.ready.eq(~held | room),
            full.eq((current.extra == BURST_LINES - 1) | self.page_end),
            miss.eq(self.line.valid & ~line.follows),
            close.eq(held & room & (full | miss | ((age == self.patience) & ~self.line.valid))),
            self.empty.eq(~held & ~self.burst.valid),
        ]
        with m.If(self.burst.ready):
            m.d.sync += self.burst.valid.eq(0)
        with m.If(close):
            m.d.sync += [self.burst.valid.eq(1), self.burst.payload.eq(current), held.eq(0)]

        with m.If(self.line.valid & self.line.ready):
            m.d.sync += [held.eq(1), age.eq(0), self.page_end.eq(line.address[:self.page_bits].all())]
            with m.If(held & ~close):
                m.d.sync += current.extra.eq(current.extra + 1)
            with m.Else():
                m.d.sync += [current.address.eq(line.address), current.extra.eq(0)]
        with m.Elif(held & room & ~self.hold & (age != self.patience)):
            m.d.sync += age.eq(age + 1)
        return m
