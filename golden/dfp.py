"""Dynamic fixed point: int8 tensors with one exponent each, int16 state, stochastic rounding (contract section 7).

The functions above `Dfp` are the arithmetic; docs/arithmetic.md states the widths and windows fixed here. Tensors are
`(mantissas, exponent)` with value `mantissas * 2**exponent`. A `draw` is an array of the contract's 32-bit words; None
rounds to nearest instead (ties toward +infinity). Sums travel as int32 with an exponent until a layer needs int8.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field

import numpy as np

from golden import random
from golden.errors import InputError
from golden.execution import Execution, Trace
from golden.networks import (
    INPUT,
    Add,
    BatchNorm,
    Conv2d,
    Flatten,
    GlobalAveragePool,
    MaxPool,
    Relu,
)
from golden.niti import LOG2_E
from golden.random import Purpose
from golden.range import bit_length, max_magnitude
from golden.rounding import Rounding, half_up, round_to, saturate, stochastic

STATE_BITS = 16
NORMALISED_FRACTION = 10  # fraction bits of the normalised value in batch norm
EPSILON_EXPONENT = -17
RUNNING_EXPONENTS = (-16, -18)  # of the running mean and variance
RUNNING_SHIFT = 3  # running statistics move by 1/8 of the difference
SGD_WINDOW = 32  # bits below the largest term that an update keeps
SUM_WINDOW = 30  # bits below the largest term that a residual sum keeps
OCTAVE = 256
EXPONENTIALS = np.array([round(2 ** (16 - f / OCTAVE)) for f in range(OCTAVE)], np.int64)
PROBABILITY_BITS = 15


# Mapping to mantissas ---------------------------------------------------------------------------------------


def map_float(x, bits: int, draw=None) -> tuple[np.ndarray, int]:
    """float32 -> (mantissas of `bits` bits, exponent of the last bit); subnormals count as 0, NaN and Inf are refused.

    The largest exponent of the tensor scales it: every 24-bit significand is shifted right by its distance from that
    exponent plus the bits dropped, and rounded. A shift above 32 gives 0.
    """
    pattern = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64)
    exponents = (pattern >> 23) & 0xFF
    if (exponents == 255).any():
        raise InputError("cannot map NaN or infinity to integers")
    out = _type(bits)
    nonzero = exponents != 0
    if not nonzero.any():
        return np.zeros(np.shape(x), out), 0
    largest = int(exponents.max())
    significand = np.where(nonzero, (pattern & 0x7FFFFF) | 0x800000, 0)
    significand = np.where(pattern >> 31, -significand, significand)
    shift = np.where(nonzero, largest - exponents + 24 - (bits - 1), 0)
    q = np.zeros(np.shape(x), np.int64)
    for s in np.unique(shift):
        here = nonzero & (shift == s)
        if s <= 32:
            part = significand[here]
            q[here] = half_up(part, int(s)) if draw is None else stochastic(part, int(s), np.asarray(draw)[here])
    return saturate(q, bits).astype(out), largest - 127 - (bits - 2)


def _type(bits: int):
    return np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32


def requantize(acc, exponent: int, bits: int = 8, draw=None) -> tuple[np.ndarray, int]:
    """Integers with an exponent -> (mantissas of `bits` bits, exponent), by the bit length of the largest magnitude.

    A tensor that needs fewer bits is passed on unchanged at 8 bits and shifted left at 16 (state keeps its precision).
    Shifts above 32 drop the excess bits first, so that 32 random bits decide.
    """
    acc = np.asarray(acc)
    maximum = max_magnitude(acc)
    shift = bit_length(maximum) - (bits - 1)
    if maximum == 0 or (shift < 0 and bits <= 8):
        return acc.astype(_type(bits)), int(exponent)
    if shift <= 0:
        return (acc.astype(np.int64) << -shift).astype(_type(bits)), int(exponent) + shift
    if draw is None:
        return round_to(Rounding.HALF_UP, acc, maximum, shift, bits), int(exponent) + shift
    if shift > 32:
        return _requantize_excess(acc, exponent, shift, bits, draw)
    return round_to(Rounding.STOCHASTIC, acc, maximum, shift, bits, draw), int(exponent) + shift


def _requantize_excess(acc, exponent: int, shift: int, bits: int, draw) -> tuple[np.ndarray, int]:
    """Stochastic rounding by more than 32 bits: floor away the excess, then use the whole word."""
    reduced = acc >> (shift - 32)
    return saturate(stochastic(reduced, 32, draw), bits).astype(_type(bits)), int(exponent) + shift


def aligned_sum(terms, window: int) -> tuple[np.ndarray, int]:
    """Sum of `(integers, exponent)` terms on a common exponent.

    The grid is the smallest exponent of a non-zero term, but not more than `window` bits below the top of the largest:
    terms below the grid are rounded to nearest, ties toward +infinity. All-zero terms take no part.
    """
    shape = np.shape(terms[0][0])
    present = []
    for x, exponent in terms:
        x = np.asarray(x, dtype=np.int64)
        maximum = max_magnitude(x)
        if maximum:
            present.append((x, int(exponent), int(exponent) + bit_length(maximum)))
    if not present:
        return np.zeros(shape, np.int64), 0
    grid = max(min(e for _, e, _ in present), max(top for *_, top in present) - window)
    total = np.zeros(shape, np.int64)
    for x, exponent, _ in present:
        total += x << (exponent - grid) if exponent >= grid else half_up(x, grid - exponent)
    return total, grid


# Loss -------------------------------------------------------------------------------------------------------


def softmax_gradient(logits, exponent: int, labels, draw=None) -> tuple[np.ndarray, int]:
    """Cross-entropy error, mean over a power-of-two batch, of int32 logits [n][classes]: (int8, exponent).

    Distance to the row's largest logit in octaves with 8 fraction bits (at most 31 octaves), powers of two from a
    256-entry table, probabilities as 15-bit truncated quotients.
    """
    z = np.asarray(logits, dtype=np.int64)
    labels = np.asarray(labels)
    n = len(z)
    log2_batch = check_power_of_two(n)
    distance = z.max(axis=1, keepdims=True) - z
    shift = 7 - int(exponent)
    scaled = distance * LOG2_E
    octaves = scaled >> min(shift, 62) if shift >= 0 else scaled << min(-shift, 13)
    octaves = np.minimum(octaves, 31 * OCTAVE)
    e = EXPONENTIALS[octaves & (OCTAVE - 1)] >> (octaves >> 8)
    g = (e << PROBABILITY_BITS) // e.sum(axis=1, keepdims=True)
    g[np.arange(n), labels] -= 1 << PROBABILITY_BITS
    return requantize(g, -PROBABILITY_BITS - log2_batch, 8, draw)


def check_power_of_two(batch: int) -> int:
    """log2 of a batch size that is a power of two."""
    if batch < 1 or batch & (batch - 1):
        lower = 1 << max(batch, 1).bit_length() - 1
        raise InputError(f"--batch must be a power of two for dfp, got {batch}: use {lower} or {2 * lower}")
    return batch.bit_length() - 1


# Update -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sgd:
    """Hyper-parameters as (mantissa, exponent); decay None leaves the tensor undecayed."""

    rate: tuple[int, int]
    momentum: tuple[int, int] = (230, -8)
    decay: tuple[int, int] | None = (105, -20)


def _scaled(tensor, factor: tuple[int, int]):
    return np.asarray(tensor[0], dtype=np.int64) * factor[0], tensor[1] + factor[1]


def sgd_step(weight, momentum, gradient, sgd: Sgd, weight_draw=None, momentum_draw=None):
    """One step of SGD with momentum and weight decay: ((int16, exponent), (int16, exponent)) of weight and momentum.

    v = requantize(mu * v + g + lambda * w), w = requantize(w - eta * v), each sum within SGD_WINDOW bits of its largest
    term. weight and momentum are (int16, exponent), gradient (int32 or wider, exponent).
    """
    terms = [_scaled(momentum, sgd.momentum), gradient]
    if sgd.decay is not None:
        terms.append(_scaled(weight, sgd.decay))
    new_momentum = requantize(*aligned_sum(terms, SGD_WINDOW), STATE_BITS, momentum_draw)
    rate = (-sgd.rate[0], sgd.rate[1])
    total = aligned_sum([weight, _scaled(new_momentum, rate)], SGD_WINDOW)
    return requantize(*total, STATE_BITS, weight_draw), new_momentum


# Batch norm -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """Per channel: 1 / sqrt(variance) of (scale * x - offset) is reciprocal * 2**(-31 - half_shift)."""

    scale: int
    offset: np.ndarray
    variance: np.ndarray
    reciprocal: np.ndarray
    half_shift: np.ndarray


def _bit_lengths(v: np.ndarray) -> np.ndarray:
    """Bit length of each positive int64."""
    lengths = np.zeros(v.shape, np.int64)
    for bit in (32, 16, 8, 4, 2, 1):
        high = v >> bit > 0
        lengths += np.where(high, bit, 0)
        v = np.where(high, v >> bit, v)
    return lengths + 1


def inverse_sqrt(variance) -> tuple[np.ndarray, np.ndarray]:
    """(r, h) with 1 / sqrt(v) = r * 2**(-31 - h) for positive integers below 2**62; r has 16 bits."""
    v = np.asarray(variance, dtype=np.int64)
    length = _bit_lengths(v)
    h = (length + (length & 1) - 32) // 2
    normalised = np.where(h >= 0, v >> np.maximum(2 * h, 0), v << np.maximum(-2 * h, 0))
    # Below 2**32 a float64 square root lies within 2**-37 of the true one, squares of integers are exact.
    root = np.floor(np.sqrt(normalised.astype(np.float64))).astype(np.int64)
    return np.minimum((1 << 31) // root, 65535), h


def _channel_sums(x: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    """Exact sums over all but the last axis of x, or of x * y; float64 carries them within 2**53."""
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    if y is None:
        return x.sum(axis=0).astype(np.int64)
    return np.einsum("nc,nc->c", x, y.reshape(x.shape).astype(np.float64)).astype(np.int64)


def batch_statistics(x: np.ndarray, exponent: int) -> Statistics:
    """Statistics of int8 x [...][c] over up to 2**17 elements per channel: N*x - S1 and N*S2 - S1**2 + epsilon."""
    n = x.size // x.shape[-1]
    if n > 1 << 17:
        raise InputError(f"batch norm sums up to 131072 elements per channel, got {n}: use a smaller batch")
    s1, s2 = _channel_sums(x), _channel_sums(x, x)
    shift = EPSILON_EXPONENT - 2 * exponent
    epsilon = max(1, n * n << min(shift, 26) if shift >= 0 else n * n >> min(-shift, 62))
    variance = n * s2 - s1 * s1 + epsilon
    return Statistics(n, s1, variance, *inverse_sqrt(variance))


def running_statistics(mean: np.ndarray, variance: np.ndarray, exponent: int) -> Statistics:
    """Statistics for inference from the running int32 mean and variance; x is brought to the mean's exponent."""
    if not 0 <= exponent - RUNNING_EXPONENTS[0] <= 40:
        raise OverflowError(f"batch norm input exponent {exponent} is outside {RUNNING_EXPONENTS[0]}..24")
    v = (variance.astype(np.int64) + (1 << EPSILON_EXPONENT - RUNNING_EXPONENTS[1])) << (
        RUNNING_EXPONENTS[1] - 2 * RUNNING_EXPONENTS[0]
    )
    return Statistics(1 << (exponent - RUNNING_EXPONENTS[0]), mean.astype(np.int64), v, *inverse_sqrt(v))


def normalise(x: np.ndarray, statistics: Statistics) -> np.ndarray:
    """(x - mean) / deviation, int16 with NORMALISED_FRACTION fraction bits."""
    centred = statistics.scale * x.astype(np.int64) - statistics.offset
    shift = 31 + statistics.half_shift - NORMALISED_FRACTION
    scaled = (centred * statistics.reciprocal + (np.int64(1) << (shift - 1))) >> shift
    return np.clip(scaled, -32767, 32767).astype(np.int16)


def batch_norm(x, exponent: int, gamma, beta, statistics: Statistics | None = None):
    """int8 x [...][c], gamma and beta (int16 [c], exponent) -> (int32 y, exponent, statistics).

    y = gamma * normalised + beta on gamma's exponent - NORMALISED_FRACTION, saturated to 32 bits. Without `statistics`
    those of the batch are used.
    """
    statistics = statistics or batch_statistics(x, exponent)
    y_exponent = gamma[1] - NORMALISED_FRACTION
    shift = beta[1] - y_exponent if np.any(beta[0]) else 0
    b = beta[0].astype(np.int64)
    b = b << min(shift, 31) if shift >= 0 else half_up(b, -shift)
    y = normalise(x, statistics).astype(np.int64) * gamma[0].astype(np.int64) + b
    return saturate(y, 32).astype(np.int32), y_exponent, statistics


@dataclass(frozen=True)
class BatchNormGradient:
    """Sums for the input error (int64, up to 50 bits) and gradients of gamma (up to 40 bits) and beta (int32)."""

    x_error: tuple[np.ndarray, int]
    gamma: tuple[np.ndarray, int]
    beta: tuple[np.ndarray, int]


def batch_norm_gradient(error, error_exponent: int, x, exponent: int, gamma, statistics) -> BatchNormGradient:
    """Backward of `batch_norm` from int8 error [...][c] at y and the int8 x and statistics of the forward pass."""
    normalised = normalise(x, statistics)
    beta_gradient = _channel_sums(error)
    gamma_gradient = _channel_sums(error, normalised)
    projection = half_up(normalised.astype(np.int64) * gamma_gradient, 2 * NORMALISED_FRACTION)
    inner = statistics.scale * error.astype(np.int64) - beta_gradient - projection
    # gamma / deviation per channel, to 16 bits on one exponent for all channels.
    coefficient = gamma[0].astype(np.int64) * statistics.reciprocal
    lengths = np.where(coefficient != 0, _bit_lengths(np.maximum(np.abs(coefficient), 1)), 0)
    tops = np.where(coefficient != 0, lengths - statistics.half_shift, -(1 << 15))
    top = int(tops.max())
    shift = np.minimum(top - 15 + statistics.half_shift, 62)
    rounded = np.where(
        shift > 0,
        (coefficient + (np.int64(1) << np.maximum(shift - 1, 0))) >> np.maximum(shift, 0),
        coefficient << np.maximum(-shift, 0),
    )
    coefficient = np.clip(rounded, -32767, 32767)
    x_exponent = error_exponent + (top - 15 - 31) + gamma[1] - exponent
    return BatchNormGradient(
        (inner * coefficient, x_exponent if np.any(coefficient) else 0),
        (gamma_gradient, error_exponent - NORMALISED_FRACTION),
        (beta_gradient, error_exponent),
    )


def update_running(mean, variance, exponent: int, statistics: Statistics) -> tuple[np.ndarray, np.ndarray]:
    """Running int32 mean and variance moved by 1/8 toward the batch's, on RUNNING_EXPONENTS; quotients truncate."""
    n = statistics.scale
    # The batch variance includes epsilon, which is below the precision kept here.
    moments = (
        (mean, statistics.offset, exponent - RUNNING_EXPONENTS[0], n),
        (variance, statistics.variance, 2 * exponent - RUNNING_EXPONENTS[1], n * n),
    )
    result = []
    for running, moment, shift, count in moments:
        values = []
        for old, m in zip(running.tolist(), moment.tolist(), strict=True):
            quotient = (abs(m) << max(shift, 0)) // (count << max(-shift, 0))
            quotient = min(quotient, 2**31 - 1) * (-1 if m < 0 else 1)
            values.append(old + ((quotient - old + (1 << RUNNING_SHIFT - 1)) >> RUNNING_SHIFT))
        result.append(np.array(values, np.int32))
    return tuple(result)


# Training ---------------------------------------------------------------------------------------------------


def initial_weights(seed: int, layer: int, shape: tuple[int, ...], fan_in: int) -> tuple[np.ndarray, int]:
    """Uniform +-sqrt(6 / fan_in) from the contract's words, mapped to (int16, exponent) by rounding to nearest."""
    words = random.words(seed, 0, random.initial_weights_stream(layer), shape).astype(np.float64)
    uniform = (2 * words / 2**32 - 1) * np.sqrt(6 / fan_in)
    return map_float(uniform.astype(np.float32), STATE_BITS)


@dataclass
class Sums:
    """A tensor on its way between layers: integer sums, and their int8 form once a layer has asked for it."""

    sums: np.ndarray
    exponent: int
    stream: tuple[int, Purpose] | None  # None rounds to nearest
    quantized: tuple[np.ndarray, int] | None = field(default=None)


class Dfp(Execution):
    """Trains by dynamic fixed point. Option: `rounding` "stochastic" or "nearest", of activations and weights."""

    options = ("rounding",)
    rules = sys.modules[__name__]

    def __init__(self, method, description, seed, *, rounding: str = "stochastic", **options):
        if rounding not in ("stochastic", "nearest"):
            raise InputError(f"rounding must be stochastic or nearest, got {rounding!r}")
        self.stochastic = rounding == "stochastic"
        super().__init__(method, description, seed, **options)
        zero = np.int16(0)
        for layer in description.parameter_layers:
            name = layer.name
            if isinstance(layer, BatchNorm):
                channels = layer.output_shape[-1]
                self.state[f"{name}.gamma"] = np.full(channels, 1 << 14, np.int16), -14
                self.state[f"{name}.gamma_momentum"] = np.full(channels, zero), 0
                self.state[f"{name}.beta"] = np.full(channels, zero), 0
                self.state[f"{name}.beta_momentum"] = np.full(channels, zero), 0
                one = 1 << -RUNNING_EXPONENTS[1]
                self.state[f"{name}.mean"] = np.zeros(channels, np.int32), RUNNING_EXPONENTS[0]
                self.state[f"{name}.variance"] = np.full(channels, one, np.int32), RUNNING_EXPONENTS[1]
            else:
                weight = initial_weights(seed, layer.index, layer.weight_shape, layer.fan_in)
                self.state[f"{name}.weight"] = weight
                self.state[f"{name}.momentum"] = np.full(layer.weight_shape, zero), 0
        for layer in description.layers:
            if isinstance(layer, GlobalAveragePool):
                area = layer.input_shape[0] * layer.input_shape[1]
                if area & (area - 1):
                    raise InputError(
                        f"dfp averages {layer.name} by an exponent: its {layer.input_shape[0]}x{layer.input_shape[1]} "
                        f"input must have a power-of-two area (use digits or cifar-10)"
                    )

    def set_batch(self, batch):
        check_power_of_two(batch)
        super().set_batch(batch)

    def convert(self, images):
        self.check_images(images)
        unit = self.data.scale + self.data.scale % 2  # 256 or 16: a power of two
        table = np.minimum(np.arange(256) * 128 // unit, 127)
        return table.astype(np.int8)[images], -7

    def _draw(self, index: int, purpose: Purpose, shape, offset: int = 0) -> np.ndarray:
        return random.words(self.seed, self.step_index, random.stream(index, purpose), shape, offset)

    def _quantize(self, tensor: Sums, training: bool, forward: bool = True) -> tuple[np.ndarray, int]:
        """The int8 form of a tensor. Errors round stochastically, activations as chosen, inference to nearest."""
        if tensor.quantized is None:
            draw = None
            if tensor.stream is not None and training and (self.stochastic or not forward):
                draw = self._draw(*tensor.stream, tensor.sums.shape)
            x, exponent = self.rules.requantize(tensor.sums, tensor.exponent, 8, draw)
            tensor.quantized = x, self.check_exponent(exponent)
        return tensor.quantized

    def datapath_weight(self, layer, training: bool) -> tuple[np.ndarray, int]:
        """The int8 weights of the products, rounded once a step."""
        w, exponent = self.state[f"{layer.name}.weight"]
        draw = self._draw(layer.index, Purpose.DATAPATH_WEIGHT, w.shape) if training and self.stochastic else None
        return self.rules.requantize(w, exponent, 8, draw)

    def _forward(self, x, exponent, trace: Trace, training: bool = False):
        values = {INPUT: Sums(x, exponent, None, (x, exponent))}
        for layer in self.description.layers:
            source = values[layer.source]
            values[layer.name] = self._layer_forward(layer, source, values, trace, training)
        last = values[self.description.layers[-1].name]
        return last.sums, last.exponent

    def _layer_forward(self, layer, source: Sums, values, trace: Trace, training: bool) -> Sums:
        name = layer.name
        stream = layer.index, Purpose.ACTIVATION
        match layer:
            case Relu():
                if source.quantized is None:
                    trace.masks[name] = source.sums > 0
                    return Sums(self.ops.relu(source.sums), source.exponent, source.stream)
                x, exponent = source.quantized
                trace.masks[name] = x > 0
                x = self.ops.relu(x)
                return Sums(x, exponent, None, (x, exponent))
            case Flatten():
                x, exponent = self._quantize(source, training)
                x = x.reshape(len(x), -1)
                return Sums(x, exponent, None, (x, exponent))
            case MaxPool():
                x, exponent = self._quantize(source, training)
                x, trace.choices[name] = self.ops.max_pool(x, layer.size)
                trace.intermediate(f"{name}.choice", trace.choices[name])
                return Sums(x, exponent, None, (x, exponent))
            case GlobalAveragePool():
                x, exponent = self._quantize(source, training)
                area = x.shape[1] * x.shape[2]
                return Sums(self.ops.global_sum(x), exponent - area.bit_length() + 1, None)
            case Add():
                terms = [self._quantize(source, training), self._quantize(values[layer.other], training)]
                total, exponent = self.rules.aligned_sum(terms, SUM_WINDOW)
                return Sums(
                    self.ops.require_int32(total, "residual sum"), exponent, (layer.index, Purpose.RESIDUAL_ADD)
                )
        x, exponent = self._quantize(source, training)
        trace.inputs[name] = x
        trace.record[f"{name}.activation"], trace.record[f"{name}.activation.exponent"] = x, exponent
        if isinstance(layer, BatchNorm):
            gamma, beta = self.state[f"{name}.gamma"], self.state[f"{name}.beta"]
            statistics = None
            if not training:
                running = self.state[f"{name}.mean"][0], self.state[f"{name}.variance"][0]
                statistics = self.rules.running_statistics(*running, exponent)
            y, y_exponent, statistics = self.rules.batch_norm(x, exponent, gamma, beta, statistics)
            trace.statistics[name] = statistics
            return Sums(y, y_exponent, stream)
        w, w_exponent = trace.weights[name] = self.datapath_weight(layer, training)
        trace.intermediate(f"{name}.datapath_weight", w)
        if isinstance(layer, Conv2d):
            acc = self.ops.conv2d(x, w, layer.stride, layer.padding)
        else:
            acc = self.ops.linear(x.reshape(len(x), -1), w)
        trace.intermediate(f"{name}.accumulator", acc)
        return Sums(acc, exponent + w_exponent, stream)

    def _step(self, x, exponent, labels, trace: Trace):
        record, layers = trace.record, self.description.layers
        logits, exponent = self._forward(x, exponent, trace, training=True)
        record["logits"], record["logits.exponent"] = logits, exponent
        draw = self._draw(layers[-1].index, Purpose.LOSS, logits.shape)
        error, exponent = self.rules.softmax_gradient(logits, exponent, labels, draw)
        errors = {layers[-1].name: [Sums(error, exponent, None, (error, exponent))]}
        self.sgd = Sgd(self.learning_rate())
        for layer in reversed(layers):
            parts = errors.pop(layer.name)
            error = parts[0] if len(parts) == 1 else self._fork(parts)
            for source, part in self._layer_backward(layer, error, trace):
                if source != INPUT:
                    errors.setdefault(source, []).append(part)
        for name, (tensor, exponent) in self.state.items():
            record[name], record[f"{name}.exponent"] = tensor, exponent

    def _fork(self, parts: list[Sums]) -> Sums:
        """The error of a tensor that several layers read: one sum, rounded by the words of the earliest reader."""
        terms = [part.quantized or (part.sums, part.exponent) for part in parts]
        total, exponent = self.rules.aligned_sum(terms, SUM_WINDOW)
        streams = [part.stream for part in parts if part.stream is not None]
        return Sums(self.ops.require_int32(total, "error sum"), exponent, min(streams, default=None))

    def _layer_backward(self, layer, error: Sums, trace: Trace):
        """Pairs of (source name, error of that source)."""
        name, record = layer.name, trace.record
        match layer:
            case Relu():
                mask = trace.masks[name]
                if error.quantized is None:
                    return [(layer.source, Sums(error.sums.reshape(mask.shape) * mask, error.exponent, error.stream))]
                e, exponent = error.quantized
                e = e.reshape(mask.shape) * mask
                return [(layer.source, Sums(e, exponent, None, (e, exponent)))]
        e, exponent = self._quantize(error, True, forward=False)
        e = e.reshape(len(e), *layer.output_shape)
        match layer:
            case Flatten() | MaxPool() | GlobalAveragePool():
                if isinstance(layer, Flatten):
                    e = e.reshape(len(e), *layer.input_shape)
                elif isinstance(layer, MaxPool):
                    e = self.ops.max_pool_error(e, trace.choices[name], layer.size)
                else:
                    h, w, _ = layer.input_shape
                    e, exponent = self.ops.global_sum_error(e, h, w), exponent - (h * w).bit_length() + 1
                return [(layer.source, Sums(e, exponent, None, (e, exponent)))]
            case Add():
                return [(source, Sums(e, exponent, None, (e, exponent))) for source in layer.sources]
        record[f"{name}.error"], record[f"{name}.error.exponent"] = e, exponent
        x, x_exponent = trace.inputs[name], record[f"{name}.activation.exponent"]
        if isinstance(layer, BatchNorm):
            return self._batch_norm_backward(layer, e, exponent, x, x_exponent, trace)
        if isinstance(layer, Conv2d):
            gradient = self.ops.conv2d_gradient(e, x, layer.kernel, layer.stride, layer.padding)
        else:
            gradient = self.ops.linear_gradient(e, x.reshape(len(x), -1))
        gradient = self.ops.require_int32(gradient, f"{name}.gradient")
        record[f"{name}.gradient"], record[f"{name}.gradient.exponent"] = gradient, exponent + x_exponent
        result = []
        if layer.source != INPUT:
            w, w_exponent = trace.weights[name]
            if isinstance(layer, Conv2d):
                acc = self.ops.conv2d_error(e, w, layer.input_shape[:2], layer.stride, layer.padding)
            else:
                acc = self.ops.linear_error(e, w).reshape(len(e), *layer.input_shape)
            trace.intermediate(f"{name}.error_accumulator", acc)
            result = [(layer.source, Sums(acc, exponent + w_exponent, (layer.index, Purpose.ERROR)))]
        self._update(
            layer, "weight", "momentum", Purpose.WEIGHT, Purpose.MOMENTUM, (gradient, exponent + x_exponent), self.sgd
        )
        return result

    def _batch_norm_backward(self, layer, e, exponent, x, x_exponent, trace: Trace):
        name, record, statistics = layer.name, trace.record, trace.statistics[layer.name]
        gradient = self.rules.batch_norm_gradient(e, exponent, x, x_exponent, self.state[f"{name}.gamma"], statistics)
        sgd = Sgd(self.sgd.rate, self.sgd.momentum, None)
        for parameter, tensor, purpose in (
            ("gamma", gradient.gamma, Purpose.GAMMA),
            ("beta", gradient.beta, Purpose.BETA),
        ):
            record[f"{name}.{parameter}.gradient"], record[f"{name}.{parameter}.gradient.exponent"] = tensor
            self._update(layer, parameter, f"{parameter}_momentum", purpose, purpose, tensor, sgd)
        mean, variance = self.rules.update_running(
            self.state[f"{name}.mean"][0], self.state[f"{name}.variance"][0], x_exponent, statistics
        )
        self.state[f"{name}.mean"] = mean, RUNNING_EXPONENTS[0]
        self.state[f"{name}.variance"] = variance, RUNNING_EXPONENTS[1]
        stream = layer.index, Purpose.BATCH_NORM_GRADIENT
        return [(layer.source, Sums(*gradient.x_error, stream))]

    def _update(self, layer, weight: str, momentum: str, weight_purpose, momentum_purpose, gradient, sgd: Sgd):
        """SGD on one tensor. Gamma and beta share a stream with their momentum, whose words come after theirs."""
        weight, momentum = f"{layer.name}.{weight}", f"{layer.name}.{momentum}"
        shape = self.state[weight][0].shape
        offset = math.prod(shape) if weight_purpose == momentum_purpose else 0
        self.state[weight], self.state[momentum] = self.rules.sgd_step(
            self.state[weight],
            self.state[momentum],
            gradient,
            sgd,
            self._draw(layer.index, weight_purpose, shape),
            self._draw(layer.index, momentum_purpose, shape, offset),
        )
