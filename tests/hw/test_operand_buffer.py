"""OperandBuffer against a plain model of loads, banks and slices."""

import itertools
import random

import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring

from hw.config import CoreConfig
from hw.operand_buffer import OperandBuffer
from hw.shared_fold import SharedFold
from tests.hw.memory_model import Memory
from tests.hw.streams import simulate, stalls, stream_put
from tests.hw.test_fold import fold_settings, folded

SIZE = 1 << 15


class WithFold(wiring.Component):
    """An operand buffer beside the folding unit, which it shares with another one that asks now and then."""

    def __init__(self, config, lanes, client=0):
        self.buffer, self.lanes, self.client = OperandBuffer(config, lanes), lanes, client
        self.shared = SharedFold(config)
        self.other = self.shared.clients[1 - client]
        super().__init__({name: member for name, member in self.buffer.signature.members.items() if name != "fold"})

    def elaborate(self, platform):
        m = Module()
        m.submodules.buffer, m.submodules.shared = self.buffer, self.shared
        wiring.connect(m, self.buffer.fold, self.shared.clients[self.client])
        for name, member in self.signature.members.items():
            inner, outer = getattr(self.buffer, name), getattr(self, name)
            if member.is_signature:
                wiring.connect(m, wiring.flipped(outer), inner)
            elif member.flow == wiring.In:
                m.d.comb += inner.eq(outer)
            else:
                m.d.comb += outer.eq(inner)
        return m


def _config(rows, columns, lanes=0):
    return CoreConfig(name="test", rows=rows, columns=columns, lanes=lanes, buffer_lines=64)


def _load(rng, config, memory):
    """A plain load: descriptor fields and the bank's bytes."""
    tiles, runs = rng.randrange(1, 4), rng.randrange(1, 4)
    lines = rng.randrange(1, config.buffer_lines // (tiles * runs) + 1)
    size = config.line_bytes
    tile_stride, run_stride = rng.randrange(20) * size, rng.randrange(20) * size
    address = rng.randrange((SIZE - 2 * (tile_stride + run_stride)) // size - lines) * size
    fields = {"enable": 1, "address": address, "tiles": tiles, "runs": runs, "lines": lines,
              "tile_stride": tile_stride, "run_stride": run_stride}
    parts = [memory.bytes[start:start + lines * size] for tile in range(tiles) for run in range(runs)
             for start in [address + tile * tile_stride + run * run_stride]]
    return fields, np.concatenate(parts)


def _folded_load(rng, config, memory):
    settings = fold_settings(config, kernel=3, channels=rng.randrange(1, 4), stride=1, pad=1, width=6,
                             rows=rng.randrange(2, 6), skip=rng.randrange(config.line_bytes))
    used = settings["fold_skip"] + settings["fold_rows"] * settings["fold_row_bytes"]
    lines = -(-used // config.line_bytes) + rng.randrange(3)     # lines beyond the last row are dropped
    address = rng.randrange(SIZE // config.line_bytes - lines) * config.line_bytes
    raw = memory.bytes[address:address + used]
    packed = folded(config, settings, raw)
    fields = settings | {"address": address, "tiles": 1, "runs": 1, "lines": lines}
    return fields, np.frombuffer(b"".join(x.to_bytes(config.line_bytes, "little") for x in packed), np.uint8)


async def _read(ctx, dut, slices, rng, expected, stall):
    """Reads ``slices`` as they become available, one per cycle where possible, and checks them two cycles later."""
    due = []                               # (cycle, slice)
    pending, held = list(slices), None
    cycle = waited = 0
    while pending or due or held is not None:
        reading = held is not None and bool(ctx.get(dut.available)) and not stall()
        loading = bool(pending) and (held is None or reading)
        ctx.set(dut.address, pending[0] if loading else rng.getrandbits(16))
        ctx.set(dut.load, loading)
        ctx.set(dut.wanted, loading)
        ctx.set(dut.read, reading)
        if due and due[0][0] == cycle:
            k = due.pop(0)[1]
            raw = expected[k * dut.lanes:(k + 1) * dut.lanes]
            assert ctx.get(dut.data) == int.from_bytes(raw.tobytes(), "little"), f"slice {k}"
        waited += 1
        if reading:
            due.append((cycle + 2, held))
            held, waited = None, 0
        if loading:
            held = pending.pop(0)
        assert waited < 2000, f"slice {held} never becomes available"
        await ctx.tick()
        cycle += 1
    ctx.set(dut.read, 0)


async def _available(ctx, dut, address):
    """Takes the address; whether its slice has arrived."""
    ctx.set(dut.address, address)
    ctx.set(dut.load, 1)
    ctx.set(dut.wanted, 1)
    await ctx.tick()
    ctx.set(dut.load, 0)
    return ctx.get(dut.available)


async def _advance(ctx, dut):
    ctx.set(dut.advance, 1)
    await ctx.tick()
    ctx.set(dut.advance, 0)


@pytest.mark.parametrize("shape, edge, pattern", [
    ((4, 4), "rows", "none"), ((4, 8), "rows", "source"), ((4, 8), "columns", "sink"), ((8, 4), "rows", "both"),
    ((8, 4), "columns", "both"), ((16, 16), "rows", "both"), ((8, 8, 4), "rows", "none"), ((4, 8, 4), "rows", "both"),
    ((8, 4, 4), "columns", "sink"), ((16, 16, 8), "columns", "source")])
@pytest.mark.parametrize("fold", [False, True])
def test_every_slice_of_every_load(shape, edge, pattern, fold):
    rng = random.Random(f"{shape} {edge} {fold}")
    config = _config(*shape)
    dut = WithFold(config, getattr(config, edge), client=fold and edge == "columns")
    memory = Memory(config, SIZE)
    loads = []
    for number in range(7):
        make = _folded_load if fold and number % 3 != 1 else _load
        loads.append(make(rng, config, memory))
    commands = []
    for fields, _ in loads:
        while rng.random() < 0.4:
            commands.append(fields | {"enable": 0})
        commands.append(fields)
    source, sink = stalls(pattern, shape)

    async def put(ctx):
        await ctx.tick().repeat(5)         # the first advance comes before the first command
        await stream_put(ctx, dut.command, commands, stall=source)

    async def feed(ctx):
        for number, (_, expected) in enumerate(loads):
            if number % 3 == 2:
                await ctx.tick().repeat(300)        # let the loader run ahead
            ctx.set(dut.other.wanted, 0)
            await _advance(ctx, dut)
            count = len(expected) // dut.lanes
            if number % 2:
                order = sorted(rng.randrange(count) for _ in range(60))
            else:
                order = range(count)
            await _read(ctx, dut, order, rng, expected, sink)
            ctx.set(dut.other.wanted, 1)             # holds up what would begin from now on
            if number % 2:                 # by now everything arrives, in any order
                await _read(ctx, dut, [rng.randrange(count) for _ in range(60)], rng, expected, sink)

    simulate(dut, put, feed, background=[memory.reader(dut.memory, stall=source, latency=rng.choice([1, 10])),
                                         *memory.checks(dut.memory)])


def _plain(lines, address=0):
    return {"enable": 1, "address": address, "tiles": 1, "runs": 1, "lines": lines}


def test_loads_run_one_ahead_and_levels_follow_the_lines():
    config, lines = _config(4, 8), 8
    size = config.line_bytes
    dut = OperandBuffer(config, config.columns)
    memory = Memory(config, SIZE)
    clock = itertools.count()
    per_line = size // dut.lanes

    async def put(ctx):
        await stream_put(ctx, dut.command, [_plain(lines, k * lines * size) for k in range(4)])

    async def available(ctx, line):
        return await _available(ctx, dut, line * per_line + per_line - 1)

    async def feed(ctx):
        await ctx.tick().repeat(250)
        assert memory.reads == list(range(2 * lines)), "two loads before the first advance"
        assert ctx.get(dut.stalled_out) and not ctx.get(dut.busy)
        assert not await available(ctx, 0), "nothing is current yet"
        await _advance(ctx, dut)
        assert await available(ctx, 0) and await available(ctx, lines - 1)
        await ctx.tick().repeat(250)
        assert len(memory.reads) == 2 * lines, "the second bank is still taken"
        await _advance(ctx, dut)
        assert await available(ctx, lines - 1), "loaded while it ran ahead"
        await ctx.tick().repeat(250)
        assert len(memory.reads) == 3 * lines
        await _advance(ctx, dut)
        assert await available(ctx, lines - 1)
        await _advance(ctx, dut)           # the fourth load has just begun
        arrivals, cycle = [], 0
        for line in range(lines):
            while not await available(ctx, line):
                cycle += 1
            arrivals.append(cycle)
            assert line == lines - 1 or not await available(ctx, line + 1), "one line after the other"
        assert arrivals[0] > 0, "nothing had arrived at first"
        await _advance(ctx, dut)           # before its command arrives
        for _ in range(10):
            assert not await available(ctx, 0)
        await stream_put(ctx, dut.command, [_plain(2)])
        await ctx.tick().repeat(20)
        assert await available(ctx, 1)

    simulate(dut, put, feed, background=[memory.reader(dut.memory, latency=5, stall=lambda: next(clock) % 6)])


def test_abandoned_loads_never_look_current():
    """Advancing over loads that have not begun or are in progress."""
    config = _config(4, 4)
    dut = OperandBuffer(config, 4)
    memory = Memory(config, SIZE)
    size = config.line_bytes

    async def feed(ctx):
        for _ in range(3):
            await _advance(ctx, dut)
        for k in range(3):
            assert not await _available(ctx, dut, 0)
            await stream_put(ctx, dut.command, [_plain(20, k * 20 * size)])
        await ctx.tick().repeat(2)
        expected = memory.bytes[40 * size:60 * size]
        await _read(ctx, dut, range(80), random.Random(0), expected, lambda: False)
        ctx.set(dut.command.payload, dut.command.payload.shape().const(_plain(30)))
        ctx.set(dut.command.valid, 1)
        await _advance(ctx, dut)
        await ctx.tick().repeat(15)
        assert await _available(ctx, dut, 0) and ctx.get(dut.busy)
        await _advance(ctx, dut)
        assert ctx.get(dut.available), "no slice is wanted yet"
        await ctx.tick().until(dut.command.ready)
        ctx.set(dut.command.valid, 0)
        for _ in range(5):
            assert not await _available(ctx, dut, 0)

    simulate(dut, feed, background=[memory.reader(dut.memory, latency=3)])


def test_one_line_per_cycle():
    config, latency = _config(4, 4), 25
    dut = OperandBuffer(config, 4)
    memory = Memory(config, SIZE)

    async def put(ctx):
        await stream_put(ctx, dut.command, [_plain(60)])

    async def watch(ctx):
        busy = stalled = 0
        for _ in range(150):
            _, _, b, s = await ctx.tick().sample(dut.busy, dut.stalled_in)
            busy, stalled = busy + b, stalled + s
        assert len(memory.reads) == 60
        assert 60 + latency <= busy <= 60 + latency + 4
        assert latency - 2 <= stalled <= latency

    simulate(dut, put, watch, background=[memory.reader(dut.memory, latency=latency)])


def test_overlong_load_stays_in_its_bank():
    config = _config(4, 4)
    dut = OperandBuffer(config, 4)
    memory = Memory(config, SIZE)
    size = config.line_bytes

    async def feed(ctx):
        await stream_put(ctx, dut.command, [_plain(64), _plain(100, 100 * size)])
        await _advance(ctx, dut)
        await _read(ctx, dut, range(256), random.Random(0), memory.bytes[:64 * size], lambda: False)
        await _advance(ctx, dut)
        await _read(ctx, dut, range(4, 256), random.Random(0), memory.bytes[100 * size:164 * size], lambda: False)

    simulate(dut, feed, background=[memory.reader(dut.memory)])


def test_foreign_number_of_lanes_is_refused():
    with pytest.raises(ValueError, match="4 or 8 lanes, not 16"):
        OperandBuffer(_config(4, 8), 16)
