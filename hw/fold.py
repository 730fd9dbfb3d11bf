"""Folding of image rows: a narrow first layer becomes one with more channels while it is loaded."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .descriptor import LOAD
from .interfaces import data_register

__all__ = ["Fold", "window_bytes"]


def window_bytes(config: CoreConfig) -> int:
    """Largest ``fold_kernel_bytes``: a line, but at least 32 bytes."""
    return max(config.line_bytes, 32)


class _Countdown:
    """Counter down to 0 that knows a cycle ahead when it is there: ``none``, its complement ``some``."""

    def __init__(self, m: Module, name: str, shape):
        self.m = m
        self.left, self.none = Signal(shape, name=f"{name}_left"), Signal(init=1, name=f"{name}_none")
        self.some = ~self.none

    def load(self, value):
        self.m.d.sync += [self.left.eq(value), self.none.eq(value == 0)]

    def count(self):
        self.m.d.sync += [self.left.eq(self.left - 1), self.none.eq(self.left == 1)]


class Fold(wiring.Component):
    """Expands image rows into vectors of consecutive bytes (architecture 3.1, descriptor section ``load``).

    The bytes of the incoming lines, without the first ``fold_skip``, are ``fold_rows`` rows of
    ``fold_row_bytes``. Let a row have ``fold_pad_bytes`` zeros before it and zeros without end after it:
    output position p, of ``fold_columns``, is then the ``fold_kernel_bytes`` bytes from ``p *
    fold_step_bytes``, padded with zeros to ``fold_slices`` vectors; lane 0 is the leftmost byte. A row
    consumes exactly its own bytes. The vectors leave packed into lines; the last line is filled with zeros.

    The compiler keeps ``1 <= fold_kernel_bytes <= window_bytes(config)``, ``fold_slices`` =
    ceil(fold_kernel_bytes / vector), and step, row bytes and columns at least 1. Bytes after the last row are
    dropped, lines after it not taken; too few lines keep the unit waiting.

    Attributes
    ----------
    start : In(1)  begins a load; only while not busy.
    settings : In(LOAD.layout)  held from ``start`` until ``busy`` falls.
    line : In stream of raw lines. packed : Out stream of packed lines.
    busy : Out(1)  from the cycle after ``start`` until the last packed line has left.

    Rate: one byte per cycle, two cycles more per row and one per line; a position takes at least
    ``fold_slices`` cycles.
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

        # Raw bytes: a line is shifted out byte by byte. The next one is taken in a cycle of its own, because whether
        # the last byte leaves is known late.
        raw = Signal(self.config.line_bits, reset_less=True)
        raw_bytes = _Countdown(m, "raw", range(line_bytes + 1))
        take = Signal()
        m.d.comb += self.line.ready.eq(self.busy & raw_bytes.none)
        with m.If(raw_bytes.none):
            with m.If(self.line.valid & self.line.ready):
                raw_bytes.load(Const(line_bytes))
                m.d.sync += raw.eq(self.line.payload)
        with m.Elif(take):
            raw_bytes.count()
            m.d.sync += raw.eq(raw >> 8)

        # The last kernel_bytes bytes, oldest first; bytes beyond stay zero.
        window = [Signal(8, name=f"window{k}") for k in range(window_bytes(self.config))]
        # The place that a byte enters; right before the first one does, two cycles after `start`.
        entry = Signal(len(window))
        m.d.sync += entry.eq(Cat(settings.fold_kernel_bytes == k + 1 for k in range(len(window))))
        shift = Signal()
        byte = Signal(8)         # 0 in padding
        with m.If(~self.busy):       # `start` is later in its cycle
            m.d.sync += [place.eq(0) for place in window]
        with m.Elif(shift):
            for k, place in enumerate(window):
                with m.If(entry[k]):
                    m.d.sync += place.eq(byte)
                with m.Else():
                    m.d.sync += place.eq(window[k + 1] if k + 1 < len(window) else 0)

        # Packing.
        push = Signal()
        pushed, packed = Signal(8 * vector), data_register(m, self.packed.payload)
        full = Signal()
        slot = Signal(range(self.config.vectors_per_line))
        accept = Signal()
        m.d.comb += [self.packed.valid.eq(full), accept.eq(~full | self.packed.ready)]
        with m.If(push):
            m.d.sync += [packed.eq(Cat(packed[8 * vector:], pushed)),
                         slot.eq(slot + 1), full.eq(slot == self.config.vectors_per_line - 1)]
        with m.Elif(self.packed.ready):
            m.d.sync += full.eq(0)

        # A complete window is emitted slice by slice; the next byte may enter with the last slice.
        emitting = Signal()
        slices = Array(Cat(window[k:k + vector]) for k in range(0, len(window), vector))
        index = Signal(range(len(slices)))
        slices_left, last_slice = Signal.like(settings.fold_slices), Signal()
        more_slices = Signal()                               # emitting & ~last_slice
        may_shift = ~more_slices & (~emitting | accept)
        with m.If(emitting & accept):
            m.d.comb += [push.eq(1), pushed.eq(slices[index])]
            m.d.sync += [emitting.eq(~last_slice), index.eq(index + 1), slices_left.eq(slices_left - 1),
                         last_slice.eq(slices_left == 2), more_slices.eq(~last_slice & (slices_left != 2))]
        with m.If((emitting & accept & last_slice) | ~self.busy):
            m.d.sync += [index.eq(0), slices_left.eq(settings.fold_slices), last_slice.eq(settings.fold_slices <= 1)]

        skip, pad, row, rows, columns = (_Countdown(m, name, settings[f"fold_{field}"].shape()) for name, field in (
            ("skip", "skip"), ("pad", "pad_bytes"), ("row", "row_bytes"), ("rows", "rows"), ("columns", "columns")))
        m.d.comb += byte.eq(Mux(pad.none & row.some, raw[:8], 0))
        until = Signal.like(settings.fold_kernel_bytes)      # bytes until the next window is complete
        complete = Signal()                                  # one
        in_row, in_skip = Signal(), Signal()                 # states ROW, SKIP
        m.d.comb += shift.eq(in_row & may_shift & (pad.some | (row.some & raw_bytes.some) | (row.none & columns.some)))
        with m.If(shift & pad.some):
            pad.count()
        with m.If(may_shift & in_row & pad.none & row.some & raw_bytes.some):
            row.count()
            m.d.comb += take.eq(1)
        with m.If(in_skip & skip.some & raw_bytes.some):
            skip.count()
            m.d.comb += take.eq(1)
        with m.If(shift & columns.some):
            m.d.sync += [until.eq(until - 1), complete.eq(until == 2)]
            with m.If(complete):
                columns.count()
                m.d.sync += [emitting.eq(1), more_slices.eq(settings.fold_slices > 1),
                             until.eq(settings.fold_step_bytes),
                             complete.eq(settings.fold_step_bytes == 1)]
        with m.FSM():
            with m.State("IDLE"):
                raw_bytes.load(Const(0))
                skip.load(settings.fold_skip)
                rows.load(settings.fold_rows)
                with m.If(self.start):
                    m.d.sync += [self.busy.eq(1), in_skip.eq(1)]
                    m.next = "SKIP"
            with m.State("SKIP"):
                with m.If(skip.none):
                    m.d.sync += in_skip.eq(0)
                    m.next = "ROW START"
            with m.State("ROW START"):
                pad.load(settings.fold_pad_bytes)
                row.load(settings.fold_row_bytes)
                columns.load(settings.fold_columns)
                rows.count()
                m.d.sync += [until.eq(settings.fold_kernel_bytes), complete.eq(settings.fold_kernel_bytes == 1)]
                m.next = "ROW"
                m.d.sync += in_row.eq(1)
                with m.If(rows.none):
                    m.d.sync += in_row.eq(0)
                    m.next = "FLUSH"
            with m.State("ROW"):
                with m.If(columns.none & row.none & pad.none & may_shift):
                    m.d.sync += in_row.eq(0)
                    m.next = "ROW START"
            with m.State("FLUSH"):
                with m.If(slot != 0):
                    m.d.comb += push.eq(1)
                with m.Elif(accept):
                    m.d.sync += self.busy.eq(0)
                    m.next = "IDLE"
        return m
