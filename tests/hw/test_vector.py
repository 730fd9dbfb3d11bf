"""VectorEngine: descriptors against the numpy reference, and whole niti layer passes against golden."""

import random

import numpy as np
import pytest

from golden import dfp, niti, ops, wage
from golden import random as golden_random
from golden.random import Purpose
from golden.range import ceil_log2
from golden.rounding import Rounding
from hw.config import METHODS, PRESETS
from hw.lanes import ROUNDINGS
from hw.microprogram import Lane, Scalar
from hw.microprogram import WideOperation as Wide
from hw.microprogram import assemble as assemble_wide
from hw.scalar import Operation, assemble
from hw.vector import Function, VectorEngine
from tests.hw.memory_model import Memory
from tests.hw.streams import STALLS, simulate, stalls
from tests.hw.test_scalar import give_operations
from tests.hw.vector_reference import TYPES, execute
from tests.hw.vector_reference import Wide as WideState

ENABLE_SOURCE1, ENABLE_SOURCE2, ENABLE_TARGET1, ENABLE_TARGET0 = 1, 2, 4, 8
ENABLE_RANGE = 16
SHIFT, RANGE = 5, 6
DUMP = (1 << 19) - 256


class Bench:
    """An engine with memory behind its five clients, and coroutines that drive it."""

    def __init__(self, core="tiny", pattern="none", latency=5, methods=METHODS):
        self.config = PRESETS[core].replace(methods=methods)
        self.lanes = self.config.vector      # of a whole vector
        self.memory = Memory(self.config, 1 << 19, seed=1)
        self.dut = VectorEngine(self.config)
        self.pattern, self.latency = pattern, latency
        self.pulses = set()
        self.half = 0
        self.events = {"busy": 0, "stalled_in": 0, "stalled_out": 0, "idle": 0}

    async def watch(self, ctx):
        names = ("exponent_saturated", "zero_range", "illegal")
        ports = [getattr(self.dut, name) for name in (*names, *self.events)]
        async for _, _, *values in ctx.tick().sample(*ports):
            self.pulses |= {name for name, value in zip(names, values[:3], strict=True) if value}
            assert sum(values[3:]) == 1, "exactly one of the four events"
            for name, value in zip(self.events, values[3:], strict=True):
                self.events[name] += value

    async def set_register(self, ctx, register, value):
        ctx.set(self.dut.range, {"valid": 1, "register": register, "clear": 1, "value": value % 2**32})
        await ctx.tick()
        ctx.set(self.dut.range, {"valid": 0})
        await ctx.tick().repeat(5)

    async def register(self, ctx, register):
        """The register's value: a dump of all, above the memory that the tests use."""
        await self.scalar(ctx, [], dump=DUMP, enable_dump=1)
        return int(self.memory.load(DUMP, (64,), np.uint32)[register])

    async def scalar(self, ctx, operations, **fields):
        """Runs a scalar command with these operations."""
        self.half = 1 - self.half
        await give_operations(ctx, self.dut, operations, self.half)
        await self.command(ctx, self.dut.scalar, {"count": len(operations), "half": self.half, **fields})

    async def command(self, ctx, port, fields):
        """Hands over one command and waits until it is done. Returns the cycles it took."""
        ctx.set(port.payload, fields)
        ctx.set(port.valid, 1)
        cycles, released = 0, False
        while True:
            cycles += 1
            _, _, ready, done = await ctx.tick().sample(port.ready, self.dut.done)
            if ready:
                assert not released
                released = True
                ctx.set(port.valid, 0)
                ctx.set(port.payload, {name: -1 if "stride" in name else 1 for name in fields})
            if done:
                break
        assert released
        await ctx.tick()    # for `watch` to see the last cycle
        assert self.memory.pending == 0
        return cycles

    def run(self, bench, limit=100_000):
        dut, memory = self.dut, self.memory
        sources, targets = (dut.source0, dut.source1, dut.source2), (dut.target0, dut.target1)
        background = [self.watch, *memory.checks(*sources, *targets)]
        for k, client in enumerate(sources):
            stall = stalls(self.pattern, k)[0]
            background.append(memory.reader(client, stall=stall, latency=self.latency))
        for k, client in enumerate(targets):
            stall = stalls(self.pattern, k)[1]
            background.append(memory.writer(client, stall=stall, latency=self.latency))
        simulate(dut, bench, background=background, limit=limit)


KINDS = ("plain", "mask", "unpool", "pool", "update", "fill", "state", "state pool", "squared error")


def random_command(rng, lanes, kind):
    """A legal command of one of ``KINDS`` with scattered strides."""
    width, target_width = rng.randrange(3), rng.randrange(3)
    width1 = rng.randrange(3)
    fields = {
        "function": {"update": Function.UPDATE, "fill": Function.FILL,
                     "squared error": Function.SQUARED_ERROR}.get(kind, Function.ELEMENTWISE),
        "rounding": rng.choice(ROUNDINGS).code, "left": rng.randrange(2), "random_stream": rng.randrange(1 << 16),
        "random_start": rng.randrange(1 << 32), **{f"random_stride{k}": rng.randrange(1 << 32) for k in range(5)},
        "shift_register": SHIFT, "source0_width": width, "source1_width": width1, "target_width": target_width,
        "enable": ENABLE_TARGET0,
    }
    if kind != "fill":
        fields["limit"] = rng.choice([0, 0, 1, 64, 127])
        fields |= {"range_register": RANGE, "range_clear": rng.randrange(2)}
        fields["enable"] = rng.choice([ENABLE_TARGET0, ENABLE_RANGE, ENABLE_TARGET0 | ENABLE_RANGE])
    if kind not in ("update", "fill", "squared error"):
        fields["relu"] = rng.randrange(2)
    if kind == "squared error":
        fields |= {"label_log2": rng.randrange(32), "source1_width": (width1 := 0)}
    if kind.startswith("state"):
        fields["state"] = 1
        fields["enable"] |= ENABLE_TARGET1 * rng.randrange(2)
        fields["pool"] = kind == "state pool"
        if fields["pool"]:
            fields["rounding"] = rng.choice([r for r in ROUNDINGS if not r.needs_draw]).code
    if kind in ("mask", "update", "squared error"):
        fields["enable"] |= ENABLE_SOURCE1
    if kind == "mask":
        fields["mask"] = 1
    if kind == "unpool":
        fields["unpool"] = rng.randrange(2)
        fields["blocked"] = rng.randrange(1 - fields["unpool"], 4)
        fields["enable"] |= ENABLE_SOURCE2
        if rng.randrange(2):
            fields["mask"] = 1
            fields["enable"] |= ENABLE_SOURCE1
    if kind == "pool":
        fields["pool"] = 1
        fields["enable"] |= ENABLE_TARGET1 * rng.randrange(2)
    counts = [rng.randrange(0, 4) for _ in range(5)]
    if kind == "unpool":
        counts[2] = counts[4] = 2
    if fields.get("pool"):
        counts[3] = counts[4] = 2
    fields |= {f"count{k}": count for k, count in enumerate(counts)}
    # Five areas; targets write every place once, sources may repeat themselves.
    for area, (name, size) in enumerate((("source0", 1 << width), ("source1", 1 << width1), ("source2", 1),
                                         ("target0", 1 << target_width), ("target1", 1))):
        vector, stride = lanes * size, lanes * size
        fields[name] = (area + 1) * 0x8000 + vector * rng.randrange(16)
        for k in reversed(range(5)):
            repeated = name.startswith("source") and rng.random() < 0.3
            fields[f"{name}_stride{k}"] = 0 if repeated else stride
            stride *= max(1, counts[k]) + (rng.random() < 0.3)
    return fields


@pytest.mark.parametrize("core", ["tiny", "wide", "small"])
@pytest.mark.parametrize("pattern", STALLS)
def test_random_commands_equal_the_reference(core, pattern):
    rng = random.Random(core + pattern)
    numbers = np.random.default_rng(len(core + pattern))
    b = Bench(core, pattern)

    async def bench(ctx):
        for kind in KINDS * 3:
            fields = random_command(rng, b.lanes, kind)
            size = TYPES[fields["source0_width"]]
            scale = rng.choice([1 << 7, 1 << 12, 1 << 31])
            values = numbers.integers(-scale, scale, 0x8000 // np.dtype(size).itemsize)
            b.memory.store(0x8000, values.clip(np.iinfo(size).min, np.iinfo(size).max).astype(size))
            b.memory.store(0x18000, numbers.integers(0, 16, 0x8000).astype(np.int8))
            if fields["function"] == Function.SQUARED_ERROR:
                b.memory.store(0x10000, numbers.integers(0, 4 * b.lanes, 0x8000).astype(np.int8))
            shift = rng.choice([-90, -33, -5, -1, 0, 1, 2, 4, 7, 9, 24, 31, 32, 45, 63, 90])
            highest = {Rounding.STOCHASTIC: 32, Rounding.STOCHASTIC_16: 46}.get(Rounding(fields["rounding"]), 99)
            shift = min(shift, highest)
            await b.set_register(ctx, SHIFT, shift)
            seed, step = rng.randrange(1 << 32), rng.randrange(1 << 32)
            ctx.set(b.dut.seed, seed)
            ctx.set(b.dut.step, step)
            expected = b.memory.bytes.copy()
            largest = execute(fields, expected, b.lanes, shift, seed, step)
            before = rng.choice([0, 60, 1 << 31])
            await b.set_register(ctx, RANGE, before)
            await b.command(ctx, b.dut.vector, fields)
            if not fields["enable"] & ENABLE_RANGE:
                largest = before
            elif not fields["range_clear"]:
                largest = max(largest, before)
            assert await b.register(ctx, RANGE) == largest, fields
            different = np.flatnonzero(b.memory.bytes[:DUMP] != expected[:DUMP])
            assert not len(different), (fields, different[:8], b.memory.bytes[different[:8]], expected[different[:8]])
            assert not b.pulses

    b.run(bench)


# Layouts ----------------------------------------------------------------------------------------------------


def blocked(x, lanes):
    """[n][h][w][c] -> [channel tile][n][h][w][lanes], channels padded with zeros."""
    padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // lanes) * lanes), x.dtype)
    padded[..., :x.shape[-1]] = x
    return np.moveaxis(padded.reshape(*x.shape[:-1], -1, lanes), -2, 0)


def unblocked(x, channels):
    x = np.moveaxis(x, 0, -2)
    return x.reshape(*x.shape[:-2], -1)[..., :channels]


def linear_loops(fields, count, widths):
    """Consecutive vectors: ``widths`` maps sources and targets to bytes of a vector."""
    fields |= {"count4": count}
    for name, width in widths.items():
        fields[f"{name}_stride4"] = width


@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.PSEUDO_STOCHASTIC])
@pytest.mark.parametrize("core, pattern", [("tiny", "none"), ("tiny", "both"), ("small", "none"), ("small", "both")])
def test_forward_requantize_relu_pool_and_back(rounding, core, pattern):
    """conv sums -> activation, pooled activation and choice; then pooled error -> error of the sums."""
    b = Bench(core, pattern)
    lanes = b.lanes
    rng = np.random.default_rng(4)
    n, h, w, c = 2, 4, 6, lanes + 2
    tiles = 2
    acc = rng.integers(-3000, 3000, (n, h, w, c)).astype(np.int32)
    acc[:, :2, :2] = 1000       # ties
    m, _ = niti.requantize(acc, 0, rounding)
    pooled, choice = ops.max_pool(ops.relu(m), 2)
    error_acc = rng.integers(-900, 900, pooled.shape).astype(np.int32)
    e, _ = niti.requantize(error_acc, 0, rounding)
    error = ops.relu_error(ops.max_pool_error(e, choice, 2), ops.relu(m))
    sums, pooled_at, choice_at, error_sums, error_at = 0x1000, 0x8000, 0x9000, 0xA000, 0x10000
    b.memory.store(sums, blocked(acc, lanes))
    b.memory.store(error_sums, blocked(error_acc, lanes))
    # Planes, images and row pairs follow one another: one loop walks them all.
    pairs = tiles * n * h // 2
    forward = {
        "function": Function.ELEMENTWISE, "rounding": rounding.code, "shift_register": SHIFT, "relu": 1, "pool": 1,
        "source0_width": 2, "enable": ENABLE_TARGET0 | ENABLE_TARGET1,
        "source0": sums, "target0": pooled_at, "target1": choice_at,
        "count1": pairs, "count2": w // 2, "count3": 2, "count4": 2,
        "source0_stride1": 2 * w * 4 * lanes, "source0_stride2": 2 * 4 * lanes, "source0_stride3": w * 4 * lanes,
        "source0_stride4": 4 * lanes,
        **{f"{name}_stride1": w // 2 * lanes for name in ("target0", "target1")},
        **{f"{name}_stride2": lanes for name in ("target0", "target1")},
    }
    # The pooled activation serves as mask: where the choice points, it is what ReLU let through.
    backward = {
        "function": Function.ELEMENTWISE, "rounding": rounding.code, "shift_register": SHIFT, "mask": 1, "unpool": 1,
        "source0_width": 2, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1 | ENABLE_SOURCE2,
        "source0": error_sums, "source1": pooled_at, "source2": choice_at, "target0": error_at,
        "count1": pairs, "count2": 2, "count3": w // 2, "count4": 2,
        "source0_stride1": w // 2 * 4 * lanes, "source0_stride3": 4 * lanes,
        "source1_stride1": w // 2 * lanes, "source1_stride3": lanes,
        "source2_stride1": w // 2 * lanes, "source2_stride3": lanes,
        "target0_stride1": 2 * w * lanes, "target0_stride2": w * lanes, "target0_stride3": 2 * lanes,
        "target0_stride4": lanes,
    }

    async def bench(ctx):
        await b.set_register(ctx, SHIFT, ceil_log2(np.abs(acc).max()) - 7)
        await b.command(ctx, b.dut.vector, forward)
        shape = (tiles, n, h // 2, w // 2, lanes)
        assert np.array_equal(unblocked(b.memory.load(pooled_at, shape, np.int8), c), pooled)
        assert np.array_equal(unblocked(b.memory.load(choice_at, shape, np.int8), c), choice)
        await b.set_register(ctx, SHIFT, ceil_log2(np.abs(error_acc).max()) - 7)
        await b.command(ctx, b.dut.vector, backward)
        assert np.array_equal(unblocked(b.memory.load(error_at, (tiles, n, h, w, lanes), np.int8), c), error)

    b.run(bench)


@pytest.mark.parametrize("width", [8, 16])
@pytest.mark.parametrize("bits", [5, 0, -1])
@pytest.mark.parametrize("maximum", [0, 1, 90, 5000])
def test_weight_update_in_place(width, bits, maximum):
    """Shift from the maximum by a scalar program, then the update of the weights where they are."""
    b = Bench("tiny", "both")
    rng = np.random.default_rng(width + bits + maximum)
    code = (width // 8) - 1
    count = 24
    acc = rng.integers(-maximum, maximum + 1, (count, b.lanes)).astype(np.int32)
    acc[0, 0] = maximum
    limit = 2**(width - 1) - 1
    weights = rng.integers(-limit, limit + 1, (count, b.lanes)).astype(TYPES[code])
    weights[1] = [limit, -limit, limit, -limit]
    bits += width - 8
    expected = niti.update(weights, niti.weight_gradient(acc, bits, width), width)
    b.memory.store(0x1000, acc)
    b.memory.store(0x8000, weights)
    highest, log, all_bits = 10, 11, 12
    program = assemble([
        (Operation.CEIL_LOG2, log, highest), (Operation.ADDI, SHIFT, log, -bits), (Operation.SET, all_bits, 63),
        (Operation.SELECT_ZERO, SHIFT, all_bits, SHIFT, log),
    ])
    update = {"function": Function.UPDATE, "rounding": Rounding.PSEUDO_STOCHASTIC.code, "shift_register": SHIFT,
              "source0_width": 2, "source1_width": code, "target_width": code,
              "enable": ENABLE_TARGET0 | ENABLE_SOURCE1, "source0": 0x1000, "source1": 0x8000, "target0": 0x8000}
    size = width // 8 * b.lanes
    linear_loops(update, count, {"source0": 4 * b.lanes, "source1": size, "target0": size})

    async def bench(ctx):
        await b.set_register(ctx, highest, maximum)
        await b.scalar(ctx, program)
        await b.command(ctx, b.dut.vector, update)
        assert np.array_equal(b.memory.load(0x8000, weights.shape, weights.dtype), expected)
        assert not b.pulses

    b.run(bench)


@pytest.mark.parametrize("core, rate, limit, maximum", [
    ("tiny", 3, 64, 5000), ("tiny", 0, 64, 1 << 30), ("tiny", -3, 127, 90), ("tiny", 6, 64, 3), ("tiny", 1, 64, 0),
    ("small", 3, 64, 5000)])
def test_wage_update_of_tiled_weights(core, rate, limit, maximum):
    """Weights in tiles of V x V with padding get the step of golden's row-major draws; a maximum of 0 is noted."""
    b = Bench(core, "both")
    v, layer, seed, step = b.lanes, 2, 11, 5
    co, taps, ci = v + 2, 3, v + 3
    rng = np.random.default_rng(maximum)
    gradient = rng.integers(-maximum, maximum + 1, (co, taps, ci)).astype(np.int32)
    gradient[1, 2, 3] = -maximum
    master = rng.integers(-limit, limit + 1, gradient.shape).astype(np.int8)
    draw = golden_random.words(seed, step, golden_random.stream(layer, Purpose.GRADIENT), gradient.shape) >> 16
    expected = wage.update(master, wage.weight_step(gradient, rate, draw), limit)

    def tiled(x):
        padded = np.zeros((2 * v, taps, 2 * v), x.dtype)
        padded[:co, :, :ci] = x
        return padded.reshape(2, v, taps, 2, v).transpose(0, 2, 3, 1, 4)
    b.memory.store(0x1000, tiled(gradient))
    b.memory.store(0x8000, tiled(master))
    highest, multiplier = 10, golden_random.INDEX_MULTIPLIER
    program = assemble([(Operation.NEAREST_LOG2, SHIFT, highest), (Operation.ADDI, SHIFT, SHIFT, -rate)])
    places = {"random": [n * multiplier % 2**32 for n in (v * taps * ci, ci, v, taps * ci)]}
    for name, width in (("source0", 4), ("source1", 1), ("target0", 1)):
        places[name] = [n * width * v for n in (taps * 2 * v, 2 * v, v, 1)]
    update = {"function": Function.UPDATE, "rounding": Rounding.STOCHASTIC_16.code, "shift_register": SHIFT, "left": 1,
              "limit": limit, "source0_width": 2, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1, "source0": 0x1000,
              "source1": 0x8000, "target0": 0x8000, "random_stream": golden_random.stream(layer, Purpose.GRADIENT),
              **{f"count{k}": n for k, n in enumerate((2, taps, 2, v, 1))},
              **{f"{name}_stride{k}": n for name, strides in places.items() for k, n in enumerate(strides)}}

    async def bench(ctx):
        ctx.set(b.dut.seed, seed)
        ctx.set(b.dut.step, step)
        await b.set_register(ctx, highest, maximum)
        await b.scalar(ctx, program)
        await b.command(ctx, b.dut.vector, update)
        assert np.array_equal(b.memory.load(0x8000, (2, taps, 2, v, v), np.int8), tiled(expected))
        assert b.pulses == ({"zero_range"} if maximum == 0 else set())

    b.run(bench)


@pytest.mark.parametrize("rounding", [Rounding.STOCHASTIC, Rounding.STOCHASTIC_16])
def test_stochastic_passes_are_unbiased(rounding):
    """The engine's own draws: the mean of 4096 roundings of each fraction is the fraction, and streams differ."""
    b = Bench("wide")
    count, shift = 512, 12
    fractions = (1, 1000, 2048, 4000)
    n = count * b.lanes
    results = []

    async def bench(ctx):
        await b.set_register(ctx, SHIFT, shift)
        ctx.set(b.dut.seed, 3)
        for number, fraction in enumerate(fractions):
            b.memory.store(0x10000, np.full(n, -fraction if number % 2 else fraction, np.int32))
            await b.command(ctx, b.dut.vector, plain(count, b.lanes, rounding=rounding.code, random_stream=number,
                                                     random_stride4=b.lanes * golden_random.INDEX_MULTIPLIER % 2**32))
            up = np.abs(b.memory.load(0x40000, (n,), np.int8))
            p = fraction / 2**shift
            assert abs(up.mean() - p) < 5 * (p * (1 - p) / n) ** 0.5, fraction
            results.append(up)
        assert abs(np.corrcoef(results[1], results[3])[0, 1]) < 5 / n ** 0.5

    b.run(bench)


@pytest.mark.parametrize("core, classes, samples, exponent, pattern", [
    ("tiny", 10, 8, -3, "none"), ("tiny", 4, 8, -9, "both"), ("wide", 3, 8, 0, "both"), ("wide", 10, 6, -8, "source"),
    ("wide", 10, 3, -30000, "sink"), ("small", 10, 8, -3, "both"), ("small", 3, 8, 0, "none"),
    ("small", 12, 4, -9, "source"),
])
def test_niti_loss(core, classes, samples, exponent, pattern):
    b = Bench(core, pattern)
    lanes = b.lanes
    rng = np.random.default_rng(classes)
    logits = rng.integers(-127, 128, (samples, 1, 1, classes)).astype(np.int8)
    labels = rng.integers(0, classes, samples).astype(np.uint8)
    expected = niti.loss_gradient(logits.reshape(samples, classes), exponent, labels)
    tiles = -(-classes // lanes)
    b.memory.store(0x1000, blocked(logits, lanes))
    b.memory.store(0x2000, labels)
    group = min(samples, b.config.lanes)
    command = {
        "function": Function.NITI_LOSS, "classes": classes, "shift_register": SHIFT, "source0": 0x1000,
        "source1": 0x2000, "target0": 0x3000, "enable": ENABLE_SOURCE1 | ENABLE_TARGET0,
        "count2": samples // group, "count3": group, "count4": tiles, "source1_stride2": group,
        **{f"{name}_stride2": group * lanes for name in ("source0", "target0")},
        **{f"{name}_stride3": lanes for name in ("source0", "target0")},
        **{f"{name}_stride4": samples * lanes for name in ("source0", "target0")},
    }

    async def bench(ctx):
        await b.set_register(ctx, SHIFT, exponent)
        for _ in range(2):
            b.memory.bytes[0x3000:0x3400] = 0x55
            await b.command(ctx, b.dut.vector, command)
            result = b.memory.load(0x3000, (tiles, samples, 1, 1, lanes), np.int8)
            assert np.array_equal(unblocked(result, classes).reshape(samples, classes), expected)
            if classes < tiles * lanes:
                assert not result[-1, ..., classes % lanes:].any(), "padding lanes must stay zero"

    b.run(bench, limit=200_000)


@pytest.mark.parametrize("core, pattern", [("tiny", "both"), ("wide", "none"), ("small", "both")])
def test_wide_passes(core, pattern):
    """Microprograms through their descriptor: three sources of any width, random words, results, ranges, registers that
    stay; product ranges that arrive meanwhile are not lost.
    """
    rng, numbers, b = random.Random(core), np.random.default_rng(1), Bench(core, pattern)
    state = WideState.of(b.lanes)
    programs = [
        [(Wide.MOVE, k, k) for k in range(16)],
        [(Wide.MUL, 4, 0, 230), (Wide.ROUND, 4, 4, Scalar(SHIFT)), (Wide.ADD, 5, 5, Lane(4)), (Wide.RANGE, 0, 4),
         (Wide.RANGE, 2, 5)],
        [(Wide.MUL, 4, 0, Lane(1)), (Wide.ADD, 4, 4, Lane(2)), (Wide.SHIFT, 4, 4, 9), (Wide.ADD, 4, 4, Lane(3)),
         (Wide.SHIFT, 4, 4, -32), (Wide.CLIP, 4, 4, 1), (Wide.WRITE, 4), (Wide.RANGE, 1, 4)],
    ]
    words, entries = [], []
    for program in programs:
        entries.append(len(words))
        words += assemble_wide(program)
    state.words[100:100 + len(words)] = words
    targets = 0x28000

    async def bench(ctx):
        for start in range(0, len(words), 40):
            part = words[start:start + 40]
            await b.scalar(ctx, part, microprogram=1, microprogram_address=100 + start)
        for number in (0, 1, 2, 1, 2, 2):
            counts = [rng.randrange(0, 4) for _ in range(5)]
            fields = {"function": Function.WIDE, "microprogram": 100 + entries[number], "ranges": number and 3,
                      "range_register": 20, **{f"count{k}": count for k, count in enumerate(counts)}}
            if number == 2:
                fields |= {"enable": 1 | 2 | 8, "target_width": 1, "rounding": Rounding.STOCHASTIC.code,
                           "random_stream": 77, "random_start": rng.randrange(1 << 32),
                           **{f"random_stride{k}": rng.randrange(1 << 32) for k in range(5)}}
            for area, name in enumerate(("source0", "source1", "source2", "target0"), 1):
                size = 1 if name == "target0" else rng.randrange(3)
                stride = b.lanes << size
                fields |= {name: area * 0x8000 if name != "target0" else targets, f"{name}_width": size}
                for k in reversed(range(5)):
                    fields[f"{name}_stride{k}"] = stride
                    stride *= max(1, counts[k])
            del fields["target0_width"]
            b.memory.store(0x8000, numbers.integers(-128, 128, 0x18000).astype(np.int8))
            shift = rng.choice([-9, -1, 0, 3])
            state.scalars[SHIFT] = shift
            await b.set_register(ctx, SHIFT, shift)
            seed, step = rng.randrange(1 << 32), rng.randrange(1 << 32)
            ctx.set(b.dut.seed, seed)
            ctx.set(b.dut.step, step)
            expected = b.memory.bytes.copy()
            execute(fields, expected, b.lanes, 0, seed, step, state)
            await b.command(ctx, b.dut.vector, fields)
            different = np.flatnonzero(b.memory.bytes[:DUMP] != expected[:DUMP])
            assert not len(different), (number, fields, different[:8])
            for k in range(3 if number else 0):
                assert await b.register(ctx, 20 + k) == state.scalars[20 + k]
            assert not b.pulses

    b.run(bench, limit=400_000)


@pytest.mark.parametrize("core, classes, exponent", [("tiny", 10, -9), ("wide", 3, -20), ("small", 10, -9),
                                                     ("small", 3, -20)])
def test_softmax_pass(core, classes, exponent):
    """int32 logits to int32 errors, and their maximum."""
    b = Bench(core, "both")
    samples, lanes = 8, b.lanes
    rng = np.random.default_rng(classes)
    logits = rng.integers(-(1 << 12), 1 << 12, (samples, 1, 1, classes)).astype(np.int32)
    labels = rng.integers(0, classes, samples).astype(np.uint8)
    tiles, group = -(-classes // lanes), min(samples, b.config.lanes)
    b.memory.store(0x1000, blocked(logits, lanes))
    b.memory.store(0x2000, labels)
    size = 4 * lanes
    command = {
        "function": Function.SOFTMAX, "classes": classes, "shift_register": SHIFT, "source0": 0x1000, "source1": 0x2000,
        "target0": 0x3000, "enable": ENABLE_SOURCE1 | ENABLE_TARGET0 | ENABLE_RANGE, "source0_width": 2,
        "target_width": 2, "range_register": RANGE, "range_clear": 1,
        "count2": samples // group, "count3": group, "count4": tiles, "source1_stride2": group,
        **{f"{name}_stride2": group * size for name in ("source0", "target0")},
        **{f"{name}_stride3": size for name in ("source0", "target0")},
        **{f"{name}_stride4": samples * size for name in ("source0", "target0")},
    }

    async def bench(ctx):
        await b.set_register(ctx, SHIFT, exponent)
        await b.command(ctx, b.dut.vector, command)
        result = unblocked(b.memory.load(0x3000, (tiles, samples, 1, 1, lanes), np.int32), classes)
        got, largest = result.reshape(samples, classes), await b.register(ctx, RANGE)
        assert largest == np.abs(got).max()
        rounded, _ = dfp.requantize(got, -18)
        assert np.array_equal(rounded, dfp.softmax_gradient(logits.reshape(samples, classes), exponent, labels)[0])
        assert not b.pulses

    b.run(bench, limit=200_000)


def plain(count, lanes, **changes):
    fields = {"function": Function.ELEMENTWISE, "rounding": Rounding.NEAREST.code, "shift_register": SHIFT,
              "source0_width": 2, "enable": ENABLE_TARGET0, "source0": 0x10000, "target0": 0x40000}
    linear_loops(fields, count, {"source0": 4 * lanes, "target0": lanes, "source1": lanes})
    return fields | changes


ILLEGAL = [
    {"function": 15}, {"rounding": Rounding.STOCHASTIC_MAGNITUDE.code}, {"rounding": 12},
    {"source0_width": 3}, {"target_width": 3}, {"mask": 1},
    {"enable": 0}, {"enable": ENABLE_TARGET0 | ENABLE_SOURCE1}, {"unpool": 1},
    {"unpool": 1, "enable": ENABLE_TARGET0 | ENABLE_SOURCE2}, {"pool": 1}, {"pool": 1, "count3": 2, "count4": 3},
    {"enable": ENABLE_TARGET0 | ENABLE_TARGET1}, {"function": Function.UPDATE},
    {"function": Function.UPDATE, "relu": 1, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    {"function": Function.FILL, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    {"function": Function.FILL, "enable": ENABLE_RANGE}, {"blocked": 1}, {"function": Function.UPDATE, "state": 1,
     "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    {"state": 1, "mask": 1, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    {"state": 1, "pool": 1, "count3": 2, "count4": 2, "rounding": Rounding.STOCHASTIC.code},
    {"function": Function.SQUARED_ERROR}, {"function": Function.SQUARED_ERROR, "source1_width": 1,
     "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    {"function": Function.SQUARED_ERROR, "count3": 5, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    {"pool": 1, "mask": 1, "count3": 2, "count4": 2, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    {"function": Function.NITI_LOSS, "classes": 10, "source0_width": 0, "count4": 2,
     "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    {"function": Function.NITI_LOSS, "classes": 10, "source0_width": 0, "count4": 4,
     "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    {"function": Function.NITI_LOSS, "classes": 10, "source0_width": 0, "count4": 3, "count3": 5,
     "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
]

# Where vectors of 8 pass in two parts of 4: labels have to be in the first, classes count vectors.
ILLEGAL_IN_PARTS = [
    {"function": Function.SQUARED_ERROR, "count3": 5, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1},
    *({"function": Function.NITI_LOSS, "classes": 10, "source0_width": 0, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1,
       "count3": samples, "count4": vectors} for samples, vectors in ((4, 1), (4, 3), (5, 2))),
]


@pytest.mark.parametrize("core, commands", [("tiny", ILLEGAL), ("small", ILLEGAL_IN_PARTS)], ids=["tiny", "small"])
def test_illegal_commands_do_nothing(core, commands):
    b = Bench(core)

    async def bench(ctx):
        await b.set_register(ctx, SHIFT, 3)
        for round, changes in enumerate(commands):
            b.pulses.clear()
            assert await b.command(ctx, b.dut.vector, plain(4, b.lanes, **changes)) <= 4, changes
            assert b.pulses == {"illegal"}, changes
            assert not b.memory.writes and not b.memory.reads, changes
            # The next command is not affected.
            legal = plain(4 + round, b.lanes)
            expected = b.memory.bytes.copy()
            execute(legal, expected, b.lanes, 3)
            b.pulses.clear()
            await b.command(ctx, b.dut.vector, legal)
            assert np.array_equal(b.memory.bytes, expected), changes
            assert not b.pulses
            b.memory.writes.clear()
            b.memory.reads.clear()

    b.run(bench)


OWN = {
    # Rounding rules, target widths (their codes), and functions that some other method does without.
    "niti": ({"NEAREST", "PSEUDO_STOCHASTIC"}, {0, 1}, {"UPDATE", "NITI_LOSS"}),
    "wage": ({"TRUNCATE", "HALF_EVEN", "STOCHASTIC_16"}, {0, 2}, {"UPDATE", "SQUARED_ERROR"}),
    "dfp": ({"TRUNCATE", "HALF_UP", "STOCHASTIC"}, {0, 1, 2}, {"WIDE", "SOFTMAX"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_a_core_for_one_method_knows_no_other(method):
    rules, widths, functions = OWN[method]
    b = Bench("tiny", methods=(method,))
    with_source1 = {"enable": ENABLE_TARGET0 | ENABLE_SOURCE1, "classes": 10, "count4": 3}
    of_functions = {
        Function.UPDATE: {"enable": ENABLE_TARGET0 | ENABLE_SOURCE1}, Function.WIDE: {},
        Function.NITI_LOSS: with_source1 | {"source0_width": 0},
        Function.SOFTMAX: with_source1 | {"target_width": 2}, Function.SQUARED_ERROR: with_source1,
    }

    async def bench(ctx):
        await b.set_register(ctx, SHIFT, 3)
        own = Rounding[min(rules)].code
        foreign = [{"function": function, "rounding": own, **changes} for function, changes in of_functions.items()
                   if function.name not in functions]
        foreign += [{"rounding": rule.code} for rule in ROUNDINGS if rule.name not in rules]
        foreign += [{"target_width": code, "rounding": own} for code in range(3) if code not in widths]
        if method != "wage":
            foreign.append({"state": 1, "enable": ENABLE_TARGET0 | ENABLE_TARGET1, "rounding": own})
        for changes in foreign:
            b.pulses.clear()
            await b.command(ctx, b.dut.vector, plain(4, b.lanes, **changes))
            assert b.pulses == {"illegal"} and not b.memory.writes and not b.memory.reads, changes
        b.pulses.clear()
        for rule in ROUNDINGS:
            for width in widths if rule.name in rules else ():
                fields = plain(6, b.lanes, rounding=rule.code, target_width=width, target0_stride4=b.lanes << width)
                expected = b.memory.bytes.copy()
                execute(fields, expected, b.lanes, 3)
                await b.command(ctx, b.dut.vector, fields)
                assert np.array_equal(b.memory.bytes, expected), (rule, width)
        assert not b.pulses

    b.run(bench)


@pytest.mark.parametrize("core", ["wide", "small"])
def test_dump_is_the_last_write(core):
    """A SCALAR after a VECTOR: its load sees the vector's results, its dump comes after everything else."""
    b = Bench(core, "both", latency=40)
    lanes = b.lanes
    program = assemble([(Operation.WORD, 3), (Operation.EXPONENT, 4, 3, 3), (Operation.NEAREST_LOG2, 5, 0)])
    b.memory.store(0x10000, np.full((9, lanes), 2**20, np.int32))

    async def bench(ctx):
        ctx.set(b.dut.step, 77)
        await b.set_register(ctx, SHIFT, 0)
        await b.command(ctx, b.dut.vector, plain(9, lanes, target_width=1, target0_stride4=2 * lanes))
        writes = len(b.memory.writes)
        await b.scalar(ctx, program, load=0x40004, dump=0x400, enable_load=1, enable_dump=1)
        assert len(b.memory.writes) == writes + 256 // b.config.line_bytes
        registers = b.memory.load(0x400, (64,), np.int32)
        assert registers[3] == 0x7FFF7FFF
        assert registers[4] == 32767
        assert registers[63] == 77
        assert b.pulses == {"exponent_saturated", "zero_range"}

    b.run(bench)


@pytest.mark.parametrize("core", ["wide", "small"])
@pytest.mark.parametrize("kind", ["plain", "pool", "pool first", "unpool", "update", "fill", "random", "maximum"])
def test_one_part_per_cycle(core, kind):
    """With a memory that never stalls, a pass takes one cycle per part of a source vector plus a fixed overhead."""
    latency = 20
    b = Bench(core, latency=latency)
    lanes, parts = b.lanes, 256 * b.config.parts
    # A window's second result holds the parts behind it up for two cycles.
    held = 64 * 2 * (b.config.parts - 1) if kind.startswith("pool") else 0
    fields = plain(256, lanes)
    if kind == "update":
        fields |= {"function": Function.UPDATE, "enable": ENABLE_TARGET0 | ENABLE_SOURCE1, "source1": 0x50000}
    if kind == "fill":
        fields |= {"function": Function.FILL}
    if kind == "random":
        latency = b.latency = 35             # the key's 31 cycles hide behind it
        fields |= {"rounding": Rounding.STOCHASTIC.code}
    if kind == "maximum":
        fields |= {"enable": ENABLE_RANGE}
    if kind.startswith("pool"):
        fields["state"] = kind == "pool first"
        fields |= {"pool": 1, "count2": 64, "count3": 2, "count4": 2, "enable": ENABLE_TARGET0 | ENABLE_TARGET1,
                   "source0_stride2": 16 * lanes, "source0_stride3": 8 * lanes, "target0_stride2": lanes,
                   "target1": 0x60000, "target1_stride2": lanes}
    if kind == "unpool":
        fields |= {"unpool": 1, "count2": 2, "count3": 64, "count4": 2, "enable": ENABLE_TARGET0 | ENABLE_SOURCE2,
                   "source0_stride4": 0, "source0_stride3": 4 * lanes, "target0_stride3": 2 * lanes,
                   "target0_stride2": 128 * lanes, "source2": 0x60000, "source2_stride3": lanes}

    async def bench(ctx):
        await b.set_register(ctx, SHIFT, 3)
        cycles = await b.command(ctx, b.dut.vector, fields)
        waiting = latency * (1 if kind in ("fill", "maximum") else 2)
        assert cycles <= parts + held + waiting + (40 if kind == "maximum" else 35)
        # All cycles are accounted for: the parts move while busy, and only latency is waited for.
        assert b.events["busy"] >= parts
        assert b.events["stalled_in"] <= held + latency + 23      # and the way to the pool and to the writers
        assert b.events["stalled_out"] <= latency + 5

    b.run(bench)
