"""Networks as data: a tuple of layers. A network says nothing about arithmetic; a method supplies it.

`network(model, data)` gives a `Network` whose layers know their name, input and output shapes. Layers form a
list in execution order; each reads the layer before it unless `source` names another (`"input"` is the
image), and `Add` also reads `other`. Parameter layers (convolution, linear, batch norm) count from 0 in
network order for the random streams.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from golden.data import DATA_SETS
from golden.errors import InputError
from golden.ops import conv2d_shape

INPUT = "input"


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer. `name`, shapes (h, w, c) or (features,) and `index` are filled in by `Network`.

    `index` is the number of parameter layers before this one: the layer's own stream number if it has
    parameters.
    """

    kind: ClassVar[str]
    has_weights: ClassVar[bool] = False
    has_parameters: ClassVar[bool] = False
    source: str = ""
    name: str = field(default="", compare=False)
    input_shape: tuple[int, ...] = field(default=(), compare=False)
    output_shape: tuple[int, ...] = field(default=(), compare=False)
    index: int = field(default=-1, compare=False)

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,)

    def infer(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The output shape for an input shape."""
        return shape

    def require_image(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        if len(shape) != 3:
            raise InputError(
                f"{self.name} needs an image (h, w, c), its input has shape {shape}: move it before flatten"
            )
        return shape


@dataclass(frozen=True)
class Conv2d(Layer):
    """Square convolution without bias; weights [channels][kernel][kernel][ci]."""

    kind: ClassVar[str] = "conv"
    has_weights: ClassVar[bool] = True
    has_parameters: ClassVar[bool] = True
    channels: int
    kernel: int
    stride: int = 1
    padding: int = 0

    def infer(self, shape):
        h, w, _ = self.require_image(shape)
        ho, wo = conv2d_shape(h, w, self.kernel, self.stride, self.padding)
        if min(h, w) + 2 * self.padding < self.kernel:
            raise InputError(
                f"{self.name}: kernel {self.kernel} is larger than its padded input {h}x{w} "
                f"(padding {self.padding}): use larger images or a smaller kernel"
            )
        return ho, wo, self.channels

    @property
    def weight_shape(self):
        return self.channels, self.kernel, self.kernel, self.input_shape[2]

    @property
    def fan_in(self) -> int:
        return self.kernel**2 * self.input_shape[2]

    @property
    def fan_out(self) -> int:
        return self.kernel**2 * self.channels

    def macs(self, batch: int) -> int:
        """Useful multiply-accumulates of one pass."""
        return batch * self.output_shape[0] * self.output_shape[1] * self.fan_in * self.channels


@dataclass(frozen=True)
class Linear(Layer):
    """Fully connected layer without bias; an image input is flattened in (h, w, c) order; weights
    [features][in].
    """

    kind: ClassVar[str] = "fc"
    has_weights: ClassVar[bool] = True
    has_parameters: ClassVar[bool] = True
    features: int

    def infer(self, shape):
        return (self.features,)

    @property
    def weight_shape(self):
        return self.features, math.prod(self.input_shape)

    @property
    def fan_in(self) -> int:
        return math.prod(self.input_shape)

    @property
    def fan_out(self) -> int:
        return self.features

    def macs(self, batch: int) -> int:
        """Useful multiply-accumulates of one pass."""
        return batch * self.fan_in * self.features


@dataclass(frozen=True)
class Relu(Layer):
    kind: ClassVar[str] = "relu"


@dataclass(frozen=True)
class MaxPool(Layer):
    """Maximum of non-overlapping size x size windows."""

    kind: ClassVar[str] = "pool"
    size: int = 2

    def infer(self, shape):
        h, w, c = self.require_image(shape)
        if h % self.size or w % self.size:
            raise InputError(
                f"{self.name}: input {h}x{w} is not a multiple of the window {self.size}: "
                "use images of another size or other padding"
            )
        return h // self.size, w // self.size, c


@dataclass(frozen=True)
class GlobalAveragePool(Layer):
    kind: ClassVar[str] = "avgpool"

    def infer(self, shape):
        return (self.require_image(shape)[2],)


@dataclass(frozen=True)
class Flatten(Layer):
    kind: ClassVar[str] = "flatten"

    def infer(self, shape):
        return (math.prod(shape),)


@dataclass(frozen=True)
class BatchNorm(Layer):
    """Per-channel normalisation with gamma and beta [c]."""

    kind: ClassVar[str] = "bn"
    has_parameters: ClassVar[bool] = True


@dataclass(frozen=True)
class Add(Layer):
    """Residual sum of the source and `other` (a layer name), of equal shapes."""

    kind: ClassVar[str] = "add"
    other: str

    @property
    def sources(self):
        return self.source, self.other


@dataclass(frozen=True)
class Network:
    """A checked network: layers with names, shapes and explicit sources; the last layer gives the logits."""

    name: str
    data: str
    input_shape: tuple[int, int, int]
    layers: tuple[Layer, ...]

    def __post_init__(self):
        shapes = {INPUT: tuple(self.input_shape)}
        previous, ordinals, index, layers = INPUT, {}, 0, []
        for layer in self.layers:
            ordinal = ordinals.get(layer.kind, 0)
            ordinals[layer.kind] = ordinal + 1
            name = f"{layer.kind}{ordinal}"
            layer = replace(layer, name=name, source=layer.source or previous, index=index)
            for source in layer.sources:
                if source not in shapes:
                    raise InputError(
                        f"{name} reads {source!r}, which is not an earlier layer: choose from {', '.join(shapes)}"
                    )
            shape = shapes[layer.source]
            if isinstance(layer, Add) and shapes[layer.other] != shape:
                raise InputError(
                    f"{name} adds {layer.source} of shape {shape} to {layer.other} of shape "
                    f"{shapes[layer.other]}: make them equal"
                )
            for f in fields(layer):
                value = getattr(layer, f.name)
                least = {"channels": 1, "kernel": 1, "stride": 1, "size": 1, "features": 1, "padding": 0}.get(f.name)
                if least is not None and value < least:
                    raise InputError(f"{name}: {f.name} must be at least {least}, got {value}")
            shapes[name] = layer.infer(shape)
            layers.append(replace(layer, input_shape=shape, output_shape=shapes[name]))
            index += layer.has_parameters
            previous = name
        if not layers or len(layers[-1].output_shape) != 1 or not layers[-1].has_weights:
            raise InputError(f"network {self.name} must end in a linear layer that gives the logits")
        object.__setattr__(self, "layers", tuple(layers))

    @property
    def classes(self) -> int:
        return self.layers[-1].output_shape[0]

    @property
    def weight_layers(self) -> tuple[Layer, ...]:
        """Convolution and linear layers, in network order."""
        return tuple(layer for layer in self.layers if layer.has_weights)

    @property
    def parameter_layers(self) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if layer.has_parameters)

    def layer(self, name: str) -> Layer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def consumers(self, name: str) -> tuple[Layer, ...]:
        return tuple(layer for layer in self.layers if name in layer.sources)

    def training_macs(self, batch: int) -> int:
        """Useful multiply-accumulates of one step: three passes per layer, two for the first."""
        layers = self.weight_layers
        return sum(layer.macs(batch) * (2 if layer is layers[0] else 3) for layer in layers)


def _conv(channels: int, kernel: int = 3, batch_norm: bool = False) -> tuple[Layer, ...]:
    """Convolution that keeps the image size, optional batch norm, ReLU."""
    norm = (BatchNorm(),) if batch_norm else ()
    return Conv2d(channels, kernel, padding=kernel // 2), *norm, Relu()


def _mlp(data: str) -> tuple[Layer, ...]:
    return Linear(32 if data == "digits" else 128), Relu(), Linear(10)


def _mlp_128(data: str) -> tuple[Layer, ...]:
    """Ternary weights need the width: the mlp for wage on digits."""
    return Linear(128), Relu(), Linear(10)


def _lenet(data: str) -> tuple[Layer, ...]:
    return (
        Conv2d(20, 5),
        Relu(),
        MaxPool(),
        Conv2d(50, 5),
        Relu(),
        MaxPool(),
        Flatten(),
        Linear(500),
        Relu(),
        Linear(10),
    )


def _wage_lenet(data: str) -> tuple[Layer, ...]:
    return (
        Conv2d(32, 5),
        Relu(),
        MaxPool(),
        Conv2d(64, 5),
        Relu(),
        MaxPool(),
        Flatten(),
        Linear(512),
        Relu(),
        Linear(10),
    )


def _vgg_small_7(data: str) -> tuple[Layer, ...]:
    blocks = [(*_conv(c), *_conv(c), MaxPool()) for c in (128, 256, 512)]
    return *sum(blocks, ()), Flatten(), Linear(10)


def _wage_vgg7(data: str) -> tuple[Layer, ...]:
    blocks = [(*_conv(c), *_conv(c), MaxPool()) for c in (128, 256, 512)]
    return *sum(blocks, ()), Flatten(), Linear(1024), Relu(), Linear(10)


def _tiny_cnn(data: str) -> tuple[Layer, ...]:
    return *_conv(16), MaxPool(), *_conv(32), MaxPool(), Flatten(), Linear(10)


def _tiny_cnn_bn(data: str) -> tuple[Layer, ...]:
    return (
        *_conv(16, batch_norm=True),
        MaxPool(),
        *_conv(32, batch_norm=True),
        MaxPool(),
        Flatten(),
        Linear(10),
    )


def _bench_cnn(data: str) -> tuple[Layer, ...]:
    return (*_conv(32), *_conv(32), MaxPool(), *_conv(64), *_conv(64), MaxPool(), Flatten(), Linear(10))


def _residual(widths: tuple[int, ...], blocks: int) -> tuple[Layer, ...]:
    """Stem and `blocks` two-convolution blocks per width; a change of width halves the image by a 1x1
    projection.
    """
    layers = [*_conv(widths[0], batch_norm=True)]
    convs = norms = relus = adds = 1
    adds = 0
    width_in, block_input = widths[0], "relu0"
    for width in widths:
        for _ in range(blocks):
            stride = 1 if width == width_in else 2
            layers += [
                Conv2d(width, 3, stride, 1, source=block_input),
                BatchNorm(),
                Relu(),
                Conv2d(width, 3, 1, 1),
                BatchNorm(),
            ]
            body = f"bn{norms + 1}"
            convs, norms, relus = convs + 2, norms + 2, relus + 1
            shortcut = block_input
            if stride != 1:
                layers += [Conv2d(width, 1, stride, 0, source=block_input), BatchNorm()]
                shortcut = f"bn{norms}"
                convs, norms = convs + 1, norms + 1
            layers += [Add(source=body, other=shortcut), Relu()]
            block_input = f"relu{relus}"
            relus, adds, width_in = relus + 1, adds + 1, width
    return *layers, GlobalAveragePool(), Linear(10)


def _resnet_20(data: str) -> tuple[Layer, ...]:
    return _residual((16, 32, 64), 3)


def _tiny_resnet(data: str) -> tuple[Layer, ...]:
    return _residual((16, 32), 1)


MODELS: dict[str, Callable[[str], tuple[Layer, ...]]] = {
    "mlp": _mlp,
    "mlp-128": _mlp_128,
    "lenet": _lenet,
    "wage-lenet": _wage_lenet,
    "vgg-small-7": _vgg_small_7,
    "wage-vgg7": _wage_vgg7,
    "resnet-20": _resnet_20,
    "tiny-cnn": _tiny_cnn,
    "tiny-cnn-bn": _tiny_cnn_bn,
    "tiny-resnet": _tiny_resnet,
    "bench-cnn": _bench_cnn,
}


def network(model: str, data: str = "digits") -> Network:
    """The named network for the named data set; refuses unknown names and shapes that do not fit, in one
    line.
    """
    if model not in MODELS:
        raise InputError(f"unknown model {model!r}: choose from {', '.join(MODELS)}")
    if data not in DATA_SETS:
        raise InputError(f"unknown data {data!r}: choose from {', '.join(DATA_SETS)}")
    try:
        return Network(model, data, DATA_SETS[data].shape, MODELS[model](data))
    except InputError as error:
        raise InputError(f"{model} does not fit {data} images: {error}") from None
