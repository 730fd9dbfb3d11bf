"""The arithmetic of `golden.wage` on torch tensors; names, arguments and results are golden's."""

from __future__ import annotations

import torch

from golden.range import nearest_log2
from golden.rounding import Rounding
from golden.wage import MASTER_LIMIT, WIDTHS, Widths
from gpu.rounding import half_even, saturate, storage


class Rules:
    """Maxima and shifts are host integers."""

    def __init__(self, ops):
        self.ops = ops

    def ternarize(self, master, widths: Widths = WIDTHS):
        shift = widths.gradient - widths.weight
        return self.ops.round_to(Rounding.HALF_EVEN, master, 1 << 15, shift, widths.weight)

    def quantize_activation(self, acc, shift: int, bits: int = 8):
        limit = (1 << (bits - 1)) - 1
        # Beyond the limit every value saturates: clip first, and 32 bits hold the rounding.
        ceiling = min((limit + 1) << shift, 2**30)
        quantized = saturate(half_even(acc.clamp(-ceiling, ceiling).to(torch.int32), shift), bits).to(torch.int8)
        return quantized, acc.abs() > limit << shift

    def label_error(self, logits, exponent: int, labels):
        raw = logits.clone()
        raw[torch.arange(len(raw), device=raw.device), labels] -= 1 << -exponent
        return raw

    def quantize_error(self, raw, bits: int = 8):
        maximum = self.ops.maximum(raw)
        if maximum == 0:
            return torch.zeros_like(raw, dtype=storage(bits)), 0
        k = nearest_log2(maximum)
        if k <= bits - 1:
            return saturate(raw.to(torch.int32) << (bits - 1 - k), bits).to(storage(bits)), k
        return self.ops.round_to(Rounding.HALF_EVEN, raw, maximum, k - (bits - 1), bits), k

    def weight_step(self, acc, log2_rate: int, draw):
        maximum = self.ops.maximum(acc, shared=False)
        if maximum == 0:
            return torch.zeros_like(acc)
        shift = nearest_log2(maximum) - log2_rate
        if shift <= 0:
            return acc.to(torch.int64) << -shift
        return self.ops.round_to(Rounding.STOCHASTIC_16, acc, maximum, shift, 32, draw)

    def update(self, master, step, limit: int = MASTER_LIMIT):
        return (master.to(step.dtype) - step).clamp_(-limit, limit).to(master.dtype)
