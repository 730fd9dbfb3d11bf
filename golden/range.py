"""The range of a whole tensor from its largest magnitude, in exact integers (contract section 2)."""

from __future__ import annotations

import numpy as np


def _magnitude(maximum) -> int:
    maximum = int(maximum)
    if maximum < 0:
        raise ValueError(f"the largest magnitude cannot be negative, got {maximum}")
    return maximum


def max_magnitude(x: np.ndarray) -> int:
    """The largest absolute value of an array of integers (float arrays must hold integers); 0 when it is
    empty.
    """
    if x.size == 0:
        return 0
    return max(int(x.max()), -int(x.min()))


def ceil_log2(maximum) -> int:
    """ceil(log2(maximum)), and 0 for 0 (niti)."""
    maximum = _magnitude(maximum)
    return (maximum - 1).bit_length() if maximum else 0


def bit_length(maximum) -> int:
    """floor(log2(maximum)) + 1, and 0 for 0 (dfp)."""
    return _magnitude(maximum).bit_length()


def nearest_log2(maximum) -> int:
    """log2(maximum) rounded to the nearest integer (wage). 0 has no logarithm: the caller handles it."""
    maximum = _magnitude(maximum)
    if maximum == 0:
        raise ValueError("nearest_log2 of 0 is undefined: handle the all-zero tensor first")
    p = maximum.bit_length() - 1
    return p + 1 if maximum * maximum > 1 << (2 * p + 1) else p
