"""The WAGE rules from wage.md in Python integers and fractions, and whole steps against loops."""

import math
from fractions import Fraction

import numpy as np
import pytest

from golden import data, random, wage
from golden.errors import InputError
from golden.train import build, step

RNG = np.random.default_rng(12)


def clip(x, limit=127):
    return max(-limit, min(limit, x))


def rne(x, s):
    return round(Fraction(x) / Fraction(2) ** s)


def shift_exponent(m):
    """round(log2 m) by comparing squares."""
    k = 0
    while m * m * 2 > 4 ** (k + 1):
        k += 1
    return k


def test_input_map_is_the_quantised_scaling_of_all_256_pixels():
    result = wage.convert_input(np.arange(256))
    assert result.dtype == np.int8
    assert result.tolist() == [clip(round((Fraction(p) / Fraction(255, 2) - 1) * 128)) for p in range(256)]
    assert 0 not in result
    with pytest.raises(InputError, match="pixels must be 0..255, got -1..3"):
        wage.convert_input(np.array([-1, 3]))


def test_alpha_from_the_table_and_from_real_arithmetic():
    table = {25: 2, 27: 2, 64: 4, 128: 4, 256: 8, 512: 8, 784: 16, 800: 16, 1024: 16, 1152: 16, 2304: 16}
    table |= {3136: 32, 4608: 32, 8192: 32}
    assert {n: 1 << wage.alpha_shift(n) for n in table} == table
    for n in range(6, 3000):
        # max(1, 2**round(log2(0.75 / sqrt(3 / n)))); never a tie
        exact = max(0, round(math.log2(0.75 / math.sqrt(3 / n))))
        assert wage.alpha_shift(n) == exact, n
    with pytest.raises(ValueError, match="at least 1, got 0"):
        wage.alpha_shift(0)


def test_ternarize_all_masters():
    masters = np.arange(-127, 128)
    assert wage.ternarize(masters).tolist() == [(m >= 33) - (m <= -33) for m in masters.tolist()]
    assert wage.ternarize(masters, wage.Widths(weight=4)).tolist() == [clip(rne(m, 4), 7) for m in masters.tolist()]


@pytest.mark.parametrize("shift", [1, 2, 4, 6])
def test_quantize_activation(shift):
    acc = np.arange(-(140 << shift), 140 << shift)
    a, blocked = wage.quantize_activation(acc, shift)
    assert a.tolist() == [clip(rne(v, shift)) for v in acc.tolist()]
    assert blocked.tolist() == [abs(v) > 127 << shift for v in acc.tolist()]


@pytest.mark.parametrize("largest", [1, 2, 3, 90, 91, 127, 128, 181, 182, 1000, 370727, 370728, 2**28])
def test_quantize_error(largest):
    raw = RNG.integers(-largest, largest + 1, 300)
    raw[0] = largest
    e, k = wage.quantize_error(raw)
    assert k == shift_exponent(largest)
    assert e.tolist() == [clip(rne(v, k - 7)) for v in raw.tolist()]
    wide, _ = wage.quantize_error(raw, 12)
    assert wide.dtype == np.int16 and wide.tolist() == [clip(rne(v, k - 11), 2047) for v in raw.tolist()]


def test_zero_tensors_give_zero_errors_and_no_step():
    e, _ = wage.quantize_error(np.zeros(3, np.int32))
    assert e.tolist() == [0, 0, 0]
    assert wage.weight_step(np.zeros(3, np.int32), 3, np.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("rate", [-3, 0, 3, 5])
@pytest.mark.parametrize("largest", [1, 2, 7, 1000, 2**31 - 1])
def test_weight_step(rate, largest):
    acc = RNG.integers(-largest, largest + 1, 300)
    acc[0] = largest
    draw = RNG.integers(0, 2**16, 300)
    shift = shift_exponent(largest) - rate
    expected = []
    for g, r in zip(acc.tolist(), draw.tolist(), strict=True):
        magnitude = Fraction(abs(g)) / Fraction(2) ** shift
        up = magnitude - math.floor(magnitude) > Fraction(r, 2**16)
        expected.append((-1 if g < 0 else 1) * (math.floor(magnitude) + up))
    assert wage.weight_step(acc, rate, draw).tolist() == expected


def test_update_clips_at_the_limit():
    masters = np.int8([64, -64, 10])
    assert wage.update(masters, np.array([-5, 5, 12])).tolist() == [64, -64, -2]
    assert wage.update(masters, np.array([-5, 90, 12]), 127).tolist() == [69, -127, -2]
    assert wage.update(masters, np.array([0, 0, 0])).dtype == np.int8


def test_initial_masters_are_ternary_digits_of_the_words():
    masters = wage.initial_masters(9, 2, (20, 30), 30)
    stream = 0xFFFF0001 + 32
    assert masters.reshape(-1).tolist() == [64 * ((random.word(9, 0, stream, i) * 3 >> 32) - 1) for i in range(600)]


def test_widths():
    assert wage.Widths.parse("28CC") == wage.Widths(2, 8, 12, 12)
    for text in ("288", "28Z8"):
        with pytest.raises(InputError, match="four hexadecimal digits"):
            wage.Widths.parse(text)
    with pytest.raises(InputError, match="activation width must be 2..8 bits, got 9"):
        wage.Widths.parse("2988")
    with pytest.raises(InputError, match="wider than weights"):
        wage.Widths.parse("4848")


def test_input_of_data_sets():
    """Colour by the authors' map, grey centred on the data set's mean pixel."""
    colour = data.load("synthetic").train_images[:2]
    m, e = build("wage", "bench-cnn", 1, data="synthetic").convert(colour)
    assert (m == wage.convert_input(colour)).all() and e == -7
    pixels = np.arange(256, dtype=np.uint8).repeat(784).reshape(256, 28, 28, 1)
    m, _ = build("wage", "lenet", 1, data="mnist").convert(pixels)
    assert m[:, 0, 0, 0].tolist() == [clip(p - 33) for p in range(256)]


def matmul(a, b):
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


def flat_error(rows):
    flat = [v for row in rows for v in row]
    k = shift_exponent(max(map(abs, flat)))
    return [[clip(rne(v, k - 7)) for v in row] for row in rows]


def test_mlp_steps_equal_a_loop_implementation():
    digits = data.load("digits")
    network = build("wage", "mlp", 4, batch=8)
    masters = [network.state[f"fc{i}.weight"][0].tolist() for i in (0, 1)]
    s0, s1 = (1 + round(math.log2(0.75 / math.sqrt(3 / n))) for n in (64, 32))
    rate = network.learning_rate()
    for k in range(3):
        images, labels = digits.train_images[8 * k : 8 * k + 8], digits.train_labels[8 * k : 8 * k + 8]
        record = step(network, images, labels)
        x = [[clip(min(16 * int(p), 255) - 78) for p in row] for row in images.reshape(8, 64)]
        t = [[[(m > 32) - (m < -32) for m in row] for row in layer] for layer in masters]
        acc = matmul(x, list(zip(*t[0], strict=True)))
        a = [[clip(rne(max(v, 0), s0)) for v in row] for row in acc]
        logits = matmul(a, list(zip(*t[1], strict=True)))
        raw = [[v - (128 * 2**s1 if c == label else 0) for c, v in enumerate(row)]
               for row, label in zip(logits, labels, strict=True)]  # fmt: skip
        error = flat_error(raw)
        back = matmul(error, t[1])
        clipped = [[0 if v > 127 << s0 else b for b, v in zip(*rows, strict=True)]
                   for rows in zip(back, acc, strict=True)]  # fmt: skip
        hidden = [[e if v > 0 else 0 for e, v in zip(*rows, strict=True)]
                  for rows in zip(flat_error(clipped), acc, strict=True)]  # fmt: skip
        gradients = [matmul(list(zip(*e, strict=True)), v) for e, v in ((hidden, x), (error, a))]
        for layer, gradient in enumerate(gradients):
            shift = shift_exponent(max(abs(v) for row in gradient for v in row)) - rate
            for i, row in enumerate(gradient):
                for j, g in enumerate(row):
                    draw = random.word(4, k, 16 * layer + 2, i * len(row) + j) >> 16
                    magnitude = Fraction(abs(g)) / Fraction(2) ** shift
                    up = magnitude - math.floor(magnitude) > Fraction(draw, 2**16)
                    delta = (-1 if g < 0 else 1) * (math.floor(magnitude) + up)
                    masters[layer][i][j] = clip(masters[layer][i][j] - delta, 64)
        expected = {"logits": logits, "fc0.activation": x, "fc1.activation": a, "fc0.error": hidden}
        expected |= {"fc1.error": error, "fc0.gradient": gradients[0], "fc1.gradient": gradients[1]}
        expected |= {"fc0.weight": masters[0], "fc1.weight": masters[1]}
        for name, tensor in expected.items():
            assert np.reshape(record[name], np.shape(tensor)).tolist() == tensor, (k, name)
        assert record["logits.exponent"] == -7 - s1
        assert all(record[f"fc{i}.weight.exponent"] == 0 for i in (0, 1))


def test_pool_before_relu_routes_and_masks_as_the_reference():
    """One convolution layer: clip mask, maximum, quantise, ReLU mask, unpool, in that order."""
    digits = data.load("digits")
    network = build("wage", "tiny-cnn", 8, batch=16)
    record = step(network, digits.train_images[:16], digits.train_labels[:16], intermediates=True)
    acc, shift = record["conv1.accumulator"], network.activation_shift(network.description.layer("conv1"))
    raw = record["fc0.error_accumulator"].reshape(16, 2, 2, 32).astype(int)
    expected = np.zeros(acc.shape, int)
    windows, at_zero = {}, 0
    for n, i, j, c in np.ndindex(raw.shape):
        window = acc[n, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2, c].reshape(-1).tolist()
        windows[n, i, j, c] = window.index(max(window)), max(window)
        if max(window) > 127 << shift:
            raw[n, i, j, c] = 0
        at_zero = max(at_zero, abs(raw[n, i, j, c]) * (max(window) == 0))
    k = shift_exponent(int(np.abs(raw).max()))
    for (n, i, j, c), (where, value) in windows.items():
        if value > 0:
            expected[n, 2 * i + where // 2, 2 * j + where % 2, c] = clip(rne(int(raw[n, i, j, c]), k - 7))
    assert (record["conv1.error"] == expected).all()
    # The case is worth its name: clipped maxima, and a maximum of exactly 0 with an error to block.
    assert any(value > 127 << shift for _, value in windows.values()) and at_zero > 100


def test_options():
    assert build("wage", "mlp", 1, master_limit=127).master_limit == 127
    assert build("wage", "mlp", 1, widths="28CC").master_limit == 1024
    with pytest.raises(InputError, match="master_limit must be 1..127, got 200"):
        build("wage", "mlp", 1, master_limit=200)
    digits = data.load("digits")
    network = build("wage", "tiny-cnn", 1, widths="46CC", batch=8)
    record = step(network, digits.train_images[:8], digits.train_labels[:8])
    assert record["conv1.error"].dtype == np.int16 and 127 < np.abs(record["conv1.error"]).max() <= 2047
    assert np.abs(record["conv1.activation"]).max() <= 31
    assert record["conv0.weight"].dtype == np.int16
    with pytest.raises(InputError, match="no rule for BatchNorm"):
        build("wage", "tiny-resnet", 1)
