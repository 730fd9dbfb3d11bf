"""WAGE: ternary weights, 8-bit activations, errors and masters, in pure integers (contract section 6, wage.md
6).

Units: masters 2**(1-kG), ternary digits 2**(1-kW) / alpha, activations 2**(1-kA); errors have none, their
scale is thrown away. Layer order: product, max-pool of the sums, ReLU, quantisation; the last layer stays
unquantised.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import numpy as np

from golden import random
from golden.errors import InputError
from golden.execution import Execution, Trace
from golden.networks import Add, BatchNorm, Conv2d, GlobalAveragePool, MaxPool, Relu
from golden.random import Purpose
from golden.range import max_magnitude, nearest_log2
from golden.rounding import half_even, saturate, stochastic_16

MASTER_LIMIT = 64


@dataclass(frozen=True)
class Widths:
    """Bits of weights, activations, gradients (masters) and errors: "2888" in the paper's notation."""

    weight: int = 2
    activation: int = 8
    gradient: int = 8
    error: int = 8

    def __post_init__(self):
        for name, low, high in (
            ("weight", 2, 8),
            ("activation", 2, 8),
            ("gradient", 4, 16),
            ("error", 2, 12),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise InputError(f"wage {name} width must be {low}..{high} bits, got {value}")
        if self.gradient <= self.weight:
            raise InputError(f"wage masters must be wider than weights, got {self.gradient} and {self.weight} bits")

    @classmethod
    def parse(cls, text: str) -> Widths:
        """From the paper's notation: a hexadecimal digit each for weights, activations, gradients and errors."""
        if len(text) != 4 or not set(text.upper()) <= set("0123456789ABCDEF"):
            raise InputError(f"wage widths are four hexadecimal digits such as 2888, got {text!r}")
        return cls(*(int(digit, 16) for digit in text))


WIDTHS = Widths()


def convert_input(pixels) -> np.ndarray:
    """Pixels 0..255 -> int8 in units of 1/128: p / 127.5 - 1 quantised. Never 0."""
    p = np.asarray(pixels, dtype=np.int64)
    if p.size and not 0 <= int(p.min()) <= int(p.max()) <= 255:
        raise InputError(f"pixels must be 0..255, got {p.min()}..{p.max()}")
    return np.clip(p - 128 + (p >> 7), -127, 127).astype(np.int8)


def alpha_shift(fan_in: int, weight_bits: int = 2) -> int:
    """log2 of the layer's constant alpha: the largest j >= 0 with 3 * fan_in >= 2**(2j + 2 * weight_bits -
    1).
    """
    if fan_in < 1:
        raise ValueError(f"fan_in must be at least 1, got {fan_in}")
    j = 0
    while 3 * fan_in >= 1 << (2 * (j + 1) + 2 * weight_bits - 1):
        j += 1
    return j


def ternarize(master, widths: Widths = WIDTHS) -> np.ndarray:
    """The datapath weight of a master: -1, 0, 1 by default (0 for magnitudes up to 32)."""
    return saturate(half_even(master, widths.gradient - widths.weight), widths.weight).astype(np.int8)


def quantize_activation(acc, shift: int, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Sums -> (int8, blocked): half-even of acc / 2**shift, and where |acc| exceeds the range. No ReLU
    inside.
    """
    acc = np.asarray(acc)
    limit = (1 << (bits - 1)) - 1
    return saturate(half_even(acc, shift), bits).astype(np.int8), np.abs(acc) > limit << shift


def label_error(logits, exponent: int, labels) -> np.ndarray:
    """Error sums of int32 logits [n][classes]: logit minus 1 (in the logits' units) at the label."""
    raw = logits.copy()
    raw[np.arange(len(raw)), labels] -= 1 << -exponent
    return raw


def quantize_error(raw, bits: int = 8) -> tuple[np.ndarray, int]:
    """Raw error sums -> (int8 or int16, k), normalised by 2**k, k = nearest log2 of the maximum; zeros stay
    zero.
    """
    raw = np.asarray(raw)
    out = np.int8 if bits <= 8 else np.int16
    maximum = max_magnitude(raw)
    if maximum == 0:
        return np.zeros(raw.shape, out), 0
    k = nearest_log2(maximum)
    return saturate(half_even(raw, k - (bits - 1)), bits).astype(out), k


def weight_step(acc, log2_rate: int, draw) -> np.ndarray:
    """Gradient sums -> master steps (int64): rate * acc / 2**k rounded by the 16-bit `draw`s; zeros give no
    step.
    """
    acc = np.asarray(acc, dtype=np.int64)
    maximum = max_magnitude(acc)
    if maximum == 0:
        return np.zeros(acc.shape, np.int64)
    shift = nearest_log2(maximum) - log2_rate
    if shift <= 0:
        return acc << -shift
    return stochastic_16(acc, shift, draw)


def update(master, step, limit: int = MASTER_LIMIT) -> np.ndarray:
    """clip(master - step, -limit, limit) in the master's type."""
    master = np.asarray(master)
    return np.clip(master.astype(np.int64) - step, -limit, limit).astype(master.dtype)


def initial_masters(seed: int, layer: int, shape: tuple[int, ...], fan_in: int, widths: Widths = WIDTHS) -> np.ndarray:
    """Masters on the weight grid. Two-bit weights: a ternary digit each; wider ones: uniform +-sqrt(3 /
    fan_in).
    """
    words = random.words(seed, 0, random.initial_weights_stream(layer), shape)
    out = np.int8 if widths.gradient <= 8 else np.int16
    bound = max(math.sqrt(3 / fan_in), 1.5 * 2.0 ** (1 - widths.weight))
    if widths.weight == 2:
        level = ((words.astype(np.int64) * 3) >> 32) - 1
    else:
        uniform = (2 * words.astype(np.float64) / 2**32 - 1) * bound
        level = saturate(np.rint(uniform * 2 ** (widths.weight - 1)), widths.weight)
    return (level << (widths.gradient - widths.weight)).astype(out)


@dataclass(frozen=True)
class Block:
    """A weight layer and what follows it up to the next one. `pool` is 1 without pooling."""

    layer: object
    pool: int
    relu: bool
    last: bool


def blocks(description) -> tuple[Block, ...]:
    """The network in WAGE's layer order, whichever way round it lists ReLU and pooling: their values are
    equal.
    """
    result = []
    layers = description.layers
    starts = [i for i, layer in enumerate(layers) if layer.has_weights]
    if starts[0] != 0:
        raise InputError(f"method wage needs {description.name} to begin with a convolution or linear layer")
    for start, end in zip(starts, [*starts[1:], len(layers)], strict=True):
        rest = layers[start + 1 : end]
        pools = [layer.size for layer in rest if isinstance(layer, MaxPool)]
        relu = any(isinstance(layer, Relu) for layer in rest)
        result.append(Block(layers[start], math.prod(pools), relu, end == len(layers)))
        if len(pools) > 1:
            raise InputError(
                f"method wage pools once per layer, {layers[start].name} is followed by {len(pools)} pools"
            )
    return tuple(result)


class Wage(Execution):
    """Trains a network by WAGE. Options: `widths`, `master_limit` (64, or 127 as the paper prints it)."""

    options = ("widths", "master_limit")
    rules = sys.modules[__name__]
    unsupported = (BatchNorm, Add, GlobalAveragePool)

    def __init__(
        self,
        method,
        description,
        seed,
        *,
        widths: str = "2888",
        master_limit: int | None = None,
        **options,
    ):
        super().__init__(method, description, seed, **options)
        widths = self.widths = Widths.parse(widths)
        full = (1 << (widths.gradient - 1)) - 1
        default = ((1 << (widths.weight - 1)) - 1) << (widths.gradient - widths.weight)
        self.master_limit = default if master_limit is None else master_limit
        if not 1 <= self.master_limit <= full:
            raise InputError(f"master_limit must be 1..{full}, got {master_limit}")
        self.blocks = blocks(description)
        self.weight_limit = (1 << (widths.weight - 1)) - 1
        self.error_limit = (1 << (widths.error - 1)) - 1
        for block in self.blocks:
            layer = block.layer
            master = initial_masters(seed, layer.index, layer.weight_shape, layer.fan_in, widths)
            self.state[f"{layer.name}.weight"] = master, 0

    def convert(self, images):
        self.check_images(images)
        pixels = images if self.data.scale == 255 else np.minimum(images.astype(np.int64) * 256 // self.data.scale, 255)
        if images.shape[3] == 1:
            # The paper gives a map for colour only. Grey images are mostly background: centre them on their mean.
            values = np.clip(pixels.astype(np.int64) - round(255 * self.data.mean[0]), -127, 127)
        else:
            values = convert_input(pixels)
        bits = self.widths.activation
        return saturate(half_even(values, 8 - bits), bits).astype(np.int8), 1 - bits

    def activation_shift(self, layer) -> int:
        """The constant shift from a layer's sums to activations."""
        return self.widths.weight - 1 + alpha_shift(layer.fan_in, self.widths.weight)

    def _forward(self, x, exponent, trace: Trace):
        for block in self.blocks:
            layer = block.layer
            name = layer.name
            t = self.rules.ternarize(self.state[f"{name}.weight"][0], self.widths)
            trace.weights[name] = t
            if not isinstance(layer, Conv2d):
                x = x.reshape(len(x), -1)
            trace.inputs[name] = trace.record[f"{name}.activation"] = x
            trace.record[f"{name}.activation.exponent"] = exponent
            if isinstance(layer, Conv2d):
                acc = self.ops.conv2d(x, t, layer.stride, layer.padding, limit_w=self.weight_limit)
            else:
                acc = self.ops.linear(x, t, limit_w=self.weight_limit)
            trace.intermediate(f"{name}.accumulator", acc)
            if block.pool > 1:
                acc, trace.choices[name] = self.ops.max_pool(acc, block.pool)
                trace.intermediate(f"{name}.choice", trace.choices[name])
            if block.last:
                return acc, exponent - self.activation_shift(layer)
            trace.masks[name] = acc <= 0
            if block.relu:
                acc = self.ops.relu(acc)
            x, blocked = self.rules.quantize_activation(acc, self.activation_shift(layer), self.widths.activation)
            trace.clipped[name] = blocked
        raise AssertionError("the last block returns")

    def _step(self, x, exponent, labels, trace: Trace):
        record, rate = trace.record, self.learning_rate()
        logits, exponent = self._forward(x, exponent, trace)
        record["logits"], record["logits.exponent"] = logits, exponent
        raw = self.rules.label_error(logits, exponent, labels)
        for block in reversed(self.blocks):
            layer = block.layer
            name = layer.name
            if not block.last:
                raw = raw.reshape(trace.clipped[name].shape) * ~trace.clipped[name]
            error, _ = self.rules.quantize_error(raw, self.widths.error)
            if not block.last:
                if block.relu:
                    error = error * ~trace.masks[name]
                if block.pool > 1:
                    error = self.ops.max_pool_error(error, trace.choices[name], block.pool)
            record[f"{name}.error"], record[f"{name}.error.exponent"] = error, 0
            x = trace.inputs[name]
            if isinstance(layer, Conv2d):
                gradient = self.ops.conv2d_gradient(
                    error, x, layer.kernel, layer.stride, layer.padding, self.error_limit
                )
            else:
                gradient = self.ops.linear_gradient(error, x, self.error_limit)
            record[f"{name}.gradient"] = gradient = self.ops.require_int32(gradient, f"{name}.gradient")
            if block is not self.blocks[0]:
                t = trace.weights[name]
                if isinstance(layer, Conv2d):
                    raw = self.ops.conv2d_error(
                        error,
                        t,
                        layer.input_shape[:2],
                        layer.stride,
                        layer.padding,
                        self.error_limit,
                        self.weight_limit,
                    )
                else:
                    raw = self.ops.linear_error(error, t, self.error_limit, self.weight_limit)
                trace.intermediate(f"{name}.error_accumulator", raw)
            self._update(layer, gradient, rate, record)

    def _draw(self, layer, shape):
        """The 16-bit draws that round the layer's update."""
        stream = random.stream(layer.index, Purpose.GRADIENT)
        return random.words(self.seed, self.step_index, stream, shape) >> 16

    def _update(self, layer, gradient: np.ndarray, rate: int, record) -> None:
        name = f"{layer.name}.weight"
        step = self.rules.weight_step(gradient, rate, self._draw(layer, gradient.shape))
        self.state[name] = self.rules.update(self.state[name][0], step, self.master_limit), 0
        record[name], record[f"{name}.exponent"] = self.state[name]

    def loss(self, logits, exponent, labels):
        """Half the squared distance to the one-hot label, mean over the batch; for reporting only."""
        z = np.ldexp(np.asarray(logits, np.float64), exponent)
        z[np.arange(len(z)), labels] -= 1
        return float((z * z).sum(axis=1).mean() / 2)
