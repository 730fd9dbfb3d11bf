"""WritePort against a memory model: contents, bursts, idle, window, errors, throughput, under every stall pattern."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw.coalescer import BURST_LINES
from hw.config import PRESETS, CoreConfig
from hw.errors import ErrorCode
from hw.write_port import WritePort
from tests.hw.axi_memory import AxiMemory
from tests.hw.streams import STALLS, simulate, stalls, stream_put

TINY = PRESETS["tiny"]           # 16-byte lines, one beat each
NARROW = CoreConfig(name="narrow", rows=8, columns=4, beat_bytes=8)     # 32-byte lines, four beats each
MEMORY_BYTES = 1 << 18


def items(config, lines, seed=0, *, whole=False):
    """Writes with random data and strobes (among them none and all) to the given line addresses."""
    rng = random.Random(seed)
    full = (1 << config.line_bytes) - 1
    return [{"address": line, "data": rng.getrandbits(config.line_bits),
             "strobe": full if whole else rng.choice([0, full, rng.getrandbits(config.line_bytes)])} for line in lines]


def apply(content, config, item):
    for k in range(config.line_bytes):
        if item["strobe"] >> k & 1:
            content[(item["address"] * config.line_bytes + k) % len(content)] = item["data"] >> 8 * k & 0xFF


def write(config, writes, *, pattern="none", latency=4, pace=1, limit=20_000):
    """Every client writes its items, one every ``pace`` cycles at most; returns (memory, cycles until all idle)."""
    dut = WritePort(config, len(writes))
    _, sink = stalls(pattern, "memory")
    memory = AxiMemory(dut.axi, bytearray(MEMORY_BYTES), latency=latency, stall=sink)
    cycles = 0
    done = [0] * len(writes)

    def client(i):
        source, _ = stalls(pattern, i)
        clock = iter(range(1 << 30))

        def wait():
            return source() if pace == 1 else next(clock) % pace != 0

        async def put(ctx):
            await ctx.tick()      # the window takes effect
            await stream_put(ctx, dut.clients[i].line, writes[i], stall=wait)

        async def idle(ctx):
            port = dut.clients[i]
            taken_before = 0
            async for _, _, taken, is_idle in ctx.tick().sample(port.line.valid & port.line.ready, port.idle):
                if taken_before:
                    assert not is_idle, "idle in the cycle after a line was taken"
                taken_before = taken
                done[i] += taken
                if is_idle and done[i] == len(writes[i]):
                    assert written(i), "idle before the data reached memory"
                    return
        return put, idle

    def written(i):
        mine = bytearray(MEMORY_BYTES)
        touched = set()
        for item in writes[i]:
            apply(mine, config, item)
            touched |= {(item["address"] * config.line_bytes + k) % MEMORY_BYTES for k in range(config.line_bytes)}
        return all(memory.content[k] == mine[k] for k in touched)

    async def open_window(ctx):
        ctx.set(dut.window_limit, 0xFFFF_FFFF)

    async def count(ctx):
        nonlocal cycles
        async for _ in ctx.tick():
            cycles += 1

    async def finish(ctx):
        while done != [len(lines) for lines in writes] or not ctx.get(dut.quiet):
            await ctx.tick()
        await ctx.tick()      # the memory model may run after this bench
        assert memory.write_bursts_open == 0
        assert not ctx.get(dut.error)

    clients = [client(i) for i in range(len(writes))]
    simulate(dut, open_window, *(put for put, _ in clients), finish,
             background=(memory.serve_writes, count, *(idle for _, idle in clients)), limit=limit)
    return memory, cycles


@pytest.mark.parametrize("config", [TINY, NARROW], ids=lambda config: config.name)
@pytest.mark.parametrize("pattern", STALLS)
def test_each_client_writes_its_lines(config, pattern):
    rng = random.Random(pattern)
    writes = []
    for i in range(3):
        lines = []
        while len(lines) < 80:      # each client in its own part of memory, runs and single lines, also repeated
            start = rng.randrange(500) + 1000 * i
            lines += range(start, start + rng.choice([1, 1, 2, 5, 17, 40]))
        writes.append(items(config, lines, seed=i))
    memory, _ = write(config, writes, pattern=pattern)
    expected = bytearray(MEMORY_BYTES)
    for item in (item for client in writes for item in client):
        apply(expected, config, item)
    assert memory.content == expected


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, (1 << 28) - 1), st.integers(1, 40)), min_size=1, max_size=8))
def test_bursts_cover_exactly_the_writes(extents):
    lines = [(start + k) % ((1 << 28) - 1) for start, count in extents for k in range(count)]
    memory, _ = write(TINY, [items(TINY, lines)])
    assert [address // 16 + k for address, beats in memory.writes for k in range(beats)] == lines
    for (first, beats), (second, _) in zip(memory.writes, memory.writes[1:], strict=False):
        assert beats <= BURST_LINES
        assert second != first + 16 * beats or second % 4096 == 0 or beats == BURST_LINES


@pytest.mark.parametrize("config", [TINY, NARROW], ids=lambda config: config.name)
def test_sequential_lines_go_out_one_per_cycle(config):
    count, beats = 400, config.line_bytes // config.beat_bytes
    memory, cycles = write(config, [items(config, range(64, 64 + count), whole=True)], latency=128)
    assert cycles <= beats * count + 128 + BURST_LINES + 24
    assert len(memory.writes) <= count // BURST_LINES + 2


def test_isolated_lines_go_out_one_per_cycle():
    lines = random.Random(3).sample(range(1 << 14), 400)
    memory, cycles = write(TINY, [items(TINY, lines)], latency=128)
    assert cycles <= 400 + 128 + 32
    assert len(memory.writes) > 390


def test_two_clients_share_a_line_per_cycle():
    memory, cycles = write(TINY, [items(TINY, range(0, 300)), items(TINY, range(5000, 5300))], latency=128)
    assert cycles <= 600 + 128 + 48
    assert len(memory.writes) <= 2 * (300 // BURST_LINES + 3)


def test_a_line_every_fourth_cycle_still_makes_bursts():
    memory, _ = write(TINY, [items(TINY, range(64))], pace=4)
    assert [beats for _, beats in memory.writes] == [BURST_LINES] * 4


def test_lines_wait_when_memory_does_not_answer():
    """Nothing is lost when the write data channel stands still: the client is held up, not overrun."""
    dut = WritePort(TINY, 1)
    stalled = True
    memory = AxiMemory(dut.axi, bytearray(MEMORY_BYTES), stall=lambda: stalled)
    writes = items(TINY, range(200), whole=True)
    taken = 0

    async def put(ctx):
        ctx.set(dut.window_limit, 0xFFFF_FFFF)
        await ctx.tick()
        await stream_put(ctx, dut.clients[0].line, writes)

    async def release(ctx):
        nonlocal stalled
        for _ in range(300):
            await ctx.tick()
        assert memory.writes == []
        assert not ctx.get(dut.clients[0].line.ready)
        assert not ctx.get(dut.clients[0].idle)
        assert taken < 64
        stalled = False
        while taken < len(writes) or not ctx.get(dut.quiet):
            await ctx.tick()
        expected = bytearray(MEMORY_BYTES)
        for item in writes:
            apply(expected, TINY, item)
        assert memory.content == expected

    async def count(ctx):
        nonlocal taken
        line = dut.clients[0].line
        async for _, _, transfer in ctx.tick().sample(line.valid & line.ready):
            taken += transfer

    simulate(dut, put, release, background=(memory.serve_writes, count), limit=2000)


class Halting:
    """Two clients in a window of lines 0x100 to 0x17F."""

    BASE, LIMIT = 0x1000, 0x1800

    def __init__(self, **memory):
        self.dut = WritePort(TINY, 2)
        self.memory = AxiMemory(self.dut.axi, bytearray(MEMORY_BYTES), **memory)
        self.expected = bytearray(MEMORY_BYTES)

    async def window(self, ctx):
        ctx.set(self.dut.window_base, self.BASE)
        ctx.set(self.dut.window_limit, self.LIMIT)
        await ctx.tick()

    async def put(self, ctx, client, writes):
        for item in writes:
            apply(self.expected, TINY, item)
        await stream_put(ctx, self.dut.clients[client].line, writes)

    async def settle(self, ctx):
        await ctx.tick()
        while not ctx.get(self.dut.quiet):
            await ctx.tick()
        await ctx.tick()      # the memory model may run after this bench
        assert self.memory.write_bursts_open == 0
        assert self.memory.content == self.expected

    async def resume(self, ctx):
        ctx.set(self.dut.clear, 1)
        await ctx.tick()
        ctx.set(self.dut.clear, 0)
        for client in range(2):
            await self.put(ctx, client, items(TINY, range(0x120, 0x126), seed=5))
            await self.settle(ctx)
        assert not ctx.get(self.dut.error)

    def run(self, bench):
        simulate(self.dut, bench, background=(self.memory.serve_writes,), limit=2000)


def test_turns_begin_anew_when_the_port_is_quiet():
    test = Halting()

    async def bench(ctx):
        await test.window(ctx)
        for _ in range(3):
            test.memory.writes.clear()
            for client, line in zip(test.dut.clients, (0x140, 0x160), strict=True):
                item, = items(TINY, [line], whole=True)
                apply(test.expected, TINY, item)
                ctx.set(client.line.payload, item)
                ctx.set(client.line.valid, 1)
            await ctx.tick()
            for client in test.dut.clients:
                ctx.set(client.line.valid, 0)
            await test.settle(ctx)
            assert [address for address, *_ in test.memory.writes] == [0x1400, 0x1600]

    test.run(bench)


@pytest.mark.parametrize("line, inside", [(0x100, True), (0x17F, True), (0xFF, False), (0x180, False),
                                          (0, False), ((1 << 28) - 1, False)])
def test_window(line, inside):
    test = Halting()

    async def bench(ctx):
        await test.window(ctx)
        await test.put(ctx, 0, items(TINY, range(0x100, 0x105), seed=1))
        item = items(TINY, [line], whole=True)
        if inside:
            await test.put(ctx, 1, item)
        else:
            await stream_put(ctx, test.dut.clients[1].line, item)
            while not ctx.get(test.dut.error):
                await ctx.tick()
            assert ctx.get(test.dut.error_code) == ErrorCode.WRITE_OUTSIDE_WINDOW
            assert ctx.get(test.dut.error_address) == line * 16
            assert ctx.get(test.dut.error_client) == 1
            assert not ctx.get(test.dut.clients[0].line.ready)
        await test.settle(ctx)      # what was taken before is written, the line outside is not
        assert ctx.get(test.dut.error) == (not inside)
        await test.resume(ctx)

    test.run(bench)


@pytest.mark.parametrize("before", [0, 1, 5])
def test_lines_behind_one_outside_the_window_are_dropped_with_it(before):
    """A client that goes on giving lines until it is held up: those before the one outside are written, none behind it,
    and lines given after the error was cleared carry their own data."""
    test = Halting(latency=12)
    writes = items(TINY, range(0x100, 0x100 + before), whole=True)

    async def bench(ctx):
        await test.window(ctx)
        for item in writes:
            apply(test.expected, TINY, item)
        line, taken = test.dut.clients[0].line, 0
        for item in [*writes, *items(TINY, [0x200, *range(0x110, 0x120)], seed=2, whole=True)]:
            ctx.set(line.payload, item)
            ctx.set(line.valid, 1)
            taken += ctx.get(line.ready)
            await ctx.tick()
        ctx.set(line.valid, 0)
        assert taken > before + 1, "no line came behind the one outside"
        await test.settle(ctx)
        assert ctx.get(test.dut.error_address) == 0x2000
        await test.resume(ctx)

    test.run(bench)


def test_an_error_response_halts():
    test = Halting(failing=[0x1108], latency=20)

    async def bench(ctx):
        await test.window(ctx)
        await test.put(ctx, 0, items(TINY, range(0x100, 0x120), seed=1))
        while not ctx.get(test.dut.error):
            await ctx.tick()
        assert ctx.get(test.dut.error_code) == ErrorCode.WRITE_FAILED
        assert ctx.get(test.dut.error_address) == 0x1100
        assert ctx.get(test.dut.error_client) == 0
        await test.settle(ctx)
        assert not ctx.get(test.dut.clients[0].line.ready)
        test.memory.failing.clear()
        await test.resume(ctx)

    test.run(bench)


@pytest.mark.parametrize("age", range(0, 60, 3))
def test_soft_reset_at_any_time(age):
    """Lines taken before the reset are written whole, later ones are not taken until the port is quiet; memory's
    error responses no longer count."""
    test = Halting(latency=12)
    writes = items(TINY, [0x100 + k for k in range(60)], whole=True)

    async def bench(ctx):
        await test.window(ctx)
        line = test.dut.clients[0].line
        for item in writes[:age]:
            ctx.set(line.payload, item)
            ctx.set(line.valid, 1)
            if ctx.get(line.ready):
                apply(test.expected, TINY, item)
            await ctx.tick()
        ctx.set(line.valid, 0)
        ctx.set(test.dut.reset, 1)
        await ctx.tick()
        ctx.set(test.dut.reset, 0)
        test.memory.failing.update(range(0x1000, 0x1800))
        ctx.set(line.valid, 1)
        while not ctx.get(test.dut.quiet):
            assert not ctx.get(line.ready)
            await ctx.tick()
        ctx.set(line.valid, 0)
        await test.settle(ctx)
        assert not ctx.get(test.dut.error)
        test.memory.failing.clear()
        await test.resume(ctx)

    test.run(bench)


@pytest.mark.parametrize("clients", [0, 17])
def test_bad_parameters_are_refused(clients):
    with pytest.raises(ValueError, match=f"serves 1 to 16 clients, not {clients}"):
        WritePort(TINY, clients)
