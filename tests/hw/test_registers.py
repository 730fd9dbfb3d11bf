"""Registers over AXI4-Lite, the life cycle of a run, and what is generated from the map."""

import json
import random
import shutil
import subprocess

import pytest

from hw import register_map
from hw.axi import Response
from hw.config import PRESETS
from hw.errors import ErrorCode
from hw.register_map import REGISTERS, Access, offset
from hw.registers import Registers
from tests.hw.streams import simulate

SMALL = PRESETS["small"]
DONE, ERROR = 1, 2
BUSY_BIT, DONE_BIT, ERROR_BIT, IDLE_BIT, ZERO_BIT = 1, 2, 4, 8, 16


class Host:
    """Bus accesses with gaps between the channels chosen by ``rng``."""

    def __init__(self, ctx, dut, seed=None):
        self.ctx, self.dut, self.bus = ctx, dut, dut.bus
        self.rng = random.Random(seed) if seed is not None else None

    async def gap(self):
        for _ in range(self.rng.randrange(4) if self.rng else 0):
            await self.ctx.tick()

    async def _channel(self, name, **payload):
        ctx, bus = self.ctx, self.bus
        await self.gap()
        for key, value in payload.items():
            ctx.set(getattr(bus, key), value)
        ctx.set(getattr(bus, f"{name}valid"), 1)
        await ctx.tick().until(getattr(bus, f"{name}ready"))
        ctx.set(getattr(bus, f"{name}valid"), 0)
        for key in payload:
            ctx.set(getattr(bus, key), ~0)

    async def _response(self, name, *fields):
        ctx, bus = self.ctx, self.bus
        await self.gap()
        ctx.set(getattr(bus, f"{name}ready"), 1)
        result = await ctx.tick().sample(*(getattr(bus, field) for field in fields)).until(getattr(bus, f"{name}valid"))
        ctx.set(getattr(bus, f"{name}ready"), 0)
        return result

    async def write(self, register, value, *, strobe=0xF, data_first=False):
        address = register if isinstance(register, int) else offset(register)
        channels = [("aw", {"awaddr": address}), ("w", {"wdata": value, "wstrb": strobe})]
        for name, payload in reversed(channels) if data_first else channels:
            await self._channel(name, **payload)
        response, = await self._response("b", "bresp")
        return Response(response)

    async def read_response(self, register):
        address = register if isinstance(register, int) else offset(register)
        await self._channel("ar", araddr=address)
        data, response = await self._response("r", "rdata", "rresp")
        return data, Response(response)

    async def read(self, register):
        data, response = await self.read_response(register)
        assert response == Response.OKAY
        return data

    async def start(self):
        """Rings the doorbell and returns when the core sees ``start``."""
        assert await self.write("CONTROL", 1) == Response.OKAY

    async def pulse(self, name, **inputs):
        for key, value in {name: 1, **inputs}.items():
            self.ctx.set(getattr(self.dut, key), value)
        await self.ctx.tick()
        self.ctx.set(getattr(self.dut, name), 0)


def run(bench, *, config=SMALL, counters=3, seed=None, watch=None):
    dut = Registers(config, counters)

    async def main(ctx):
        ctx.set(dut.idle, 1)
        await bench(ctx, dut, Host(ctx, dut, seed))

    async def background(ctx):
        if watch:
            await watch(ctx, dut)

    simulate(dut, main, background=[background])


def test_identity_and_configuration():
    async def bench(ctx, dut, host):
        assert (await host.read("ID")).to_bytes(4, "little") == b"INTR"
        assert await host.read("VERSION") == register_map.VERSION[0] << 16 | register_map.VERSION[1]
        array = SMALL.rows | SMALL.columns << 8 | SMALL.beat_bytes << 16 | SMALL.line_bytes << 24
        assert await host.read("ARRAY") == array
        assert await host.read("BUFFERS") == SMALL.buffer_lines | SMALL.weight_lines << 16
        assert await host.read("RESULTS") == SMALL.accumulator_entries | SMALL.result_entries << 16
        assert await host.read("COUNTERS") == 3
        assert await host.read("METHODS") == 0b111

    run(bench)


@pytest.mark.parametrize("methods, bits", [(("niti",), 0b001), (("wage",), 0b010), (("niti", "dfp"), 0b101)])
def test_methods_of_the_core_are_read(methods, bits):
    async def bench(ctx, dut, host):
        assert await host.read("METHODS") == bits

    run(bench, config=SMALL.replace(methods=methods))


@pytest.mark.parametrize("seed", range(4))
def test_settings_keep_what_the_strobes_select(seed):
    rng = random.Random(seed)
    names = ("PROGRAM", "WINDOW_BASE", "WINDOW_LIMIT", "STEP", "SEED")

    async def bench(ctx, dut, host):
        model = dict.fromkeys(names, 0)
        for _ in range(40):
            name, value, strobe = rng.choice(names), rng.getrandbits(32), rng.getrandbits(4)
            mask = sum(0xFF << 8 * k for k in range(4) if strobe >> k & 1)
            model[name] = model[name] & ~mask | value & mask
            low_bits = rng.randrange(4)      # ignored by AXI4-Lite slaves of 32 bits
            assert await host.write(offset(name) + low_bits, value, strobe=strobe,
                                    data_first=rng.random() < 0.5) == Response.OKAY
            for other in names:
                assert ctx.get(getattr(dut, other.lower())) == model[other]
            assert await host.read(name) == model[name]

    run(bench, seed=seed)


def test_unmapped_and_read_only_accesses_are_refused_and_change_nothing():
    mapped = {register.offset for register in REGISTERS}

    async def bench(ctx, dut, host):
        for name in ("PROGRAM", "IRQ_ENABLE"):
            await host.write(name, 3)
        before = {register.name: await host.read(register.name) for register in REGISTERS}
        rng = random.Random(1)
        near = [address for address in range(0, 0x100, 4) if address not in mapped]
        for address in near + [4 * rng.randrange(64, 1024) for _ in range(20)]:
            assert await host.write(address, 0xFFFF_FFFF) == Response.SLVERR
            assert await host.read_response(address) == (0, Response.SLVERR)
        for register in REGISTERS:
            if not register.writable:
                assert await host.write(register.offset, 0xFFFF_FFFF) == Response.SLVERR
        assert {register.name: await host.read(register.name) for register in REGISTERS} == before

    run(bench)


def test_a_write_and_a_read_at_once_do_not_disturb_each_other():
    async def bench(ctx, dut, host):
        await host.write("PROGRAM", 7)
        bus = dut.bus
        for name, value in {"awaddr": offset("SEED"), "wdata": 5, "wstrb": 15, "awvalid": 1, "wvalid": 1,
                            "araddr": offset("PROGRAM"), "arvalid": 1}.items():
            ctx.set(getattr(bus, name), value)
        await ctx.tick()
        for name in ("awvalid", "wvalid", "arvalid"):
            ctx.set(getattr(bus, name), 0)
        for _ in range(5):        # neither response is withdrawn or changed while the host is not ready
            await ctx.tick()
            ctx.set(bus.araddr, 0)
        assert ctx.get(bus.rvalid) and ctx.get(bus.bvalid) and ctx.get(bus.rdata) == 7
        assert not ctx.get(bus.arready)
        ctx.set(bus.rready, 1)
        ctx.set(bus.bready, 1)
        await ctx.tick()
        ctx.set(bus.rready, 0)
        ctx.set(bus.bready, 0)
        assert not ctx.get(bus.rvalid) and not ctx.get(bus.bvalid)
        assert await host.read("SEED") == 5

    run(bench)


async def _count_pulses(ctx, dut):
    async for _, _, start, reset in ctx.tick().sample(dut.start, dut.soft_reset):
        dut.pulses = [dut.pulses[0] + start, dut.pulses[1] + reset]


def test_a_run_that_ends_well():
    async def bench(ctx, dut, host):
        dut.pulses = [0, 0]
        await host.write("IRQ_ENABLE", DONE)
        await host.write("STEP", 9)
        await host.start()
        ctx.set(dut.idle, 0)
        await ctx.tick()
        assert dut.pulses == [1, 0]
        assert await host.read("STATUS") == BUSY_BIT
        ctx.set(dut.zero, 1)                      # sticky until the next doorbell
        await ctx.tick()
        ctx.set(dut.zero, 0)
        assert await host.read("STATUS") == BUSY_BIT | ZERO_BIT
        assert await host.write("CONTROL", 1) == Response.SLVERR
        for name in ("PROGRAM", "WINDOW_BASE", "WINDOW_LIMIT", "STEP", "SEED"):
            assert await host.write(name, 0x55) == Response.SLVERR
        assert await host.write("COUNTER_SELECT", 1) == Response.OKAY
        await ctx.tick()
        assert dut.pulses == [1, 0]
        await host.pulse("step_advance")
        await host.pulse("step_advance")
        assert not ctx.get(dut.interrupt)
        ctx.set(dut.idle, 1)
        await host.pulse("done")
        assert await host.read("STATUS") == DONE_BIT | IDLE_BIT | ZERO_BIT
        assert await host.read("STEP") == 11
        assert await host.read("PROGRAM") == 0
        assert await host.read("ERROR_CODE") == 0
        assert ctx.get(dut.interrupt)
        assert await host.read("IRQ_STATUS") == DONE
        await host.write("IRQ_STATUS", ERROR)
        assert await host.read("IRQ_STATUS") == DONE
        await host.write("IRQ_STATUS", DONE, strobe=0b1110)
        assert await host.read("IRQ_STATUS") == DONE
        await host.write("IRQ_STATUS", DONE)
        assert await host.read("IRQ_STATUS") == 0
        assert not ctx.get(dut.interrupt)
        await host.start()
        assert await host.read("STATUS") == BUSY_BIT | IDLE_BIT

    run(bench, watch=_count_pulses)


def test_a_run_that_fails_keeps_the_first_error_and_ends_when_idle():
    async def bench(ctx, dut, host):
        await host.write("IRQ_ENABLE", ERROR)
        await host.start()
        ctx.set(dut.idle, 0)
        await ctx.tick()
        await host.pulse("error", error_code=ErrorCode.READ_FAILED, error_descriptor=0x100, error_address=0x2040)
        await host.pulse("error", error_code=ErrorCode.WRITE_FAILED, error_descriptor=0x200, error_address=0x3040)
        assert await host.read("STATUS") == BUSY_BIT | ERROR_BIT
        assert await host.read("ERROR_CODE") == ErrorCode.READ_FAILED
        assert await host.read("ERROR_DESCRIPTOR") == 0x100
        assert await host.read("ERROR_ADDRESS") == 0x2040
        await host.pulse("done")
        assert await host.read("IRQ_STATUS") == 0
        assert not ctx.get(dut.interrupt)
        ctx.set(dut.idle, 1)
        assert await host.read("STATUS") == ERROR_BIT | IDLE_BIT
        assert await host.read("IRQ_STATUS") == ERROR
        assert ctx.get(dut.interrupt)

        assert await host.write("CONTROL", 1) == Response.SLVERR       # an error needs a reset first
        assert await host.read("STATUS") == ERROR_BIT | IDLE_BIT
        await host.write("CONTROL", 2)
        assert await host.read("STATUS") == IDLE_BIT
        assert await host.read("ERROR_CODE") == 0
        assert await host.read("IRQ_STATUS") == 0
        await host.start()
        assert await host.read("STATUS") == BUSY_BIT | IDLE_BIT

    run(bench)


def test_an_error_in_the_cycle_of_done_wins():
    async def bench(ctx, dut, host):
        await host.start()
        ctx.set(dut.done, 1)
        await host.pulse("error", error_code=ErrorCode.EXPONENT_SATURATED)
        ctx.set(dut.done, 0)
        assert await host.read("STATUS") == ERROR_BIT | IDLE_BIT
        assert await host.read("IRQ_STATUS") == ERROR
        assert await host.read("ERROR_CODE") == ErrorCode.EXPONENT_SATURATED

    run(bench)


def test_soft_reset():
    async def bench(ctx, dut, host):
        dut.pulses = [0, 0]
        await host.write("SEED", 77)
        await host.start()
        ctx.set(dut.idle, 0)
        await host.pulse("error", error_code=ErrorCode.READ_FAILED)
        assert await host.write("CONTROL", 3) == Response.OKAY
        await ctx.tick()
        assert dut.pulses == [1, 1]
        assert await host.read("STATUS") == 0
        assert await host.read("IRQ_STATUS") == 0
        assert await host.write("CONTROL", 1) == Response.SLVERR       # not idle yet
        ctx.set(dut.idle, 1)
        assert await host.read("CONTROL") == 0
        assert await host.read("SEED") == 77
        await host.start()
        await ctx.tick()
        assert dut.pulses == [2, 1]

    run(bench, watch=_count_pulses)


def test_cycles_count_while_busy_and_the_high_half_is_captured():
    busy_cycles = 0

    async def bench(ctx, dut, host):
        await host.start()
        first = await host.read("CYCLES")
        second = await host.read("CYCLES")
        assert 0 < first < second
        await host.pulse("done")
        await ctx.tick()
        total = await host.read("CYCLES")
        assert total == await host.read("CYCLES") == busy_cycles
        assert await host.read("CYCLES_HIGH") == 0

    async def count(ctx, dut):
        nonlocal busy_cycles
        running = False
        async for _, _, start, done in ctx.tick().sample(dut.start, dut.done):
            running |= start
            busy_cycles += running
            if done:
                break

    run(bench, watch=count)


def test_counter_window():
    async def bench(ctx, dut, host):
        for index, value in enumerate([0x1234_5678_9ABC, 5, 0xFFFF_FFFF_FFFF]):
            values[index] = value
            await host.write("COUNTER_SELECT", index)
            assert await host.read("COUNTER_VALUE") == value & 0xFFFF_FFFF
            values[index] = 0       # the high half is that of the same moment
            await ctx.tick().repeat(3)
            assert await host.read("COUNTER_VALUE_HIGH") == value >> 32
        for index in (3, 63):
            await host.write("COUNTER_SELECT", index)
            assert await host.read("COUNTER_VALUE") == 0

    async def count(ctx, dut):      # as hw.counters shows the counter selected two cycles before
        shown = 0
        while True:
            ctx.set(dut.counter, shown)
            shown = values.get(ctx.get(dut.counter_select), 0)
            await ctx.tick()

    values = {}
    run(bench, watch=count)


def test_the_map_is_consistent():
    for attribute in ("offset", "name"):
        assert len({getattr(register, attribute) for register in REGISTERS}) == len(REGISTERS)
    for register in REGISTERS:
        assert register.offset % 4 == 0 and register.offset < 0x1000 and register.doc
        used = 0
        for field in register.fields:
            assert not used & field.mask and field.mask < 1 << 32
            used |= field.mask
    sizes = register_map.constants(PRESETS["large"], 64)
    fields = {(r.name, f.name): f for r in REGISTERS for f in r.fields}
    assert all(value < 1 << fields[key].bits for key, value in sizes.items())
    assert offset("STATUS") == 0x24
    with pytest.raises(KeyError, match="no register 'NOPE'"):
        offset("NOPE")


def test_generated_texts():
    text = register_map.markdown()
    described = json.loads(json.dumps(register_map.as_json()))
    assert [register["name"] for register in described["registers"]] == [register.name for register in REGISTERS]
    assert described["error_codes"][4] == {"name": "READ_FAILED", "value": 4, "description": ErrorCode.READ_FAILED.doc}
    for register in REGISTERS:
        assert f"| 0x{register.offset:03x} | **{register.name}**" in text
        for field in register.fields:
            assert field.name == "value" or f"| {field.name} | `{field.access}` | {field.doc} |" in text
    assert sum(field.access == Access.COMMAND for register in REGISTERS for field in register.fields) == 2


def test_c_header_compiles_and_agrees(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler on PATH")
    (tmp_path / "registers.h").write_text(register_map.c_header())
    checks = [f"INTRAIN_{register.name} == {register.offset}" for register in REGISTERS]
    for register in REGISTERS:
        for field in register.fields:
            if field.name != "value":
                name = f"INTRAIN_{register.name}_{field.name.upper()}"
                checks += [f"{name}_MASK == {field.mask}u", f"{name}_SHIFT == {field.low}"]
    checks += [f"INTRAIN_ERROR_{code.name} == {int(code)}" for code in ErrorCode]
    (tmp_path / "check.c").write_text('#include "registers.h"\n#include "registers.h"\n' + "".join(
        f'_Static_assert({check}, "{check}");\n' for check in checks))
    result = subprocess.run([compiler, "-std=c11", "-Wall", "-Werror", "-fsyntax-only", "check.c"], cwd=tmp_path,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("counters", [0, 65])
def test_bad_parameters_are_refused(counters):
    with pytest.raises(ValueError, match=f"1 to 64 performance counters, not {counters}"):
        Registers(SMALL, counters)
