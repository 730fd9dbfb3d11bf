"""Compiles networks of dynamic fixed point (`golden.dfp`): the same core, other passes.

Tensors go from layer to layer as `golden.dfp` has them: int32 sums with an exponent until something needs int8. The
compiler follows golden's flow and notes for each tensor where its sums are, what masks them and who owns their
rounding; passes are emitted when a product, a pooling or an addition asks for the int8 form.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from golden.dfp import PROBABILITY_BITS, SGD_WINDOW, STATE_BITS, SUM_WINDOW, Dfp, Sgd, check_power_of_two
from golden.networks import INPUT, Add, BatchNorm, Conv2d, Flatten, GlobalAveragePool, Linear, MaxPool, Relu
from golden.random import Purpose
from golden.rounding import Rounding
from hw import scalar
from hw.config import CoreConfig
from hw.descriptor import SCALAR_OPERATIONS, Opcode
from hw.microprogram import RANGES, Lane
from hw.microprogram import WideOperation as Wide
from hw.scalar import Operation as Op
from hw.vector import Function

from . import batch_norm, microprograms, tiling
from .compiler import IMAGES, LABELS, Compiled, Compiler, Stage, Tensor, geometry
from .layout import PixelTensor, RawTensor, WeightTensor
from .microprograms import A, B, Microprograms, X, Y, Z
from .program import CompileError, ProgramBuilder, Region

__all__ = ["DfpCompiler", "DfpCompiled"]

NEVER = 400_000
"""An exponent beyond all that occur: what a zero tensor contributes to a minimum."""

LENGTHS = ("range0", "bits")
"""Registers that hold bit lengths, not maxima."""

ROUNDING = Rounding.STOCHASTIC


@dataclasses.dataclass
class DfpCompiled(Compiled):
    """A program whose state is int16 tensors; exponents lie where the core dumps its scalar registers: at the end of a
    step, and after each update.
    """

    state_regions: dict[str, Region] = dataclasses.field(default_factory=dict)

    def state(self, values: dict):
        registers = np.zeros(self.dump.layout.shape, "<i4")
        for name, (array, exponent) in values.items():
            region = self.state_regions[name]
            yield region, region.layout.pack(array)
            registers[self.scalars[f"{name}.exponent"]] = exponent
        yield self.dump, self.dump.layout.pack(registers)


@dataclasses.dataclass
class Value:
    """A tensor on its way forward. ``exponent``: registers and constants whose sum is the exponent of the sums;
    ``maximum``: the register with their largest magnitude (after ReLU, if that follows). ``int8`` is (region, register
    name) once made.
    """

    shape: tuple[int, int, int, int]
    sums: Region | None = None
    exponent: tuple[str | int, ...] = ()
    maximum: str = ""
    stream: tuple[int, Purpose] | None = None
    relu: bool = False
    int8: tuple[Region, str] | None = None


@dataclasses.dataclass
class Error:
    """A tensor on its way back: ``sums`` of ``shape``, masked before or after rounding, unpooled after rounding."""

    shape: tuple[int, int, int, int]
    sums: Region | None = None
    exponent: tuple[str | int, ...] = ()
    maximum: str = ""
    stream: tuple[int, Purpose] | None = None
    rounded: bool = False            # masks that follow apply to the int8 form
    before: Region | None = None
    after: Region | None = None
    choice: Region | None = None
    spread: tuple[int, int] | None = None      # every element goes to so many rows and columns
    int8: tuple[Region, str] | None = None


class DfpCompiler(Compiler):
    def __init__(self, config: CoreConfig, network: Dfp, batch: int, capacity: int, steps: int, first_tag: int = 0):
        super().__init__(config, network, batch, capacity, steps, first_tag)
        self.log2_batch, self.first_tag = check_power_of_two(batch), first_tag
        self.programs = Microprograms()
        self.state_regions: dict[str, Region] = {}
        self.slots: dict[str, int] = {}
        self.exponent_of: dict[str, str] = {}      # of a layer's input: the register's name
        for k in range(RANGES):
            self.registers[f"range{k}"]
        self._allocate()

    def _stages(self, description):
        return []                        # layers find their place in `_allocate`

    # Memory

    def _region(self, name: str, layout, copies: int = 1) -> Region:
        """The region of a name; the same one for the same name."""
        if name not in self.memory.regions:
            self.memory.add(name, layout, copies)
        return self.memory.regions[name]

    def _pixels(self, name: str, shape, dtype: str = "int8") -> Region:
        return self._region(name, PixelTensor(shape, self.config.vector, dtype))

    def _allocate(self):
        """Everything the host writes, and the state."""
        v, line, description = self.config.vector, self.config.line_bytes, self.network.description
        shape, first = description.input_shape, description.layers[0]
        for layer in description.layers:
            if layer.has_weights:
                source = layer.input_shape if len(layer.input_shape) == 3 else self._image_shape(layer)
                g = geometry(layer, self.batch, source, not self.stages)
                w_shape = (g.co, g.kh, g.kw, g.ci)
                stage = Stage(layer, g)
                stage.w = self._region(f"{layer.name}.datapath_weight", WeightTensor(w_shape, v))
                stage.dw = self._region(f"{layer.name}.gradient", WeightTensor(w_shape, v, "int32"))
                for part in ("weight", "momentum"):
                    name = f"{layer.name}.{part}"
                    self.state_regions[name] = self._region(name, WeightTensor(w_shape, v, "int16"))
                    self.tensors[name] = Tensor(self.state_regions[name], layer.weight_shape)
                self._new_slot(f"{layer.name}.weight", f"{layer.name}.momentum")
                stage.master = self.state_regions[f"{layer.name}.weight"]
                self.tensors[f"{layer.name}.datapath_weight"] = Tensor(stage.w, layer.weight_shape)
                self.tensors[f"{layer.name}.gradient"] = Tensor(stage.dw, layer.weight_shape)
                self.stages.append(stage)
            elif isinstance(layer, BatchNorm):
                batch_norm.allocate(self, layer)
        g = self.stages[0].g
        layout = (RawTensor((g.n, g.h, g.image_w, g.channels), line) if g.folded
                  else PixelTensor((g.n, g.h, g.w, g.ci), v))
        if first.name != self.stages[0].name and not isinstance(first, Flatten):
            raise CompileError(f"{description.name} begins with {first.name}: the core needs a convolution or linear "
                               "layer first")
        self.stages[0].x = self._region("images", layout, self.capacity)
        self.tensors[f"{self.stages[0].name}.activation"] = Tensor(self.stages[0].x, (self.batch, *shape))
        self.labels = self._region("labels", PixelTensor((self.batch, 1, 1, 1), v, "uint8"), self.capacity)
        self.exponents = self._region("exponents", RawTensor((self.capacity,), line, "int32"))
        self.dump = self._region("scalars", RawTensor((scalar.REGISTERS * (1 + len(self.slots)),), line, "int32"))

    def _new_slot(self, weight: str, momentum: str):
        """A place for the dump after the update of ``weight``; exponents of state live there between steps."""
        self.slots[weight] = slot = len(self.slots) + 1
        for name, register in ((weight, "weight"), (momentum, "momentum")):
            self.scalars[f"{name}.exponent"] = slot * scalar.REGISTERS + self.registers[f"{register}.exponent"]

    def _fetch(self, name: str, register: str, layer: str):
        """A state's exponent into a register."""
        self._scalar([(Op.WORD, self.registers[register])], layer, "exponents",
                     load=self.dump.address + 4 * self.scalars[f"{name}.exponent"])

    def _keep(self, weight: str, layer: str, names: dict[str, str]):
        """Dump the registers after the update of ``weight``: {name in the record: register}."""
        slot = self.slots[weight] * scalar.REGISTERS
        self._scalar([], layer, "exponents", dump=self.dump.address + 4 * slot)
        self.scalars |= {name: slot + self.registers[register] for name, register in names.items()}

    def _image_shape(self, layer: Linear) -> tuple[int, int, int]:
        """(h, w, c) of a linear layer's input before any flatten."""
        source = layer.source
        while source != INPUT:
            below = self.network.description.layer(source)
            if len(below.output_shape) == 3:
                return below.output_shape
            if not isinstance(below, Flatten | Relu):
                return 1, 1, below.output_shape[0]
            source = below.source
        return self.network.description.input_shape

    # Descriptors

    def _wide(self, program, loops, layer: str, step: str, reads, writes, *, ranges: int = 0, random=None, **streams):
        """A pass of the wide lanes; ``random`` are the fields of `_random`, for programs that draw."""
        rounding = ROUNDING if random else Rounding.TRUNCATE
        self._vector(Function.WIDE, loops, layer, step, reads, writes, microprogram=self.programs[program],
                     range_register=self.registers["range0"], ranges=ranges, rounding=rounding.code, **(random or {}),
                     **streams)

    def _maximum(self, loops, layer: str, step: str, reads, **streams):
        """Register "length" = the largest magnitude of source 0, after the mask if there is one."""
        self._vector(Function.ELEMENTWISE, loops, layer, step, reads, [], shift_register=scalar.ZERO, target_width=2,
                     rounding=Rounding.TRUNCATE.code, maximum=self.registers["length"], **streams)

    @staticmethod
    def _walk(region: Region):
        """(loops, stream) over the vectors of a tensor of pixels."""
        layout = region.layout
        n, h, w, _ = layout.shape
        return (layout.planes, n, h * w), (
            region.address, (layout.plane_bytes, h * w * layout.vector_bytes, layout.vector_bytes), layout.itemsize)

    def _weights_walk(self, region: Region):
        """(loops, stream) over the vectors of weights, in the order that `_weights_random` follows."""
        layout, v = region.layout, self.config.vector
        co_tile, _, tap, ci_tile = layout.strides
        _, kh, kw, _ = layout.shape
        return (layout.co_tiles, kh * kw, layout.ci_tiles, v), (
            region.address, (co_tile, tap, ci_tile, v * layout.itemsize), layout.itemsize)

    def _weights_random(self, region: Region, index: int, purpose: Purpose) -> dict[str, int]:
        v = self.config.vector
        _, kh, kw, ci = region.layout.shape
        return self._random(index, purpose, (v * kh * kw * ci, ci, v, kh * kw * ci))

    # Scalar programs

    def _exponent_scalars(self, result: str, terms) -> list[tuple]:
        """Register ``result`` = sum of named registers and constants."""
        r = self.registers
        names, constant = [r[t] for t in terms if isinstance(t, str)], sum(t for t in terms if not isinstance(t, str))
        if not names:
            return [(Op.SET, r[result], constant)]
        first, *rest = [*names, scalar.ZERO] if len(names) == 1 else names
        program = []
        for name in rest:
            program.append((Op.EXPONENT, r[result], first, name))
            first = r[result]
        return program + ([(Op.ADDI, r[result], r[result], constant)] if constant else [])

    def _shift_scalars(self, exponent, result: str, maximum: str, register: str = "shift") -> list[tuple]:
        """shift = max(bit length of the maximum - 7, 0); the result's exponent is the sum's plus shift."""
        r = self.registers
        shift = r[register]
        length = (Op.ADDI, shift, r[maximum], 0) if maximum in LENGTHS else (Op.BIT_LENGTH, shift, r[maximum])
        return [length, (Op.ADDI, shift, shift, -7), (Op.MAX, shift, shift, scalar.ZERO),
                *self._exponent_scalars(result, exponent), (Op.EXPONENT, r[result], r[result], shift)]

    def _alignment(self, terms, window: int) -> list[tuple]:
        """`golden.dfp.aligned_sum`: register "grid" and each term's distance to it, from (bit length, exponent, offset,
        distance) of names of registers and a constant.
        """
        r = self.registers
        low, high, item, grid, present = (r[name] for name in ("low", "high", "item", "grid", "present"))
        never, always = r["never"], r["always"]
        program = [(Op.SET, never, NEVER), (Op.SET, always, -NEVER), (Op.SET, low, NEVER), (Op.SET, high, -NEVER),
                   (Op.SET, present, 0)]
        for length, exponent, offset, distance in terms:
            length, distance = r[length], r[distance]
            program += [
                (Op.ADDI, distance, r[exponent], offset),
                (Op.SELECT_ZERO, item, never, distance, length), (Op.MIN, low, low, item),
                (Op.ADD, item, distance, length), (Op.SELECT_ZERO, item, always, item, length),
                (Op.MAX, high, high, item), (Op.ADD, present, present, length)]
        program += [(Op.ADDI, grid, high, -window), (Op.MAX, grid, grid, low),
                    (Op.SELECT_ZERO, grid, scalar.ZERO, grid, present)]
        return program + [(Op.SUB, r[distance], r[distance], grid) for *_, distance in terms]

    def _state_scalars(self, result: str) -> list[tuple]:
        """From range0, the bit length of a sum on "grid": "amount" = 32 - shift, and the exponent of the state."""
        r = self.registers
        shift = r["shift"]
        return [(Op.ADDI, shift, r["range0"], 1 - STATE_BITS), (Op.SELECT_ZERO, shift, scalar.ZERO, shift, r["range0"]),
                (Op.EXPONENT, r[result], r["grid"], shift), (Op.SET, r["amount"], 32),
                (Op.SUB, r["amount"], r["amount"], shift)]

    # Forward

    tensor, value, error = Tensor, Value, Error

    def _purpose_rounding(self, stream, strides, training: bool) -> dict[str, int]:
        """Fields of a rounding to int8: by the words of a stream (in training, if the option says so) or to nearest."""
        if stream is None or not training:
            return {"rounding": Rounding.HALF_UP.code}
        return {"rounding": ROUNDING.code, **self._random(*stream, strides)}

    def _datapath_weights(self, training: bool):
        """The int8 weights of the products, rounded anew for each step."""
        r = self.registers
        for stage in self.stages:
            name, layer, region = stage.name, stage.layer, self.state_regions[f"{stage.name}.weight"]
            loops, source = self._weights_walk(region)
            self._maximum(loops, name, "datapath weight", [region.name], source0=source)
            self._fetch(region.name, "weight.exponent", name)
            self._scalar(self._shift_scalars(["weight.exponent"], f"{name}.datapath.exponent", "length"), name,
                         "datapath weight")
            rounding = {"rounding": Rounding.HALF_UP.code}
            if training and self.network.stochastic:
                rounding = {"rounding": ROUNDING.code,
                            **self._weights_random(region, layer.index, Purpose.DATAPATH_WEIGHT)}
            self._vector(Function.ELEMENTWISE, loops, name, "datapath weight", [region.name], [stage.w.name],
                         source0=source, target0=self._weights_walk(stage.w)[1], shift_register=r["shift"], **rounding)

    def _quantize(self, value: Value, name: str, layer: str, training: bool, pool: MaxPool | None = None):
        """The int8 form of ``value``, after ReLU and pooling; with pooling also the choices."""
        if value.int8 is None or pool:
            r = self.registers
            n, h, w, c = value.shape
            v = self.config.vector
            exponent = f"{name}.exponent"
            relu = value.relu and value.int8 is None
            source, rounding = value.sums, {"rounding": Rounding.TRUNCATE.code}
            register = scalar.ZERO
            stream = value.stream if self.network.stochastic else None
            strides = (v, h * w * c, c) if pool is None else (v, 2 * w * c, 2 * c, w * c, c)
            if value.int8 is None:
                self._scalar(self._shift_scalars(value.exponent, exponent, value.maximum), layer, "requantize",
                             reads=[value.maximum])
                rounding, register = self._purpose_rounding(stream, strides, training), r["shift"]
            else:
                source, exponent = value.int8
            common = {"shift_register": register, "relu": relu, **rounding}
            if pool is None:
                region = self._pixels(name, value.shape)
                loops, target = self._walk(region)
                self._vector(Function.ELEMENTWISE, loops, layer, "requantize", [source.name], [region.name],
                             source0=self._walk(source)[1], target0=target, **common)
                value.int8 = region, exponent
                return value.int8
            if pool.size != 2:
                raise CompileError(f"layer {pool.name}: the core pools 2x2 windows, not {pool.size}x{pool.size}")
            region = self._pixels(name, (n, h // 2, w // 2, c))
            choice = self._pixels(f"{pool.name}.choice", region.layout.shape)
            a, out = source.layout, region.layout
            size, b = a.vector_bytes, out.vector_bytes
            targets = (out.plane_bytes, (w // 2) * b, b, 0, 0)
            self._vector(Function.ELEMENTWISE, (out.planes, n * h // 2, w // 2, 2, 2), layer, "requantize",
                         [source.name], [region.name, choice.name], pool=1,
                         source0=(source.address, (a.plane_bytes, 2 * w * size, 2 * size, w * size, size), a.itemsize),
                         target0=(region.address, targets, 1), target1=(choice.address, targets, 1), **common)
            return region, exponent
        return value.int8

    def _followed_by_relu(self, layer) -> bool:
        readers = self.network.description.consumers(layer.name)
        relu = any(isinstance(reader, Relu) for reader in readers)
        if relu and len(readers) > 1:
            raise CompileError(f"{layer.name} is read by ReLU and by another layer: the core masks its sums")
        return relu

    def _forward(self, training: bool):
        description, r = self.network.description, self.registers
        self.values: dict[str, Value] = {}
        first = self.stages[0]
        image = Value((first.g.n, first.g.h, first.g.w, first.g.ci))
        image.int8 = first.x, f"{first.name}.activation.exponent"
        self.values[INPUT] = image
        stages = {stage.name: stage for stage in self.stages}
        for layer in description.layers:
            source = self.values[layer.source]
            match layer:
                case Conv2d() | Linear():
                    self.values[layer.name] = self._product_forward(stages[layer.name], source, training)
                case Relu():
                    if source.int8 is not None:
                        raise CompileError(f"{layer.name}: the core applies ReLU to sums; put it before the pooling")
                    self.values[layer.name] = dataclasses.replace(source, relu=True)
                case BatchNorm():
                    value = self.values[layer.name] = batch_norm.forward(self, layer, source, training)
                    if all(isinstance(reader, Add) for reader in description.consumers(layer.name)):
                        # Now, while the registers still hold its range.
                        self._quantize(value, f"{layer.name}.int8", layer.name, training)
                case Add():
                    self.values[layer.name] = self._add(layer, source, self.values[layer.other], training)
                case GlobalAveragePool():
                    self.values[layer.name] = self._average(layer, source, training)
                case Flatten():
                    if source is not image:
                        self._quantize(source, f"{layer.name}.output", layer.name, training)
                    self.values[layer.name] = source
                case MaxPool():
                    int8 = self._quantize(source, f"{layer.name}.output", layer.name, training, layer)
                    self.values[layer.name] = Value(int8[0].layout.shape, int8=int8)
                case _:
                    raise CompileError(f"layer {layer.name} of {description.name}: the core has no passes for "
                                       f"{type(layer).__name__} with dfp yet")
        exponent, name = r["logits.exponent"], description.layers[-1].name
        last = self.values[name]
        self._scalar(self._exponent_scalars("logits.exponent", last.exponent), name, "loss")
        self.scalars["logits.exponent"] = exponent
        self.tensors["logits"] = Tensor(last.sums, (self.batch, last.shape[3]))

    def _sum(self, places, exponents, result: Region, exponent: str, layer: str, step: str, after=()):
        """`golden.dfp.aligned_sum` of two tensors of pixels: int32 sums and their exponent's register."""
        r, (loops, _) = self.registers, self._walk(result)
        for k, (place, terms) in enumerate(zip(places, exponents, strict=True)):
            self._maximum(loops, layer, step, [place.name], source0=self._walk(place)[1])
            self._scalar([(Op.BIT_LENGTH, r[f"range{k}"], r["length"]), *self._exponent_scalars(f"term{k}", terms)],
                         layer, step)
        self._scalar(self._alignment([(f"range{k}", f"term{k}", 0, f"distance{k}") for k in range(2)], SUM_WINDOW),
                     layer, step)
        self._scalar(self._exponent_scalars(exponent, ("grid",)), layer, step)
        total = microprograms.aligned([(X, 1, "distance0"), (Y, 1, "distance1")], lambda name: r[name])
        self._wide([*total, *after, (Wide.WRITE, A), (Wide.RANGE, 0, A)], loops, layer, step,
                   [place.name for place in places], [result.name], source0=self._walk(places[0])[1],
                   source1=self._walk(places[1])[1], target0=self._walk(result)[1], ranges=1)
        self._scalar([(Op.ADDI, r["bits"], r["range0"], 0)], layer, step)

    def _add(self, layer: Add, source: Value, other: Value, training: bool) -> Value:
        name = layer.name
        int8 = [self._quantize(value, f"{name}.term{k}", name, training) for k, value in enumerate((source, other))]
        result, exponent = self._pixels(f"{name}.sum", source.shape, "int32"), "sum.exponent"
        relu = [(Wide.MAX, A, A, 0)] if self._followed_by_relu(layer) else []
        self._sum([place for place, _ in int8], [(register,) for _, register in int8], result, exponent, name, "add",
                  relu)
        for _, register in int8:
            if register.endswith(".int8.exponent"):        # made for this sum only
                self.registers.free(register)
        return Value(source.shape, result, (exponent,), "bits", (layer.index, Purpose.RESIDUAL_ADD))

    def _average(self, layer: GlobalAveragePool, source: Value, training: bool) -> Value:
        """Sums over the pixels of an image are differences of running sums over all of them: every pixel writes the sum
        so far to its image's place, where the last one stays.
        """
        name, r, size = layer.name, self.registers, 4 * self.config.vector     # bytes of a vector of sums
        x, exponent = self._quantize(source, f"{name}.input", name, training)
        n, h, w, c = source.shape
        layout = x.layout
        if 127 * layout.planes * n * h * w >= 1 << 31:
            raise CompileError(f"{name} sums {n * h * w} pixels in {layout.planes} planes: use a smaller batch")
        running = self._region(f"{name}.running", RawTensor((size * (1 + layout.planes * n),), size))
        result = self._pixels(f"{name}.sum", (n, 1, 1, c), "int32")
        self._vector(Function.FILL, (1,), name, "average", [], [running.name], target0=(running.address, (), 4))
        self._wide([(Wide.MOVE, B, 0)], (1,), name, "average", [], [], source0=self._walk(x)[1])
        loops, stream = self._walk(x)
        self._wide([(Wide.ADD, B, B, Lane(X)), (Wide.WRITE, B)], loops, name, "average", [x.name], [running.name],
                   source0=stream, target0=(running.address + size, (n * size, size, 0), 4))
        (planes, images, _), target = self._walk(result)
        self._wide([(Wide.SUB, A, X, Lane(Y)), (Wide.WRITE, A), (Wide.RANGE, 0, A)], (planes, images), name, "average",
                   [running.name], [result.name], source0=(running.address + size, (n * size, size), 4),
                   source1=(running.address, (n * size, size), 4), target0=target, ranges=1)
        self._scalar([(Op.ADDI, r["bits"], r["range0"], 0)], name, "average")
        return Value((n, 1, 1, c), result, (exponent, 1 - (h * w).bit_length()), "bits")

    def _product_forward(self, stage: Stage, source: Value, training: bool) -> Value:
        g, name, r = stage.g, stage.name, self.registers
        stage.x, exponent = self._quantize(source, f"{name}.activation", name, training)
        if stage is not self.stages[0]:
            shape = (g.n, g.h, g.w, g.ci) if isinstance(stage.layer, Conv2d) else (g.n, g.h * g.w * g.ci)
            self.tensors[f"{name}.activation"] = Tensor(stage.x, shape)
        self.exponent_of[name] = exponent
        stage.y = self._pixels(f"{name}.accumulator", (g.n, g.ho, g.wo, g.co), "int32")
        blocks = tiling.forward(self.config, g, stage.x.address, stage.x.layout, stage.w.address, stage.w.layout,
                                stage.y.address, stage.y.layout, r["maximum"])
        relu = self._followed_by_relu(stage.layer)
        for block in blocks:
            block.sections["store"]["range_positive"] = relu
            self.program.add(Opcode.PRODUCT, block.sections, layer=name, step="forward",
                             header={"base_a": IMAGES} if stage.x.name == "images" else {},
                             reads=[stage.x.name, stage.w.name], writes=[stage.y.name, "maximum"])
        out = (g.n, g.co) if isinstance(stage.layer, Linear) else (g.n, g.ho, g.wo, g.co)
        self.tensors[f"{name}.accumulator"] = Tensor(stage.y, out)
        return Value((g.n, g.ho, g.wo, g.co), stage.y, (exponent, f"{name}.datapath.exponent"), "maximum",
                     (stage.layer.index, Purpose.ACTIVATION))

    # Backward

    def _loss(self) -> Error:
        stage = self.stages[-1]
        name, y, classes, v = stage.name, stage.y.layout, stage.g.co, self.config.vector
        sums = self._pixels("loss", y.shape, "int32")
        self._vector(Function.SOFTMAX, (1, 1, self.batch, 1, y.planes), name, "loss", [stage.y.name], [sums.name],
                     source0=(stage.y.address, (0, 0, y.vector_bytes, 0, y.plane_bytes), 4),
                     source1=(self.labels.address, (0, 0, v), 1),
                     target0=(sums.address, (0, 0, y.vector_bytes, 0, y.plane_bytes), 4),
                     shift_register=self.registers["logits.exponent"], classes=classes, header={"base_b": LABELS},
                     maximum=self.registers["length"])
        loops, source = self._walk(sums)
        exponent, region = f"{name}.error.exponent", self._pixels(f"{name}.error", y.shape)
        self._scalar(self._shift_scalars([-PROBABILITY_BITS - self.log2_batch], exponent, "length"), name, "loss")
        strides = (v, classes, classes)
        self._vector(Function.ELEMENTWISE, loops, name, "loss", [sums.name], [region.name], source0=source,
                     target0=self._walk(region)[1], shift_register=self.registers["shift"], rounding=ROUNDING.code,
                     **self._random(stage.layer.index, Purpose.LOSS, strides))
        return Error(y.shape, int8=(region, exponent), rounded=True)

    def _round_error(self, error: Error, layer) -> tuple[Region, str]:
        """The int8 error at the output of ``layer``: rounded, masked, unpooled."""
        if error.int8 is not None:
            if error.after is not None or error.choice is not None:
                raise CompileError(f"{layer.name}: the core masks and unpools errors while it rounds them, not later")
            return error.int8
        name, r, v = layer.name, self.registers, self.config.vector
        n, h, w, c = error.shape
        exponent, sums = f"{name}.error.exponent", error.sums
        owner = error.sums.name.partition(".")[0]
        maximum = error.maximum
        if error.before is not None or not maximum:
            loops, source = self._walk(sums)
            masked = {} if error.before is None else {"source1": self._walk(error.before)[1], "mask": 1}
            self._maximum(loops, owner, "error requantize", [sums.name], source0=source, **masked)
            maximum = "length"
        self._scalar(self._shift_scalars(error.exponent, exponent, maximum), owner, "error requantize",
                     reads=[error.maximum])
        for register in error.exponent:
            if isinstance(register, str):
                self.registers.free(register)
        mask = error.before or error.after
        if error.before is not None and error.after is not None:
            raise CompileError(f"{name}: the core applies one ReLU between two products")
        reads, fields = [sums.name], {}
        if mask is not None:
            reads.append(mask.name)
            fields["mask"] = 1
        if error.spread is not None:
            region = self._pixels(f"{name}.error", (n, *error.spread, c))
            loops, target = self._walk(region)
            a = sums.layout
            source, strides = (sums.address, (a.plane_bytes, a.vector_bytes, 0), a.itemsize), (v, c, 0)
            if mask is not None:
                fields["source1"] = self._walk(mask)[1]
        elif error.choice is None:
            region = self._pixels(f"{name}.error", error.shape)
            loops, source = self._walk(sums)
            strides, target = (v, h * w * c, c), self._walk(region)[1]
            if mask is not None:
                fields["source1"] = self._walk(mask)[1]
        else:
            region = self._pixels(f"{name}.error", (n, 2 * h, 2 * w, c))
            a, b = sums.layout, region.layout
            loops = (b.planes, n * h, 2, w, 2)

            def full(place: Region):
                layout = place.layout
                size = layout.vector_bytes
                return place.address, (layout.plane_bytes, 4 * w * size, 2 * w * size, 2 * size, size), layout.itemsize

            def pooled(place: Region):
                layout = place.layout
                size = layout.vector_bytes
                return place.address, (layout.plane_bytes, w * size, 0, size, 0), layout.itemsize
            source, target, strides = pooled(sums), full(region), (v, w * c, 0, c, 0)
            assert a.shape == error.shape
            fields |= {"source2": pooled(error.choice), "unpool": 1}
            reads.append(error.choice.name)
            if mask is not None:
                fields["source1"] = full(mask)
        self._vector(Function.ELEMENTWISE, loops, owner, "error requantize", reads, [region.name], source0=source,
                     target0=target, shift_register=r["shift"], **self._purpose_rounding(error.stream, strides, True),
                     **fields)
        return region, exponent

    def _backward(self, rate: tuple[int, int]):
        description = self.network.description
        stages = {stage.name: stage for stage in self.stages}
        errors = {description.layers[-1].name: [self._loss()]}
        for layer in reversed(description.layers):
            parts = errors.pop(layer.name)
            error = parts[0] if len(parts) == 1 else self._fork(layer, parts)
            sources = layer.sources
            match layer:
                case Conv2d() | Linear():
                    error = self._product_backward(stages[layer.name], error, rate)
                case BatchNorm():
                    error = batch_norm.backward(self, layer, error, rate)
                case Relu():
                    mask = self.values[layer.source].sums
                    error = dataclasses.replace(error, **{"after" if error.rounded else "before": mask})
                case Flatten():
                    error = dataclasses.replace(error, rounded=True)
                case MaxPool():
                    error = dataclasses.replace(error, rounded=True, choice=self.memory.regions[f"{layer.name}.choice"])
                case GlobalAveragePool():
                    h, w, _ = layer.input_shape
                    error = dataclasses.replace(error, rounded=True, spread=(h, w),
                                                exponent=(*error.exponent, 1 - (h * w).bit_length()))
                case Add():
                    error = Error(error.shape, rounded=True, int8=self._round_error(error, layer))
            for source in sources:
                if source != INPUT and error is not None:
                    errors.setdefault(source, []).append(error)

    def _fork(self, layer, parts: list[Error]) -> Error:
        """The sum of the errors of a tensor that two layers read."""
        if len(parts) != 2 or any(part.before or part.after or part.choice or part.spread for part in parts):
            raise CompileError(f"{layer.name}: the core adds the errors of two readers that neither pool nor mask")
        places = [part.int8[0] if part.int8 else part.sums for part in parts]
        exponents = [(part.int8[1],) if part.int8 else part.exponent for part in parts]
        result = self._pixels(f"{layer.name}.errors", places[0].layout.shape, "int32")
        exponent = f"{layer.name}.errors.exponent"
        self._sum(places, exponents, result, exponent, layer.name, "error add")
        stream = min((part.stream for part in parts if part.stream is not None), default=None)
        return Error(places[0].layout.shape, result, (exponent,), "", stream)

    def _product_backward(self, stage: Stage, error: Error, rate) -> Error | None:
        g, name, r = stage.g, stage.name, self.registers
        stage.e, exponent = self._round_error(error, stage.layer)
        out = (g.n, g.co) if isinstance(stage.layer, Linear) else (g.n, g.ho, g.wo, g.co)
        self.tensors[f"{name}.error"] = Tensor(stage.e, out)
        below = None
        if stage is not self.stages[0]:
            shape = (g.n, g.h, g.w, g.ci)
            stage.ex = self._pixels(f"{name}.error_accumulator", shape, "int32")
            blocks = tiling.error(self.config, g, stage.e.address, stage.e.layout, stage.w.address, stage.w.layout,
                                  stage.ex.address, stage.ex.layout, r["error_maximum"])
            self._products(blocks, stage, "error", lambda band: [stage.e.name, stage.w.name],
                           [stage.ex.name, "error_maximum"])
            logical = shape if isinstance(stage.layer, Conv2d) else (g.n, *stage.layer.input_shape)
            self.tensors[f"{name}.error_accumulator"] = Tensor(stage.ex, logical)
            # The register of the sum: that of the layer's own error may serve another layer when this one is read.
            total = f"{name}.error_sum.exponent"
            self._scalar(self._exponent_scalars(total, (exponent, f"{name}.datapath.exponent")), name,
                         "error requantize")
            below = Error(shape, stage.ex, (total,), "error_maximum", (stage.layer.index, Purpose.ERROR))
        blocks = tiling.gradient(self.config, g, stage.e.address, stage.e.layout, stage.x.address, stage.x.layout,
                                 stage.dw.address, stage.dw.layout, r["gradient_maximum"])
        for block in blocks:
            self.program.add(Opcode.PRODUCT, block.sections, layer=name, step="gradient",
                             header={"base_b": IMAGES} if stage.x.name == "images" else {},
                             reads=[stage.e.name, stage.x.name], writes=[stage.dw.name, "gradient_maximum"])
        self._update(stage, exponent, rate)
        return below

    def _update(self, stage: Stage, error_exponent: str, rate: tuple[int, int]):
        """SGD of a layer's weights."""
        name, layer, r = stage.name, stage.layer, self.registers
        weight, momentum = (self.state_regions[f"{name}.{part}"] for part in ("weight", "momentum"))
        gradient = "gradient.exponent"
        self._scalar([(Op.EXPONENT, r[gradient], r[error_exponent], r[self.exponent_of[name]]),
                      (Op.BIT_LENGTH, r["length"], r["gradient_maximum"])], name, "update", reads=["gradient_maximum"])
        loops, w = self._weights_walk(weight)
        v, g = self._weights_walk(momentum)[1], self._weights_walk(stage.dw)[1]
        self._sgd(name, weight, momentum, loops, Sgd(rate), reads=[stage.dw.name], gradient=(X, "length", gradient),
                  weight_stream=w, momentum_stream=v, momentum_sources={"source0": g, "source1": v, "source2": w},
                  momentum_register=Y, weight_register=Z,
                  weight_random=self._weights_random(weight, layer.index, Purpose.WEIGHT),
                  momentum_random=self._weights_random(momentum, layer.index, Purpose.MOMENTUM))
        self._keep(weight.name, name, {f"{name}.gradient.exponent": gradient, f"{name}.error.exponent": error_exponent,
                                       f"{name}.activation.exponent": self.exponent_of[name]})
        self.registers.free(f"{name}.datapath.exponent")
        self._release(name, error_exponent)

    def _release(self, name: str, error_exponent: str):
        """The exponents of a layer's input and error serve no more, unless other layers read the same tensors."""
        register = self.exponent_of.pop(name)
        if register not in self.exponent_of.values():
            self.registers.free(register)
        if error_exponent.startswith(f"{name}."):
            self.registers.free(error_exponent)

    def _sgd(self, layer: str, weight: Region, momentum: Region, loops, sgd: Sgd, *, reads, gradient, weight_stream,
             momentum_stream, momentum_sources, momentum_register: int, weight_register: int = 0, prepare=(),
             weight_random, momentum_random):
        """`golden.dfp.sgd_step` of one tensor. The sums are computed twice: for their range, and to round them.

        ``gradient`` is (its lane register after the instructions ``prepare``, the scalar registers with its bit length
        and exponent); ``momentum_sources`` are the streams of the momentum's passes, which bring the old momentum and,
        if it decays, the weight in the lane registers named.
        """
        names = [weight.name, momentum.name, *reads]
        register, length, exponent = gradient
        weight_exponent, momentum_exponent = "weight.exponent", "momentum.exponent"
        self._fetch(weight.name, weight_exponent, layer)
        self._fetch(momentum.name, momentum_exponent, layer)

        def number(name):
            return self.registers[name]

        def update(program, writes=(), **fields):
            self._wide(program, loops, layer, "update", names, writes, **fields)

        def scalars(program):
            self._scalar(program, layer, "update")

        # Bit lengths of the two products with state, then the sum mu * v + g + lambda * w.
        decay = sgd.decay is not None
        update([(Wide.MUL, A, X, sgd.momentum[0]), (Wide.RANGE, 0, A),
                *([(Wide.MUL, A, Y, sgd.decay[0]), (Wide.RANGE, 1, A)] if decay else [])],
               source0=momentum_stream, ranges=1 + decay, **({"source1": weight_stream} if decay else {}))
        terms = [("range0", momentum_exponent, sgd.momentum[1], "distance0"), (length, exponent, 0, "distance1")]
        factors = [(momentum_register, sgd.momentum[0], "distance0"), (register, 1, "distance1")]
        if decay:
            terms.append(("range1", weight_exponent, sgd.decay[1], "distance2"))
            factors.append((weight_register, sgd.decay[0], "distance2"))
        scalars(self._alignment(terms, SGD_WINDOW))
        total = [*prepare, *microprograms.aligned(factors, number)]
        update([*total, (Wide.RANGE, 0, A)], ranges=1, **momentum_sources)
        scalars(self._state_scalars(momentum_exponent))
        rounded = microprograms.requantize(number, microprograms.STATE_CODE)
        update([*total, *rounded, (Wide.WRITE, A)], [momentum.name], target0=momentum_stream, random=momentum_random,
               **momentum_sources)

        # w - eta * v.
        sources = {"source0": weight_stream, "source1": momentum_stream}
        update([(Wide.RANGE, 1, X), (Wide.MUL, A, Y, sgd.rate[0]), (Wide.RANGE, 0, A)], ranges=2, **sources)
        scalars(self._alignment([("range1", weight_exponent, 0, "distance0"),
                                 ("range0", momentum_exponent, sgd.rate[1], "distance1")], SGD_WINDOW))
        total = microprograms.aligned([(X, 1, "distance0"), (Y, -sgd.rate[0], "distance1")], number)
        update([*total, (Wide.RANGE, 0, A)], ranges=1, **sources)
        scalars(self._state_scalars(weight_exponent))
        update([*total, *rounded, (Wide.WRITE, A)], [weight.name], target0=weight_stream, random=weight_random,
               **sources)

    # Programs

    def _prologue(self):
        """Once per doorbell: the microprograms."""
        words = self.programs.words
        for start in range(0, len(words), SCALAR_OPERATIONS):
            part = words[start:start + SCALAR_OPERATIONS]
            fields = {"count": len(part), "microprogram": 1, "microprogram_address": start,
                      **{f"operation{k}": word for k, word in enumerate(part)}}
            self.program.add(Opcode.SCALAR, {"scalar": fields}, layer="", step="microprograms")
        self.program.barrier()

    def _body(self, rate: tuple[int, int] | None):
        """One step: training at a rate, or inference."""
        training = rate is not None
        self._input_exponent()
        self._datapath_weights(training)
        self._forward(training)
        if training:
            self._backward(rate)

    def _compile(self, rate: tuple[int, int] | None) -> DfpCompiled:
        # Bodies that are thrown away: a training step gives tensors, registers and microprograms the places they have
        # in every program, and the prologue needs the microprograms of the body, which comes after it.
        state = dict(self.tensors)
        self._body(rate or (205, -11))
        self._body(rate)
        self.program, self.tensors = ProgramBuilder(self.first_tag), state
        self._prologue()
        self._body(rate)
        compiled = self._finish()
        return DfpCompiled(**{field.name: getattr(compiled, field.name) for field in dataclasses.fields(compiled)},
                           state_regions=self.state_regions)

    def training(self, rate: tuple[int, int]) -> DfpCompiled:
        return self._compile(rate)

    def inference(self) -> DfpCompiled:
        return self._compile(None)
