from fractions import Fraction

import numpy as np
import pytest

from golden.range import bit_length, ceil_log2, max_magnitude, nearest_log2


def interesting():
    for k in range(0, 40):
        for d in (-2, -1, 0, 1, 2):
            if 2**k + d > 0:
                yield 2**k + d
    yield from range(1, 5000)
    yield from (int(1.4142135623730951 * 2**k) + d for k in range(2, 40) for d in (-1, 0, 1))


def test_ceil_log2_and_bit_length_from_their_definitions():
    assert ceil_log2(0) == bit_length(0) == 0
    for m in interesting():
        c = ceil_log2(m)
        assert 2**c >= m and (c == 0 or 2 ** (c - 1) < m)
        b = bit_length(m)
        assert 2 ** (b - 1) <= m < 2**b
    # float32 log2 says 21 here
    assert ceil_log2(2097153) == 22


def test_nearest_log2_compares_with_sqrt_two_exactly():
    for m in interesting():
        k = nearest_log2(m)
        # |log2 m - k| < 1/2, squared so that no root is needed; sqrt 2 is irrational, so there is no tie.
        assert Fraction(1, 2) < Fraction(m * m, 4**k if k else 1) < 2, m
    table = [2, 3, 6, 12, 23, 46, 91, 182, 363, 725, 1449, 2897, 5793, 11586, 23171, 46341, 92682, 185364, 370728]
    for p, threshold in enumerate(table):
        assert nearest_log2(threshold) == p + 1
        if threshold - 1 >= 2**p:
            assert nearest_log2(threshold - 1) == p


def test_bad_maxima():
    with pytest.raises(ValueError, match="undefined"):
        nearest_log2(0)
    for function in (ceil_log2, bit_length, nearest_log2):
        with pytest.raises(ValueError, match="negative, got -1"):
            function(-1)


def test_max_magnitude():
    assert max_magnitude(np.array([], np.int32)) == 0
    assert max_magnitude(np.array([[3, -7]], np.int8)) == 7
    assert max_magnitude(np.array([-128], np.int8)) == 128
    assert max_magnitude(np.array([-(2**31)], np.int32)) == 2**31
