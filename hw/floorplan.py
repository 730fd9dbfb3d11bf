"""Floorplan: sites for block RAMs and multipliers, chosen for the shortest wires where all other cells lie.

nextpnr's static placer gives these cells their sites by a random search, long before the others lie where they stay,
and never moves them far again. A cell with a ``BEL`` attribute has its site from the start. `floorplan` takes a
placement that is done and finds the sites with the least total half-perimeter of nets: an assignment problem for each
type of cell, solved again until no turn makes it shorter, as these cells have wires to each other too.

A floorplan is kept by names without the numbers that yosys counts up and lines of Verilog (`stable_names`), so that it
serves again after changes of RTL that leave these cells as they were.
"""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np
from scipy.optimize import linear_sum_assignment

from .few_pins import top_module

__all__ = ["SITES", "bind", "floorplan", "recall", "stable_names"]

# LFE5U-85F: rows of 13 blocks, of four block RAMs or four multipliers each, seven of them left of the clock's spine.
# Four multipliers share four clock enables. One enable is constant and each multiplier of the array has its own, so
# that only three of a block's four are surely legal together: the last is left out.
COLUMNS = [*range(4, 67, 9), *range(69, 123, 9)]
SITES = {
    "DP16KD": {f"X{x + 2 * k}/Y{y}/EBR{k}": (x + 2 * k, y)
               for y in (22, 46, 70, 82) for x in COLUMNS for k in range(4)},
    "MULT18X18D": {f"X{x + k}/Y{y}/MULT18_{k}": (x + k, y)
                   for y in (10, 34, 58) for x in COLUMNS for k in (0, 1, 4)},
}
BEL = re.compile(r"X(\d+)/Y(\d+)/")
READERS = 200           # a net with more is everywhere anyway
TURNS = 10


def floorplan(placed: dict) -> dict[str, str]:
    """The sites, by name of cell.

    placed : what nextpnr's ``--write`` leaves after placement, for LFE5U-85F.
    Raises ValueError if a cell has no place, or if there are more cells of a type than sites.
    """
    at, nets, moved = {}, defaultdict(set), defaultdict(list)
    for name, cell in top_module(placed)["cells"].items():
        place = BEL.match(cell["attributes"].get("NEXTPNR_BEL", ""))
        if place is None:
            raise ValueError(f"cell {name!r} is not placed: write the netlist after placement")
        at[name] = tuple(map(int, place.groups()))
        if cell["type"] in SITES:
            moved[cell["type"]].append(name)
        for bits in cell["connections"].values():
            for bit in bits:
                if isinstance(bit, int):            # a wire, not a constant
                    nets[bit].add(name)
    for kind, names in moved.items():
        if len(names) > len(SITES[kind]):
            raise ValueError(f"{len(names)} {kind} for {len(SITES[kind])} sites: choose a smaller core")
    nets = [net for net in nets.values() if len(net) <= READERS]
    of = {name: [] for names in moved.values() for name in names}       # per cell that moves: its nets' other cells
    for net in nets:
        for name in net & of.keys():
            of[name].append(net - {name})
    best, shortest = {}, None
    for _ in range(TURNS):
        sites = {}
        for kind, names in moved.items():
            bels, (x, y) = list(SITES[kind]), np.array(list(SITES[kind].values())).T
            length = np.zeros((len(names), len(bels)))
            for row, name in enumerate(names):
                for others in filter(None, of[name]):
                    xs, ys = zip(*(at[other] for other in others), strict=True)
                    length[row] += np.maximum(x, max(xs)) - np.minimum(x, min(xs))
                    length[row] += np.maximum(y, max(ys)) - np.minimum(y, min(ys))
            for row, column in zip(*linear_sum_assignment(length), strict=True):
                sites[names[row]] = bels[column]
                at[names[row]] = SITES[kind][bels[column]]
        wire = sum(max(a) - min(a) for net in nets for a in zip(*(at[name] for name in net), strict=True))
        if shortest is not None and wire >= shortest:
            break
        best, shortest = sites, wire
    return best


def bind(netlist: dict, sites: dict[str, str]) -> None:
    """Give cells of a netlist for nextpnr their sites, in place."""
    cells = top_module(netlist)["cells"]
    for name, site in sites.items():
        cells[name]["attributes"]["BEL"] = site


def stable_names(netlist: dict) -> dict[str, str]:
    """The names of the cells that have sites in a floorplan, by what they are kept as: several that differ in numbers
    alone are counted in their order."""
    def order(name):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    names, count = {}, defaultdict(int)
    for name in sorted((n for n, cell in top_module(netlist)["cells"].items() if cell["type"] in SITES), key=order):
        plain = re.sub(r"\$\d+", "", re.sub(r"\w+\.v:\d+", "", name))
        names[f"{plain}#{count[plain]}"] = name
        count[plain] += 1
    return names


def recall(netlist: dict, kept: dict[str, str]) -> dict[str, str]:
    """The sites of a netlist's cells, from a floorplan that was kept by stable names.

    Raises ValueError if the netlist has other cells than the floorplan, or a site is none or taken twice.
    """
    if not isinstance(kept, dict):
        raise ValueError("a floorplan is an object of sites by names of cells")
    names, cells = stable_names(netlist), top_module(netlist)["cells"]
    for only, text in ((names.keys() - kept, "has no site for"), (kept.keys() - names, "has a site for unknown")):
        if only:
            raise ValueError(f"the floorplan {text} {min(only)!r} ({len(only)} such): it is of another netlist, "
                             "--floorplans 1 makes one of this")
    for name, site in kept.items():
        if site not in SITES[cells[names[name]]["type"]]:
            raise ValueError(f"{site!r} is no site for {name!r}")
    if len(set(kept.values())) < len(kept):
        raise ValueError("the floorplan gives a site to two cells")
    return {names[name]: site for name, site in kept.items()}
