"""Packed and plain pairs of products agree with Python on every pair of the extreme and of many other factors."""

import itertools
import random

import pytest
from amaranth.sim import Simulator

from hw.product_pair import ProductPair

LATENCY = 3


@pytest.mark.parametrize("packed", [False, True])
def test_both_products_are_exact(packed):
    ends = (-128, -127, -1, 0, 1, 127)
    draw = random.Random(1)
    factors = list(itertools.product(ends, repeat=3))
    factors += [[draw.randrange(-128, 128) for _ in range(3)] for _ in range(1000)]
    above = [draw.randrange(-1 << 30, 1 << 30) for _ in factors]
    dut = ProductPair(packed=packed)
    got = []

    async def drive(ctx):
        for cycle in range(len(factors) + LATENCY):
            if cycle < len(factors):
                left, *weights = factors[cycle]
                ctx.set(dut.left, left)
                for k in range(2):
                    ctx.set(dut.weight[k], weights[k])
                    ctx.set(dut.above[k], above[cycle] * (1 - 2 * k))
            await ctx.tick()
            got.append((ctx.get(dut.sum[0]), ctx.get(dut.sum[1])))

    simulator = Simulator(dut)
    simulator.add_clock(1e-9)
    simulator.add_testbench(drive)
    simulator.run()
    assert got[LATENCY - 1:][:len(factors)] == [(x + left * a, -x + left * b)
                                                for (left, a, b), x in zip(factors, above, strict=True)]
