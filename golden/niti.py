"""NITI: int8 tensors with one exponent each, and updates of a few bits (contract section 5).

`Niti` runs whole training steps; the functions above it are the arithmetic, one rule each. Tensors are
`(mantissas, exponent)` with value `mantissas * 2**exponent`. The two modes differ only in the roundings of
`MODES`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np

from golden import random
from golden.errors import InputError
from golden.execution import Execution, Record
from golden.networks import Add, BatchNorm, Conv2d, Flatten, GlobalAveragePool, Linear, MaxPool, Relu
from golden.range import ceil_log2, max_magnitude
from golden.rounding import Rounding, round_to, saturate

LOG2_E = 47274  # log2(e) * 2**15, truncated
TAYLOR_EXPONENT = -7  # at and below it the softmax is a second-order Taylor series
SMALLEST_EXPONENT = -20
LARGEST_EXPONENT = 4
OCTAVES = 10  # classes this many octaves below the largest have probability 0
PROBABILITY_BITS = 11
LOSS_SHIFT = 4


@dataclass(frozen=True)
class Mode:
    """Which rounding each place uses; `minimum_shift` replaces smaller positive shifts of activations and
    errors.
    """

    activation: Rounding
    error: Rounding
    gradient: Rounding
    loss: Rounding
    minimum_shift: int = 1


MODES = {
    "niti": Mode(Rounding.NEAREST, Rounding.NEAREST, Rounding.PSEUDO_STOCHASTIC, Rounding.PSEUDO_STOCHASTIC),
    "niti-2020": Mode(*[Rounding.PSEUDO_STOCHASTIC] * 4, minimum_shift=2),
}


def convert_input(x) -> tuple[np.ndarray, int]:
    """Real numbers -> (int8 mantissas, exponent), in float64: outside the step, the host's work.

    b = ceil(log2 max|x|) over the batch, m = half_even(x * 2**(7-b)) saturated, exponent b - 7.
    """
    x = np.asarray(x, dtype=np.float64)
    maximum = float(np.abs(x).max()) if x.size else 0.0
    if not np.isfinite(maximum):
        raise InputError("input values must be finite")
    b = _ceil_log2_float(maximum)
    return np.clip(np.rint(np.ldexp(x, 7 - b)), -127, 127).astype(np.int8), b - 7


def _ceil_log2_float(maximum: float) -> int:
    """ceil(log2 maximum) exactly, from the float's own exponent; 0 for 0."""
    if maximum == 0:
        return 0
    fraction, exponent = np.frexp(maximum)
    return int(exponent) - int(fraction == 0.5)


def requantize(acc, exponent: int, rounding=Rounding.NEAREST, minimum_shift: int = 1) -> tuple[np.ndarray, int]:
    """int32 sums -> (int8 mantissas, exponent), by the range of the whole tensor.

    `rounding` is any generator-free rule of `golden.rounding`. A positive shift below `minimum_shift` is
    raised to it.
    """
    acc = np.asarray(acc)
    maximum = max_magnitude(acc)
    shift = ceil_log2(maximum) - 7
    shift = max(shift, minimum_shift) if shift > 0 else 0
    return round_to(Rounding.of(rounding), acc, maximum, shift, 8), exponent + shift


def _truncating_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sign(a) * (np.abs(a) // b)


def loss_gradient(logits, exponent: int, labels, draw=None) -> np.ndarray:
    """Cross-entropy error of int8 logits [n][classes] with value logits * 2**exponent: int8, 1.0 is 128.

    Rounds by pseudo_stochastic, or by stochastic_magnitude when `draw` (0..15 per element) is given.
    """
    a = np.asarray(logits, dtype=np.int64)
    labels = np.asarray(labels)
    exponent = min(max(int(exponent), SMALLEST_EXPONENT), LARGEST_EXPONENT)
    if exponent > TAYLOR_EXPONENT:
        u = _truncating_divide(a * LOG2_E, np.int64(1 << 15))
        s = u << exponent if exponent >= 0 else _truncating_divide(u, np.int64(1 << -exponent))
        octave = np.maximum(s - (s.max(axis=1, keepdims=True) - OCTAVES), 0)
        p = (np.int64(1) << octave) - 1
    else:
        p = (1 << (1 - 2 * exponent)) + a * (1 << (1 - exponent)) + a * a
    g = (p << PROBABILITY_BITS) // p.sum(axis=1, keepdims=True)
    g[np.arange(len(g)), labels] -= g.sum(axis=1)
    rounding = Rounding.PSEUDO_STOCHASTIC if draw is None else Rounding.STOCHASTIC_MAGNITUDE
    return saturate(rounding.compute(g, LOSS_SHIFT, draw), 8).astype(np.int8)


def weight_gradient(acc, bits: int, width: int = 8) -> np.ndarray:
    """int32 sums -> update whose largest element is about 2**bits; `bits` may be 0 or less. int8 (int16 if
    wider).
    """
    acc = np.asarray(acc)
    maximum = max_magnitude(acc)
    b = ceil_log2(maximum)
    if b == 0:
        return np.zeros(acc.shape, np.int8 if width <= 8 else np.int16)
    return round_to(Rounding.PSEUDO_STOCHASTIC, acc, maximum, max(b - bits, 0), width)


def update(w, g, width: int = 8) -> np.ndarray:
    """saturate(w - g) in int8, or int16 for a wide master."""
    limit = (1 << (width - 1)) - 1
    result = np.subtract(w, g, dtype=np.int32)
    return np.clip(result, -limit, limit, out=result).astype(np.int8 if width <= 8 else np.int16)


def initial_weights(seed: int, layer: int, shape: tuple[int, ...], fan_in: int, fan_out: int) -> tuple[np.ndarray, int]:
    """Xavier uniform weights of parameter layer `layer` from the contract's words, as (int8, exponent)."""
    words = random.words(seed, 0, random.initial_weights_stream(layer), shape).astype(np.float64)
    w = (2 * words / 2**32 - 1) * np.sqrt(6 / (fan_in + fan_out))
    largest = np.abs(w).max()
    return np.rint(w / largest * 127).astype(np.int8), _ceil_log2_float(float(largest)) - 7


def narrow(master: np.ndarray) -> np.ndarray:
    """The int8 datapath weight of an int16 master."""
    return saturate(Rounding.PSEUDO_STOCHASTIC.compute(master, 8), 8).astype(np.int8)


class Niti(Execution):
    """Trains by NITI. Options: `weight_bits` 8 or 16 (wide masters), `bits` overrides the schedule."""

    options = ("weight_bits", "bits")
    rules = sys.modules[__name__]
    unsupported = (BatchNorm, Add, GlobalAveragePool)

    def __init__(self, method, description, seed, *, weight_bits: int = 8, bits: int | None = None, **options):
        super().__init__(method, description, seed, **options)
        if weight_bits not in (8, 16):
            raise InputError(f"weight_bits must be 8 or 16, got {weight_bits}")
        self.mode = MODES[method]
        self.weight_bits = weight_bits
        self.bits = bits
        for layer in description.weight_layers:
            w, exponent = initial_weights(seed, layer.index, layer.weight_shape, layer.fan_in, layer.fan_out)
            if weight_bits == 16:
                w, exponent = w.astype(np.int16) * 256, exponent - 8
            self.state[f"{layer.name}.weight"] = w, exponent

    def convert(self, images):
        self.check_images(images)
        info = self.data
        # A pixel has at most 256 values per channel: convert the values, then look the images up.
        values = (np.arange(256)[:, None] / info.scale - np.array(info.mean)) / np.array(info.std)
        used = np.stack(
            [
                values[images.min(axis=(0, 1, 2)), range(images.shape[3])],
                values[images.max(axis=(0, 1, 2)), range(images.shape[3])],
            ]
        )
        _, exponent = convert_input(used)
        table = np.clip(np.rint(np.ldexp(values, -exponent)), -127, 127).astype(np.int8)
        if images.shape[3] == 1:
            return table[:, 0][images], exponent
        return np.stack([table[:, c][images[..., c]] for c in range(images.shape[3])], axis=-1), exponent

    def datapath_weight(self, layer) -> tuple[np.ndarray, int]:
        """The int8 weights that the products use, and their exponent."""
        w, exponent = self.state[f"{layer.name}.weight"]
        return (self.rules.narrow(w), exponent + 8) if self.weight_bits == 16 else (w, exponent)

    def _forward(self, x, exponent, trace):
        for layer in self.description.layers:
            trace.inputs[layer.name] = x
            match layer:
                case Conv2d() | Linear():
                    w, w_exponent = trace.weights[layer.name] = self.datapath_weight(layer)
                    trace.record[f"{layer.name}.activation"] = x
                    trace.record[f"{layer.name}.activation.exponent"] = exponent
                    acc = (
                        self.ops.conv2d(x, w, layer.stride, layer.padding)
                        if isinstance(layer, Conv2d)
                        else self.ops.linear(x.reshape(len(x), -1), w)
                    )
                    trace.intermediate(f"{layer.name}.accumulator", acc)
                    x, exponent = self.rules.requantize(
                        acc, exponent + w_exponent, self.mode.activation, self.mode.minimum_shift
                    )
                case Relu():
                    x = self.ops.relu(x)
                case MaxPool():
                    x, choice = self.ops.max_pool(x, layer.size)
                    trace.choices[layer.name] = choice
                    trace.intermediate(f"{layer.name}.choice", choice)
                case Flatten():
                    x = x.reshape(len(x), -1)
            exponent = self.check_exponent(exponent)
        return x, exponent

    def _step(self, x, exponent, labels, trace):
        record = trace.record
        logits, logits_exponent = self._forward(x, exponent, trace)
        record["logits"], record["logits.exponent"] = logits, logits_exponent
        error, exponent = self.rules.loss_gradient(logits, logits_exponent, labels), 0
        bits = self.learning_rate() if self.bits is None else self.bits
        first = self.description.weight_layers[0]
        for layer in reversed(self.description.layers):
            x = trace.inputs[layer.name]
            match layer:
                case Conv2d() | Linear():
                    name = layer.name
                    w, w_exponent = trace.weights[name]
                    record[f"{name}.error"], record[f"{name}.error.exponent"] = error, exponent
                    if isinstance(layer, Conv2d):
                        gradient = self.ops.conv2d_gradient(error, x, layer.kernel, layer.stride, layer.padding)
                    else:
                        gradient = self.ops.linear_gradient(error, x.reshape(len(x), -1))
                    record[f"{name}.gradient"] = self.ops.require_int32(gradient, f"{name}.gradient")
                    if layer is not first:
                        if isinstance(layer, Conv2d):
                            acc = self.ops.conv2d_error(error, w, layer.input_shape[:2], layer.stride, layer.padding)
                        else:
                            acc = self.ops.linear_error(error, w).reshape(x.shape)
                        trace.intermediate(f"{name}.error_accumulator", acc)
                        error, exponent = self.rules.requantize(
                            acc, exponent + w_exponent, self.mode.error, self.mode.minimum_shift
                        )
                    self._update(layer, gradient, bits, record)
                case Relu():
                    error = self.ops.relu_error(error, x)
                case MaxPool():
                    error = self.ops.max_pool_error(error, trace.choices[layer.name], layer.size)
                case Flatten():
                    error = error.reshape(x.shape)
            exponent = self.check_exponent(exponent)

    def _update(self, layer, gradient: np.ndarray, bits: int, record: Record) -> None:
        name = f"{layer.name}.weight"
        w, exponent = self.state[name]
        step = self.rules.weight_gradient(gradient, bits + self.weight_bits - 8, self.weight_bits)
        self.state[name] = self.rules.update(w, step, self.weight_bits), exponent
        record[name], record[f"{name}.exponent"] = self.state[name]
