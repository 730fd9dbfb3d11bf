"""Batch norm of dynamic fixed point (`golden.dfp.batch_norm`) as passes of the wide lanes, one plane at a time.

A table per layer holds what the backward pass needs of each channel. Statistics stay in lane registers between the
passes over a plane, so a plane's passes follow each other.
"""

from __future__ import annotations

from golden.dfp import (
    EPSILON_EXPONENT,
    NORMALISED_FRACTION,
    RUNNING_EXPONENTS,
    RUNNING_SHIFT,
    Sgd,
)
from golden.networks import BatchNorm, Conv2d, Linear
from golden.random import Purpose
from hw import scalar
from hw.microprogram import Lane, Scalar
from hw.microprogram import WideOperation as Wide
from hw.scalar import Operation as Op

from . import microprograms
from .layout import ChannelTensor
from .microprograms import A, B, X, Y, Z
from .program import CompileError, Region

__all__ = ["allocate", "forward", "backward"]

ROWS = 6                     # of the table: the next six, in this order
C, SUM, RECIPROCAL, HALF, SHIFT, GAMMA = range(6, 12)
BETA_SUM, GAMMA_SUM, GAMMA_HIGH, SPARE = 12, 13, 14, 15
BETA, SQUARES, VARIANCE = BETA_SUM, GAMMA_SUM, GAMMA_HIGH
CHAIN = (SUM, RECIPROCAL, HALF, BETA_SUM, GAMMA_SUM, GAMMA_HIGH)
PRECISION = 31               # of the reciprocal

# Scalar registers that the programs read; between these passes the alignment of other tensors uses them.
COUNT, EPSILON, MEAN_LEFT, MEAN_RIGHT = "low", "high", "item", "grid"
VARIANCE_LEFT, VARIANCE_RIGHT, BETA_SHIFT, BASE = "present", "never", "distance0", "always"


def allocate(compiler, layer: BatchNorm):
    """State and table."""
    channels, v = layer.output_shape[-1], compiler.config.vector
    for part, dtype in (("gamma", "int16"), ("gamma_momentum", "int16"), ("beta", "int16"), ("beta_momentum", "int16"),
                        ("mean", "int32"), ("variance", "int32")):
        name = f"{layer.name}.{part}"
        region = compiler._region(name, ChannelTensor(channels, v, dtype))
        compiler.state_regions[name] = region
        compiler.tensors[name] = compiler.tensor(region, (channels,))
        if dtype == "int32":
            compiler.scalars[f"{name}.exponent"] = compiler.registers[f"{part}.exponent"]
    for part in ("gamma", "beta"):
        compiler._new_slot(f"{layer.name}.{part}", f"{layer.name}.{part}_momentum")
    compiler._region(f"{layer.name}.table", ChannelTensor(channels, v, rows=ROWS))


class _Passes:
    """What forward and backward share: places of a layer's tensors, plane by plane."""

    def __init__(self, compiler, layer: BatchNorm, x: Region):
        self.compiler, self.layer, self.name, self.x = compiler, layer, layer.name, x
        self.registers = compiler.registers
        self.n, self.h, self.w, self.channels = x.layout.shape
        self.count = self.n * self.h * self.w
        if self.count > 1 << 17:
            raise CompileError(f"{self.name} sums {self.count} elements per channel: use a batch of "
                               f"{(1 << 17) // (self.h * self.w)} or less")
        self.table = compiler.memory.regions[f"{layer.name}.table"]
        self.state = {part: compiler.state_regions[f"{layer.name}.{part}"]
                      for part in ("gamma", "gamma_momentum", "beta", "beta_momentum", "mean", "variance")}

    def number(self, name: str) -> int:
        return self.registers[name]

    def named(self, name: str) -> Scalar:
        return Scalar(self.registers[name])

    def scalars(self, program, step: str):
        self.compiler._scalar(program, self.name, step)

    def run(self, program, loops, step: str, reads=(), writes=(), **fields):
        self.compiler._wide(program, loops, self.name, step, [region.name for region in reads],
                            [region.name for region in writes], **fields)

    def pixels(self, region: Region, plane: int):
        """(loops, stream) over the vectors of a plane."""
        layout = region.layout
        return (self.n, self.h * self.w), (
            region.address + plane * layout.plane_bytes, (self.h * self.w * layout.vector_bytes, layout.vector_bytes),
            layout.itemsize)

    @staticmethod
    def channel(region: Region, plane: int):
        """The one vector of a plane."""
        layout = region.layout
        return region.address + plane * layout.plane_bytes, (), layout.itemsize

    def rows(self, plane: int, first: int = 0):
        """Vectors of the table from a row on, by one loop."""
        layout = self.table.layout
        return self.table.address + plane * layout.plane_bytes + first * layout.vector_bytes, (layout.vector_bytes,), 4

    def normalise(self) -> list[tuple]:
        """Register A = (x - mean) / deviation, with x in register X."""
        return [(Wide.MUL, A, X, self.named(COUNT)), *self.normalise_centred()]

    @staticmethod
    def normalise_centred() -> list[tuple]:
        return [(Wide.SUB, A, A, Lane(SUM)), (Wide.MUL, A, A, Lane(RECIPROCAL)), (Wide.ROUND, A, A, Lane(SHIFT)),
                (Wide.CLIP, A, A, microprograms.STATE_CODE)]

    @staticmethod
    def shift() -> list[tuple]:
        """What the normalised product is shifted by."""
        return [(Wide.MOVE, SHIFT, NORMALISED_FRACTION - PRECISION), (Wide.SUB, SHIFT, SHIFT, Lane(HALF))]

    def inverse_sqrt(self) -> list[tuple]:
        """RECIPROCAL and HALF of the variance in register A (`golden.dfp.inverse_sqrt`)."""
        return [(Wide.BIT_LENGTH, B, A), (Wide.ADD, B, B, 1), (Wide.SHIFT, B, B, -1), (Wide.SUB, HALF, B, 16),
                (Wide.MOVE, B, 0), (Wide.SUB, B, B, Lane(HALF)), (Wide.SHIFT, B, B, 1), (Wide.SHIFT, A, A, Lane(B)),
                (Wide.SQRT, A, A), (Wide.MOVE, B, 1), (Wide.SHIFT, B, B, PRECISION),
                (Wide.DIVIDE, RECIPROCAL, B, Lane(A)), (Wide.MIN, RECIPROCAL, RECIPROCAL, 65535), *self.shift()]

    def affine(self) -> list[tuple]:
        """GAMMA and BETA from registers X and Y."""
        return [(Wide.MOVE, GAMMA, Lane(X)), (Wide.ROUND, BETA, Y, self.named(BETA_SHIFT))]

    def set_count(self) -> list[tuple]:
        return [(Op.SET, self.registers[COUNT], self.count)]


def _beta_scalars(p: _Passes) -> list[tuple]:
    """beta's distance to the exponent of the result. gamma's exponent was fetched as the weight's, beta's as the
    momentum's.
    """
    r = p.registers
    shift = r[BETA_SHIFT]
    return [(Op.SUB, shift, r["momentum.exponent"], r["weight.exponent"]),
            (Op.ADDI, shift, shift, NORMALISED_FRACTION), (Op.SET, r["amount"], 31),
            (Op.MIN, shift, shift, r["amount"])]


def _statistics_scalars(p: _Passes, exponent: int) -> list[tuple]:
    """Shifts of epsilon and of the running statistics, from the input's exponent."""
    r = p.registers
    limit, both = r["amount"], r["shift"]
    program = [*p.set_count(), (Op.ADD, both, exponent, exponent), (Op.SET, r[EPSILON], EPSILON_EXPONENT),
               (Op.SUB, r[EPSILON], r[EPSILON], both), (Op.SET, limit, 26), (Op.MIN, r[EPSILON], r[EPSILON], limit)]
    for source, offset, left, right in ((exponent, RUNNING_EXPONENTS[0], MEAN_LEFT, MEAN_RIGHT),
                                        (both, RUNNING_EXPONENTS[1], VARIANCE_LEFT, VARIANCE_RIGHT)):
        left, right = r[left], r[right]
        program += [(Op.ADDI, right, source, -offset), (Op.MAX, left, right, scalar.ZERO), (Op.SET, limit, 29),
                    (Op.MIN, left, left, limit), (Op.MIN, right, right, scalar.ZERO)]
    return program


def _running(p: _Passes, quotient: list[tuple]) -> list[tuple]:
    """Write register X, the old value, moved toward the quotient in register A; register C is 2**31 - 1."""
    return [(Wide.MOVE, C, 1), (Wide.SHIFT, C, C, 31), (Wide.SUB, C, C, 1), (Wide.MIN, A, A, Lane(C)), *quotient,
            (Wide.SUB, A, A, Lane(X)), (Wide.ROUND, A, A, -RUNNING_SHIFT), (Wide.ADD, A, A, Lane(X)), (Wide.WRITE, A)]


def forward(compiler, layer: BatchNorm, source, training: bool):
    """The layer's sums; in training also the table and the running statistics."""
    name, r, step = layer.name, compiler.registers, "batch norm"
    x, exponent = compiler._quantize(source, f"{name}.activation", name, training)
    p = _Passes(compiler, layer, x)
    compiler.tensors[f"{name}.activation"] = compiler.tensor(x, x.layout.shape)
    compiler.exponent_of[name] = exponent
    y = compiler._pixels(f"{name}.output", x.layout.shape, "int32")
    relu = [(Wide.MAX, A, A, 0)] if compiler._followed_by_relu(layer) else []
    count, gamma, beta, mean, variance = (p.named(COUNT), *(p.state[k] for k in ("gamma", "beta", "mean", "variance")))
    finish = [(Wide.MUL, A, A, Lane(GAMMA)), (Wide.ADD, A, A, Lane(BETA)), (Wide.CLIP, A, A, 2), *relu,
              (Wide.WRITE, A), (Wide.RANGE, 0, A)]
    compiler._fetch(gamma.name, "weight.exponent", name)
    compiler._fetch(beta.name, "momentum.exponent", name)
    output = "output.exponent"
    p.scalars([*_beta_scalars(p), *compiler._exponent_scalars(output, ("weight.exponent", -NORMALISED_FRACTION)),
               (Op.SET, r["bits"], 0)], step)
    if training:
        p.scalars(_statistics_scalars(p, r[exponent]), step)
    else:
        p.scalars([(Op.ADDI, r[MEAN_LEFT], r[exponent], -RUNNING_EXPONENTS[0])], step)
    for plane in range(x.layout.planes):
        loops, stream = p.pixels(x, plane)
        _, target = p.pixels(y, plane)
        affine = {"source0": p.channel(gamma, plane), "source1": p.channel(beta, plane)}
        if training:
            p.run([(Wide.MOVE, SUM, 0), (Wide.MOVE, SQUARES, 0)], (1,), step, source0=p.channel(gamma, plane))
            p.run([(Wide.ADD, SUM, SUM, Lane(X)), (Wide.MUL, A, X, Lane(X)), (Wide.ADD, SQUARES, SQUARES, Lane(A))],
                  loops, step, [x], source0=stream)
            p.run([(Wide.MUL, A, SQUARES, count), (Wide.MUL, B, SUM, Lane(SUM)), (Wide.SUB, VARIANCE, A, Lane(B)),
                   (Wide.MOVE, B, count), (Wide.MUL, B, B, count), (Wide.SHIFT, B, B, p.named(EPSILON)),
                   (Wide.MAX, B, B, 1), (Wide.ADD, VARIANCE, VARIANCE, Lane(B)), (Wide.MOVE, A, Lane(VARIANCE)),
                   *p.inverse_sqrt(), *p.affine(),
                   (Wide.MOVE, A, Lane(SUM)), (Wide.MOVE, B, Lane(RECIPROCAL)), (Wide.MOVE, C, Lane(HALF))],
                  (1,), step, [gamma, beta], **affine)
            p.run([(Wide.WRITE, A), (Wide.MOVE, A, Lane(B)), (Wide.MOVE, B, Lane(C))], (3,), step, [], [p.table],
                  source0=p.channel(gamma, plane), target0=p.rows(plane))
            # Quotients truncate toward zero: of the magnitude, with the sign put back.
            negative = [(Wide.MOVE, B, 0), (Wide.SUB, B, B, Lane(SUM))]
            p.run([*negative, (Wide.MAX, A, SUM, Lane(B)), (Wide.SHIFT, A, A, p.named(MEAN_LEFT)),
                   (Wide.DIVIDE, A, A, count), (Wide.SHIFT, A, A, p.named(MEAN_RIGHT)),
                   *_running(p, [(Wide.GATE, C, A, Lane(SUM)), (Wide.GATE, A, A, Lane(B)), (Wide.SUB, A, C, Lane(A))])],
                  (1,), step, [mean], [mean], source0=p.channel(mean, plane), target0=p.channel(mean, plane))
            # V * 2**left // N**2, by quotient and remainder so that the shift does not overflow.
            left = p.named(VARIANCE_LEFT)
            p.run([(Wide.MOVE, C, count), (Wide.MUL, C, C, count), (Wide.DIVIDE, A, VARIANCE, Lane(C)),
                   (Wide.MUL, B, C, Lane(A)), (Wide.SUB, B, VARIANCE, Lane(B)), (Wide.SHIFT, A, A, left),
                   (Wide.SHIFT, B, B, left), (Wide.DIVIDE, B, B, Lane(C)), (Wide.ADD, A, A, Lane(B)),
                   (Wide.SHIFT, A, A, p.named(VARIANCE_RIGHT)), *_running(p, [])],
                  (1,), step, [variance], [variance], source0=p.channel(variance, plane),
                  target0=p.channel(variance, plane))
            normalise = p.normalise()
        else:
            epsilon, left = EPSILON_EXPONENT - RUNNING_EXPONENTS[1], RUNNING_EXPONENTS[1] - 2 * RUNNING_EXPONENTS[0]
            p.run([(Wide.MOVE, SUM, Lane(X)), (Wide.ADD, A, Y, 1 << epsilon), (Wide.SHIFT, A, A, left),
                   *p.inverse_sqrt()], (1,), step, [mean, variance], source0=p.channel(mean, plane),
                  source1=p.channel(variance, plane))
            p.run(p.affine(), (1,), step, [gamma, beta], **affine)
            normalise = [(Wide.SHIFT, A, X, p.named(MEAN_LEFT)), *p.normalise_centred()]
        p.run([*normalise, *finish], loops, step, [x], [y], source0=stream, target0=target, ranges=1)
        p.scalars([(Op.MAX, r["bits"], r["bits"], r["range0"])], step)
    return compiler.value(x.layout.shape, y, (output,), "bits",
                          (layer.index, Purpose.ACTIVATION))


def backward(compiler, layer: BatchNorm, error, rate):
    """The int8 error of the layer below, and the updates of gamma and beta."""
    name, r, step = layer.name, compiler.registers, "batch norm error"
    below = compiler.network.description.layer(layer.source)
    if not isinstance(below, Conv2d | Linear):
        raise CompileError(f"{name} normalises {below.name}: the core needs a convolution or linear layer there")
    e, error_exponent = compiler._round_error(error, layer)
    p = _Passes(compiler, layer, compiler.tensors[f"{name}.activation"].region)
    x, gamma, table = p.x, p.state["gamma"], p.table
    compiler.tensors[f"{name}.error"] = compiler.tensor(e, e.layout.shape)
    planes, v = x.layout.planes, compiler.config.vector
    load = [(Wide.MOVE, register, Lane(following))
            for register, following in zip(CHAIN, [*CHAIN[1:], X], strict=True)]
    p.scalars([*p.set_count(), *((Op.SET, r[key], 0) for key in ("gamma_length", "beta_length", "top", "bits"))], step)

    for plane in range(planes):
        loops, x_stream = p.pixels(x, plane)
        _, e_stream = p.pixels(e, plane)
        p.run(load, (ROWS,), step, [table], source0=p.rows(plane))
        p.run([*p.shift(), (Wide.MOVE, BETA_SUM, 0), (Wide.MOVE, GAMMA_SUM, 0)], (1,), step,
              source0=p.channel(gamma, plane))
        p.run([*p.normalise(), (Wide.MUL, A, Y, Lane(A)), (Wide.ADD, GAMMA_SUM, GAMMA_SUM, Lane(A)),
               (Wide.ADD, BETA_SUM, BETA_SUM, Lane(Y))], loops, step, [x, e], source0=x_stream, source1=e_stream)
        # The largest of bit length - half shift, as a power of two; and the sums for the table.
        p.run([(Wide.RANGE, 0, BETA_SUM), (Wide.RANGE, 1, GAMMA_SUM), (Wide.MUL, A, RECIPROCAL, Lane(X)),
               (Wide.BIT_LENGTH, B, A), (Wide.SUB, A, B, Lane(HALF)), (Wide.ADD, A, A, 15), (Wide.MOVE, C, 1),
               (Wide.SHIFT, C, C, Lane(A)), (Wide.GATE, C, C, Lane(B)), (Wide.RANGE, 2, C),
               (Wide.MOVE, A, Lane(BETA_SUM)), (Wide.MOVE, B, Lane(GAMMA_SUM)), (Wide.ROUND, C, GAMMA_SUM, -32)],
              (1,), step, [gamma], source0=p.channel(gamma, plane), ranges=3)
        p.run([(Wide.WRITE, A), (Wide.MOVE, A, Lane(B)), (Wide.MOVE, B, Lane(C))], (3,), step, [], [table],
              source0=p.channel(gamma, plane), target0=p.rows(plane, 3))
        p.scalars([(Op.MAX, r[key], r[key], r[f"range{k}"])
                   for k, key in enumerate(("beta_length", "gamma_length", "top"))], step)

    # The error's exponent is error + top - 46 + gamma - x, or 0 if every coefficient is zero.
    x_exponent = r[compiler.exponent_of[name]]
    compiler._fetch(gamma.name, "weight.exponent", name)
    sums, top, zero = r["sums"], r["top"], r["shift"]
    p.scalars([(Op.ADDI, zero, top, 0), (Op.ADDI, top, top, -16), (Op.SET, r[BASE], 15),
               (Op.SUB, r[BASE], r[BASE], top), (Op.ADD, sums, r[error_exponent], top),
               (Op.ADDI, sums, sums, -15 - PRECISION),
               (Op.ADD, sums, sums, r["weight.exponent"]), (Op.SUB, sums, sums, x_exponent),
               (Op.SELECT_ZERO, sums, scalar.ZERO, sums, zero)], step)
    inner = [*p.normalise(), (Wide.MUL, A, GAMMA_SUM, Lane(A)), (Wide.ROUND, A, A, -2 * NORMALISED_FRACTION),
             (Wide.MUL, B, Y, p.named(COUNT)), (Wide.SUB, B, B, Lane(BETA_SUM)), (Wide.SUB, A, B, Lane(A)),
             (Wide.MUL, A, A, Lane(GAMMA))]

    def prepare(plane):
        p.run(load, (ROWS,), step, [table], source0=p.rows(plane))
        p.run([*p.shift(), (Wide.SHIFT, GAMMA_HIGH, GAMMA_HIGH, 32), (Wide.ADD, GAMMA_SUM, GAMMA_SUM, Lane(GAMMA_HIGH)),
               (Wide.MUL, A, RECIPROCAL, Lane(X)), (Wide.MOVE, SPARE, p.named(BASE)),
               (Wide.SUB, SPARE, SPARE, Lane(HALF)), (Wide.ROUND, GAMMA, A, Lane(SPARE)),
               (Wide.CLIP, GAMMA, GAMMA, microprograms.STATE_CODE)], (1,), step, [gamma],
              source0=p.channel(gamma, plane))

    for plane in range(planes):
        prepare(plane)
        loops, x_stream = p.pixels(x, plane)
        p.run([*inner, (Wide.RANGE, 0, A)], loops, step, [x, e], source0=x_stream, source1=p.pixels(e, plane)[1],
              ranges=1)
        p.scalars([(Op.MAX, r["bits"], r["bits"], r["range0"])], step)
    exponent, region = f"{below.name}.error.exponent", compiler._pixels(f"{below.name}.error", x.layout.shape)
    p.scalars([*compiler._shift_scalars(("sums",), exponent, "bits"), (Op.SET, r["amount"], 32),
               (Op.SUB, r["amount"], r["amount"], r["shift"])], step)
    for plane in range(planes):
        if planes > 1:
            prepare(plane)
        loops, x_stream = p.pixels(x, plane)
        random = compiler._random(layer.index, Purpose.BATCH_NORM_GRADIENT, (p.h * p.w * p.channels, p.channels),
                                  plane * v)
        p.run([*inner, *microprograms.requantize(p.number, 0), (Wide.WRITE, A)], loops, step, [x, e], [region],
              source0=x_stream, source1=p.pixels(e, plane)[1], target0=p.pixels(region, plane)[1], random=random)

    _update(p, error_exponent, rate)
    return compiler.error(x.layout.shape, int8=(region, exponent), rounded=True)


def _update(p: _Passes, error_exponent: str, rate):
    """SGD of gamma and beta, without decay; their words come first in a stream, then their momentum's."""
    compiler, r, name, v = p.compiler, p.registers, p.name, p.compiler.config.vector
    gamma_exponent = "gradient.exponent"
    p.scalars([(Op.ADDI, r[gamma_exponent], r[error_exponent], -NORMALISED_FRACTION)], "update")
    planes = p.table.layout.planes

    def row(number):
        layout = p.table.layout
        return p.table.address + number * layout.vector_bytes, (layout.plane_bytes,), 4

    def whole(region):
        return region.address, (region.layout.plane_bytes,), region.layout.itemsize

    for part, purpose, words, first, gradient in (
            ("gamma", Purpose.GAMMA, 2, 4, (SPARE, "gamma_length", gamma_exponent)),
            ("beta", Purpose.BETA, 1, 3, (X, "beta_length", error_exponent))):
        table = Region(f"{name}.table", p.table.address,
                       ChannelTensor(p.channels, v, rows=ROWS, row=first, words=words))
        compiler.tensors[f"{name}.{part}.gradient"] = compiler.tensor(table, (p.channels,))
        weight, momentum = p.state[part], p.state[f"{part}_momentum"]
        sources = {"source0": row(first), "source2": whole(momentum)}
        prepare = []
        if words == 2:
            sources["source1"] = row(first + 1)
            prepare = [(Wide.SHIFT, SPARE, Y, 32), (Wide.ADD, SPARE, SPARE, Lane(X))]
        compiler._sgd(name, weight, momentum, (planes,), Sgd(rate, decay=None), reads=[p.table.name], gradient=gradient,
                      weight_stream=whole(weight), momentum_stream=whole(momentum), momentum_sources=sources,
                      momentum_register=Z, prepare=prepare,
                      weight_random=compiler._random(p.layer.index, purpose, (v,)),
                      momentum_random=compiler._random(p.layer.index, purpose, (v,), p.channels))
        compiler._keep(weight.name, name, {f"{name}.{part}.gradient.exponent": gradient[2],
                                           f"{name}.error.exponent": error_exponent,
                                           f"{name}.activation.exponent": compiler.exponent_of[name]})
    compiler._release(name, error_exponent)
    p.scalars([(Op.SET, r["mean.exponent"], RUNNING_EXPONENTS[0]),
               (Op.SET, r["variance.exponent"], RUNNING_EXPONENTS[1])], "update")
