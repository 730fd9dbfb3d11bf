"""The slowest paths of a synthesised ECP5 netlist, estimated in seconds where placement takes an hour.

Cells have nextpnr's delays for speed grade 6; a route is assumed to take 0.75 ns and 0.22 ns more for each doubling of
its readers. For a unit that has the device to itself that is a quarter too slow; a core that fills the device is slower
than the estimate. It does not replace placement. It shows what to cut next: endpoints are grouped by the registers at
both ends. After routing, :func:`late_endpoints` shows the same from nextpnr's own arrivals.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

__all__ = ["Path", "late_endpoints", "later", "slow_paths", "report"]

LUT, MULTIPLEXER, INTO_CARRY, CARRY, OUT_OF_CARRY, MULTIPLIER = 0.24, 0.20, 0.45, 0.07, 0.44, 3.93     # ns
CLOCK_TO_OUT = {"TRELLIS_FF": 0.52, "DP16KD": 5.7}
REGISTERED_PRODUCT, PLAIN_PRODUCT, SETUP = 0.74, 4.4, 0.3    # out of a MULT18X18D; block RAM and multiplier inputs
CLOCKS = {"CLK", "CLKA", "CLKB", "WCK", "CLK0", "CLK1"}
SHORT = {"LUT4": "LUT", "CCU2C": "carry", "PFUMX": "mux", "L6MUX21": "mux", "TRELLIS_DPR16X4": "LUT RAM"}


@dataclass
class Path:
    """The slowest of ``count`` endpoints that begin and end at the same registers, bit numbers apart."""

    ns: float
    count: int
    nets: list[str]         # from the first register to the last gate, with the number of readers where there are many
    end: str                # register and pin


class _Netlist:
    def __init__(self, module: dict):
        self.cells = module["cells"]
        self.driver: dict[int, tuple[str, str]] = {}
        self.readers: Counter = Counter()
        for name, cell in self.cells.items():
            for port, bits in cell["connections"].items():
                for bit in bits:
                    if isinstance(bit, str):
                        continue
                    if cell["port_directions"][port] == "output":
                        self.driver[bit] = name, port
                    else:
                        self.readers[bit] += 1
        self.names: dict[int, tuple] = {}
        for name, net in module["netnames"].items():
            rank = "$" in name[:1] or ".$" in name, name.count("."), len(name), name
            for bit in net["bits"]:
                if not isinstance(bit, str) and rank < self.names.get(bit, (2,)):
                    self.names[bit] = rank
        self.arrival: dict[int, float] = {}
        self.before: dict[int, int | None] = {}

    def name(self, bit: int) -> str:
        rank = self.names.get(bit)
        if rank is None or rank[0]:
            cell = self.cells[self.driver[bit][0]]["type"] if bit in self.driver else "input"
            return SHORT.get(cell, cell)
        return rank[3]

    def route(self, bit: int, cell: str, port: str) -> float:
        source = self.cells[self.driver[bit][0]]["type"] if bit in self.driver else ""
        inside_slice = (port == "CIN" or (cell, source) == ("PFUMX", "LUT4") or cell == "L6MUX21" and port[0] == "D")
        into_flip_flop = cell == "TRELLIS_FF" and port == "DI" and source in SHORT
        return 0 if inside_slice else 0.13 if into_flip_flop else 0.75 + 0.22 * math.log2(max(1, self.readers[bit]))

    def begins(self, cell: dict) -> float | None:
        """Clock to output, if the cell holds the bit."""
        if cell["type"] != "MULT18X18D":
            return CLOCK_TO_OUT.get(cell["type"])
        clocks = (str(cell["parameters"].get(f"REG_{place}_CLK", "NONE")).strip() for place in ("OUTPUT", "INPUTA"))
        output, operand = (clock != "NONE" for clock in clocks)
        return REGISTERED_PRODUCT if output else PLAIN_PRODUCT if operand else None

    @staticmethod
    def through(cell: str, pin: str, out: str) -> float:
        if cell == "CCU2C":
            return (CARRY if out == "COUT" else OUT_OF_CARRY) if pin == "CIN" else INTO_CARRY
        return {"PFUMX": MULTIPLEXER, "L6MUX21": MULTIPLEXER, "MULT18X18D": MULTIPLIER}.get(cell, LUT)

    def at(self, bit: int) -> float:
        """Latest arrival at the output that drives ``bit``; depth first without recursion, for paths are long."""
        waiting = [bit]
        while waiting:
            bit = waiting[-1]
            if bit in self.arrival:
                waiting.pop()
                continue
            if bit not in self.driver:
                self.arrival[bit], self.before[bit] = 0.0, None
                continue
            name, out = self.driver[bit]
            cell = self.cells[name]
            kind, begins = cell["type"], self.begins(cell)
            if begins is not None:
                self.arrival[bit], self.before[bit] = begins, None
                continue
            inputs = [(port, source) for port, bits in cell["connections"].items() for source in bits
                      if cell["port_directions"][port] == "input" and port not in CLOCKS and not isinstance(source, str)
                      and (kind != "TRELLIS_DPR16X4" or port == "RAD")
                      and not (kind == "CCU2C" and out == "S0" and port[-1] == "1")]
            missing = [source for _, source in inputs if source not in self.arrival]
            if missing:
                waiting += missing
                continue
            self.arrival[bit], self.before[bit] = max(
                ((self.arrival[source] + self.route(source, kind, port) + self.through(kind, port, out), source)
                 for port, source in inputs), default=(0.0, None))
        return self.arrival[bit]

    def register(self, name: str) -> str:
        """The net that a flip-flop, memory or multiplier drives, else the cell's name."""
        wires = self.cells.get(name, {"connections": {}})["connections"]
        held = next((bit for port in ("Q", "DO", "DOA0", "P0") for bit in wires.get(port, ())
                     if not isinstance(bit, str)), None)
        return name if held is None else self.name(held)

    def ends(self):
        """(ns, net, register.pin) of every input of a flip-flop, a memory or a multiplier."""
        for name, cell in self.cells.items():
            kind = cell["type"]
            if kind not in (*CLOCK_TO_OUT, "MULT18X18D", "TRELLIS_DPR16X4"):
                continue
            register = self.register(name)
            for port, bits in cell["connections"].items():
                if cell["port_directions"][port] != "input" or port in CLOCKS or port == "RAD":
                    continue
                for bit in bits:
                    if not isinstance(bit, str):
                        setup = 0 if kind == "TRELLIS_FF" else SETUP
                        yield self.at(bit) + self.route(bit, kind, port) + setup, bit, f"{register}.{port}"


def slow_paths(netlist: dict, least_ns: float = 0) -> list[Path]:
    """Groups of paths of at least ``least_ns`` in the JSON netlist of a flattened design, the slowest first."""
    module = max(netlist["modules"].values(), key=lambda module: len(module.get("cells", ())), default={})
    net = _Netlist({"cells": {}, "netnames": {}} | module)
    groups: dict[tuple[str, str], Path] = {}
    for ns, bit, end in sorted(net.ends(), reverse=True):
        if ns < least_ns:
            break
        bits = []
        while bit is not None:
            bits.append(bit)
            bit = net.before[bit]
        key = tuple(re.sub(r"\d+", "", name) for name in (net.name(bits[-1]), end))
        if key in groups:
            groups[key].count += 1
            continue
        nets = [net.name(bit) + (f" ({net.readers[bit]})" if net.readers[bit] > 12 else "") for bit in reversed(bits)]
        groups[key] = Path(ns, 1, [name for k, name in enumerate(nets) if k == 0 or name != nets[k - 1]], end)
    return list(groups.values())


def late_endpoints(netlist: dict, timings: list[dict]) -> list[Path]:
    """Groups of endpoints by their arrival after routing, the latest first, each with the last net of its path.

    netlist : the JSON netlist of a flattened design that nextpnr routed. timings : ``detailed_net_timings`` of the
    report that nextpnr wrote with ``--detailed-timing-report``.
    """
    module = max(netlist["modules"].values(), key=lambda module: len(module.get("cells", ())), default={})
    net = _Netlist({"cells": {}, "netnames": {}} | module)
    ends = sorted(((max(end["delay"]), timing["net"], f"{net.register(end['cell'])}.{end['port']}")
                   for timing in timings for end in timing["endpoints"]), reverse=True)
    groups: dict[tuple[str, str], Path] = {}
    for ns, last, end in ends:
        key = re.sub(r"\d+", "", last), re.sub(r"\d+", "", end)
        group = groups.setdefault(key, Path(ns, 0, [last], end))
        group.count += 1
    return list(groups.values())


def later(timings: list[dict], ns: float) -> str:
    """A line that counts the endpoints of ``timings`` that are later than ``ns``. Setup times, which the report leaves
    out, come on top: a synchronous reset (LSR) has 0.4 ns on ECP5."""
    arrivals = [max(end["delay"]) for timing in timings for end in timing["endpoints"]]
    late = sum(arrival > ns for arrival in arrivals)
    return f"{late} of {len(arrivals)} endpoints later than {ns:g} ns, setup times apart\n"


def report(paths: list[Path], count: int = 40) -> str:
    """A line for each of the first groups: ns, number of endpoints, nets from register to register."""
    return "".join(f"{path.ns:5.1f} ns {path.count:6} x  {' > '.join(path.nets)} > {path.end}\n"
                   for path in paths[:count])
