"""Area and clock rate with open tools: yosys for ECP5, 7-series and UltraScale+, nextpnr for ECP5 (`make synth`).

A design is the core, one of its engines, or a unit: `DESIGNS` has them all, docs/silicon.md the figures.

A job is one design on one device. Its Verilog goes through yosys; on ECP5 nextpnr then places and routes it once per
seed, with registers at its ports and few pins (`hw/few_pins.py`): the clock rate is that of paths between registers.
Every tool must leave its result file: one that stops early without a message is an error. Before that,
`slow_paths.txt` beside the netlist tells in seconds which paths will be slow (`hw/slow_paths.py`).
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from amaranth.back import verilog
from amaranth.hdl import Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from golden.rounding import Rounding

from .accumulator import Accumulator
from .array import SystolicArray
from .config import METHODS, CoreConfig
from .core import COUNTERS, READERS, WRITERS
from .divider import Divider
from .dsp_registers import absorb_registers
from .feeder import Feeder
from .few_pins import few_pins
from .floorplan import bind, floorplan, recall, stable_names
from .fold import Fold
from .isqrt import SquareRoot
from .lanes import Lanes, roundings, target_bits
from .loop_nest import LoopNest
from .loss import NitiLoss
from .microprogram import BITS
from .operand_buffer import OperandBuffer
from .pool import MaxPool
from .product import ProductEngine
from .product_pair import ProductPair
from .random_words import RandomWords
from .range_detector import RangeDetector
from .read_port import ReadPort
from .registers import Registers
from .round_shift import RoundShift
from .scalar import ScalarUnit
from .sequencer import Sequencer
from .shared_fold import SharedFold
from .slow_paths import late_endpoints, later, report, slow_paths
from .softmax import Softmax
from .store import Store
from .top import Top
from .vector import VectorEngine
from .vector_reader import VectorReader
from .vector_writer import VectorWriter
from .weight_ring import WeightRing
from .wide import WideLanes
from .wide_lane import WideLane
from .write_port import WritePort

__all__ = ["DESIGNS", "DEVICES", "SynthesisError", "ArrayWithLanes", "run", "table"]

CONTROL = data.StructLayout({"valid": 1})     # of the array alone: nothing but the valid bit travels with results
BASELINE = Path(__file__).parent / "synthesis_baseline.json"
GOAL_MHZ, CORE_GOAL_MHZ = 150, 100      # what nextpnr optimises for
# Pins are nextpnr's choice. Flip-flops of the core have about a thousand combinations of enable and reset: placing one
# takes more attempts than nextpnr allows.
PLACE_AND_ROUTE = ("--lpf-allow-unconstrained", "--timing-allow-fail", "--placer-heap-cell-placement-timeout", "0",
                   "--detailed-timing-report")
TIMEOUT = 4 * 3600


class SynthesisError(Exception):
    """A tool is missing or gave no result."""


class ArrayWithLanes(wiring.Component):
    """The array and a requantization lane for each of its columns: the datapath that sets the clock rate."""

    def __init__(self, config: CoreConfig):
        self.array = SystolicArray(config, CONTROL)
        self.lanes = RoundShift(config.columns, (Rounding.NEAREST, Rounding.PSEUDO_STOCHASTIC), target_bits=(8,))
        edges = {name: member for name, member in self.array.signature.members.items() if member.flow == In}
        super().__init__({**edges, "shift_right": In(5), "rounding": In(4),
                          "result": Out(data.ArrayLayout(8, config.columns))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.array, m.submodules.lanes = array, lanes = self.array, self.lanes
        for name, member in array.signature.members.items():
            if member.flow == In:
                registered = Signal(member.shape, name=f"{name}_in", reset_less=True)
                m.d.sync += registered.eq(getattr(self, name))
                m.d.comb += getattr(array, name).eq(registered)
        shift, rounding = Signal(5), Signal(4)
        m.d.sync += [shift.eq(self.shift_right), rounding.eq(self.rounding)]
        m.d.comb += [lanes.i_valid.eq(1), lanes.x.eq(array.column), lanes.shift.eq(shift), lanes.rounding.eq(rounding)]
        m.d.sync += self.result.eq(lanes.o)
        return m


def _rounding(*methods):
    """The rounding lanes as a core for these methods has them."""
    def unit(config):
        config = config.replace(methods=methods)
        return RoundShift(config.lanes, roundings(config), target_bits=target_bits(config), flags="wage" in methods)
    return unit


DESIGNS = {
    "array": lambda config: SystolicArray(config, CONTROL), "array+lanes": ArrayWithLanes, "core": Top,
    # Control and ports of the core.
    "sequencer": Sequencer, "registers": lambda config: Registers(config, len(COUNTERS)),
    "read-port": lambda config: ReadPort(config, list(READERS.values())),
    "write-port": lambda config: WritePort(config, len(WRITERS)),
    # Product engine and its units.
    "product-engine": ProductEngine, "operand-buffer": lambda config: OperandBuffer(config, config.rows),
    "weight-ring": WeightRing, "feeder": Feeder, "shared-fold": SharedFold, "fold": Fold, "accumulator": Accumulator,
    "store": Store,
    # Vector engine and its units.
    "vector-engine": VectorEngine, "lanes": Lanes, "max-pool": lambda config: MaxPool(config.lanes, config.parts),
    "range-detector": lambda config: RangeDetector(config.lanes), "scalar-unit": ScalarUnit,
    "vector-reader": VectorReader, "vector-writer": VectorWriter,
    # What methods need of it: the rounding lanes of one method against those of all, and units that not all use.
    "round-shift": _rounding(*METHODS), **{f"round-shift-{method}": _rounding(method) for method in METHODS},
    "random-words": lambda config: RandomWords(config.lanes),
    "random-index": lambda config: LoopNest(5 + (config.parts > 1), {"product": 32}),
    "niti-loss": NitiLoss, "softmax": Softmax, "wide-lanes": WideLanes,
    # Parts of the wide lanes, counted in them too: one `wide-lane` for four lanes.
    "wide-lane": lambda config: WideLane(),
    "divider": lambda config: Divider(BITS, BITS), "square-root": lambda config: SquareRoot(32),
    # Not in the core: two int8 products per DSP against one.
    "product-pair": lambda config: ProductPair(packed=False),
    "product-pair-packed": lambda config: ProductPair(packed=True),
}
# Registers with the attribute `keep` stay apart, although another has the same value: yosys heeds it at cells alone.
KEEP = "proc; setattr -set keep 1 a:keep %ci1 t:$dff %i"
DEVICES = {
    "ecp5": "synth_ecp5 -noabc9",
    "xc7": "synth_xilinx -family xc7 -noiopad",
    "xcup": "synth_xilinx -family xcup -noiopad",
}
# A function of six or seven inputs takes a half or the whole of a tile. In a device as full as with a core, the next
# free one is far from the rest of its path; so there at most five inputs, which one slice has.
FEW_INPUTS = "abc -dress -lut 4:5; clean"
# What a table shows, from the cells each family has.
GROUPS = {
    "LUT": r"LUT[1-6]", "carry": r"CCU2C|CARRY4|CARRY8", "FF": r"TRELLIS_FF|FD[RSCP]E(_1)?",
    "DSP": r"MULT18X18D|DSP48E[12]", "block RAM": r"DP16KD|PDPW16KD|RAMB(18|36)E[12]|RAMB36|RAMB18",
    "LUT RAM": r"TRELLIS_DPR16X4|RAM\d+X\d+\w*|RAM\d+M\w*",
}


def _tool(name: str) -> str:
    """A native tool on PATH, else the one of PyPI beside this Python."""
    found = shutil.which(name) or shutil.which(f"yowasp-{name}", path=str(Path(sys.executable).parent))
    if not found:
        raise SynthesisError(f"no {name} found: run `make synth`, which installs requirements-fpga.lock, or put "
                             f"{name} on PATH")
    return found


def _call(command: list, log: Path, result: Path) -> None:
    result.unlink(missing_ok=True)
    with log.open("w") as file:
        try:
            code = subprocess.run(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, timeout=TIMEOUT,
                                  cwd=log.parent).returncode
        except subprocess.TimeoutExpired:
            raise SynthesisError(f"{Path(command[0]).name} took over {TIMEOUT} s (log: {log})") from None
    if not result.is_file() or not result.stat().st_size:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise SynthesisError(f"{Path(command[0]).name} stopped early with exit status {code} after "
                             f"{''.join(last)!r} (log: {log})")


def _version(tool: str) -> str:
    out = subprocess.run([tool, "--version"], capture_output=True, text=True)
    lines = (out.stdout + out.stderr).strip().splitlines()
    if out.returncode or not lines:
        raise SynthesisError(f"{tool} --version failed with exit status {out.returncode}: {' '.join(lines[:1])}")
    return lines[0]


def _has_python(nextpnr: str) -> bool:
    shown = subprocess.run([nextpnr, "--help"], capture_output=True, text=True)
    return "--pre-route" in shown.stdout + shown.stderr         # nextpnr 0.11 shows its help on stderr


def _cells(statistics_file: Path, top: str) -> dict[str, int]:
    text = statistics_file.read_text()
    modules = json.loads(text[text.index("{"):])
    cells = modules.get("design", modules["modules"].get(f"\\{top}", {})).get("num_cells_by_type", {})
    if not cells:
        raise SynthesisError(f"no cell count in {statistics_file}")
    return dict(sorted(cells.items()))


def _finish(folder: Path, log) -> int:
    """Use the multipliers' registers in the netlist, write its slowest paths, and itself with few pins for placement;
    returns the flip-flops saved."""
    file, text = folder / "netlist.json", folder / "slow_paths.txt"
    netlist = json.loads(file.read_text())
    saved = absorb_registers(netlist)
    if saved:
        file.write_text(json.dumps(netlist))
    paths = slow_paths(netlist)
    few_pins(netlist)
    (folder / "pins.json").write_text(json.dumps(netlist))
    text.write_text(report(paths))
    if paths:
        log(f"slowest path about {paths[0].ns:.1f} ns: {text}")
    return saved


def grouped(cells: dict[str, int]) -> dict[str, int]:
    """Cells by kind; a kind that the device spells several ways is summed."""
    return {group: sum(count for name, count in cells.items() if re.fullmatch(pattern, name))
            for group, pattern in GROUPS.items()}


def _kept_floorplan(nextpnr: str, placer: str, refinements: int, floorplans: int, sites: Path | None,
                    jobs: int) -> dict | None:
    """The floorplan in file ``sites``, if there is one; refuses options of `run` that cannot work."""
    if refinements < 0:
        raise SynthesisError(f"a placement cannot be refined {refinements} times: choose --refinements 0 or more")
    if refinements and placer != "static":
        raise SynthesisError("only the placer static can refine again: choose --placer static or --refinements 0")
    if refinements and not _has_python(nextpnr):
        raise SynthesisError(f"{nextpnr} has no Python, so it cannot refine again: put a native nextpnr-ecp5 on "
                             "PATH or choose --refinements 0")
    if floorplans < 0:
        raise SynthesisError(f"there is no floorplan after {floorplans} placements: choose --floorplans 0 or more")
    if floorplans and sites:
        raise SynthesisError("there is one floorplan: choose --floorplans or --sites")
    if jobs < 1:
        raise SynthesisError(f"{jobs} seeds at a time give no clock rate: choose --jobs 1 or more")
    try:
        return json.loads(sites.read_text()) if sites else None
    except (OSError, ValueError) as error:
        raise SynthesisError(f"no floorplan in {sites}: {error}") from None


def _fix_sites(folder: Path, choose, log) -> None:
    """Give block RAMs and multipliers the sites that ``choose`` finds for the netlist, and leave these in a file."""
    pins, chosen = folder / "pins.json", folder / "sites.json"
    netlist = json.loads(pins.read_text())
    try:
        sites = choose(netlist)
    except ValueError as error:
        raise SynthesisError(f"no floorplan: {error}") from None
    bind(netlist, sites)
    pins.write_text(json.dumps(netlist))
    kept = {stable: sites[name] for stable, name in stable_names(netlist).items()}
    chosen.write_text(json.dumps(kept, indent=0) + "\n")
    log(f"floorplan: {chosen}")


def run(design: str, config: CoreConfig, device: str, out: Path, *, seeds=(1, 2, 3), route: bool = True,
        placer: str | None = None, router: str = "router1", refinements: int = 0, floorplans: int = 0,
        sites: Path | None = None, jobs: int = 1, log=print) -> dict:
    """Synthesise one design; returns its cells and, on ECP5 with ``route``, the clock rates of the seeds.

    nextpnr's ``placer`` is heap, but static for the core: its shorter wires are what lets a routing end. With
    ``refinements`` the last step of that placer, which moves single cells, is done so many times more: it stops when
    wires get no shorter, with late cells still far from each other, and begins with longer moves each time. It is
    called again from nextpnr's own Python, which only a native one has. Before the seeds the design is placed
    ``floorplans`` times, and each time block RAMs and multipliers get the sites with the shortest wires to all other
    cells (`hw/floorplan.py`); or they get those of the floorplan in file ``sites``. Both are left in ``sites.json``.
    ``jobs`` seeds are placed and routed at a time.
    """
    if design not in DESIGNS:
        raise SynthesisError(f"unknown design {design!r}: choose from {', '.join(DESIGNS)}")
    if device not in DEVICES:
        raise SynthesisError(f"unknown device {device!r}: choose from {', '.join(DEVICES)}")
    yosys = _tool("yosys")
    route = route and device == "ecp5"
    if route:
        nextpnr, placer = _tool("nextpnr-ecp5"), placer or ("static" if design == "core" else "heap")
        kept = _kept_floorplan(nextpnr, placer, refinements, floorplans, sites, jobs)
    name = f"{design.replace('+', '-')}-{config.name}-{device}"
    folder = (Path(out) / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)

    def note(line):
        log(f"{name}: {line}")

    (folder / "design.v").write_text(verilog.convert(DESIGNS[design](config), name="design"))
    synth = f"{DEVICES[device]} -top design -run"
    # Without the last steps, which rename every cell: hours for a core.
    steps = f"{synth} begin:check"
    if device == "ecp5" and design == "core":
        steps = f"{synth} begin:map_luts; {FEW_INPUTS}; {synth} map_cells:check"
    script = (f"read_verilog design.v; {KEEP}; {steps}; hierarchy -check; check -noinit; blackbox =A:whitebox; "
              "write_json netlist.json; tee -q -o cells.json stat -json")
    started = time.monotonic()
    note("synthesis")
    _call([yosys, "-q", "-p", script], folder / "yosys.log", folder / "cells.json")
    cells = _cells(folder / "cells.json", "design")
    if device == "ecp5":
        cells["TRELLIS_FF"] = cells.get("TRELLIS_FF", 0) - _finish(folder, note)
    result = {"design": design, "core": config.name, "rows": config.rows, "columns": config.columns,
              "device": device, "cells": cells, **grouped(cells), "yosys": _version(yosys), "script": script,
              "seconds": round(time.monotonic() - started)}
    if not route:
        return result
    refine = []
    if refinements:
        (folder / "refine.py").write_text(f"for _ in range({refinements}):\n    ctx.place()\n")
        refine = ["--pre-route", "refine.py"]
    goal = CORE_GOAL_MHZ if design == "core" else GOAL_MHZ
    place = [nextpnr, "--85k", "--speed", "6", "--package", "CABGA756", "--json", "pins.json", "--freq", goal,
             *PLACE_AND_ROUTE, "--placer", placer]
    placed = folder / "placed.json"
    if kept is None:
        (folder / "sites.json").unlink(missing_ok=True)
    else:
        _fix_sites(folder, lambda netlist: recall(netlist, kept), note)
    for turn in range(1, floorplans + 1):
        _call([*place, "--seed", seeds[0], "--no-route", "--write", placed.name],
              folder / f"floorplan-{turn}.log", placed)
        _fix_sites(folder, lambda _: floorplan(json.loads(placed.read_text())), note)

    def place_and_route(seed):
        return [*place, "--seed", seed, "--router", router, *refine, "--report", f"report-{seed}.json"]

    def rate(seed):
        started = time.monotonic()
        timing, text = folder / f"report-{seed}.json", folder / f"nextpnr-{seed}.log"
        note(f"seed {seed}: {text}")
        _call(place_and_route(seed), text, timing)
        routed = json.loads(timing.read_text())
        if not routed["fmax"]:
            raise SynthesisError(f"nextpnr reports no clock (log: {text})")
        mhz = round(min(clock["achieved"] for clock in routed["fmax"].values()), 1)
        timings = routed.get("detailed_net_timings", [])
        late = late_endpoints(json.loads((folder / "pins.json").read_text()), timings)
        (folder / f"late_endpoints-{seed}.txt").write_text(later(timings, 1000 / goal) + report(late))
        note(f"seed {seed}: {mhz} MHz ({time.monotonic() - started:.0f} s)")
        return mhz

    with ThreadPoolExecutor(jobs) as pool:
        rates = list(pool.map(rate, seeds))
    return result | {"seeds": list(seeds), "mhz": rates, "mhz_median": statistics.median(rates),
                     "mhz_spread": round(max(rates) - min(rates), 1), "nextpnr": _version(nextpnr),
                     "floorplans": floorplans, "sites": str(sites) if sites else None,
                     "place_and_route": " ".join(map(str, ["nextpnr-ecp5", *place_and_route(seeds[-1])[1:]]))}


def table(results: list[dict], baseline: list[dict] = ()) -> str:
    """A row per job; in brackets the change since the baseline, where it has the job."""
    before = {(row["design"], row["core"], row["device"]): row for row in baseline}
    titles = ["design", "core", "device", *GROUPS, "LUT per element", "MHz, median of seeds (spread)"]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for row in results:
        old = before.get((row["design"], row["core"], row["device"]))

        def cell(key, row=row, old=old):
            if old is None or old.get(key) == row[key]:
                return f"{row[key]:,}"
            return f"{row[key]:,} ({row[key] - old.get(key, 0):+,})"

        rate = f"{row['mhz_median']} ({row['mhz_spread']})" if "mhz" in row else ""
        per_element = ""
        if row["design"] in ("array", "array+lanes"):
            per_element = f"{row['LUT'] / (row['rows'] * row['columns']):.1f}"
        lines.append(f"| {row['design']} | {row['core']} | {row['device']} | "
                     + " | ".join(cell(group) for group in GROUPS) + f" | {per_element} | {rate} |")
    return "\n".join(lines) + "\n"


def read_baseline() -> list[dict]:
    return json.loads(BASELINE.read_text()) if BASELINE.is_file() else []


def main(options, config: CoreConfig) -> int:
    """The command: every design on every device that the options name."""
    results = []
    for device in options.device or ["ecp5"]:
        for design in options.design or ["array", "array+lanes", "core"]:
            seeds = range(1, options.seeds + 1)
            results.append(run(design, config, device, options.out, seeds=seeds, route=not options.no_route,
                               placer=options.placer, router=options.router, refinements=options.refinements,
                               floorplans=options.floorplans, sites=options.sites, jobs=options.jobs,
                               log=lambda line: print(line, file=sys.stderr, flush=True)))
            (options.out / f"{config.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    baseline = read_baseline()
    print(table(results, baseline), end="")
    if options.keep:
        new = {(row["design"], row["core"], row["device"]): row for row in [*baseline, *results]}
        BASELINE.write_text(json.dumps([new[key] for key in sorted(new)], indent=1) + "\n")
    return 0
