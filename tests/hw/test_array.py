"""SystolicArray against numpy matrix products at the limits of its timing contract."""

import numpy as np
import pytest
from amaranth.lib import data
from amaranth.sim import Simulator

from hw.array import SystolicArray
from hw.config import CoreConfig
from hw.descriptor import Mode

CONTROL = data.StructLayout({"valid": 1, "tag": 15})
SHAPES = [(4, 4), (4, 8), (8, 4), (8, 8)]


def config(rows, columns):
    return CoreConfig(name="test", rows=rows, columns=columns)


def pack(values):
    return int.from_bytes(np.asarray(values, np.int8).tobytes(), "little")


class Schedule:
    """Inputs by cycle, and the results expected for each control word."""

    def __init__(self, rows, columns, seed=0, extreme=False):
        self.rows, self.columns = rows, columns
        self.dut = SystolicArray(config(rows, columns), CONTROL)
        self.rng = np.random.default_rng(seed)
        self.extreme = extreme
        self.inputs = {}       # cycle -> {port: value}
        self.expected = {}     # cycle of column 0 -> (tag, sums of the columns)
        self.tags = 0

    def random(self, *shape):
        if self.extreme:
            return self.rng.choice(np.array([-127, 127], np.int8), shape)
        return self.rng.integers(-127, 128, shape, dtype=np.int8)

    def put(self, cycle, **ports):
        assert cycle >= 0
        row = self.inputs.setdefault(cycle, {})
        assert not row.keys() & ports.keys(), (cycle, ports)
        row.update(ports)

    def result(self, cycle, mode, sums):
        self.tags = (self.tags + 1) % (1 << 15)
        self.put(cycle, control_in={"valid": 1, "tag": self.tags})
        self.expected[cycle + self.dut.latency(mode)] = self.tags, sums

    def tile_vectors(self, mode):
        return self.columns if mode is Mode.FORWARD else self.rows

    def stationary(self, mode, boundary, vectors, shift_cycles):
        """One weight-stationary tile: P vectors from cycle `boundary`, its weights at `shift_cycles`."""
        co, ci = (self.columns, self.rows) if mode is Mode.FORWARD else (self.rows, self.columns)
        weights, inputs = self.random(co, ci), self.random(vectors, self.rows)
        port = "left_weight" if mode is Mode.FORWARD else "top"
        for cycle, vector in zip(shift_cycles, weights[::-1], strict=True):
            self.put(cycle, shift=1, **{port: pack(vector)})
        matrix = weights.T if mode is Mode.FORWARD else weights
        sums = inputs.astype(np.int64) @ matrix.astype(np.int64)
        self.put(boundary, boundary=1)
        for k in range(vectors):
            self.put(boundary + k, left=pack(inputs[k]))
            self.result(boundary + k, mode, sums[k])

    def gradient(self, boundary, cycles, following):
        """One output-stationary tile with vectors in `cycles`; the next boundary comes at `following`."""
        errors, inputs = self.random(len(cycles), self.rows), self.random(len(cycles), self.columns)
        self.put(boundary, boundary=1)
        for cycle, error, value in zip(cycles, errors, inputs, strict=True):
            self.put(cycle, left=pack(error), top=pack(value))
        sums = errors.astype(np.int64).T @ inputs.astype(np.int64)
        for i in range(self.rows):
            self.result(following + i, Mode.GRADIENT, sums[i])

    def run(self, modes):
        """Simulate; returns the number of wrong sums. `modes`: {first cycle: mode}."""
        dut, last = self.dut, max(self.expected) + self.columns + 1
        # without a valid control word, weight-stationary inputs are free
        idle_left = pack(self.random(self.rows))
        columns, words, empties = [], [], []

        async def bench(ctx):
            mode = Mode.FORWARD
            for cycle in range(last):
                row = self.inputs.get(cycle, {})
                if cycle in modes:
                    # cycle 0: nothing was ever in flight
                    assert cycle == 0 or ctx.get(dut.empty)
                    mode = modes[cycle]
                ctx.set(dut.mode, mode)
                idle = 0 if mode is Mode.GRADIENT else idle_left
                ctx.set(dut.left.as_value(), row.get("left", idle))
                ctx.set(dut.left_weight.as_value(), row.get("left_weight", pack([77] * self.rows)))
                ctx.set(dut.top.as_value(), row.get("top", pack([-77] * self.columns)))
                ctx.set(dut.shift, row.get("shift", 0))
                ctx.set(dut.boundary, row.get("boundary", 0))
                ctx.set(dut.control_in, row.get("control_in", {"valid": 0, "tag": 0}))
                columns.append(ctx.get(dut.column.as_value()))
                word = ctx.get(dut.control_out)
                words.append((word.valid, word.tag))
                empties.append(ctx.get(dut.empty))
                await ctx.tick()

        simulator = Simulator(dut)
        simulator.add_clock(1e-6)
        simulator.add_testbench(bench)
        simulator.run()
        seen = {cycle: tag for cycle, (valid, tag) in enumerate(words) if valid}
        assert seen == {cycle: tag for cycle, (tag, _) in self.expected.items()}
        self.empties = empties
        raw = b"".join(word.to_bytes(4 * self.columns, "little") for word in columns)
        values = np.frombuffer(raw, "<i4").reshape(-1, self.columns)
        wrong = 0
        for cycle, (_, sums) in self.expected.items():
            got = values[cycle + np.arange(self.columns), np.arange(self.columns)]
            wrong += int((got != sums).sum())
        return wrong


def stationary_tiles(schedule, mode, vectors, interval, tiles=5, early=False, start=0):
    """Tiles every `interval` cycles, weights as late as allowed or as early; returns the last input cycle."""
    n = schedule.tile_vectors(mode)
    boundary = start + n - 1
    for k in range(tiles):
        first = boundary - interval + n if early and k else boundary - n + 1
        schedule.stationary(mode, boundary, vectors, range(first, first + n))
        boundary += interval
    return boundary - interval + vectors - 1


def gradient_tiles(schedule, vectors, interval, tiles=5, start=0):
    for k in range(tiles):
        boundary = start + k * interval
        schedule.gradient(boundary, range(boundary, boundary + vectors), boundary + interval)
    schedule.put(start + tiles * interval, boundary=1)
    return start + tiles * interval + schedule.rows - 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", [Mode.FORWARD, Mode.ERROR])
@pytest.mark.parametrize("early", [False, True], ids=["late", "early"])
def test_stationary_tiles_at_the_minimum_interval(shape, mode, early):
    for vectors in (1, 2, 2 * max(shape) + 3):
        schedule = Schedule(*shape, seed=vectors)
        n = schedule.tile_vectors(mode)
        stationary_tiles(schedule, mode, vectors, max(vectors, 2 * n - 1), early=early)
        assert schedule.run({0: mode}) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_tiles_at_the_minimum_interval(shape):
    for vectors in (1, shape[0] - 1, 2 * max(shape) + 3):
        schedule = Schedule(*shape, seed=vectors)
        gradient_tiles(schedule, vectors, max(vectors, shape[0]))
        assert schedule.run({0: Mode.GRADIENT}) == 0


@pytest.mark.parametrize("shape", [(4, 4), (8, 4)], ids=str)
def test_the_contract_is_tight(shape):
    """One cycle less gives wrong sums: the tests above do run at the limit."""
    for mode in (Mode.FORWARD, Mode.ERROR):
        schedule = Schedule(*shape)
        n = schedule.tile_vectors(mode)
        first = 2 * n - 1
        schedule.stationary(mode, first, 1, range(n))
        schedule.stationary(mode, first + 2 * n, 2, range(first + n - 1, first + 2 * n - 1))
        assert schedule.run({0: mode}) > 0
        schedule = Schedule(*shape)
        schedule.stationary(mode, n - 2, 2, range(n))
        assert schedule.run({0: mode}) > 0
    rows = shape[0]
    schedule = Schedule(*shape)
    boundaries = [0, rows, 2 * rows - 1]
    for first, following in zip(boundaries, boundaries[1:], strict=False):
        errors, inputs = schedule.random(1, rows), schedule.random(1, shape[1])
        schedule.put(first, boundary=1, left=pack(errors[0]), top=pack(inputs[0]))
        sums = errors.astype(int).T @ inputs.astype(int)
        # the first tile's last row and the second tile's first row collide
        for i in range(rows - (first == 0)):
            schedule.result(following + i, Mode.GRADIENT, sums[i])
    schedule.put(boundaries[-1], boundary=1)
    assert schedule.run({0: Mode.GRADIENT}) > 0


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)], ids=str)
def test_extreme_operands(shape):
    for mode in (Mode.FORWARD, Mode.ERROR):
        schedule = Schedule(*shape, extreme=True)
        stationary_tiles(schedule, mode, 20, 20, tiles=3)
        assert schedule.run({0: mode}) == 0
    schedule = Schedule(*shape, extreme=True)
    gradient_tiles(schedule, 40, 40, tiles=2)
    assert schedule.run({0: Mode.GRADIENT}) == 0


@pytest.mark.parametrize("value", [(127, 127), (-127, 127), (-127, -127)])
def test_longest_one_signed_sums(value):
    schedule = Schedule(4, 4)
    schedule.put(0, boundary=1)
    for cycle in range(300):
        schedule.put(cycle, left=pack([value[0]] * 4), top=pack([value[1]] * 4))
    schedule.put(300, boundary=1)
    for i in range(4):
        schedule.result(300 + i, Mode.GRADIENT, np.full(4, 300 * value[0] * value[1]))
    assert schedule.run({0: Mode.GRADIENT}) == 0


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_bubbles(shape):
    """Gaps between weights, between vectors and between tiles."""
    rng = np.random.default_rng(1)
    for mode in (Mode.FORWARD, Mode.ERROR):
        schedule = Schedule(*shape)
        n = schedule.tile_vectors(mode)
        previous = 0
        for _ in range(4):
            shifts = previous + n + np.cumsum(rng.integers(1, 4, n))
            boundary = int(shifts[-1] + rng.integers(0, 4))
            schedule.stationary(mode, boundary, 3, shifts.tolist())
            previous = boundary
        assert schedule.run({0: mode}) == 0
    schedule = Schedule(*shape)
    boundary = 0
    for _ in range(4):
        cycles = boundary + np.cumsum(np.concatenate([[0], rng.integers(1, 4, 2 * shape[0])]))
        following = int(cycles[-1] + rng.integers(1, 4))
        schedule.gradient(boundary, cycles.tolist(), following)
        boundary = following
    schedule.put(boundary, boundary=1)
    assert schedule.run({0: Mode.GRADIENT}) == 0


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_mode_changes_when_empty(shape):
    """Every order of two modes, inputs from the very cycle in which `empty` rises."""
    order = [Mode.FORWARD, Mode.ERROR, Mode.FORWARD, Mode.GRADIENT, Mode.ERROR, Mode.GRADIENT, Mode.FORWARD]
    schedule = Schedule(*shape)
    start, modes = 0, {}
    for mode in order:
        modes[start] = mode
        if mode is Mode.GRADIENT:
            last = gradient_tiles(schedule, 5, 8, tiles=2, start=start)
        else:
            last = stationary_tiles(schedule, mode, 5, 16, tiles=2, start=start)
        start = last + schedule.dut.settle
    assert schedule.run(modes) == 0
    for first in list(modes)[1:]:
        assert not schedule.empties[first - 1]
        assert schedule.empties[first]


def test_control_word_needs_valid():
    with pytest.raises(ValueError, match="one-bit member 'valid'"):
        SystolicArray(config(4, 4), data.StructLayout({"index": 4}))
