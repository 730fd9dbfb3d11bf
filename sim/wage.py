"""The passes of WAGE (golden.wage) at 2-8-8-8.

Masters are the trained state; the products take the ternary weights that a vector pass makes of them. Sums are pooled
before they are rounded, and a state byte per activation (:func:`hw.lanes.lane_state`) keeps what the backward pass
needs: which pixel of the window, whether the sum was clipped, whether ReLU blocked it. Shifts of activations are
constants; errors and gradients are normalised by the nearest power of two of their maximum. The maximum of an error
comes from a pass of its own, because it leaves out what was clipped.
"""

from __future__ import annotations

from golden.random import Purpose
from golden.rounding import Rounding
from golden.wage import WIDTHS, Wage
from hw import scalar
from hw.config import CoreConfig
from hw.lanes import lane_state
from hw.scalar import Operation as Op
from hw.vector import Function

from .compiler import LABELS, Compiler, Stage, Tensor
from .layout import PixelTensor, WeightTensor
from .program import CompileError

__all__ = ["WageCompiler"]

CLIPPED, INACTIVE = 1, 2
"""Bits of the descriptor's ``blocked``."""

POSITION = (1 << lane_state()["position"].width) - 1
"""Bits of a state byte that hold the place in the pooling window."""

TERNARY_SHIFT = WIDTHS.gradient - WIDTHS.weight
TERNARY_LIMIT = (1 << WIDTHS.weight - 1) - 1

LARGEST_RATE = 6
"""log2 of the learning rate up to which a step fits int8: a normalised gradient is at most sqrt(2)."""


class WageCompiler(Compiler):
    pool_first = True

    def __init__(self, config: CoreConfig, network: Wage, *sizes):
        if network.widths != WIDTHS:
            w = network.widths
            raise CompileError(f"the core runs wage with widths 2888 only, not {w.weight:X}{w.activation:X}"
                               f"{w.gradient:X}{w.error:X}")
        super().__init__(config, network, *sizes)

    # Memory

    def _allocate_weights(self, stage: Stage):
        g, v = stage.g, self.config.vector
        stage.w, stage.master = (self.memory.add(f"{stage.name}.{what}", WeightTensor((g.co, g.kh, g.kw, g.ci), v))
                                 for what in ("datapath", "weight"))

    def _allocate_outputs(self, stage: Stage, last: bool):
        g, add, name = stage.g, self.memory.add, stage.name
        sums = PixelTensor((g.n, g.ho, g.wo, g.co), self.config.vector, "int32")
        stage.y = add("logits" if last else f"{name}.accumulator", sums)
        if last:
            if stage.pool or stage.relu:
                raise CompileError(f"layer {name} of {self.network.description.name}: nothing may follow the last "
                                   "layer of wage")
            stage.out, self.loss_sums = stage.y, add("loss sums", sums)
            return
        stage.out = add(self._following(stage), self._activation_layout(stage))
        stage.choice = add(f"{name}.state", self._activation_layout(stage))

    # Scalars

    def _constant(self, value: int) -> int:
        """The register that the prologue sets to a value."""
        self.constants[value] = register = self.registers[f"constant {value}"]
        return register

    def _normalise(self, stage: Stage, step: str, maximum: int, less: int):
        """shift = nearest_log2(maximum) - less; of an all-zero tensor, whose shift does not matter, the core notes
        STATUS.zero."""
        shift = self.registers["shift"]
        self._scalar([(Op.NEAREST_LOG2, shift, maximum), (Op.ADDI, shift, shift, -less)], stage.name, step,
                     reads=[maximum], writes=["shift"])

    def _prologue(self):
        """Once per doorbell: constants, and the ternary weights of the masters."""
        self.constants: dict[int, int] = {}
        shifts = [TERNARY_SHIFT, *(self.network.activation_shift(stage.layer) for stage in self.stages[:-1])]
        self._scalar([(Op.SET, self._constant(shift), shift) for shift in dict.fromkeys(shifts)], "", "constants")
        for stage in self.stages:
            self.scalars[f"{stage.name}.weight.exponent"] = scalar.ZERO
            self._ternarize(stage)

    def _ternarize(self, stage: Stage):
        self._to_datapath(stage, "ternarize", shift_register=self._constant(TERNARY_SHIFT),
                          rounding=Rounding.HALF_EVEN.code, limit=TERNARY_LIMIT)

    # Passes

    def _forward(self, k: int, training: bool):
        stage, r = self.stages[k], self.registers
        self._forward_products(k, r["unused maximum"])
        # Activations keep the exponent of the images.
        self.scalars[f"{stage.name}.activation.exponent"] = images = r[f"{self.stages[0].name}.activation.exponent"]
        shift = self.network.activation_shift(stage.layer)
        if stage is self.stages[-1]:
            self.scalars["logits.exponent"] = exponent = r["logits.exponent"]
            self._scalar([(Op.ADDI, exponent, images, -shift)], stage.name, "exponents")
            return
        self._to_activations(stage, stage.choice if training else None, state=1,
                             shift_register=self._constant(shift), rounding=Rounding.HALF_EVEN.code)

    def _loss(self):
        stage, r = self.stages[-1], self.registers
        y, e, v = stage.y.layout, stage.e.layout, self.config.vector
        maximum = r[f"{stage.name}.loss_maximum"]
        sums = (0, 0, 4 * v, 0, y.plane_bytes), 4
        # 1.0 in units of the logits, whose exponent is that of int8 activations less the layer's shift.
        target = WIDTHS.activation - 1 + self.network.activation_shift(stage.layer)
        self._vector(Function.SQUARED_ERROR, (1, 1, self.batch, 1, y.planes), stage.name, "loss", [stage.y.name],
                     [self.loss_sums.name, maximum], source0=(stage.y.address, *sums),
                     source1=(self.labels.address, (0, 0, v), 1), target0=(self.loss_sums.address, *sums),
                     shift_register=scalar.ZERO, label_log2=target, maximum=maximum, header={"base_b": LABELS})
        self._normalise(stage, "loss", maximum, WIDTHS.error - 1)
        self._vector(Function.ELEMENTWISE, (1, 1, self.batch, 1, y.planes), stage.name, "loss",
                     [self.loss_sums.name, "shift"], [stage.e.name], source0=(self.loss_sums.address, *sums),
                     target0=(stage.e.address, (0, 0, v, 0, e.plane_bytes), 1), shift_register=r["shift"],
                     rounding=Rounding.HALF_EVEN.code, left=1)
        self.scalars[f"{stage.name}.error.exponent"] = scalar.ZERO

    def _error(self, k: int):
        stage, below, r = self.stages[k], self.stages[k - 1], self.registers
        self._error_products(k, r["unused maximum"])
        ex, x = stage.ex.layout, below.out.layout
        n, h, w, _ = ex.shape
        maximum = r[f"{stage.name}.error_maximum"]
        self._vector(Function.ELEMENTWISE, (ex.planes, n, h * w), stage.name, "error maximum",
                     [stage.ex.name, *self._keys(below.out, range(n))], [maximum],
                     source0=(stage.ex.address, (ex.plane_bytes, h * w * ex.vector_bytes, ex.vector_bytes), 4),
                     source2=(below.choice.address, (x.plane_bytes, h * w * x.vector_bytes, x.vector_bytes), 1),
                     shift_register=scalar.ZERO, target_width=2, blocked=CLIPPED, maximum=maximum)
        self._normalise(stage, "error requantize", maximum, WIDTHS.error - 1)
        self._to_errors(k, None, below.choice, shift_register=r["shift"], rounding=Rounding.HALF_EVEN.code, left=1,
                        blocked=CLIPPED | INACTIVE if below.relu else CLIPPED)
        self.scalars[f"{below.name}.error.exponent"] = scalar.ZERO

    def _gradient(self, k: int, rate: int):
        if not -8 <= rate <= LARGEST_RATE:
            raise CompileError(f"the core takes learning rates of 2**-8 to 2**{LARGEST_RATE} for wage, not 2**{rate}")
        stage, r = self.stages[k], self.registers
        maximum = r[f"{stage.name}.gradient_maximum"]
        self._gradient_products(k, maximum)
        self._normalise(stage, "update", maximum, rate)
        dw, master = stage.dw.layout, stage.master.layout
        co, kh, kw, ci = dw.shape
        v = self.config.vector

        def place(region, width):
            per_co, _, per_tap, tile = (stride * width for stride in master.strides)
            return region.address, (per_co, per_tap, tile, v * width), width
        self._vector(Function.UPDATE, (dw.co_tiles, kh * kw, dw.ci_tiles, v), stage.name, "update",
                     [stage.dw.name, "shift", stage.master.name], [stage.master.name], source0=place(stage.dw, 4),
                     source1=place(stage.master, 1), target0=place(stage.master, 1), shift_register=r["shift"],
                     rounding=Rounding.STOCHASTIC_16.code, left=1, limit=self.network.master_limit,
                     **self._random(stage.layer.index, Purpose.GRADIENT, (v * kh * kw * ci, ci, v, kh * kw * ci)))
        self._ternarize(stage)

    def training(self, rate: int):
        compiled = super().training(rate)
        for stage in self.stages[:-1]:
            if stage.pool:
                shape = stage.choice.layout.shape
                compiled.tensors[f"{stage.name}.choice"] = Tensor(stage.choice, shape, POSITION)
        return compiled
