"""Scenarios that run inside the simulation of the core: programs that go wrong, and what follows."""

from hw.register_map import offset
from sim.scenario import RESET, START


async def errors(session, programs, window):
    """Rings the doorbell for each (program address, window limit) and resets after an error; returns what the
    registers say each time."""
    await session.reset()
    await session.write_register(offset("IRQ_ENABLE"), 3)
    results = []
    for address, limit in programs:
        await session.write_register(offset("WINDOW_BASE"), window[0])
        await session.write_register(offset("WINDOW_LIMIT"), limit)
        await session.write_register(offset("PROGRAM"), address)
        await session.ring(offset("CONTROL"), START)
        await session.run_until_interrupt(200_000)
        names = ("STATUS", "ERROR_CODE", "ERROR_DESCRIPTOR", "ERROR_ADDRESS")
        results.append({name: await session.read_register(offset(name)) for name in names})
        await session.write_register(offset("CONTROL"), RESET)
        for _ in range(1000):
            if await session.read_register(offset("STATUS")) & 8:
                break
        await session.cycles(4)
    return results
