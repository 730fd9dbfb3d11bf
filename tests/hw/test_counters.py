"""Counters against plain sums: any events, any clearing, any selection."""

import random

import pytest

from hw.counters import Counters
from tests.hw.streams import simulate


@pytest.mark.parametrize("number", [1, 3, 14, 16])
def test_every_counter_shows_its_sum(number):
    names = [f"event{k}" for k in range(number)]
    dut = Counters(names)
    rng = random.Random(number)
    events, clears, selects, shown = [], [], [], []

    async def drive(ctx):
        for cycle in range(1500):
            busy = rng.random() if cycle % 50 else 1.0
            events.append([rng.random() < busy for _ in names])
            clears.append(rng.random() < 0.004)
            selects.append(rng.randrange(64) if rng.random() < 0.2 else rng.randrange(number))
            for name, value in zip(names, events[-1], strict=True):
                ctx.set(getattr(dut, name), value)
            ctx.set(dut.clear, clears[-1])
            ctx.set(dut.select, selects[-1])
            shown.append(ctx.get(dut.count))
            await ctx.tick()

    simulate(dut, drive)
    # An event is counted in the register of the cycle after it; a clearing leaves only what happens from then on.
    sums, expected = [0] * number, []
    for cycle, select in enumerate(selects):
        expected.append(sums[select] if select < number else 0)
        sums = [0 if clears[cycle] else count + (events[cycle - 1][k] if cycle else 0) for k, count in enumerate(sums)]
    assert shown[2:] == expected[:-2]
    assert max(expected) > 100


def test_bad_parameters_are_refused():
    with pytest.raises(ValueError, match="1 to 64 performance counters, not 0"):
        Counters([])
    with pytest.raises(ValueError, match="1 to 64 performance counters, not 65"):
        Counters([f"event{k}" for k in range(65)])
