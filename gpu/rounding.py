"""The rounding rules of `golden.rounding` and the contract's random words on torch tensors, on any device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from golden import random
from golden.rounding import Rounding


@dataclass(frozen=True)
class Draw:
    """The words of a tensor, row-major from index `first` of a stream: computed where they are used."""

    seed: int
    step: int
    stream: int
    first: int = 0

    @property
    def key(self) -> int:
        return random.key(self.seed, self.step, self.stream)

    def words(self, like: torch.Tensor) -> torch.Tensor:
        """A word per element of `like`, as the int32 of the same bits."""
        if like.device.type == "cpu":
            words = random.words(self.seed, self.step, self.stream, like.shape, self.first)
            return torch.from_numpy(words.view(np.int32))
        index = torch.arange(like.numel(), dtype=torch.int32, device=like.device) + signed_word(self.first)
        return _mix32((index * signed_word(random.INDEX_MULTIPLIER)) ^ signed_word(self.key)).reshape(like.shape)


def signed_word(word: int) -> int:
    """The int32 with the bits of a 32-bit word."""
    word &= random.MASK
    return word - (1 << 32) if word >> 31 else word


def _mix32(a: torch.Tensor) -> torch.Tensor:
    """golden.random.mix32 in wrapping int32; right shifts must bring in zeros."""
    for s in random.MIX32:
        constant = signed_word(s.constant)
        left = a + constant if s.first == "+" else a ^ constant
        right = a << s.shift if s.direction == "<<" else (a >> s.shift) & ((1 << 32 - s.shift) - 1)
        a = left + right if s.join == "+" else left ^ right
    return a


def top_bits(words: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The upper `bits` (0..32) of 32-bit words, as non-negative integers."""
    if bits == 32:
        return words.to(torch.int64) & random.MASK
    if bits == 0:
        return torch.zeros_like(words, dtype=dtype)
    return ((words >> (32 - bits)) & ((1 << bits) - 1)).to(dtype)


def half_up(x: torch.Tensor, shift: int) -> torch.Tensor:
    x = x.to(torch.int64)
    return (x + ((1 << shift) >> 1)) >> shift if shift <= 62 else torch.zeros_like(x)


def half_even(x: torch.Tensor, shift: int) -> torch.Tensor:
    if shift <= 0:
        return x << -shift
    rounded = (x >> shift).bitwise_and_(1)
    rounded += x
    rounded += (1 << (shift - 1)) - 1
    rounded >>= shift
    return rounded


def _nearest(x, shift):
    if shift == 0:
        return x.clone()
    rounded = x >> (8 * x.element_size() - 1)
    rounded += x
    rounded += 1 << (shift - 1)
    rounded >>= shift
    return rounded


def _sign_magnitude(x, shift, margin):
    """x / 2**shift with the magnitude rounded up where margin(magnitude) < 0.

    The sign of a difference is 0 or -1 without a comparison, which torch's vector code does not cover as well.
    """
    top = 8 * x.element_size() - 1
    sign = x >> top
    magnitude = (x ^ sign).sub_(sign)
    up = margin(magnitude).bitwise_right_shift_(top)
    magnitude >>= shift
    magnitude -= up
    magnitude ^= sign
    return magnitude.sub_(sign)


def _pseudo_stochastic(x, shift):
    half = shift // 2

    def margin(magnitude):
        probability = (magnitude & ((1 << shift) - 1)).bitwise_right_shift_(half)
        threshold = magnitude & ((1 << half) - 1)
        if shift & 1:
            threshold <<= 1
        return threshold.sub_(probability)

    return _sign_magnitude(x, shift, margin)


def _stochastic_16(x, shift, draw):
    threshold = top_bits(draw, 16, x.dtype)
    threshold <<= max(shift - 16, 0)

    def margin(magnitude):
        discarded = magnitude & ((1 << shift) - 1)
        if shift < 16:
            discarded <<= 16 - shift
        return threshold - discarded

    return _sign_magnitude(x, shift, margin)


def _stochastic(x, shift, draw):
    return (x + top_bits(draw, shift, x.dtype)) >> shift


_RULES = {
    Rounding.NEAREST: _nearest,
    Rounding.HALF_UP: lambda x, shift: (x + ((1 << shift) >> 1)) >> shift,
    Rounding.HALF_EVEN: half_even,
    Rounding.PSEUDO_STOCHASTIC: _pseudo_stochastic,
    Rounding.STOCHASTIC: _stochastic,
    Rounding.STOCHASTIC_16: _stochastic_16,
}


def storage(bits: int) -> torch.dtype:
    """The smallest type of `bits`-bit mantissas."""
    return torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32


def saturate(x: torch.Tensor, bits: int) -> torch.Tensor:
    limit = (1 << (bits - 1)) - 1
    return x.clamp(-limit, limit)


_BLOCK = 1 << 15  # elements whose intermediate tensors stay in a core's cache


def round_to(rounding, x: torch.Tensor, maximum: int, shift: int, bits: int, draw: Draw | None = None) -> torch.Tensor:
    """x / 2**shift rounded and saturated to `bits` bits; `maximum` bounds |x| and tells whether 32 bits suffice."""
    narrow = 0 <= shift <= 30 and maximum + (1 << shift) <= 2**31 - 1
    limit = (1 << (bits - 1)) - 1

    def rounded(part, first):
        operand = part.to(torch.int32 if narrow else torch.int64)
        words = () if draw is None else (replace(draw, first=draw.first + first).words(part),)
        return _RULES[rounding](operand, shift, *words).clamp_(-limit, limit)

    block = _BLOCK * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    if x.numel() <= block:
        return rounded(x, 0).to(storage(bits))
    out = torch.empty(x.shape, dtype=storage(bits))
    source, target = x.reshape(-1), out.view(-1)
    for start in range(0, x.numel(), block):
        target[start : start + block] = rounded(source[start : start + block], start)
    return out
