"""Learning rates: a function of method, network and absolute epoch, never of the length of the run."""

from __future__ import annotations

from golden.errors import InputError

# (first epoch, value)
_NITI = {  # bits of the largest weight update
    "lenet": ((0, 5), (2, 4), (4, 3), (6, 2)),
    "vgg-small-7": ((0, 5), (100, 4), (150, 3)),
}
_NITI_DEFAULT = ((0, 5), (4, 4), (7, 3))
_WAGE = {  # log2 of the rate
    "wage-lenet": ((0, 3), (20, 2), (40, 1), (60, 0), (80, -1)),
    "wage-vgg7": ((0, 3), (200, 0), (250, -3)),
}
_WAGE_DEFAULT = ((0, 3), (5, 1), (8, 0))
_WITHOUT_NORM = ((0, (205, -13)), (6, (205, -15)), (8, (205, -16)))
_DFP = {  # (mantissa, exponent) of the rate, for float too
    "tiny-cnn": _WITHOUT_NORM,
    "lenet": _WITHOUT_NORM,
    "wage-lenet": _WITHOUT_NORM,
    "bench-cnn": _WITHOUT_NORM,
    "vgg-small-7": _WITHOUT_NORM,
    "wage-vgg7": _WITHOUT_NORM,
}
_DFP_DEFAULT = ((0, (205, -11)), (6, (205, -13)), (8, (205, -14)))


def _at(schedule, epoch: int):
    return [value for first, value in schedule if first <= epoch][-1]


def learning_rate(method: str, model: str, epoch: int):
    """niti, niti-2020: the bits of the largest weight update. wage: log2 of the rate."""
    if method in ("niti", "niti-2020"):
        return _at(_NITI.get(model, _NITI_DEFAULT), epoch)
    if method == "wage":
        return _at(_WAGE.get(model, _WAGE_DEFAULT), epoch)
    if method in ("dfp", "float"):
        return _at(_DFP.get(model, _DFP_DEFAULT), epoch)
    raise InputError(f"unknown method {method!r}")
