"""Nested loops that carry affine addresses by addition."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

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
    load : In(1)  restart at the first iteration; ``start_*`` is taken in the same cycle.
    step : In(1)  go on to the next iteration; from the last one it wraps to zero counters and undefined values.
    count : In(count_bits).array(levels), stable from ``load`` on while the loops run.
    start_NAME : In(shape); stride_NAME : In(shape).array(levels), held stable.
    value_NAME : Out(shape)  value of the current iteration (registered).
    at_first, at_last : Out(levels)  bit k: loop k is in its first / last iteration.
    last : Out(1)  the current iteration is the last one of all.

    Latency: one cycle from ``load`` or ``step`` to the outputs; one iteration per cycle. One adder per value.
    """

    def __init__(self, levels: int, values: dict[str, object], *, count_bits: int = 16):
        if levels < 1:
            raise ValueError(f"a loop nest needs at least one level, not {levels}")
        self.levels = levels
        self.values = {name: Shape.cast(shape) for name, shape in values.items()}
        self.count_bits = count_bits
        members = {"load": In(1), "step": In(1), "count": In(count_bits).array(levels),
                   "at_first": Out(levels), "at_last": Out(levels), "last": Out(1)}
        for name, shape in self.values.items():
            members[f"start_{name}"] = In(shape)
            members[f"stride_{name}"] = In(shape).array(levels)
            members[f"value_{name}"] = Out(shape)
        super().__init__(members)

    def elaborate(self, platform):
        m = Module()
        levels = range(self.levels)
        # Everything about an iteration is in registers, so that what follows has the whole cycle. `step` comes late: it
        # only enables registers.
        left = [Signal(self.count_bits, name=f"left{k}") for k in levels]     # iterations after this one
        advance = Signal(self.levels)       # the innermost loop that can still go on: it steps, inner ones restart
        ending = Signal(self.levels + 1, init=1 << self.levels)      # loops k and all inside it are in their last
        m.d.comb += self.last.eq(ending[0])
        single, following_last = Signal(self.levels), Signal(self.levels)
        for k in levels:
            m.d.comb += [
                single[k].eq(~self.count[k][1:].any()),
                following_last[k].eq(Mux(ending[k], single[k], Mux(advance[k], left[k] == 1, self.at_last[k]))),
            ]
            with m.If(self.load | (self.step & (ending[k] | advance[k]))):
                m.d.sync += [left[k].eq(Mux(self.load | ending[k], Mux(single[k], 0, self.count[k] - 1), left[k] - 1)),
                             self.at_first[k].eq(self.load | ending[k])]
        for when, lasts in ((self.step, following_last), (self.load, single)):
            with m.If(when):
                m.d.sync += self.at_last.eq(lasts)
                for k in levels:
                    m.d.sync += [ending[k].eq(lasts[k:].all()), advance[k].eq(~lasts[k] & lasts[k + 1:].all())]

        for name, shape in self.values.items():
            # base[k]: the value at the start of the current iteration of loop k.
            base = [Signal(shape, name=f"{name}_base{k}") for k in levels]
            stride = getattr(self, f"stride_{name}")
            following = Signal(shape, name=f"{name}_next")

            def advancing(values):
                chosen = 0
                for k in levels:
                    chosen = chosen | (values[k] & advance[k].replicate(len(values[k])))
                return chosen

            m.d.comb += following.eq(advancing(base) + advancing(stride))
            for k in levels:
                with m.If(self.load):
                    m.d.sync += base[k].eq(getattr(self, f"start_{name}"))
                # Loop j <= k steps: every level inside it restarts from the new value.
                with m.Elif(self.step & ending[k + 1]):
                    m.d.sync += base[k].eq(following)
            m.d.comb += getattr(self, f"value_{name}").eq(base[-1])
        return m
