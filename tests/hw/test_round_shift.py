# amaranth: UnusedElaboratable=no
"""RoundShift against golden.rounding: every 16-bit input with every shift and rule, and full width at random."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from golden.rounding import Rounding, saturate
from hw.round_shift import RoundShift
from tests.hw.native import Native, lanes, unlanes

TARGETS = (8, 16, 32)
LANES = 4
ALL_16 = np.arange(-(1 << 15), 1 << 15)
HIGHEST_SHIFT = {Rounding.STOCHASTIC: 32, Rounding.STOCHASTIC_16: 46, Rounding.PSEUDO_STOCHASTIC: 62,
                 Rounding.STOCHASTIC_MAGNITUDE: 62}    # where golden is defined; 63 for the others


@pytest.fixture(scope="module")
def unit():
    return Native(RoundShift(LANES, Rounding, target_bits=TARGETS))


@pytest.fixture(scope="module")
def flagged():
    return Native(RoundShift(LANES, Rounding, target_bits=TARGETS, flags=True))


def draws(rng, rule, shift, count):
    """What the rule asks for: a word, its top 16 bits, or a number of 0..2**shift-1."""
    if rule is Rounding.STOCHASTIC_MAGNITUDE:
        return rng.integers(0, 1 << min(max(shift, 0), 32), count)
    return rng.integers(0, 1 << (16 if rule is Rounding.STOCHASTIC_16 else 32), count)


def expected(rule, x, shift, bits, draw):
    limit = (1 << (bits - 1)) - 1
    if shift < 0:
        left = min(-shift, 63)
        shifted = np.where(np.abs(x) > limit >> left, np.sign(x) * limit, x << min(left, 30))
        return shifted
    return saturate(rule.compute(x, shift, draw if rule.needs_draw else None), bits)


def run(unit, x, shift, rule, target, draw, x_bits=32):
    """All elements through the lanes with the same command; `shift` may be one per vector."""
    count = len(x) // LANES
    x = x.reshape(count, LANES)
    words = lanes(x, x_bits) if x_bits in (32, 64) else pack(x, x_bits)
    pad = RoundShift.latency
    words = np.concatenate([words, np.zeros((pad, words.shape[1]), np.uint32)])
    draw = np.concatenate([lanes(draw.reshape(count, LANES), 32), np.zeros((pad, LANES), np.uint32)])
    result = unit.trace(count + pad, ["o", "o_valid"], x=words, draw=draw, shift=shift, rounding=rule.code,
                        target=target, i_valid=np.arange(count + pad) < count)
    assert result["o_valid"].tolist() == [0] * pad + [1] * count
    return unlanes(result["o"][pad:], 32, LANES).reshape(-1)


def pack(array, bits):
    """Lanes of any width."""
    rows = [sum((int(v) & (1 << bits) - 1) << bits * k for k, v in enumerate(row)) for row in array]
    words = -(-array.shape[1] * bits // 32)
    return np.array([[row >> 32 * k & 0xFFFFFFFF for k in range(words)] for row in rows], np.uint32)


@pytest.mark.parametrize("rule", Rounding, ids=lambda rule: rule.name.lower())
def test_every_16_bit_input_and_shift(unit, rule):
    rng = np.random.default_rng(rule.code)
    highest = HIGHEST_SHIFT.get(rule, 63)
    for shift in [-64, -33, -32, -31, *range(-16, min(highest, 36) + 1), highest]:
        draw = draws(rng, rule, shift, len(ALL_16))
        for target in {shift % 3, 0}:
            got = run(unit, ALL_16, shift, rule, target, draw)
            want = expected(rule, ALL_16, shift, TARGETS[target], draw)
            wrong = np.flatnonzero(got != want)
            assert not len(wrong), (f"{rule.name} {ALL_16[wrong[0]]} >> {shift} to {TARGETS[target]} bits with draw "
                                    f"{draw[wrong[0]]}: {got[wrong[0]]}, expected {want[wrong[0]]}")


def operands(rng, bits, count):
    """Random magnitudes of every size, and the neighbourhoods of powers of two and of their halves."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    spread = rng.integers(low, high, count, endpoint=True) >> rng.integers(0, bits, count)
    steps = [(s << k) + (s << k - 1 if k else 0) * half + d
             for k in range(bits) for s in (1, -1) for half in (0, 1) for d in (-1, 0, 1)]
    corners = np.clip(np.array([*steps, low, low + 1, high, 0, 0]), low, high)
    x = np.concatenate([spread, corners])
    return x[:len(x) // LANES * LANES]


@pytest.mark.parametrize("rule", Rounding, ids=lambda rule: rule.name.lower())
def test_full_width(unit, rule):
    rng = np.random.default_rng(100 + rule.code)
    x = operands(rng, 32, 4000)
    for shift in range(-40, HIGHEST_SHIFT.get(rule, 63) + 1):
        draw = draws(rng, rule, shift, len(x))
        if rule.needs_draw:   # draws at and next to the discarded bits, where the comparison turns
            below = min(max(shift, 0), 32)
            edge = (np.abs(x) & (1 << max(shift, 0)) - 1) >> max(shift - 32, 0)
            top = {Rounding.STOCHASTIC_MAGNITUDE: below, Rounding.STOCHASTIC: 32, Rounding.STOCHASTIC_16: 16}[rule]
            near = edge << max(top - below, 0) >> max(below - top, 0)
            near = np.where(rng.integers(0, 2, len(x)) > 0, near, (1 << top) - near) + rng.integers(-1, 2, len(x))
            draw = np.where(rng.integers(0, 2, len(x)) > 0, np.clip(near, 0, (1 << top) - 1), draw)
        target = int(rng.integers(3))
        got = run(unit, x, shift, rule, target, draw)
        want = expected(rule, x, shift, TARGETS[target], draw)
        wrong = np.flatnonzero(got != want)
        assert not len(wrong), (f"{rule.name} {x[wrong[0]]} >> {shift} to {TARGETS[target]} bits with draw "
                                f"{draw[wrong[0]]}: {got[wrong[0]]}, expected {want[wrong[0]]}")


def test_wide_inputs():
    """40-bit inputs use the 64-bit rotator."""
    unit = Native(RoundShift(LANES, Rounding, width=40, target_bits=TARGETS))
    rng = np.random.default_rng(7)
    x = operands(rng, 40, 600)
    for rule in Rounding:
        for shift in range(HIGHEST_SHIFT.get(rule, 63) + 1):
            draw = draws(rng, rule, shift, len(x))
            got = run(unit, x, shift, rule, 1, draw, x_bits=40)
            assert np.array_equal(got, expected(rule, x, shift, 16, draw)), (rule, shift)


def test_commands_travel_with_their_vectors(unit):
    """A new rule, shift and width in every cycle, and cycles without a vector."""
    rng = np.random.default_rng(3)
    count = 3000
    x = operands(rng, 32, count * LANES)[:count * LANES].reshape(count, LANES)
    shift, target = rng.integers(-8, 32, count), rng.integers(0, 3, count)
    rounding = rng.integers(0, 5, count)
    valid = np.append(rng.integers(0, 2, count), np.zeros(RoundShift.latency, int))
    taken = np.minimum(np.arange(len(valid)), count - 1)
    result = unit.trace(len(valid), ["o", "o_valid"], i_valid=valid, x=lanes(x, 32)[taken], shift=shift[taken],
                        target=target[taken], rounding=rounding[taken])
    assert np.array_equal(result["o_valid"][RoundShift.latency:], valid[:count])
    got = unlanes(result["o"][RoundShift.latency:], 32, LANES)
    for k, row in enumerate(got):
        rule = Rounding.of(int(rounding[k]))
        assert np.array_equal(row, expected(rule, x[k], int(shift[k]), TARGETS[target[k]], None)), k


@pytest.mark.parametrize("rules, code, effective", [
    ([Rounding.NEAREST, Rounding.PSEUDO_STOCHASTIC], Rounding.HALF_UP, Rounding.TRUNCATE),   # a rule that is not there
    ([Rounding.NEAREST], Rounding.TRUNCATE, Rounding.NEAREST)])                              # the only rule
def test_subsets_of_rules(rules, code, effective):
    unit = RoundShift(2, rules)
    assert not hasattr(unit, "draw")
    x = np.arange(-32, 32).reshape(-1, 2)
    got = []

    async def bench(ctx):
        ctx.set(unit.shift, 3)
        ctx.set(unit.rounding, code.code)
        for row in [*x.tolist(), *[[0, 0]] * RoundShift.latency]:
            ctx.set(unit.x, row)
            got.append([ctx.get(unit.o[0]), ctx.get(unit.o[1])])
            await ctx.tick()

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert got[RoundShift.latency:] == effective.compute(x, 3).tolist()


def test_flags_tell_what_left_the_range(flagged):
    """Every 16-bit input and shift, and full width: clipped is abs(x) > limit * 2**shift, without rounding."""
    rng = np.random.default_rng(9)
    for x in (ALL_16, operands(rng, 32, 4000)):
        count = len(x) // LANES
        words = np.concatenate([lanes(x.reshape(count, LANES), 32), np.zeros((RoundShift.latency, LANES), np.uint32)])
        for shift in range(-40, 64):
            target = int(rng.integers(3))
            out = flagged.trace(len(words), ["clipped", "positive"], x=words, shift=shift, target=target,
                                rounding=int(rng.integers(8)), i_valid=1)
            limit = (1 << TARGETS[target] - 1) - 1
            clipped = np.abs(x) > (limit << shift if shift >= 0 else limit >> -shift)
            for name, want in (("clipped", clipped), ("positive", x > 0)):
                got = out[name][RoundShift.latency:, None] >> np.arange(LANES) & 1
                wrong = np.flatnonzero(got.reshape(-1) != want)
                assert not len(wrong), (name, x[wrong[0]], shift, TARGETS[target])


@pytest.mark.parametrize("change, message", [
    ({"lanes": 0}, "at least one lane"), ({"width": 70}, "2 to 64 bits"), ({"target_bits": (40,)}, "target_bits"),
    ({"roundings": []}, "at least one rounding"), ({"roundings": ["up"]}, "unknown rounding")])
def test_bad_parameters_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RoundShift(**{"lanes": 4, "roundings": [Rounding.NEAREST], **change})
