"""``python -m sim products``: single product passes on the simulated core, bit for bit and in share of peak.

Every pass (forward, error, gradient of one layer) is a program of its own: the tiler's PRODUCT descriptors, then
END. All passes of a list run in one simulation, one doorbell each, and every result is compared with golden's.

**Cycles of a pass** run from the first cycle in which the product engine holds the pass's first descriptor (the
trace output leaves IDLE; the fetch of the program lies before) to the cycle in which memory takes the last beat of
the results, both included. So the first load's read latency, the filling of the array and the way of the last result
to memory all count; the acknowledgement of that write does not, nor does the interrupt.

* ``share``: useful MACs / (rows * columns * cycles). Useful are the MACs of contract section 8: padding channels and
  duplicated pixels are not.
* ``bound``: the fewest cycles this shape can take on this core and memory, see :func:`edge_bound`.
* Where the rest went, as shares of the cycles: ``edge`` (the array was fed, but rows or columns of it carried no
  useful product; below zero where an error pass skips taps outside the image, which count as useful), ``spacing``
  (tiles shorter than the array's weight exchange), ``operand`` and ``weights`` (waited for memory; the fill of the
  first load is here), ``results`` (waited for room for results), ``drain`` (change of dataflow), ``blocks`` (between
  descriptors), ``last write`` (from the last fed vector to the last result beat, and cycles in which the sequencer
  had not delivered the next descriptor). With ``useful`` (the share) they sum to 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from pathlib import Path

import numpy as np

from golden import ops
from hw.config import CoreConfig
from hw.descriptor import Opcode
from hw.feeder import Activity

from . import tiling, verilator
from .compiler import FOLD_CHANNELS
from .doorbells import generated_verilog
from .layout import PixelTensor, RawTensor, WeightTensor, ceil_div, round_up
from .program import MemoryMap, ProgramBuilder
from .session import simulate
from .shared import MemorySettings, SimulationError

__all__ = ["ALIGNED", "AWKWARD", "LISTS", "Shape", "Plan", "edge_bound", "measure", "passes"]

PASSES = ("forward", "error", "gradient")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One layer: ``n`` images of ``h x w x ci``, ``co`` filters of ``kernel x kernel``. A matrix product of m x k by
    k x n is m images of 1 x 1 x k. ``first``: the network's first layer, folded if its channels are few, without an
    error pass."""

    n: int
    h: int
    w: int
    ci: int
    co: int
    kernel: int = 1
    stride: int = 1
    pad: int = 0
    first: bool = False

    @property
    def name(self) -> str:
        text = f"{self.kernel}x{self.kernel} {self.ci}-{self.co} at {self.h}x{self.w}, batch {self.n}"
        if self.h == self.w == self.kernel == 1:
            text = f"fc {self.ci}-{self.co}, batch {self.n}"
        return (text + f", stride {self.stride}" * (self.stride > 1) + f", pad {self.pad}" * (self.pad > 0)
                + ", first layer" * self.first)

    @property
    def geometry(self) -> tiling.Geometry:
        ho, wo = ops.conv2d_shape(self.h, self.w, self.kernel, self.stride, self.pad)
        common = dict(name=self.name, n=self.n, h=self.h, co=self.co, kh=self.kernel, ho=ho, wo=wo,
                      stride=self.stride, pad=self.pad)
        if self.first and self.ci <= FOLD_CHANNELS:
            return tiling.Geometry(**common, w=wo, ci=self.kernel * self.ci, kw=1, folded=True, channels=self.ci,
                                   kernel=self.kernel, image_w=self.w)
        return tiling.Geometry(**common, w=self.w, ci=self.ci, kw=self.kernel)


def passes(shape: Shape) -> tuple[str, ...]:
    return tuple(name for name in PASSES if not (shape.first and name == "error"))


def _conv(n, size, ci, co, kernel=3, **more):
    return Shape(n, size, size, ci, co, kernel, pad=more.pop("pad", kernel // 2), **more)


ALIGNED = (
    _conv(32, 8, 64, 64), _conv(32, 16, 64, 64), _conv(32, 16, 32, 64), _conv(32, 16, 64, 64, kernel=1),
    Shape(32, 1, 1, 256, 128),
)
"""Shapes whose channels fill the array: every pass reaches 95 % of the base core's peak."""

AWKWARD = (
    Shape(17, 1, 1, 32, 31),                                     # 17x32x31 matrix
    Shape(100, 1, 1, 1, 40), Shape(64, 1, 1, 1, 1), Shape(1, 1, 1, 96, 50),  # K = 1; a single number; one row
    Shape(1, 13, 13, 1, 7, 1), Shape(5, 1, 1, 33, 65),
    _conv(4, 12, 20, 50, kernel=5, pad=0), _conv(2, 9, 16, 24, kernel=5), _conv(1, 11, 17, 3, kernel=5),
    _conv(8, 16, 16, 32, stride=2), _conv(3, 15, 20, 20, stride=2), Shape(2, 9, 12, 24, 40, 1, 2),
    Shape(4, 7, 5, 20, 36, 3, 1, 1), Shape(3, 13, 11, 10, 10, 3, 1, 0), Shape(2, 5, 17, 48, 33, 3, 2, 1),
    Shape(4, 12, 7, 6, 21, 3, 2),
    _conv(32, 28, 1, 20, kernel=5, pad=0, first=True), _conv(32, 16, 3, 32, first=True),
    Shape(2, 15, 13, 3, 18, 3, 2, 1, first=True), _conv(4, 8, 1, 16), _conv(4, 8, 3, 16), _conv(2, 8, 20, 20),
    _conv(1, 64, 32, 16), Shape(1, 40, 56, 48, 24, 3, 1, 1), Shape(32, 4, 4, 50, 500, 4),
)
"""Shapes that leave edges: each pass reaches 85 % of its edge bound."""

LISTS = {"aligned": ALIGNED, "awkward": AWKWARD}


def edge_bound(config: CoreConfig, shape: Shape, step: str, settings: MemorySettings) -> int:
    """Cycles that a pass takes at least, given the array's edges and the memory:

    * start and end: the read latency before the first operand and weights, n cycles to shift the first weight tile
      in (n = columns forward, rows in the error pass), the array's depth (latency, rows or columns) and the
      way through accumulator and ports, see ``FILL``;
    * between them the slowest of

      - the array: tiles = product of ``ceil(channels / edge)`` over both operands and the taps; each tile takes one
        cycle per pixel, and the next follows after 2 n - 1 cycles at the earliest (exchange of weight tiles; n in the
        gradient pass: one result row per cycle). A folded layer has ``kernel`` taps of ``kernel * channels`` channels.
        With a stride the error pass has stride**2 classes of pixels, each with the taps that reach it;
      - reading operands and weights once, and writing results once, whole lines, at the memory's rate;
      - folding, a byte per cycle and two cycles per image row (padding and the bytes that fill the last window
        included): every tile but the first of the last image can only follow it.
    """
    g = shape.geometry
    rows, columns, vector = config.rows, config.columns, config.vector
    co_left, ci_left = ceil_div(g.co, rows), ceil_div(g.ci, rows)
    co_top, ci_top = ceil_div(g.co, columns), ceil_div(g.ci, columns)
    pixels = g.n * g.ho * g.wo
    planes = {"ci": ceil_div(g.ci, vector), "co": ceil_div(g.co, vector)}
    x_lines = (ceil_div(g.n * g.h * g.image_w * g.channels, config.line_bytes) if g.folded
               else planes["ci"] * ceil_div(g.n * g.h * g.w, config.vectors_per_line))
    e_lines = planes["co"] * ceil_div(pixels, config.vectors_per_line)
    w_lines = planes["ci"] * planes["co"] * g.kh * g.kw * ceil_div(vector, config.vectors_per_line)

    def spaced(tiles, length, least):
        return max(0, tiles - 1) * max(length, least) + length
    if step == "forward":
        tiles = co_top * ci_left * g.kh * g.kw
        array = spaced(tiles, pixels, 2 * columns - 1)
        read, written = x_lines + w_lines, planes["co"] * pixels
    elif step == "gradient":
        tiles = co_left * ci_top * g.kh * g.kw
        array = spaced(tiles, pixels, rows)
        read, written = x_lines + e_lines, planes["co"] * planes["ci"] * g.kh * g.kw * vector
    else:
        array = reached = 0
        for row_class, column_class in itertools.product(range(g.stride), repeat=2):
            taps = math.prod(len(range((c + g.pad) % g.stride, k, g.stride))
                             for c, k in ((row_class, g.kh), (column_class, g.kw)))
            inputs = g.n * len(range(row_class, g.h, g.stride)) * len(range(column_class, g.w, g.stride))
            reached += inputs * (taps > 0)
            if g.covers_image:
                inputs, taps = g.n, g.kh * g.kw
            if taps and inputs:
                array += spaced(ci_top * co_left * taps, inputs, 2 * rows - 1)
        read, written = e_lines + w_lines, planes["ci"] * reached
    fold = 0
    if g.folded and step != "error":
        row = 2 + max((g.pad + g.image_w) * g.channels, g.ci + (g.w - 1) * g.stride * g.channels)
        fold = g.n * g.h * row + (tiles - 1) * g.ho * g.wo
    shift = {"forward": columns, "error": rows, "gradient": 0}[step]
    return settings.latency + FILL + shift + rows + columns + max(
        array, fold, ceil_div(read * config.line_bytes, read_rate(config, settings)),
        ceil_div(written * 4 * vector, write_rate(config, settings)))


FILL = 38
"""Cycles of the fixed pipeline of a pass beyond memory latency and the array's edges: 19 from the load command to its
data (one burst collected, read port, buffer), 19 from the last operand through an element's registers, output tree,
accumulator, store and write port."""


def read_rate(config: CoreConfig, settings: MemorySettings) -> int:
    """Bytes per cycle that memory can deliver to this core."""
    return min(config.beat_bytes, settings.read_rate or config.beat_bytes)


def write_rate(config: CoreConfig, settings: MemorySettings) -> int:
    return min(config.beat_bytes, settings.write_rate or config.beat_bytes)


@dataclasses.dataclass
class Pass:
    """One doorbell: its program, and where its result lies."""

    shape: Shape
    step: str
    tag: int
    address: int
    image: bytes
    result: object                   # Region
    blocks: list                     # program.Block, without END


class Plan:
    """Memory and programs for all passes of some shapes.

    ``fill`` : "random" operands drawn from ``seed``, "zero", or "extreme" (all -127, the largest sums). Without
    ``operands`` there are only the programs.
    """

    def __init__(self, config: CoreConfig, shapes, *, seed: int = 1, fill: str = "random", operands: bool = True):
        self.config, self.fill, self.operands = config, fill, operands
        self.shapes = tuple(shapes)
        self.memory = MemoryMap(config.line_bytes)
        self.writes: list[tuple[int, bytes]] = []
        self.passes: list[Pass] = []
        self.expected: dict[int, np.ndarray] = {}
        self.rng = np.random.default_rng(seed)
        for shape in self.shapes:
            self._shape(shape)
        self.memory_bytes = round_up(self.memory.next, 4096)

    def _draw(self, shape):
        if not self.operands:
            return None
        if self.fill == "random":
            return self.rng.integers(-127, 128, shape).astype(np.int8)
        return np.full(shape, {"zero": 0, "extreme": -127}[self.fill], np.int8)

    def _place(self, layout, array=None):
        region = self.memory.add(f"region {len(self.memory.regions)}", layout)
        if array is not None:
            self.writes.append((region.address, layout.pack(array)))
        return region

    def _shape(self, s: Shape):
        g, v, config = s.geometry, self.config.vector, self.config
        x_shape = s.n, s.h, s.w, s.ci
        x, w, e = (self._draw(shape) for shape in (x_shape, (s.co, s.kernel, s.kernel, s.ci), (s.n, g.ho, g.wo, s.co)))
        pixels = (g.n, g.ho, g.wo, g.co)
        weights = (g.co, g.kh, g.kw, g.ci)
        xr = self._place(RawTensor(x_shape, config.line_bytes) if g.folded else PixelTensor(x_shape, v), x)
        wr, er = self._place(WeightTensor(weights, v), w), self._place(PixelTensor(pixels, v), e)
        for step in passes(s):
            if step == "forward":
                out = self._place(PixelTensor(pixels, v, "int32"))
                blocks = tiling.forward(config, g, xr.address, xr.layout, wr.address, wr.layout, out.address,
                                        out.layout, 1)
            elif step == "error":
                out = self._place(PixelTensor(x_shape, v, "int32"))
                blocks = tiling.error(config, g, er.address, er.layout, wr.address, wr.layout, out.address,
                                      out.layout, 2)
            else:
                out = self._place(WeightTensor(weights, v, "int32"))
                blocks = tiling.gradient(config, g, er.address, er.layout, xr.address, xr.layout, out.address,
                                         out.layout, 3)
            tag = 1 + len(self.passes)
            builder = ProgramBuilder(tag)
            for block in blocks:
                builder.add(Opcode.PRODUCT, block.sections, layer=s.name, step=step)
            descriptors = list(builder.blocks)
            builder.end()
            place = self._place(RawTensor((builder.nbytes,), config.line_bytes, "uint8"))
            program = builder.finish(place.address, 1)
            self.writes.append((place.address, program.image))
            self.passes.append(Pass(s, step, tag, place.address, program.image, out, descriptors))
            if self.operands:
                self.expected[tag] = _golden(s, step, x, w, e)

    def prepare(self, memory):
        for address, data in self.writes:
            memory.write("operands and programs", address, data)

    def check(self, memory):
        """Raise if any result differs from golden's in any bit."""
        for item in self.passes:
            layout = item.result.layout
            got = layout.unpack(memory.read(item.result.address, layout.nbytes))
            expected = np.asarray(self.expected[item.tag]).reshape(got.shape)
            if not np.array_equal(got, expected):
                index = tuple(int(i) for i in np.argwhere(got != expected)[0])
                raise SimulationError(f"{item.shape.name}, {item.step}: element {list(index)} is {got[index]}, golden "
                                      f"has {expected[index]} ({(got != expected).sum()} of {got.size} differ)")


def _golden(s: Shape, step: str, x, w, e) -> np.ndarray:
    if step == "forward":
        return ops.conv2d(x, w, s.stride, s.pad)
    if step == "error":
        return ops.conv2d_error(e, w, (s.h, s.w), s.stride, s.pad)
    return ops.conv2d_gradient(e, x, s.kernel, s.stride, s.pad)


def measure(config: CoreConfig, shapes, *, out: Path, settings: MemorySettings | None = None, seed: int = 1,
            fill: str = "random", build=None, log=None) -> list[dict]:
    """Run all passes of ``shapes`` on the simulated core; one row per pass. Raises SimulationError at a wrong bit."""
    plan = Plan(config, shapes, seed=seed, fill=fill)
    settings = dataclasses.replace(settings or MemorySettings(latency=100, outstanding=64),
                                   size=max(4096, plan.memory_bytes))
    build = build or verilator.build(generated_verilog(config), log=log)
    result = simulate(build, "sim.scenario:products", {"programs": [item.address for item in plan.passes],
                                                       "window": [0, settings.size], "limit": 1 << 34},
                      out=out, settings=settings, prepare=plan.prepare, keep=plan.check)
    rows = []
    for item, (first, last) in zip(plan.passes, result.value, strict=True):
        cycles = last - first + 1
        counts = {activity.name.lower(): int(result.activity[0, item.tag][activity]) for activity in Activity}
        macs = item.shape.geometry.macs
        ideal = macs / (config.rows * config.columns)
        bound = edge_bound(config, item.shape, item.step, settings)
        fed = sum(counts.values()) - counts["idle"]
        rest = {"useful": ideal, "edge": counts["busy"] - ideal, "spacing": counts["spacing"],
                "operand": counts["operand"], "weights": counts["weights"], "results": counts["results"],
                "drain": counts["drain"], "blocks": counts["dependency"], "last write": cycles - fed}
        rows.append({"shape": item.shape.name, "pass": item.step, "macs": macs, "cycles": cycles,
                     "share": ideal / cycles, "bound": bound, "share_of_bound": bound / cycles, "fed": fed,
                     "where": {name: value / cycles for name, value in rest.items()}})
    return rows


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--list", choices=[*LISTS, "all"], default="all", help="which shapes (default all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/products"))
    add_memory_arguments(parser)


def add_memory_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--read-rate", type=int, default=64, help="bytes per cycle (default 64)")
    parser.add_argument("--write-rate", type=int, default=64, help="bytes per cycle (default 64)")
    parser.add_argument("--latency", type=int, default=100, help="memory latency in cycles (default 100)")


def memory_settings(options) -> MemorySettings:
    return MemorySettings(latency=options.latency, read_rate=options.read_rate, write_rate=options.write_rate,
                          outstanding=64)


def table(rows: list[dict], config: CoreConfig) -> str:
    lines = [f"{'shape':44} {'pass':8} {'cycles':>9} {'estimate':>9} {'share':>7} {'of bound':>8}  "
             "where the rest went (%)"]
    for row in rows:
        rest = ", ".join(f"{name} {100 * value:.1f}" for name, value in row["where"].items()
                         if name != "useful" and abs(value) >= 0.0005)
        lines.append(f"{row['shape'][:44]:44} {row['pass']:8} {row['cycles']:9} {row.get('estimate', 0):9} "
                     f"{100 * row['share']:6.1f}% {100 * row['share_of_bound']:7.1f}%  {rest}")
    return "\n".join(lines)


def main(options, config: CoreConfig, log) -> int:
    from .estimate import estimate_passes

    settings = memory_settings(options)
    names = LISTS if options.list == "all" else [options.list]
    started, lines, failed = time.monotonic(), {}, []
    for name in names:
        rows = measure(config, LISTS[name], out=options.out, settings=settings, seed=options.seed, log=log)
        for row, cycles in zip(rows, estimate_passes(config, LISTS[name], settings), strict=True):
            row["estimate"] = cycles
        lines[name] = rows
        print(f"{name} shapes on core {config.name}, every result equal to golden's; memory {settings.read_rate} and "
              f"{settings.write_rate} bytes per cycle, latency {settings.latency}")
        print(table(rows, config))
        key, least = {"aligned": ("share", 0.95), "awkward": ("share_of_bound", 0.85)}[name]
        failed += [f"{row['shape']}, {row['pass']}: {100 * row[key]:.1f} % of "
                   f"{'peak' if name == 'aligned' else 'its edge bound'}, below {100 * least:.0f} %"
                   for row in rows if row[key] < least]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "products.json").write_text(json.dumps(
        {"core": config.name, "configuration": dataclasses.asdict(config), "memory": dataclasses.asdict(settings),
         "seconds": time.monotonic() - started, "lists": lines}, indent=1) + "\n")
    print("\n".join(failed) or "all goals reached")
    # The goals are set for this core and memory; elsewhere the figures are only shown.
    reference = config.name == "base" and min(settings.read_rate, settings.write_rate) >= 64 and settings.latency <= 100
    return 1 if failed and reference else 0
