# amaranth: UnusedElaboratable=no
"""NitiLoss against golden.niti.loss_gradient: both branches, every exponent, any shape, with stalls."""

import numpy as np
import pytest

from golden import niti
from hw import loss
from hw.config import PRESETS, CoreConfig
from hw.loss import NitiLoss
from tests.hw.native import Native, lanes, unlanes

# Elements of a vector and lanes, largest number of classes, dividers.
UNITS = [(4, 4, 100, 1), (8, 8, 128, 4), (16, 16, 17, 3), (8, 4, 128, 4)]
EXPONENTS = range(-25, 9)


@pytest.fixture(scope="module", params=UNITS, ids=lambda p: f"V{p[0]}" + f"L{p[1]}" * (p[0] != p[1]))
def unit(request):
    v, lanes, classes, dividers = request.param
    core = CoreConfig(name="test", rows=v, columns=v, lanes=lanes, weight_lines=128)
    return Native(NitiLoss(core, classes, dividers=dividers)), core, classes


def run(unit, core, logits, exponent, labels, **stalls):
    """Errors [n][classes] of logits [n][classes] through the unit; noise in the padding lanes. Also the cycles."""
    n, classes = logits.shape
    channels = classes + -classes % core.vector
    padded = np.random.default_rng(n).integers(-128, 128, (n, channels))
    padded[:, :classes] = logits
    unit.set(exponent=exponent, classes=classes)
    result, cycles = unit.streams({"logits": lanes(padded.reshape(-1, core.lanes), 8), "label": labels},
                                  {"error": n * channels // core.lanes}, **stalls)
    errors = unlanes(result["error"], 8, core.lanes).reshape(n, channels)
    assert not errors[:, classes:].any()
    return errors[:, :classes], cycles


def samples(rng, n, classes, spread=128):
    logits = rng.integers(-spread, spread, (n, classes))
    logits[: n // 4] = rng.choice([-128, -127, -1, 0, 1, 127], (n // 4, classes))
    logits[n // 4: n // 2] >>= rng.integers(0, 7, (n // 4, 1))
    return logits.astype(np.int8), rng.integers(0, classes, n)


def test_matches_golden(unit):
    unit, core, most = unit
    rng = np.random.default_rng(core.vector)
    for classes in sorted({2, 4, 8, 10, 12, 17, most} & set(range(most + 1))):
        for exponent in [*EXPONENTS, -32768, 32767]:
            logits, labels = samples(rng, 40, classes)
            got, _ = run(unit, core, logits, exponent, labels)
            want = niti.loss_gradient(logits, exponent, labels)
            assert np.array_equal(got, want), (core, classes, exponent, np.argwhere(got != want)[:4].tolist())


@pytest.mark.parametrize("offer, accept", [(0.3, 1.0), (1.0, 0.2), (0.5, 0.5)])
def test_stalls_change_nothing(unit, offer, accept):
    unit, core, most = unit
    rng = np.random.default_rng(99)
    for classes in (2, 4, 10, most):
        for exponent in (-9, -3):
            logits, labels = samples(rng, 60, classes)
            got, _ = run(unit, core, logits, exponent, labels, offer=offer, accept=accept, seed=classes)
            assert np.array_equal(got, niti.loss_gradient(logits, exponent, labels))


def test_corners(unit):
    """All logits equal, one class far ahead (its error saturates), and every label of a sample."""
    unit, core, most = unit
    for exponent in EXPONENTS:
        for classes in (2, most):
            logits = np.zeros((classes + 3, classes), np.int8)
            logits[-1, 0], logits[-2], logits[-3, -1] = 127, -128, -128
            labels = np.arange(classes + 3) % classes
            got, _ = run(unit, core, logits, exponent, labels)
            assert np.array_equal(got, niti.loss_gradient(logits, exponent, labels)), (exponent, classes)


def test_label_outside_the_classes_leaves_the_probabilities(unit):
    unit, core, _ = unit
    logits = np.array([[3, 90, 60, -5]], np.int8)
    first, _ = run(unit, core, logits, -4, np.array([0]))
    second, _ = run(unit, core, logits, -4, np.array([1]))
    none, _ = run(unit, core, logits, -4, np.array([700]))
    assert np.array_equal(none[0, 1:], first[0, 1:]) and none[0, 0] == second[0, 0]


def test_latency_is_as_documented(unit):
    unit, core, most = unit
    dividers = next(d for v, lanes, _, d in UNITS if (v, lanes) == (core.vector, core.lanes))
    for classes in (2, 4, 10, most):
        n = 20
        _, cycles = run(unit, core, np.zeros((n, classes), np.int8), -4, np.zeros(n, int))
        assert cycles / n <= classes * (5 + -(-14 // dividers)) + -(-classes // core.vector) * core.parts + 40


def test_constants_are_goldens():
    for name in ("LOG2_E", "SMALLEST_EXPONENT", "LARGEST_EXPONENT", "TAYLOR_EXPONENT", "OCTAVES", "PROBABILITY_BITS"):
        assert getattr(loss, name) == getattr(niti, name)
    assert niti.LOSS_SHIFT == 4


@pytest.mark.parametrize("change, message", [({"max_classes": 1}, "2 to 1023"), ({"max_classes": 1024}, "2 to 1023"),
                                             ({"dividers": 0}, "1 to 16 dividers")])
def test_bad_parameters_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        NitiLoss(PRESETS["tiny"], **change)
