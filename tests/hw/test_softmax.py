# amaranth: UnusedElaboratable=no
"""Softmax against the formula in whole numbers, and its rounded result against golden.dfp.softmax_gradient."""

import numpy as np
import pytest

from golden import dfp
from hw import softmax
from hw.config import PRESETS, CoreConfig
from hw.softmax import Softmax
from tests.hw.native import Native, lanes, unlanes

# Elements of a vector and lanes, largest number of classes.
UNITS = [(4, 4, 100), (8, 8, 128), (16, 16, 17), (8, 4, 128)]


@pytest.fixture(scope="module", params=UNITS, ids=lambda p: f"V{p[0]}" + f"L{p[1]}" * (p[0] != p[1]))
def unit(request):
    v, lanes, classes = request.param
    core = CoreConfig(name="test", rows=v, columns=v, lanes=lanes, weight_lines=128)
    return Native(Softmax(core, classes)), core, classes


def run(unit, core, logits, exponent, labels, **stalls):
    n, classes = logits.shape
    channels = classes + -classes % core.vector
    padded = np.random.default_rng(n).integers(-(1 << 31), 1 << 31, (n, channels))
    padded[:, :classes] = logits
    unit.set(exponent=exponent, classes=classes)
    result, cycles = unit.streams({"logits": lanes(padded.reshape(-1, core.lanes), 32), "label": labels},
                                  {"error": n * channels // core.lanes}, **stalls)
    errors = unlanes(result["error"], 32, core.lanes).reshape(n, channels)
    assert not errors[:, classes:].any()
    return errors[:, :classes], cycles


def formula(logits, exponent, labels):
    """The definition in docs/arithmetic.md, with Python's integers."""
    rows = []
    for z, label in zip(logits.tolist(), labels.tolist(), strict=True):
        powers = []
        for value in z:
            scaled = (max(z) - value) * 47274
            u = scaled >> 7 - exponent if exponent <= 7 else scaled << min(exponent - 7, 13)
            u = min(u, 31 * 256)
            powers.append(round(2 ** (16 - (u & 255) / 256)) >> (u >> 8))
        rows.append([p * 2**15 // sum(powers) - (k == label) * 2**15 for k, p in enumerate(powers)])
    return np.array(rows)


def samples(rng, n, classes):
    spread = 1 << rng.integers(1, 31, (n, 1))
    logits = rng.integers(-spread, spread, (n, classes))
    logits[: n // 4] = rng.choice([-(1 << 31), -1, 0, 1, (1 << 31) - 1], (n // 4, classes))
    return logits, rng.integers(0, classes, n)


def test_matches_the_formula_and_golden(unit):
    unit, core, most = unit
    rng = np.random.default_rng(core.vector)
    for classes in sorted({2, 4, 8, 10, 12, 17, most} & set(range(most + 1))):
        for exponent in [*range(-36, 26, 3), 7, 8, -32768, 32767]:
            logits, labels = samples(rng, 16, classes)
            got, _ = run(unit, core, logits, exponent, labels)
            want = formula(logits, exponent, labels)
            assert np.array_equal(got, want), (core, classes, exponent, np.argwhere(got != want)[:4].tolist())
            rounded, _ = dfp.requantize(got, -19)
            assert np.array_equal(rounded, dfp.softmax_gradient(logits, exponent, labels)[0])


@pytest.mark.parametrize("offer, accept", [(0.3, 1.0), (1.0, 0.2), (0.5, 0.5)])
def test_stalls_change_nothing(unit, offer, accept):
    unit, core, most = unit
    rng = np.random.default_rng(99)
    for classes in (2, 4, 10, most):
        logits, labels = samples(rng, 30, classes)
        got, _ = run(unit, core, logits, -12, labels, offer=offer, accept=accept, seed=classes)
        assert np.array_equal(got, formula(logits, -12, labels))


def test_a_label_may_come_in_any_cycle(unit):
    """Also in that of the first quotient: logits of two classes and their label come about equally late."""
    unit, core, _ = unit
    logits, labels = samples(np.random.default_rng(7), 500, 2)
    got, _ = run(unit, core, logits, -12, labels, offer=0.03)
    assert np.array_equal(got, formula(logits, -12, labels))


def test_latency_is_as_documented(unit):
    unit, core, most = unit
    for classes in (2, 4, 10, most):
        _, cycles = run(unit, core, np.zeros((20, classes), int), -4, np.zeros(20, int))
        assert cycles / 20 <= classes * 24 + -(-classes // core.vector) * core.parts + 15


def test_constants_are_goldens():
    for name in ("LOG2_E", "OCTAVE", "PROBABILITY_BITS"):
        assert getattr(softmax, name) == getattr(dfp, name)
    assert softmax.EXPONENTIALS == dfp.EXPONENTIALS.tolist()


@pytest.mark.parametrize("most", [1, 1024])
def test_bad_parameters_are_refused(most):
    with pytest.raises(ValueError, match="2 to 1023"):
        Softmax(PRESETS["tiny"], most)
