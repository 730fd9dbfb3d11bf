"""Learning rates: a function of method, network, data set and absolute epoch, never of the length of the run."""

from __future__ import annotations

import re

from golden.errors import InputError

# Network, or network and data set: (first epoch, value) in order.
_NITI = {  # bits of the largest weight update
    "lenet": ((0, 5), (2, 4), (4, 3), (6, 2)),
    "vgg-small-7": ((0, 5), (100, 4), (150, 3)),
}
_NITI_DEFAULT = ((0, 5), (4, 4), (7, 3), (10, 2), (14, 1), (17, 0))
_WAGE = {  # log2 of the rate
    "wage-lenet": ((0, 3), (5, 1), (8, 0), (30, -1), (50, -2), (70, -3)),
    "wage-vgg7": ((0, 3), (200, 0), (250, -3)),
    ("mlp", "mnist"): ((0, 3), (8, 1), (12, 0), (16, -1)),
}
_WAGE_DEFAULT = ((0, 3), (5, 1), (8, 0))
_WITHOUT_NORM = ((0, (205, -13)), (6, (205, -15)), (8, (205, -16)))
_WARMED_UP = ((0, (205, -15)), (1, (205, -13)), (4, (205, -15)), (6, (205, -16)), (7, (205, -17)))
_DFP = {  # (mantissa, exponent) of the rate, for float too
    ("mlp", "mnist"): _WITHOUT_NORM,
    "tiny-cnn": _WITHOUT_NORM,
    "lenet": _WARMED_UP,      # float does not get started at the second rate
    "wage-lenet": _WITHOUT_NORM,
    "bench-cnn": _WITHOUT_NORM,
    "vgg-small-7": _WITHOUT_NORM,
    "wage-vgg7": _WITHOUT_NORM,
}
_DFP_DEFAULT = ((0, (205, -11)), (6, (205, -13)), (8, (205, -14)))
_TABLES = {"niti": (_NITI, _NITI_DEFAULT), "niti-2020": (_NITI, _NITI_DEFAULT), "wage": (_WAGE, _WAGE_DEFAULT),
           "dfp": (_DFP, _DFP_DEFAULT), "float": (_DFP, _DFP_DEFAULT)}


def learning_rate(method: str, model: str, epoch: int, data: str = "", rates: str | None = None):
    """niti, niti-2020: the bits of the largest weight update. wage: log2 of the rate. dfp, float: (mantissa,
    exponent). `rates`, if given, replaces the schedule: see `parse`.
    """
    if method not in _TABLES:
        raise InputError(f"unknown method {method!r}")
    table, default = _TABLES[method]
    schedule = table.get((model, data), table.get(model, default)) if rates is None else parse(method, rates)
    return [value for first, value in schedule if first <= epoch][-1]


def parse(method: str, rates: str) -> list[tuple]:
    """The schedule `EPOCH:VALUE,EPOCH:VALUE,...`, with increasing epochs from 0. VALUE is a whole number (niti 0 to 15,
    wage -15 to 15), for dfp and float `MpE`, which is M * 2**E (M 1 to 255, E -30 to 0).
    """
    fixed_point = method in ("dfp", "float")
    value = r"(\d+)p(-?\d+)" if fixed_point else r"(-?\d+)"
    schedule = []
    for item in rates.split(","):
        match = re.fullmatch(rf"(\d+):{value}", item.strip())
        if not match:
            example = "0:205p-13,6:205p-15" if fixed_point else "0:3,5:1"
            raise InputError(f"--rates {rates}: {item!r} is not EPOCH:RATE as {method} takes it, such as {example}")
        first, *numbers = map(int, match.groups())
        limits = ((1, 255), (-30, 0)) if fixed_point else ((-15 if method == "wage" else 0, 15),)
        for number, (low, high) in zip(numbers, limits, strict=True):
            if not low <= number <= high:
                raise InputError(f"--rates {rates}: {number} is outside {low}..{high}")
        schedule.append((first, tuple(numbers) if fixed_point else numbers[0]))
    epochs = [first for first, _ in schedule]
    if epochs[0] != 0 or epochs != sorted(set(epochs)):
        raise InputError(f"--rates {rates}: epochs must begin with 0 and increase")
    return schedule
