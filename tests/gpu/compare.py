"""Train the same network in golden and on a device, comparing every recorded tensor of every step."""

import numpy as np

from golden import data
from golden.train import build as golden_build
from gpu.execution import build


def compare(ops, method, model, dataset, batch, steps, **options):
    reference = golden_build(method, model, 1, data=dataset, batch=batch, **options)
    network = build(method, model, 1, data=dataset, batch=batch, ops=ops, **options)
    loaded = data.load(dataset)
    for step, (images, labels) in zip(range(steps), data.batches(loaded, 1, 0, batch), strict=False):
        expected = reference.step(images, labels, intermediates=True)
        record = network.step(images, labels, intermediates=True)
        assert list(record) == list(expected) and record.required == expected.required
        for name, tensor in expected.items():
            got = record[name]
            assert np.array_equal(got, tensor), f"step {step}: {name}"
            if isinstance(tensor, np.ndarray) and not name.endswith(("choice", "accumulator")):
                assert got.dtype == tensor.dtype, name
        assert network.digest() == reference.digest(), f"step {step}"
    assert network.step_index == steps
    logits, exponent = network.forward(images)
    expected, expected_exponent = reference.forward(images)
    assert np.array_equal(logits, expected) and int(exponent) == expected_exponent
