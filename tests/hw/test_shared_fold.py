"""SharedFold: whoever asks, one client at a time has the folding unit, and keeps it while it wants it."""

import random

import pytest

from hw.config import PRESETS
from hw.shared_fold import SharedFold
from tests.hw.streams import simulate


@pytest.mark.parametrize("seed", range(3))
def test_one_owner_at_a_time_that_nobody_displaces(seed):
    rng, dut = random.Random(seed), SharedFold(PRESETS["tiny"])
    loads, together = [0, 0], 0

    async def bench(ctx):
        nonlocal together
        begun = [False, False]           # a load that was granted runs until its client no longer wants the unit
        wanted = [False, False]
        for _ in range(600):
            for k in range(2):
                if not wanted[k]:
                    wanted[k] = rng.random() < 0.3
                elif begun[k]:
                    wanted[k] = rng.random() < 0.8
                    begun[k] = wanted[k]
                ctx.set(dut.clients[k].wanted, wanted[k])
            together += all(wanted)
            for k in range(2):
                if wanted[k] and ctx.get(dut.clients[k].granted):
                    loads[k] += not begun[k]
                    begun[k] = True
                assert not begun[k] or ctx.get(dut.clients[k].granted), "displaced"
            assert not all(begun), "two owners"
            await ctx.tick()

    simulate(dut, bench)
    assert min(loads) > 10 and together > 50
