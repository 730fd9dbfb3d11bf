"""The contract's counter-based random words for a vector of lanes per cycle."""

from __future__ import annotations

from amaranth.hdl import Const, Module, Mux, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.random import INDEX_MULTIPLIER, MASK, MIX32, Statement

__all__ = ["RandomWords", "mix_statement"]


def mix_statement(a: Value, statement: Statement) -> Value:
    """One statement of the hash on a 32-bit value."""
    left = a + statement.constant if statement.first == "+" else a ^ Const(statement.constant, 32)
    right = (a << statement.shift)[:32] if statement.direction == "<<" else a >> statement.shift
    return (left + right if statement.join == "+" else left[:32] ^ right)[:32]


class RandomWords(wiring.Component):
    """``golden.random.word(seed, step, stream, index + lane)`` for every lane, one vector per cycle (section 4).

    The caller gives the index as ``product = index * INDEX_MULTIPLIER`` modulo 2**32. That is linear, so a loop nest
    whose start and strides were multiplied beforehand carries it by addition; the lanes add constants. There is no
    multiplier.

    Parameters
    ----------
    lanes : words per cycle; lane j belongs to the element ``index + j``.

    Attributes
    ----------
    seed, step, stream : In(32), held from ``load`` until ``ready``.
    load : In(1)  compute the key of (seed, step, stream). Words entered before still get the old key.
    ready : Out(1)  the key is there; vectors may enter. It falls in the cycle after ``load`` and rises
        ``key_latency`` cycles after it.
    i_valid, o_valid : a vector enters, a vector leaves.
    product : In(32), see above.
    words : Out(ArrayLayout(32, lanes)).

    Latency: 7 cycles. The key takes three passes through lane 0's pipeline.
    """

    latency = 1 + len(MIX32)
    key_latency = 2 + 3 * latency

    def __init__(self, lanes: int):
        if lanes < 1:
            raise ValueError(f"RandomWords needs at least one lane, not {lanes}")
        self.lanes = lanes
        # State, visible to proofs: the key, and each lane's pipeline.
        self.key = Signal(32)
        self.mixed = [[Signal(32, name=f"mixed{j}_{k}", reset_less=True) for k in range(self.latency)]
                      for j in range(lanes)]
        super().__init__({
            "seed": In(32), "step": In(32), "stream": In(32), "load": In(1), "ready": Out(1),
            "i_valid": In(1), "product": In(32),
            "o_valid": Out(1), "words": Out(data.ArrayLayout(32, lanes)),
        })

    def elaborate(self, platform):
        m = Module()
        valid = [Signal(name=f"valid{k}") for k in range(1, self.latency + 1)]
        keying = [Signal(name=f"keying{k}") for k in range(1, self.latency + 1)]
        start, inject = Signal(), Signal()
        passes = Signal(range(4))     # passes of the key that are done
        returned = keying[-1]
        operand = Signal(32)
        m.d.comb += [
            inject.eq(start | (returned & (passes != 2))),
            operand.eq(Mux(start, self.step, self.words[0] ^ Mux(passes == 0, self.seed, self.stream))),
            self.o_valid.eq(valid[-1]),
        ]
        m.d.sync += start.eq(0)
        for chain, value in ((valid, self.i_valid), (keying, inject)):
            m.d.sync += [register.eq(source) for register, source in zip(chain, [value, *chain[:-1]], strict=True)]
        with m.If(returned):
            m.d.sync += passes.eq(passes + 1)
            with m.If(passes == 2):
                m.d.sync += [self.key.eq(self.words[0]), self.ready.eq(1)]
        with m.If(self.load):
            m.d.sync += [start.eq(1), passes.eq(0), self.ready.eq(0), *[tag.eq(0) for tag in keying]]

        for j, stages in enumerate(self.mixed):
            first = (self.product + (j * INDEX_MULTIPLIER & MASK))[:32] ^ self.key
            m.d.sync += stages[0].eq(Mux(inject, operand, first) if j == 0 else first)
            m.d.sync += [following.eq(mix_statement(a, statement))
                         for a, following, statement in zip(stages, stages[1:], MIX32, strict=False)]
            m.d.comb += self.words[j].eq(stages[-1])
        return m
