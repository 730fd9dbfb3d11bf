"""Rounding of `x / 2**shift` to an integer: every rule the three methods use (contract section 3).

All functions take integer arrays and return int64 arrays *before* saturation. `x` may hold up to 62 bits including the
bits a rule adds. `Rounding` names the rules for places that choose one; its values are the codes the hardware
uses.
"""

from __future__ import annotations

import enum

import numpy as np


def _operand(x, shift: int) -> np.ndarray:
    if shift < 0:
        raise ValueError(f"shift must be at least 0, got {shift}")
    return np.asarray(x, dtype=np.int64)


def _magnitude(x: np.ndarray, shift: int) -> tuple[np.ndarray, np.ndarray]:
    """|x| divided by 2**shift: the integer part and the discarded bits. A shift above 62 discards everything."""
    a = np.abs(x)
    if shift > 62:
        return np.zeros_like(a), a
    return a >> shift, a & ((1 << shift) - 1)


def _signed(x: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    return np.where(x < 0, -magnitude, magnitude)


def truncate(x, shift: int) -> np.ndarray:
    """Toward zero."""
    x = _operand(x, shift)
    return _signed(x, _magnitude(x, shift)[0])


def nearest(x, shift: int) -> np.ndarray:
    """To nearest, ties away from zero."""
    x = _operand(x, shift)
    if shift == 0:
        return x
    if shift > 62:
        return np.zeros_like(x)
    return _signed(x, (np.abs(x) + (1 << (shift - 1))) >> shift)


def half_up(x, shift: int) -> np.ndarray:
    """To nearest, ties toward +infinity."""
    x = _operand(x, shift)
    if shift == 0:
        return x
    if shift > 62:
        return np.zeros_like(x)
    return (x + (1 << (shift - 1))) >> shift


def half_even(x, shift: int) -> np.ndarray:
    """To nearest, ties to even. A shift of 0 or less is an exact left shift by -shift."""
    x = np.asarray(x, dtype=np.int64)
    if shift <= 0:
        return x << -shift
    if shift > 62:
        return np.zeros_like(x)
    return (x + ((1 << (shift - 1)) - 1) + ((x >> shift) & 1)) >> shift


def pseudo_stochastic(x, shift: int) -> np.ndarray:
    """Sign-magnitude; the upper discarded bits are the probability of rounding up, the lower ones the random
    number.

    With an odd shift the lower field has one bit less and is doubled, so that both have equal width.
    """
    x = _operand(x, shift)
    whole, discarded = _magnitude(x, shift)
    half = shift // 2
    if half > 62:
        return np.zeros_like(x)
    probability = discarded >> half
    threshold = (discarded & ((1 << half) - 1)) << (shift & 1)
    return _signed(x, whole + (probability > threshold))


def stochastic_magnitude(x, shift: int, draw) -> np.ndarray:
    """Sign-magnitude; rounds away from zero where the discarded bits exceed `draw` (0..2**shift - 1)."""
    x = _operand(x, shift)
    whole, discarded = _magnitude(x, shift)
    return _signed(x, whole + (discarded > np.asarray(draw, dtype=np.int64)))


def stochastic(x, shift: int, draw) -> np.ndarray:
    """Two's complement: floor of (x plus the top `shift` bits of the 32-bit word `draw`) / 2**shift; shift
    0..32.
    """
    if shift > 32:
        raise ValueError(f"stochastic rounding has 32 random bits: shift must be at most 32, got {shift}")
    x = _operand(x, shift)
    return (x + (np.asarray(draw, dtype=np.int64) >> (32 - shift))) >> shift


def stochastic_16(x, shift: int, draw) -> np.ndarray:
    """Sign-magnitude; rounds away from zero where the discarded fraction exceeds draw / 2**16 (draw
    0..65535).
    """
    x = _operand(x, shift)
    if shift > 46:
        raise ValueError(f"stochastic_16 compares within 62 bits: shift must be at most 46, got {shift}")
    whole, discarded = _magnitude(x, shift)
    return _signed(x, whole + ((discarded << 16) > (np.asarray(draw, dtype=np.int64) << shift)))


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
        return _FUNCTIONS[self]

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


_FUNCTIONS = {
    Rounding.TRUNCATE: truncate,
    Rounding.NEAREST: nearest,
    Rounding.HALF_UP: half_up,
    Rounding.HALF_EVEN: half_even,
    Rounding.PSEUDO_STOCHASTIC: pseudo_stochastic,
    Rounding.STOCHASTIC_MAGNITUDE: stochastic_magnitude,
    Rounding.STOCHASTIC: stochastic,
    Rounding.STOCHASTIC_16: stochastic_16,
}
