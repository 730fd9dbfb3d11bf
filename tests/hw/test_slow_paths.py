"""Estimated paths of small netlists, written by hand."""

import pytest

from hw.slow_paths import late_endpoints, later, report, slow_paths

INPUTS = {"TRELLIS_FF": {"DI", "CE", "CLK", "LSR"}, "LUT4": set("ABCD"),
          "CCU2C": {"A0", "A1", "CIN"}, "DP16KD": {"ADA0", "CLKA"}}


def netlist(cells, names):
    """{cell: (type, {port: net})} as yosys writes it."""
    return {"modules": {
        "black_box": {"cells": {}}, "design": {
            "netnames": {name: {"bits": [bit]} for name, bit in names.items()},
            "cells": {name: {"type": kind, "parameters": {},
                             "connections": {port: [bit] for port, bit in wires.items()},
                             "port_directions": {port: "input" if port in INPUTS[kind] else "output" for port in wires}}
                      for name, (kind, wires) in cells.items()}}}}


REGISTERS = {"first": ("TRELLIS_FF", {"DI": "0", "Q": 2, "CLK": 1}),
             "last": ("TRELLIS_FF", {"DI": 4, "Q": 5, "CLK": 1})}


def test_a_path_is_the_sum_of_its_cells_and_routes():
    design = netlist({**REGISTERS, "gate": ("LUT4", {"A": 2, "Z": 3}), "second_gate": ("LUT4", {"B": 3, "Z": 4})},
                     {"a.count": 2, "ready": 3, "a.state": 5})
    path, = [path for path in slow_paths(design) if path.end == "a.state.DI"]
    # clock to output, twice a route with one reader and a LUT, the wire inside the slice
    assert path.ns == pytest.approx(0.52 + 2 * (0.75 + 0.24) + 0.13)
    assert path.nets == ["a.count", "ready", "LUT"]
    assert report([path]) == "  2.6 ns      1 x  a.count > ready > LUT > a.state.DI\n"


def test_many_readers_take_longer():
    few, many = (slow_paths(netlist({
        **REGISTERS, "gate": ("LUT4", {"A": 2, "Z": 4}),
        **{f"reader{k}": ("TRELLIS_FF", {"DI": 4, "Q": 10 + k, "CLK": 1}) for k in range(readers)},
        **{f"other{k}": ("LUT4", {"A": 2, "Z": 100 + k}) for k in range(readers)}}, {"from": 2, "to": 5}))
        for readers in (0, 31))
    assert many[0].ns - few[0].ns == pytest.approx(5 * 0.22)     # 32 readers instead of one


def test_equal_registers_are_one_group_with_the_slowest_first():
    bits = {f"bit{k}": ("TRELLIS_FF", {"DI": 20 + k, "Q": 40 + k, "CLK": 1}) for k in range(8)}
    gates = {f"gate{k}": ("LUT4", {"A": 2 if k == 0 else 20 + k - 1, "Z": 20 + k}) for k in range(8)}
    groups = slow_paths(netlist({**REGISTERS, **bits, **gates}, {"from": 2, **{f"sum{k}": 40 + k for k in range(8)}}))
    assert groups[0].count == 8 and groups[0].end == "sum7.DI"
    assert [path.ns for path in groups] == sorted((path.ns for path in groups), reverse=True)


def test_carry_chains_are_fast_and_block_ram_is_slow():
    chain = {f"carry{k}": ("CCU2C", {"A0": 2, "CIN": "0" if k == 0 else 30 + k - 1, "COUT": 30 + k, "S1": 60 + k})
             for k in range(8)}
    end = {"last": ("TRELLIS_FF", {"DI": 67, "Q": 5, "CLK": 1}), "first": REGISTERS["first"]}
    path = slow_paths(netlist({**chain, **end}, {"from": 2, "to": 5}))[0]
    readers = 0.75 + 0.22 * 3
    assert path.ns == pytest.approx(0.52 + readers + 0.45 + 6 * 0.07 + 0.44 + 0.13)
    ram = slow_paths(netlist({"ram": ("DP16KD", {"DOA0": 2, "ADA0": "0", "CLKA": 1}),
                              "last": ("TRELLIS_FF", {"DI": 2, "Q": 5, "CLK": 1})}, {"to": 5}))[0]
    assert ram.ns == pytest.approx(5.7 + 0.75)


def test_bounds_and_designs_without_paths():
    design = netlist(REGISTERS | {"gate": ("LUT4", {"A": 2, "Z": 4})}, {})
    assert slow_paths(design) and not slow_paths(design, least_ns=5)
    assert slow_paths({"modules": {}}) == [] and report([]) == ""


def test_late_endpoints_are_grouped_by_register_with_the_latest_arrival():
    bits = {f"bit{k}": ("TRELLIS_FF", {"DI": 20 + k, "Q": 40 + k, "CLK": 1}) for k in range(3)}
    design = netlist({**REGISTERS, **bits}, {"a.state": 5, **{f"sum{k}": 40 + k for k in range(3)}})
    timings = [{"net": f"next[{k}]", "endpoints": [{"cell": f"bit{k}", "port": "M", "delay": [0.9, 4.0 + k]}]}
               for k in range(3)]
    timings.append({"net": "enable", "endpoints": [{"cell": "last", "port": "CE", "delay": [5.5]},
                                                   {"cell": "$PACKER_VCC", "port": "Z", "delay": [0.1]}]})
    assert later(timings, 5) == "2 of 5 endpoints later than 5 ns, setup times apart\n"
    assert report(late_endpoints(design, timings)) == ("  6.0 ns      3 x  next[2] > sum2.M\n"
                                                       "  5.5 ns      1 x  enable > a.state.CE\n"
                                                       "  0.1 ns      1 x  enable > $PACKER_VCC.Z\n")
