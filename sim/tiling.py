"""Cuts products into blocks that fit the core's buffers, and writes their descriptors.

A block is a band of pixels (whole images, or rows of one image) times a set of channels. All addresses in a block
are affine in its loops, so a block is one descriptor.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from golden.ops import SAFE_PRODUCTS
from hw.config import CoreConfig
from hw.descriptor import Mode

from .layout import PixelTensor, WeightTensor, ceil_div
from .program import CompileError

__all__ = ["Geometry", "Band", "ProductBlock", "forward", "error", "gradient"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """A convolution as the array sees it.

    A folded layer has ``kw`` = 1, ``ci`` = kernel width * channels and ``w`` = its output columns; ``channels``,
    ``kernel`` and ``image_w`` keep the layer's own numbers. A linear layer is a convolution whose kernel covers the
    image.
    """

    name: str
    n: int
    h: int
    w: int
    ci: int
    co: int
    kh: int
    kw: int
    ho: int
    wo: int
    stride: int = 1
    pad: int = 0
    folded: bool = False
    channels: int = 0
    kernel: int = 0
    image_w: int = 0

    @property
    def column_stride(self) -> int:
        return 1 if self.folded else self.stride

    @property
    def column_pad(self) -> int:
        return 0 if self.folded else self.pad

    @property
    def covers_image(self) -> bool:
        return self.ho == self.wo == 1 and self.pad == 0 and (self.kh, self.kw) == (self.h, self.w)

    @property
    def macs(self) -> int:
        """Useful multiply-accumulates of one pass (contract section 8)."""
        return self.n * self.ho * self.wo * self.kh * self.kw * self.ci * self.co

    def input_rows(self, band: Band) -> tuple[int, int]:
        """Input rows to load for a band of output rows: those it touches, or whole images if it has several."""
        first = band.r0 * self.stride - self.pad
        last = (band.r0 + band.rows - 1) * self.stride - self.pad + self.kh
        return (max(0, first), min(self.h, last)) if band.n == 1 else (0, self.h)


@dataclasses.dataclass(frozen=True)
class Band:
    """Images ``n0 .. n0 + n`` and, if they are cut, rows ``r0 .. r0 + rows`` of one of them."""

    n0: int
    n: int
    r0: int
    rows: int


@dataclasses.dataclass(frozen=True)
class ProductBlock:
    """Sections of one PRODUCT descriptor and the images it reads and writes (for dependencies)."""

    sections: dict
    band: Band


@dataclasses.dataclass(frozen=True)
class Operand:
    """A loaded band: where its vectors lie in the operand buffer. Distances are in vectors."""

    load: dict
    start: int
    image: int
    row: int
    column: int
    plane: int
    first_row: int
    rows: int
    lines: int


def cut(n: int, rows: int, columns: int, entries: int, lines, capacity: int) -> list[Band]:
    """Cut ``n`` images of ``rows x columns`` pixels into bands of at most ``entries`` pixels whose operands take at
    most ``capacity`` lines; ``lines(band)`` tells how many a band takes. Empty if not even one row fits."""
    def fits(band):
        return band.n * band.rows * columns <= entries and lines(band) <= capacity

    for count in range(1, n + 1):
        size = ceil_div(n, count)
        if ceil_div(n, size) != count:
            continue
        result = [Band(k, min(size, n - k), 0, rows) for k in range(0, n, size)]
        if all(map(fits, result)):
            return result
    for count in range(2, rows + 1):
        size = ceil_div(rows, count)
        result = [Band(k, 1, r, min(size, rows - r)) for k in range(n) for r in range(0, rows, size)]
        if all(map(fits, result)):
            return result
    return []


def operand_lines(config: CoreConfig, h: int, w: int, band: Band, r0: int, r1: int) -> int:
    """Lines of one plane that hold rows ``r0 .. r1`` of the band's images."""
    first = (band.n0 * h + r0) * w
    vectors = band.n * h * w if r1 - r0 == h else (r1 - r0) * w
    per_line = config.vectors_per_line
    return ceil_div(first % per_line + vectors, per_line)


def load_pixels(config: CoreConfig, address: int, tensor: PixelTensor, band: Band, r0: int, r1: int, plane0: int,
                planes: int) -> Operand:
    """Rows ``r0 .. r1`` of the band's images, ``planes`` planes from ``plane0``, of a blocked int8 tensor."""
    _, h, w, _ = tensor.shape
    first = (band.n0 * h + r0) * w
    lines, per_line = operand_lines(config, h, w, band, r0, r1), config.vectors_per_line
    skip = first % per_line
    load = {"enable": 1, "address": address + plane0 * tensor.plane_bytes + (first - skip) * tensor.vector,
            "tiles": planes, "tile_stride": tensor.plane_bytes, "runs": 1, "lines": lines}
    return Operand(load, skip, h * w, w, 1, per_line * lines, r0, r1 - r0, planes * lines)


def load_folded(address: int, g: Geometry, config: CoreConfig, band: Band, r0: int, r1: int) -> Operand:
    """Rows ``r0 .. r1`` of the band's raw images, expanded while loading; the planes of a position are neighbours."""
    slices = ceil_div(g.ci, config.vector)
    row_bytes = g.image_w * g.channels
    rows = band.n * g.h if r1 - r0 == g.h else r1 - r0
    first = (band.n0 * g.h + r0) * row_bytes
    skip = first % config.line_bytes
    load = {"enable": 1, "address": address + first - skip, "tiles": 1, "runs": 1,
            "lines": ceil_div(skip + rows * row_bytes, config.line_bytes),
            "fold": 1, "fold_slices": slices, "fold_skip": skip, "fold_kernel_bytes": g.ci,
            "fold_step_bytes": g.stride * g.channels, "fold_pad_bytes": g.pad * g.channels,
            "fold_row_bytes": row_bytes, "fold_columns": g.w, "fold_rows": rows}
    return Operand(load, 0, g.h * g.w * slices, g.w * slices, slices, 1, r0, r1 - r0,
                   ceil_div(rows * g.w * slices, config.vectors_per_line))


class Tiler:
    """Shared numbers of one layer's three passes on one core."""

    def __init__(self, config: CoreConfig, g: Geometry):
        self.config, self.g = config, g
        self.rows, self.columns, self.vector = config.rows, config.columns, config.vector
        self.ci_planes = ceil_div(g.ci, self.vector)
        self.co_planes = ceil_div(g.co, self.vector)

    def slices(self, channels: int, edge: int) -> list[int]:
        """Planes in which slice ``s`` of ``edge`` channels holds any channel, for each s of a vector."""
        total, per_plane = ceil_div(channels, edge), self.vector // edge
        return [ceil_div(total - s, per_plane) for s in range(min(total, per_plane))]

    def inputs(self, address: int, tensor, band: Band, r0: int, r1: int, plane0: int, planes: int) -> Operand:
        if self.g.folded:
            return load_folded(address, self.g, self.config, band, r0, r1)
        return load_pixels(self.config, address, tensor, band, r0, r1, plane0, planes)

    def input_lines(self, band: Band) -> int:
        """Lines of the input rows that the band's output rows touch: per plane, or all planes if folded."""
        r0, r1 = self.g.input_rows(band)
        if self.g.folded:
            rows = band.n * self.g.h if r1 - r0 == self.g.h else r1 - r0
            return ceil_div(rows * self.g.w * self.ci_planes, self.config.vectors_per_line)
        return operand_lines(self.config, self.g.h, self.g.w, band, r0, r1)

    def check_sum(self, step: str, products: int, advice: str):
        if products > SAFE_PRODUCTS:
            raise CompileError(f"layer {self.g.name}: its {step} sums {products} products, more than the "
                               f"{SAFE_PRODUCTS} that int32 holds: {advice}")

    def refuse(self, what: str):
        raise CompileError(
            f"layer {self.g.name}: one row of {what} does not fit core {self.config.name!r} "
            f"(buffer_lines = {self.config.buffer_lines}, accumulator_entries = "
            f"{self.config.accumulator_entries}): use a larger core or smaller images")



def _bands_and_planes(tiler: Tiler, n: int, rows: int, columns: int, planes: int, lines, entries: int,
                      what: str) -> tuple[list[Band], list[tuple[int, int]]]:
    """Bands, and groups of planes so that a band's planes of one group fit an operand buffer."""
    capacity = tiler.config.buffer_lines
    for groups in range(1, planes + 1):
        size = ceil_div(planes, groups)
        result = cut(n, rows, columns, entries, lambda band, size=size: size * lines(band), capacity)
        # Cutting the channels keeps whole images together as long as possible: short bands waste the array.
        if result and (groups == planes or result[0].n * result[0].rows * columns >= min(
                entries, n * rows * columns, 4 * tiler.rows)):
            return result, [(p, min(size, planes - p)) for p in range(0, planes, size)]
    tiler.refuse(what)


def forward(config: CoreConfig, g: Geometry, x: int, x_tensor, w: int, w_tensor: WeightTensor, y: int,
            y_tensor: PixelTensor, range_register: int) -> Iterator[ProductBlock]:
    """Blocks of ``y[n,ho,wo,co] = sum x[n,h,w,ci] w[co,kh,kw,ci]`` as int32."""
    t = Tiler(config, g)
    t.check_sum("forward pass", g.kh * g.kw * g.ci, "use fewer input channels")
    lines = t.input_lines
    if g.folded:
        band_list = cut(g.n, g.ho, g.wo, config.accumulator_entries, lines, config.buffer_lines)
        groups = [(0, t.ci_planes)]
        if not band_list:
            t.refuse("its input")
    else:
        band_list, groups = _bands_and_planes(t, g.n, g.ho, g.wo, t.ci_planes, lines, config.accumulator_entries,
                                              "its input")
    left = t.vector // t.rows
    left_slices, right_slices = t.slices(g.ci, t.rows), t.slices(g.co, t.columns)
    parts = [(group, sub) for group in groups for sub in range(len(left_slices)) if left_slices[sub] > group[0]]
    co_stride, kh_stride, kw_stride, ci_stride = w_tensor.strides
    first_range = True
    for band in band_list:
        pixels = band.n * band.rows * g.wo
        loaded = None
        most = t.co_planes if len(parts) == 1 else config.accumulator_entries // pixels
        for right, planes in enumerate(right_slices):
            for plane0 in range(0, planes, most):
                count = min(most, planes - plane0)
                for k, ((group0, group), sub) in enumerate(parts):
                    r0, r1 = g.input_rows(band)
                    operand = t.inputs(x, x_tensor, band, r0, r1, group0, group)
                    ci_count = min(left_slices[sub] - group0, group)
                    row = band.r0 * g.stride - g.pad - r0
                    feed = {
                        "mode": Mode.FORWARD, "first": k == 0, "last": k == len(parts) - 1, "reduce": 0b1110,
                        "tiles0": count, "tiles1": ci_count, "tiles2": g.kh, "tiles3": g.kw,
                        "pixels0": band.n, "pixels1": band.rows, "pixels2": g.wo,
                        "a_start": (operand.start + row * operand.row - g.column_pad * operand.column) * left + sub,
                        "a_tile1": operand.plane * left, "a_tile2": operand.row * left,
                        "a_tile3": operand.column * left,
                        "a_pixel0": operand.image * left, "a_pixel1": g.stride * operand.row * left,
                        "a_pixel2": g.column_stride * operand.column * left,
                        "row_start": row, "column_start": -g.column_pad, "row_tile2": 1, "column_tile3": 1,
                        "row_step": g.stride, "column_step": g.column_stride,
                        "rows": operand.rows, "columns": g.w,
                        "accumulator0": 0 if len(parts) == 1 else pixels,
                    }
                    weights = {"address": w + plane0 * co_stride + group0 * ci_stride + right * t.columns * t.vector
                               + sub * t.rows, "stride0": co_stride, "stride1": ci_stride, "stride2": kh_stride,
                               "stride3": kw_stride}
                    load = operand.load if loaded != (band, group0) else {"enable": 0}
                    loaded = (band, group0)
                    store = {}
                    if feed["last"]:
                        address = y + plane0 * y_tensor.plane_bytes + right * t.columns * 4
                        store = _store_pixels(address, y_tensor, band, count, 1, 0, 1, 0, g.wo)
                        store |= {"range_register": range_register, "range_clear": first_range}
                        first_range = False
                    yield ProductBlock({"load_a": load, "load_b": {}, "weights": weights, "feed": feed,
                                        "store": store}, band)


def _store_pixels(address: int, tensor: PixelTensor, band: Band, planes: int, row_step: int, row0: int,
                  column_step: int, column0: int, columns: int) -> dict:
    """Store loops for a band of int32 pixels: band rows r are rows ``r * row_step + row0`` of the tensor."""
    _, h, w, _ = tensor.shape
    size = tensor.vector_bytes
    address += ((band.n0 * h + band.r0 * row_step + row0) * w + column0) * size
    loops = {"address": address, "count0": planes, "stride0": tensor.plane_bytes}
    if row_step == column_step == 1:
        if band.rows == h or band.n == 1:
            return loops | {"count1": 1, "count2": 1, "count3": 1, "run": band.n * band.rows * w}
        raise AssertionError("partial rows of several images")
    return loops | {"count1": band.n, "stride1": h * w * size, "count2": band.rows, "stride2": row_step * w * size,
                    "count3": columns, "stride3": column_step * size, "run": 1}


def error(config: CoreConfig, g: Geometry, e: int, e_tensor: PixelTensor, w: int, w_tensor: WeightTensor, ex: int,
          ex_tensor: PixelTensor, range_register: int) -> Iterator[ProductBlock]:
    """Blocks of ``ex[n,h,w,ci] = sum e[n,ho,wo,co] w[co,kh,kw,ci]`` over the taps that reach each input pixel.

    With a stride, input pixels of one parity see the taps of one parity: one set of blocks for each.
    """
    if g.folded:
        raise AssertionError("the first layer needs no input error")
    t = Tiler(config, g)
    t.check_sum("error pass", g.kh * g.kw * g.co, "use fewer output channels")
    if g.covers_image and g.kh * g.kw > 1:
        yield from _error_linear(t, e, e_tensor, w, w_tensor, ex, ex_tensor, range_register)
        return
    first_range = True
    for row_class, column_class in itertools.product(range(g.stride), repeat=2):
        rows, columns = (len(range(c, size, g.stride)) for c, size in ((row_class, g.h), (column_class, g.w)))
        kh0, kw0 = ((c + g.pad) % g.stride for c in (row_class, column_class))
        taps_h, taps_w = len(range(kh0, g.kh, g.stride)), len(range(kw0, g.kw, g.stride))
        if not (rows and columns and taps_h and taps_w):
            continue                         # no tap reaches these pixels: their error is zero
        # Tap j of input row a (in its class) reads error row a + top - j.
        top, side = (row_class + g.pad - kh0) // g.stride, (column_class + g.pad - kw0) // g.stride

        def error_rows(band, top=top, taps_h=taps_h):
            if band.n > 1:
                return 0, g.ho
            return max(0, band.r0 + top - taps_h + 1), min(g.ho, band.r0 + band.rows + top)

        def lines(band, error_rows=error_rows):
            r0, r1 = error_rows(band)
            return operand_lines(config, g.ho, g.wo, band, r0, max(r1, r0 + 1))

        band_list, groups = _bands_and_planes(t, g.n, rows, columns, t.co_planes, lines, config.accumulator_entries,
                                              "its error")
        for block in _error_class(t, band_list, groups, columns, taps_h, taps_w, top, side, error_rows, e, e_tensor,
                                  w + kh0 * w_tensor.strides[1] + kw0 * w_tensor.strides[2], w_tensor, ex, ex_tensor,
                                  (row_class, column_class)):
            if block.sections["feed"]["last"]:
                block.sections["store"] |= {"range_register": range_register, "range_clear": first_range}
                first_range = False
            yield block


def _error_class(t: Tiler, band_list, groups, columns, taps_h, taps_w, top, side, error_rows, e, e_tensor, w,
                 w_tensor, ex, ex_tensor, parity) -> Iterator[ProductBlock]:
    g, config = t.g, t.config
    left = t.vector // t.rows
    left_slices, right_slices = t.slices(g.co, t.rows), t.slices(g.ci, t.columns)
    parts = [(group, sub) for group in groups for sub in range(len(left_slices)) if left_slices[sub] > group[0]]
    co_stride, kh_stride, kw_stride, ci_stride = w_tensor.strides
    for band in band_list:
        pixels = band.n * band.rows * columns
        most = t.ci_planes if len(parts) == 1 else config.accumulator_entries // pixels
        r0, r1 = error_rows(band)
        r1 = max(r1, r0 + 1)
        loaded = None
        for right, planes in enumerate(right_slices):
            for plane0 in range(0, planes, most):
                count = min(most, planes - plane0)
                for k, ((group0, group), sub) in enumerate(parts):
                    operand = load_pixels(config, e, e_tensor, band, r0, r1, group0, group)
                    row = band.r0 + top - r0
                    feed = {
                        "mode": Mode.ERROR, "first": k == 0, "last": k == len(parts) - 1, "reduce": 0b1110,
                        "tiles0": count, "tiles1": min(left_slices[sub] - group0, group),
                        "tiles2": taps_h, "tiles3": taps_w,
                        "pixels0": band.n, "pixels1": band.rows, "pixels2": columns,
                        "a_start": (operand.start + row * operand.row + side) * left + sub,
                        "a_tile1": operand.plane * left, "a_tile2": -operand.row * left, "a_tile3": -left,
                        "a_pixel0": operand.image * left, "a_pixel1": operand.row * left, "a_pixel2": left,
                        "row_start": row, "column_start": side, "row_tile2": -1, "column_tile3": -1,
                        "row_step": 1, "column_step": 1, "rows": operand.rows, "columns": g.wo,
                        "accumulator0": 0 if len(parts) == 1 else pixels,
                    }
                    weights = {"address": w + group0 * co_stride + plane0 * ci_stride + sub * t.rows * t.vector
                               + right * t.columns, "stride0": ci_stride, "stride1": co_stride,
                               "stride2": g.stride * kh_stride, "stride3": g.stride * kw_stride}
                    load = operand.load if loaded != group0 else {"enable": 0}
                    loaded = group0
                    store = {}
                    if feed["last"]:
                        address = ex + plane0 * ex_tensor.plane_bytes + right * t.columns * 4
                        store = _store_pixels(address, ex_tensor, band, count, g.stride, parity[0], g.stride, parity[1],
                                              columns)
                    yield ProductBlock({"load_a": load, "load_b": {}, "weights": weights, "feed": feed,
                                        "store": store}, band)


def _error_linear(t: Tiler, e, e_tensor, w, w_tensor, ex, ex_tensor, range_register) -> Iterator[ProductBlock]:
    """The kernel covers the image: each input pixel sees exactly one tap, so pixels become result tiles."""
    g, config = t.g, t.config
    left = t.vector // t.rows
    left_slices, right_slices = t.slices(g.co, t.rows), t.slices(g.ci, t.columns)
    positions = g.h * g.w
    band_list, groups = _bands_and_planes(t, g.n, 1, 1, t.co_planes,
                                          lambda band: operand_lines(config, 1, 1, band, 0, 1),
                                          config.accumulator_entries, "its error")
    parts = [(group, sub) for group in groups for sub in range(len(left_slices)) if left_slices[sub] > group[0]]
    co_stride, _, kw_stride, ci_stride = w_tensor.strides
    size = ex_tensor.vector_bytes
    first_range = True
    for band in band_list:
        # One part: all tiles share the entries. Several: every tile of a block keeps its own.
        most = positions if len(parts) == 1 else config.accumulator_entries // band.n
        loaded = None
        for right, planes in enumerate(right_slices):
            for plane0 in range(planes if len(parts) > 1 else 1):
                plane_count = planes if len(parts) == 1 else 1
                for position0 in range(0, positions, most):
                    count = min(most, positions - position0)
                    for k, ((group0, group), sub) in enumerate(parts):
                        operand = load_pixels(config, e, e_tensor, band, 0, 1, group0, group)
                        feed = {
                            "mode": Mode.ERROR, "first": k == 0, "last": k == len(parts) - 1, "reduce": 0b0100,
                            "tiles0": plane_count, "tiles1": count, "tiles3": 1,
                            "tiles2": min(left_slices[sub] - group0, group),
                            "pixels0": 1, "pixels1": 1, "pixels2": band.n,
                            "a_start": operand.start * left + sub, "a_tile2": operand.plane * left,
                            "a_pixel2": left, "rows": 1, "columns": 1,
                            "accumulator1": 0 if len(parts) == 1 else band.n,
                        }
                        weights = {"address": w + group0 * co_stride + position0 * kw_stride + plane0 * ci_stride
                                   + sub * t.rows * t.vector + right * t.columns,
                                   "stride0": ci_stride, "stride1": kw_stride, "stride2": co_stride}
                        load = operand.load if loaded != group0 else {"enable": 0}
                        loaded = group0
                        store = {}
                        if feed["last"]:
                            store = {"address": ex + plane0 * ex_tensor.plane_bytes + right * t.columns * 4
                                     + (band.n0 * positions + position0) * size,
                                     "count0": plane_count, "stride0": ex_tensor.plane_bytes,
                                     "count1": count, "stride1": size, "count2": band.n, "stride2": positions * size,
                                     "count3": 1, "run": 1,
                                     "range_register": range_register, "range_clear": first_range}
                            first_range = False
                        yield ProductBlock({"load_a": load, "load_b": {}, "weights": weights, "feed": feed,
                                            "store": store}, band)


def gradient(config: CoreConfig, g: Geometry, e: int, e_tensor: PixelTensor, x: int, x_tensor, dw: int,
             dw_tensor: WeightTensor, range_register: int) -> Iterator[ProductBlock]:
    """Blocks of ``dw[co,kh,kw,ci] = sum over pixels e[n,ho,wo,co] x[n,h,w,ci]`` as int32."""
    t = Tiler(config, g)
    t.check_sum("gradient", g.n * g.ho * g.wo, "use a smaller batch")
    left, top = t.vector // t.rows, t.vector // t.columns
    co_slices, ci_slices = t.slices(g.co, t.rows), t.slices(g.ci, t.columns)
    co_group, kh_group, kw_group, ci_group, band_list = _gradient_groups(t)
    co_stride, kh_stride, kw_stride, ci_stride = dw_tensor.strides
    first_range = True
    for sub_co, sub_ci in itertools.product(range(len(co_slices)), range(len(ci_slices))):
        for co0, ci0 in itertools.product(range(0, co_slices[sub_co], co_group), range(0, ci_slices[sub_ci], ci_group)):
            for kh0, kw0 in itertools.product(range(0, g.kh, kh_group), range(0, g.kw, kw_group)):
                counts = (min(co_group, co_slices[sub_co] - co0), min(kh_group, g.kh - kh0),
                          min(kw_group, g.kw - kw0), min(ci_group, ci_slices[sub_ci] - ci0))
                entries = [t.rows * math.prod(counts[k + 1:]) for k in range(4)]
                for k, band in enumerate(band_list):
                    errors = load_pixels(config, e, e_tensor, band, band.r0, band.r0 + band.rows, co0, counts[0])
                    r0, r1 = g.input_rows(band)
                    inputs = t.inputs(x, x_tensor, band, r0, r1, ci0, counts[3])
                    if g.folded:             # the buffer holds all planes of a position
                        inputs = dataclasses.replace(inputs, start=inputs.start + ci0)
                    row, column = band.r0 * g.stride - g.pad + kh0 - r0, kw0 - g.column_pad
                    last = k == len(band_list) - 1
                    feed = {
                        "mode": Mode.GRADIENT, "first": k == 0, "last": last, "reduce": 0,
                        **{f"tiles{level}": count for level, count in enumerate(counts)},
                        "pixels0": band.n, "pixels1": band.rows, "pixels2": g.wo,
                        "a_start": errors.start * left + sub_co, "a_tile0": errors.plane * left,
                        "a_pixel0": errors.image * left, "a_pixel1": errors.row * left, "a_pixel2": left,
                        "b_start": (inputs.start + row * inputs.row + column * inputs.column) * top + sub_ci,
                        "b_tile1": inputs.row * top, "b_tile2": inputs.column * top, "b_tile3": inputs.plane * top,
                        "b_pixel0": inputs.image * top, "b_pixel1": g.stride * inputs.row * top,
                        "b_pixel2": g.column_stride * inputs.column * top,
                        "row_start": row, "column_start": column, "row_tile1": 1, "column_tile2": 1,
                        "row_step": g.stride, "column_step": g.column_stride,
                        "rows": inputs.rows, "columns": g.w,
                        **{f"accumulator{level}": entry for level, entry in enumerate(entries)},
                    }
                    store = {}
                    if last:
                        store = {"address": dw + co0 * co_stride + kh0 * kh_stride + kw0 * kw_stride + ci0 * ci_stride
                                 + sub_co * t.rows * dw_tensor.vector * 4 + sub_ci * t.columns * 4,
                                 **{f"count{level}": count for level, count in enumerate(counts)},
                                 "stride0": co_stride, "stride1": kh_stride, "stride2": kw_stride,
                                 "stride3": ci_stride, "run": t.rows,
                                 "range_register": range_register, "range_clear": first_range}
                        first_range = False
                    yield ProductBlock({"load_a": errors.load, "load_b": inputs.load, "weights": {}, "feed": feed,
                                        "store": store}, band)


def _gradient_groups(t: Tiler) -> tuple[int, int, int, int, list[Band]]:
    """How many (co planes, kernel rows, kernel columns, ci planes) one pass over the batch computes at once, and its
    bands: the choice with the fewest lines to load whose results fit the accumulator."""
    g, config = t.g, t.config
    best = None
    co_most, ci_most = max(t.slices(g.co, t.rows)), max(t.slices(g.ci, t.columns))
    for co, ci in itertools.product(range(1, co_most + 1), range(1, ci_most + 1)):
        for kh, kw in itertools.product(range(1, g.kh + 1), range(1, g.kw + 1)):
            if co * ci * kh * kw * t.rows > config.accumulator_entries:
                continue
            if (ceil_div(co_most, ceil_div(co_most, co)), ceil_div(ci_most, ceil_div(ci_most, ci)),
                    ceil_div(g.kh, ceil_div(g.kh, kh)), ceil_div(g.kw, ceil_div(g.kw, kw))) != (co, ci, kh, kw):
                continue                     # a smaller group needs as many passes
            passes = ceil_div(co_most, co) * ceil_div(ci_most, ci) * ceil_div(g.kh, kh) * ceil_div(g.kw, kw)

            def lines(band, co=co, ci=ci):
                errors = co * operand_lines(config, g.ho, g.wo, band, band.r0, band.r0 + band.rows)
                return max(errors, t.input_lines(band) * (1 if g.folded else ci))

            # The shorter the passes over a band, the more they wait for loads: count lines and blocks.
            band_list = cut(g.n, g.ho, g.wo, 2**16 - 1, lines, config.buffer_lines)
            if not band_list:
                continue
            cost = passes * sum(co * operand_lines(config, g.ho, g.wo, b, b.r0, b.r0 + b.rows)
                                + t.input_lines(b) * (1 if g.folded else ci) + 64 for b in band_list)
            if best is None or cost < best[0]:
                best = cost, (co, kh, kw, ci, band_list)
    if best is None:
        t.refuse("its error or input")
    return best[1]
