"""Nested loops that carry affine addresses by addition."""

from __future__ import annotations

from functools import reduce
from operator import or_

from amaranth.hdl import Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .interfaces import data_register

__all__ = ["LoopNest"]


class LoopNest(wiring.Component):
    """Counts through ``levels`` nested loops and carries affine values without a multiplier.

    Level 0 is the outermost. Every named value starts at ``start`` and is, in iteration (i0, i1, ...),
    ``start + i0 * stride[0] + i1 * stride[1] + ...`` modulo its width. A count of 0 behaves as 1.

    Parameters
    ----------
    levels : number of loops, at least 1.
    values : ``{name: shape}`` of the values to carry.
    count_bits : width of a loop count.

    Attributes
    ----------
    load : In(1)  the values take ``start_*``, for one cycle, or for two or more if the last step was not that from the
        last iteration.
    begin : In(1)  restart at the first iteration: in the last cycle of ``load``, and only then.
    step : In(1)  go on to the next iteration; from the last one it wraps to zero counters. Without effect in ``load``.
    count : In(count_bits).array(levels), stable from ``begin`` on while the loops run.
    start_NAME : In(shape); stride_NAME : In(shape).array(levels), held stable.
    value_NAME : Out(shape)  value of the current iteration (registered).
    at_first, at_last : Out(levels)  bit k: loop k is in its first / last iteration.
    last : Out(1)  the current iteration is the last one of all.

    Latency: one cycle from ``begin`` or ``step`` to the outputs; one iteration per cycle. One adder per value.
    """

    def __init__(self, levels: int, values: dict[str, object], *, count_bits: int = 16):
        if levels < 1:
            raise ValueError(f"a loop nest needs at least one level, not {levels}")
        self.levels = levels
        self.values = {name: Shape.cast(shape) for name, shape in values.items()}
        self.count_bits = count_bits
        members = {"load": In(1), "begin": In(1), "step": In(1), "count": In(count_bits).array(levels),
                   "at_first": Out(levels), "at_last": Out(levels), "last": Out(1)}
        for name, shape in self.values.items():
            members[f"start_{name}"] = In(shape)
            members[f"stride_{name}"] = In(shape).array(levels)
            members[f"value_{name}"] = Out(shape)
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        levels = range(self.levels)
        # Everything about an iteration is in registers, so that what follows has the whole cycle. They need no reset:
        # all are set until the loops begin.
        # Iterations after this one.
        left = [Signal(self.count_bits, name=f"left{k}", reset_less=True) for k in levels]
        one_left = Signal(self.levels, reset_less=True)      # left[k] == 1
        # The innermost loop that can still go on: it steps, inner ones restart. None after the last iteration, so that
        # the values' adder has nothing but their start to pass on.
        advance = Signal(self.levels, reset_less=True)
        # Its complement, so that not every bit hangs on one net.
        stays = Signal(self.levels, init=-1, reset_less=True)
        moved = Signal(self.levels, reset_less=True)        # bit k: that loop is loop k or one around it
        # Bit k: loop k restarts: it and all in it are at their last.
        restart = Signal(self.levels, reset_less=True)
        # Loops of one iteration; as of the last cycle.
        single, singles = Signal(self.levels), Signal(self.levels, reset_less=True)
        following_last = Signal(self.levels)
        at_first, at_last = data_register(m, self.at_first), data_register(m, self.at_last)
        m.d.comb += self.last.eq(self.at_last.all())
        # `step`, which is late in its cycle, only enables registers.
        for k in levels:
            changes = restart[k + 1] if k + 1 < self.levels else 1
            m.d.comb += following_last[k].eq(Mux(restart[k], singles[k], Mux(changes, one_left[k], self.at_last[k])))
            m.d.comb += single[k].eq(~self.count[k][1:].any())
            with m.If(self.load | (self.step & changes)):
                again = self.load | restart[k]
                m.d.sync += [at_first[k].eq(again),
                             left[k].eq(Mux(again, Mux(single[k], 0, self.count[k] - 1), left[k] - 1)),
                             one_left[k].eq(Mux(again, self.count[k] == 2, left[k] == 2))]

        def stand(last, ended):
            """The flags of an iteration from which loops are at their last in it."""
            m.d.sync += at_last.eq(last)
            for k in levels:
                advances = ~last[k] & last[k + 1:].all() & ~ended
                m.d.sync += [advance[k].eq(advances), stays[k].eq(~advances), restart[k].eq(last[k:].all()),
                             moved[k].eq(last[k + 1:].all() & ~last.all())]

        m.d.sync += singles.eq(single)
        with m.If(self.begin):
            stand(single, 0)
        with m.Elif(self.load):
            m.d.sync += [advance.eq(0), stays.eq(-1)]
        with m.Elif(self.step):
            stand(following_last, self.last)

        for name, shape in self.values.items():
            # base[k]: the value at the start of the current iteration of loop k.
            base = [Signal(shape, name=f"{name}_base{k}", reset_less=True) for k in levels]
            stride = getattr(self, f"stride_{name}")
            following = Signal(shape, name=f"{name}_next")

            def advancing(values, flags):
                return reduce(or_, (values[k] & flags[k].replicate(len(values[k])) for k in levels))

            start = getattr(self, f"start_{name}")
            m.d.comb += following.eq(advancing(base, advance)
                                     + (advancing(stride, ~stays) | (start & self.load.replicate(len(start)))))
            for k in levels:
                # Loop j <= k stepped: every level inside it restarts from the new value.
                with m.If(self.load | (self.step & moved[k])):
                    m.d.sync += base[k].eq(following)
            m.d.comb += getattr(self, f"value_{name}").eq(base[-1])
        return m
