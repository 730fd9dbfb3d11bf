"""MaxPool against numpy: maxima and the first position that holds them."""

import numpy as np
import pytest

from hw.pool import WINDOW, MaxPool
from tests.hw.streams import STALLS, simulate, stalls, stream_check, stream_get, stream_put


@pytest.mark.parametrize("pattern", STALLS)
@pytest.mark.parametrize("low, high", [(-1, 2), (-2**31, 2**31)])
@pytest.mark.parametrize("parts", [1, 2])
def test_first_maximum_of_each_window(parts, pattern, low, high):
    lanes, windows = 5, 60
    x = np.random.default_rng(high % 7).integers(low, high, (windows, WINDOW, parts, lanes))
    dut = MaxPool(lanes, parts)
    source, sink = stalls(pattern)
    cycles = 0

    async def put(ctx):
        await stream_put(ctx, dut.input, x.reshape(-1, lanes).tolist(), stall=source)

    async def get(ctx):
        results = await stream_get(ctx, dut.output, windows * parts, stall=sink)
        assert [[*result.value] for result in results] == x.max(axis=1).reshape(-1, lanes).tolist()
        assert [[*result.choice] for result in results] == x.argmax(axis=1).reshape(-1, lanes).tolist()

    async def check(ctx):
        await stream_check(ctx, dut.output)

    async def count(ctx):
        nonlocal cycles
        async for _ in ctx.tick():
            cycles += 1

    simulate(dut, put, get, background=(check, count))
    if pattern == "none":
        # The second result of a window holds the parts behind it up for two cycles.
        assert cycles <= windows * (WINDOW * parts + 2 * (parts - 1)) + 3


@pytest.mark.parametrize("arguments, message", [((0,), "at least one lane"), ((4, 3), "1 or 2 parts, not 3")])
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MaxPool(*arguments)
