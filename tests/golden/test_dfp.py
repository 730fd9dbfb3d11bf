"""The dfp rules from dfp.md and docs/arithmetic.md in Python integers, and whole steps against loops."""

import math
from fractions import Fraction

import numpy as np
import pytest

from golden import data, dfp, ops, random
from golden.errors import InputError
from golden.train import build, step

RNG = np.random.default_rng(13)


def clip(x, bits=8):
    limit = 2 ** (bits - 1) - 1
    return max(-limit, min(limit, x))


def rn(x, s):
    """Half up; a negative shift is exact."""
    return math.floor(Fraction(x) / Fraction(2) ** s + Fraction(1, 2)) if s > 0 else x << -s


def sr(x, s, word):
    return math.floor((Fraction(x) + Fraction(word, 2**32) * 2**s) / 2**s) if s <= 32 else None


def ref_requantize(values, exponent, bits, words=None):
    s = max((abs(v).bit_length() for v in values), default=0) - (bits - 1)
    if not any(values) or (s < 0 and bits == 8):
        return list(values), exponent
    if s <= 0:
        return [v << -s for v in values], exponent + s
    if words is None:
        return [clip(rn(v, s), bits) for v in values], exponent + s
    drop = max(s - 32, 0)
    return [
        clip(((v >> drop) + (w >> max(32 - s, 0))) >> min(s, 32), bits) for v, w in zip(values, words, strict=True)
    ], (exponent + s)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("largest", [0, 1, 63, 127, 128, 255, 32767, 32768, 10**6, 2**31 - 1, 2**39, 2**45, 2**55])
def test_requantize(bits, largest):
    values = RNG.integers(-largest, largest + 1, 200)
    values[0] = largest
    words = RNG.integers(0, 2**32, 200, dtype=np.uint64)
    for draw in (None, words.astype(np.uint32)):
        q, e = dfp.requantize(values, -4, bits, draw)
        assert q.dtype == (np.int8 if bits == 8 else np.int16)
        expected = ref_requantize(values.tolist(), -4, bits, None if draw is None else words.tolist())
        assert (q.tolist(), e) == expected


def test_map_float_worked_example():
    x = np.array([1, -0.5, 0.25, 3.14, -0.001, 0, 127], np.float32)
    low, e = dfp.map_float(x, 8, np.zeros(7, np.uint32))
    high, _ = dfp.map_float(x, 8, np.full(7, 2**32 - 1, np.uint32))
    assert e == 0
    # -0.001 is 33 bits below the largest significand: beyond 32 it is dropped whatever the draw.
    assert low.tolist() == [1, -1, 0, 3, 0, 0, 127] and high.tolist() == [1, 0, 1, 4, 0, 0, 127]
    assert dfp.map_float(np.float32([127.5]), 8, np.zeros(1, np.uint32))[0].tolist() == [127]


@pytest.mark.parametrize("bits", [8, 16])
def test_map_float_against_fractions(bits):
    x = (RNG.normal(size=300) * 2.0 ** RNG.integers(-30, 5, 300)).astype(np.float32)
    words = RNG.integers(0, 2**32, 300, dtype=np.uint32)
    top = math.floor(math.log2(max(abs(float(v)) for v in x)))
    e = top - (bits - 2)
    near, drawn = dfp.map_float(x, bits), dfp.map_float(x, bits, words)
    assert near[1] == drawn[1] == e
    for value, w, a, b in zip(x.tolist(), words.tolist(), near[0].tolist(), drawn[0].tolist(), strict=True):
        exact = Fraction(value) / Fraction(2) ** e
        if exact == 0:
            assert a == b == 0
            continue
        shift = top - math.floor(math.log2(abs(value))) + 24 - (bits - 1)
        if shift > 32:
            assert a == b == 0
        else:
            assert a == clip(math.floor(exact + Fraction(1, 2)), bits)
            assert b == clip(math.floor(exact + Fraction(w >> (32 - shift), 2**shift)), bits)


def test_map_float_special_values():
    assert dfp.map_float(np.float32([0, -0.0, 1e-45]), 8)[0].tolist() == [0, 0, 0]
    for bad in (np.inf, np.nan):
        with pytest.raises(InputError, match="NaN or infinity"):
            dfp.map_float(np.float32([1, bad]), 8)


def test_aligned_sum():
    a, b = np.array([100, -3, 0]), np.array([1, 1, 1])
    total, e = dfp.aligned_sum([(a, 2), (b, -1)], 30)
    assert (total.tolist(), e) == ([801, -23, 1], -1)
    total, e = dfp.aligned_sum([(a, 2), (b, -40)], 30)  # the top is bit 9: the grid stops 30 bits below it
    assert e == -21 and total.tolist() == [100 << 23, -3 << 23, 0]
    total, e = dfp.aligned_sum([(a, 2), (b, -22)], 30)  # half of the grid rounds up
    assert e == -21 and total.tolist() == [(100 << 23) + 1, (-3 << 23) + 1, 1]
    total, e = dfp.aligned_sum([(a, 2), (np.zeros(3, int), -500)], 30)
    assert (total.tolist(), e) == (a.tolist(), 2)
    assert dfp.aligned_sum([(np.zeros(3, int), 5)], 30)[1] == 0


@pytest.mark.parametrize("exponent", [-30, -20, -12, -9, -7, -3, 0, 5, 9, 30])
def test_softmax_gradient(exponent):
    logits = RNG.integers(-(2**18), 2**18, (16, 10)).astype(np.int32)
    logits[0] = 7
    labels = RNG.integers(0, 10, 16)
    words = RNG.integers(0, 2**32, (16, 10), dtype=np.uint32)
    raw = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        e = []
        for z in row:
            u = min(math.floor(Fraction((max(row) - z) * 47274) * Fraction(2) ** (exponent - 7)), 31 * 256)
            e.append(round(2 ** (16 - (u & 255) / 256)) >> (u >> 8))
        p = [v * 2**15 // sum(e) for v in e]
        p[label] -= 2**15
        raw += p
    expected = ref_requantize(raw, -15 - 4, 8, words.reshape(-1).tolist())
    q, e = dfp.softmax_gradient(logits, exponent, labels, words)
    assert (q.reshape(-1).tolist(), e) == expected
    if exponent == -12:
        z = logits * 2.0**exponent
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(16), labels] -= 1
        nearest, e = dfp.softmax_gradient(logits, exponent, labels)
        assert np.abs(nearest * 2.0**e * 16 - p).max() < 2**-7


def ref_aligned(terms, window):
    """Sum of lists with exponents, by fractions on the documented grid."""
    terms = [(x, e) for x, e in terms if any(x)]
    if not terms:
        return None, 0
    grid = max(min(e for _, e in terms), max(e + max(abs(v) for v in x).bit_length() for x, e in terms) - window)
    return [sum(rn(v, grid - e) for v, e in zip(column, [e for _, e in terms], strict=True))
            for column in zip(*[x for x, _ in terms], strict=True)], grid  # fmt: skip


@pytest.mark.parametrize("exponents", [(-15, -16, -20), (-15, 0, -40), (-15, -60, -3), (-15, -15, 12)])
@pytest.mark.parametrize("zero", ["none", "momentum", "gradient", "both"])
def test_sgd_step(exponents, zero):
    we, ve, ge = exponents
    w, v = RNG.integers(-32767, 32768, 100), RNG.integers(-32767, 32768, 100)
    g = RNG.integers(-(2**30), 2**30, 100)
    if zero in ("momentum", "both"):
        v[:] = 0
    if zero in ("gradient", "both"):
        g[:] = 0
    draws = [RNG.integers(0, 2**32, 100, dtype=np.uint32) for _ in range(2)]
    sgd = dfp.Sgd((205, -11))
    weight, momentum = dfp.sgd_step(
        (w.astype(np.int16), we), (v.astype(np.int16), ve), (g, ge), sgd, draws[0], draws[1]
    )
    acc, e = ref_aligned(
        [([230 * x for x in v.tolist()], ve - 8), (g.tolist(), ge), ([105 * x for x in w.tolist()], we - 20)], 32
    )
    new_v, new_ve = ref_requantize(acc, e, 16, draws[1].tolist())
    assert (momentum[0].tolist(), momentum[1]) == (new_v, new_ve)
    acc, e = ref_aligned([(w.tolist(), we), ([-205 * x for x in new_v], new_ve - 11)], 32)
    assert (weight[0].tolist(), weight[1]) == ref_requantize(acc, e, 16, draws[0].tolist())


def test_sgd_of_zeros_stays_zero():
    zero = np.zeros(4, np.int16), 0
    weight, momentum = dfp.sgd_step(zero, zero, (np.zeros(4, np.int64), -3), dfp.Sgd((205, -11)))
    assert not weight[0].any() and not momentum[0].any() and weight[1] == momentum[1] == 0


def test_inverse_sqrt():
    values = [1, 2, 3, 4, 5, 2**30, 2**31, 2**32 - 1, 2**32, 2**49 + 12345, 2**61 + 7]
    values += RNG.integers(1, 2**50, 300).tolist()
    r, h = dfp.inverse_sqrt(np.array(values))
    for v, reciprocal, shift in zip(values, r.tolist(), h.tolist(), strict=True):
        length = v.bit_length() + v.bit_length() % 2
        assert shift == (length - 32) // 2
        normalised = v >> 2 * shift if shift >= 0 else v << -2 * shift
        assert 2**30 <= normalised < 2**32
        assert reciprocal == min(2**31 // math.isqrt(normalised), 65535)
        assert abs(reciprocal * 2.0 ** (-31 - shift) * math.sqrt(v) - 1) < 2**-14


def ref_normalise(x, exponent):
    """One channel: the integer normalised values with 10 fraction bits, and its statistics."""
    n, s1, s2 = len(x), sum(x), sum(v * v for v in x)
    shift = -17 - 2 * exponent
    epsilon = max(1, n * n << min(shift, 26) if shift >= 0 else n * n >> -shift)
    v = n * s2 - s1 * s1 + epsilon
    length = v.bit_length() + v.bit_length() % 2
    h = (length - 32) // 2
    r = min(2**31 // math.isqrt(v >> 2 * h if h >= 0 else v << -2 * h), 65535)
    return [clip(rn((n * a - s1) * r, 31 + h - 10), 16) for a in x], (n, s1, v, r, h)


@pytest.mark.parametrize("exponent", [-12, -9, -6, -3, 2])
def test_batch_norm_and_its_gradient(exponent):
    channels = 6
    x = RNG.integers(-127, 128, (4, 5, 3, channels)).astype(np.int8)
    x[..., 1] //= 16
    x[..., 2] = 5  # constant channel: only epsilon is left
    x[..., 3] = np.abs(x[..., 3])
    error = RNG.integers(-127, 128, x.shape).astype(np.int8)
    gamma = np.array([16384, -20000, 3, 32767, 0, 12], np.int16), -14
    beta = np.array([0, 5, -32767, 100, 20000, -1], np.int16), -16
    y, y_exponent, statistics = dfp.batch_norm(x, exponent, gamma, beta)
    gradient = dfp.batch_norm_gradient(error, -11, x, exponent, gamma, statistics)
    assert y.dtype == np.int32 and y_exponent == -24
    coefficients, columns = [], []
    for c in range(channels):
        column, (n, s1, v, r, h) = ref_normalise(x[..., c].reshape(-1).tolist(), exponent)
        assert (n, s1, v) == (60, statistics.offset[c], statistics.variance[c])
        g16 = int(gamma[0][c])
        expected = [g16 * value + (int(beta[0][c]) << 8) for value in column]
        assert y[..., c].reshape(-1).tolist() == expected
        e = error[..., c].reshape(-1).tolist()
        d_beta, d_gamma = sum(e), sum(a * b for a, b in zip(e, column, strict=True))
        assert gradient.beta[0][c] == d_beta and gradient.gamma[0][c] == d_gamma
        columns.append([n * a - d_beta - rn(b * d_gamma, 20) for a, b in zip(e, column, strict=True)])
        coefficients.append((g16 * r, h))
    assert gradient.beta[1] == -11 and gradient.gamma[1] == -21
    top = max(abs(c).bit_length() - h for c, h in coefficients if c)
    for c, ((value, h), column) in enumerate(zip(coefficients, columns, strict=True)):
        coefficient = clip(rn(value, top - 15 + h), 16)
        assert gradient.x_error[0][..., c].reshape(-1).tolist() == [coefficient * v for v in column]
    assert gradient.x_error[1] == -11 + top - 46 - 14 - exponent


def test_batch_norm_is_close_to_real_arithmetic():
    x = RNG.integers(-127, 128, (512, 4)).astype(np.int8)
    error = RNG.integers(-127, 128, x.shape).astype(np.int8)
    gamma, beta = (np.array([16384, 8000, -16384, 30000], np.int16), -14), (np.array([0, 9, -9, 4], np.int16), -3)
    y, ye, statistics = dfp.batch_norm(x, -6, gamma, beta)
    gradient = dfp.batch_norm_gradient(error, -9, x, -6, gamma, statistics)
    xr, er, gr = x * 2.0**-6, error * 2.0**-9, gamma[0] * 2.0**-14
    sigma = np.sqrt(xr.var(axis=0) + 2.0**-17)
    normalised = (xr - xr.mean(axis=0)) / sigma
    assert np.abs(y * 2.0**ye - (normalised * gr + beta[0] * 2.0**-3)).max() < 2**-9
    dx = gr / sigma * (er - er.mean(axis=0) - normalised * (er * normalised).mean(axis=0))
    # the coefficients share an exponent: relative precision is 15 bits of the largest
    assert np.abs(gradient.x_error[0] * 2.0 ** gradient.x_error[1] - dx).max() < 2**-10 * np.abs(dx).max()
    assert np.allclose(gradient.gamma[0] * 2.0 ** gradient.gamma[1], (er * normalised).sum(axis=0), atol=0.05)


def test_running_statistics_converge_and_reproduce_the_batch():
    x = RNG.integers(-127, 128, (1024, 3)).astype(np.int8)
    statistics = dfp.batch_statistics(x, -5)
    mean, variance = np.zeros(3, np.int32), np.full(3, 1 << 18, np.int32)
    one = dfp.update_running(mean, variance, -5, statistics)
    quotient = [int(Fraction(int(s) * 2**11, 1024)) for s in statistics.offset]
    assert one[0].tolist() == [(q + 4) >> 3 for q in quotient]
    for _ in range(120):
        mean, variance = dfp.update_running(mean, variance, -5, statistics)
    assert np.abs(mean * 2.0**-16 - (x * 2.0**-5).mean(axis=0)).max() < 2**-13
    assert np.abs(variance * 2.0**-18 / (x * 2.0**-5).var(axis=0) - 1).max() < 1e-3
    inference = dfp.normalise(x, dfp.running_statistics(mean, variance, -5))
    assert np.abs(inference.astype(int) - dfp.normalise(x, statistics)).max() <= 4


def test_batch_norm_limits():
    with pytest.raises(InputError, match="up to 131072 elements per channel, got 131073"):
        dfp.batch_statistics(np.zeros((131073, 1), np.int8), 0)
    statistics = dfp.batch_statistics(np.zeros((4, 2), np.int8), -70)
    assert statistics.variance.tolist() == [16 << 26] * 2


def test_initial_weights():
    q, e = dfp.initial_weights(3, 1, (10, 32), 32)
    stream = 0xFFFF0001 + 16
    w = [(2 * random.word(3, 0, stream, i) / 2**32 - 1) * math.sqrt(6 / 32) for i in range(320)]
    top = math.floor(math.log2(max(map(abs, np.float32(w).tolist()))))
    assert e == top - 14
    expected = [clip(math.floor(Fraction(v) / Fraction(2) ** e + Fraction(1, 2)), 16) for v in np.float32(w).tolist()]
    assert q.reshape(-1).tolist() == expected


def matmul(a, b):
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_mlp_steps_equal_a_loop_implementation(rounding):
    digits = data.load("digits")
    network = build("dfp", "mlp", 6, batch=8, rounding=rounding)
    state = {name: (array.reshape(-1).tolist(), e) for name, (array, e) in network.state.items()}

    def quantize(values, e, stream, k, shape, bits=8, always=True):
        words = [random.word(6, k, stream, i) for i in range(len(values))]
        q, e = ref_requantize(values, e, bits, words if always or rounding == "stochastic" else None)
        return np.reshape(q, shape).tolist(), e

    def flat(rows):
        return [v for row in rows for v in row]

    for k in range(3):
        images, labels = digits.train_images[8 * k : 8 * k + 8], digits.train_labels[8 * k : 8 * k + 8]
        record = step(network, images, labels)
        x = [[min(int(p) * 8, 127) for p in row] for row in images.reshape(8, 64)]
        w0, we0 = quantize(*state["fc0.weight"], 5, k, (32, 64), always=False)
        w1, we1 = quantize(*state["fc1.weight"], 21, k, (10, 32), always=False)
        acc = matmul(x, list(zip(*w0, strict=True)))
        a, ae = quantize([max(v, 0) for v in flat(acc)], we0 - 7, 0, k, (8, 32), always=False)
        logits = matmul(a, list(zip(*w1, strict=True)))
        draw = np.array([random.word(6, k, 22, i) for i in range(80)]).reshape(8, 10)
        error, ee = dfp.softmax_gradient(np.array(logits), ae + we1, labels, draw)
        error = error.tolist()
        back = np.array(matmul(error, w1)) * (np.array(acc) > 0)
        hidden, he = quantize(flat(back.tolist()), ee + we1, 17, k, (8, 32))
        gradients = {
            "fc0": (flat(matmul(list(zip(*hidden, strict=True)), x)), he - 7),
            "fc1": (flat(matmul(list(zip(*error, strict=True)), a)), ee + ae),
        }
        for layer, (name, gradient) in enumerate(gradients.items()):
            (w, we), (v, ve) = state[f"{name}.weight"], state[f"{name}.momentum"]
            terms = [([230 * q for q in v], ve - 8), gradient, ([105 * q for q in w], we - 20)]
            total, e = ref_aligned(terms, 32)
            v, ve = quantize(total, e, 16 * layer + 4, k, -1, 16)
            total, e = ref_aligned([(w, we), ([-205 * q for q in v], ve - 11)], 32)
            w, we = quantize(total, e, 16 * layer + 3, k, -1, 16)
            state[f"{name}.weight"], state[f"{name}.momentum"] = (w, we), (v, ve)
        expected = {
            "logits": (flat(logits), ae + we1),
            "fc0.activation": (flat(x), -7),
            "fc1.activation": (flat(a), ae),
            "fc0.error": (flat(hidden), he),
            "fc1.error": (flat(error), ee),
            **{f"{name}.gradient": value for name, value in gradients.items()},
            **state,
        }
        for name, (tensor, exponent) in expected.items():
            assert record[name].reshape(-1).tolist() == tensor, (k, name)
            assert record[f"{name}.exponent"] == exponent, (k, name)
        assert set(record.required) == {*expected, *(f"{name}.exponent" for name in expected)}


def test_residual_network_record_and_fork_of_errors():
    digits = data.load("digits")
    network = build("dfp", "tiny-resnet", 1, batch=8)
    before = {name: array.copy() for name, (array, _) in network.state.items()}
    record = step(network, digits.train_images[:8], digits.train_labels[:8], intermediates=True)
    assert record["bn0.gamma"].dtype == np.int16 and "bn0.gamma.gradient" in record.required
    assert list(network.state) == [name for name in record if name in network.state]
    for name, (array, _) in network.state.items():
        assert (array != before[name]).any() or name.endswith("gamma"), name
    # conv1 and the identity shortcut both read relu0: its error sums both, and reaches conv0 through bn0.
    assert record["bn0.error"].shape == (8, 8, 8, 16) and np.abs(record["bn0.error"]).max() > 31


def test_residual_step_follows_the_documented_words():
    """Streams and sums around a projection block, recomputed from the record by the rules of docs/arithmetic.md."""
    digits = data.load("digits")
    network = build("dfp", "tiny-resnet", 3, batch=16)
    for k in range(2):
        old = dict(network.state)
        network.step_index = 7 * k
        record = step(network, digits.train_images[:16], digits.train_labels[:16], intermediates=True)

        def tensor(name, record=record):
            return record[name], record[f"{name}.exponent"]

        def rounded(sums, exponent, stream, k=k):
            return dfp.requantize(sums, exponent, 8, random.words(3, 7 * k, stream, sums.shape))

        def sums(name, old=old, tensor=tensor):
            y, exponent, _ = dfp.batch_norm(*tensor(f"{name}.activation"), old[f"{name}.gamma"], old[f"{name}.beta"])
            return y, exponent

        layers = {layer.name: layer.index for layer in network.description.layers}
        # conv1 bn1 relu1 conv2 bn2, and relu0 as it is -> add0, relu2
        assert layers["add0"] == 6 and layers["bn2"] == 5 and layers["conv3"] == 6 and layers["conv5"] == 10
        body = rounded(*sums("bn2"), 16 * 5)
        total, exponent = dfp.aligned_sum([body, tensor("conv1.activation")], 30)
        x, e = rounded(np.maximum(total, 0), exponent, 16 * 6 + 10)
        for reader in ("conv3", "conv5"):
            assert (record[f"{reader}.activation"] == x).all() and record[f"{reader}.activation.exponent"] == e
        # relu2 is read by conv3 and by the projection conv5: the earlier one's error words round the sum.
        terms = []
        for name, stride, padding in (("conv3", 2, 1), ("conv5", 2, 0)):
            weight = record[f"{name}.datapath_weight"]
            acc = ops.conv2d_error(record[f"{name}.error"], weight, (8, 8), stride, padding)
            assert (acc == record[f"{name}.error_accumulator"]).all()
            w, we = old[f"{name}.weight"]
            terms.append((acc, record[f"{name}.error.exponent"] + dfp.requantize(w, we, 8)[1]))
        error, exponent = dfp.aligned_sum(terms, 30)
        error, exponent = rounded(error * (total > 0), exponent, 16 * 6 + 1)
        assert (record["bn2.error"] == error).all() and record["bn2.error.exponent"] == exponent
        # gamma and its momentum share a stream
        gradient = record["bn2.gamma.gradient"], record["bn2.gamma.gradient.exponent"]
        words = random.words(3, 7 * k, 16 * 5 + 7, (32,))
        new, momentum = dfp.sgd_step(
            old["bn2.gamma"],
            old["bn2.gamma_momentum"],
            gradient,
            dfp.Sgd((205, -11), decay=None),
            words[:16],
            words[16:],
        )
        assert (record["bn2.gamma"] == new[0]).all() and record["bn2.gamma.exponent"] == new[1]
        assert (record["bn2.gamma_momentum"] == momentum[0]).all()
        # batch norm's input error goes to conv2 by purpose 9
        statistics = dfp.batch_statistics(*tensor("bn2.activation"))
        gradient = dfp.batch_norm_gradient(
            *tensor("bn2.error"), *tensor("bn2.activation"), old["bn2.gamma"], statistics
        )
        error, exponent = rounded(*gradient.x_error, 16 * 5 + 9)
        assert (record["conv2.error"] == error).all() and record["conv2.error.exponent"] == exponent


def test_gradients_of_a_residual_network_agree_with_real_arithmetic():
    """Direction and size, exponents included, from the same weights."""
    digits = data.load("digits")
    images, labels = digits.train_images[:64], digits.train_labels[:64]
    integer, real = build("dfp", "tiny-resnet", 1, batch=64), build("float", "tiny-resnet", 1, batch=64)
    converted = integer.convert(images)
    for name, (array, exponent) in integer.state.items():
        if name.endswith("weight"):
            real.state[name] = (array * 2.0**exponent).astype(np.float32), 0
    record = step(integer, images, labels)
    step(real, ((converted[0] * 2.0**-7).astype(np.float32), 0), labels)
    for name in ("conv0", "conv1", "conv2", "conv3", "conv4", "conv5", "fc0"):
        a = record[f"{name}.gradient"].reshape(-1) * 2.0 ** record[f"{name}.gradient.exponent"]
        b = real.state[f"{name}.momentum"][0].reshape(-1).astype(float)
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.9, name
        assert 0.85 < np.linalg.norm(a) / np.linalg.norm(b) < 1.15, name


def test_bad_input():
    with pytest.raises(InputError, match="power of two for dfp, got 24: use 16 or 32"):
        build("dfp", "mlp", 1, batch=24)
    with pytest.raises(InputError, match="rounding must be stochastic or nearest, got 'up'"):
        build("dfp", "mlp", 1, rounding="up")
    with pytest.raises(InputError, match="avgpool0 by an exponent: its 7x7 input"):
        build("dfp", "resnet-20", 1, data="mnist")
