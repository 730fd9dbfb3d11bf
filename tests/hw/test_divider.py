# amaranth: UnusedElaboratable=no
"""Divider and SquareRoot: every operand at small widths, random and corner operands at full width."""

import itertools
import math

import numpy as np
import pytest

from hw.divider import Divider
from hw.isqrt import SquareRoot
from tests.hw.native import Native


def divide(unit, pairs, numerator_bits, denominator_bits, quotient_bits, **stalls):
    pairs = np.asarray(pairs, dtype=np.uint64)
    items = (pairs[:, 0] | pairs[:, 1] << np.uint64(numerator_bits)).astype(np.int64)
    result, cycles = unit.streams({"i": items}, {"o": len(items)}, **stalls)
    packed = result["o"]
    return packed & (1 << quotient_bits) - 1, packed >> quotient_bits & (1 << denominator_bits) - 1, cycles


def test_divider_every_operand():
    unit = Native(Divider(8, 5))
    pairs = np.array(list(itertools.product(range(256), range(32))))
    quotient, remainder, cycles = divide(unit, pairs, 8, 5, 8)
    n, d = pairs.T
    some = d > 0
    assert np.array_equal(quotient[some], n[some] // d[some])
    assert np.array_equal(remainder[some], n[some] % d[some])
    assert (quotient[~some] == 255).all()
    assert cycles <= len(pairs) * 10 + 9      # quotient_bits + 2 cycles each
    again = divide(unit, pairs, 8, 5, 8, offer=0.4, accept=0.3)
    assert np.array_equal(again[0], quotient) and np.array_equal(again[1], remainder)


def test_divider_with_fewer_quotient_bits():
    """As the softmax uses it: numerator = p << 11 with p <= denominator."""
    unit = Native(Divider(31, 24, 12))
    rng = np.random.default_rng(5)
    d = np.concatenate([rng.integers(1, 1 << 24, 3000) >> rng.integers(0, 24, 3000), [1, (1 << 24) - 1]])
    d = np.maximum(d, 1)
    p = np.minimum(np.concatenate([rng.integers(0, 1 << 20, 3000), [1, 1 << 19]]), np.minimum(d, (1 << 20) - 1))
    p[::5] = np.minimum(d[::5], (1 << 20) - 1)
    quotient, remainder, _ = divide(unit, np.stack([p << 11, d], axis=1), 31, 24, 12)
    assert np.array_equal(quotient, (p << 11) // d) and np.array_equal(remainder, (p << 11) % d)


def test_square_root_every_operand():
    unit = Native(SquareRoot(16))
    x = np.arange(1 << 16)
    result, cycles = unit.streams({"i": x}, {"o": len(x)})
    root = np.array([math.isqrt(v) for v in x])
    assert np.array_equal(result["o"] & 0xFF, root)
    assert np.array_equal(result["o"] >> 8, x - root * root)
    assert cycles <= len(x) * 10 + 9
    again, _ = unit.streams({"i": x[::37]}, {"o": len(x[::37])}, offer=0.3, accept=0.3)
    assert np.array_equal(again["o"], result["o"][::37])


def test_square_root_full_width():
    unit = Native(SquareRoot(62))
    rng = np.random.default_rng(6)
    roots = rng.integers(0, 1 << 31, 500) >> rng.integers(0, 31, 500)
    x = np.concatenate([roots * roots, np.maximum(roots * roots - 1, 0), roots * roots + 2 * roots, [(1 << 62) - 1]])
    result, _ = unit.streams({"i": x}, {"o": len(x)})
    root = np.array([math.isqrt(int(v)) for v in x])
    words = result["o"] & (1 << 31) - 1 if result["o"].ndim == 1 else result["o"][:, 0] & 0x7FFFFFFF
    assert np.array_equal(words, root)


@pytest.mark.parametrize("make, message", [
    (lambda: Divider(8, 0), "at least one bit"), (lambda: Divider(8, 4, 9), "quotient of 1 to 8"),
    (lambda: Divider(16, 4, 8), "needs 12 bits or more"), (lambda: SquareRoot(7), "even number of bits")])
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
