"""Known answers of the contract, its statistical tests, and the bias of stochastic rounding."""

import numpy as np
import pytest

from golden import random, rounding
from golden.random import Purpose, key, mix32, stream, word, words

COUNT = 1 << 20


def test_known_answers():
    assert [mix32(a) for a in (0, 1, 0xDEADBEEF)] == [0x6B4ED927, 0xB48681B6, 0x7FF0EADA]
    assert key(1, 2, 3) == 0x84664A0E
    expected = [0x00402E36, 0xA0B0952C, 0x4214181E, 0x1AC0FE84]
    assert word(1, 2, 3, np.array([0, 1, 4, 1000000])).tolist() == expected
    assert [word(1, 2, 3, i) for i in (0, 1, 4, 1000000)] == expected


def test_mix32_follows_the_six_statements():
    """Written out from the contract."""

    def jenkins(a):
        m = 0xFFFFFFFF
        a = ((a + 0x7ED55D16) + (a << 12)) & m
        a = ((a ^ 0xC761C23C) ^ (a >> 19)) & m
        a = ((a + 0x165667B1) + (a << 5)) & m
        a = ((a + 0xD3A2646C) ^ (a << 9)) & m
        a = ((a + 0xFD7046C5) + (a << 3)) & m
        return ((a ^ 0xB55A4F09) ^ (a >> 16)) & m

    samples = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    assert mix32(samples).tolist() == [jenkins(int(a)) for a in samples]
    assert [mix32(int(a)) for a in samples[:50]] == mix32(samples[:50]).tolist()


def test_array_and_scalar_words_agree_and_leave_the_index_alone():
    index = np.arange(100_000, dtype=np.uint32)
    array = word(7, 8, 9, index)
    assert (index == np.arange(100_000)).all()
    assert [word(7, 8, 9, int(i)) for i in (0, 32767, 32768, 99_999)] == array[[0, 32767, 32768, 99_999]].tolist()
    assert (words(7, 8, 9, (100, 1000)).reshape(-1) == array).all()
    assert (words(7, 8, 9, (50,), first=33_000) == array[33_000:33_050]).all()


def test_streams():
    assert stream(3, Purpose.RESIDUAL_ADD) == 58
    assert random.initial_weights_stream(2) == 0xFFFF0021
    assert (random.SHUFFLE, random.AUGMENTATION, random.SPLIT) == (0xFFFF0000, 0xFFFF0002, 0xFFFF0003)


def _signs(stream_number=3, step=2, seed=1):
    return words(seed, step, stream_number, (COUNT,)).astype(np.float64) / 2**31 - 1


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 32, 64, 256, 1024, 4096])
def test_neighbouring_words_do_not_correlate(lag):
    u = _signs()
    # The correlation of independent uniform words has deviation 1 / sqrt(count).
    assert abs(np.mean(u[:-lag] * u[lag:]) * 3) < 5 / np.sqrt(COUNT)


def test_words_are_uniform_and_every_bit_is_fair():
    w = words(1, 2, 3, (COUNT,))
    histogram = np.bincount(w >> 24, minlength=256)
    chi = ((histogram - COUNT / 256) ** 2 / (COUNT / 256)).sum()
    assert 255 - 5 * np.sqrt(510) < chi < 255 + 5 * np.sqrt(510)
    for bit in range(32):
        assert abs(np.mean(w >> bit & 1) - 0.5) < 5 * 0.5 / np.sqrt(COUNT), bit


@pytest.mark.parametrize(
    "other", [(4, 2, 1), (19, 2, 1), (3, 3, 1), (3, 2, 2)], ids=["purpose", "layer", "step", "seed"]
)
def test_streams_steps_and_seeds_do_not_correlate(other):
    assert abs(np.mean(_signs() * _signs(*other)) * 3) < 5 / np.sqrt(COUNT)


def test_stochastic_rounding_is_unbiased():
    draws = words(1, 2, 3, (COUNT,))
    for x, shift in ((1, 8), (100, 8), (255, 8), (-77, 8), (3, 2), (12345, 16)):
        fraction = (x / 2**shift) % 1
        deviation = np.sqrt(fraction * (1 - fraction) / COUNT)
        mean = rounding.stochastic(np.full(COUNT, x), shift, draws).mean()
        assert abs(mean - x / 2**shift) < 5 * deviation, (x, shift)
        mean = rounding.stochastic_16(np.full(COUNT, x), shift, draws >> 16).mean()
        assert abs(mean - x / 2**shift) < 5 * deviation, (x, shift)
