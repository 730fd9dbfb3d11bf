"""The same networks in float32 with SGD, momentum and weight decay: the comparison for the integer methods.

Not part of the contract: results depend on the BLAS library and its number of threads.
"""

from __future__ import annotations

import numpy as np

from golden import ops, random
from golden.errors import InputError
from golden.execution import Execution, Trace
from golden.networks import INPUT, Add, BatchNorm, Conv2d, Flatten, GlobalAveragePool, Linear, MaxPool, Relu

MOMENTUM = np.float32(230 / 256)
DECAY = np.float32(105 / 2**20)
EPSILON = np.float32(2.0**-17)
RUNNING = np.float32(1 / 8)


class Float(Execution):
    """Trains in float32 from the initial weights of `dfp`, with its hyper-parameters."""

    def __init__(self, method, description, seed, **options):
        super().__init__(method, description, seed, **options)
        for layer in description.parameter_layers:
            name = layer.name
            if isinstance(layer, BatchNorm):
                channels = layer.output_shape[-1]
                for tensor, value in (("gamma", 1), ("beta", 0), ("mean", 0), ("variance", 1)):
                    self.state[f"{name}.{tensor}"] = np.full(channels, value, np.float32), 0
                for tensor in ("gamma_momentum", "beta_momentum"):
                    self.state[f"{name}.{tensor}"] = np.zeros(channels, np.float32), 0
            else:
                stream = random.initial_weights_stream(layer.index)
                words = random.words(seed, 0, stream, layer.weight_shape).astype(np.float64)
                uniform = (2 * words / 2**32 - 1) * np.sqrt(6 / layer.fan_in)
                self.state[f"{name}.weight"] = uniform.astype(np.float32), 0
                self.state[f"{name}.momentum"] = np.zeros(layer.weight_shape, np.float32), 0

    def convert(self, images):
        self.check_images(images)
        mean, std = np.array(self.data.mean), np.array(self.data.std)
        return ((images / self.data.scale - mean) / std).astype(np.float32), 0

    def _input(self, images):
        if not isinstance(images, tuple):
            return self.convert(np.asarray(images))
        if images[0].dtype != np.float32 or images[0].shape[1:] != self.description.input_shape:
            raise InputError(f"converted images must be float32 [n]{list(self.description.input_shape)}")
        return images

    def _forward(self, x, exponent, trace: Trace, training: bool = False):
        values = {INPUT: x}
        for layer in self.description.layers:
            x = values[layer.source]
            name = layer.name
            trace.inputs[name] = x
            match layer:
                case Conv2d():
                    x = ops.conv2d(x, self.state[f"{name}.weight"][0], layer.stride, layer.padding)
                case Linear():
                    x = ops.linear(x.reshape(len(x), -1), self.state[f"{name}.weight"][0])
                case BatchNorm():
                    x = self._batch_norm(name, x, trace, training)
                case Relu():
                    x = ops.relu(x)
                case MaxPool():
                    x, trace.choices[name] = ops.max_pool(x, layer.size)
                case GlobalAveragePool():
                    x = x.mean(axis=(1, 2))
                case Flatten():
                    x = x.reshape(len(x), -1)
                case Add():
                    x = x + values[layer.other]
            values[name] = x
        return x, 0

    def _batch_norm(self, name, x, trace: Trace, training: bool):
        axes = tuple(range(x.ndim - 1))
        if training:
            mean, variance = x.mean(axis=axes), x.var(axis=axes)
            for tensor, value in (("mean", mean), ("variance", variance)):
                running = self.state[f"{name}.{tensor}"][0]
                self.state[f"{name}.{tensor}"] = running + RUNNING * (value - running), 0
        else:
            mean, variance = self.state[f"{name}.mean"][0], self.state[f"{name}.variance"][0]
        scale = 1 / np.sqrt(variance + EPSILON)
        normalised = (x - mean) * scale
        trace.statistics[name] = normalised, scale
        return normalised * self.state[f"{name}.gamma"][0] + self.state[f"{name}.beta"][0]

    def _step(self, x, exponent, labels, trace: Trace):
        layers = self.description.layers
        mantissa, power = self.learning_rate()
        self.rate = np.float32(mantissa * 2.0**power)
        logits, _ = self._forward(x, exponent, trace, training=True)
        trace.record["logits"], trace.record["logits.exponent"] = logits, 0
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(p)), labels] -= 1
        errors = {layers[-1].name: p / np.float32(len(p))}
        for layer in reversed(layers):
            for source, error in self._backward(layer, errors.pop(layer.name), trace):
                if source != INPUT:
                    errors[source] = errors[source] + error if source in errors else error
        for name, (tensor, _) in self.state.items():
            trace.record[name] = tensor

    def _backward(self, layer, e, trace: Trace):
        x, name = trace.inputs[layer.name], layer.name
        match layer:
            case Conv2d():
                w = self.state[f"{name}.weight"][0]
                gradient = ops.conv2d_gradient(e, x, layer.kernel, layer.stride, layer.padding)
                if layer.source != INPUT:
                    e = ops.conv2d_error(e, w, layer.input_shape[:2], layer.stride, layer.padding)
                self._update(name, "weight", "momentum", gradient, DECAY)
            case Linear():
                gradient = ops.linear_gradient(e, x.reshape(len(x), -1))
                if layer.source != INPUT:
                    e = ops.linear_error(e, self.state[f"{name}.weight"][0]).reshape(x.shape)
                self._update(name, "weight", "momentum", gradient, DECAY)
            case BatchNorm():
                normalised, scale = trace.statistics[name]
                axes = tuple(range(x.ndim - 1))
                beta, gamma = e.sum(axis=axes), (e * normalised).sum(axis=axes)
                count = np.float32(x.size // x.shape[-1])
                factor = self.state[f"{name}.gamma"][0] * scale
                e = factor * (e - beta / count - normalised * (gamma / count))
                self._update(name, "gamma", "gamma_momentum", gamma, np.float32(0))
                self._update(name, "beta", "beta_momentum", beta, np.float32(0))
            case Relu():
                e = ops.relu_error(e, x)
            case MaxPool():
                e = ops.max_pool_error(e, trace.choices[name], layer.size)
            case GlobalAveragePool():
                h, w, _ = layer.input_shape
                e = ops.global_sum_error(e, h, w) / np.float32(h * w)
            case Flatten():
                e = e.reshape(x.shape)
        return [(source, e) for source in layer.sources]

    def _update(self, layer: str, weight: str, momentum: str, gradient, decay) -> None:
        weight, momentum = f"{layer}.{weight}", f"{layer}.{momentum}"
        w, v = self.state[weight][0], self.state[momentum][0]
        v = MOMENTUM * v + gradient + decay * w
        self.state[weight], self.state[momentum] = (w - self.rate * v, 0), (v, 0)
