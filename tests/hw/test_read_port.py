"""ReadPort against a memory model: order, bursts, window, errors, throughput, under every stall pattern."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw.coalescer import BURST_LINES
from hw.config import PRESETS, CoreConfig
from hw.errors import ErrorCode
from hw.fifo import SHALLOW
from hw.read_port import ReadPort
from tests.hw.axi_memory import AxiMemory
from tests.hw.streams import STALLS, simulate, stalls, stream_check, stream_get, stream_put

TINY = PRESETS["tiny"]           # 16-byte lines, one beat each
NARROW = CoreConfig(name="narrow", rows=8, columns=4, beat_bytes=8)     # 32-byte lines, four beats each
CONTENT = random.Random(1).randbytes(1 << 17)


def line_at(config, line):
    start = line * config.line_bytes % len(CONTENT)
    return int.from_bytes(CONTENT[start:start + config.line_bytes], "little")


def read(config, depths, requests, *, pattern="none", latency=4, limit=20_000):
    """Every client reads its list of line addresses; returns (responses, memory, cycles to the last response)."""
    dut = ReadPort(config, depths)
    received = [[] for _ in depths]
    _, sink = stalls(pattern, "memory")
    memory = AxiMemory(dut.axi, bytearray(CONTENT), latency=latency, stall=sink)
    cycles = 0

    def client(i):
        source, sink = stalls(pattern, i)

        async def put(ctx):
            await ctx.tick()      # the window takes effect
            await stream_put(ctx, dut.clients[i].request, requests[i], stall=source)

        async def get(ctx):
            if depths[i]:
                received[i].extend(await stream_get(ctx, dut.clients[i].response, len(requests[i]), stall=sink))
            else:
                response = dut.clients[i].response
                async for _, _, valid, line in ctx.tick().sample(response.valid, response.payload):
                    if valid:
                        received[i].append(line)
                    if len(received[i]) == len(requests[i]):
                        break
            assert not ctx.get(dut.error)

        async def check(ctx):
            await stream_check(ctx, dut.clients[i].response)
        return put, get, *([check] if depths[i] else [])

    async def open_window(ctx):
        ctx.set(dut.window_limit, 0xFFFF_FFFF)

    async def count(ctx):
        nonlocal cycles
        async for _ in ctx.tick():
            cycles += 1

    async def finish(ctx):
        while [len(lines) for lines in received] != [len(lines) for lines in requests]:
            await ctx.tick()
        for _ in range(4):
            await ctx.tick()
        assert ctx.get(dut.quiet)
        assert memory.read_beats_open == 0

    clients = [client(i) for i in range(len(depths))]
    simulate(dut, open_window, *(bench for benches in clients for bench in benches[:2]), finish,
             background=(count, memory.serve_reads, *(bench for benches in clients for bench in benches[2:])),
             limit=limit)
    return received, memory, cycles


def runs(rng, count, page_lines):
    """Line addresses: runs of consecutive lines, single ones, repeats, and runs across page borders."""
    lines = []
    while len(lines) < count:
        start = rng.choice([rng.randrange(1 << 27), page_lines * rng.randrange(1, 1 << 10) - rng.randrange(1, 8)])
        lines += range(start, start + rng.choice([1, 1, 2, 5, 16, 17, 40]))
    return lines[:count]


@pytest.mark.parametrize("config", [TINY, NARROW], ids=lambda config: config.name)
@pytest.mark.parametrize("pattern", STALLS)
def test_each_client_gets_its_lines_in_order(config, pattern):
    rng = random.Random(pattern)
    requests = [[line % (1 << 25) for line in runs(rng, 80, 4096 // config.line_bytes)] for _ in range(3)]
    received, memory, _ = read(config, [8, 0, 1], requests, pattern=pattern)
    for lines, wanted in zip(received, requests, strict=True):
        assert lines == [line_at(config, line) for line in wanted]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, (1 << 28) - 1), st.integers(1, 40)), min_size=1, max_size=8))
def test_bursts_cover_exactly_the_requests(extents):
    lines = [(start + k) % ((1 << 28) - 1) for start, count in extents for k in range(count)]
    received, memory, _ = read(TINY, [0], [lines])
    assert received[0] == [line_at(TINY, line) for line in lines]
    assert [address // 16 + k for address, beats in memory.reads for k in range(beats)] == lines
    # Greedy is minimal: no two neighbouring bursts could have been one.
    for (first, beats), (second, _) in zip(memory.reads, memory.reads[1:], strict=False):
        assert beats <= BURST_LINES
        assert second != first + 16 * beats or second % 4096 == 0 or beats == BURST_LINES


@pytest.mark.parametrize("config", [TINY, NARROW], ids=lambda config: config.name)
def test_a_sequential_client_gets_a_line_per_cycle_over_128_cycles_of_latency(config):
    count = 600
    beats = config.line_bytes // config.beat_bytes
    _, memory, cycles = read(config, [0], [range(64, 64 + count)], latency=128)
    assert cycles <= beats * count + 128 + BURST_LINES + 16
    assert max(beats for _, beats in memory.reads) == BURST_LINES * beats


def test_isolated_lines_come_one_per_cycle_too():
    lines = random.Random(2).sample(range(1 << 20), 600)
    _, memory, cycles = read(TINY, [200], [lines], latency=128)
    assert cycles <= 600 + 128 + 32
    assert len(memory.reads) > 590


def test_two_interleaved_clients_share_a_line_per_cycle():
    received, memory, cycles = read(TINY, [0, 300], [range(0, 400), range(5000, 5400)], latency=128)
    assert cycles <= 800 + 128 + 48
    assert len(memory.reads) <= 2 * (400 // BURST_LINES + 3)


def test_a_slow_client_with_a_full_fifo_still_reads_in_bursts():
    dut = ReadPort(TINY, [32])
    memory = AxiMemory(dut.axi, bytearray(CONTENT))
    wanted = range(64, 64 + 160)

    async def put(ctx):
        ctx.set(dut.window_limit, 0xFFFF_FFFF)
        await ctx.tick()
        await stream_put(ctx, dut.clients[0].request, wanted)

    async def get(ctx):
        cycle = iter(range(1 << 30))
        lines = await stream_get(ctx, dut.clients[0].response, len(wanted), stall=lambda: next(cycle) % 4 != 0)
        assert lines == [line_at(TINY, line) for line in wanted]

    simulate(dut, put, get, background=(memory.serve_reads,), limit=1000)
    assert [beats for _, beats in memory.reads] == [BURST_LINES] * 10


@pytest.mark.parametrize("depth", [1, 5, SHALLOW, SHALLOW + 1, 40])
def test_no_more_lines_are_read_than_a_client_has_room_for(depth):
    dut = ReadPort(TINY, [depth])
    memory = AxiMemory(dut.axi, bytearray(CONTENT))
    wanted = range(0, 4 * depth + 40, 2)         # a burst each

    async def put(ctx):
        ctx.set(dut.window_limit, 0xFFFF_FFFF)
        await ctx.tick()
        await stream_put(ctx, dut.clients[0].request, wanted)

    async def get(ctx):
        await ctx.tick().repeat(200)
        # A deep queue keeps a margin of up to three, because its lines are counted late.
        assert depth - (3 if depth > SHALLOW else 0) <= len(memory.reads) <= depth
        lines = await stream_get(ctx, dut.clients[0].response, len(wanted))
        assert lines == [line_at(TINY, line) for line in wanted]

    simulate(dut, put, get, background=(memory.serve_reads,), limit=2000)


def test_a_stalled_client_does_not_block_the_others():
    dut = ReadPort(TINY, [4, 4])
    memory = AxiMemory(dut.axi, bytearray(CONTENT))

    async def never_takes(ctx):
        await ctx.tick()
        await stream_put(ctx, dut.clients[0].request, range(8))     # four, and four that wait in the port

    async def takes(ctx):
        ctx.set(dut.window_limit, 0xFFFF_FFFF)
        for _ in range(50):
            await ctx.tick()
        assert not ctx.get(dut.clients[0].request.ready)
        await stream_put(ctx, dut.clients[1].request, [7])
        assert await stream_get(ctx, dut.clients[1].response, 1) == [line_at(TINY, 7)]

    simulate(dut, never_takes, takes, background=(memory.serve_reads,), limit=200)


class Halting:
    """One client that is always ready, in a window of lines 0x100 to 0x17F."""

    BASE, LIMIT = 0x1000, 0x1800

    def __init__(self, **memory):
        self.dut = ReadPort(TINY, [0, 16])
        self.memory = AxiMemory(self.dut.axi, bytearray(CONTENT), **memory)
        self.lines = []

    async def window(self, ctx):
        ctx.set(self.dut.window_base, self.BASE)
        ctx.set(self.dut.window_limit, self.LIMIT)
        await ctx.tick()

    async def collect(self, ctx):
        response = self.dut.clients[0].response
        async for _, _, valid, line in ctx.tick().sample(response.valid, response.payload):
            if valid:
                self.lines.append(line)

    async def until_quiet(self, ctx):
        while not ctx.get(self.dut.quiet):
            await ctx.tick()
        await ctx.tick()      # the memory model may run after this bench
        assert self.memory.read_beats_open == 0

    async def resume(self, ctx):
        """Clears the error and shows that the port works again and delivers nothing old."""
        self.lines.clear()
        ctx.set(self.dut.clear, 1)
        await ctx.tick()
        ctx.set(self.dut.clear, 0)
        wanted = range(0x140, 0x150)
        await stream_put(ctx, self.dut.clients[0].request, wanted)
        await stream_put(ctx, self.dut.clients[1].request, wanted)
        lines = await stream_get(ctx, self.dut.clients[1].response, len(wanted))
        assert lines == self.lines == [line_at(TINY, line) for line in wanted]
        assert not ctx.get(self.dut.error)

    def run(self, bench):
        simulate(self.dut, bench, background=(self.memory.serve_reads, self.collect), limit=2000)


def test_turns_begin_anew_when_the_port_is_quiet():
    test = Halting()

    async def bench(ctx):
        await test.window(ctx)
        for _ in range(3):
            test.memory.reads.clear()
            for client, line in zip(test.dut.clients, (0x140, 0x160), strict=True):
                ctx.set(client.request.payload, line)
                ctx.set(client.request.valid, 1)
            await ctx.tick()
            for client in test.dut.clients:
                ctx.set(client.request.valid, 0)
            await ctx.tick()
            await test.until_quiet(ctx)
            assert [address for address, _ in test.memory.reads] == [0x1400, 0x1600]

    test.run(bench)


@pytest.mark.parametrize("line, inside", [(0x100, True), (0x17F, True), (0xFF, False), (0x180, False),
                                          (0, False), ((1 << 28) - 1, False)])
def test_window(line, inside):
    test = Halting()

    async def bench(ctx):
        await test.window(ctx)
        await stream_put(ctx, test.dut.clients[1].request, [line])
        if inside:
            assert await stream_get(ctx, test.dut.clients[1].response, 1) == [line_at(TINY, line)]
        else:
            for _ in range(20):
                await ctx.tick()
            assert test.memory.reads == []
            assert ctx.get(test.dut.error_code) == ErrorCode.READ_OUTSIDE_WINDOW
            assert ctx.get(test.dut.error_address) == line * 16
            assert ctx.get(test.dut.error_client) == 1
            assert not ctx.get(test.dut.clients[0].request.ready)
        assert ctx.get(test.dut.error) == (not inside)
        await test.resume(ctx)

    test.run(bench)


def test_a_window_that_cuts_a_line_excludes_it():
    test = Halting()
    test.BASE, test.LIMIT = 0x1001, 0x17FF

    async def bench(ctx):
        await test.window(ctx)
        for line in (0x100, 0x17F):
            await stream_put(ctx, test.dut.clients[0].request, [line])
            while not ctx.get(test.dut.error):
                await ctx.tick()
            assert ctx.get(test.dut.error_address) == line * 16
            await test.resume(ctx)

    test.run(bench)


@pytest.mark.parametrize("latency", [1, 40])
def test_an_error_response_halts_and_drains(latency):
    test = Halting(latency=latency, failing=[0x1108])

    async def bench(ctx):
        await test.window(ctx)
        for line in range(0x100, 0x130):
            await ctx.tick()
            ctx.set(test.dut.clients[0].request.payload, line)
            ctx.set(test.dut.clients[0].request.valid, 1)
        while not ctx.get(test.dut.error):
            await ctx.tick()
        ctx.set(test.dut.clients[0].request.valid, 0)
        assert ctx.get(test.dut.error_code) == ErrorCode.READ_FAILED
        assert ctx.get(test.dut.error_address) == 0x1100
        assert ctx.get(test.dut.error_client) == 0
        await test.until_quiet(ctx)
        assert test.lines == [line_at(TINY, line) for line in range(0x100, 0x110)]
        test.memory.failing.clear()
        await test.resume(ctx)

    test.run(bench)


@pytest.mark.parametrize("age", range(0, 60, 3))
def test_soft_reset_at_any_time(age):
    """Requests of both clients are in every stage when the reset comes; nothing of them appears afterwards, nor do
    the error responses that memory still gives them."""
    test = Halting(latency=12)

    async def bench(ctx):
        await test.window(ctx)
        for k in range(age):
            for i, client in enumerate(test.dut.clients):
                ctx.set(client.request.payload, 0x100 + k + 16 * i)
                ctx.set(client.request.valid, 1)
            await ctx.tick()
        ctx.set(test.dut.reset, 1)
        await ctx.tick()
        ctx.set(test.dut.reset, 0)
        test.memory.failing.update(range(0x1000, 0x1800))
        for client in test.dut.clients:
            ctx.set(client.request.valid, 0)
        await ctx.tick()
        await test.until_quiet(ctx)
        assert not ctx.get(test.dut.clients[1].response.valid)
        assert not ctx.get(test.dut.error)
        test.memory.failing.clear()
        await test.resume(ctx)

    test.run(bench)


@pytest.mark.parametrize("age", range(10))
def test_a_soft_reset_forgets_errors_up_to_its_cycle(age):
    """Whether a request outside the window is still on its way, is found in that cycle, or was reported before it."""
    test = Halting()

    async def bench(ctx):
        await test.window(ctx)
        await stream_put(ctx, test.dut.clients[1].request, [0x10])
        for _ in range(age):
            await ctx.tick()
        for signal in (test.dut.reset, test.dut.clear):
            ctx.set(signal, 1)
        await ctx.tick()
        for signal in (test.dut.reset, test.dut.clear):
            ctx.set(signal, 0)
        for _ in range(8):
            await ctx.tick()
            assert not ctx.get(test.dut.error)
        await test.resume(ctx)

    test.run(bench)


@pytest.mark.parametrize("depths, message",
                         [([], "serves 1 to 16 clients, not 0"), ([0] * 17, "not 17"), ([-1], "at least 0 .*not -1")])
def test_bad_parameters_are_refused(depths, message):
    with pytest.raises(ValueError, match=message):
        ReadPort(TINY, depths)
