"""Scenarios that run inside the simulation of the copier."""

from sim.shared import SimulationError

SOURCE, TARGET, BEATS, BLOCKS, STEP, DOORBELL, STATUS, MODE = range(0, 32, 4)
"""Registers of the copier; here because importing Amaranth would slow every simulation's start."""
MODES = ("crosses", "eager", "drops", "last", "changes")
"""Bits of MODE: cross 4 KB boundaries, ignore write responses, drop a waiting read request, mark the second beat
of a burst as last, change a waiting write beat."""


async def copy(
    session, source, target, beats, blocks, step, limit=100_000, doorbells=1, check_registers=False, broken=None
):
    """Ring the doorbell `doorbells` times; returns cycles per doorbell and the final status."""
    await session.reset()
    settings = {
        SOURCE: source,
        TARGET: target,
        BEATS: beats,
        BLOCKS: blocks,
        STEP: step,
        MODE: 1 << MODES.index(broken) if broken else 0,
    }
    for register, value in settings.items():
        await session.write_register(register, value)
    if check_registers:
        for register, value in settings.items():
            assert await session.read_register(register) == (0 if register == MODE else value)
    cycles = []
    for doorbell in range(doorbells):
        if session.stopping:
            break
        if doorbell:
            session.memory.write("batch", source, bytes([doorbell % 256]) * 16)
        await session.ring(DOORBELL)
        cycles.append(await session.run_until_interrupt(limit))
        status = await session.read_register(STATUS)
        await session.write_register(STATUS, 0)
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


async def with_cocotbext(session, source, target, step, data):
    """The copier between cocotbext-axi's RAM and AXI-Lite master, both with random pauses."""
    import logging
    import random

    from cocotb.triggers import RisingEdge
    from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiRam

    dut = session.dut
    logging.getLogger("cocotb").setLevel(logging.WARNING)
    registers = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axi"), dut.clk, dut.rst)
    memory = AxiRam(AxiBus.from_prefix(dut, "m_axi"), dut.clk, dut.rst, size=1 << 16)
    draw = random.Random(3)

    def pauses():
        while True:
            yield draw.random() < 0.3

    for channel in (
        memory.write_if.aw_channel,
        memory.write_if.w_channel,
        memory.write_if.b_channel,
        memory.read_if.ar_channel,
        memory.read_if.r_channel,
    ):
        channel.set_pause_generator(pauses())
    dut.rst.value = 1
    await session.cycles(5)
    dut.rst.value = 0
    await session.cycles(5)
    memory.write(source, bytes(data))
    beats = len(data) // 16 // 2
    for register, value in (
        (SOURCE, source),
        (TARGET, target),
        (BEATS, beats),
        (BLOCKS, 2),
        (STEP, step),
        (DOORBELL, 1),
    ):
        await registers.write_dword(register, value)
    if not int(dut.irq.value):
        await RisingEdge(dut.irq)
    return {
        "equal": memory.read(target, len(data)) == bytes(data),
        "status": await registers.read_dword(STATUS),
        "step": int.from_bytes(memory.read(step, 4), "little"),
    }
