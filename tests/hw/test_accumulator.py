"""Accumulator against a numpy model: sums, results under stalls, overflow and places."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from hw.accumulator import Accumulator
from hw.config import CoreConfig

CONFIGS = [
    CoreConfig(name="square", rows=4, columns=4, accumulator_entries=16, result_entries=8),
    CoreConfig(name="wide", rows=4, columns=8, accumulator_entries=16, result_entries=8),
    CoreConfig(name="half", rows=8, columns=8, lanes=4, accumulator_entries=32, result_entries=16),
    CoreConfig(name="tall", rows=8, columns=4, accumulator_entries=32, result_entries=16),
]
IDLE = {"valid": 0, "index": 0, "init": 0, "final": 0}


def wrap(value):
    return (value + 2**31) % 2**32 - 2**31


def simulate(config, words, data, *, issue=1.0, accept=1.0, hoard=0, seed=0):
    """Run control words `(index, init, final)` with `data` (words x columns) through the accumulator.

    issue, accept : probability that a legal word is presented, that the sink is ready, in a cycle.
    hoard : places the feeder tries to hold reserved in advance.
    Checks in every cycle: room, busy, the stream rules. Returns result lines, cycles with overflow, and the
    cycle in which each word was presented and each line first shown.
    """
    dut, columns = Accumulator(config), config.columns
    rng = np.random.default_rng(seed)
    presented, lines, shown, overflows = [], [], [], []
    finals = sum(final for _, _, final in words)

    async def bench(ctx):
        cycle = reserved = held = vacated = 0
        last_use = {}
        waiting = None
        quiet = 0
        while quiet < columns + 8:
            # outputs of this cycle
            valid, payload = ctx.get(dut.result.valid), ctx.get(dut.result.payload)
            if waiting is not None:
                assert valid and payload == waiting, "a waiting line must stay"
            elif valid:
                shown.append(cycle)
            room = ctx.get(dut.room)
            assert room == config.result_entries - reserved + vacated
            vacated = len(lines) + valid        # places count a cycle later
            if ctx.get(dut.overflow):
                overflows.append(cycle)
            # inputs of this cycle
            word = IDLE
            if len(presented) < len(words):
                index, init, final = words[len(presented)]
                free = cycle - last_use.get(index, -4) >= 4
                if free and (held or not final) and rng.random() < issue:
                    word = {"valid": 1, "index": index, "init": init, "final": final}
                    last_use[index] = cycle
                    presented.append(cycle)
                    held -= final
            ctx.set(dut.control, word)
            reserve = room > 0 and held <= hoard and reserved < finals
            ctx.set(dut.reserve, reserve)
            reserved, held = reserved + reserve, held + reserve
            vector = rng.integers(-2**31, 2**31, columns)     # between the words: anything
            for j in range(columns):
                if cycle - j in presented[-columns - 1:]:
                    vector[j] = data[presented.index(cycle - j)][j]
            ctx.set(dut.data.as_value(), int.from_bytes(vector.astype("<i4").tobytes(), "little"))
            ready = rng.random() < accept
            ctx.set(dut.result.ready, ready)
            inside = bool(presented) and cycle - presented[-1] <= columns + 3
            assert inside or not ctx.get(dut.busy)
            assert ctx.get(dut.busy) or not any(cycle - p <= columns + 3 for p in presented[-1:])
            if valid and ready:
                lines.append(np.frombuffer(payload.to_bytes(4 * columns, "little"), "<i4"))
            waiting = payload if valid and not ready else None
            done = len(presented) == len(words) and len(lines) == finals
            quiet = quiet + 1 if done else 0
            await ctx.tick()
            cycle += 1
            assert cycle < 100 * len(words) + 1000, "stuck"
        assert not ctx.get(dut.result.valid)
        assert ctx.get(dut.room) == config.result_entries

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return np.array(lines).reshape(-1, columns), overflows, presented, shown


def model(config, words, data):
    """Result lines, and (word, column) of every sum that wraps."""
    entries = np.zeros((config.accumulator_entries, config.columns), np.int64)
    lines, wraps = [], []
    for k, (index, init, final) in enumerate(words):
        exact = (0 if init else entries[index]) + data[k]
        entries[index] = wrap(exact)
        wraps += [(k, j) for j in np.flatnonzero(exact != entries[index])]
        if final:
            lines.append(entries[index].copy())
    return np.array(lines).reshape(-1, config.columns), wraps


def check(config, words, data, **options):
    lines, overflows, presented, shown = simulate(config, words, data, **options)
    expected, wraps = model(config, words, data)
    assert np.array_equal(lines, expected)
    assert overflows == sorted({presented[k] + j + 4 for k, j in wraps})
    return presented, shown


def random_words(config, count, seed):
    """All combinations of init and final on random entries; every entry starts with init."""
    rng = np.random.default_rng(seed)
    words = [(index, 1, 0) for index in range(config.accumulator_entries)]
    words += [(int(index), int(init), int(final)) for index, init, final in
              zip(rng.integers(config.accumulator_entries, size=count), rng.random(count) < 0.3,
                  rng.random(count) < 0.6, strict=True)]
    return words + [(index, 0, 1) for index in range(config.accumulator_entries)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
@pytest.mark.parametrize(("issue", "accept"), [(1, 1), (0.4, 1), (1, 0.4), (0.6, 0.6)],
                         ids=["none", "source", "sink", "both"])
def test_sums_and_stalls(config, issue, accept):
    words = random_words(config, 150, seed=1)
    data = np.random.default_rng(2).integers(-2**20, 2**20, (len(words), config.columns))
    check(config, words, data, issue=issue, accept=accept, hoard=3)


@pytest.mark.parametrize("config", CONFIGS[:2], ids=lambda c: c.name)
def test_one_line_per_cycle(config):
    """With an eager sink the results keep the pace of the array, C + 5 cycles behind it."""
    entries = config.accumulator_entries
    words = [(k % entries, k // entries % 2, 1) for k in range(4 * entries)]
    data = np.random.default_rng(3).integers(-2**24, 2**24, (len(words), config.columns))
    # entries of the first round hold zero: memories start cleared in simulation
    presented, shown = check(config, words, data, hoard=config.result_entries)
    latency = config.columns + 5
    assert shown == [cycle + latency for cycle in presented]


def test_a_full_queue_stops_the_feeder_and_loses_nothing():
    config = CONFIGS[0]
    words = [(k % 16, 1, 1) for k in range(60)]
    data = np.arange(60 * 4).reshape(60, 4)
    check(config, words, data, accept=0.05, hoard=config.result_entries)


def test_an_entry_may_return_after_four_cycles():
    config = CONFIGS[0]
    words = [(5, int(k == 0), int(k == 20)) for k in range(21)]
    presented, _ = check(config, words, np.full((21, 4), -1000))
    assert set(np.diff(presented)) == {4}


@pytest.mark.parametrize(("first", "second"), [
    (2**31 - 1, 1), (2**31 - 1, 0), (-2**31, -1), (-2**31, 0), (-2**31, -2**31), (2**31 - 1, -2**31),
    (2**31 - 1, 2**31 - 1), (-2**30, -2**30), (-2**30, -2**30 - 1), (2**30, 2**30), (2**30, 2**30 - 1)])
def test_overflow(first, second):
    """In each column alone; without init only, and never for idle data."""
    config = CONFIGS[0]
    words, rows = [], []
    for j in range(config.columns):
        for init in (0, 1):
            words += [(j, 1, 0), (j, init, 1)]
            line = np.zeros((2, config.columns), np.int64)
            line[:, j] = first, second
            rows.append(line)
    check(config, words, np.concatenate(rows))


def test_random_overflow():
    config = CONFIGS[1]
    words = random_words(config, 120, seed=5)
    data = np.random.default_rng(6).integers(-2**31, 2**31, (len(words), config.columns))
    assert len(model(config, words, data)[1]) > 50
    check(config, words, data, issue=0.7, accept=0.7, hoard=2)
