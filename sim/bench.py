"""Speed of the co-simulation, side by side: `python -m sim.bench --core base --out build/bench`.

A training run is recorded, then the same doorbells are replayed in alternation by
  bare       the C++ loop without VPI: the speed of the model itself
  cocotb     our loop under cocotb, Python asleep between doorbells
  digests    the same, with the trained state of every step compared with golden by its digest (in a second process)
  compared   the same, with every required tensor of every step compared with golden (in a second process)
  stock      cocotb's own runner: public signals, clock in Python, cocotbext-axi memory (a part of the first doorbell)
Amaranth's simulator clocks the idle core, and `array` is a C++ loop around the array alone, with random operands.
Results are cycles per second from the first clock edge, of wall time and of processor time of the simulating process;
the latter also holds on a machine that is busy with other things.
What comparing adds is measured until the last step is compared, in wall time and in processor time of all processes.

`--table` measures nothing: it prints one table of what this and `python -m golden bench` and `python -m gpu bench` left
in the folder.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from amaranth.back import verilog as amaranth_verilog

import golden.train
from golden import data as data_module
from golden.errors import InputError
from hw import config as core_config
from hw.register_map import offset
from hw.synthesis import DESIGNS

from . import verilator
from .doorbells import generated_verilog
from .scenario import START
from .session import ROOT, _clean_environment, simulate
from .shared import MemorySettings, RunFolder, SimulationError
from .train import train

SETTINGS = MemorySettings(latency=100, outstanding=64)
LIMIT = 1 << 40
STOCK_SECONDS = 20
IDLE_CYCLES = 300
ARRAY_CYCLES = 500_000
NAMES = ("array", "bare", "cocotb", "digests", "compared", "stock", "amaranth")
COMPARED = {"digests": "digests", "compared": "full"}


def replay_script(plan, seed, memory_bytes):
    """The bare loop's script for the doorbells in `plan` (see `scenario.run`)."""
    registers = {"WINDOW_BASE": 0, "WINDOW_LIMIT": memory_bytes, "SEED": seed, "IRQ_ENABLE": 3}
    lines = ["reset 4", *(f"write {offset(name)} {value}" for name, value in registers.items())]
    for doorbell in plan:
        lines += [f"load {address} {start} {size}" for _, address, start, size in doorbell["writes"]]
        for name, value in (("PROGRAM", doorbell["program"]), ("STEP", doorbell["step"]), ("CONTROL", START)):
            lines.append(f"write {offset(name)} {value}")
        lines += [f"interrupt {LIMIT}", f"read {offset('STATUS')}", f"write {offset('IRQ_STATUS')} 3"]
    return "\n".join([*lines, ""])


def run_bare(build, run, seed):
    """Replay the doorbells of folder `run` in the bare loop; returns (cycles, wall seconds, processor seconds, digest
    of the final memory)."""
    plan = json.loads((run / "doorbells.json").read_text())
    with RunFolder.create(SETTINGS) as folder:
        script = folder.path / "script"
        script.write_text(replay_script(plan, seed, SETTINGS.size))
        command = [build.executable, script, run / "doorbells.bin"]
        done = subprocess.run(command, env=_clean_environment(folder), capture_output=True, text=True)
        if done.returncode:
            raise SimulationError(f"the bare loop failed: {done.stderr.strip()}")
        block = folder.control
        return block.cycle, block.wall_nanoseconds / 1e9, block.cpu_nanoseconds / 1e9, folder.memory.digest()


def run_cocotb(build, run, seed, counters):
    """The same under cocotb without comparing; returns the same and the processor seconds of this process."""
    digests, processor = [], time.process_time()
    parameters = {"folder": str(run), "window": [0, SETTINGS.size], "limit": LIMIT, "seed": seed, "counters": counters}
    result = simulate(
        build,
        "sim.scenario:run",
        parameters,
        out=run / "cocotb",
        settings=SETTINGS,
        keep=lambda memory: digests.append(memory.digest()),
    )
    own = time.process_time() - processor
    return result.cycles, result.clocked_seconds, result.cpu_seconds, digests[0], own


def run_stock(verilog, run, seed):
    """cocotb's own way for STOCK_SECONDS of the first doorbell; returns (cycles, wall, processor seconds)."""
    tool = verilator.find_verilator()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "intrain.v").write_text(verilog)
        environment = {
            **tool.environment,
            "PYTHONPATH": str(ROOT),
            "MAKEFLAGS": "CFG_CXXFLAGS_PCH_I=-include CFG_CXXFLAGS_STD=-std=gnu++17 CFG_LDLIBS_THREADS=-pthread "
            "OPT_FAST=-O3 OPT_SLOW=-O0",
            "INTRAIN_STOCK": json.dumps(
                {"run": str(run), "seed": seed, "seconds": STOCK_SECONDS, "size": SETTINGS.size}
            ),
        }
        log = Path(folder) / "log"
        with open(log, "w") as file:
            code = subprocess.run(
                [sys.executable, "-m", "sim.stock"], cwd=folder, env=environment, stdout=file, stderr=file
            ).returncode
        result = Path(folder) / "result.json"
        if not result.exists():
            last = log.read_text().strip().splitlines()[-1:]
            raise SimulationError(f"cocotb's stock runner failed (exit code {code}): {' '.join(last)}")
        answer = json.loads(result.read_text())
        return answer["cycles"], answer["seconds"], answer["processor_seconds"]


def run_array(build, config):
    """The array alone; returns (cycles, wall, processor seconds)."""
    size = max(config.rows, config.columns)
    done = subprocess.run([build.executable, str(ARRAY_CYCLES), str(size)], capture_output=True, text=True)
    if done.returncode:
        raise SimulationError(f"the loop around the array failed: {done.stderr.strip()}")
    cycles, wall, processor = done.stdout.split()
    return int(cycles), float(wall), float(processor)


def run_amaranth(config):
    """Amaranth's simulator on the idle core; returns (cycles, wall, processor seconds)."""
    from amaranth.sim import Simulator

    from hw.core import Core

    simulator = Simulator(Core(config))
    simulator.add_clock(1e-8)

    async def wait(context):
        await context.tick().repeat(IDLE_CYCLES)

    simulator.add_testbench(wait)
    start, processor = time.monotonic(), time.process_time()
    simulator.run()
    return IDLE_CYCLES, time.monotonic() - start, time.process_time() - processor


def _rates(cycles, wall, processor):
    return cycles / wall, cycles / processor


def bench(core, steps, repeats, out, log=print):
    """Measure everything; returns the table as {name: {cycles_per_second, of_bare, ...}} with the facts beside it."""
    from hw.core import COUNTERS

    out.mkdir(parents=True, exist_ok=True)
    config = core_config.load(core)
    dataset = data_module.load("digits", None)
    verilog = generated_verilog(config)
    builds = {flavour: verilator.build(verilog, flavour=flavour, log=log) for flavour in ("bare", "fast")}
    array = amaranth_verilog.convert(DESIGNS["array"](config), name="array")
    builds["array"] = verilator.build(array, top="array", flavour="bare", program="array_loop.cpp", log=log)
    measured = {name: [] for name in NAMES}
    spent = {name: [] for name in ("cocotb", *COMPARED)}      # (wall, all processors' seconds) per cycle
    exact = True
    for number in range(repeats):
        for name, compare in COMPARED.items():
            network = golden.train.build("niti", "mlp", 1, data="digits", batch=32)
            summary = train(config, network, dataset, steps, out / name, compare=compare, floating=False,
                            test_images=0, log=log)
            timing = summary["timing"]
            cycles = timing["simulated_cycles"]
            measured[name].append(_rates(cycles, timing["simulating_seconds"], timing["simulating_processor_seconds"]))
            spent[name].append((max(timing["simulating_seconds"], timing["comparing_seconds"]) / cycles,
                                (timing["simulating_processor_seconds"] + timing["comparing_processor_seconds"])
                                / cycles))
            exact = exact and summary["bit_exact"]
        run = (out / "compared" / "run").resolve()
        *bare, bare_memory = run_bare(builds["bare"], run, 1)
        *ours, memory, own = run_cocotb(builds["fast"], run, 1, len(COUNTERS))
        exact = exact and memory == bare_memory
        measured["bare"].append(_rates(*bare))
        measured["array"].append(_rates(*run_array(builds["array"], config)))
        measured["cocotb"].append(_rates(*ours))
        spent["cocotb"].append((ours[1] / ours[0], (ours[2] + own) / ours[0]))
        log(f"round {number + 1} of {repeats} done")
    measured["stock"].append(_rates(*run_stock(verilog, run, 1)))
    measured["amaranth"].append(_rates(*run_amaranth(config)))
    wall, processor = (
        {name: statistics.median(pair[kind] for pair in measured[name]) for name in NAMES} for kind in (0, 1)
    )
    median = {name: [statistics.median(pair[kind] for pair in pairs) for kind in (0, 1)]
              for name, pairs in spent.items()}
    adds = {name: {kind: round(median[name][number] / median["cocotb"][number] - 1, 4)
                   for number, kind in enumerate(("wall", "processor"))} for name in COMPARED}
    table = {
        name: {
            "cycles_per_second": round(wall[name]),
            "of_bare": round(wall[name] / wall["bare"], 5),
            "over_stock": round(wall[name] / wall["stock"], 2),
            "cycles_per_processor_second": round(processor[name]),
            "of_bare_processor": round(processor[name] / processor["bare"], 5),
            "over_stock_processor": round(processor[name] / processor["stock"], 2),
            "rounds": [[round(rate) for rate in pair] for pair in measured[name]],
        }
        for name in NAMES
    }
    return {
        "core": dataclasses.asdict(config),
        "steps": steps,
        "cycles": ours[0],
        "tensors_compared": summary["tensors_compared"],
        "same_memory_and_tensors": exact,
        "processors": os.cpu_count(),
        "build_seconds": {flavour: build.seconds for flavour, build in builds.items()},
        "speed": table,
        "comparing_adds": adds,
    }


def overview(out):
    """Rows (what, measured, unit, beside its references) of all benchmark results in a folder."""
    rows = []

    def add(what, value, unit, references):
        beside = ", ".join(f"{share:.3g} of {name}" for name, share in references.items())
        rows.append((what, f"{value:,.0f}" if value >= 100 else f"{value:.3g}", unit, beside))

    def load(name):
        try:
            return json.loads((out / name).read_text())
        except FileNotFoundError:
            rows.append((name, "-", "", "not measured"))
        except ValueError:
            rows.append((name, "-", "", "damaged: delete it and measure again"))

    cosim = load("cosim.json")
    if cosim:
        core = cosim["core"]["name"]
        for name, row in cosim["speed"].items():
            add(f"simulation of {core}: {name}", row["cycles_per_processor_second"], "cycles/processor s",
                {"bare": row["of_bare_processor"], "stock": row["over_stock_processor"]})
        for name, row in cosim["comparing_adds"].items():
            rows.append((f"comparing ({COMPARED[name]}) adds", f"{100 * row['wall']:.1f} %", "wall time",
                         f"{100 * row['processor']:.1f} % processor time"))
    for name, row in (load("golden.json") or {}).items():
        torch = (json.loads((out / "golden.json").read_text()).get("torch float32") or {}).get("images_per_second")
        add(f"lenet: {name}", row["images_per_second"], "images/s",
            {"torch float32": row["images_per_second"] / torch} if torch and name != "torch float32" else {})
    for name, row in (load("gpu.json") or {"pieces": {}})["pieces"].items():
        if "failed" in row:
            rows.append((name, "-", "", row["failed"]))
            continue
        ours = row["rates"]["ours"]
        add(name, ours, row["unit"], {other: ours / rate for other, rate in row["rates"].items() if other != "ours"})
    return rows


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m sim.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--core", default="base")
    parser.add_argument("--steps", type=int, default=180, help="training steps of one round (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("build/bench"))
    parser.add_argument("--table", action="store_true", help="only print the table of all results in the folder")
    options = parser.parse_args(arguments)
    if options.table:
        for what, value, unit, beside in overview(options.out):
            print(f"{what:48} {value:>12} {unit:20} {beside}".rstrip())
        return 0
    try:
        result = bench(options.core, options.steps, options.repeats, options.out)
    except (InputError, core_config.ConfigError, SimulationError, verilator.BuildError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (options.out / "cosim.json").write_text(json.dumps(result, indent=1) + "\n")
    names = ("of bare", "x stock")
    print(" " * 10, *(f"{name:>16}" for name in ("cycles/s", *names, "cycles/cpu s", *names)))
    for name, row in result["speed"].items():
        cells = [f"{row['cycles_per_second']:,}", f"{row['of_bare']:.3f}", f"{row['over_stock']:.1f}"]
        cells += [f"{row['cycles_per_processor_second']:,}", f"{row['of_bare_processor']:.3f}"]
        print(f"{name:10}", *(f"{cell:>16}" for cell in [*cells, f"{row['over_stock_processor']:.1f}"]))
    for name, row in result["comparing_adds"].items():
        print(f"comparing ({COMPARED[name]}) adds {100 * row['wall']:.1f} % of wall time and "
              f"{100 * row['processor']:.1f} % of processor time")
    print(f"{result['cycles']:,} cycles, {result['tensors_compared']:,} tensors: {options.out / 'cosim.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
