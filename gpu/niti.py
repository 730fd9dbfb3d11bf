"""The arithmetic of `golden.niti` on torch tensors; names, arguments and results are golden's."""

from __future__ import annotations

import torch

from golden.niti import (
    LARGEST_EXPONENT,
    LOG2_E,
    LOSS_SHIFT,
    OCTAVES,
    PROBABILITY_BITS,
    SMALLEST_EXPONENT,
    TAYLOR_EXPONENT,
)
from golden.range import ceil_log2
from golden.rounding import Rounding
from gpu.rounding import storage


def _truncating_divide(a: torch.Tensor, b: int) -> torch.Tensor:
    return torch.div(a, b, rounding_mode="trunc")


class Rules:
    """Exponents and maxima are host integers."""

    def __init__(self, ops):
        self.ops = ops

    def requantize(self, acc, exponent: int, rounding: Rounding, minimum_shift: int = 1):
        maximum = self.ops.maximum(acc)
        shift = ceil_log2(maximum) - 7
        shift = max(shift, minimum_shift) if shift > 0 else 0
        return self.ops.round_to(rounding, acc, maximum, shift, 8), exponent + shift

    def loss_gradient(self, logits, exponent: int, labels):
        a = logits.to(torch.int64)
        exponent = min(max(exponent, SMALLEST_EXPONENT), LARGEST_EXPONENT)
        if exponent > TAYLOR_EXPONENT:
            u = _truncating_divide(a * LOG2_E, 1 << 15)
            s = u << exponent if exponent >= 0 else _truncating_divide(u, 1 << -exponent)
            octave = (s - (s.amax(dim=1, keepdim=True) - OCTAVES)).clamp_min(0)
            p = (torch.ones_like(octave) << octave) - 1
        else:
            p = (1 << (1 - 2 * exponent)) + a * (1 << (1 - exponent)) + a * a
        g = (p << PROBABILITY_BITS) // p.sum(dim=1, keepdim=True)
        g[torch.arange(len(g), device=g.device), labels] -= g.sum(dim=1)
        return self.ops.round_to(Rounding.PSEUDO_STOCHASTIC, g, 1 << PROBABILITY_BITS, LOSS_SHIFT, 8)

    def weight_gradient(self, acc, bits: int, width: int = 8):
        maximum = self.ops.maximum(acc, shared=False)
        b = ceil_log2(maximum)
        if b == 0:
            return torch.zeros_like(acc, dtype=storage(width))
        return self.ops.round_to(Rounding.PSEUDO_STOCHASTIC, acc, maximum, max(b - bits, 0), width)

    def update(self, w, g, width: int = 8):
        limit = (1 << (width - 1)) - 1
        difference = w.to(torch.int16 if width <= 8 else torch.int32)
        difference -= g
        return difference.clamp_(-limit, limit).to(storage(width))

    def narrow(self, master):
        return self.ops.round_to(Rounding.PSEUDO_STOCHASTIC, master, 1 << 15, 8, 8)
