"""WideLanes: microprograms on the hardware against their meaning, and instructions that cannot be."""

import random

import pytest

from hw.config import PRESETS
from hw.descriptor import ProgramError
from hw.microprogram import BITS, LANE_REGISTERS, RANGES, Lane, Scalar, WideOperation, assemble, disassemble, run
from hw.wide import WideLanes
from tests.hw.streams import STALLS, simulate, stalls, stream_check, stream_get, stream_put

Op = WideOperation
EDGES = (0, 1, -1, 2, 127, -128, 32767, -32768, (1 << 31) - 1, -(1 << 31), (1 << 32) - 1, 1 << 47, -(1 << 47),
         (1 << 50) + 5, -(1 << 62), (1 << 62) - 1)


class Bench:
    """WideLanes with sources, a scalar file and the Python model beside it."""

    def __init__(self, core="tiny", pattern="none", seed=0):
        self.config = PRESETS[core]
        self.v, self.parts = self.config.vector, self.config.parts
        self.dut = WideLanes(self.config)
        self.rng = random.Random(f"{core} {pattern} {seed}")
        self.pattern = pattern
        self.scalars = [self.rng.randrange(-70, 70) for _ in range(64)]
        self.lanes = [[0] * LANE_REGISTERS for _ in range(self.v)]
        self.address = 0

    async def scalar_file(self, ctx):
        selected = [0, 0]
        async for _, _, select in ctx.tick().sample(self.dut.scalar_select):
            selected = [selected[-1], select]
            ctx.set(self.dut.scalar_value, self.scalars[selected[0]])

    async def store(self, ctx, instructions):
        """Appends a program to the microprogram memory: its entry and words."""
        entry, words = self.address, assemble(instructions)
        for word in words:
            ctx.set(self.dut.store_enable, 1)
            ctx.set(self.dut.store_address, self.address)
            ctx.set(self.dut.store_word, word)
            await ctx.tick()
            self.address += 1
        ctx.set(self.dut.store_enable, 0)
        return entry, words

    async def begin(self, ctx, entry, count=(1, 1, 1, 1, 1), use=1):
        for port, value in zip(self.dut.count, count, strict=True):
            ctx.set(port, value)
        ctx.set(self.dut.use, use)
        ctx.set(self.dut.entry, entry)
        ctx.set(self.dut.start, 1)
        await ctx.tick()
        ctx.set(self.dut.start, 0)

    async def finish(self, ctx):
        while not ctx.get(self.dut.done):
            await ctx.tick()
        return [ctx.get(length) for length in self.dut.ranges]

    def load(self, slot, vector):
        for registers, value in zip(self.lanes, vector, strict=True):
            registers[slot] = value

    def vectors(self, count, signed=True):
        low, high = (-(1 << 31), (1 << 31) - 1) if signed else (0, (1 << 32) - 1)
        return [[self.rng.choice((low, high, 0, self.rng.randint(low, high), self.rng.randint(0, 300)))
                 for _ in range(self.v)] for _ in range(count)]

    def split(self, vectors):
        """The parts in which they pass."""
        lanes = self.config.lanes
        return [vector[k:k + lanes] for vector in vectors for k in range(0, self.v, lanes)]

    def joined(self, outputs):
        """The outputs of one iteration, in the order in which its program writes them for every part, as vectors."""
        writes = len(outputs) // self.parts
        return [[value for part in range(self.parts) for value in outputs[part * writes + k]] for k in range(writes)]

    def run(self, bench, *more):
        simulate(self.dut, bench, *more, background=[self.scalar_file], limit=400_000)


# Operations that fill registers 4.. with edge values before the one under test; constants above 17 bits by pieces.
def constant(register, value):
    pieces = [value >> 48, value >> 32 & 0xFFFF, value >> 16 & 0xFFFF, value & 0xFFFF]
    program = [(Op.MOVE, register, pieces[0])]
    for piece in pieces[1:]:
        program += [(Op.SHIFT, register, register, 16), (Op.MOVE, 15, piece & 0x7FFF),
                    (Op.ADD, register, register, Lane(15)), (Op.MOVE, 15, piece >> 15), (Op.SHIFT, 15, 15, 15),
                    (Op.ADD, register, register, Lane(15))]
    return program


MEANING = {
    Op.MOVE: lambda a, b: b,
    Op.ADD: lambda a, b: a + b,
    Op.SUB: lambda a, b: a - b,
    Op.MIN: min,
    Op.MAX: max,
    Op.GATE: lambda a, b: a if b > 0 else 0,
    Op.MUL: lambda a, b: wrap(a, 48) * wrap(b, 32),
    Op.BIT_LENGTH: lambda a, b: abs(a).bit_length(),
    Op.SQRT: lambda a, b: next(r for r in [int((a % 2**32) ** 0.5)] for r in (r - 1, r, r + 1)
                               if r * r <= a % 2**32 < (r + 1) ** 2),
    Op.DIVIDE: lambda a, b: (a % 2**64) // (b % 2**64) if b else -1,
}
SHIFTS = (-100, -64, -63, -62, -61, -33, -32, -31, -7, -1, 0, 1, 7, 31, 32, 62, 63, 64, 100)


def wrap(value, bits=BITS):
    value %= 1 << bits
    return value - (1 << bits) if value >> bits - 1 else value


def test_the_model_means_what_the_operations_say():
    """hw.microprogram.run, on which the other tests and the compiler rely, against definitions of its own."""
    for op, meaning in MEANING.items():
        for x in EDGES:
            for y in EDGES:
                lane = [[0] * 4 + [x, y] + [0] * 10]
                operands = {Op.MOVE: (6, Lane(5)), Op.BIT_LENGTH: (6, 4), Op.SQRT: (6, 4)}.get(op, (6, 4, Lane(5)))
                run(assemble([(op, *operands)]), lane, [0] * 64, [0] * RANGES)
                assert lane[0][6] == wrap(meaning(x, y)), (op.name, x, y)
    for x in EDGES:
        for shift in SHIFTS:
            lane = [[0] * 4 + [x, shift] + [0] * 10]
            run(assemble([(Op.SHIFT, 6, 4, Lane(5)), (Op.ROUND, 7, 4, Lane(5))]), lane, [0] * 64, [0] * RANGES)
            if shift >= 0:
                assert lane[0][6:8] == [wrap(x << shift)] * 2
            else:
                assert lane[0][6] == x >> -shift
                assert lane[0][7] == ((x + (1 << -shift - 1)) >> -shift if shift >= -62 else 0), (x, shift)
        for code, bits in enumerate((8, 16, 32)):
            lane = [[0] * 4 + [x] + [0] * 11]
            run(assemble([(Op.CLIP, 6, 4, code)]), lane, [0] * 64, [0] * RANGES)
            assert lane[0][6] == sorted((1 - (1 << bits - 1), x, (1 << bits - 1) - 1))[1]


@pytest.mark.parametrize("core", ["tiny", "wide", "small"])
def test_every_operation_on_edges(core):
    """Each operation with edge values in both operands, its result written in two halves."""
    b = Bench(core)
    tail = [(Op.WRITE, 6), (Op.SHIFT, 6, 6, -32), (Op.WRITE, 6), (Op.RANGE, 1, 4)]

    async def bench(ctx):
        for op in [*MEANING, Op.SHIFT, Op.ROUND, Op.CLIP]:
            for _ in range(6):
                b.address = 0
                x, y = b.rng.choice(EDGES), b.rng.choice(SHIFTS if op in (Op.SHIFT, Op.ROUND) else EDGES)
                operands = {Op.MOVE: (6, Lane(5)), Op.BIT_LENGTH: (6, 4), Op.SQRT: (6, 4),
                            Op.CLIP: (6, 4, b.rng.randrange(3))}.get(op, (6, 4, Lane(5)))
                # Lanes differ: the source's vector is added to both.
                entry, words = await b.store(ctx, [*constant(4, x), *constant(5, y), (Op.ADD, 4, 4, Lane(0)),
                                                   (op, *operands), *tail])
                vector = [b.rng.randrange(-3, 4) for _ in range(b.v)]
                b.load(0, vector)
                ranges = [0] * RANGES
                expected = run(words, b.lanes, b.scalars, ranges)
                await b.begin(ctx, entry)
                got = []
                for part in b.split([vector]):
                    await stream_put(ctx, b.dut.x, [part])
                    got += await stream_get(ctx, b.dut.output, 2)
                assert b.joined(got) == expected, (op.name, x, y)
                assert await b.finish(ctx) == [bits.bit_length() for bits in ranges]

    b.run(bench)


@pytest.mark.parametrize("core, programs, pattern", [
    *(("tiny", 25, pattern) for pattern in STALLS), ("small", 8, "none"), ("small", 8, "both")])
def test_random_programs_over_loops(core, programs, pattern):
    """Random instructions, several sources, registers that live on between iterations and runs."""
    b = Bench(core, pattern)
    choices = [op for op in Op if op not in (Op.END, Op.WRITE, Op.RANGE)]
    work = []

    def program():
        lines = [(Op.WRITE, b.rng.randrange(16))]
        for _ in range(b.rng.randrange(1, 12)):
            op, dst, a = b.rng.choice(choices), b.rng.randrange(4, 16), b.rng.randrange(16)
            operand = b.rng.choice((Lane(b.rng.randrange(16)), Scalar(b.rng.randrange(64)), b.rng.randrange(-999, 999)))
            if op is Op.CLIP:
                operand = b.rng.randrange(3)
            lines.append({Op.MOVE: (op, dst, operand), Op.BIT_LENGTH: (op, dst, a), Op.SQRT: (op, dst, a)}
                         .get(op, (op, dst, a, operand)))
        lines += [(Op.RANGE, b.rng.randrange(RANGES), b.rng.randrange(16)), (Op.WRITE, lines[-1][1])]
        # A result that is on its way to its register when the next iteration's sources come.
        return lines + [(Op.ADD, b.rng.randrange(4, 16), b.rng.randrange(16), 7)] * b.rng.randrange(2)

    async def bench(ctx):
        # Registers have no reset: start from known values.
        entry, words = await b.store(ctx, [(Op.MOVE, k, k) for k in range(16)])
        b.lanes = [list(range(16)) for _ in range(b.v)]
        await b.begin(ctx, entry, use=0)
        await b.finish(ctx)
        for item in work:
            b.address = 100
            entry, words = await b.store(ctx, item["program"])
            ranges, expected = [0] * RANGES, []
            for k in range(item["iterations"]):
                for slot, vectors in item["sources"].items():
                    b.load(slot, vectors[k])
                expected += run(words, b.lanes, b.scalars, ranges)
            await b.begin(ctx, entry, item["count"], sum(1 << slot for slot in item["sources"]))
            got = await stream_get(ctx, b.dut.output, 2 * b.parts * item["iterations"], stall=sink)
            assert [vector for k in range(0, len(got), 2 * b.parts)
                    for vector in b.joined(got[k:k + 2 * b.parts])] == expected, item["program"]
            assert await b.finish(ctx) == [bits.bit_length() for bits in ranges]

    source, sink = stalls(pattern)
    for _ in range(programs):
        count = [b.rng.choice((0, 1, 1, 2, 3)) for _ in range(5)]
        iterations = 1
        for c in count:
            iterations *= max(c, 1)
        slots = [slot for slot in range(4) if b.rng.randrange(2)]
        work.append({"program": program(), "count": count, "iterations": iterations,
                     "sources": {slot: b.vectors(iterations, slot < 3) for slot in slots}})

    def feeder(slot, port):
        async def feed(ctx):
            for item in work:
                await stream_put(ctx, port, b.split(item["sources"].get(slot, ())), stall=source)
        return feed

    dut = b.dut
    feeders = [feeder(slot, port) for slot, port in enumerate((dut.x, dut.y, dut.z, dut.draw))]

    async def check(ctx):
        await stream_check(ctx, dut.output)

    simulate(dut, bench, *feeders, background=[b.scalar_file, check], limit=400_000)


@pytest.mark.parametrize("core", ["tiny", "small"])
def test_cycles_are_as_documented(core):
    b = Bench(core)

    async def bench(ctx):
        for lines, want in (([(Op.ADD, 4, 4, 1)] * 5, 20), ([(Op.SQRT, 4, 4)], 4 + 18 * b.config.lanes),
                            ([(Op.DIVIDE, 4, 4, 3)], 4 + 66 * b.config.lanes)):
            b.address = 0
            entry, _ = await b.store(ctx, [(Op.MOVE, 4, 100), *lines])
            await b.begin(ctx, entry, (1, 1, 1, 1, 10), use=0)
            cycles = 0
            while not ctx.get(b.dut.done):
                await ctx.tick()
                cycles += 1
            # The first MOVE, END, waiting for the last instruction, no source and the cycle after it.
            least = 10 * b.parts * (4 + want + 1 + 1 + 2)
            assert least <= cycles <= least + 8, (lines[0], cycles)

    b.run(bench)


def test_unknown_operation_is_illegal_and_ends():
    b = Bench("tiny")

    async def bench(ctx):
        for word, illegal in ((31, True), (int(Op.END), False)):
            ctx.set(b.dut.store_enable, 1)
            ctx.set(b.dut.store_address, 0)
            ctx.set(b.dut.store_word, word)
            await ctx.tick()
            ctx.set(b.dut.store_enable, 0)
            await b.begin(ctx, 0, use=0)
            seen = False
            while not ctx.get(b.dut.done):
                seen |= bool(ctx.get(b.dut.illegal))
                await ctx.tick()
            assert seen == illegal

    b.run(bench)


def test_disassembler():
    lines = [(Op.MOVE, 4, -7), (Op.ADD, 5, 0, Lane(3)), (Op.ROUND, 6, 5, Scalar(63)), (Op.SQRT, 7, 6), (Op.RANGE, 2, 7),
             (Op.WRITE, 7)]
    assert disassemble(assemble(lines)) == ["MOVE l4, -7", "ADD l5, l0, l3", "ROUND l6, l5, s63", "SQRT l7, l6",
                                            "RANGE 2, l7", "WRITE l7", "END"]
    with pytest.raises(ProgramError, match="unknown wide operation 31"):
        disassemble([31])


@pytest.mark.parametrize("instruction, message", [
    ((Op.ADD, 16, 0, 0), "destination = 16"),
    ((Op.ADD, 1, 0, 1 << 16), "operand b = 65536"),
    ((Op.RANGE, 4, 0), "destination = 4 does not fit 0..3"),
    ((Op.MOVE, 1, Lane(16)), "operand b = 16"),
    ((Op.MOVE, 1, Scalar(64)), "operand b = 64"),
    ((Op.WRITE, 1, 2), "WRITE takes 1 operands, got 2"),
])
def test_bad_instructions_are_named(instruction, message):
    with pytest.raises(ProgramError, match=message):
        assemble([(Op.MOVE, 4, 0), instruction])
