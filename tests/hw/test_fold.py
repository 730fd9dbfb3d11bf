"""Fold against numpy: windows of consecutive bytes of each padded row."""

import random

import numpy as np
import pytest

from hw.config import CoreConfig
from hw.descriptor import LOAD
from hw.fold import Fold, window_bytes
from tests.hw.streams import simulate, stalls, stream_check, stream_get, stream_put


def fold_settings(config, *, kernel, channels, stride, pad, width, rows, skip):
    """Descriptor fields of a folded load; None where the kernel does not fit the row or the unit."""
    columns = (width + 2 * pad - kernel) // stride + 1
    kernel_bytes = kernel * channels
    if columns < 1 or kernel_bytes > window_bytes(config):
        return None
    return {"enable": 1, "fold": 1, "fold_slices": -(-kernel_bytes // config.vector), "fold_skip": skip,
            "fold_kernel_bytes": kernel_bytes, "fold_step_bytes": stride * channels,
            "fold_pad_bytes": pad * channels, "fold_row_bytes": width * channels, "fold_columns": columns,
            "fold_rows": rows}


def folded(config, settings, stream):
    """Model: packed lines of the byte stream, as integers."""
    s = {name.removeprefix("fold_"): value for name, value in settings.items()}
    kernel, step = s["kernel_bytes"], s["step_bytes"]
    rows = stream[s["skip"]:s["skip"] + s["rows"] * s["row_bytes"]].reshape(s["rows"], s["row_bytes"])
    rows = np.pad(rows, ((0, 0), (s["pad_bytes"], (s["columns"] - 1) * step + kernel)))
    windows = np.stack([rows[:, p * step:p * step + kernel] for p in range(s["columns"])], axis=1)
    windows = np.pad(windows, ((0, 0), (0, 0), (0, s["slices"] * config.vector - kernel))).ravel()
    windows = np.pad(windows, (0, -len(windows) % config.line_bytes))
    return lines(config, windows)


def lines(config, raw):
    return [int.from_bytes(line.tobytes(), "little") for line in raw.reshape(-1, config.line_bytes)]


def raw_bytes(config, settings, rng):
    """Random bytes of the shortest sequence of lines that holds the rows."""
    count = settings["fold_skip"] + settings["fold_rows"] * settings["fold_row_bytes"]
    count += -count % config.line_bytes
    return np.frombuffer(rng.randbytes(count), dtype=np.uint8)


def _config(vector, parts=1):
    return CoreConfig(name="test", rows=vector, columns=vector, lanes=vector // parts, weight_lines=64)


VECTORS = [(4, 1), (8, 1), (16, 1), (8, 2)]
"""Channels of a vector, and the parts in which the vector engine works on it: a line holds 4 vectors or 2."""


def _check(config, loads, pattern):
    dut = Fold(config)
    rng = random.Random(str(loads))
    source, sink = stalls("none" if pattern == "slow sink" else pattern, pattern)
    if pattern == "slow sink":      # slow enough to hold up vectors while a line waits
        def sink():
            return rng.random() < 0.95
    streams = [raw_bytes(config, load, rng) for load in loads]

    async def drive(ctx):
        for load, stream in zip(loads, streams, strict=True):
            ctx.set(dut.settings, LOAD.layout.const(load))
            ctx.set(dut.start, 1)
            await ctx.tick()
            ctx.set(dut.start, 0)
            await stream_put(ctx, dut.line, lines(config, stream), stall=source)
            while ctx.get(dut.busy):
                await ctx.tick()
            await ctx.tick().repeat(rng.randrange(1, 3))

    async def collect(ctx):
        for load, stream in zip(loads, streams, strict=True):
            expected = folded(config, load, stream)
            assert await stream_get(ctx, dut.packed, len(expected), stall=sink) == expected, load

    async def check(ctx):
        await stream_check(ctx, dut.packed)

    simulate(dut, drive, collect, background=[check], limit=40_000)


@pytest.mark.parametrize("vector, parts", VECTORS)
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_windows_equal_numpy(vector, parts, kernel):
    """Back-to-back loads of every channel count, stride and padding."""
    config = _config(vector, parts)
    rng = random.Random(f"{vector} {kernel}")
    loads = [fold_settings(config, kernel=kernel, channels=channels, stride=stride, pad=pad,
                           width=rng.randrange(kernel, 9), rows=rng.randrange(1, 4),
                           skip=rng.randrange(config.line_bytes))
             for channels in (1, 2, 3, 4) for stride in (1, 2) for pad in (0, 1, 2)]
    assert None not in loads
    rng.shuffle(loads)
    _check(config, loads, "none")


@pytest.mark.parametrize("pattern", ["source", "slow sink", "both"])
@pytest.mark.parametrize("vector, parts", VECTORS)
def test_stalls(vector, parts, pattern):
    config = _config(vector, parts)
    rng = random.Random(f"{vector} {pattern}")
    _check(config, [fold_settings(config, kernel=kernel, channels=channels, stride=stride, pad=pad, width=7, rows=3,
                                  skip=rng.randrange(config.line_bytes))
                    for kernel, channels, stride, pad in [(5, 4, 1, 2), (3, 1, 1, 1), (3, 3, 2, 0), (1, 2, 2, 0)]],
           pattern)


@pytest.mark.parametrize("vector, parts", [(4, 1), (8, 2)])
def test_window_limit_and_row_longer_than_needed(vector, parts):
    """The largest window, and rows whose end no position reaches."""
    config = _config(vector, parts)
    window = window_bytes(config)
    load = {"fold_slices": window // vector, "fold_kernel_bytes": window, "fold_step_bytes": 3, "fold_pad_bytes": 5,
            "fold_row_bytes": 70, "fold_columns": 4, "fold_rows": 3, "fold_skip": 0}
    _check(config, [load], "none")


def test_one_byte_per_cycle():
    """Windows of one vector: a row of n bytes takes n + 2 cycles, padding included, and each raw line one more."""
    config = _config(16)
    load = fold_settings(config, kernel=3, channels=3, stride=1, pad=1, width=30, rows=8, skip=0)
    dut = Fold(config)

    async def bench(ctx):
        ctx.set(dut.settings, LOAD.layout.const(load))
        ctx.set(dut.start, 1)
        await ctx.tick()
        ctx.set(dut.start, 0)
        ctx.set(dut.line.valid, 1)
        ctx.set(dut.packed.ready, 1)
        cycles = 0
        while ctx.get(dut.busy):
            await ctx.tick()
            cycles += 1
        raw_lines = -(-8 * 30 * 3 // config.line_bytes)
        assert cycles <= 8 * (32 * 3 + 2) + raw_lines + 8

    simulate(dut, bench)
