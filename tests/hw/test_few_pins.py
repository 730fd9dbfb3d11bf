"""The pins that a netlist gets for placement, simulated cell by cell."""

import pytest

from hw.few_pins import few_pins

WIDTH_IN, WIDTH_OUT = 6, 9


def design():
    """Wires only: every output bit is an input bit."""
    inputs = list(range(10, 10 + WIDTH_IN))
    return {"modules": {"LUT4": {"attributes": {}, "cells": {}}, "design": {
        "attributes": {"top": f"{1:032b}"}, "cells": {}, "netnames": {}, "ports": {
            "clk": {"direction": "input", "bits": [2]}, "rst": {"direction": "input", "bits": [3]},
            "x": {"direction": "input", "bits": inputs},
            "y": {"direction": "output", "bits": [inputs[k % WIDTH_IN] for k in range(WIDTH_OUT)]}}}}}


def values(cells, state, pins):
    """Every net: pins, flip-flops, then the LUTs behind them."""
    nets = {"0": 0, **pins, **{cell["connections"]["Q"][0]: state[name] for name, cell in cells.items()
                               if cell["type"] == "TRELLIS_FF"}}
    for cell in cells.values():
        if cell["type"] == "LUT4":
            index = sum(nets[cell["connections"][pin][0]] << k for k, pin in enumerate("ABCD"))
            nets[cell["connections"]["Z"][0]] = int(cell["parameters"]["INIT"][::-1][index])
    return nets


@pytest.mark.parametrize("word", [0, 0b101101, 0b010011, 0b111111])
def test_every_input_bit_is_driven_and_every_output_bit_is_seen(word):
    netlist = design()
    assert few_pins(netlist) == len(netlist["modules"]["design"]["cells"])
    module = netlist["modules"]["design"]
    cells, ports = module["cells"], module["ports"]
    assert set(ports) == {"clk", "rst", "scan_in", "scan_out"}
    assert [len(ports[name]["bits"]) for name in ("scan_in", "scan_out")] == [2, 3]
    chains = [list(range(10, 14)), [14, 15]]
    state = dict.fromkeys(cells, 0)
    for cycle in range(4 + 4):          # four to shift in, then two registers, the parity and what is seen
        pins = {}
        for pin, chain in zip(ports["scan_in"]["bits"], chains, strict=True):
            wanted = chain[max(len(chain) - 1 - max(cycle - (4 - len(chain)), 0), 0)]
            pins[pin] = word >> (wanted - 10) & 1
        nets = values(cells, state, pins)
        if cycle == 5:
            held = sum(nets[10 + k] << k for k in range(WIDTH_IN))
            assert held == word
            expected = [sum(word >> (k % WIDTH_IN) & 1 for k in group) & 1
                        for group in (range(4), range(4, 8), range(8, 9))]
        if cycle == 7:
            assert [nets[pin] for pin in ports["scan_out"]["bits"]] == expected
        state = {name: nets[cell["connections"]["DI"][0]] for name, cell in cells.items()
                 if cell["type"] == "TRELLIS_FF"}
