"""What cocotb does in the four-state run: one doorbell, with every port watched for unknown bits (test_power_up)."""

import json
import logging
import os
from pathlib import Path

import cocotb
from cocotb.clock import Clock
from cocotb.handle import HierarchyArrayObject, HierarchyObject, LogicArrayObject, LogicObject
from cocotb.triggers import ClockCycles, ReadOnly, RisingEdge
from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiRam

from hw.register_map import offset

CONTROL = ("s_axi_awready", "s_axi_wready", "s_axi_bvalid", "s_axi_arready", "s_axi_rvalid", "m_axi_awvalid",
           "m_axi_wvalid", "m_axi_bready", "m_axi_arvalid", "m_axi_rready", "irq", "trace_product", "trace_vector")
PAYLOAD = {"s_axi_bvalid": ("s_axi_bresp",), "s_axi_rvalid": ("s_axi_rdata", "s_axi_rresp"),
           **{f"m_axi_{a}valid": tuple(f"m_axi_{a}{field}" for field in ("id", "addr", "len", "size", "burst"))
              for a in ("aw", "ar")}, "m_axi_wvalid": ("m_axi_wstrb", "m_axi_wlast")}


def _unknown(handle):
    return not handle.value.is_resolvable


async def _watch(dut, found):
    """Notes every port with an unknown bit that matters: control always, payload with its valid. Of the write data it
    notes the addresses of unknown bytes whose strobe is high."""
    bursts, beats = [], []
    beat_bytes = len(dut.m_axi_wstrb)
    while True:
        await RisingEdge(dut.clk)
        await ReadOnly()
        found["cycles"] += 1
        bad = [name for name in CONTROL if _unknown(getattr(dut, name))]
        for valid, names in PAYLOAD.items():
            if str(getattr(dut, valid).value) == "1":
                bad += [name for name in names if _unknown(getattr(dut, name))]
        for name in bad:
            found["ports"].setdefault(name, found["cycles"])
        taken = {channel: str(getattr(dut, f"m_axi_{channel}valid").value) == "1"
                 and str(getattr(dut, f"m_axi_{channel}ready").value) == "1" for channel in ("aw", "w")}
        if taken["aw"]:
            address = int(dut.m_axi_awaddr.value)
            bursts += [address + k * beat_bytes for k in range(int(dut.m_axi_awlen.value) + 1)]
        if taken["w"]:
            data, strobes = str(dut.m_axi_wdata.value), str(dut.m_axi_wstrb.value)
            beats.append([beat_bytes - 1 - k for k, strobe in enumerate(strobes)
                          if strobe == "1" and set(data[8 * k:8 * k + 8]) - {"0", "1"}])
        found["unknown_bytes"] = [address + k for address, unknown in zip(bursts, beats, strict=False) for k in unknown]


def _unknown_signals(handle):
    """Paths of all signals below a module that have an unknown bit; memories are not looked into."""
    for part in handle:
        if isinstance(part, (LogicObject, LogicArrayObject)):
            if _unknown(part):
                yield part._path
        elif isinstance(part, HierarchyObject) and not isinstance(part, HierarchyArrayObject):
            yield from _unknown_signals(part)


@cocotb.test()
async def doorbell(dut):
    folder = Path(os.environ["POWER_UP_FOLDER"])
    request = json.loads((folder / "power_up.json").read_text())
    (entry,) = json.loads((folder / "doorbells.json").read_text())
    data = (folder / "doorbells.bin").read_bytes()
    logging.getLogger("cocotb").setLevel(logging.WARNING)
    dut.rst.value = 1
    Clock(dut.clk, 2, unit="ns").start()
    registers = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axi"), dut.clk, dut.rst)
    memory = AxiRam(AxiBus.from_prefix(dut, "m_axi"), dut.clk, dut.rst, size=request["bytes"])
    await ClockCycles(dut.clk, 3)
    dut.rst.value = 0
    await ClockCycles(dut.clk, 2)
    found = {"cycles": 0, "ports": {}}
    cocotb.start_soon(_watch(dut, found))
    await ClockCycles(dut.clk, 20)
    await ReadOnly()
    found["signals"] = sorted(_unknown_signals(dut))
    await RisingEdge(dut.clk)
    for _name, address, start, size in entry["writes"]:
        memory.write(address, data[start:start + size])
    for name, value in (("WINDOW_BASE", 0), ("WINDOW_LIMIT", request["bytes"]), ("SEED", request["seed"]),
                        ("IRQ_ENABLE", 3), ("PROGRAM", entry["program"]), ("STEP", entry["step"]), ("CONTROL", 1)):
        await registers.write_dword(offset(name), value)
    await RisingEdge(dut.irq)
    found["status"] = await registers.read_dword(offset("STATUS"))
    (folder / "memory.bin").write_bytes(memory.read(0, request["bytes"]))
    (folder / "found.json").write_text(json.dumps(found))
