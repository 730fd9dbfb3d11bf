"""VectorReader and VectorWriter against numpy views of the same memory."""

import itertools

import numpy as np
import pytest

from hw.config import PRESETS
from hw.interfaces import ADDRESS_BITS
from hw.vector_reader import LEVELS, VectorReader
from hw.vector_writer import VectorWriter
from tests.hw.memory_model import Memory
from tests.hw.streams import STALLS, simulate, stalls, stream_check, stream_get, stream_put

TYPES = (np.int8, np.int16, np.int32)


def run_setup(ctx, dut, width, address, counts, strides):
    ctx.set(dut.width, width)
    ctx.set(dut.address, address)
    for k in range(LEVELS):
        ctx.set(dut.count[k], counts[k])
        ctx.set(dut.stride[k], strides[k])


async def pulse(ctx, signal):
    ctx.set(signal, 1)
    await ctx.tick()
    ctx.set(signal, 0)


def addresses(address, counts, strides):
    for index in itertools.product(*(range(max(1, count)) for count in counts)):
        yield address + sum(i * s for i, s in zip(index, strides, strict=True))


def parts(config, places, width, single=False):
    """Addresses of the parts of the vectors at ``places``."""
    return [place + part * (config.lanes << width) for place in places for part in range(1 if single else config.parts)]


def patterns(lanes, size):
    """(address, counts, strides in vectors) of sequential, repeated, strided and backward walks."""
    vector = lanes * size
    yield 0x400, (1, 1, 1, 1, 23), (0, 0, 0, 0, vector)
    yield 0x400 + 3 * vector, (2, 1, 3, 2, 5), (128 * vector, 0, 16 * vector, 0, vector)
    yield 0x1000, (1, 2, 2, 3, 2), (0, 64 * vector, 8 * vector, 2 * vector, vector)
    yield 0x1000, (0, 0, 1, 0, 9), (0, 0, 0, 0, -vector)


@pytest.mark.parametrize("core, single", [("tiny", False), ("tiny", True), ("wide", False), ("small", False),
                                          ("small", True)])
@pytest.mark.parametrize("pattern", STALLS)
@pytest.mark.parametrize("width", [0, 1, 2])
def test_reader(core, single, pattern, width):
    config = PRESETS[core]
    memory = Memory(config)
    dut = VectorReader(config, ahead=8 if pattern == "both" else 256)
    source, sink = stalls(pattern, (core, width))

    async def bench(ctx):
        ctx.set(dut.single, single)
        for address, counts, strides in patterns(config.vector, 1 << width):
            walk = [*addresses(address, counts, strides)]
            places = parts(config, walk, width, single)
            run_setup(ctx, dut, width, address, counts, strides)
            await pulse(ctx, dut.start)
            memory.reads.clear()
            vectors = await stream_get(ctx, dut.vector, len(places), stall=sink)
            for place, vector in zip(places, vectors, strict=True):
                assert [*vector] == memory.load(place, (config.lanes,), TYPES[width]).tolist()
            lines = [place // config.line_bytes for place in places]
            assert memory.reads == [line for line, _ in itertools.groupby(lines)]
            # A new run reads again what the last one held: it may have changed.
            again = parts(config, walk[-1:], width, single)
            memory.bytes[again[-1]] ^= 0x55
            run_setup(ctx, dut, width, again[0], (1,) * LEVELS, (0,) * LEVELS)
            await pulse(ctx, dut.start)
            for place, vector in zip(again, await stream_get(ctx, dut.vector, len(again), stall=sink), strict=True):
                assert [*vector] == memory.load(place, (config.lanes,), TYPES[width]).tolist()

    async def check(ctx):
        await stream_check(ctx, dut.vector)

    simulate(dut, bench, background=[memory.reader(dut.client, stall=source), check,
                                     *memory.checks(dut.client)])


def test_lines_that_differ_in_any_one_bit_are_both_read():
    config = PRESETS["tiny"]
    dut = VectorReader(config)
    line_bits = config.line_bytes.bit_length() - 1

    async def bench(ctx):
        for signal in (dut.single, dut.client.request.ready, dut.client.response.valid, dut.vector.ready):
            ctx.set(signal, 1)
        for bit in range(line_bits, ADDRESS_BITS):
            run_setup(ctx, dut, 2, 0, (1, 1, 1, 1, 2), (0, 0, 0, 0, 1 << bit if bit < ADDRESS_BITS - 1 else -1 << bit))
            await pulse(ctx, dut.start)
            lines = []
            for _ in range(12):
                if ctx.get(dut.client.request.valid):
                    lines.append(ctx.get(dut.client.request.payload))
                await ctx.tick()
            assert lines == [0, 1 << bit - line_bits]

    simulate(dut, bench)


@pytest.mark.parametrize("core", ["tiny", "wide", "small"])
@pytest.mark.parametrize("pattern", STALLS)
@pytest.mark.parametrize("width", [0, 1, 2])
def test_writer(core, pattern, width):
    config = PRESETS[core]
    memory = Memory(config)
    dut = VectorWriter(config)
    source, sink = stalls(pattern, (core, width))
    rng = np.random.default_rng(width)

    async def bench(ctx):
        assert ctx.get(dut.done)
        for address, counts, strides in patterns(config.vector, 1 << width):
            places = parts(config, addresses(address, counts, strides), width)
            data = rng.integers(-127, 128, (len(places), config.lanes))
            expected = memory.bytes.copy()
            for place, vector in zip(places, data, strict=True):
                raw = vector.astype(TYPES[width]).view(np.uint8)
                expected[place:place + len(raw)] = raw
            run_setup(ctx, dut, width, address, counts, strides)
            await pulse(ctx, dut.start)
            memory.writes.clear()
            await stream_put(ctx, dut.vector, [[int(x) for x in vector] for vector in data], stall=source)
            while not ctx.get(dut.done):
                await ctx.tick()
            await ctx.tick()
            while not ctx.get(dut.client.idle):
                await ctx.tick()
            assert not ctx.get(dut.vector.ready)
            assert np.array_equal(memory.bytes, expected)
            lines = [place // config.line_bytes for place in places]
            assert [line for line, _ in memory.writes] == [line for line, _ in itertools.groupby(lines)]

    simulate(dut, bench, background=[memory.writer(dut.client, stall=sink), *memory.checks(dut.client)])


@pytest.mark.parametrize("core", ["tiny", "small"])
@pytest.mark.parametrize("width", [0, 1, 2])
def test_one_part_per_cycle(core, width):
    config = PRESETS[core]
    vector = config.vector << width
    vectors = 300
    count = vectors * config.parts
    reader, writer = VectorReader(config), VectorWriter(config)
    memory = Memory(config)
    cycles = {}

    async def read(ctx):
        run_setup(ctx, reader, width, 0, (1, 1, 1, 1, vectors), (0, 0, 0, 0, vector))
        await pulse(ctx, reader.start)
        await stream_get(ctx, reader.vector, 1)
        ctx.set(reader.vector.ready, 1)
        cycles["read"] = 0
        for _ in range(count - 1):
            cycles["read"] += 1
            await ctx.tick().until(reader.vector.valid)

    async def write(ctx):
        run_setup(ctx, writer, width, 0, (1, 1, 1, 1, vectors), (0, 0, 0, 0, vector))
        await pulse(ctx, writer.start)
        ctx.set(writer.vector.valid, 1)
        cycles["write"] = 0
        while not ctx.get(writer.done):
            cycles["write"] += 1
            await ctx.tick()

    # The first parts wait for the memory's latency; from then on none does.
    simulate(reader, read, background=[memory.reader(reader.client, latency=100)], limit=count + 150)
    simulate(writer, write, background=[memory.writer(writer.client)])
    assert cycles["write"] == count + 3


def test_a_reader_needs_room_to_run_ahead():
    with pytest.raises(ValueError, match="at least 2"):
        VectorReader(PRESETS["tiny"], ahead=1)
