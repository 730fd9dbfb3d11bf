# amaranth: UnusedElaboratable=no
"""RandomWords against golden.random: known answers, any traversal, gaps, and the statistics of its output."""

import numpy as np
import pytest

from golden import random as golden_random
from golden.random import INDEX_MULTIPLIER
from hw.random_words import RandomWords
from tests.hw.native import Native

LANES = 8


@pytest.fixture(scope="module")
def unit():
    return Native(RandomWords(LANES))


def load(unit, seed, step, stream):
    """Start a key; returns the cycles until it is there."""
    unit.set(seed=seed, step=step, stream=stream)
    ready = unit.trace(50, ["ready"], load=np.arange(50) == 0)["ready"]
    unit.set(load=0)
    assert not ready[1] and ready[-1]
    return int(np.flatnonzero(ready[1:])[0]) + 1


def words(unit, bases):
    """Words [vector][lane] for vectors that start at the given indices, one per cycle."""
    count, pad = len(bases), RandomWords.latency
    product = np.concatenate([np.asarray(bases, np.uint64) * np.uint64(INDEX_MULTIPLIER) & np.uint64(0xFFFFFFFF),
                              np.zeros(pad, np.uint64)]).astype(np.int64)
    out = unit.trace(count + pad, ["words", "o_valid"], product=product, i_valid=np.arange(count + pad) < count)
    assert out["o_valid"].tolist() == [0] * pad + [1] * count
    return out["words"][pad:]


def test_known_answers(unit):
    """The contract's examples; the key itself is the word that mixes back from index 0."""
    load(unit, 1, 2, 3)
    got = words(unit, [0, 1, 4, 1000000])[:, 0]
    assert [f"{w:08x}" for w in got] == ["00402e36", "a0b0952c", "4214181e", "1ac0fe84"]


def test_key_latency(unit):
    assert load(unit, 5, 6, 7) == RandomWords.key_latency


def test_random_traversals_and_keys(unit):
    rng = np.random.default_rng(1)
    for _ in range(20):
        seed, step, stream = (int(v) for v in rng.integers(0, 1 << 32, 3))
        load(unit, seed, step, stream)
        bases = rng.integers(0, 1 << 32, 200)
        index = (bases[:, None] + np.arange(LANES)) & 0xFFFFFFFF     # wraps like the 32-bit index
        assert np.array_equal(words(unit, bases), golden_random.word(seed, step, stream, index))


def test_gaps_and_restarted_key(unit):
    """Vectors may come in any cycle; a second load abandons the first key."""
    rng = np.random.default_rng(2)
    count = 400
    unit.trace(10, ["ready"], seed=7, load=np.arange(10) == 0)
    load(unit, 11, 12, 13)
    valid = rng.integers(0, 2, count)
    entered = np.cumsum(valid) - valid   # vectors that entered before each cycle
    product = (entered * LANES * INDEX_MULTIPLIER & 0xFFFFFFFF).astype(np.int64)
    out = unit.trace(count, ["words", "o_valid"], product=product, i_valid=valid)
    unit.set(i_valid=0)
    got = out["words"][out["o_valid"] == 1]
    assert len(got) > 150
    want = golden_random.word(11, 12, 13, np.arange(len(got) * LANES).reshape(-1, LANES))
    assert np.array_equal(got, want)


def test_statistics_of_the_output(unit):
    """2**20 words: every bit is fair, bytes are uniform, neighbours up to lag 64 do not correlate."""
    load(unit, 3, 1, 4)
    stream = words(unit, np.arange(0, 1 << 20, LANES)).reshape(-1)
    n = len(stream)
    bits = (stream[:, None] >> np.arange(32, dtype=np.uint32) & 1).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(n)
    for shift in (0, 8, 16, 24):
        counts = np.bincount(stream >> np.uint32(shift) & 0xFF, minlength=256)
        chi = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert abs(chi - 255) < 5 * np.sqrt(2 * 255)
    centred = stream / 2.0**32 - 0.5
    for lag in range(1, 65):
        correlation = 12 * np.mean(centred[:-lag] * centred[lag:])
        assert abs(correlation) < 5 / np.sqrt(n), lag


def test_no_lanes_are_refused():
    with pytest.raises(ValueError, match="at least one lane"):
        RandomWords(0)
