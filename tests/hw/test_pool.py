"""MaxPool against numpy: maxima and the first position that holds them."""

import numpy as np
import pytest

from hw.pool import WINDOW, MaxPool
from tests.hw.streams import STALLS, simulate, stalls, stream_check, stream_get, stream_put


@pytest.mark.parametrize("pattern", STALLS)
@pytest.mark.parametrize("low, high", [(-1, 2), (-2**31, 2**31)])
def test_first_maximum_of_each_window(pattern, low, high):
    lanes, windows = 5, 60
    x = np.random.default_rng(high % 7).integers(low, high, (windows, WINDOW, lanes))
    dut = MaxPool(lanes)
    source, sink = stalls(pattern)
    cycles = 0

    async def put(ctx):
        await stream_put(ctx, dut.input, x.reshape(-1, lanes).tolist(), stall=source)

    async def get(ctx):
        results = await stream_get(ctx, dut.output, windows, stall=sink)
        assert [[*result.value] for result in results] == x.max(axis=1).tolist()
        assert [[*result.choice] for result in results] == x.argmax(axis=1).tolist()

    async def check(ctx):
        await stream_check(ctx, dut.output)

    async def count(ctx):
        nonlocal cycles
        async for _ in ctx.tick():
            cycles += 1

    simulate(dut, put, get, background=(check, count))
    if pattern == "none":
        assert cycles <= windows * WINDOW + 3


def test_no_lanes_are_refused():
    with pytest.raises(ValueError, match="at least one lane"):
        MaxPool(0)
