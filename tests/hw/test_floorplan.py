"""Sites of block RAMs and multipliers: the shortest wires, every site once, and messages for what cannot be."""

import itertools
import random
import re

import pytest

from hw.floorplan import SITES, bind, floorplan, recall, stable_names


def placed(cells):
    """A placed netlist: type, place and nets of each cell."""
    return {"modules": {"design": {"attributes": {"top": "1"}, "cells": {
        name: {"type": kind, "attributes": {"NEXTPNR_BEL": bel} if bel else {}, "connections": {"A": list(nets)}}
        for name, (kind, bel, nets) in cells.items()}}}}


def wire(cells, sites):
    def at(name):
        kind, bel, _ = cells[name]
        return SITES[kind][sites[name]] if name in sites else tuple(int(part[1:]) for part in bel.split("/")[:2])

    total = 0
    for net in {net for *_, nets in cells.values() for net in nets}:
        for axis in zip(*(at(name) for name, (*_, nets) in cells.items() if net in nets), strict=True):
            total += max(axis) - min(axis)
    return total


@pytest.mark.parametrize("kind", SITES)
def test_one_cell_gets_the_best_of_all_sites(kind):
    rng = random.Random(kind)
    for _ in range(20):
        cells = {f"logic{k}": ("TRELLIS_COMB", f"X{rng.randrange(2, 125)}/Y{rng.randrange(2, 94)}/SLICEA.K0", [k])
                 for k in range(4)}
        cells["moved"] = (kind, "X4/Y22/EBR0", range(4))
        sites = floorplan(placed(cells))
        assert wire(cells, sites) == min(wire(cells, {"moved": site}) for site in SITES[kind])


def test_cells_that_want_the_same_site_share_out_the_best_ones():
    cells = {"logic": ("TRELLIS_FF", "X31/Y46/SLICEA.FF0", range(3))}
    cells |= {f"ram{k}": ("DP16KD", f"X{4 + 2 * k}/Y82/EBR{k}", [k]) for k in range(3)}
    sites = floorplan(placed(cells))
    near = [site for site, (x, y) in SITES["DP16KD"].items() if y == 46 and 20 < x < 42]
    best = min(wire(cells, dict(zip(("ram0", "ram1", "ram2"), some, strict=True)))
               for some in itertools.permutations(near, 3))
    assert len(set(sites.values())) == 3 and wire(cells, sites) == best


def test_a_cell_follows_another_that_moves():
    """The multiplier hangs on the RAM alone, which goes to its logic on the other side of the chip."""
    cells = {"multiplier": ("MULT18X18D", "X4/Y10/MULT18_0", [3]), "ram": ("DP16KD", "X4/Y22/EBR0", [1, 2, 3]),
             "logic": ("TRELLIS_COMB", "X120/Y82/SLICEA.K0", [1, 2])}
    sites = floorplan(placed(cells))
    assert SITES["DP16KD"][sites["ram"]] == (120, 82)
    x, y = SITES["MULT18X18D"][sites["multiplier"]]
    assert y == 58 and x > 110


def test_sites_become_attributes_that_nextpnr_heeds():
    netlist = placed({"ram": ("DP16KD", "", [1])})
    bind(netlist, {"ram": "X4/Y22/EBR0"})
    assert netlist["modules"]["design"]["cells"]["ram"]["attributes"]["BEL"] == "X4/Y22/EBR0"


def test_a_placement_that_is_none_or_too_large_is_named():
    with pytest.raises(ValueError, match="cell 'ram' is not placed"):
        floorplan(placed({"ram": ("DP16KD", "", [1])}))
    with pytest.raises(ValueError, match="209 DP16KD for 208 sites"):
        floorplan(placed({f"ram{k}": ("DP16KD", "X4/Y22/EBR0", [k]) for k in range(209)}))


def test_a_floorplan_serves_again_when_numbers_and_lines_are_others():
    def netlist(line, number):
        names = [f"core.array.$mul$design.v:{line + k}${number + k}" for k in (9, 10, 2)]
        return placed({name: ("MULT18X18D", "", [1]) for name in names}
                      | {f"core.q$8{number}.memory.0.{k}": ("DP16KD", "", [1]) for k in (2, 10)}
                      | {"logic": ("TRELLIS_FF", "", [1])}), names

    before, names = netlist(90, 400)
    sites = dict(zip(names, SITES["MULT18X18D"], strict=False))
    sites |= dict(zip(("core.q$8400.memory.0.2", "core.q$8400.memory.0.10"), SITES["DP16KD"], strict=False))
    kept = {stable: sites[name] for stable, name in stable_names(before).items()}
    assert kept.keys() == {*(f"core.array.$mul$#{k}" for k in range(3)), *(f"core.q.memory.0.{k}#0" for k in (2, 10))}
    assert recall(before, kept) == sites
    after, others = netlist(1095, 88)
    assert [recall(after, kept)[name] for name in others] == [sites[name] for name in names]


@pytest.mark.parametrize("sites, message", [
    ({"a#0": "X4/Y22/EBR0"}, "the floorplan has no site for 'b#0' (1 such)"),
    ({"a#0": "X4/Y22/EBR0", "b#0": "X6/Y22/EBR1", "c#0": "X8/Y22/EBR2"}, "has a site for unknown 'c#0'"),
    ({"a#0": "X4/Y22/EBR0", "b#0": "X6/Y23/EBR1"}, "'X6/Y23/EBR1' is no site for 'b#0'"),
    ({"a#0": "X4/Y22/EBR0", "b#0": "X4/Y22/EBR0"}, "gives a site to two cells")])
def test_a_floorplan_of_something_else_is_named(sites, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        recall(placed({name: ("DP16KD", "", [1]) for name in "ab"}), sites)
