"""Counter-based random words (contract section 4): a word depends on its logical index only, never on
traversal order.

`MIX32` is the hash as data, so that software and hardware are generated from one list of statements.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

MASK = 0xFFFFFFFF
INDEX_MULTIPLIER = 0x9E3779B9


class Statement(NamedTuple):
    """`a = (a FIRST constant) JOIN (a DIRECTION shift)` modulo 2**32, with the operators spelled as in
    Python.
    """

    first: str
    constant: int
    join: str
    direction: str
    shift: int


MIX32 = (
    Statement("+", 0x7ED55D16, "+", "<<", 12),
    Statement("^", 0xC761C23C, "^", ">>", 19),
    Statement("+", 0x165667B1, "+", "<<", 5),
    Statement("+", 0xD3A2646C, "^", "<<", 9),
    Statement("+", 0xFD7046C5, "+", "<<", 3),
    Statement("^", 0xB55A4F09, "^", ">>", 16),
)


class Purpose(enum.IntEnum):
    """What a stream of words of one parameter layer rounds; the stream is 16 * layer + purpose."""

    ACTIVATION = 0
    ERROR = 1
    GRADIENT = 2
    WEIGHT = 3
    MOMENTUM = 4
    DATAPATH_WEIGHT = 5
    LOSS = 6
    GAMMA = 7
    BETA = 8
    BATCH_NORM_GRADIENT = 9
    RESIDUAL_ADD = 10


SHUFFLE = 0xFFFF0000
INITIAL_WEIGHTS = 0xFFFF0001
AUGMENTATION = 0xFFFF0002
SPLIT = 0xFFFF0003


def stream(layer: int, purpose: Purpose) -> int:
    """The stream of a parameter layer (counted from 0 in network order) and a purpose."""
    return 16 * layer + purpose


def initial_weights_stream(layer: int) -> int:
    """The host stream that initialises parameter layer `layer`."""
    return INITIAL_WEIGHTS + 16 * layer


def mix32(a):
    """The 32-bit hash of an integer or an array of them; returns int for int, uint32 array for arrays."""
    if isinstance(a, (int, np.integer)):
        a = int(a) & MASK
        for s in MIX32:
            left = a + s.constant if s.first == "+" else a ^ s.constant
            right = a << s.shift if s.direction == "<<" else a >> s.shift
            a = (left + right if s.join == "+" else left ^ right) & MASK
        return a
    a = np.array(a).astype(np.uint32)
    _mix(a)
    return a


def _mix(a: np.ndarray) -> None:
    """mix32 of a uint32 array, in place."""
    right = np.empty_like(a)
    for s in MIX32:
        shift = np.left_shift if s.direction == "<<" else np.right_shift
        shift(a, np.uint32(s.shift), out=right)
        (np.add if s.first == "+" else np.bitwise_xor)(a, np.uint32(s.constant), out=a)
        (np.add if s.join == "+" else np.bitwise_xor)(a, right, out=a)


def key(seed: int, step: int, stream: int) -> int:
    """The 32-bit key shared by all words of one stream of one step."""
    return mix32(mix32((seed & MASK) ^ mix32(step)) ^ (stream & MASK))


def word(seed: int, step: int, stream: int, index):
    """The 32-bit word of element `index` (integer or array): int for int, uint32 array for arrays."""
    k = key(seed, step, stream)
    if isinstance(index, (int, np.integer)):
        return mix32((int(index) * INDEX_MULTIPLIER & MASK) ^ k)
    index = np.asarray(index).astype(np.uint32)
    return mix32(index * np.uint32(INDEX_MULTIPLIER) ^ np.uint32(k))


_BLOCK = 1 << 15  # words whose hashing stays in the cache


def words(seed: int, step: int, stream: int, shape, first: int = 0) -> np.ndarray:
    """The words of a whole tensor in row-major order from index `first`, uint32 of the given shape."""
    count = int(np.prod(shape, dtype=np.int64))
    if first + count > 1 << 32:
        raise ValueError(f"a stream has 2**32 words, {first + count} were asked for")
    result = np.arange(first, first + count, dtype=np.uint32)
    k = np.uint32(key(seed, step, stream))
    for start in range(0, count, _BLOCK):
        part = result[start : start + _BLOCK]
        part *= np.uint32(INDEX_MULTIPLIER)
        part ^= k
        _mix(part)
    return result.reshape(shape)
