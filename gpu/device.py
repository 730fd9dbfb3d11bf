"""Layer operations and arithmetic by Triton kernels: for a GPU, or a CPU in Triton's interpreter.

`niti` and `wage` keep maxima, exponents and shifts on the device: a step of theirs never waits for it. `dfp` aligns
sums by host integers and asks the device for each largest magnitude.
"""

from __future__ import annotations

import torch
import triton

from golden.niti import (
    LARGEST_EXPONENT,
    LOG2_E,
    LOSS_SHIFT,
    OCTAVES,
    PROBABILITY_BITS,
    SMALLEST_EXPONENT,
    TAYLOR_EXPONENT,
)
from golden.ops import SAFE_PRODUCTS, conv2d_shape
from golden.rounding import Rounding
from golden.wage import MASTER_LIMIT, WIDTHS, Widths
from gpu import dfp, kernels
from gpu.group import ALONE, Group
from gpu.ops import Ops
from gpu.rounding import Draw, signed_word, storage

KEYS = 4096  # streams whose keys a network may use


def _fits(products: int, limit: int) -> bool:
    return products * limit <= 2**31 - 1


class GpuOps(Ops):
    """The operations of `gpu.ops.Ops` by Triton kernels; operands that are not int8 use torch's float64 product."""

    def __init__(self, device="cuda", group: Group = ALONE):
        super().__init__(device, group)
        # Collective operations stay outside of graphs.
        self.captures = self.device.type == "cuda" and group.size == 1
        self._keys = torch.zeros(KEYS, dtype=torch.int32, device=self.device)
        self._slots: dict[int, int] = {}
        self._steps: dict[int, tuple[int, int]] = {}
        self.rules = {"niti": NitiRules, "wage": WageRules, "dfp": dfp.Rules}

    # Launching ------------------------------------------------------------------------------------------------

    def scalar(self, value: int) -> torch.Tensor:
        """A host integer (or a scalar tensor, unchanged) in device memory."""
        if isinstance(value, torch.Tensor):
            return value
        return torch.full((), value, dtype=torch.int32, device=self.device)

    def key(self, draw: Draw) -> torch.Tensor:
        """The key of a stream in device memory, one place per stream so that captured steps can be repeated."""
        slot = self._slots.setdefault(draw.stream, len(self._slots))
        if self._steps.get(draw.stream) != (draw.seed, draw.step):
            self._steps[draw.stream] = draw.seed, draw.step
            self._keys[slot] = signed_word(draw.key)
        return self._keys[slot]

    def set_keys(self, seed: int, step: int) -> None:
        """Write the keys of a step for all streams that were used so far, in one copy."""
        values = [signed_word(Draw(seed, step, stream).key) for stream in self._slots]
        self._keys[: len(values)].copy_(torch.tensor(values, dtype=torch.int32))
        self._steps = dict.fromkeys(self._slots, (seed, step))

    def elements(self, kernel, n: int, *arguments, **constants) -> None:
        """Launch a kernel over n elements."""
        block = min(1 << 16, triton.next_power_of_2(n)) if kernels.INTERPRETED else 1024
        kernel[(triton.cdiv(n, block),)](*arguments, BLOCK=block, **constants)

    @staticmethod
    def _tiles(m: int, n: int, k: int) -> dict:
        """Tile sizes for the interpreter; on a GPU they are measured."""
        if not kernels.INTERPRETED:
            return {"STEPS": 0}
        sizes = {
            "BLOCK_M": min(128, max(16, triton.next_power_of_2(m))),
            "BLOCK_N": min(64, max(16, triton.next_power_of_2(n))),
            "BLOCK_K": min(128, max(32, triton.next_power_of_2(k))),
        }
        return sizes | {"STEPS": triton.cdiv(k, sizes["BLOCK_K"])}

    # Range ----------------------------------------------------------------------------------------------------

    def maximum_tensor(self, x: torch.Tensor, shared: bool = True) -> torch.Tensor:
        """The largest magnitude in device memory. Products carry theirs, as their kernel found it."""
        largest = getattr(x, "largest", None)
        if largest is None:
            dtype = torch.int64 if x.dtype == torch.int64 else torch.int32
            largest = torch.zeros((), dtype=dtype, device=x.device)
            if x.numel():
                x = x.contiguous()
                self.elements(kernels.largest, x.numel(), x, largest, x.numel())
        return self.group.maximum_(largest.clone()) if shared and self.group.size > 1 else largest

    def maximum(self, x, shared: bool = True) -> int:
        return int(self.maximum_tensor(x, shared))

    def round_to(self, rounding, x, maximum: int, shift: int, bits: int, draw: Draw | None = None):
        x = x.contiguous()
        out = torch.empty_like(x, dtype=storage(bits))
        limit = (1 << (bits - 1)) - 1
        if shift > 40:  # sums travel in at most 62 bits; beyond the kernels' range only the fallback is exact
            return super().round_to(rounding, x, maximum, shift, bits, draw)
        key = self._keys[-1] if draw is None else self.key(draw)
        first = 0 if draw is None else draw.first
        self.elements(
            kernels.shift_round, x.numel(), x, out, key, x.numel(), first, shift, LIMIT=limit, RULE=rounding.code
        )
        return out

    # Products -------------------------------------------------------------------------------------------------

    def _int8(self, a, b):
        (m, k), n = a.shape, b.shape[1]
        c = torch.empty((m, n), dtype=torch.int32, device=a.device)
        c.largest = torch.zeros((), dtype=torch.int32, device=a.device)
        kernels.matmul[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), triton.cdiv(n, meta["BLOCK_N"]))](
            a, b, c, c.largest, m, n, k, *a.stride(), *b.stride(), **self._tiles(m, n, k)
        )
        return c

    def _convolve(self, x, w, shape, stride, padding, transposed):
        n, height, width, ci = x.shape
        co, kernel = w.shape[:2]
        ho, wo = shape
        m = n * ho * wo
        y = torch.empty((n, ho, wo, co), dtype=torch.int32, device=x.device)
        y.largest = torch.zeros((), dtype=torch.int32, device=x.device)
        kernels.convolve[lambda meta: (triton.cdiv(m, meta["BLOCK_M"]), triton.cdiv(co, meta["BLOCK_N"]))](
            x.contiguous(), w.contiguous(), y, y.largest, m, height, width, ci, ho, wo, co, kernel, stride, padding,
            TRANSPOSED=transposed, **self._tiles(m, co, kernel * kernel * ci),
        )  # fmt: skip
        return y

    def conv2d(self, x, w, stride: int = 1, padding: int = 0, limit_w: int = 127):
        if x.dtype != torch.int8 or not _fits(w[0].numel(), 127 * limit_w):
            return super().conv2d(x, w, stride, padding, limit_w)
        shape = conv2d_shape(x.shape[1], x.shape[2], w.shape[1], stride, padding)
        return self._convolve(x, w, shape, stride, padding, False)

    def conv2d_error(
        self, e, w, input_shape, stride: int = 1, padding: int = 0, limit_e: int = 127, limit_w: int = 127
    ):
        if e.dtype != torch.int8 or not _fits(w.shape[0] * w.shape[1] ** 2, limit_e * limit_w):
            return super().conv2d_error(e, w, input_shape, stride, padding, limit_e, limit_w)
        return self._convolve(e, w.permute(3, 1, 2, 0), input_shape, stride, padding, True)

    def conv2d_gradient(self, e, x, kernel: int, stride: int = 1, padding: int = 0, limit_e: int = 127):
        if e.dtype != torch.int8:
            return super().conv2d_gradient(e, x, kernel, stride, padding, limit_e)
        n, ho, wo, co = e.shape
        height, width, ci = x.shape[1:]
        pixels, depth = n * ho * wo, kernel * kernel * ci
        # Enough programs to fill a device, long enough parts to pay for their atomic additions.
        part = min(SAFE_PRODUCTS // 1024 * 1024, max(1024, triton.cdiv(pixels, 64 * 1024) * 1024))
        wide = pixels * self.group.size * limit_e * 127 > 2**31 - 1
        out = torch.zeros((co, kernel, kernel, ci), dtype=torch.int64 if wide else torch.int32, device=e.device)
        parts = triton.cdiv(pixels, part)

        def grid(meta):
            return triton.cdiv(co, meta["BLOCK_M"]), triton.cdiv(depth, meta["BLOCK_N"]), parts

        kernels.convolve_gradient[grid](
            e.contiguous(), x.contiguous(), out, pixels, height, width, ci, ho, wo, co, kernel, stride, padding, part,
            **self._tiles(co, depth, min(part, pixels)),
        )  # fmt: skip
        return self.group.sum_(out)

    # Layers without parameters ----------------------------------------------------------------------------------

    def relu_error(self, e, x):
        e, x = e.contiguous(), x.contiguous()
        out = torch.empty_like(e)
        self.elements(kernels.relu_error, e.numel(), e, x, out, e.numel())
        return out

    def max_pool(self, x, size: int):
        n, height, width, c = x.shape
        y = torch.empty((n, height // size, width // size, c), dtype=x.dtype, device=x.device)
        choice = torch.empty_like(y, dtype=torch.uint8)
        shape = height // size, width // size, c
        self.elements(kernels.max_pool, y.numel(), x.contiguous(), y, choice, y.numel(), *shape, SIZE=size)
        return y, choice

    def max_pool_error(self, e, choice, size: int):
        n, h, w, c = e.shape
        out = torch.empty((n, h * size, w * size, c), dtype=e.dtype, device=e.device)
        self.elements(kernels.max_pool_error, e.numel(), e.contiguous(), choice, out, e.numel(), h, w, c, SIZE=size)
        return out


class NitiRules:
    """The arithmetic of `golden.niti`; exponents after the first product are scalar tensors."""

    def __init__(self, ops: GpuOps):
        self.ops = ops

    def requantize(self, acc, exponent, rounding: Rounding, minimum_shift: int = 1):
        acc_maximum, n = self.ops.maximum_tensor(acc), acc.numel()
        out, out_exponent = torch.empty_like(acc, dtype=torch.int8), torch.empty_like(acc_maximum, dtype=torch.int32)
        self.ops.elements(
            kernels.niti_requantize, n, acc.contiguous(), out, acc_maximum, self.ops.scalar(exponent), out_exponent, n,
            minimum_shift, RULE=rounding.code,
        )  # fmt: skip
        return out, out_exponent

    def loss_gradient(self, logits, exponent, labels):
        out = torch.empty_like(logits, dtype=torch.int8)
        rows, classes = logits.shape
        kernels.niti_loss[(rows,)](
            logits.contiguous(), self.ops.scalar(exponent), labels, out, classes,
            SMALLEST=SMALLEST_EXPONENT, LARGEST=LARGEST_EXPONENT, TAYLOR=TAYLOR_EXPONENT, LOG2_E=LOG2_E,
            OCTAVES=OCTAVES, BITS=PROBABILITY_BITS, SHIFT=LOSS_SHIFT, BLOCK=triton.next_power_of_2(classes),
        )  # fmt: skip
        return out

    def weight_gradient(self, acc, bits: int, width: int = 8):
        maximum, n = self.ops.maximum_tensor(acc, shared=False), acc.numel()
        out = torch.empty_like(acc, dtype=storage(width))
        limit = (1 << (width - 1)) - 1
        self.ops.elements(kernels.niti_weight_gradient, n, acc.contiguous(), out, maximum, n, bits, LIMIT=limit)
        return out

    def update(self, w, g, width: int = 8):
        out = torch.empty_like(w)
        self.ops.elements(kernels.subtract, w.numel(), w, g, out, w.numel(), LIMIT=(1 << (width - 1)) - 1)
        return out

    def narrow(self, master):
        return self.ops.round_to(Rounding.PSEUDO_STOCHASTIC, master, 1 << 15, 8, 8)


class WageRules:
    """The arithmetic of `golden.wage`. A weight step is computed where it is subtracted."""

    def __init__(self, ops: GpuOps):
        self.ops = ops

    def ternarize(self, master, widths: Widths = WIDTHS):
        return self.ops.round_to(Rounding.HALF_EVEN, master, 1 << 15, widths.gradient - widths.weight, widths.weight)

    def quantize_activation(self, acc, shift: int, bits: int = 8):
        acc = acc.contiguous()
        out, blocked = torch.empty_like(acc, dtype=torch.int8), torch.empty_like(acc, dtype=torch.bool)
        limit = (1 << (bits - 1)) - 1
        n = acc.numel()
        self.ops.elements(kernels.wage_activation, n, acc, out, blocked, n, SHIFT=shift, LIMIT=limit)
        return out, blocked

    def label_error(self, logits, exponent: int, labels):
        out = torch.empty_like(logits)
        n, classes = logits.numel(), logits.shape[1]
        self.ops.elements(kernels.label_error, n, logits.contiguous(), labels, out, n, classes, ONE=1 << -exponent)
        return out

    def quantize_error(self, raw, bits: int = 8):
        maximum, n = self.ops.maximum_tensor(raw), raw.numel()
        out = torch.empty_like(raw, dtype=storage(bits))
        self.ops.elements(kernels.wage_error, n, raw.contiguous(), out, maximum, n, BITS=bits)
        return out, None

    def weight_step(self, acc, log2_rate: int, draw: Draw):
        return acc, log2_rate, draw

    def update(self, master, step, limit: int = MASTER_LIMIT):
        acc, log2_rate, draw = step
        maximum, n = self.ops.maximum_tensor(acc, shared=False), acc.numel()
        out = torch.empty_like(master)
        self.ops.elements(
            kernels.wage_step, n, acc.contiguous(), master, out, maximum, self.ops.key(draw), n, log2_rate, LIMIT=limit
        )
        return out
