"""How tensors lie in the core's memory: blocked by vectors (docs/core.md, "Tensors in memory").

Packing and unpacking move bytes only; they compute nothing.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

__all__ = ["PixelTensor", "WeightTensor", "ChannelTensor", "RawTensor", "ceil_div", "round_up"]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    return ceil_div(a, b) * b


@dataclasses.dataclass(frozen=True)
class _Blocked:
    """A tensor of four dimensions cut into vectors of ``vector`` channels."""

    shape: tuple[int, int, int, int]
    vector: int
    dtype: str = "int8"

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class PixelTensor(_Blocked):
    """Activations, errors and products: ``[channel tile][image][row][column][V]``, planes line aligned.

    ``shape`` is the logical ``(n, h, w, c)``.
    """

    @property
    def planes(self) -> int:
        return ceil_div(self.shape[3], self.vector)

    @property
    def pixels(self) -> int:
        """Vectors in a plane, rounded up to whole lines."""
        return round_up(math.prod(self.shape[:3]), 4)

    @property
    def vector_bytes(self) -> int:
        return self.vector * self.itemsize

    @property
    def plane_bytes(self) -> int:
        return self.pixels * self.vector_bytes

    @property
    def nbytes(self) -> int:
        return self.planes * self.plane_bytes

    def pack(self, array: np.ndarray) -> bytes:
        n, h, w, c = self.shape
        out = np.zeros((self.planes, self.pixels, self.vector), self.dtype)
        padded = np.zeros((n * h * w, self.planes * self.vector), self.dtype)
        padded[:, :c] = np.asarray(array).reshape(n * h * w, c)
        out[:, :n * h * w] = padded.reshape(-1, self.planes, self.vector).transpose(1, 0, 2)
        return out.tobytes()

    def unpack(self, raw: np.ndarray) -> np.ndarray:
        n, h, w, c = self.shape
        blocks = np.frombuffer(raw, self.dtype).reshape(self.planes, self.pixels, self.vector)
        return blocks[:, :n * h * w].transpose(1, 0, 2).reshape(n, h, w, -1)[..., :c]


@dataclasses.dataclass(frozen=True)
class WeightTensor(_Blocked):
    """Weights and their gradients: ``[co tile][kh][kw][ci tile][V co][V ci]``.

    ``shape`` is the logical ``(co, kh, kw, ci)``; a folded first layer has ``kw = 1`` and ``ci`` = kernel width
    times channels.
    """

    @property
    def co_tiles(self) -> int:
        return ceil_div(self.shape[0], self.vector)

    @property
    def ci_tiles(self) -> int:
        return ceil_div(self.shape[3], self.vector)

    @property
    def tile_bytes(self) -> int:
        return self.vector * self.vector * self.itemsize

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Bytes from one tile to the next along (co tile, kh, kw, ci tile)."""
        _, kh, kw, _ = self.shape
        return (kh * kw * self.ci_tiles * self.tile_bytes, kw * self.ci_tiles * self.tile_bytes,
                self.ci_tiles * self.tile_bytes, self.tile_bytes)

    @property
    def nbytes(self) -> int:
        return self.co_tiles * self.strides[0]

    def pack(self, array: np.ndarray) -> bytes:
        co, kh, kw, ci = self.shape
        v = self.vector
        padded = np.zeros((self.co_tiles * v, kh, kw, self.ci_tiles * v), self.dtype)
        padded[:co, :, :, :ci] = np.asarray(array).reshape(self.shape)
        return padded.reshape(self.co_tiles, v, kh, kw, self.ci_tiles, v).transpose(0, 2, 3, 4, 1, 5).tobytes()

    def unpack(self, raw: np.ndarray) -> np.ndarray:
        co, kh, kw, ci = self.shape
        v = self.vector
        blocks = np.frombuffer(raw, self.dtype).reshape(self.co_tiles, kh, kw, self.ci_tiles, v, v)
        return blocks.transpose(0, 4, 1, 2, 3, 5).reshape(self.co_tiles * v, kh, kw, -1)[:co, ..., :ci]


@dataclasses.dataclass(frozen=True)
class ChannelTensor:
    """One value per channel: ``[channel tile][rows][V]``, of which ``row`` is meant.

    With ``words`` = 2 the values have 64 bits: the signed low words in ``row``, what remains above them in the next.
    """

    channels: int
    vector: int
    dtype: str = "int32"
    rows: int = 1
    row: int = 0
    words: int = 1

    @property
    def itemsize(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def planes(self) -> int:
        return ceil_div(self.channels, self.vector)

    @property
    def vector_bytes(self) -> int:
        return self.vector * self.itemsize

    @property
    def plane_bytes(self) -> int:
        return self.rows * self.vector_bytes

    @property
    def nbytes(self) -> int:
        return round_up(self.planes * self.plane_bytes, 4 * self.vector)

    def pack(self, array: np.ndarray) -> bytes:
        out = np.zeros((self.planes, self.rows, self.vector), self.dtype)
        out[:, self.row] = np.resize(np.append(array, np.zeros(self.planes * self.vector - self.channels, self.dtype)),
                                     (self.planes, self.vector))
        return out.tobytes().ljust(self.nbytes, b"\0")

    def unpack(self, raw: np.ndarray) -> np.ndarray:
        count = self.planes * self.rows * self.vector
        blocks = np.frombuffer(raw, self.dtype, count=count).reshape(self.planes, self.rows, self.vector)
        value = blocks[:, self.row]
        if self.words == 2:
            value = value.astype(np.int64) + (blocks[:, self.row + 1].astype(np.int64) << 32)
        return value.reshape(-1)[:self.channels]


@dataclasses.dataclass(frozen=True)
class RawTensor:
    """Plain C order, padded to whole lines: images of a folded layer, labels, exponents."""

    shape: tuple[int, ...]
    line_bytes: int
    dtype: str = "int8"

    @property
    def nbytes(self) -> int:
        return round_up(math.prod(self.shape) * np.dtype(self.dtype).itemsize, self.line_bytes)

    def pack(self, array: np.ndarray) -> bytes:
        return np.ascontiguousarray(array, self.dtype).reshape(self.shape).tobytes().ljust(self.nbytes, b"\0")

    def unpack(self, raw: np.ndarray) -> np.ndarray:
        count = math.prod(self.shape)
        return np.frombuffer(raw, self.dtype, count=count).reshape(self.shape)
