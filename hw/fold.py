"""Folding of image rows: a narrow first layer becomes one with more channels while it is loaded."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .descriptor import LOAD

__all__ = ["Fold", "window_bytes"]


def window_bytes(config: CoreConfig) -> int:
    """Largest ``fold_kernel_bytes``: a line, but at least 32 bytes."""
    return max(config.line_bytes, 32)


class Fold(wiring.Component):
    """Expands image rows into vectors of consecutive bytes (architecture 3.1, descriptor section ``load``).

    The bytes of the incoming lines, without the first ``fold_skip``, are ``fold_rows`` rows of
    ``fold_row_bytes``. Let a row have ``fold_pad_bytes`` zeros before it and zeros without end after it:
    output position p, of ``fold_columns``, is then the ``fold_kernel_bytes`` bytes from ``p *
    fold_step_bytes``, padded with zeros to ``fold_slices`` vectors; lane 0 is the leftmost byte. A row
    consumes exactly its own bytes. The vectors leave packed, four a line; the last line is filled with
    zeros.

    The compiler keeps ``1 <= fold_kernel_bytes <= window_bytes(config)``, ``fold_slices`` =
    ceil(fold_kernel_bytes / vector), and step, row bytes and columns at least 1. Bytes after the last row are
    dropped, lines after it not taken; too few lines keep the unit waiting.

    Attributes
    ----------
    start : In(1)  begins a load; only while not busy.
    settings : In(LOAD.layout)  held from ``start`` until ``busy`` falls.
    line : In stream of raw lines. packed : Out stream of packed lines.
    busy : Out(1)  from the cycle after ``start`` until the last packed line has left.

    Rate: one byte per cycle, one cycle more per row; a position takes at least ``fold_slices`` cycles.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            "start": In(1), "settings": In(LOAD.layout),
            "line": In(stream.Signature(config.line_bits)),
            "packed": Out(stream.Signature(config.line_bits)),
            "busy": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        vector, line_bytes, settings = self.config.vector, self.config.line_bytes, self.settings

        # Raw bytes: a line is shifted out byte by byte.
        raw = Signal(self.config.line_bits)
        raw_left = Signal(range(line_bytes + 1))
        take = Signal()
        m.d.comb += self.line.ready.eq(self.busy & ((raw_left == 0) | ((raw_left == 1) & take)))
        with m.If(self.line.valid & self.line.ready):
            m.d.sync += [raw.eq(self.line.payload), raw_left.eq(line_bytes)]
        with m.Elif(take):
            m.d.sync += [raw.eq(raw >> 8), raw_left.eq(raw_left - 1)]

        # The last kernel_bytes bytes, oldest first; bytes beyond stay zero.
        window = [Signal(8, name=f"window{k}") for k in range(window_bytes(self.config))]
        shift = Signal()
        byte = Signal(8)
        with m.If(self.start):
            m.d.sync += [place.eq(0) for place in window]
        with m.Elif(shift):
            for k, place in enumerate(window):
                with m.If(settings.fold_kernel_bytes == k + 1):
                    m.d.sync += place.eq(byte)
                with m.Else():
                    m.d.sync += place.eq(window[k + 1] if k + 1 < len(window) else 0)

        # Packing: four vectors a line.
        push = Signal()
        pushed = Signal(8 * vector)
        full = Signal()
        slot = Signal(2)
        accept = Signal()
        m.d.comb += [self.packed.valid.eq(full), accept.eq(~full | self.packed.ready)]
        with m.If(push):
            m.d.sync += [self.packed.payload.eq(Cat(self.packed.payload[8 * vector:], pushed)),
                         slot.eq(slot + 1), full.eq(slot == 3)]
        with m.Elif(self.packed.ready):
            m.d.sync += full.eq(0)

        # A complete window is emitted slice by slice; the next byte may enter with the last slice.
        emitting = Signal()
        index = Signal.like(settings.fold_slices)
        slices = Array(Cat(window[k:k + vector]) for k in range(0, len(window), vector))
        last_slice = index + 1 >= settings.fold_slices
        may_shift = ~emitting | (last_slice & accept)
        with m.If(emitting & accept):
            m.d.comb += [push.eq(1), pushed.eq(slices[index])]
            m.d.sync += [index.eq(Mux(last_slice, 0, index + 1)), emitting.eq(~last_slice)]

        skip_left = Signal.like(settings.fold_skip)
        pad_left = Signal.like(settings.fold_pad_bytes)
        row_left = Signal.like(settings.fold_row_bytes)
        rows_left = Signal.like(settings.fold_rows)
        columns_left = Signal.like(settings.fold_columns)
        until = Signal.like(settings.fold_kernel_bytes)      # bytes until the next window is complete
        m.d.comb += self.busy.eq(1)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.busy.eq(0)
                m.d.sync += [raw_left.eq(0), skip_left.eq(settings.fold_skip),
                             rows_left.eq(settings.fold_rows)]
                with m.If(self.start):
                    m.next = "SKIP"
            with m.State("SKIP"):
                with m.If(skip_left == 0):
                    m.next = "ROW START"
                with m.Elif(raw_left != 0):
                    m.d.comb += take.eq(1)
                    m.d.sync += skip_left.eq(skip_left - 1)
            with m.State("ROW START"):
                m.d.sync += [pad_left.eq(settings.fold_pad_bytes), row_left.eq(settings.fold_row_bytes),
                             columns_left.eq(settings.fold_columns), until.eq(settings.fold_kernel_bytes),
                             rows_left.eq(rows_left - 1)]
                m.next = "ROW"
                with m.If(rows_left == 0):
                    m.next = "FLUSH"
            with m.State("ROW"):
                with m.If((columns_left == 0) & (row_left == 0)):
                    with m.If(may_shift):
                        m.next = "ROW START"
                with m.Elif(may_shift):
                    with m.If(pad_left != 0):
                        m.d.comb += shift.eq(1)
                        m.d.sync += pad_left.eq(pad_left - 1)
                    with m.Elif(row_left == 0):
                        m.d.comb += shift.eq(1)
                    with m.Elif(raw_left != 0):
                        m.d.comb += [shift.eq(1), take.eq(1), byte.eq(raw[:8])]
                        m.d.sync += row_left.eq(row_left - 1)
                with m.If(shift & (columns_left != 0)):
                    m.d.sync += until.eq(until - 1)
                    with m.If(until == 1):
                        m.d.sync += [emitting.eq(1), columns_left.eq(columns_left - 1),
                                     until.eq(settings.fold_step_bytes)]
            with m.State("FLUSH"):
                with m.If(slot != 0):
                    m.d.comb += push.eq(1)
                with m.Elif(accept):
                    m.next = "IDLE"
        return m
