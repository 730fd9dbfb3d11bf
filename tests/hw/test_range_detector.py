"""RangeDetector against max(abs(x)): values, latency, clear and the most negative integer."""

import random

import pytest

from hw.range_detector import RangeDetector
from tests.hw.streams import simulate


def _lane(rng):
    return rng.choice([rng.randrange(-1 << 31, 1 << 31), rng.randrange(-1000, 1000), -1 << 31, (1 << 31) - 1, 0])


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 8, 32])
def test_running_maximum(lanes):
    rng = random.Random(lanes)
    dut = RangeDetector(lanes)
    assert dut.latency == 2 + 2 * (lanes - 1).bit_length()

    async def bench(ctx):
        maximum, expected = 0, []      # (value, complete) after each cycle
        for cycle in range(400):
            valid, clear, last = rng.random() < 0.6, rng.random() < 0.1, rng.random() < 0.2
            narrow = rng.random() < 0.8
            vector = [rng.randrange(-1000, 1000) if narrow else _lane(rng) for _ in range(lanes)]
            if clear:
                maximum = 0
            if valid:
                maximum = max(maximum, *map(abs, vector))
            expected.append((maximum, last))
            ctx.set(dut.valid, valid)
            ctx.set(dut.clear, clear)
            ctx.set(dut.last, last)
            for k, x in enumerate(vector):
                ctx.set(dut.lanes[k], x)
            await ctx.tick()
            if cycle + 1 >= dut.latency:
                value, complete = expected[cycle + 1 - dut.latency]
                assert (ctx.get(dut.value), ctx.get(dut.complete)) == (value, complete), cycle

    simulate(dut, bench)


@pytest.mark.parametrize("position", range(5))
def test_most_negative_integer_is_exact(position):
    dut = RangeDetector(5)

    async def bench(ctx):
        for k in range(5):
            ctx.set(dut.lanes[k], -(1 << 31) if k == position else (1 << 31) - 1)
        ctx.set(dut.valid, 1)
        await ctx.tick().repeat(dut.latency)
        assert ctx.get(dut.value) == 1 << 31

    simulate(dut, bench)


def test_no_lanes_is_refused():
    with pytest.raises(ValueError, match="at least one lane"):
        RangeDetector(0)
