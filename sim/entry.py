"""The one cocotb test: it serves the scenario that `session.simulate` asked for."""

import cocotb

from .session import serve


@cocotb.test()
async def scenario(dut):
    await serve(dut)
