"""Rounding of `x / 2**shift` to an integer: every rule the three methods use (contract section 3).

All functions take integer arrays and return int64 arrays *before* saturation. `x` may hold up to 62 bits with the
bits a rule adds. `Rounding` names the rules where one is chosen; its values are the codes the hardware uses.
"""

from __future__ import annotations

import enum

import numpy as np


def _operand(x, shift: int) -> np.ndarray:
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")
    return np.asarray(x, dtype=np.int64)


# The rules, for int32 or int64 operands; the result has the operand's type. A shift is at most 62 (30 for
# int32).


def _sign(x):
    """-1 where x is negative, else 0: (m ^ sign) - sign negates m there."""
    return x >> (8 * x.dtype.itemsize - 1)


def _magnitude(x, sign):
    return (x ^ sign) - sign


def _truncate(x, shift):
    sign = _sign(x)
    return _magnitude(_magnitude(x, sign) >> shift, sign)


def _nearest(x, shift):
    # -((-x + half) >> shift) is (x + half - 1) >> shift.
    if shift == 0:
        return x.copy()
    rounded = _sign(x)
    rounded += x
    rounded += 1 << (shift - 1)
    rounded >>= shift
    return rounded


def _half_up(x, shift):
    return (x + ((1 << shift) >> 1)) >> shift


def _half_even(x, shift):
    if shift <= 0:
        return x << -shift
    rounded = (x >> shift) & 1
    rounded += x
    rounded += (1 << (shift - 1)) - 1
    rounded >>= shift
    return rounded


def _pseudo_stochastic(x, shift):
    sign = _sign(x)
    magnitude = _magnitude(x, sign)
    half = shift // 2
    probability = (magnitude & ((1 << shift) - 1)) >> half
    threshold = (magnitude & ((1 << half) - 1)) << (shift & 1)
    magnitude >>= shift
    magnitude += probability > threshold
    return _magnitude(magnitude, sign)


def _stochastic_magnitude(x, shift, draw):
    sign = _sign(x)
    magnitude = _magnitude(x, sign)
    up = (magnitude & ((1 << shift) - 1)) > draw.astype(x.dtype, copy=False)
    return _magnitude((magnitude >> shift) + up, sign)


def _stochastic(x, shift, draw):
    # The top `shift` bits: shifted as 32-bit words, so that a shift of 0 keeps none of them.
    if shift == 0:
        return x.copy()
    noise = (draw.astype(np.uint32, copy=False) >> np.uint32(32 - shift)).astype(x.dtype)
    noise += x
    noise >>= shift
    return noise


def _stochastic_16(x, shift, draw):
    sign = _sign(x)
    magnitude = _magnitude(x, sign)
    discarded = magnitude & ((1 << shift) - 1)
    draw = draw.astype(x.dtype, copy=False)
    up = (discarded > draw << (shift - 16)) if shift >= 16 else (discarded << (16 - shift) > draw)
    return _magnitude((magnitude >> shift) + up, sign)


# The same rules as functions of any integer array: int64 results.


def truncate(x, shift: int) -> np.ndarray:
    """Toward zero."""
    return _truncate(_operand(x, shift), min(shift, 63))


def nearest(x, shift: int) -> np.ndarray:
    """To nearest, ties away from zero."""
    x = _operand(x, shift)
    return _nearest(x, shift) if shift <= 62 else np.zeros_like(x)


def half_up(x, shift: int) -> np.ndarray:
    """To nearest, ties toward +infinity."""
    x = _operand(x, shift)
    return _half_up(x, shift) if shift <= 62 else np.zeros_like(x)


def half_even(x, shift: int) -> np.ndarray:
    """To nearest, ties to even. A shift of 0 or less is an exact left shift by -shift."""
    x = np.asarray(x, dtype=np.int64)
    return _half_even(x, shift) if shift <= 62 else np.zeros_like(x)


def pseudo_stochastic(x, shift: int) -> np.ndarray:
    """Sign-magnitude; the upper discarded bits are the probability of rounding up, the lower ones the random
    number. With an odd shift the lower field has one bit less and is doubled, so that both have equal width.
    """
    x = _operand(x, shift)
    if shift > 62:
        raise ValueError(f"pseudo_stochastic works within 62 bits: shift must be at most 62, got {shift}")
    return _pseudo_stochastic(x, shift)


def stochastic_magnitude(x, shift: int, draw) -> np.ndarray:
    """Sign-magnitude; rounds away from zero where the discarded bits exceed `draw` (0..2**shift - 1)."""
    x = _operand(x, shift)
    if shift > 62:
        raise ValueError(f"stochastic_magnitude works within 62 bits: shift must be at most 62, got {shift}")
    return _stochastic_magnitude(x, shift, np.asarray(draw, dtype=np.int64))


def stochastic(x, shift: int, draw) -> np.ndarray:
    """Two's complement: floor of (x plus the top `shift` bits of the 32-bit word `draw`) / 2**shift."""
    x = _operand(x, shift)
    if shift > 32:
        raise ValueError(f"stochastic rounding has 32 random bits: shift must be at most 32, got {shift}")
    return _stochastic(x, shift, np.asarray(draw))


def stochastic_16(x, shift: int, draw) -> np.ndarray:
    """Sign-magnitude; rounds away from zero where the discarded fraction exceeds draw / 2**16 (0..65535)."""
    x = _operand(x, shift)
    if shift > 46:
        raise ValueError(f"stochastic_16 compares within 62 bits: shift must be at most 46, got {shift}")
    return _stochastic_16(x, shift, np.asarray(draw))


def saturate(x, bits: int) -> np.ndarray:
    """Clip to the symmetric range of `bits` bits: -(2**(bits-1) - 1) .. 2**(bits-1) - 1."""
    if bits < 2:
        raise ValueError(f"a symmetric signed number needs at least 2 bits, got {bits}")
    limit = (1 << (bits - 1)) - 1
    return np.clip(np.asarray(x, dtype=np.int64), -limit, limit)


class Rounding(enum.Enum):
    """A rounding rule. `code` is the small integer the hardware selects it by; `compute` evaluates it."""

    TRUNCATE = 0
    NEAREST = 1
    HALF_UP = 2
    HALF_EVEN = 3
    PSEUDO_STOCHASTIC = 4
    STOCHASTIC_MAGNITUDE = 5
    STOCHASTIC = 6
    STOCHASTIC_16 = 7

    @property
    def code(self) -> int:
        return self.value

    @property
    def function(self):
        return _RULES[self][0]

    @property
    def needs_draw(self) -> bool:
        """Whether the rule consumes a random draw per element."""
        return self in (Rounding.STOCHASTIC_MAGNITUDE, Rounding.STOCHASTIC, Rounding.STOCHASTIC_16)

    def compute(self, x, shift: int, draw=None) -> np.ndarray:
        """`x / 2**shift` rounded by this rule, int64, not saturated. `draw` is required exactly where
        `needs_draw`.
        """
        if self.needs_draw != (draw is not None):
            raise ValueError(f"{self.name} {'needs' if self.needs_draw else 'takes no'} random draw")
        return self.function(x, shift, draw) if self.needs_draw else self.function(x, shift)

    @classmethod
    def of(cls, rule) -> Rounding:
        """The member for a member, its name in any case, its code, or its function."""
        for member in cls:
            if rule is member or rule is member.function or rule == member.value:
                return member
            if isinstance(rule, str) and rule.upper() == member.name:
                return member
        raise ValueError(f"unknown rounding {rule!r}: choose from {', '.join(m.name.lower() for m in cls)}")


_RULES = {
    Rounding.TRUNCATE: (truncate, _truncate),
    Rounding.NEAREST: (nearest, _nearest),
    Rounding.HALF_UP: (half_up, _half_up),
    Rounding.HALF_EVEN: (half_even, _half_even),
    Rounding.PSEUDO_STOCHASTIC: (pseudo_stochastic, _pseudo_stochastic),
    Rounding.STOCHASTIC_MAGNITUDE: (stochastic_magnitude, _stochastic_magnitude),
    Rounding.STOCHASTIC: (stochastic, _stochastic),
    Rounding.STOCHASTIC_16: (stochastic_16, _stochastic_16),
}

_BLOCK = 1 << 15  # elements whose intermediate arrays stay in the cache


def round_to(rounding: Rounding, x: np.ndarray, maximum: int, shift: int, bits: int, draw=None) -> np.ndarray:
    """`rounding.compute` and `saturate` of a whole tensor, in the smallest type that holds `bits` bits.

    `maximum` is the largest magnitude in x: it tells whether 32-bit arithmetic is exact.
    """
    if rounding.needs_draw != (draw is not None):
        raise ValueError(f"{rounding.name} {'needs' if rounding.needs_draw else 'takes no'} random draw")
    out = np.empty(x.shape, np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32)
    limit = (1 << (bits - 1)) - 1
    narrow = 0 <= shift <= 30 and maximum + (1 << shift) <= 2**31 - 1
    rule = rounding.function
    if narrow:
        rule = _RULES[rounding][1]
    source, target = np.ascontiguousarray(x).reshape(-1), out.reshape(-1)
    draws = None if draw is None else np.ascontiguousarray(draw).reshape(-1)
    for start in range(0, source.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        operand = source[part].astype(np.int32 if narrow else np.int64, copy=False)
        rounded = rule(operand, shift) if draws is None else rule(operand, shift, draws[part])
        np.minimum(rounded, limit, out=rounded)
        np.maximum(rounded, -limit, out=rounded)
        target[part] = rounded
    return out
