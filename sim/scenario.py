"""What cocotb does during a training run: write a batch, ring the doorbell, sleep, check the status."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from hw.errors import ErrorCode
from hw.register_map import offset

from .shared import SimulationError

START, RESET = 1, 2
BUSY, DONE, ERROR, ZERO = 1, 2, 4, 16


async def run(session, *, folder, window, limit, seed, counters):
    """Runs the doorbells listed in ``folder``/doorbells.json.

    Each is {"program": address, "step": first step, "writes": [[name, address, offset, size], ...]} with data in
    ``folder``/doorbells.bin. Between doorbells nothing else is written. Returns per doorbell the cycles, the counters
    and "zero", whether a tensor was all zero where the method needs its maximum, and leaves them as a line each in
    ``folder``/records.jsonl, with "activity", the rows (engine, tag, activity, cycles) of its cycles, "host_writes",
    and the "beats" of data read and written.
    """
    folder = Path(folder)
    data = np.memmap(folder / "doorbells.bin", np.uint8, "r")
    activity = np.zeros(session.folder.activity.shape, np.int64)
    logged, beats = 0, np.zeros(2, np.int64)
    await session.reset()
    await session.write_register(offset("WINDOW_BASE"), window[0])
    await session.write_register(offset("WINDOW_LIMIT"), window[1])
    await session.write_register(offset("SEED"), seed)
    await session.write_register(offset("IRQ_ENABLE"), 3)
    results = []
    for doorbell in json.loads((folder / "doorbells.json").read_text()):
        if session.stopping:
            break
        written = []
        for name, address, start, size in doorbell["writes"]:
            piece = data[start:start + size].tobytes()
            session.memory.write(name, address, piece)
            written.append((name, address, hashlib.sha256(piece).digest(), size))
        await session.write_register(offset("PROGRAM"), doorbell["program"])
        await session.write_register(offset("STEP"), doorbell["step"])
        await session.ring(offset("CONTROL"), START)
        await session.run_until_interrupt(limit)
        zero = bool(await check_status(session) & ZERO)
        await session.write_register(offset("IRQ_STATUS"), 3)
        # The core must leave its inputs alone.
        for name, address, digest, size in written:
            if name in doorbell["inputs"] and hashlib.sha256(session.memory.read(address, size)).digest() != digest:
                raise SimulationError(f"the core changed its input {name!r} at {address:#x}")
        cycles = await session.read_register(offset("CYCLES")) | (
            await session.read_register(offset("CYCLES_HIGH")) << 32)
        values = []
        for index in range(counters):
            await session.write_register(offset("COUNTER_SELECT"), index)
            low = await session.read_register(offset("COUNTER_VALUE"))
            values.append(low | await session.read_register(offset("COUNTER_VALUE_HIGH")) << 32)
        results.append({"cycles": cycles, "counters": values, "zero": zero})
        now = session.folder.activity.astype(np.int64)
        spent, activity = now - activity, now
        rows = np.column_stack([np.argwhere(spent), spent[spent != 0]]).tolist()
        writes = [dataclasses.asdict(entry) for entry in session.memory.log[logged:]]
        logged = len(session.memory.log)
        before, beats = beats, np.array([session.control.read_beats, session.control.write_beats])
        with (folder / "records.jsonl").open("a") as file:
            file.write(json.dumps({**results[-1], "activity": rows, "host_writes": writes,
                                   "beats": (beats - before).tolist()}) + "\n")
    return results


async def products(session, *, programs, window, limit):
    """Runs each program once. Returns for each the cycle in which the product engine first held a descriptor and the
    cycle of the last data beat, which is the last result's."""
    await session.reset()
    await session.write_register(offset("WINDOW_BASE"), window[0])
    await session.write_register(offset("WINDOW_LIMIT"), window[1])
    await session.write_register(offset("IRQ_ENABLE"), 3)
    results = []
    for program in programs:
        await session.write_register(offset("PROGRAM"), program)
        await session.ring(offset("CONTROL"), START)
        for _ in range(limit):
            if int(session.dut.trace_product.value) or int(session.dut.irq.value):
                break
            await session.cycles(1)
        first = session.cycle
        await session.run_until_interrupt(limit)
        await check_status(session)
        await session.write_register(offset("IRQ_STATUS"), 3)
        results.append((first, session.control.last_beat))
    return results


async def check_status(session):
    """STATUS; raises with the core's own reason if the doorbell ended in an error."""
    status = await session.read_register(offset("STATUS"))
    if status & ERROR:
        code = await session.read_register(offset("ERROR_CODE"))
        descriptor = await session.read_register(offset("ERROR_DESCRIPTOR"))
        address = await session.read_register(offset("ERROR_ADDRESS"))
        error = ErrorCode(code)
        raise SimulationError(f"the core stopped with {error.name} ({error.doc}); descriptor at {descriptor:#x}, "
                              f"address {address:#x}")
    if not status & DONE or status & BUSY:
        raise SimulationError(f"the core raised its interrupt but its status is {status:#x}")
    return status
