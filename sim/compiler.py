"""Compiles a network, its method and a core configuration into a program image and a memory map.

The compiler decides where tensors lie, how products are cut into blocks (`sim.tiling`), and in which order the two
engines get their work. It computes no tensor values and no exponents: those are the core's work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from golden.dfp import Dfp
from golden.execution import Execution
from golden.networks import Conv2d, Flatten, Linear, MaxPool, Network, Relu
from golden.niti import LOSS_SHIFT, MODES, Niti
from golden.random import INDEX_MULTIPLIER, Purpose, stream
from golden.rounding import Rounding
from golden.wage import Wage
from hw import scalar
from hw.config import CoreConfig
from hw.descriptor import Opcode
from hw.scalar import Operation as Op
from hw.vector import Function

from . import tiling
from .layout import PixelTensor, RawTensor, WeightTensor, ceil_div
from .program import CompileError, MemoryMap, Program, ProgramBuilder, Region
from .tiling import Geometry

__all__ = ["Compiled", "CompileError", "compile_training", "compile_inference"]

IMAGES, LABELS, EXPONENTS = 1, 2, 3
"""Base registers that advance from step to step."""

FOLD_CHANNELS = 4
"""A first layer with at most this many channels is folded (docs/core.md)."""

INFERENCE_TAGS = 2048
"""Tags of inference programs start here, so that cycle counts tell them from training."""

CHUNK_VECTORS = 2048
"""Requantized activations leave in pieces of about this many vectors, so that the next product starts early."""


@dataclasses.dataclass
class Stage:
    """A weight layer with what follows it up to the next one, and its tensors."""

    layer: Conv2d | Linear
    g: Geometry
    relu: bool = False
    pool: bool = False
    x: Region = None                 # its input
    w: Region = None                 # int8 weights of the products
    master: Region = None            # trained state: the same, or the int16 masters
    y: Region = None                 # int32 forward product
    out: Region = None               # requantized, after ReLU and pooling
    choice: Region = None            # arg-max of the pooling windows; wage: states of all elements (hw.lanes)
    e: Region = None                 # error at the layer's output
    ex: Region = None                # int32 error product, at the layer's input
    dw: Region = None                # int32 weight gradient

    @property
    def name(self) -> str:
        return self.layer.name


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor of golden's record lies, and its logical shape there."""

    region: Region
    shape: tuple[int, ...]
    mask: int = -1                   # which bits of an element are the tensor

    def unpack(self, raw: np.ndarray) -> np.ndarray:
        return self.region.layout.unpack(raw).reshape(self.shape) & self.mask


@dataclasses.dataclass
class Compiled:
    """A program with its memory: what the host writes before the doorbell and what it may read after a step."""

    config: CoreConfig
    network: Network
    method: str
    batch: int
    steps: int
    program: Program
    regions: dict[str, Region]
    tensors: dict[str, Tensor]               # record name -> tensor
    scalars: dict[str, int]                  # record name -> register in the dump
    dump: Region
    memory_bytes: int
    stages: list[Stage]

    @property
    def macs(self) -> dict[tuple[str, str], int]:
        """Useful multiply-accumulates of a step by (layer, pass)."""
        return {(layer, step): stage.g.macs for stage in self.stages for layer, step in self.program.tags
                if layer == stage.name and step in ("forward", "error", "gradient")}

    def state(self, values: dict) -> Iterable[tuple[Region, bytes]]:
        """What to write for a state ``{name: (array, exponent)}`` (golden's ``network.state``)."""
        exponents = np.zeros(len(self.stages), "<i4")
        for k, stage in enumerate(self.stages):
            array, exponents[k] = values[f"{stage.name}.weight"]
            yield stage.master, stage.master.layout.pack(array)
        if "weight exponents" in self.regions:
            region = self.regions["weight exponents"]
            yield region, region.layout.pack(exponents)

    def batches(self, images: list[np.ndarray], labels: list[np.ndarray], exponents: list[int]):
        """What to write for the batches of consecutive steps: converted int8 images and labels."""
        for name, arrays in (("images", images), ("labels", labels)):
            region = self.regions[name]
            if len(arrays) > region.copies:
                raise ValueError(f"{len(arrays)} batches, but memory for {region.copies}")
            yield region, b"".join(region.layout.pack(array) for array in arrays)
        region = self.regions["exponents"]
        yield region, np.array(exponents, "<i4").tobytes()


class _Registers:
    """Names for the scalar registers."""

    def __init__(self):
        self.numbers: dict[str, int] = {}
        self.unused: list[int] = []

    def __getitem__(self, name: str) -> int:
        if name not in self.numbers:
            number = self.unused.pop() if self.unused else max(self.numbers.values(), default=0) + 1
            if number == scalar.STEP:
                raise CompileError("the network needs more than 62 scalar registers: it has too many layers")
            self.numbers[name] = number
        return self.numbers[name]

    def free(self, name: str):
        """From here on names that are new may take the register; the name keeps it for the passes before."""
        if self.numbers[name] not in self.unused:
            self.unused.append(self.numbers[name])


def geometry(layer: Conv2d | Linear, batch: int, shape: tuple[int, int, int], first: bool) -> Geometry:
    """The layer as a convolution of ``shape`` (h, w, c) images."""
    h, w, c = shape
    if isinstance(layer, Linear):
        if first:                            # the host stores the image as one long vector
            h, w, c = 1, 1, h * w * c
        return Geometry(name=layer.name, n=batch, h=h, w=w, ci=c, co=layer.features, kh=h, kw=w, ho=1, wo=1)
    ho, wo, co = layer.output_shape
    k = layer.kernel
    if first and c <= FOLD_CHANNELS:
        return Geometry(name=layer.name, n=batch, h=h, w=wo, ci=k * c, co=co, kh=k, kw=1, ho=ho, wo=wo,
                        stride=layer.stride, pad=layer.padding, folded=True, channels=c, kernel=k, image_w=w)
    return Geometry(name=layer.name, n=batch, h=h, w=w, ci=c, co=co, kh=k, kw=k, ho=ho, wo=wo, stride=layer.stride,
                    pad=layer.padding)


class Compiler:
    """Program and memory of a network. A subclass for each method adds its passes: `allocate`, `_prologue`,
    `_forward`, `_loss`, `_error` and `_gradient`.
    """

    pool_first = False                       # whether pooling may also come before ReLU

    def __init__(self, config: CoreConfig, network: Execution, batch: int, capacity: int, steps: int,
                 first_tag: int = 0):
        self.config, self.network = config, network
        if not 1 <= steps <= capacity:
            raise CompileError(f"a doorbell runs 1 to {capacity} steps, not {steps}")
        self.batch, self.capacity, self.steps = batch, capacity, steps
        self.memory = MemoryMap(config.line_bytes)
        self.program = ProgramBuilder(first_tag)
        self.registers = _Registers()
        self.tensors: dict[str, Tensor] = {}
        self.scalars: dict[str, int] = {}
        self.stages = self._stages(network.description)

    # The network as stages

    def _stages(self, description: Network) -> list[Stage]:
        stages: list[Stage] = []
        shape = description.input_shape
        for layer in description.layers:
            match layer:
                case Conv2d() | Linear():
                    stages.append(Stage(layer, geometry(layer, self.batch, shape, not stages)))
                    shape = layer.output_shape if isinstance(layer, Conv2d) else (1, 1, layer.features)
                case Relu() if stages and not stages[-1].relu and (self.pool_first or not stages[-1].pool):
                    stages[-1].relu = True
                case MaxPool(size=2) if stages and not stages[-1].pool and (self.pool_first or stages[-1].relu):
                    stages[-1].pool = True
                    shape = layer.output_shape
                case Flatten():
                    pass
                case _:
                    raise CompileError(f"layer {layer.name} of {description.name}: the core runs a convolution or "
                                       "linear layer, then ReLU, then 2x2 max-pool, in this order")
        return stages

    # Descriptors

    def _scalar(self, operations, stage_name: str, step: str, reads=(), writes=(), *, load=None, base=0, dump=None):
        words = scalar.assemble(operations)
        fields = {"count": len(words), **{f"operation{k}": word for k, word in enumerate(words)}}
        if load is not None:
            fields |= {"load": load, "enable_load": 1}
        if dump is not None:
            fields |= {"dump": dump, "enable_dump": 1}
        self.program.add(Opcode.SCALAR, {"scalar": fields}, layer=stage_name, step=step, reads=reads, writes=writes,
                         header={"base_a": base})

    def _vector(self, function: Function, loops, stage_name: str, step: str, reads, writes, *, source0=None,
                source1=None, source2=None, target0=None, target1=None, maximum=None, header=None, **fields):
        """One elementwise pass. ``loops`` are up to five counts; a stream is (address, strides, bytes per element).
        ``maximum`` : the scalar register that takes the largest magnitude of the results.
        """
        loops = list(loops) + [1] * (5 - len(loops))
        sections = {"function": function, **{f"count{k}": count for k, count in enumerate(loops)}, **fields}
        enable = (source1 is not None) | (source2 is not None) << 1 | (target1 is not None) << 2 | (
            target0 is not None) << 3 | (maximum is not None) << 4
        if maximum is not None:
            sections |= {"range_register": maximum, "range_clear": 1}
        for name, place in (("source0", source0), ("source1", source1), ("source2", source2), ("target0", target0),
                             ("target1", target1)):
            if place is None:
                continue
            address, strides, width = place
            sections[name] = address
            sections |= {f"{name}_stride{k}": stride for k, stride in enumerate(strides)}
            if name != "target1":
                sections["target_width" if name == "target0" else f"{name}_width"] = {1: 0, 2: 1, 4: 2}[width]
        self.program.add(Opcode.VECTOR, {"vector": sections | {"enable": enable}}, layer=stage_name, step=step,
                         reads=reads, writes=writes, header=header)

    @staticmethod
    def _random(layer: int, purpose: Purpose, strides, start: int = 0) -> dict[str, int]:
        """Fields that give each element the contract's word of its row-major index: ``start`` in the first vector,
        ``strides`` by loop. Padding lanes get words too, but their zeros stay zero.
        """
        places = [start, *strides, *[0] * (5 - len(strides))]
        start, *strides = (place * INDEX_MULTIPLIER % 2**32 for place in places)
        return {"random_stream": stream(layer, purpose), "random_start": start,
                **{f"random_stride{k}": stride for k, stride in enumerate(strides)}}

    def _products(self, blocks, stage: Stage, step: str, reads, writes):
        """Product blocks; ``reads`` and ``writes`` map the block's band to tensor keys."""
        for block in blocks:
            self.program.add(Opcode.PRODUCT, block.sections, layer=stage.name, step=step, reads=reads(block.band),
                             writes=writes)

    def _chunks(self, out: PixelTensor) -> list[range]:
        """Images in which a requantized activation leaves."""
        n, h, w, _ = out.shape
        count = max(1, min(n, out.planes * n * h * w // CHUNK_VECTORS))
        size = ceil_div(n, count)
        return [range(k, min(k + size, n)) for k in range(0, n, size)]

    def _keys(self, region: Region, images: range) -> list:
        """Dependency keys of the pieces of an activation that hold these images."""
        if region.name == "images":
            return []
        return [(region.name, chunk.start) for chunk in self._chunks(region.layout)
                if chunk.start < images.stop and images.start < chunk.stop]

    # Memory

    def _allocate(self):
        v, line = self.config.vector, self.config.line_bytes
        add = self.memory.add
        for k, stage in enumerate(self.stages):
            g, name = stage.g, stage.name
            if k == 0:
                layout = (RawTensor((g.n, g.h, g.image_w, g.channels), line) if g.folded
                          else PixelTensor((g.n, g.h, g.w, g.ci), v))
                stage.x = add("images", layout, self.capacity)
            else:
                stage.x = self.stages[k - 1].out
            self._allocate_weights(stage)
            self._allocate_outputs(stage, stage is self.stages[-1])
            stage.e = add(f"{name}.error", PixelTensor((g.n, g.ho, g.wo, g.co), v))
            stage.dw = add(f"{name}.gradient", WeightTensor((g.co, g.kh, g.kw, g.ci), v, "int32"))
            if k:
                stage.ex = add(f"{name}.error_accumulator", PixelTensor((g.n, g.h, g.w, g.ci), v, "int32"))
        self.labels = add("labels", PixelTensor((self.batch, 1, 1, 1), v, "uint8"), self.capacity)
        self.exponents = add("exponents", RawTensor((self.capacity,), line, "int32"))
        self._allocate_rest()
        self.dump = add("scalars", RawTensor((scalar.REGISTERS,), line, "int32"))

    def _allocate_rest(self):
        """What a method keeps once per network."""

    def _activation_layout(self, stage: Stage) -> PixelTensor:
        """Of the layer's output after pooling."""
        g = stage.g
        rows, columns = (g.ho // 2, g.wo // 2) if stage.pool else (g.ho, g.wo)
        return PixelTensor((g.n, rows, columns, g.co), self.config.vector)

    def _following(self, stage: Stage) -> str:
        """What the record calls the layer's output."""
        k = self.stages.index(stage)
        return "logits" if stage is self.stages[-1] else f"{self.stages[k + 1].name}.activation"

    # Passes that methods share

    def _forward_products(self, k: int, maximum: int):
        stage = self.stages[k]
        blocks = tiling.forward(self.config, stage.g, stage.x.address, stage.x.layout, stage.w.address, stage.w.layout,
                                stage.y.address, stage.y.layout, maximum)
        for block in blocks:
            header = {"base_a": IMAGES} if k == 0 else {}
            band = block.band
            self.program.add(Opcode.PRODUCT, block.sections, layer=stage.name, step="forward", header=header,
                             reads=[*self._keys(stage.x, range(band.n0, band.n0 + band.n)), stage.w.name],
                             writes=[stage.y.name, maximum])

    def _error_products(self, k: int, maximum: int):
        stage = self.stages[k]
        self._products(tiling.error(self.config, stage.g, stage.e.address, stage.e.layout, stage.w.address,
                                    stage.w.layout, stage.ex.address, stage.ex.layout, maximum),
                       stage, "error", lambda band: [stage.e.name, stage.w.name], [stage.ex.name, maximum])

    def _gradient_products(self, k: int, maximum: int):
        stage = self.stages[k]
        blocks = tiling.gradient(self.config, stage.g, stage.e.address, stage.e.layout, stage.x.address,
                                 stage.x.layout, stage.dw.address, stage.dw.layout, maximum)
        for block in blocks:
            band = block.band
            self.program.add(Opcode.PRODUCT, block.sections, layer=stage.name, step="gradient",
                             header={"base_b": IMAGES} if k == 0 else {},
                             reads=[stage.e.name, *self._keys(stage.x, range(band.n0, band.n0 + band.n))],
                             writes=[stage.dw.name, maximum])

    def _to_activations(self, stage: Stage, second: Region | None, **fields):
        """Sums to int8 activations, after pooling; ``second`` takes target 1."""
        y, out = stage.y.layout, stage.out.layout
        _, ho, wo, _ = y.shape
        _, h, w, _ = out.shape
        for chunk in self._chunks(out):
            first, count = chunk.start, len(chunk)
            a, b = y.vector_bytes, out.vector_bytes
            source = stage.y.address + first * ho * wo * a
            offset = first * h * w * b
            if stage.pool:
                loops, strides = (out.planes, count * h, w, 2, 2), (out.plane_bytes, w * b, b, 0, 0)
                walk = y.plane_bytes, 2 * wo * a, 2 * a, wo * a, a
            else:
                loops, strides = (out.planes, count, h * w), (out.plane_bytes, h * w * b, b)
                walk = y.plane_bytes, h * w * a, a
            writes, more = [(stage.out.name, first)], {}
            if second:
                writes.append((second.name, first))
                more["target1"] = second.address + offset, strides, 1
            self._vector(Function.ELEMENTWISE, loops, stage.name, "requantize", [stage.y.name, "shift"], writes,
                         source0=(source, walk, 4), target0=(stage.out.address + offset, strides, 1), relu=stage.relu,
                         pool=stage.pool, **more, **fields)

    def _to_errors(self, k: int, mask: Region | None, choice: Region | None, **fields):
        """Error sums at the input of stage k to int8 errors at the output of the stage below. ``mask`` and ``choice``
        are sources 1 and 2; with pooling every result is offered to the four pixels of its window.
        """
        stage, below = self.stages[k], self.stages[k - 1]
        ex, e, x = stage.ex.layout, below.e.layout, stage.x.layout
        n, h, w, _ = ex.shape
        a, b = ex.vector_bytes, e.vector_bytes
        if below.pool:
            loops, strides = (e.planes, n * h, 2, w, 2), (x.plane_bytes, w * b, 0, b, 0)
            source = ex.plane_bytes, w * a, 0, a, 0
            target = e.plane_bytes, 4 * w * b, 2 * w * b, 2 * b, b
        else:
            loops, strides = (e.planes, n, h * w), (x.plane_bytes, h * w * b, b)
            source, target = (ex.plane_bytes, h * w * a, a), (e.plane_bytes, h * w * b, b)
        more = {}
        if mask:
            more |= {"mask": 1, "source1": (mask.address, strides, 1)}
        if choice:
            more["source2"] = choice.address, strides, 1
        self._vector(Function.ELEMENTWISE, loops, stage.name, "error requantize",
                     [stage.ex.name, "shift", *self._keys(stage.x, range(n))], [below.e.name],
                     source0=(stage.ex.address, source, 4), target0=(below.e.address, target, 1), unpool=below.pool,
                     **more, **fields)

    def _to_datapath(self, stage: Stage, step: str, reads=(), **fields):
        """The int8 weights of the products, from the masters."""
        v, width = self.config.vector, stage.master.layout.itemsize
        tiles = stage.master.layout.nbytes // stage.master.layout.tile_bytes
        self._vector(Function.ELEMENTWISE, (1, tiles, v), stage.name, step, [stage.master.name, *reads],
                     [stage.w.name], source0=(stage.master.address, (0, width * v * v, width * v), width),
                     target0=(stage.w.address, (0, v * v, v), 1), **fields)

    def _input_exponent(self):
        register = self.registers[f"{self.stages[0].name}.activation.exponent"]
        self._scalar([(Op.WORD, register)], self.stages[0].name, "exponents", load=self.exponents.address,
                     base=EXPONENTS)
        self.scalars[f"{self.stages[0].name}.activation.exponent"] = register

    def _finish(self) -> Compiled:
        # A program that ends with a product (logits that are sums) must not report before it.
        self._scalar([], "", "step done", reads=[self.stages[-1].y.name], dump=self.dump.address)
        increments = {IMAGES: self.stages[0].x.nbytes, LABELS: self.labels.nbytes, EXPONENTS: 4}
        self.program.loop(self.steps, increments)
        self.program.end()
        # The program comes last in memory, so programs of one network share the addresses of all tensors.
        place = self.memory.add("program", RawTensor((self.program.nbytes,), self.config.line_bytes, "uint8"))
        return Compiled(self.config, self.network.description, self.network.method, self.batch, self.steps,
                        self.program.finish(place.address, self.steps), self.memory.regions, self.tensors, self.scalars,
                        self.dump, ceil_div(self.memory.next, 4096) * 4096, self.stages)

    def training(self, rate: int) -> Compiled:
        self._allocate()
        self._prologue()
        self.program.barrier()
        self._input_exponent()
        for k in range(len(self.stages)):
            self._forward(k, True)
        self._loss()
        for k in reversed(range(len(self.stages))):
            if k:
                self._error(k)
            self._gradient(k, rate)
        for k, stage in enumerate(self.stages):
            name, g = stage.name, stage.g
            x_shape = (g.n, g.h, g.image_w, g.channels) if g.folded else (g.n, g.h, g.w, g.ci)
            if k == 0:
                x_shape = (g.n, *self.network.description.input_shape)
            elif isinstance(stage.layer, Linear):
                x_shape = (g.n, g.h * g.w * g.ci)
            out = (g.n, g.co) if isinstance(stage.layer, Linear) else (g.n, g.ho, g.wo, g.co)
            weights = stage.layer.weight_shape
            self.tensors |= {f"{name}.activation": Tensor(stage.x, x_shape), f"{name}.error": Tensor(stage.e, out),
                             f"{name}.gradient": Tensor(stage.dw, weights),
                             f"{name}.weight": Tensor(stage.master, weights),
                             f"{name}.accumulator": Tensor(stage.y, out)}
            if k:
                self.tensors[f"{name}.error_accumulator"] = Tensor(stage.ex, x_shape)
        self.tensors["logits"] = Tensor(self.stages[-1].out, (self.batch, self.stages[-1].g.co))
        return self._finish()

    def inference(self) -> Compiled:
        self._allocate()
        self._prologue()
        self.program.barrier()
        self._input_exponent()
        for k in range(len(self.stages)):
            self._forward(k, False)
        self.tensors["logits"] = Tensor(self.stages[-1].out, (self.batch, self.stages[-1].g.co))
        return self._finish()


class NitiCompiler(Compiler):
    def __init__(self, config: CoreConfig, network: Niti, *sizes):
        super().__init__(config, network, *sizes)
        self.mode = network.mode
        self.wide = network.weight_bits == 16

    def _allocate_weights(self, stage: Stage):
        g, v, name = stage.g, self.config.vector, stage.name
        shape = (g.co, g.kh, g.kw, g.ci)
        stage.w = self.memory.add(f"{name}.datapath" if self.wide else f"{name}.weight", WeightTensor(shape, v))
        stage.master = (self.memory.add(f"{name}.weight", WeightTensor(shape, v, "int16")) if self.wide else stage.w)

    def _allocate_outputs(self, stage: Stage, last: bool):
        g, add, out = stage.g, self.memory.add, self._activation_layout(stage)
        stage.y = add(f"{stage.name}.accumulator", PixelTensor((g.n, g.ho, g.wo, g.co), self.config.vector, "int32"))
        stage.out = add(self._following(stage), out)
        if stage.pool:
            stage.choice = add(f"{stage.name}.choice", out)

    def _allocate_rest(self):
        self.weight_exponents = self.memory.add("weight exponents",
                                                RawTensor((len(self.stages),), self.config.line_bytes, "int32"))

    def _prologue(self):
        """Once per doorbell: weight exponents from memory, and the int8 weights of wide masters."""
        for k, stage in enumerate(self.stages):
            register = self.registers[f"{stage.name}.weight.exponent"]
            self.scalars[f"{stage.name}.weight.exponent"] = register
            program = [(Op.WORD, register)]
            if self.wide:                    # the int8 weights are the masters without their low 8 bits
                self.scalars[f"{stage.name}.weight.exponent"] = master = self.registers[f"{stage.name}.master"]
                program = [(Op.WORD, master), (Op.ADDI, register, master, 8)]
            self._scalar(program, stage.name, "exponents", load=self.weight_exponents.address + 4 * k)
            if self.wide:
                self._narrow(stage)

    def _narrow(self, stage: Stage):
        self._scalar([(Op.SET, self.registers["shift"], 8)], stage.name, "narrow", writes=["shift"])
        self._to_datapath(stage, "narrow", ["shift"], shift_register=self.registers["shift"],
                          rounding=Rounding.PSEUDO_STOCHASTIC.code)

    def _forward(self, k: int, training: bool):
        stage, r = self.stages[k], self.registers
        maximum = r[f"{stage.name}.maximum"]
        self._forward_products(k, maximum)
        self._requantize_scalars(stage, "requantize", maximum, f"{stage.name}.activation.exponent",
                                 f"{stage.name}.weight.exponent", f"{self._following(stage)}.exponent")
        self._to_activations(stage, stage.choice if training else None, shift_register=r["shift"],
                             rounding=self.mode.activation.code)

    def _requantize_scalars(self, stage: Stage, step: str, maximum: int, exponent_a: str, exponent_b: str, result: str):
        """shift = max(ceil_log2(maximum) - 7, 0), raised to the method's minimum; exponents add up."""
        r = self.registers
        shift, exponent = r["shift"], r[result]
        program = [(Op.CEIL_LOG2, shift, maximum), (Op.ADDI, shift, shift, -7), (Op.MAX, shift, shift, scalar.ZERO)]
        if self.mode.minimum_shift == 2:     # 1 becomes 2
            program += [(Op.SET, r["two"], 2), (Op.ADDI, r["temporary"], shift, -1),
                        (Op.SELECT_ZERO, shift, r["two"], shift, r["temporary"])]
        elif self.mode.minimum_shift != 1:
            raise CompileError(f"no rule for a minimum shift of {self.mode.minimum_shift}")
        program += [(Op.EXPONENT, exponent, r[exponent_a], r[exponent_b]), (Op.EXPONENT, exponent, exponent, shift)]
        self._scalar(program, stage.name, step, reads=[maximum], writes=["shift"])
        self.scalars[result] = exponent

    def _loss(self):
        stage, r = self.stages[-1], self.registers
        out, e = stage.out.layout, stage.e.layout
        classes = stage.g.co
        exponent = r[f"{stage.name}.error.exponent"]
        self._scalar([(Op.SET, exponent, 0)], stage.name, "loss")
        self.scalars[f"{stage.name}.error.exponent"] = exponent
        v = self.config.vector
        self._vector(Function.NITI_LOSS, (1, 1, self.batch, 1, out.planes), stage.name, "loss",
                     [*self._keys(stage.out, range(self.batch))], [stage.e.name],
                     source0=(stage.out.address, (0, 0, v, 0, out.plane_bytes), 1),
                     source1=(self.labels.address, (0, 0, v), 1),
                     target0=(stage.e.address, (0, 0, v, 0, e.plane_bytes), 1),
                     shift_register=r["logits.exponent"], classes=classes, header={"base_b": LABELS})
        if LOSS_SHIFT != 4 or self.mode.loss is not Rounding.PSEUDO_STOCHASTIC:
            raise CompileError("the loss unit rounds by pseudo_stochastic with a shift of 4 only")

    def _error(self, k: int):
        stage, below, r = self.stages[k], self.stages[k - 1], self.registers
        maximum = r[f"{stage.name}.error_maximum"]
        self._error_products(k, maximum)
        self._requantize_scalars(stage, "error requantize", maximum, f"{stage.name}.error.exponent",
                                 f"{stage.name}.weight.exponent", f"{below.name}.error.exponent")
        self._to_errors(k, stage.x if below.relu else None, below.choice, shift_register=r["shift"],
                        rounding=self.mode.error.code)

    def _gradient(self, k: int, rate: int):
        stage, r = self.stages[k], self.registers
        maximum = r[f"{stage.name}.gradient_maximum"]
        self._gradient_products(k, maximum)
        shift = r["shift"]
        # A maximum of 0 or 1 gives no update: a shift of 62 rounds everything to zero.
        self._scalar([(Op.CEIL_LOG2, r["temporary"], maximum),
                      (Op.ADDI, shift, r["temporary"], -(rate + 8 * self.wide)), (Op.SET, r["all"], 62),
                      (Op.SELECT_ZERO, shift, r["all"], shift, r["temporary"])], stage.name, "update",
                     reads=[maximum], writes=["shift"])
        dw, master = stage.dw.layout, stage.master.layout
        v, size = self.config.vector, master.itemsize
        tiles = dw.co_tiles * dw.shape[1] * dw.shape[2] * dw.ci_tiles
        loops = (ceil_div(tiles, 256), min(tiles, 256), v) if tiles % 256 == 0 or tiles < 256 else (1, tiles, v)

        def linear(region, width):
            return region.address, (256 * v * v * width, v * v * width, v * width), width
        self._vector(Function.UPDATE, loops, stage.name, "update", [stage.dw.name, "shift", stage.master.name],
                     [stage.master.name], source0=linear(stage.dw, 4), source1=linear(stage.master, size),
                     target0=linear(stage.master, size), shift_register=shift, rounding=self.mode.gradient.code)
        if self.wide:
            self._narrow(stage)


def _compiler(config: CoreConfig, network: Execution, *sizes) -> Compiler:
    from .dfp import DfpCompiler
    from .wage import WageCompiler

    compilers = {Niti: ("niti", NitiCompiler), Wage: ("wage", WageCompiler), Dfp: ("dfp", DfpCompiler)}
    if type(network) not in compilers:
        raise CompileError(f"the core does not run method {network.method!r}; it runs {', '.join(MODES)}, wage, dfp")
    method, compiler = compilers[type(network)]
    if method not in config.methods:
        raise CompileError(f"core {config.name!r} is built for {', '.join(config.methods)}, not for {method}: choose "
                           f"another core, or add {method} to its methods")
    return compiler(config, network, *sizes)


def compile_training(config: CoreConfig, network: Execution, *, batch: int, capacity: int, steps: int,
                     rate: int) -> Compiled:
    """A program of ``steps`` whole training steps at one learning rate (golden.schedules), with memory
    for ``capacity`` batches. Raises :class:`CompileError` when the network does not fit the core.
    """
    return _compiler(config, network, batch, capacity, steps).training(rate)


def compile_inference(config: CoreConfig, network: Execution, *, batch: int, capacity: int, steps: int) -> Compiled:
    """A program of ``steps`` forward passes; logits are read after each step-done write. Tensors lie where the
    training program of the same capacity has them, so it uses the weights trained there.
    """
    return _compiler(config, network, batch, capacity, steps, INFERENCE_TAGS).inference()
