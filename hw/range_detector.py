"""Largest magnitude of a tensor, one vector per cycle."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["range_result", "RangeDetector"]

# What a unit tells the scalar registers when a tensor is complete. clear = 1: `value`, unsigned, replaces the
# register's maximum; 0: the register keeps the larger of the two.
range_result = data.StructLayout({"valid": 1, "register": 6, "clear": 1, "value": 32})


class RangeDetector(wiring.Component):
    """Running maximum of ``abs(x)`` over vectors of ``lanes`` int32.

    Magnitudes are unsigned 32 bits, so that of -2**31 is exact.

    Parameters
    ----------
    lanes : values per vector, at least 1.

    Attributes
    ----------
    valid : In(1)  ``lanes`` holds a vector in this cycle.
    clear : In(1)  with ``valid``: the maximum starts anew with this vector; alone: it returns to 0.
    last : In(1)  marks a vector (or an empty cycle); only passed on to ``complete``.
    lanes : In(signed(32)).array(lanes)
    value : Out(32)  maximum so far (registered, held).
    complete : Out(1)  ``value`` includes the cycle that was marked ``last``.

    Latency: ``latency`` = 2 + 2 * ceil(log2(lanes)) cycles from a vector to ``value``: one for the magnitudes, two for
    each level of the tree (comparison, choice), one for the running maximum. One vector per cycle.
    """

    def __init__(self, lanes: int):
        if lanes < 1:
            raise ValueError(f"a range detector needs at least one lane, not {lanes}")
        self.latency = 2 + 2 * (lanes - 1).bit_length()
        super().__init__({"valid": In(1), "clear": In(1), "last": In(1), "lanes": In(signed(32)).array(lanes),
                          "value": Out(32), "complete": Out(1)})

    def elaborate(self, platform):
        m = Module()
        magnitudes = [Signal(32, name=f"magnitude{k}", reset_less=True) for k in range(len(self.lanes))]
        m.d.sync += [magnitude.eq(Mux(lane < 0, -lane, lane))
                     for magnitude, lane in zip(magnitudes, self.lanes, strict=True)]
        level = 0
        while len(magnitudes) > 1:
            level += 1
            compared = [Signal(32, name=f"compared{level}_{k}", reset_less=True) for k in range(len(magnitudes))]
            m.d.sync += [after.eq(before) for after, before in zip(compared, magnitudes, strict=True)]
            larger = [Signal(32, name=f"level{level}_{k}", reset_less=True) for k in range((len(magnitudes) + 1) // 2)]
            for k, chosen in enumerate(larger):
                pair = compared[2 * k:2 * k + 2]
                if len(pair) == 2:
                    first = Signal(name=f"first{level}_{k}", reset_less=True)
                    m.d.sync += [first.eq(magnitudes[2 * k + 1] < magnitudes[2 * k]), chosen.eq(Mux(first, *pair))]
                else:
                    m.d.sync += chosen.eq(pair[0])
            magnitudes = larger

        # The control bits of each vector travel beside the tree.
        control = (self.valid, self.clear, self.last)
        for k in range(self.latency - 1):
            delayed = [Signal(name=f"{name}{k}") for name in ("valid", "clear", "last")]
            m.d.sync += [after.eq(before) for after, before in zip(delayed, control, strict=True)]
            control = delayed
        valid, clear, last = control
        with m.If(clear | (valid & (self.value < magnitudes[0]))):
            m.d.sync += self.value.eq(Mux(valid, magnitudes[0], 0))
        m.d.sync += self.complete.eq(last)
        return m
