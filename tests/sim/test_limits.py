"""The largest shapes a core accepts are computed bit for bit; one more is refused in one line."""

import pytest

import golden.train
from golden.ops import SAFE_PRODUCTS
from hw.config import PRESETS
from sim.compiler import compile_training
from sim.products import Plan, Shape, measure
from sim.program import CompileError

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


@pytest.mark.parametrize("method, model, data, largest_batch, one_more", [
    ("niti", "lenet", "mnist", 231, 232), ("wage", "wage-lenet", "mnist", 231, 232),
    ("dfp", "lenet", "mnist", 128, 256)])
def test_the_largest_batch_that_int32_gradients_allow(method, model, data, largest_batch, one_more):
    """The first layer sums batch x rows x columns products; dfp's batches are powers of two."""
    for batch in (largest_batch, one_more):
        network = golden.train.build(method, model, 1, data=data, batch=batch)
        sizes = dict(batch=batch, capacity=1, steps=1, rate=network.learning_rate())
        if batch == largest_batch:
            assert compile_training(PRESETS["base"], network, **sizes).program.image
        else:
            with pytest.raises(CompileError, match="that int32 holds: use a smaller batch"):
                compile_training(PRESETS["base"], network, **sizes)
