"""The NITI rules, re-derived in Python integers and fractions, and whole steps against a loop-only implementation."""

import math
from fractions import Fraction

import numpy as np
import pytest

from golden import data, niti, random
from golden.errors import InputError
from golden.rounding import Rounding, nearest
from golden.train import build, step

RNG = np.random.default_rng(11)


def sign(x):
    return (x > 0) - (x < 0)


def clip(x, limit=127):
    return max(-limit, min(limit, x))


def psr(x, s):
    if s <= 0:
        return x
    fraction, half = abs(x) % 2**s, s // 2
    q, r = fraction >> half, fraction % 2**half
    return sign(x) * ((abs(x) >> s) + (q > (2 * r if s % 2 else r)))


def ceil_log2(m):
    c = 0
    while 2**c < m:
        c += 1
    return c


def ref_requantize(values, exponent, mode):
    s = ceil_log2(max(map(abs, values), default=0)) - 7
    if s <= 0:
        return [clip(v) for v in values], exponent
    if mode == "niti-2020":
        s = max(s, 2)
        return [clip(psr(v, s)) for v in values], exponent + s
    return [clip(sign(v) * math.floor(abs(Fraction(v, 2**s)) + Fraction(1, 2))) for v in values], exponent + s


def ref_loss(row, exponent, label, draw=None):
    """niti.md 4.1 to 4.3 for one row."""
    S = max(exponent, -20)
    if S > -7:
        u = [int(Fraction(a * 47274, 2**15)) for a in row]
        s = [v * 2**S if S >= 0 else int(Fraction(v, 2**-S)) for v in u]
        p = [2 ** max(v - (max(s) - 10), 0) - 1 for v in s]
    else:
        p = [2 ** (1 - 2 * S) + a * 2 ** (1 - S) + a * a for a in row]
    total = sum(p)
    g = [v * 2**11 // total for v in p]
    g[label] -= sum(g)
    if draw is None:
        return [clip(psr(v, 4)) for v in g]
    return [clip(sign(v) * (abs(v) // 16 + (abs(v) % 16 > d))) for v, d in zip(g, draw, strict=True)]


@pytest.mark.parametrize("scale", [1.0, 2.0, 1.999999, 0.3, 1e-6, 12345.6])
def test_convert_input(scale):
    x = RNG.uniform(-1, 1, 300)
    x[:3] = 1, -1, 0.5
    x *= scale
    m, e = niti.convert_input(x)
    largest = Fraction(float(np.abs(x).max()))
    b = e + 7
    assert Fraction(2) ** (b - 1) < largest <= Fraction(2) ** b
    assert m.tolist() == [clip(round(Fraction(float(v)) / Fraction(2) ** e)) for v in x]


def test_convert_input_edges():
    assert niti.convert_input(np.zeros(3)) == (pytest.approx(np.zeros(3)), -7)
    m, e = niti.convert_input(np.array([4.0, -4.0, 1.0]))  # a power of two maps to 128 and saturates
    assert (m.tolist(), e) == ([127, -127, 32], -5)
    with pytest.raises(InputError, match="finite"):
        niti.convert_input(np.array([np.nan]))


@pytest.mark.parametrize("mode", ["niti", "niti-2020"])
@pytest.mark.parametrize("largest", [0, 1, 100, 127, 128, 129, 255, 256, 257, 5000, 2**20, 2**21 + 1, 2**31 - 1])
def test_requantize(mode, largest):
    values = RNG.integers(-largest, largest + 1, 200)
    values[:2] = largest, -largest
    options = niti.MODES[mode]
    m, e = niti.requantize(values, -9, options.activation, options.minimum_shift)
    assert m.dtype == np.int8
    assert (m.tolist(), e) == ref_requantize(values.tolist(), -9, mode)


def test_requantize_saturates_where_the_reference_wraps():
    m, e = niti.requantize(np.array([128, -128]), 3, "nearest")
    assert (m.tolist(), e) == ([127, -127], 3)
    assert niti.requantize(np.array([300, 2]), 0, nearest)[0].tolist() == [75, 1]


@pytest.mark.parametrize("exponent", range(-24, 8))
def test_loss_gradient(exponent):
    logits = RNG.integers(-127, 128, (40, 10)).astype(np.int8)
    logits[0] = 127
    logits[1] = -127
    logits[2, 3] = 127
    labels = RNG.integers(0, 10, 40)
    g = niti.loss_gradient(logits, exponent, labels)
    assert g.dtype == np.int8
    assert g.tolist() == [
        ref_loss(row, exponent, label) for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    draw = RNG.integers(0, 16, logits.shape)
    g = niti.loss_gradient(logits, exponent, labels, draw)
    expected = [ref_loss(*row) for row in zip(logits.tolist(), [exponent] * 40, labels.tolist(), draw.tolist())]  # noqa: B905
    assert g.tolist() == expected


@pytest.mark.parametrize("bits", [-1, 0, 1, 3, 5, 7])
@pytest.mark.parametrize("largest", [0, 1, 2, 3, 31, 32, 33, 128, 5000, 2**31 - 1])
def test_weight_gradient(bits, largest):
    acc = RNG.integers(-largest, largest + 1, 300)
    acc[:2] = largest, -largest
    b = ceil_log2(largest) if largest else 0
    s = b - bits
    expected = [0] * 300 if b == 0 else [clip(psr(int(v), s) if s >= 1 else int(v)) for v in acc]
    assert niti.weight_gradient(acc, bits).tolist() == expected


def test_weight_gradient_of_wide_masters_and_update():
    acc = np.array([-(2**20), 12345, 2**20])
    wide = niti.weight_gradient(acc, 13, 16)
    assert wide.dtype == np.int16 and wide.tolist() == [psr(int(v), 7) for v in acc]
    assert niti.update(np.int8([127, -127, 5]), np.int8([-3, 3, 7])).tolist() == [127, -127, -2]
    assert niti.update(np.int16([32767, 3]), np.int16([-1, 4]), 16).tolist() == [32767, -1]
    assert niti.narrow(np.int16([32767, -32767, 0x0180, 0x0118])).tolist() == [
        clip(psr(v, 8)) for v in (32767, -32767, 0x0180, 0x0118)
    ]


def test_initial_weights():
    m, e = niti.initial_weights(3, 1, (10, 32), 32, 10)
    stream = 0xFFFF0001 + 16
    w = [(2 * random.word(3, 0, stream, i) / 2**32 - 1) * math.sqrt(6 / 42) for i in range(320)]
    largest = max(map(abs, w))
    assert m.reshape(-1).tolist() == [round(v / largest * 127) for v in w]
    assert e == math.ceil(math.log2(largest)) - 7
    assert np.abs(m).max() == 127


def loops_matmul(a, b):
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


@pytest.mark.parametrize("method", ["niti", "niti-2020"])
def test_mlp_steps_equal_a_loop_implementation(method):
    digits = data.load("digits")
    network = build(method, "mlp", 5, data="digits", batch=8)
    weights = {name: (array.tolist(), e) for name, (array, e) in network.state.items()}
    for k in range(3):
        images, labels = digits.train_images[8 * k : 8 * k + 8], digits.train_labels[8 * k : 8 * k + 8]
        record = step(network, images, labels)
        real = (images.reshape(8, 64) / 16 - digits.mean[0]) / digits.std[0]
        x, e0 = niti.convert_input(real)
        x = x.tolist()
        (w0, we0), (w1, we1) = weights["fc0.weight"], weights["fc1.weight"]

        def layer(a, w, e):
            acc = loops_matmul(a, list(zip(*w, strict=True)))
            flat, e = ref_requantize([v for row in acc for v in row], e, method)
            return np.reshape(flat, (len(a), len(w))).tolist(), e

        h, e1 = layer(x, w0, e0 + we0)
        a = [[max(v, 0) for v in row] for row in h]
        logits, e2 = layer(a, w1, e1 + we1)
        error = [ref_loss(row, e2, int(label)) for row, label in zip(logits, labels, strict=True)]
        back = loops_matmul(error, w1)
        flat, e_error = ref_requantize([v for row in back for v in row], we1, method)
        hidden = np.reshape(flat, (8, 32)) * (np.array(h) > 0)
        g1 = loops_matmul(list(zip(*error, strict=True)), a)
        g0 = loops_matmul(hidden.T.tolist(), x)
        for name, g in (("fc0", g0), ("fc1", g1)):
            b = ceil_log2(max(abs(v) for row in g for v in row))
            new = [
                [clip(w - clip(psr(v, b - 5))) for w, v in zip(wr, gr, strict=True)]
                for wr, gr in zip(weights[f"{name}.weight"][0], g, strict=True)
            ]
            weights[f"{name}.weight"] = new, weights[f"{name}.weight"][1]
        expected = {
            "logits": logits,
            "fc0.activation": x,
            "fc1.activation": a,
            "fc0.error": hidden.tolist(),
            "fc1.error": error,
            "fc0.gradient": g0,
            "fc1.gradient": g1,
            "fc0.weight": weights["fc0.weight"][0],
            "fc1.weight": weights["fc1.weight"][0],
        }
        exponents = {
            "logits": e2,
            "fc0.activation": e0,
            "fc1.activation": e1,
            "fc0.error": e_error,
            "fc1.error": 0,
            "fc0.weight": we0,
            "fc1.weight": we1,
        }
        for name, tensor in expected.items():
            assert np.reshape(record[name], np.shape(tensor)).tolist() == tensor, (k, name)
        for name, exponent in exponents.items():
            assert record[f"{name}.exponent"] == exponent, (k, name)
        assert set(record.required) == set(expected) | {f"{name}.exponent" for name in exponents}


def test_record_intermediates_and_first_layer():
    network = build("niti", "tiny-cnn", 1, batch=4)
    digits = data.load("digits")
    record = step(network, digits.train_images[:4], digits.train_labels[:4], intermediates=True)
    assert "conv0.accumulator" in record and "conv0.accumulator" not in record.required
    assert "conv1.error_accumulator" in record and "conv0.error_accumulator" not in record
    assert record["conv1.error"].shape == (4, 4, 4, 32) and record["conv1.gradient"].dtype == np.int32
    assert record["fc0.activation"].shape == (4, 128)
    fewer = step(build("niti", "tiny-cnn", 1, batch=4), digits.train_images[:4], digits.train_labels[:4])
    assert tuple(fewer) == record.required


def test_converted_images_equal_raw_images():
    digits = data.load("digits")
    images, labels = digits.train_images[:8], digits.train_labels[:8]
    raw, converted = (build("niti", "mlp", 1) for _ in range(2))
    step(raw, images, labels)
    step(converted, converted.convert(images), labels)
    assert raw.digest() == converted.digest()
    real = (images / 16 - digits.mean[0]) / digits.std[0]
    m, e = niti.convert_input(real)
    assert e == raw.convert(images)[1] and (m == raw.convert(images)[0]).all()


def test_colour_images_convert_by_the_definition():
    images = data.load("synthetic").train_images[:4]
    network = build("niti", "bench-cnn", 1, data="synthetic")
    info = network.data
    m, e = niti.convert_input((images / 255 - np.array(info.mean)) / np.array(info.std))
    result, exponent = network.convert(images)
    assert exponent == e and (result == m).all()


def test_wide_weights_start_at_the_narrow_ones_and_train():
    digits = data.load("digits")
    wide, narrow = build("niti", "mlp", 1, weight_bits=16), build("niti", "mlp", 1)
    assert wide.state["fc0.weight"][0].dtype == np.int16
    assert (wide.forward(digits.test_images[:32])[0] == narrow.forward(digits.test_images[:32])[0]).all()
    record = step(wide, digits.train_images[:32], digits.train_labels[:32])
    master, exponent = wide.state["fc0.weight"]
    assert (record["fc0.weight"] == master).all() and exponent == narrow.state["fc0.weight"][1] - 8
    assert (master % 256 != 0).any()


def test_networks_that_niti_cannot_run():
    for model, layer in (("tiny-cnn-bn", "BatchNorm"), ("tiny-resnet", "BatchNorm")):
        with pytest.raises(InputError, match=f"method niti has no rule for {layer}"):
            build("niti", model, 1)
    with pytest.raises(InputError, match="weight_bits must be 8 or 16, got 9"):
        build("niti", "mlp", 1, weight_bits=9)


def test_modes_are_choices_of_rounding():
    assert niti.MODES["niti-2020"] == niti.Mode(*[Rounding.PSEUDO_STOCHASTIC] * 4, minimum_shift=2)
    assert niti.MODES["niti"].gradient is Rounding.PSEUDO_STOCHASTIC
