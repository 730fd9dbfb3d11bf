"""A memory behind read and write clients, for tests of units without the memory port."""

from __future__ import annotations

from collections import deque

import numpy as np

from tests.hw.streams import stream_check

__all__ = ["Memory"]


def _never() -> bool:
    return False


class Memory:
    """Byte-addressed memory of one core. Bytes never written are random, so that nobody relies on zeros.

    ``reader`` and ``writer`` give background benches for one client each. A write reaches memory only when
    it is acknowledged, as late as the interface permits. ``reads`` collects line addresses, ``writes`` (line
    address, strobe), ``pending`` is the number of writes not acknowledged.
    """

    def __init__(self, config, size: int = 1 << 16, seed: int = 0):
        self.config = config
        self.bytes = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        self.reads: list[int] = []
        self.writes: list[tuple[int, int]] = []
        self.pending = 0

    def store(self, address: int, array: np.ndarray):
        raw = np.ascontiguousarray(array).view(np.uint8).ravel()
        self.bytes[address:address + len(raw)] = raw

    def load(self, address: int, shape: tuple[int, ...], dtype) -> np.ndarray:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.bytes[address:address + count].copy().view(dtype).reshape(shape)

    def _line(self, line: int) -> int:
        start = line * self.config.line_bytes
        assert start + self.config.line_bytes <= len(self.bytes), f"read outside memory: {start:#x}"
        return int.from_bytes(self.bytes[start:start + self.config.line_bytes].tobytes(), "little")

    def reader(self, client, *, stall=_never, latency: int = 5):
        """Answers ``client`` in order, ``latency`` cycles after the request or later."""
        async def bench(ctx):
            waiting: deque[tuple[int, int]] = deque()
            cycle = 0
            offered = None
            ctx.set(client.request.ready, 0)
            ctx.set(client.response.valid, 0)
            while True:
                ready = not stall()
                ctx.set(client.request.ready, ready)
                if offered is None and waiting and waiting[0][0] <= cycle and not stall():
                    offered = self._line(waiting.popleft()[1])
                ctx.set(client.response.valid, offered is not None)
                ctx.set(client.response.payload, 0xDEAD if offered is None else offered)
                _, _, valid, line, taken = await ctx.tick().sample(
                    client.request.valid, client.request.payload, client.response.ready)
                cycle += 1
                if valid and ready:
                    self.reads.append(line)
                    waiting.append((cycle + latency - 1, line))
                if taken:
                    offered = None
        return bench

    def writer(self, client, *, stall=_never, latency: int = 5):
        """Takes lines from ``client``; each is stored and acknowledged ``latency`` cycles later."""
        async def bench(ctx):
            flight: deque[tuple[int, int, int, int]] = deque()
            cycle = 0
            while True:
                ready = not stall()
                ctx.set(client.line.ready, ready)
                ctx.set(client.idle, not flight)
                payload = client.line.payload
                _, _, valid, address, value, strobe = await ctx.tick().sample(
                    client.line.valid, payload.address, payload.data, payload.strobe)
                cycle += 1
                if valid and ready:
                    assert strobe, "a write without a byte"
                    flight.append((cycle + latency, address, value, strobe))
                    self.writes.append((address, strobe))
                while flight and flight[0][0] <= cycle:
                    _, address, value, strobe = flight.popleft()
                    size = self.config.line_bytes
                    start = address * size
                    assert start + size <= len(self.bytes), f"write outside memory: {start:#x}"
                    for k, byte in enumerate(value.to_bytes(size, "little")):
                        if strobe >> k & 1:
                            self.bytes[start + k] = byte
                self.pending = len(flight)
        return bench

    @staticmethod
    def checks(*clients):
        """Protocol checks of read and write clients' outgoing streams, for ``simulate(background=...)``."""
        def check(port):
            async def bench(ctx):
                await stream_check(ctx, port)
            return bench
        return [check(client.request if hasattr(client, "request") else client.line) for client in clients]
