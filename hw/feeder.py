"""Feeder: walks the tiles and pixels of a product block and drives the array, one vector a cycle."""

from __future__ import annotations

import enum

from amaranth.hdl import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .accumulator import REUSE
from .config import CoreConfig
from .descriptor import FEED, Mode
from .loop_nest import LoopNest
from .skid_buffer import SkidBuffer

__all__ = ["Feeder", "Activity", "feed_command", "result_control", "FEED_LATENCY"]

FEED_LATENCY = 2
"""Cycles from a vector's issue (buffer read, `take`) to its arrival at the array's edge."""


class Activity(enum.IntEnum):
    """What the array's input did in a cycle; the product engine reports one of these every cycle."""
    IDLE = 0         # no block
    BUSY = 1         # a vector was fed
    OPERAND = 2      # waited for data from memory
    WEIGHTS = 3      # waited for a weight tile
    RESULTS = 4      # waited for room for results
    SPACING = 5      # tile shorter than the array needs (edge waste)
    DRAIN = 6        # waited for the array to empty before a change of mode
    DEPENDENCY = 7   # waited for an earlier descriptor to complete


def feed_command() -> data.StructLayout:
    return data.StructLayout({"feed": FEED.layout, "load_a": 1, "load_b": 1})


def result_control(config: CoreConfig) -> data.StructLayout:
    """Travels through the array beside the data and tells the accumulator what to do with column 0's result."""
    return data.StructLayout({"valid": 1, "index": (config.accumulator_entries - 1).bit_length(), "init": 1,
                              "final": 1})


class Feeder(wiring.Component):
    """Feeds one product block after another into the array.

    The seven loops (4 over tiles, 3 over pixels) run at one vector a cycle. A cycle in which something is missing
    becomes a bubble: the left edge sees zeros and the accumulator no control, so the array itself never stalls.

    The loops run one vector ahead of the one that is issued: all facts about that one are in registers, so a cycle's
    late decision is only whether it is fed. The first vector of a block is issued at the earliest two cycles after the
    block was taken.

    Parameters
    ----------
    config : core configuration.

    Attributes
    ----------
    command : block to feed; released when its last vector has been issued.
    a, b : slice address of the next vector, its `load` and whether it is `wanted`; `available` and the `read` strobe of
        the current one; `advance` of the operand buffers; data arrives two cycles after `read`.
    weights_ready, weights_take, weights_enable : handshake with the weight ring: `ready` is high a cycle before the
        tile may be taken. `enable` is high, from the second cycle of a block on, while its tiles may shift into the
        shadow registers.
    next_same_mode : the next block is known and runs in the mode of this one, so its first tile may be shifted early,
        and its first boundary closes the last gradient tile of this one.
    room, reserve : accounting of the result FIFO.
    mode, left, top, boundary, control : to the array. array_empty : its mode may change.
    activity : :class:`Activity` of this cycle. done : one pulse per block.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        rows, columns = config.rows, config.columns
        super().__init__({
            "command": In(stream.Signature(feed_command())),
            "a_address": Out(16), "a_load": Out(1), "a_wanted": Out(1), "a_available": In(1), "a_read": Out(1),
            "a_advance": Out(1), "a_data": In(8 * rows),
            "b_address": Out(16), "b_load": Out(1), "b_wanted": Out(1), "b_available": In(1), "b_read": Out(1),
            "b_advance": Out(1), "b_data": In(8 * columns),
            "weights_ready": In(1), "weights_take": Out(1), "weights_enable": Out(1),
            "next_same_mode": In(1),
            "room": In(range(config.result_entries + 1)), "reserve": Out(1),
            "array_empty": In(1),
            "mode": Out(Mode), "left": Out(8 * rows), "top": Out(8 * columns), "boundary": Out(1),
            "control": Out(result_control(config)),
            "activity": Out(Activity), "done": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        feed = self.command.p.feed

        # Loops 0..3 are the tile loops, 4..6 the pixel loops.
        m.submodules.loops = loops = LoopNest(7, {"a": 16, "b": 16, "row": 16, "column": 16,
                                                   "entry": config.accumulator_entries.bit_length() - 1})
        for k in range(4):
            m.d.comb += [
                loops.count[k].eq(feed[f"tiles{k}"]),
                loops.stride_a[k].eq(feed[f"a_tile{k}"]), loops.stride_b[k].eq(feed[f"b_tile{k}"]),
                loops.stride_row[k].eq(feed[f"row_tile{k}"]), loops.stride_column[k].eq(feed[f"column_tile{k}"]),
                loops.stride_entry[k].eq(feed[f"accumulator{k}"]),
            ]
        for k in range(3):
            m.d.comb += [
                loops.count[4 + k].eq(feed[f"pixels{k}"]),
                loops.stride_a[4 + k].eq(feed[f"a_pixel{k}"]), loops.stride_b[4 + k].eq(feed[f"b_pixel{k}"]),
            ]
        m.d.comb += [
            loops.stride_row[5].eq(feed.row_step), loops.stride_column[6].eq(feed.column_step),
            loops.start_a.eq(feed.a_start), loops.start_b.eq(feed.b_start),
            loops.start_row.eq(feed.row_start), loops.start_column.eq(feed.column_start),
            loops.start_entry.eq(0),
        ]

        mode = Signal(Mode)                  # of the array
        gradient = Signal()                  # its mode is GRADIENT
        m.d.comb += self.mode.eq(mode)

        # What the loops say of a vector; they run ahead of it, so that whether it is fed, which is late, reaches no
        # register of theirs. A tap outside the image reads as zero.
        entry_shape = loops.value_entry.shape()
        facts = data.StructLayout({"a": 16, "b": 16, "inside": 1, "tile_start": 1, "tile_end": 1, "last": 1,
                                   "last_tile": 1, "entry": entry_shape, "init": 1, "final": 1})
        # No block: the loops are loaded until one comes and begins. For two cycles at least, because the command of a
        # block comes two cycles after that before it: the loops take steps too many at the end of a block.
        idle, begin = Signal(init=1), Signal()
        m.submodules.ahead = ahead = ResetInserter(idle)(SkidBuffer(facts))
        into, following = ahead.input.payload, ahead.output.payload
        m.d.comb += [
            loops.load.eq(idle), loops.begin.eq(begin), loops.step.eq(ahead.input.ready), ahead.input.valid.eq(1),
            into.a.eq(loops.value_a), into.b.eq(loops.value_b), into.entry.eq(loops.value_entry),
            into.inside.eq((loops.value_row < feed.rows) & (loops.value_column < feed.columns)),
            into.tile_start.eq(loops.at_first[4:7].all()), into.tile_end.eq(loops.at_last[4:7].all()),
            into.last.eq(loops.last), into.last_tile.eq(loops.at_last[:4].all()),
            into.init.eq(feed.first & (loops.at_first[:4] | ~feed.reduce).all()),
            into.final.eq(feed.last & (loops.at_last[:4] | ~feed.reduce).all()),
        ]

        # The vector to be issued, one before `following`.
        now = Signal(data.StructLayout({
            "valid": 1, "need_a": 1, "need_b": 1, "tile_start": 1, "tile_end": 1, "last": 1, "last_tile": 1,
            "takes_weights": 1, "closes": 1, "takes_room": 1, "entry": entry_shape, "init": 1, "final": 1}))
        first, fire, step = Signal(), Signal(), Signal()      # first: none was loaded yet
        go = Signal()                        # first, or all but the operands lets the vector be issued
        operands = self.a_available & self.b_available
        m.d.comb += [
            step.eq(go & operands), ahead.output.ready.eq(step),
            self.a_address.eq(following.a), self.b_address.eq(following.b),
            self.a_load.eq(step), self.b_load.eq(step),
            self.a_wanted.eq(gradient | following.inside), self.b_wanted.eq(gradient & following.inside),
        ]
        with m.If(step):
            m.d.sync += [
                first.eq(0), now.valid.eq(first | ~now.last),
                now.need_a.eq(self.a_wanted), now.need_b.eq(self.b_wanted),
                now.tile_start.eq(following.tile_start), now.tile_end.eq(following.tile_end),
                now.last.eq(following.last), now.last_tile.eq(following.last_tile),
                now.takes_weights.eq(following.tile_start & ~gradient), now.closes.eq(following.tile_start & gradient),
                now.takes_room.eq(following.final & ~gradient), now.entry.eq(following.entry),
                now.init.eq(following.init), now.final.eq(following.final),
            ]
        # Weight-stationary: an accumulator entry may be used again REUSE cycles later. Tiles of that many pixels or
        # more keep to it by themselves; a shorter one whose last pixels waited for an operand holds the next tile.
        pixel, short, ends_short = Signal(16), Signal(), Signal()      # short: the tile that ended last
        few = Signal(init=1)                 # pixel < REUSE - 1
        m.d.comb += ends_short.eq(Mux(fire & now.tile_end, few, short))
        m.d.sync += short.eq(ends_short)
        recent = Signal(REUSE - 3)
        m.d.sync += recent.eq(Cat(fire, recent))
        too_early = ends_short & (fire | recent.any())                 # in the next cycle
        # Output-stationary: a boundary closes the previous tile, whose rows then leave one per cycle.
        spacing = Signal(range(config.rows))
        pending = Signal(data.StructLayout({"valid": 1, "entry": now.entry.shape(), "init": 1, "final": 1}))
        unloading = Signal(pending.shape())
        row = Signal(range(config.rows))
        boundary = Signal()
        close_ok, spaced, waiting = Signal(), Signal(), Signal()       # of the last cycle, for `activity`
        # Decided a cycle ahead, and room is known another one late: three results issued before, or three rows, may not
        # have been taken from `room` by then.
        may_close, has_room, has_weights, clear = Signal(), Signal(), Signal(), Signal()
        room_for_rows = Signal()
        m.d.sync += [has_room.eq(self.room > 3), room_for_rows.eq(self.room >= config.rows + 3)]
        m.d.comb += [has_weights.eq(self.weights_ready & ~self.weights_take & ~too_early),
                     may_close.eq((spacing <= 1) & ~(boundary & gradient)
                                  & (~(pending.valid & pending.final) | room_for_rows))]

        def may_go(closes, takes_weights, takes_room):
            return (~closes | may_close) & (~takes_weights | has_weights) & (~takes_room | has_room)

        clear_now, clear_next = Signal(), Signal()
        m.d.comb += [clear_now.eq(may_go(now.closes, now.takes_weights, now.takes_room) & now.valid),
                     clear_next.eq(may_go(following.tile_start & gradient, following.tile_start & ~gradient,
                                          following.final & ~gradient)
                                   & (first | ~now.last))]
        m.d.sync += [close_ok.eq(may_close), clear.eq(Mux(step, clear_next, clear_now)),
                     go.eq(Mux(step, clear_next, clear_now | first)),
                     spaced.eq(~too_early), waiting.eq(~self.weights_ready)]

        flush = Signal()                     # the boundary of its own that ends a gradient block
        on_the_way = Signal(FEED_LATENCY)    # issued, not yet seen by the array
        m.d.sync += on_the_way.eq(Cat(fire | boundary | unloading.valid, on_the_way))
        settled = Signal()                   # of the cycle before; once high it stays until something is issued
        m.d.sync += settled.eq(~(fire | boundary) & ~on_the_way.any() & ~unloading.valid & self.array_empty)

        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += self.weights_enable.eq(0)
                with m.If(self.command.valid):
                    with m.If((feed.mode != mode) & ~settled):
                        m.d.comb += self.activity.eq(Activity.DRAIN)
                    with m.Else():
                        m.d.comb += [
                            self.a_advance.eq(self.command.p.load_a), self.b_advance.eq(self.command.p.load_b),
                            self.activity.eq(Activity.DEPENDENCY), begin.eq(1),
                        ]
                        m.d.sync += [mode.eq(feed.mode), gradient.eq(feed.mode == Mode.GRADIENT), first.eq(1), go.eq(1),
                                     idle.eq(0)]
                        m.next = "FEED"
            with m.State("FEED"):
                # The last tile is under way: the shadow registers may take a tile of the next block only in its mode.
                m.d.sync += self.weights_enable.eq(~gradient & (~now.last_tile | now.tile_start | self.next_same_mode))
                with m.If(~now.valid):
                    m.d.comb += self.activity.eq(Activity.DEPENDENCY)
                with m.Elif(~operands):
                    m.d.comb += self.activity.eq(Activity.OPERAND)
                with m.Elif(now.closes & ~close_ok):
                    m.d.comb += self.activity.eq(Mux(spacing != 0, Activity.SPACING, Activity.RESULTS))
                with m.Elif(now.takes_weights & ~spaced):
                    m.d.comb += self.activity.eq(Activity.SPACING)
                with m.Elif(now.takes_weights & waiting):
                    m.d.comb += self.activity.eq(Activity.WEIGHTS)
                with m.Elif(~clear):
                    m.d.comb += self.activity.eq(Activity.RESULTS)
                with m.Else():
                    m.d.comb += self.activity.eq(Activity.BUSY)
                with m.If(fire):
                    with m.If(now.last):
                        # The boundary of a following gradient block closes the last tile; else a boundary of its own.
                        with m.If(gradient & ~self.next_same_mode):
                            m.next = "FLUSH"
                        with m.Else():
                            m.d.comb += [self.command.ready.eq(1), self.done.eq(1)]
                            m.d.sync += idle.eq(1)
                            m.next = "IDLE"
            with m.State("FLUSH"):
                m.d.comb += self.activity.eq(Mux((spacing != 0) | close_ok, Activity.SPACING, Activity.RESULTS))
                with m.If(close_ok):
                    m.d.comb += [flush.eq(1), self.command.ready.eq(1), self.done.eq(1)]
                    m.d.sync += idle.eq(1)
                    m.next = "IDLE"

        m.d.comb += [
            fire.eq(clear & operands),
            boundary.eq((fire & now.tile_start) | flush),
            self.a_read.eq(fire & now.need_a), self.b_read.eq(fire & now.need_b),
            self.weights_take.eq(fire & now.takes_weights),
        ]

        # Weight-stationary results: one entry per pixel, counted from the tile's first entry.
        with m.If(fire):
            m.d.sync += [pixel.eq(Mux(now.tile_end, 0, pixel + 1)), few.eq(now.tile_end | (pixel < REUSE - 2))]

        # Output-stationary results: `pending` is the tile being summed, `unloading` the one whose rows leave now.
        with m.If(spacing != 0):
            m.d.sync += spacing.eq(spacing - 1)
        with m.If(unloading.valid):
            m.d.sync += row.eq(row + 1)
            with m.If(row == config.rows - 1):
                m.d.sync += unloading.valid.eq(0)
        with m.If(boundary & gradient):
            m.d.sync += [spacing.eq(config.rows - 1), unloading.eq(pending), row.eq(0), pending.valid.eq(0)]
            with m.If(fire):
                m.d.sync += [pending.valid.eq(1), pending.entry.eq(now.entry), pending.init.eq(feed.first),
                             pending.final.eq(feed.last)]

        # From issue to the array's edge: FEED_LATENCY cycles. Rows of a gradient tile start with the boundary that
        # closes the tile; `unloading` is set one cycle after its issue, so it joins one stage later.
        issued, late, edge = (Signal(result_control(config), name=name) for name in ("issued", "late", "edge"))
        with m.If(~gradient):
            m.d.comb += [issued.valid.eq(fire), issued.index.eq(now.entry + pixel),
                         issued.init.eq(now.init), issued.final.eq(now.final)]
        m.d.sync += [late.eq(issued), edge.eq(late)]
        with m.If(unloading.valid):
            m.d.sync += [edge.valid.eq(1), edge.index.eq(unloading.entry + row), edge.init.eq(unloading.init),
                         edge.final.eq(unloading.final)]
        m.d.comb += [
            self.control.eq(edge),
            self.reserve.eq((late.valid & late.final) | (unloading.valid & unloading.final)),
        ]
        a_late, b_late, boundary_late = Signal(2), Signal(2), Signal(2)
        m.d.sync += [a_late.eq(Cat(self.a_read, a_late)), b_late.eq(Cat(self.b_read, b_late)),
                     boundary_late.eq(Cat(boundary, boundary_late))]
        m.d.comb += [
            self.left.eq(Mux(a_late[1], self.a_data, 0)), self.top.eq(Mux(b_late[1], self.b_data, 0)),
            self.boundary.eq(boundary_late[1]),
        ]
        return m
