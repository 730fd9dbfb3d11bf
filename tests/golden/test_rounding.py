"""Every rule of the contract, exhaustively, against its statement in exact fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from golden import rounding
from golden.rounding import Rounding, round_to, saturate

VALUES = np.arange(-1100, 1101)
SHIFTS = range(0, 13)


def sign(x):
    return (x > 0) - (x < 0)


def truncate(x, s):
    return sign(x) * math.floor(abs(Fraction(x, 2**s)))


def nearest(x, s):
    return sign(x) * math.floor(abs(Fraction(x, 2**s)) + Fraction(1, 2)) if s else x


def half_up(x, s):
    return math.floor(Fraction(x, 2**s) + Fraction(1, 2)) if s else x


def half_even(x, s):
    return round(Fraction(x, 2**s) if s >= 0 else x * 2**-s)


def pseudo_stochastic(x, s):
    """The discarded field as a bit string, cut into an upper and a lower half."""
    whole, fraction = divmod(abs(x), 2**s)
    bits = format(fraction, f"0{s}b") if s else ""
    upper = bits[: len(bits) - s // 2]
    lower = bits[len(upper) :].ljust(len(upper), "0")
    return sign(x) * (whole + (int(upper or "0", 2) > int(lower or "0", 2)))


PLAIN = {
    Rounding.TRUNCATE: truncate,
    Rounding.NEAREST: nearest,
    Rounding.HALF_UP: half_up,
    Rounding.HALF_EVEN: half_even,
    Rounding.PSEUDO_STOCHASTIC: pseudo_stochastic,
}


@pytest.mark.parametrize("rule", PLAIN)
def test_rules_without_draw_exhaustively(rule):
    for shift in SHIFTS:
        result = rule.compute(VALUES, shift)
        assert result.dtype == np.int64
        assert result.tolist() == [PLAIN[rule](int(x), shift) for x in VALUES], (rule, shift)


def test_half_even_shifts_left_exactly():
    assert rounding.half_even(np.array([-3, 5]), -4).tolist() == [-48, 80]


@pytest.mark.parametrize("shift", range(0, 8))
def test_stochastic_magnitude_exhaustively(shift):
    values = np.arange(-300, 301)
    for draw in range(2**shift):
        expected = []
        for x in values.tolist():
            whole, discarded = divmod(abs(x), 2**shift)
            expected.append(sign(x) * (whole + (discarded > draw)))
        assert rounding.stochastic_magnitude(values, shift, np.full(601, draw)).tolist() == expected


@pytest.mark.parametrize("shift", [0, 1, 2, 5, 8, 31, 32])
def test_stochastic_is_floor_of_sum_with_top_bits(shift):
    rng = np.random.default_rng(shift)
    x = rng.integers(-(2**40), 2**40, 500)
    draw = rng.integers(0, 2**32, 500, dtype=np.uint64)
    expected = [(int(a) + (int(d) * 2**shift) // 2**32) // 2**shift for a, d in zip(x, draw, strict=True)]
    assert rounding.stochastic(x, shift, draw).tolist() == expected
    assert rounding.stochastic(x, shift, draw.astype(np.uint32)).tolist() == expected


@pytest.mark.parametrize("shift", range(0, 9))
def test_stochastic_rounds_up_exactly_as_often_as_the_fraction(shift):
    draws = (np.arange(2**shift) << (32 - shift)).astype(np.uint32)
    for x in range(-40, 41):
        total = int(rounding.stochastic(np.full(2**shift, x), shift, draws).sum())
        assert total == x  # the mean over all draws is x / 2**shift


@pytest.mark.parametrize("shift", [0, 1, 7, 15, 16, 17, 34])
def test_stochastic_16(shift):
    rng = np.random.default_rng(shift)
    x = rng.integers(-(2**31), 2**31, 500)
    draw = rng.integers(0, 2**16, 500)
    expected = []
    for a, d in zip(x.tolist(), draw.tolist(), strict=True):
        whole, discarded = divmod(abs(a), 2**shift)
        expected.append(sign(a) * (whole + (discarded * 2**16 > d * 2**shift)))
    assert rounding.stochastic_16(x, shift, draw).tolist() == expected


def test_shift_of_zero_returns_x_and_negative_is_refused():
    for rule in Rounding:
        draw = (np.zeros(len(VALUES), np.uint32),) if rule.needs_draw else ()
        assert (rule.compute(VALUES, 0, *draw) == VALUES).all()
        if rule is not Rounding.HALF_EVEN:
            with pytest.raises(ValueError, match="at least 0, got -1"):
                rule.compute(VALUES, -1, *draw)


def test_shifts_beyond_the_operand():
    x = np.array([-(2**31) + 1, -1, 0, 1, 2**31 - 1])
    for rule in (Rounding.TRUNCATE, Rounding.NEAREST, Rounding.HALF_EVEN):
        for shift in (33, 40, 62, 63, 80):
            assert (rule.compute(x, shift) == 0).all(), (rule, shift)
    for shift in (32, 33, 40, 62):
        assert rounding.pseudo_stochastic(x, shift).tolist() == [pseudo_stochastic(int(v), shift) for v in x]


def test_saturate_is_symmetric():
    assert saturate(np.array([-129, -128, -127, 127, 128]), 8).tolist() == [-127, -127, -127, 127, 127]
    assert saturate(np.array([-(2**15), 2**15]), 16).tolist() == [-32767, 32767]
    with pytest.raises(ValueError, match="at least 2 bits"):
        saturate(VALUES, 1)


def test_draws_are_required_exactly_where_used():
    with pytest.raises(ValueError, match="STOCHASTIC needs"):
        Rounding.STOCHASTIC.compute(VALUES, 2)
    with pytest.raises(ValueError, match="NEAREST takes no"):
        Rounding.NEAREST.compute(VALUES, 2, VALUES)


def test_rounding_of_names_codes_and_functions():
    for rule in Rounding:
        for alias in (rule, rule.name.lower(), rule.code, rule.function):
            assert Rounding.of(alias) is rule
    assert [rule.code for rule in Rounding] == list(range(8))
    with pytest.raises(ValueError, match="unknown rounding 'up'"):
        Rounding.of("up")


@pytest.mark.parametrize("rule", list(Rounding))
@pytest.mark.parametrize("largest", [900, 2**20, 2**31 - 1, 2**36])
def test_round_to_equals_compute_then_saturate(rule, largest):
    """The fast path of whole tensors: 32-bit and 64-bit operands, several cache blocks."""
    rng = np.random.default_rng(largest)
    x = rng.integers(-largest, largest + 1, 70_001)
    x[:2] = largest, -largest
    if largest < 2**31:
        x = x.astype(np.int32)
    for shift in (0, 1, 4, 15, 16, 23, 24, 30, 31):
        draw = None
        if rule.needs_draw:
            top = {Rounding.STOCHASTIC: 2**32, Rounding.STOCHASTIC_16: 2**16}.get(rule, 2**shift)
            draw = rng.integers(0, top, x.shape, dtype=np.uint32)
        for bits in (8, 16):
            result = round_to(rule, x, largest, shift, bits, draw)
            assert result.dtype == (np.int8 if bits == 8 else np.int16)
            assert (result == saturate(rule.compute(x, shift, draw), bits)).all(), (shift, bits)
