"""The tiler's blocks, executed by the block model, equal golden's convolutions."""

import numpy as np
import pytest

from golden import ops
from hw.config import PRESETS, CoreConfig
from sim import tiling
from sim.layout import PixelTensor, RawTensor, WeightTensor, ceil_div
from tests.sim.block_model import BlockModel

CORES = {
    "tiny": PRESETS["tiny"].replace(buffer_lines=64, accumulator_entries=64),
    "small": PRESETS["small"],           # lines of two vectors, as in `low`
    "square": CoreConfig(name="square", rows=8, columns=8),
    "wide": PRESETS["wide"].replace(buffer_lines=128, accumulator_entries=64),
    "tall": CoreConfig(name="tall", rows=8, columns=4, buffer_lines=128, accumulator_entries=64),
    "low": CoreConfig(name="low", rows=4, columns=8, lanes=4, buffer_lines=128, accumulator_entries=64),
}

# n, h, w, ci, co, kernel, stride, pad
SHAPES = [
    (2, 5, 6, 8, 8, 3, 1, 1),
    (3, 4, 4, 20, 12, 1, 1, 0),
    (2, 7, 7, 5, 9, 3, 2, 1),
    (1, 6, 6, 17, 3, 5, 1, 2),
    (2, 5, 5, 4, 6, 1, 2, 0),
    (9, 1, 1, 64, 10, 1, 1, 0),
    (4, 3, 3, 20, 11, 3, 1, 0),      # a linear layer on an image
    (4, 12, 7, 6, 21, 3, 2, 0),      # several images, whose last row no tap reaches
    (3, 10, 7, 6, 9, 2, 2, 0),
    (1, 12, 12, 24, 8, 3, 1, 1),     # more than one band on the smaller cores
]


def geometry(n, h, w, ci, co, kernel, stride, pad):
    ho, wo = ((size + 2 * pad - kernel) // stride + 1 for size in (h, w))
    return tiling.Geometry(name="layer", n=n, h=h, w=w, ci=ci, co=co, kh=kernel, kw=kernel, ho=ho, wo=wo,
                           stride=stride, pad=pad)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_passes_equal_golden(core, shape):
    config, g = CORES[core], geometry(*shape)
    rng = np.random.default_rng(list(shape))
    x = rng.integers(-127, 128, (g.n, g.h, g.w, g.ci)).astype(np.int8)
    w = rng.integers(-127, 128, (g.co, g.kh, g.kw, g.ci)).astype(np.int8)
    e = rng.integers(-127, 128, (g.n, g.ho, g.wo, g.co)).astype(np.int8)
    v = config.vector
    xt, et = PixelTensor(x.shape, v), PixelTensor(e.shape, v)
    wt, dwt = WeightTensor(w.shape, v), WeightTensor(w.shape, v, "int32")
    yt, ext = PixelTensor(e.shape, v, "int32"), PixelTensor(x.shape, v, "int32")
    memory, at, place = np.zeros(1 << 22, np.uint8), 4096, {}
    for name, layout, value in (("x", xt, x), ("w", wt, w), ("e", et, e), ("y", yt, None), ("ex", ext, None),
                                ("dw", dwt, None)):
        place[name] = at
        if value is not None:
            packed = layout.pack(value)
            memory[at:at + len(packed)] = np.frombuffer(packed, np.uint8)
            assert np.array_equal(layout.unpack(memory[at:at + layout.nbytes]), value)
        at += -(-layout.nbytes // 4096) * 4096 + 4096

    model = BlockModel(config, memory)
    for block in tiling.forward(config, g, place["x"], xt, place["w"], wt, place["y"], yt, 1):
        model.run(block.sections)
    expected = ops.conv2d(x, w, g.stride, g.pad)
    assert np.array_equal(yt.unpack(memory[place["y"]:][:yt.nbytes]), expected)
    assert model.scalars[1] == np.abs(expected).max()

    for block in tiling.error(config, g, place["e"], et, place["w"], wt, place["ex"], ext, 2):
        model.run(block.sections)
    expected = ops.conv2d_error(e, w, (g.h, g.w), g.stride, g.pad)
    assert np.array_equal(ext.unpack(memory[place["ex"]:][:ext.nbytes]), expected)
    assert model.scalars[2] == np.abs(expected).max()

    for block in tiling.gradient(config, g, place["e"], et, place["x"], xt, place["dw"], dwt, 3):
        model.run(block.sections)
    expected = ops.conv2d_gradient(e, x, g.kh, g.stride, g.pad)
    assert np.array_equal(dwt.unpack(memory[place["dw"]:][:dwt.nbytes]), expected)
    assert model.scalars[3] == np.abs(expected).max()


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("n, h, w, channels, co, kernel, stride, pad", [
    (3, 9, 9, 1, 6, 5, 1, 0), (2, 8, 8, 3, 9, 3, 1, 1), (2, 7, 9, 3, 4, 3, 2, 1), (1, 12, 12, 1, 5, 5, 1, 2)])
def test_folded_passes_equal_golden(core, n, h, w, channels, co, kernel, stride, pad):
    config = CORES[core]
    ho, wo = ((size + 2 * pad - kernel) // stride + 1 for size in (h, w))
    g = tiling.Geometry(name="first", n=n, h=h, w=wo, ci=kernel * channels, co=co, kh=kernel, kw=1, ho=ho, wo=wo,
                        stride=stride, pad=pad, folded=True, channels=channels, kernel=kernel, image_w=w)
    rng = np.random.default_rng([n, h, w, channels])
    x = rng.integers(-127, 128, (n, h, w, channels)).astype(np.int8)
    weights = rng.integers(-127, 128, (co, kernel, kernel, channels)).astype(np.int8)
    e = rng.integers(-127, 128, (n, ho, wo, co)).astype(np.int8)
    v = config.vector
    shape = (co, kernel, 1, kernel * channels)
    xt, et, yt = RawTensor(x.shape, config.line_bytes), PixelTensor(e.shape, v), PixelTensor(e.shape, v, "int32")
    wt, dwt = WeightTensor(shape, v), WeightTensor(shape, v, "int32")
    memory = np.zeros(1 << 20, np.uint8)
    place = {"x": 0x1000, "w": 0x10000, "e": 0x20000, "y": 0x40000, "dw": 0x80000}
    for name, layout, value in (("x", xt, x), ("w", wt, weights), ("e", et, e)):
        packed = layout.pack(value)
        memory[place[name]:place[name] + len(packed)] = np.frombuffer(packed, np.uint8)
    model = BlockModel(config, memory)
    for block in tiling.forward(config, g, place["x"], xt, place["w"], wt, place["y"], yt, 1):
        model.run(block.sections)
    assert np.array_equal(yt.unpack(memory[place["y"]:][:yt.nbytes]), ops.conv2d(x, weights, stride, pad))
    for block in tiling.gradient(config, g, place["e"], et, place["x"], xt, place["dw"], dwt, 3):
        model.run(block.sections)
    expected = ops.conv2d_gradient(e, x, kernel, stride, pad)
    assert np.array_equal(dwt.unpack(memory[place["dw"]:][:dwt.nbytes]).reshape(expected.shape), expected)


@pytest.mark.parametrize("count", [1, 5, 32])
def test_bands_cover_every_pixel_once(count):
    for rows, columns, entries in ((5, 3, 40), (16, 16, 512), (16, 16, 100)):
        seen = np.zeros((count, rows), int)
        for band in tiling.cut(count, rows, columns, entries, lambda band: 1, 1):
            assert band.n * band.rows * columns <= entries
            seen[band.n0:band.n0 + band.n, band.r0:band.r0 + band.rows] += 1
        assert (seen == 1).all()
    assert ceil_div(7, 2) == 4


def test_an_image_row_too_wide_for_the_core_is_refused():
    g = geometry(1, 4, 400, 8, 8, 3, 1, 1)
    with pytest.raises(tiling.CompileError, match="use a larger core or smaller images"):
        list(tiling.forward(CORES["tiny"], g, 0, PixelTensor((1, 4, 400, 8), 4), 0, WeightTensor((8, 3, 3, 8), 4), 0,
                            PixelTensor((1, 4, 400, 8), 4, "int32"), 1))
