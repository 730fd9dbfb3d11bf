"""`golden.ops` on torch tensors: exact integer products and layers without parameters, for a CPU.

Layouts, operand limits and result types are those of `golden.ops`. `GpuOps` (gpu/device.py) replaces the products
and the pooling by Triton kernels.
"""

from __future__ import annotations

import functools
import time

import torch
import torch.nn.functional as F

from golden.ops import EXACT_FLOAT32, SAFE_PRODUCTS, conv2d_shape
from gpu import dfp, niti, wage
from gpu.group import ALONE, Group
from gpu.rounding import Draw, round_to

EXACT_FLOAT64 = 1 << 53
_BLOCK_BYTES = 64 << 20
PRODUCTS = ("int8", "float32")


def int8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a[m][k] @ b[k][n] of int8 in torch's int8 product: int32, exact up to SAFE_PRODUCTS products."""
    return torch._int_mm(a, b)


def float32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The same in float32, in parts whose sums stay within 24 bits: exact in any order of addition."""
    a, b = a.to(torch.float32), b.to(torch.float32)
    part = EXACT_FLOAT32 // 127**2
    total = (a[:, :part] @ b[:part]).to(torch.int32)
    for start in range(part, a.shape[1], part):
        total += (a[:, start : start + part] @ b[start : start + part]).to(torch.int32)
    return total


def _is_exact(product) -> bool:
    """Whether extreme operands come out right: int8 products of CPUs without a dot-product instruction may saturate."""
    a = torch.full((32, 512), 127, dtype=torch.int8)
    b = torch.full((512, 32), 127, dtype=torch.int8)
    b[:, ::2] = -127
    return torch.equal(product(a, b).to(torch.int64), (a.double() @ b.double()).to(torch.int64))


@functools.cache
def fastest_product() -> str:
    """"int8" or "float32": the faster exact product on this CPU, measured once per process."""
    candidates = {"int8": int8_product, "float32": float32_product}
    a = torch.randint(-127, 128, (2048, 512), dtype=torch.int8)
    b = torch.randint(-127, 128, (512, 64), dtype=torch.int8)
    seconds = {}
    for name, product in candidates.items():
        try:
            if not _is_exact(product):
                continue
            product(a, b)
            seconds[name] = min(_timed(product, a, b) for _ in range(5))
        except (RuntimeError, AttributeError):  # this build of torch has no int8 product
            continue
    return min(seconds, key=seconds.get)


def _timed(function, *arguments) -> float:
    started = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - started


class Ops:
    """Layer operations of one worker. `product` is one of PRODUCTS, None measures which is faster.

    Weight gradients are summed over the workers of `group`; other results belong to the worker's images.
    """

    captures = False  # whether steps can be recorded and repeated

    def __init__(self, device="cpu", group: Group = ALONE, product: str | None = None):
        self.device = torch.device(device)
        self.group = group
        self.product = product
        self.rules = {"niti": niti.Rules, "wage": wage.Rules, "dfp": dfp.Rules}  # the methods' arithmetic

    # Moving ---------------------------------------------------------------------------------------------------

    def tensor(self, array) -> torch.Tensor:
        """A copy of a numpy array on the device."""
        return torch.tensor(array, device=self.device)

    def maximum(self, x: torch.Tensor, shared: bool = True) -> int:
        """The largest magnitude of a tensor; of all workers' parts if the tensor is `shared` among them."""
        low, high = x.aminmax() if x.numel() else (0, 0)
        largest = max(int(high), -int(low))
        return self.group.maximum(largest) if shared else largest

    def round_to(self, rounding, x, maximum: int, shift: int, bits: int, draw: Draw | None = None) -> torch.Tensor:
        return round_to(rounding, x, maximum, shift, bits, draw)

    # Products -------------------------------------------------------------------------------------------------

    def _int8(self, a, b):
        if self.product is None:
            self.product = fastest_product()
        return int8_product(a, b) if self.product == "int8" else float32_product(a, b)

    def matmul(self, a: torch.Tensor, b: torch.Tensor, limit_a: int = 127, limit_b: int = 127) -> torch.Tensor:
        """a[m][k] @ b[k][n] of integers with |a| <= limit_a and |b| <= limit_b, exact: int32 or int64."""
        products, limit = a.shape[1], limit_a * limit_b
        if a.dtype != torch.int8 or b.dtype != torch.int8:
            if products * limit > EXACT_FLOAT64:
                raise ValueError(f"{products} products of magnitude {limit} do not fit float64")
            narrow = products * limit <= 2**31 - 1
            return (a.double() @ b.double()).to(torch.int32 if narrow else torch.int64)
        if products <= SAFE_PRODUCTS:
            total = self._int8(a, b)
            return total if products * limit <= 2**31 - 1 else total.to(torch.int64)
        total = 0
        for start in range(0, products, SAFE_PRODUCTS):
            part = slice(start, start + SAFE_PRODUCTS)
            total = total + self._int8(a[:, part], b[part]).to(torch.int64)
        return total.to(torch.int32) if products * limit <= 2**31 - 1 else total

    def linear(self, x, w, limit_w: int = 127):
        return self.matmul(x, w.T, limit_b=limit_w)

    def linear_error(self, e, w, limit_e: int = 127, limit_w: int = 127):
        return self.matmul(e, w, limit_e, limit_w)

    def linear_gradient(self, e, x, limit_e: int = 127):
        return self._over_workers(self.matmul(e.T, x, limit_e), len(e), limit_e)

    def _over_workers(self, total: torch.Tensor, products: int, limit_e: int) -> torch.Tensor:
        """The sum of the workers' gradients, in 64 bits where 32 might overflow."""
        if self.group.size > 1 and (products + 1) * self.group.size * limit_e * 127 > 2**31 - 1:
            total = total.to(torch.int64)
        return self.group.sum_(total)

    def _all_columns(self, x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
        """The columns of a whole tensor, kept with it: forward and gradient pass need the same ones."""
        geometry = kernel, stride, padding
        if getattr(x, "columns", (None,))[0] != geometry:
            x.columns = geometry, self._columns(x, *geometry)
        return x.columns[1]

    def _columns(self, x: torch.Tensor, kernel: int, stride: int, padding: int) -> torch.Tensor:
        """The receptive fields of x as rows: [n * ho * wo][kh * kw * ci]."""
        if padding:
            x = F.pad(x, (0, 0, padding, padding, padding, padding))
        n, height, width, c = x.shape
        if kernel == stride == 1:
            return x.reshape(-1, c)
        ho, wo = conv2d_shape(height, width, kernel, stride, 0)
        if c < 4:
            # Rows of few channels copy slowly one receptive field at a time: fill tap by tap, as columns.
            taps = torch.empty((kernel, kernel, c, n, ho, wo), dtype=x.dtype, device=x.device)
            for i in range(kernel):
                for j in range(kernel):
                    tap = x[:, i : i + stride * ho : stride, j : j + stride * wo : stride]
                    taps[i, j] = tap[:, :ho, :wo].permute(3, 0, 1, 2)
            return taps.view(kernel * kernel * c, n * ho * wo).T
        image, row, pixel, channel = x.contiguous().stride()
        rows = x.contiguous().as_strided(
            (n, ho, wo, kernel, kernel * c), (image, stride * row, stride * pixel, row, channel)
        )
        return rows.reshape(n * ho * wo, kernel * kernel * c)

    @staticmethod
    def _blocks(images: int, bytes_per_image: int):
        """Ranges of images whose intermediate matrix stays within the block size."""
        block = max(1, min(images, _BLOCK_BYTES // bytes_per_image))
        return [slice(start, min(start + block, images)) for start in range(0, images, block)]

    def conv2d(self, x, w, stride: int = 1, padding: int = 0, limit_w: int = 127):
        n, height, width, _ = x.shape
        co, kernel = w.shape[:2]
        ho, wo = conv2d_shape(height, width, kernel, stride, padding)
        matrix = w.reshape(co, -1).T
        blocks = self._blocks(n, ho * wo * (len(matrix) + 4 * co))
        if len(blocks) == 1:
            y = self.matmul(self._all_columns(x, kernel, stride, padding), matrix, limit_b=limit_w)
        else:
            columns = (self._columns(x[block], kernel, stride, padding) for block in blocks)
            y = torch.cat([self.matmul(part, matrix, limit_b=limit_w) for part in columns])
        return y.reshape(n, ho, wo, co)

    def conv2d_error(
        self, e, w, input_shape, stride: int = 1, padding: int = 0, limit_e: int = 127, limit_w: int = 127
    ):
        n, ho, wo, co = e.shape
        kernel, ci = w.shape[1], w.shape[3]
        height, width = input_shape
        if stride == 1 and padding < kernel:
            return self._same_stride_error(e, w, height, width, padding, limit_e, limit_w)
        matrix = w.reshape(co, -1)
        parts = []
        for block in self._blocks(n, 4 * ho * wo * matrix.shape[1]):
            taps = self.matmul(e[block].reshape(-1, co), matrix, limit_e, limit_w)
            taps = taps.reshape(-1, ho, wo, kernel, kernel, ci)
            if co * kernel * kernel * limit_e * limit_w > 2**31 - 1:
                taps = taps.to(torch.int64)
            rows = max(height + 2 * padding, stride * (ho - 1) + kernel)
            columns = max(width + 2 * padding, stride * (wo - 1) + kernel)
            padded = torch.zeros((len(taps), rows, columns, ci), dtype=taps.dtype, device=taps.device)
            for i in range(kernel):
                for j in range(kernel):
                    target = padded[:, i : i + stride * ho : stride, j : j + stride * wo : stride]
                    target[:, :ho, :wo] += taps[:, :, :, i, j]
            parts.append(padded[:, padding : padding + height, padding : padding + width].contiguous())
        return torch.cat(parts)

    def _same_stride_error(self, e, w, height: int, width: int, padding: int, limit_e: int, limit_w: int):
        """The correlation of e with the weights turned by 180 degrees: one product per kernel row.

        With image rows outermost, the horizontal receptive fields of a range of rows are one matrix, so that they are
        copied once for all kernel rows.
        """
        n, ho, wo, co = e.shape
        kernel, ci = w.shape[1], w.shape[3]
        matrices = [w[:, i].flip(1).permute(1, 0, 2).reshape(kernel * co, ci) for i in range(kernel)]
        wide = co * kernel * kernel * limit_e * limit_w > 2**31 - 1
        out = torch.empty((n, height, width, ci), dtype=torch.int64 if wide else torch.int32, device=e.device)
        side = kernel - 1 - padding
        for block in self._blocks(n, width * (ho * kernel * co + 8 * height * ci)):
            rows = F.pad(e[block].permute(1, 0, 2, 3), (0, 0, side, side)).contiguous()
            row, image, pixel, _ = rows.stride()
            images = rows.shape[1]
            fields = rows.as_strided((ho, images, width, kernel * co), (row, image, pixel, 1)).contiguous()
            total = torch.zeros((height, images, width, ci), dtype=out.dtype, device=e.device)
            for i, matrix in enumerate(matrices):
                # Row y of e reaches row y + i - padding.
                first, last = max(0, padding - i), min(ho, height + padding - i)
                if first >= last:
                    continue
                part = self.matmul(fields[first:last].view(-1, kernel * co), matrix, limit_e, limit_w)
                target = total[first + i - padding : last + i - padding]
                target += part.view(target.shape)
            out[block] = total.permute(1, 0, 2, 3)
        return out

    def conv2d_gradient(self, e, x, kernel: int, stride: int = 1, padding: int = 0, limit_e: int = 127):
        n, ho, wo, co = e.shape
        taps = kernel * kernel * x.shape[3]
        safe = n * ho * wo * limit_e * 127 <= 2**31 - 1
        total = None
        blocks = self._blocks(n, ho * wo * taps)
        for block in blocks:
            if len(blocks) == 1:
                columns = self._all_columns(x, kernel, stride, padding)
            else:
                columns = self._columns(x[block], kernel, stride, padding)
            part = self.matmul(e[block].reshape(-1, co).T, columns, limit_e)
            part = part if safe else part.to(torch.int64)
            total = part if total is None else total.add_(part)
        return self._over_workers(total, n * ho * wo, limit_e).reshape(co, kernel, kernel, -1)

    # Layers without parameters ----------------------------------------------------------------------------------

    def relu(self, x):
        return x.clamp_min(0)

    def relu_error(self, e, x):
        return x.clamp(0, 1).to(e.dtype).mul_(e)

    def max_pool(self, x, size: int):
        taps = [tap.clone(memory_format=torch.contiguous_format) for tap in _taps(x, size)]
        y, choice = taps[0], torch.zeros_like(taps[0], dtype=torch.uint8)
        for k, tap in enumerate(taps[1:], 1):
            # k grows, so the latest larger tap is the largest k.
            torch.maximum(choice, (tap > y).view(torch.uint8).mul_(k), out=choice)
            torch.maximum(y, tap, out=y)
        return y, choice

    def max_pool_error(self, e, choice, size: int):
        n, h, w, c = e.shape
        x_error = torch.empty((n, h * size, w * size, c), dtype=e.dtype, device=e.device)
        for k, tap in enumerate(_taps(x_error, size)):
            # 1 where the choice is k, else 0.
            tap.copy_((choice ^ k).clamp_(max=1).bitwise_xor_(1).to(e.dtype).mul_(e))
        return x_error

    def global_sum(self, x):
        return x.sum(dim=(1, 2), dtype=torch.int32)

    def global_sum_error(self, e, height: int, width: int):
        return e[:, None, None, :].expand(len(e), height, width, e.shape[1]).contiguous()

    def require_int32(self, x, what: str):
        if x.dtype == torch.int32:
            return x
        if self.maximum(x) > 2**31 - 1:
            raise OverflowError(f"{what} exceeds 32 bits: use a smaller batch")
        return x.to(torch.int32)


def _taps(x: torch.Tensor, size: int) -> list[torch.Tensor]:
    """The size * size strided views of non-overlapping windows, in row-major window order."""
    return [x[:, i::size, j::size] for i in range(size) for j in range(size)]
