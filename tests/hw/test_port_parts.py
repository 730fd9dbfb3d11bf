"""The small parts of the memory port: round robin, queue, window, error latch, coalescer."""

import itertools
import random

import pytest

from hw.coalescer import Coalescer
from hw.config import PRESETS
from hw.errors import ErrorCode, ErrorLatch
from hw.fifo import Fifo
from hw.relay_station import RelayStation
from hw.round_robin import RoundRobin
from hw.skid_buffer import SkidBuffer
from hw.window import Window
from tests.hw.streams import STALLS, simulate, stalls, stream_check, stream_get, stream_put

TINY = PRESETS["tiny"]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_round_robin_passes_the_turn_to_the_next_other_requester(count):
    dut = RoundRobin(count)

    async def bench(ctx):
        rng = random.Random(count)
        turn = 0
        for _ in range(400):
            requests, serve = rng.getrandbits(count), rng.getrandbits(1)
            ctx.set(dut.requests, requests)
            ctx.set(dut.serve, serve)
            assert ctx.get(dut.choice) == turn
            assert ctx.get(dut.valid) == requests >> turn & 1
            others = [k % count for k in range(turn + 1, turn + count) if requests >> (k % count) & 1]
            if others and (serve or not requests >> turn & 1):
                turn = others[0]
            await ctx.tick()

    simulate(dut, bench)


def keeps_order(dut, pattern, *, background=(), limit=10_000):
    """300 items pass in order, and nothing is withdrawn."""
    source, sink = stalls(pattern)
    sent = [k & 0xFF for k in range(300)]

    async def put(ctx):
        await stream_put(ctx, dut.input, sent, stall=source)

    async def get(ctx):
        assert await stream_get(ctx, dut.output, len(sent), stall=sink) == sent

    async def check(ctx):
        await stream_check(ctx, dut.output)

    simulate(dut, put, get, background=(check, *background), limit=limit)


@pytest.mark.parametrize("depth, fall_through", [*((depth, False) for depth in (1, 2, 3, 16, 17, 40)),
                                                 *((depth, True) for depth in (1, 2, 4, 16))])
@pytest.mark.parametrize("pattern", STALLS)
def test_fifo_keeps_order(depth, fall_through, pattern):
    """More than 16 items: with a second output register."""
    dut = Fifo(8, depth, fall_through=fall_through)

    async def room(ctx):
        async for _, _, level, ready in ctx.tick().sample(dut.level, dut.input.ready):
            assert ready or level >= depth
            assert level <= depth + 1 + (depth > 16)

    keeps_order(dut, pattern, background=(room,))


@pytest.mark.parametrize("unit", [SkidBuffer, RelayStation])
@pytest.mark.parametrize("pattern", STALLS)
def test_buffers_keep_order(pattern, unit):
    keeps_order(unit(8), pattern, limit=310 if pattern == "none" else 10_000)


def test_skid_buffer_passes_in_the_same_cycle_and_keeps_one():
    dut = SkidBuffer(8)

    async def bench(ctx):
        ctx.set(dut.input.payload, 5)
        ctx.set(dut.input.valid, 1)
        assert ctx.get(dut.output.valid) and ctx.get(dut.output.payload) == 5 and ctx.get(dut.input.ready)
        await ctx.tick()
        ctx.set(dut.output.ready, 1)
        assert not ctx.get(dut.input.ready), "ready looks at nothing but what is held"
        assert ctx.get(dut.output.payload) == 5
        await ctx.tick()
        assert ctx.get(dut.input.ready)

    simulate(dut, bench)


def test_relay_station_keeps_two_and_gates_nothing():
    dut = RelayStation(8)

    async def bench(ctx):
        ctx.set(dut.input.valid, 1)
        for item in (5, 6):
            ctx.set(dut.input.payload, item)
            assert ctx.get(dut.input.ready)
            await ctx.tick()
            assert ctx.get(dut.output.valid) and ctx.get(dut.output.payload) == 5
        ctx.set(dut.output.ready, 1)
        assert not ctx.get(dut.input.ready), "ready looks at nothing but what is held"
        await ctx.tick()
        assert ctx.get(dut.output.payload) == 6 and ctx.get(dut.input.ready)

    simulate(dut, bench)


def test_an_item_falls_through_an_empty_queue():
    dut = Fifo(8, 4, fall_through=True)

    async def bench(ctx):
        ctx.set(dut.input.payload, 7)
        ctx.set(dut.input.valid, 1)
        await ctx.tick()
        ctx.set(dut.input.valid, 0)
        assert ctx.get(dut.output.valid) and ctx.get(dut.output.payload) == 7 and ctx.get(dut.level) == 1

    simulate(dut, bench)
    with pytest.raises(ValueError, match="at most 16 items"):
        Fifo(8, 17, fall_through=True)


@pytest.mark.parametrize("depth", [4, 20])
def test_fifo_clear_drops_what_is_held(depth):
    dut = Fifo(8, depth)

    async def bench(ctx):
        await stream_put(ctx, dut.input, [1, 2, 3])
        ctx.set(dut.clear, 1)
        await stream_put(ctx, dut.input, [4])
        ctx.set(dut.clear, 0)
        assert ctx.get(dut.level) == 0
        await stream_put(ctx, dut.input, [5])
        assert await stream_get(ctx, dut.output, 1) == [5]
        assert ctx.get(dut.level) == 0

    simulate(dut, bench)


def test_window_holds_whole_lines_only():
    dut = Window(TINY, 2)

    async def bench(ctx):
        top = (1 << 28) - 1
        edges = [0, 1, 15, 16, 17, 31, 32, 48, 0xFFFF_FFE0, 0xFFFF_FFEF, 0xFFFF_FFF0, 0xFFFF_FFF1, 0xFFFF_FFFF]
        for base, limit in itertools.product(edges, edges):
            ctx.set(dut.base, base)
            ctx.set(dut.limit, limit)
            await ctx.tick()
            for lines in [(0, 1), (2, 3), (top - 1, top)]:
                for k, line in enumerate(lines):
                    ctx.set(dut.lines[k], line)
                expected = [base <= 16 * line and 16 * line + 16 <= limit for line in lines]
                assert ctx.get(dut.from_base & dut.below_limit) == expected[0] | expected[1] << 1, (base, limit, lines)

    simulate(dut, bench)


def test_error_latch_keeps_the_first_and_lowest():
    dut = ErrorLatch(3)

    async def report(ctx, *indices, clear=0):
        for k, source in enumerate(dut.sources):
            ctx.set(source.report, {"code": k + 1, "address": 100 * k, "client": k})
            ctx.set(source.valid, k in indices)
        ctx.set(dut.clear, clear)
        await ctx.tick()
        return ctx.get(dut.found), ctx.get(dut.error), ctx.get(dut.code), ctx.get(dut.address), ctx.get(dut.client)

    async def bench(ctx):
        assert (await report(ctx))[:2] == (0, 0)
        assert (await report(ctx, 2, 1))[:2] == (1, 0)
        assert await report(ctx, 0) == (1, 1, 2, 100, 1)
        assert await report(ctx) == (1, 1, 2, 100, 1)
        assert (await report(ctx, clear=1))[:2] == (0, 0)
        assert (await report(ctx, 2))[:2] == (1, 0)
        assert await report(ctx) == (1, 1, 3, 200, 2)
        assert (await report(ctx, 0, clear=1))[:2] == (0, 0)
        assert (await report(ctx))[:2] == (0, 0)
        await report(ctx, 0)
        assert (await report(ctx, clear=1))[:2] == (0, 0)
        assert (await report(ctx))[:2] == (0, 0)

    simulate(dut, bench)


def test_error_codes_fit_and_are_described():
    assert [code.value for code in ErrorCode] == list(range(len(ErrorCode)))
    assert len(ErrorCode) <= 16
    assert all(code.doc for code in ErrorCode)


def bursts(lines, pauses=(), *, patience=3, hold=False):
    """Bursts (first, count) of a coalescer whose output is always taken; ``pauses``: {index: idle cycles before}."""
    dut = Coalescer(TINY, patience)
    seen = []

    async def put(ctx):
        ctx.set(dut.burst.ready, 1)
        ctx.set(dut.hold, hold)
        for k, line in enumerate(lines):
            for _ in range(dict(pauses).get(k, 0)):
                await ctx.tick()
            await stream_put(ctx, dut.line, [{"address": line, "follows": k > 0 and line == lines[k - 1] + 1}])
        ctx.set(dut.hold, 0)
        while not ctx.get(dut.empty):
            await ctx.tick()
        await ctx.tick()

    async def get(ctx):
        async for _, _, valid, payload in ctx.tick().sample(dut.burst.valid, dut.burst.payload):
            if valid:
                seen.append((payload.address, payload.extra + 1))

    simulate(dut, put, background=(get,))
    return seen


def test_coalescer_ends_bursts_at_16_lines_gaps_and_pages():
    assert bursts(range(40)) == [(0, 16), (16, 16), (32, 8)]
    assert bursts([5, 6, 6, 5, 9]) == [(5, 2), (6, 1), (5, 1), (9, 1)]
    assert bursts(range(250, 260)) == [(250, 6), (256, 4)]
    top = (1 << 28) - 1
    assert bursts([top - 1, top, 0]) == [(top - 1, 2), (0, 1)]


def test_coalescer_waits_as_long_as_its_patience():
    assert bursts(range(4), {2: 2}, patience=3) == [(0, 4)]
    assert bursts(range(4), {2: 6}, patience=3) == [(0, 2), (2, 2)]
    assert bursts(range(4), {2: 50}, patience=3, hold=True) == [(0, 4)]


@pytest.mark.parametrize("make, message", [
    (lambda: RoundRobin(0), "at least one requester, not 0"), (lambda: Fifo(8, 0), "at least 1, not 0"),
    (lambda: ErrorLatch(0), "at least one source, not 0"), (lambda: Coalescer(TINY, 0), "at least 1 cycle, not 0")])
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
