"""The largest shapes a core accepts are computed bit for bit; one more is refused in one line."""

import pytest

from hw.config import PRESETS
from sim.products import Plan, Shape, measure
from sim.tiling import SAFE_PRODUCTS, CompileError

TINY = PRESETS["tiny"]
KINDS = {
    "pixels summed by a gradient": (lambda n: Shape(n, 1, 1, 4, 4), 1, 1 << 18),
    "row of an image": (lambda n: Shape(1, 3, n, 5, 5, 3, 1, 1), 3, 1 << 16),
    "row of a folded first layer": (lambda n: Shape(1, 3, n, 3, 5, 3, 1, 1, first=True), 3, 1 << 16),
    "kernel": (lambda n: Shape(1, n, n, 4, 4, n), 1, 1 << 8),
    "channels summed by a forward pass": (lambda n: Shape(1, 1, 1, n, 4), 1, 1 << 19),
}


def refusal(shape) -> str | None:
    try:
        Plan(TINY, [shape], operands=False)
    except CompileError as error:
        return str(error)
    return None


def largest(make, low, high):
    """The greatest size whose shape the compiler accepts, by bisection."""
    assert refusal(make(low)) is None and refusal(make(high)) is not None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if refusal(make(middle)) is None else (low, middle)
    return low


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_shape_is_exact_and_one_more_is_refused(kind, tmp_path):
    make, low, high = KINDS[kind]
    size = largest(make, low, high)
    summed = "summed" in kind
    assert size == SAFE_PRODUCTS or not summed
    assert ("that int32 holds: use" if summed else "use a larger core or smaller images") in refusal(make(size + 1))
    rows = measure(TINY, [make(size)], out=tmp_path, fill="extreme")
    assert rows and all(row["cycles"] > 0 for row in rows)
