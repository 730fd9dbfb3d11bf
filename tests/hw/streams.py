"""Shared helpers for tests of stream components: put, get, stall patterns, protocol check, run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from amaranth.hdl import Value
from amaranth.sim import Simulator, SimulatorContext

__all__ = ["STALLS", "stalls", "stream_put", "stream_get", "stream_check", "simulate"]

PERIOD = 1e-6    # seconds
STALLS = ("none", "source", "sink", "both")

Stall = Callable[[], bool]


def _never() -> bool:
    return False


def _random_stall(seed: str) -> Stall:
    """Runs of free and of stalled cycles, mostly short, sometimes long."""
    rng = random.Random(seed)
    stalled = False

    def stall() -> bool:
        nonlocal stalled
        if rng.random() < (0.4 if stalled else 0.3):
            stalled = not stalled
        return stalled
    return stall


def stalls(pattern: str, seed: object = 0) -> tuple[Stall, Stall]:
    """(source, sink) stall functions of a pattern in `STALLS`, for ``stream_put`` and ``stream_get``.

    A stall function is asked once per cycle and says whether to wait in it; the same seed stalls alike.
    """
    if pattern not in STALLS:
        raise ValueError(f"unknown stall pattern {pattern!r}: choose one of {', '.join(STALLS)}")
    source = _random_stall(f"source {seed}") if pattern in ("source", "both") else _never
    sink = _random_stall(f"sink {seed}") if pattern in ("sink", "both") else _never
    return source, sink


async def _sample_when(ctx: SimulatorContext, condition, value=0):
    """``value`` at the first clock edge that sees ``condition``. Unlike ``until`` it may be abandoned."""
    async for _, _, done, sampled in ctx.tick().sample(condition, value):
        if done:
            return sampled


async def stream_put(ctx: SimulatorContext, stream, items: Iterable, *, stall: Stall = _never):
    """Hands over every item in order, back to back where ``stall`` permits.

    While nothing is valid the payload holds noise, so a sink that looks at it too early or too late fails.
    """
    raw = Value.cast(stream.payload)
    noise = random.Random(len(raw))
    for item in items:
        while stall():
            await ctx.tick()
        ctx.set(stream.payload, item)
        ctx.set(stream.valid, 1)
        await _sample_when(ctx, stream.ready)
        ctx.set(stream.valid, 0)
        if len(raw):
            ctx.set(raw, noise.getrandbits(len(raw)))


async def stream_get(ctx: SimulatorContext, stream, count: int, *, stall: Stall = _never) -> list:
    """Takes ``count`` items and returns their payloads; ready is low before, between stalls and after."""
    items = []
    for _ in range(count):
        while stall():
            await ctx.tick()
        ctx.set(stream.ready, 1)
        items.append(await _sample_when(ctx, stream.valid, stream.payload))
        ctx.set(stream.ready, 0)
    return items


async def stream_check(ctx: SimulatorContext, stream):
    """Fails when a valid payload is withdrawn or changes before it is taken. Run it as a background bench."""
    raw = Value.cast(stream.payload)
    waiting = None
    async for _, reset, valid, ready, payload in ctx.tick().sample(stream.valid, stream.ready, raw):
        if reset:
            waiting = None
            continue
        if waiting is not None:
            assert valid, "valid was withdrawn before the transfer"
            assert payload == waiting, f"payload changed before the transfer: {waiting:#x} -> {payload:#x}"
        waiting = payload if valid and not ready else None


def simulate(dut, *benches, background=(), limit: int = 100_000):
    """Runs ``dut`` until every bench has returned; background benches may go on for ever.

    Fails after ``limit`` cycles, so a deadlock is a failed test instead of an endless one.
    """
    async def watch(ctx):
        await ctx.delay(limit * PERIOD)
        raise AssertionError(f"not finished after {limit} cycles")

    simulator = Simulator(dut)
    simulator.add_clock(PERIOD)
    for bench in benches:
        simulator.add_testbench(bench)
    for bench in (watch, *background):
        simulator.add_testbench(bench, background=True)
    simulator.run()
