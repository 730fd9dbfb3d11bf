"""LoopNest against itertools: every iteration's value, flags and order."""

import itertools
import random

import pytest
from amaranth.sim import Simulator

from hw.loop_nest import LoopNest


@pytest.mark.parametrize("counts", [(1,), (3,), (2, 3), (1, 1, 4), (3, 1, 2, 2), (2, 0, 3, 1, 2)])
def test_values_follow_the_affine_formula(counts):
    levels = len(counts)
    rng = random.Random(str(counts))
    dut = LoopNest(levels, {"address": 20, "row": 8})
    strides = {"address": [rng.randrange(1 << 20) for _ in counts], "row": [rng.randrange(256) for _ in counts]}
    start = {"address": rng.randrange(1 << 20), "row": rng.randrange(256)}

    async def bench(ctx):
        for k in range(levels):
            ctx.set(dut.count[k], counts[k])
            ctx.set(dut.stride_address[k], strides["address"][k])
            ctx.set(dut.stride_row[k], strides["row"][k])
        ctx.set(dut.start_address, start["address"])
        ctx.set(dut.start_row, start["row"])
        for _ in range(2):     # a second run shows that nothing is left over
            ctx.set(dut.load, 1)
            ctx.set(dut.begin, 1)
            await ctx.tick()
            ctx.set(dut.load, 0)
            ctx.set(dut.begin, 0)
            ctx.set(dut.step, 1)
            loops = [range(max(1, count)) for count in counts]
            for index in itertools.product(*loops):
                for name, bits in (("address", 20), ("row", 8)):
                    offset = sum(i * s for i, s in zip(index, strides[name], strict=True))
                    expected = (start[name] + offset) % (1 << bits)
                    assert ctx.get(getattr(dut, f"value_{name}")) == expected, index
                for k, i in enumerate(index):
                    assert ctx.get(dut.at_first[k]) == (i == 0)
                    assert ctx.get(dut.at_last[k]) == (i == len(loops[k]) - 1)
                assert ctx.get(dut.last) == (index == tuple(len(loop) - 1 for loop in loops))
                await ctx.tick()
            ctx.set(dut.step, 0)

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


def test_no_levels_is_refused():
    with pytest.raises(ValueError, match="at least one level"):
        LoopNest(0, {})
