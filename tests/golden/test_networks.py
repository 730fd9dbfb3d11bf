import pytest

from golden.errors import InputError
from golden.networks import Add, BatchNorm, Conv2d, Flatten, Linear, MaxPool, Network, Relu, network


def names(net):
    return [layer.name for layer in net.layers]


def test_names_shapes_and_indices_of_lenet():
    net = network("lenet", "mnist")
    assert names(net) == ["conv0", "relu0", "pool0", "conv1", "relu1", "pool1", "flatten0", "fc0", "relu2", "fc1"]
    assert [layer.output_shape for layer in net.weight_layers] == [(24, 24, 20), (8, 8, 50), (500,), (10,)]
    assert [layer.index for layer in net.weight_layers] == [0, 1, 2, 3]
    assert net.layer("fc0").weight_shape == (500, 800) and net.layer("conv1").weight_shape == (50, 5, 5, 20)
    assert net.layer("conv1").fan_in == 500 and net.layer("conv1").fan_out == 1250
    # 64 * (24*24*25*20 + 8*8*500*50 + 800*500 + 5000), two passes for the first layer and three for the rest
    assert net.training_macs(64) == 64 * (2 * 288_000 + 3 * (1_600_000 + 400_000 + 5_000))


@pytest.mark.parametrize(
    "model,data,parameters",
    [
        ("mlp", "digits", 64 * 32 + 320),
        ("mlp", "mnist", 784 * 128 + 1280),
        ("wage-lenet", "mnist", 800 + 51200 + 1024 * 512 + 5120),
        ("vgg-small-7", "cifar-10", 4_656_512),
        ("wage-vgg7", "cifar-10", 12_973_440),
        ("resnet-20", "cifar-10", 270_896 + 64 * 32 + 32 * 16 - 576),
        ("bench-cnn", "synthetic", 864 + 9216 + 18432 + 36864 + 10240),
    ],
)
def test_weights_of_the_networks(model, data, parameters):
    count = 0
    for layer in network(model, data).weight_layers:
        size = 1
        for n in layer.weight_shape:
            size *= n
        count += size
    if model == "resnet-20":
        # stem, 18 convolutions, two projections, 64 * 10
        widths = [(3, 16)] + [(16, 16)] * 6 + [(16, 32)] + [(32, 32)] * 5 + [(32, 64)] + [(64, 64)] * 5
        parameters = sum(9 * a * b for a, b in widths) + 16 * 32 + 32 * 64 + 640
    assert count == parameters


def test_residual_network_is_wired_as_blocks():
    net = network("tiny-resnet", "digits")
    adds = [layer for layer in net.layers if isinstance(layer, Add)]
    assert [add.sources for add in adds] == [("bn2", "relu0"), ("bn4", "bn5")]
    assert net.layer("conv5").source == "relu2" and net.layer("conv3").source == "relu2"
    assert {layer.name for layer in net.consumers("relu2")} == {"conv3", "conv5"}
    assert net.layer("bn0").index == 1 and net.layer("conv1").index == 2
    assert len(network("resnet-20", "cifar-10").weight_layers) == 22


@pytest.mark.parametrize(
    "layers,message",
    [
        ((Linear(10), Relu()), "must end in a linear layer"),
        ((), "must end in a linear layer"),
        ((Flatten(), Conv2d(3, 3), Linear(10)), "conv0 needs an image"),
        ((Conv2d(3, 9), Linear(10)), "conv0: kernel 9 is larger than its padded input 8x8"),
        ((MaxPool(3), Linear(10)), "pool0: input 8x8 is not a multiple of the window 3"),
        ((Conv2d(0, 3), Linear(10)), "conv0: channels must be at least 1, got 0"),
        ((Conv2d(4, 3, stride=0), Linear(10)), "conv0: stride must be at least 1, got 0"),
        ((Conv2d(4, 3, padding=-1), Linear(10)), "conv0: padding must be at least 0, got -1"),
        ((Conv2d(4, 3, source="conv7"), Linear(10)), "conv0 reads 'conv7', which is not an earlier layer"),
        ((Conv2d(4, 3), BatchNorm(), Conv2d(4, 3), Add(other="bn0"), Linear(10)), "add0 adds conv1 of shape"),
    ],
)
def test_networks_that_do_not_fit_are_refused_in_one_line(layers, message):
    with pytest.raises(InputError) as caught:
        Network("test", "digits", (8, 8, 1), layers)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_unknown_names():
    with pytest.raises(InputError, match="unknown model 'lenett': choose from mlp, mlp-128, lenet"):
        network("lenett", "mnist")
    with pytest.raises(InputError, match="unknown data 'minst': choose from digits"):
        network("mlp", "minst")
    with pytest.raises(InputError, match="lenet does not fit digits images: conv1: kernel 5"):
        network("lenet", "digits")
