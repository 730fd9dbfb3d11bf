"""ScalarUnit against its Python reference, and the reference against golden.range."""

import random

import numpy as np
import pytest

from golden.niti import requantize
from golden.range import bit_length, ceil_log2, nearest_log2
from hw.config import PRESETS
from hw.descriptor import SCALAR_OPERATIONS, ProgramError
from hw.scalar import REGISTERS, STEP, ZERO, Operation, ScalarUnit, assemble, disassemble, run
from tests.hw.memory_model import Memory
from tests.hw.streams import STALLS, simulate, stalls

EDGES = [0, 1, 2, 3, 5, 6, 127, 128, 129, 46340, 46341, 32767, 32768, -32768, -32769, -1, -128, 2**31 - 1,
         -2**31, 3037000500 - 2**32, 3037000499 - 2**32]


def signed32(value):
    return (value + 2**31) % 2**32 - 2**31


def random_operation(rng):
    operation = rng.choice(list(Operation))
    register = lambda: rng.choice([ZERO, STEP, *range(1, 12)])    # noqa: E731
    dst = rng.randrange(1, 12)
    match operation:
        case Operation.SET:
            return operation, dst, rng.choice([0, -2**19, 2**19 - 1, rng.randrange(-300, 300)])
        case Operation.ADDI:
            return operation, dst, register(), rng.choice([-128, 127, -7, 1])
        case Operation.WORD:
            return operation, dst
        case Operation.CEIL_LOG2 | Operation.BIT_LENGTH | Operation.NEAREST_LOG2:
            return operation, dst, register()
        case Operation.SELECT_ZERO | Operation.SELECT_POSITIVE:
            return operation, dst, register(), register(), register()
        case _:
            return operation, dst, register(), register()


async def give_operations(ctx, dut, words, half):
    """The operations of the next command, one a cycle."""
    for number, word in enumerate(words):
        ctx.set(dut.operation, {"valid": 1, "half": half, "number": number, "word": word})
        await ctx.tick()
    ctx.set(dut.operation, {"valid": 0})


class Bench:
    """A scalar unit with memory, and coroutines that drive it."""

    def __init__(self, core="tiny", pattern="none"):
        self.config = PRESETS[core]
        self.memory = Memory(self.config, seed=3)
        self.dut = ScalarUnit(self.config)
        self.source, self.sink = stalls(pattern, core)
        self.errors = set()
        self.load_address, self.dump_address = 0x200 + 12, 0x400
        self.half = 0

    async def watch(self, ctx):
        names = ("exponent", "zero_range", "illegal")
        async for _, _, *pulses in ctx.tick().sample(*(getattr(self.dut, name) for name in names)):
            self.errors |= {name for name, pulse in zip(names, pulses, strict=True) if pulse}

    async def set_range(self, ctx, register, value, clear):
        ctx.set(self.dut.range, {"valid": 1, "register": register, "clear": clear, "value": value})
        await ctx.tick()
        ctx.set(self.dut.range, {"valid": 0})
        await ctx.tick()

    async def command(self, ctx, words, *, load=False, dump=False, count=None):
        fields = {"count": len(words) if count is None else count, "enable_load": load, "enable_dump": dump,
                  "load": self.load_address, "dump": self.dump_address, "half": self.half}
        await give_operations(ctx, self.dut, words, self.half)
        self.half = 1 - self.half
        ctx.set(self.dut.command.payload, fields)
        ctx.set(self.dut.command.valid, 1)
        cycles = 0
        while True:
            cycles += 1
            _, _, ready, done, pending = await ctx.tick().sample(
                self.dut.command.ready, self.dut.done, self.dut.write.idle)
            assert ready == done
            if ready:
                assert pending == 1 and self.memory.pending == 0
                break
        ctx.set(self.dut.command.valid, 0)
        return cycles

    async def registers(self, ctx):
        await ctx.tick().repeat(3)      # a range may be on its way
        values = []
        for k in range(REGISTERS):
            ctx.set(self.dut.select, k)
            await ctx.tick().repeat(2)
            values.append(ctx.get(self.dut.value))
        return values

    def run(self, bench):
        simulate(self.dut, bench, background=[
            self.watch, self.memory.reader(self.dut.read, stall=self.source),
            self.memory.writer(self.dut.write, stall=self.sink),
            *self.memory.checks(self.dut.read, self.dut.write)])


@pytest.mark.parametrize("core", ["tiny", "small", "large"])
@pytest.mark.parametrize("pattern", STALLS)
def test_random_programs_equal_the_reference(core, pattern):
    rng = random.Random(core + pattern)
    b = Bench(core, pattern)

    async def bench(ctx):
        registers = [0] * REGISTERS
        for k in range(1, STEP):
            registers[k] = rng.choice(EDGES)
            await b.set_range(ctx, k, registers[k] % 2**32, 1)
        for step in (7, 2**31 + 5):
            word = rng.randrange(2**32)
            b.memory.store(b.load_address, np.array([word], np.uint32))
            ctx.set(b.dut.step, step)
            registers[STEP] = signed32(step)
            words = assemble(random_operation(rng) for _ in range(SCALAR_OPERATIONS))
            registers, errors = run(words, registers, signed32(word))
            b.errors.clear()
            await b.command(ctx, words, load=True, dump=True)
            assert b.errors == errors
            assert b.memory.load(b.dump_address, (REGISTERS,), np.int32).tolist() == registers
            assert await b.registers(ctx) == registers

    b.run(bench)


@pytest.mark.parametrize("code", list(Operation))
def test_each_operation_at_the_edges(code):
    b = Bench()
    pairs = [(x, y) for x in EDGES for y in (0, 1, -1, 32767, -32768, 2**31 - 1, -2**31)]
    if code in (Operation.CEIL_LOG2, Operation.BIT_LENGTH, Operation.NEAREST_LOG2):
        pairs = [(x, 0) for x in EDGES]

    async def bench(ctx):
        for x, y in pairs:
            registers = [0] * REGISTERS
            registers[1], registers[2], registers[3] = x, 17, y
            third = {Operation.SET: (1, -5), Operation.ADDI: (4, 1, -128), Operation.WORD: (4,),
                     Operation.SELECT_ZERO: (4, 1, 2, 3), Operation.SELECT_POSITIVE: (4, 1, 2, 3),
                     Operation.CEIL_LOG2: (4, 1), Operation.BIT_LENGTH: (4, 1),
                     Operation.NEAREST_LOG2: (4, 1)}.get(code, (4, 1, 3))
            words = assemble([(code, *third)])
            await b.command(ctx, assemble([(Operation.SET, 4, 0)]))
            for k in (1, 2, 3):
                await b.set_range(ctx, k, registers[k] % 2**32, 1)
            b.errors.clear()
            expected, errors = run(words, registers)
            await b.command(ctx, words)
            for k in (1, 2, 3, 4):
                ctx.set(b.dut.select, k)
                await ctx.tick().repeat(2)
                assert ctx.get(b.dut.value) == expected[k], (x, y, k)
            assert b.errors == errors, (x, y)

    b.run(bench)


def test_the_reference_knows_the_ranges():
    powers = (2**k + d for k in range(2, 32) for d in (-1, 0, 1))
    for x in [*range(1, 3000), *(v % 2**32 for v in EDGES if v), *powers]:
        registers = [0] * REGISTERS
        registers[1] = signed32(x)
        words = assemble([(Operation.CEIL_LOG2, 2, 1), (Operation.BIT_LENGTH, 3, 1),
                          (Operation.NEAREST_LOG2, 4, 1)])
        after, errors = run(words, registers)
        assert after[2:5] == [ceil_log2(x), bit_length(x), nearest_log2(x)], x
        assert not errors


@pytest.mark.parametrize("minimum_shift", [1, 2])
def test_niti_shift_and_exponent(minimum_shift):
    """The program a niti layer needs: shift and exponent of the requantization."""
    maximum, weight, activation, shift, exponent, least, positive, result = range(10, 18)
    program = assemble([
        (Operation.CEIL_LOG2, shift, maximum), (Operation.ADDI, shift, shift, -7),
        (Operation.SET, least, minimum_shift), (Operation.MAX, positive, shift, least),
        (Operation.SELECT_POSITIVE, shift, positive, ZERO, shift),
        (Operation.ADD, exponent, weight, activation), (Operation.EXPONENT, result, exponent, shift),
    ])
    for m in (0, 1, 127, 128, 129, 255, 256, 257, 1 << 20, (1 << 20) + 1, 2**31 - 1):
        registers = [0] * REGISTERS
        registers[maximum], registers[weight], registers[activation] = m, -9, 4
        after, errors = run(program, registers)
        _, expected = requantize(np.array([m]), -5, minimum_shift=minimum_shift)
        assert after[result] == expected
        assert not errors


def test_ranges_arrive_at_any_time():
    """Maxima that arrive while a program runs are not lost and do not disturb it."""
    b = Bench()
    rng = random.Random(5)
    program = assemble([(Operation.ADDI, 1, 1, 1)] * SCALAR_OPERATIONS)
    maxima = {}
    commands = 0

    async def ranges(ctx):
        while commands < 3:
            register, value, clear = rng.randrange(20, 24), rng.randrange(2**32), rng.random() < 0.2
            clear |= register not in maxima
            maxima[register] = value if clear else max(maxima[register], value)
            await b.set_range(ctx, register, value, clear)
            for _ in range(rng.randrange(4)):
                await ctx.tick()
        values = await b.registers(ctx)
        assert values[1] == 3 * SCALAR_OPERATIONS
        assert len(maxima) == 4
        for register, value in maxima.items():
            assert values[register] == signed32(value)

    async def bench(ctx):
        nonlocal commands
        await b.command(ctx, assemble([(Operation.SET, 1, 0)]))
        for _ in range(3):
            await b.command(ctx, program)
            commands += 1

    simulate(b.dut, bench, ranges, background=[b.memory.reader(b.dut.read), b.memory.writer(b.dut.write)])


def test_maximum_is_unsigned_and_read_only_registers_stay():
    b = Bench()

    async def bench(ctx):
        ctx.set(b.dut.step, 99)
        for register in (ZERO, 5, STEP):
            for value, clear in ((7, 1), (2**31, 0), (9, 0)):
                await b.set_range(ctx, register, value, clear)
        values = await b.registers(ctx)
        assert (values[ZERO], values[5], values[STEP]) == (0, -2**31, 99)
        await b.set_range(ctx, 5, 3, 1)
        assert (await b.registers(ctx))[5] == 3
        # Hand-made words: the assembler refuses them.
        await b.command(ctx, [Operation.SET | 0 << 6 | 5 << 12, Operation.SET | STEP << 6 | 5 << 12])
        values = await b.registers(ctx)
        assert (values[ZERO], values[STEP]) == (0, 99)

    b.run(bench)


def test_illegal_operations_and_counts_are_reported():
    b = Bench()

    async def bench(ctx):
        await b.set_range(ctx, 6, 1, 1)
        await b.command(ctx, [63 | 6 << 6] + assemble([(Operation.SET, 7, 4)]))
        assert b.errors == {"illegal"}
        values = await b.registers(ctx)
        assert values[6:8] == [1, 4]
        b.errors.clear()
        words = assemble([(Operation.SET, 6, 9)] * SCALAR_OPERATIONS)
        await b.command(ctx, words, count=SCALAR_OPERATIONS + 1)
        assert b.errors == {"illegal"}
        assert (await b.registers(ctx))[6] == 1

    b.run(bench)


def test_four_cycles_per_operation():
    b = Bench()

    async def bench(ctx):
        none = await b.command(ctx, [])
        assert none <= 4
        assert await b.command(ctx, assemble([(Operation.SET, 1, 0)] * 20)) == none + 4 * 20

    b.run(bench)


def test_assembler_and_disassembler():
    program = [(Operation.SET, 1, -300000), (Operation.ADDI, 2, 1, -7), (Operation.SELECT_ZERO, 3, 1, 2, 62),
               (Operation.WORD, 4), (Operation.CEIL_LOG2, 5, 4), (Operation.EXPONENT, 6, 63, 0)]
    assert disassemble(assemble(program)) == [
        "SET r1, -300000", "ADDI r2, r1, -7", "SELECT_ZERO r3, r1, r2, r62", "WORD r4", "CEIL_LOG2 r5, r4",
        "EXPONENT r6, r63, r0"]
    assert assemble([(Operation.SET, 0, 0)]) == [0]


@pytest.mark.parametrize("operations, message", [
    ([(Operation.ADD, 1, 2)], "ADD takes dst, a, b"),
    ([(Operation.ADDI, 1, 2, 128)], "imm = 128 does not fit -128..127"),
    ([(Operation.SET, 1, 1 << 19)], "constant = 524288"),
    ([(Operation.ADD, 64, 0, 0)], "dst = 64"),
    ([(Operation.ADD, STEP, 0, 0)], "read-only"),
    ([(61, 1)], "unknown code 61"),
    ([(Operation.WORD, 1)] * 41, "41 scalar operations"),
])
def test_bad_programs_are_refused(operations, message):
    with pytest.raises(ProgramError, match=message):
        assemble(operations)


def test_unknown_words_are_refused():
    with pytest.raises(ProgramError, match="unknown scalar operation 63"):
        disassemble([63])
    with pytest.raises(ValueError, match="64 registers"):
        run([], [0])
