"""The arithmetic of `golden.dfp` on torch tensors; names, arguments and results are golden's.

A `draw` is a `gpu.rounding.Draw`. Exponents, shifts and maxima are host integers.
"""

from __future__ import annotations

import torch

import golden.dfp
from golden.dfp import (
    EPSILON_EXPONENT,
    EXPONENTIALS,
    LOG2_E,
    NORMALISED_FRACTION,
    OCTAVE,
    PROBABILITY_BITS,
    RUNNING_EXPONENTS,
    SGD_WINDOW,
    STATE_BITS,
    BatchNormGradient,
    Sgd,
    Statistics,
    check_power_of_two,
)
from golden.errors import InputError
from golden.range import bit_length
from golden.rounding import Rounding
from gpu.rounding import half_up, saturate, storage, top_bits


def _bit_lengths(v: torch.Tensor) -> torch.Tensor:
    """Bit length of each positive int64."""
    lengths = torch.ones_like(v)
    for bit in (32, 16, 8, 4, 2, 1):
        high = v >> bit > 0
        lengths += high * bit
        v = torch.where(high, v >> bit, v)
    return lengths


def inverse_sqrt(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(r, h) with 1 / sqrt(v) = r * 2**(-31 - h) for positive int64 below 2**62."""
    length = _bit_lengths(v)
    h = (length + (length & 1) - 32) >> 1
    normalised = torch.where(h >= 0, v >> (2 * h).clamp_min(0), v << (-2 * h).clamp_min(0))
    # Below 2**32 a float64 square root lies within 2**-37 of the true one, squares of integers are exact.
    root = normalised.double().sqrt().floor().to(torch.int64)
    return (torch.full_like(root, 1 << 31) // root).clamp_max(65535), h


def _scaled(tensor, factor: tuple[int, int]):
    return tensor[0].to(torch.int64) * factor[0], tensor[1] + factor[1]


def normalise(x: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """(x - mean) / deviation with NORMALISED_FRACTION fraction bits, 16 bits in int64."""
    centred = statistics.scale * x.to(torch.int64) - statistics.offset
    shift = 31 + statistics.half_shift - NORMALISED_FRACTION
    return ((centred * statistics.reciprocal + (torch.ones_like(shift) << (shift - 1))) >> shift).clamp(-32767, 32767)


class Rules:
    """Sums over the batch and its largest magnitudes are those of all workers."""

    def __init__(self, ops):
        self.ops = ops
        self.exponentials = ops.tensor(EXPONENTIALS)

    def requantize(self, acc, exponent: int, bits: int = 8, draw=None, shared: bool = True):
        maximum = self.ops.maximum(acc, shared)
        shift = bit_length(maximum) - (bits - 1)
        if maximum == 0 or (shift < 0 and bits <= 8):
            return acc.to(storage(bits)), exponent
        if shift <= 0:
            return (acc.to(torch.int64) << -shift).to(storage(bits)), exponent + shift
        if draw is None:
            return self.ops.round_to(Rounding.HALF_UP, acc, maximum, shift, bits), exponent + shift
        if shift > 32:
            reduced = acc >> (shift - 32)
            rounded = (reduced + top_bits(draw.words(acc), 32, torch.int64)) >> 32
            return saturate(rounded, bits).to(storage(bits)), exponent + shift
        return self.ops.round_to(Rounding.STOCHASTIC, acc, maximum, shift, bits, draw), exponent + shift

    def aligned_sum(self, terms, window: int, shared: bool = True):
        present = []
        for x, exponent in terms:
            maximum = self.ops.maximum(x, shared)
            if maximum:
                present.append((x.to(torch.int64), exponent, exponent + bit_length(maximum)))
        total = torch.zeros_like(terms[0][0], dtype=torch.int64)
        if not present:
            return total, 0
        grid = max(min(e for _, e, _ in present), max(top for *_, top in present) - window)
        for x, exponent, _ in present:
            total += x << (exponent - grid) if exponent >= grid else half_up(x, grid - exponent)
        return total, grid

    def softmax_gradient(self, logits, exponent: int, labels, draw):
        z = logits.to(torch.int64)
        batch = int(self.ops.group.sum_(torch.tensor(len(z), device=self.ops.device)))
        log2_batch = check_power_of_two(batch)
        scaled = (z.amax(dim=1, keepdim=True) - z) * LOG2_E
        shift = 7 - exponent
        octaves = scaled >> min(shift, 62) if shift >= 0 else scaled << min(-shift, 13)
        octaves = octaves.clamp_max(31 * OCTAVE)
        e = self.exponentials[octaves & (OCTAVE - 1)] >> (octaves >> 8)
        g = (e << PROBABILITY_BITS) // e.sum(dim=1, keepdim=True)
        g[torch.arange(len(g), device=g.device), labels] -= 1 << PROBABILITY_BITS
        return self.requantize(g, -PROBABILITY_BITS - log2_batch, 8, draw)

    def sgd_step(self, weight, momentum, gradient, sgd: Sgd, weight_draw, momentum_draw):
        terms = [_scaled(momentum, sgd.momentum), gradient]
        if sgd.decay is not None:
            terms.append(_scaled(weight, sgd.decay))
        total = self.aligned_sum(terms, SGD_WINDOW, shared=False)
        new_momentum = self.requantize(*total, STATE_BITS, momentum_draw, shared=False)
        rate = (-sgd.rate[0], sgd.rate[1])
        total = self.aligned_sum([weight, _scaled(new_momentum, rate)], SGD_WINDOW, shared=False)
        return self.requantize(*total, STATE_BITS, weight_draw, shared=False), new_momentum

    # Batch norm -------------------------------------------------------------------------------------------------

    def _channel_sums(self, x, y=None):
        """Exact sums over all but the last axis of x, or of x * y, over all workers."""
        x = x.reshape(-1, x.shape[-1])
        if y is None:
            return self.ops.group.sum_(x.sum(dim=0, dtype=torch.int64))
        return self.ops.group.sum_((x.to(torch.int64) * y.reshape(x.shape)).sum(dim=0))

    def batch_statistics(self, x, exponent: int) -> Statistics:
        count = torch.tensor(x.numel() // x.shape[-1], device=self.ops.device)
        n = int(self.ops.group.sum_(count))
        if n > 1 << 17:
            raise InputError(f"batch norm sums up to 131072 elements per channel, got {n}: use a smaller batch")
        s1, s2 = self._channel_sums(x), self._channel_sums(x, x)
        shift = EPSILON_EXPONENT - 2 * exponent
        epsilon = max(1, n * n << min(shift, 26) if shift >= 0 else n * n >> min(-shift, 62))
        variance = n * s2 - s1 * s1 + epsilon
        return Statistics(n, s1, variance, *inverse_sqrt(variance))

    def running_statistics(self, mean, variance, exponent: int) -> Statistics:
        if not 0 <= exponent - RUNNING_EXPONENTS[0] <= 40:
            raise OverflowError(f"batch norm input exponent {exponent} is outside {RUNNING_EXPONENTS[0]}..24")
        v = (variance.to(torch.int64) + (1 << EPSILON_EXPONENT - RUNNING_EXPONENTS[1])) << (
            RUNNING_EXPONENTS[1] - 2 * RUNNING_EXPONENTS[0]
        )
        return Statistics(1 << (exponent - RUNNING_EXPONENTS[0]), mean.to(torch.int64), v, *inverse_sqrt(v))

    def batch_norm(self, x, exponent: int, gamma, beta, statistics: Statistics | None = None):
        statistics = statistics or self.batch_statistics(x, exponent)
        y_exponent = gamma[1] - NORMALISED_FRACTION
        shift = beta[1] - y_exponent if bool(beta[0].any()) else 0
        b = beta[0].to(torch.int64)
        b = b << min(shift, 31) if shift >= 0 else half_up(b, -shift)
        y = normalise(x, statistics) * gamma[0].to(torch.int64) + b
        return saturate(y, 32).to(torch.int32), y_exponent, statistics

    def batch_norm_gradient(self, error, error_exponent: int, x, exponent: int, gamma, statistics):
        normalised = normalise(x, statistics)
        beta_gradient = self._channel_sums(error)
        gamma_gradient = self._channel_sums(error, normalised)
        projection = half_up(normalised * gamma_gradient, 2 * NORMALISED_FRACTION)
        inner = statistics.scale * error.to(torch.int64) - beta_gradient - projection
        # gamma / deviation per channel, to 16 bits on one exponent for all channels.
        coefficient = gamma[0].to(torch.int64) * statistics.reciprocal
        tops = torch.where(
            coefficient != 0, _bit_lengths(coefficient.abs().clamp_min(1)) - statistics.half_shift, -(1 << 15)
        )
        top = int(tops.max())
        shift = (top - 15 + statistics.half_shift).clamp_max(62)
        rounded = torch.where(
            shift > 0,
            (coefficient + (torch.ones_like(shift) << (shift - 1).clamp_min(0))) >> shift.clamp_min(0),
            coefficient << (-shift).clamp_min(0),
        )
        coefficient = rounded.clamp(-32767, 32767)
        x_exponent = error_exponent + (top - 15 - 31) + gamma[1] - exponent
        return BatchNormGradient(
            (inner * coefficient, x_exponent if bool(coefficient.any()) else 0),
            (gamma_gradient, error_exponent - NORMALISED_FRACTION),
            (beta_gradient, error_exponent),
        )

    def update_running(self, mean, variance, exponent: int, statistics: Statistics):
        # A few integers per channel, whose quotients exceed 64 bits: golden's own, on the host.
        statistics = Statistics(statistics.scale, statistics.offset.cpu(), statistics.variance.cpu(), None, None)
        return tuple(
            self.ops.tensor(moved) for moved in golden.dfp.update_running(mean, variance, exponent, statistics)
        )
