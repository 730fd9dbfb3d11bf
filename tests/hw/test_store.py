"""Store against a plain model: memory contents, ranges, and `done` no earlier than the last acknowledgement."""

import random

import numpy as np
import pytest

from hw.config import CoreConfig
from hw.store import Store
from tests.hw.memory_model import Memory
from tests.hw.streams import STALLS, simulate, stalls, stream_put

# Rows, columns, lanes: a result is a line or a part of one, and with half the lanes two lines, one, or half of one.
SHAPES = [(4, 4, 4), (4, 8, 8), (8, 4, 8), (16, 4, 16), (8, 8, 4), (4, 8, 4), (8, 4, 4), (16, 4, 8)]
SIZE = 1 << 16


def _config(rows, columns, lanes):
    return CoreConfig(name="test", rows=rows, columns=columns, lanes=lanes)


def _command(rng, config, base):
    """A store without overlapping vectors and the byte addresses of its vectors, in order."""
    counts, run = [rng.randrange(1, 4) for _ in range(4)], rng.randrange(1, 4)
    vector_bytes = 4 * config.vector
    stride, strides = run * vector_bytes, []
    for count in reversed(counts):
        strides.insert(0, stride)
        stride *= count
    order = rng.sample(range(4), 4)
    counts, strides = [counts[k] for k in order], [strides[k] for k in order]
    part = 4 * config.columns * rng.randrange(config.vector // config.columns)
    address = base + part
    # Any loop may also run backwards.
    for k in range(4):
        if rng.random() < 0.3:
            address += (counts[k] - 1) * strides[k]
            strides[k] = -strides[k]
    if rng.random() < 0.3:
        counts[rng.randrange(4)] = 0      # counts as 1
    addresses = [address + sum(i * s for i, s in zip(index, strides, strict=True)) + k * vector_bytes
                 for index in np.ndindex(*(max(1, count) for count in counts)) for k in range(run)]
    fields = {"address": address, "run": run, "range_register": rng.randrange(64),
              "range_clear": rng.randrange(2), "range_positive": rng.randrange(2)}
    fields |= {f"stride{k}": s for k, s in enumerate(strides)} | {f"count{k}": c for k, c in enumerate(counts)}
    return fields, addresses


@pytest.mark.parametrize("latency", [1, 20])
@pytest.mark.parametrize("shape, pattern", list(zip(SHAPES, 2 * STALLS, strict=True)) + [
    ((8, 4, 8), "both"), ((8, 8, 4), "both")])
def test_results_ranges_and_done(shape, pattern, latency):
    rng = random.Random(f"{shape} {pattern} {latency}")
    config = _config(*shape)
    dut = Store(config)
    memory = Memory(config, SIZE)
    image = memory.bytes.copy()
    commands, results, ranges = [], [], []
    for number in range(5):
        if number in (1, 4):
            commands.append({"enable": 0, "store": {"address": 0, "run": 3, "count0": 2}})
            ranges.append(None)
            continue
        fields, addresses = _command(rng, config, number * 8192)
        commands.append({"enable": 1, "store": fields})
        largest = 0
        for address in addresses:
            scale = rng.choice([1 << 31, 1 << 8])
            vector = [rng.randrange(-scale, scale) for _ in range(config.columns)]
            if rng.random() < 0.02:
                vector[rng.randrange(config.columns)] = -1 << 31
            largest = max(largest, *vector if fields["range_positive"] else map(abs, vector))
            raw = np.array(vector, dtype=np.int64).astype(np.int32)
            image[address:address + 4 * config.columns] = raw.view(np.uint8)
            results.append(int.from_bytes(raw.tobytes(), "little"))
        ranges.append((fields["range_register"], fields["range_clear"], largest))
    source, sink = stalls(pattern, shape)
    delivered, finished = [], []

    async def put_commands(ctx):
        await stream_put(ctx, dut.command, commands, stall=source)

    async def put_results(ctx):
        await stream_put(ctx, dut.result, results, stall=source)

    async def watch(ctx):
        while len(finished) < len(commands):
            _, _, range_, done = await ctx.tick().sample(dut.range, dut.done)
            if range_.valid:
                delivered.append((range_.register, range_.clear, range_.value))
            if done:
                finished.append(done)
                if ranges[len(finished) - 1] is not None:
                    assert memory.pending == 0, "done before the last acknowledgement"
                    assert len(delivered) == sum(r is not None for r in ranges[:len(finished)])
        await ctx.tick().repeat(20)
        assert not ctx.get(dut.done) and not ctx.get(dut.busy)

    simulate(dut, put_commands, put_results, watch,
             background=[memory.writer(dut.memory, stall=sink, latency=latency), *memory.checks(dut.memory)],
             limit=20_000)
    assert delivered == [r for r in ranges if r]
    assert len(memory.writes) == len(results) * max(1, 4 * config.columns // config.line_bytes)
    np.testing.assert_array_equal(memory.bytes, image)


@pytest.mark.parametrize("shape, lines", [((4, 4, 4), 1), ((8, 8, 4), 2)])
def test_one_line_per_cycle_and_one_latency_between_commands(shape, lines):
    config, latency, run = _config(*shape), 30, 50
    dut = Store(config)
    memory = Memory(config, SIZE)
    command = {"enable": 1, "store": {"run": run}}

    async def put_commands(ctx):
        await stream_put(ctx, dut.command, [command] * 3)

    async def put_results(ctx):
        await stream_put(ctx, dut.result, range(3 * run))

    async def watch(ctx):
        cycles = stalled = 0
        while len(memory.writes) < 3 * run * lines or memory.pending:
            _, _, stalled_in, stalled_out = await ctx.tick().sample(dut.stalled_in, dut.stalled_out)
            stalled += stalled_in + stalled_out
            cycles += 1
        assert cycles <= 3 * (run * lines + latency + 3)
        assert 3 * (latency - 2) <= stalled <= 3 * (latency + 2)

    simulate(dut, put_commands, put_results, watch, background=[memory.writer(dut.memory, latency=latency)])
