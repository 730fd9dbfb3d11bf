"""Cycles of whole training steps by layer and pass, measured on the simulated core and checked bit for bit.

The same as the first steps of `python -m sim train`, without the inference and the files around it: for benchmarks and
for comparing with the estimate.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hw.config import CoreConfig
from hw.core import COUNTERS
from hw.scalar import STEP

from . import compiler, verilator
from .checker import Checker
from .doorbells import Plan, generated_verilog, training_doorbells
from .session import simulate
from .shared import MemorySettings, SnapshotPlan
from .train import SETTINGS, cycle_rows

__all__ = ["measure_steps"]


def measure_steps(config: CoreConfig, network, dataset, steps: int, *, out: Path,
                  settings: MemorySettings | None = None, build=None, log=None) -> dict:
    """Train ``network`` (golden's, fresh) for ``steps`` steps of one doorbell; every tensor is compared.

    Returns ``cycles`` (doorbell to the end, all steps), ``share`` of peak, ``rows`` as in cycles.json, ``compiled``.
    """
    doorbell = next(training_doorbells(network, dataset, steps, steps))
    compiled = compiler.compile_training(config, network, batch=network.batch, capacity=steps, steps=steps,
                                         rate=doorbell.rate)
    plan = Plan(Path(out) / "run")
    plan.add(compiled, doorbell, network, compiled.state(network.state))
    plan.close()
    checker = Checker(compiled, network, intermediates=True)
    settings = dataclasses.replace(settings or SETTINGS,
                                   size=max(4096, compiled.memory_bytes))
    build = build or verilator.build(generated_verilog(config), log=log)
    batches = iter(doorbell.batches)
    result = simulate(
        build, "sim.scenario:run",
        {"folder": str((Path(out) / "run").resolve()), "window": [0, settings.size], "limit": 1 << 40,
         "seed": network.seed, "counters": len(COUNTERS)},
        out=out, settings=settings, consumer=lambda snapshot: checker.step(snapshot, *next(batches)),
        plan=SnapshotPlan(compiled.dump.address + 4 * STEP, checker.regions, slots=4, blocks=True))
    cycles = result.value[0]["cycles"]
    rows = cycle_rows(compiled, result.activity, steps)
    macs = network.description.training_macs(network.batch) * steps
    return {"cycles": cycles, "share": macs / (cycles * config.rows * config.columns), "macs": macs, "rows": rows,
            "compiled": compiled, "compared": checker.compared}
