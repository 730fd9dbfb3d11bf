"""The benchmark's reference: the core under cocotb's unchanged Verilator runner and cocotbext-axi.

`python -m sim.stock` builds `intrain.v` of the current folder and runs the test below; what to do comes as JSON in
INTRAIN_STOCK, what it measured goes to result.json.
"""

import json
import logging
import os
import time
from pathlib import Path

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, First, RisingEdge
from cocotb.utils import get_sim_time

from hw.register_map import offset

from .scenario import START

SLICE = 2000
"""Cycles between two looks at the wall clock."""


@cocotb.test()
async def doorbell(dut):
    from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiRam

    logging.getLogger("cocotb.intrain").setLevel(logging.WARNING)  # a line per burst would cost more than the burst
    request = json.loads(os.environ["INTRAIN_STOCK"])
    run = Path(request["run"])
    first = json.loads((run / "doorbells.json").read_text())[0]
    data = (run / "doorbells.bin").read_bytes()
    Clock(dut.clk, 2, "ns").start()
    registers = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axi"), dut.clk, dut.rst)
    memory = AxiRam(AxiBus.from_prefix(dut, "m_axi"), dut.clk, dut.rst, size=request["size"])
    dut.rst.value = 1
    await ClockCycles(dut.clk, 4)
    dut.rst.value = 0
    await ClockCycles(dut.clk, 4)
    for _, address, start, size in first["writes"]:
        memory.write(address, data[start : start + size])
    values = {"WINDOW_BASE": 0, "WINDOW_LIMIT": request["size"], "SEED": request["seed"], "IRQ_ENABLE": 3}
    values |= {"PROGRAM": first["program"], "STEP": first["step"], "CONTROL": START}
    for name, value in values.items():
        await registers.write_dword(offset(name), value)
    begin, processor, since = time.monotonic(), time.process_time(), get_sim_time("ns")
    while time.monotonic() - begin < request["seconds"] and not int(dut.irq.value):
        await First(ClockCycles(dut.clk, SLICE), RisingEdge(dut.irq))
    cycles = (get_sim_time("ns") - since) / 2
    measured = {"seconds": time.monotonic() - begin, "processor_seconds": time.process_time() - processor}
    Path("result.json").write_text(json.dumps({"cycles": cycles, **measured}))


def main():
    from cocotb_tools.runner import get_runner

    runner = get_runner("verilator")
    flags = ["-Wno-fatal", "--x-assign", "fast", "--x-initial", "fast", "--noassert"]
    runner.build(sources=["intrain.v"], hdl_toplevel="intrain", build_args=flags, timescale=("1ns", "1ns"))
    runner.test(test_module="sim.stock", hdl_toplevel="intrain", hdl_toplevel_lang="verilog", test_dir=".")


if __name__ == "__main__":
    main()
