"""WeightRing against a plain model: contents and order of the tiles, and the array's timing contract."""

import random

import numpy as np
import pytest

from hw.config import CoreConfig
from hw.descriptor import Mode
from hw.weight_ring import WeightRing
from tests.hw.memory_model import Memory
from tests.hw.streams import simulate, stalls, stream_put

SIZE = 1 << 16


def _config(rows, columns, lanes=0):
    """With the smallest ring; ``lanes`` = 0: as many as a vector has channels."""
    parts = max(rows, columns) // lanes if lanes else 1
    return CoreConfig(name="test", rows=rows, columns=columns, lanes=lanes, weight_lines=max(rows, columns) * parts)


def _rows(config, mode):
    """Rows of a tile: the length of the shadow chain that it fills."""
    return config.columns if mode == Mode.FORWARD else config.rows


def _lanes(config, mode):
    return config.rows if mode == Mode.FORWARD else config.columns


def _command(rng, config, memory, mode):
    """A command of random loops and the tiles it stands for."""
    if mode == Mode.GRADIENT:
        return {"mode": mode, "tiles": [2, 2, 2, 2], "weights": {"address": 0}}, []
    lanes, vector = _lanes(config, mode), config.vector
    counts = rng.sample([1, 2, 2, 3], 4)
    # One loop may step through the slices of a vector, the others step by whole lines; some run backwards.
    strides = [rng.randrange(-8, 8) * config.line_bytes for _ in counts]
    address = SIZE // 2 + rng.randrange(-100, 100) * config.line_bytes + lanes * rng.randrange(vector // lanes)
    if vector > lanes and rng.random() < 0.5:
        k = rng.randrange(4)
        address -= address % vector
        counts[k], strides[k] = vector // lanes, lanes
    return _fields(mode, counts, address, strides), _tiles(config, memory, mode, counts, address, strides)


def _fields(mode, counts, address, strides):
    return {"mode": mode, "tiles": counts,
            "weights": {"address": address} | {f"stride{k}": s for k, s in enumerate(strides)}}


def _tiles(config, memory, mode, counts, address, strides):
    """(mode, row vectors in the order they leave) of each tile."""
    n, lanes, vector = _rows(config, mode), _lanes(config, mode), config.vector
    tiles = []
    for index in np.ndindex(*counts):
        start = address + sum(i * s for i, s in zip(index, strides, strict=True))
        block = memory.bytes[start - start % vector:][:n * vector].reshape(n, vector)
        tiles.append((mode, block[::-1, start % vector:start % vector + lanes]))
    return tiles


async def _array(ctx, dut, tiles, *, stall=lambda: False, disable=lambda: False):
    """Plays feeder and array, checks tiles and timing; returns the cycles of the takes.

    ``stall()`` says whether to leave a ready tile for now, ``disable()`` whether to lower ``enable`` in this cycle.
    Before a change of mode the array drains: ``enable`` stays low.
    """
    config, latency = dut.config, dut.feed_latency
    takes, rows, enabled = [], [], []
    boundary = drained = 0
    cycle = checked = 0
    ready = False
    while checked < len(tiles):
        coming = tiles[min(len(takes), len(tiles) - 1)][0]
        changing = bool(takes) and coming != tiles[len(takes) - 1][0] and cycle < max(drained, takes[-1] + 10)
        enable = not changing and not disable()
        ctx.set(dut.enable, enable)
        enabled.append(enable)
        if ctx.get(dut.shift):
            assert checked < len(tiles), "a tile too many"
            assert not checked or cycle >= boundary + _rows(config, tiles[checked][0]), "shift too early"
            assert rows or enabled[cycle - 3], "tile began while not enabled"
            rows.append(ctx.get(dut.vector))
        if takes and cycle == takes[-1] + latency:
            mode, expected = tiles[checked]
            lanes = _lanes(config, mode)
            got = np.array([[row >> 8 * k & 0xFF for k in range(lanes)] for row in rows])
            np.testing.assert_array_equal(got, expected, f"tile {checked}")
            rows, boundary, checked = [], cycle, checked + 1
            drained = cycle + 3 * config.vector
        ready, was_ready = bool(ctx.get(dut.ready)), ready
        take = ready and was_ready and not stall()
        ctx.set(dut.take, take)
        if take:
            takes.append(cycle)
        await ctx.tick()
        cycle += 1
    ctx.set(dut.take, 0)
    return takes


@pytest.mark.parametrize("latency", [2, 3])
@pytest.mark.parametrize("shape, pattern", [
    ((4, 4), "both"), ((4, 8), "none"), ((8, 4), "source"), ((4, 16), "sink"), ((16, 8), "both"),
    ((8, 8, 4), "both"), ((4, 8, 4), "sink"), ((8, 4, 4), "none"), ((16, 4, 8), "source"),
])
def test_tiles_and_timing(shape, pattern, latency):
    rng = random.Random(f"{shape} {latency}")
    config = _config(*shape)
    dut = WeightRing(config, feed_latency=latency)
    memory = Memory(config, SIZE)
    commands, tiles = [], []
    for mode in (Mode.FORWARD, Mode.ERROR, Mode.ERROR, Mode.GRADIENT, Mode.FORWARD, Mode.FORWARD):
        fields, more = _command(rng, config, memory, mode)
        commands.append(fields)
        tiles += more
    source, sink = stalls(pattern, shape)

    async def put(ctx):
        await stream_put(ctx, dut.command, commands, stall=source)

    async def array(ctx):
        await _array(ctx, dut, tiles, stall=sink, disable=sink)
        await ctx.tick().repeat(50)
        assert not ctx.get(dut.ready) and not ctx.get(dut.shift) and not ctx.get(dut.busy)

    simulate(dut, put, array, background=[memory.reader(dut.memory, stall=source, latency=rng.choice([1, 15])),
                                          *memory.checks(dut.memory)], limit=20_000)


@pytest.mark.parametrize("latency", [2, 3])
@pytest.mark.parametrize("mode", [Mode.FORWARD, Mode.ERROR])
@pytest.mark.parametrize("lanes", [16, 8])
def test_a_tile_every_2n_minus_1_cycles(lanes, mode, latency):
    """Sustained, with a new command every other tile and a memory latency beyond a tile's time."""
    config = CoreConfig(name="test", rows=16, columns=16, lanes=lanes)
    dut = WeightRing(config, feed_latency=latency)
    memory = Memory(config, SIZE)
    arguments = [(mode, [1, 1, 2, 1], 1024 * k, [0, 0, 512, 0]) for k in range(8)]
    tiles = [tile for a in arguments for tile in _tiles(config, memory, *a)]
    takes = []

    async def put(ctx):
        await stream_put(ctx, dut.command, [_fields(*a) for a in arguments])

    async def array(ctx):
        takes.extend(await _array(ctx, dut, tiles))

    simulate(dut, put, array, background=[memory.reader(dut.memory, latency=60)])
    assert np.diff(takes).tolist() == [2 * 16 - 1] * (len(tiles) - 1)


@pytest.mark.parametrize("lanes", [8, 4])
def test_prefetch_fills_the_ring_across_commands(lanes):
    config = _config(8, 4, lanes)
    dut = WeightRing(config)
    memory = Memory(config, SIZE)
    arguments = [(Mode.FORWARD, [1, 1, 1, 3], 0, [0, 0, 0, 32]), (Mode.GRADIENT, [1] * 4, 0, [0] * 4),
                 (Mode.ERROR, [1, 1, 1, 4], 1024, [0, 0, 0, 64])]
    lines = config.vector // lanes          # of a tile with four rows
    tiles = range(3 * lines), range(1024 // config.line_bytes, 1024 // config.line_bytes + 8 * lines)

    async def put(ctx):
        await stream_put(ctx, dut.command, [_fields(*a) for a in arguments])

    async def array(ctx):
        ctx.set(dut.enable, 1)
        await ctx.tick().repeat(60)
        # The first tile is in the shadow chain, so its lines are free again.
        assert memory.reads == [*tiles[0], *tiles[1]][:config.weight_lines + lines]
        assert ctx.get(dut.ready) and ctx.get(dut.stalled_out) and ctx.get(dut.busy)

    simulate(dut, array, background=[put, memory.reader(dut.memory)])


def test_busy_until_the_tile_is_ready():
    config = _config(4, 4)
    dut = WeightRing(config)
    memory = Memory(config, SIZE)
    busy = []

    async def put(ctx):
        await stream_put(ctx, dut.command, [_fields(Mode.FORWARD, [1, 1, 1, 1], 0, [0, 0, 0, 32])])

    async def array(ctx):
        ctx.set(dut.enable, 1)
        while not ctx.get(dut.ready):
            busy.append(ctx.get(dut.busy))
            await ctx.tick()
        assert all(busy[busy.index(1):]), busy

    simulate(dut, array, background=[put, memory.reader(dut.memory, latency=15)])


def test_gradient_is_taken_at_once():
    config = _config(4, 4)
    dut = WeightRing(config)
    memory = Memory(config, SIZE)

    async def put(ctx):
        fields = _fields(Mode.GRADIENT, [2, 2, 2, 2], 64, [64] * 4)
        for _ in range(3):
            ctx.set(dut.command.payload, dut.command.payload.shape().const(fields))
            ctx.set(dut.command.valid, 1)
            assert ctx.get(dut.command.ready)
            await ctx.tick()
        ctx.set(dut.command.valid, 0)
        await ctx.tick().repeat(20)
        assert not memory.reads and not ctx.get(dut.busy)

    simulate(dut, put, background=[memory.reader(dut.memory)])


def test_stalled_in_counts_the_wait_for_memory():
    dut = WeightRing(_config(4, 4))
    command = dut.command.payload.shape().const(_fields(Mode.FORWARD, [1] * 4, 0, [0] * 4))

    async def bench(ctx):
        ctx.set(dut.enable, 1)
        stalled = []
        for latency in (5, 45):
            ctx.set(dut.command.payload, command)
            ctx.set(dut.command.valid, 1)
            ctx.set(dut.memory.request.ready, 1)
            count = 0
            await ctx.tick().until(dut.command.ready)
            ctx.set(dut.command.valid, 0)
            for cycle in range(latency + 10):
                ctx.set(dut.memory.response.valid, cycle == latency)
                count += ctx.get(dut.stalled_in)
                await ctx.tick()
            stalled.append(count)
            await ctx.tick().until(dut.ready)
            ctx.set(dut.take, 1)
            await ctx.tick()
            ctx.set(dut.take, 0)
            await ctx.tick().repeat(10)
        assert stalled[1] - stalled[0] == 40

    simulate(dut, bench)


@pytest.mark.parametrize("latency", [1, 4])
def test_feed_latency_out_of_range_is_refused(latency):
    with pytest.raises(ValueError, match="2 or 3 cycles"):
        WeightRing(_config(4, 4), feed_latency=latency)
