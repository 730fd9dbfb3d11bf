"""Scenarios that run inside the simulation of the copier."""

import copier
from sim.shared import SimulationError


async def copy(session, source, target, beats, blocks, step, limit=100_000, doorbells=1, check_registers=False):
    """Ring the doorbell `doorbells` times; returns cycles per doorbell and the final status."""
    await session.reset()
    settings = {copier.SOURCE: source, copier.TARGET: target, copier.BEATS: beats, copier.BLOCKS: blocks,
                copier.STEP: step}
    for register, value in settings.items():
        await session.write_register(register, value)
    if check_registers:
        for register, value in settings.items():
            assert await session.read_register(register) == value
    cycles = []
    for doorbell in range(doorbells):
        if session.stopping:
            break
        if doorbell:
            session.memory.write("batch", source, bytes([doorbell]) * 16)
        await session.ring(copier.DOORBELL)
        cycles.append(await session.run_until_interrupt(limit))
        status = await session.read_register(copier.STATUS)
        await session.write_register(copier.STATUS, 0)
        await session.cycles(2)
        assert not int(session.dut.irq.value)
    return {"cycles": cycles, "status": status}


async def fail(session, kind):
    await session.reset()
    if kind == "simulation":
        raise SimulationError("made to fail")
    if kind == "exit":
        import os
        os._exit(3)
    return 1 / 0


async def idle(session, cycles):
    """Sleep for a fixed number of cycles: the timer must wake Python at the right one."""
    await session.reset()
    before = session.cycle
    try:
        await session.run_until_interrupt(cycles)
    except SimulationError as error:
        return {"passed": session.cycle - before, "error": str(error)}
