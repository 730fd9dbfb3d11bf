"""Scenarios that run inside the simulation of `copy_top`."""

from hw.register_map import offset


def settings(source, target, lines, limit):
    """Register writes for one copy of ``lines`` lines (even)."""
    return {"PROGRAM": source, "STEP": target, "SEED": lines // 2, "WINDOW_BASE": 0x1000, "WINDOW_LIMIT": limit,
            "IRQ_ENABLE": 3}


async def _status(session):
    names = ("STATUS", "ERROR_CODE", "ERROR_ADDRESS", "CYCLES", "IRQ_STATUS")
    return {name: await session.read_register(offset(name)) for name in names}


async def copy(session, source, target, lines, limit, reset_after=()):
    """Copies once, after resetting the core in the middle ``reset_after`` cycles after earlier starts."""
    await session.reset()
    for name, value in settings(source, target, lines, limit).items():
        await session.write_register(offset(name), value)
    for cycles in reset_after:
        await session.write_register(offset("CONTROL"), 1)
        await session.cycles(cycles)
        await session.write_register(offset("CONTROL"), 2)
        while not await session.read_register(offset("STATUS")) & 8:
            pass
    await session.write_register(offset("CONTROL"), 1)
    await session.run_until_interrupt(100_000)
    result = await _status(session)
    await session.write_register(offset("IRQ_STATUS"), 3)
    await session.cycles(3)
    assert not int(session.dut.irq.value)
    return result


async def fail_and_recover(session, source, target, lines, limit, good_limit):
    """A copy that runs into an error, then one that does not."""
    first = await copy(session, source, target, lines, limit)
    await session.write_register(offset("CONTROL"), 2)
    session.control.error_bytes = 0
    await session.write_register(offset("WINDOW_LIMIT"), good_limit)
    await session.write_register(offset("CONTROL"), 1)
    await session.run_until_interrupt(100_000)
    return first, await _status(session)


async def with_cocotbext(session, source, target, lines, data, seed, pause):
    """The ports between cocotbext-axi's RAM and AXI-Lite master, every channel with random pauses."""
    import logging
    import random

    from cocotb.triggers import RisingEdge
    from cocotbext.axi import AxiBus, AxiLiteBus, AxiLiteMaster, AxiRam, AxiResp

    dut = session.dut
    logging.getLogger("cocotb").setLevel(logging.WARNING)
    registers = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "s_axi"), dut.clk, dut.rst)
    memory = AxiRam(AxiBus.from_prefix(dut, "m_axi"), dut.clk, dut.rst, size=1 << 20)
    draw = random.Random(seed)

    def pauses():
        while True:
            yield draw.random() < pause

    for interface in (memory, registers):
        for channel in (interface.write_if.aw_channel, interface.write_if.w_channel, interface.write_if.b_channel,
                        interface.read_if.ar_channel, interface.read_if.r_channel):
            channel.set_pause_generator(pauses())
    dut.rst.value = 1
    await session.cycles(5)
    dut.rst.value = 0
    await session.cycles(5)
    memory.write(source, bytes(data))

    refused = []
    for address in (0x01C, 0x07C, 0xFFC):
        refused.append((await registers.read(address, 4)).resp == AxiResp.SLVERR)
        refused.append((await registers.write(address, b"\xff" * 4)).resp == AxiResp.SLVERR)
    await registers.write(offset("PROGRAM"), b"\x11\x22\x33\x44")
    await registers.write(offset("PROGRAM") + 1, b"\xaa")         # one byte: a partial strobe
    strobed = await registers.read_dword(offset("PROGRAM"))
    for name, value in settings(source, target, lines, 1 << 20).items():
        await registers.write_dword(offset(name), value)
        assert await registers.read_dword(offset(name)) == value
    await registers.write_dword(offset("CONTROL"), 1)
    busy = await registers.write(offset("SEED"), b"\x01\x00\x00\x00")
    if not int(dut.irq.value):
        await RisingEdge(dut.irq)
    return {"refused": refused, "strobed": strobed, "busy_refused": busy.resp == AxiResp.SLVERR,
            "equal": memory.read(target, len(data)) == bytes(data),
            "status": await registers.read_dword(offset("STATUS")),
            "irq_status": await registers.read_dword(offset("IRQ_STATUS"))}
