"""Learning rates: a function of method, network and absolute epoch, never of the length of the run."""

from __future__ import annotations

from golden.errors import InputError

# (first epoch, value): niti in gradient bits.
_NITI = {
    "mlp": ((0, 5), (4, 4), (7, 3)),
    "vgg-small-7": ((0, 5), (100, 4), (150, 3)),
}
_NITI_DEFAULT = ((0, 5), (4, 4), (7, 3))


def _at(schedule, epoch: int):
    return [value for first, value in schedule if first <= epoch][-1]


def learning_rate(method: str, model: str, epoch: int):
    """niti, niti-2020: the bits of the largest weight update."""
    if method in ("niti", "niti-2020"):
        return _at(_NITI.get(model, _NITI_DEFAULT), epoch)
    raise InputError(f"unknown method {method!r}")
