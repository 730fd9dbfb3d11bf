"""Wide lanes: a microprogrammed 64-bit integer processor, one element of a vector per lane.

Arithmetic that needs more than a shift (aligned sums, updates, normalisation) is a short program over 64-bit lane
registers. All lanes execute the same instruction. An instruction is one word: ``op`` in bits 0-4, ``dst`` 5-8, ``a``
9-12, the kind of ``b`` 13-14 and ``b`` 15-31 (a lane register, a scalar register or a signed constant).
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Sequence

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .descriptor import ProgramError
from .divider import Divider
from .isqrt import SquareRoot
from .lanes import TARGET_BITS
from .loop_nest import LoopNest

__all__ = ["WideOperation", "Lane", "Scalar", "WideLanes", "LANE_REGISTERS", "MICROPROGRAM_WORDS", "RANGES", "BITS",
           "assemble", "disassemble", "run"]

LANE_REGISTERS = 16
MICROPROGRAM_WORDS = 512
RANGES = 4
BITS = 64
MULTIPLICAND_BITS, MULTIPLIER_BITS = 48, 32
CONSTANT_BITS = 17


class WideOperation(enum.IntEnum):
    """What an instruction does in each lane; arithmetic is signed 64 bits and wraps."""
    END = 0            # the iteration is complete
    MOVE = 1           # dst = b
    ADD = 2            # dst = a + b
    SUB = 3            # dst = a - b
    MUL = 4            # dst = (low 48 bits of a, signed) * (low 32 bits of b, signed)
    SHIFT = 5          # dst = floor(a * 2**b)
    ROUND = 6          # dst = floor(a * 2**b + 1/2); 0 for b below -62
    CLIP = 7           # dst = a saturated to TARGET_BITS[b] bits, symmetric
    MIN = 8            # dst = the smaller of a and b
    MAX = 9            # dst = the larger of a and b
    GATE = 10          # dst = a where b > 0, else 0
    BIT_LENGTH = 11    # dst = bit length of abs(a)
    SQRT = 12          # dst = floor(sqrt(low 32 bits of a, unsigned))
    DIVIDE = 13        # dst = a // b, both taken as unsigned 64 bits; all ones for b = 0
    RANGE = 14         # range number dst takes abs(a) into account
    WRITE = 15         # the low 32 bits of a leave as the next vector


class _Kind(enum.IntEnum):
    LANE = 0
    SCALAR = 1
    CONSTANT = 2


@dataclasses.dataclass(frozen=True)
class Lane:
    """Operand b: a lane register."""
    number: int


@dataclasses.dataclass(frozen=True)
class Scalar:
    """Operand b: a register of the scalar unit, the same for all lanes."""
    number: int


_WITHOUT_B = (WideOperation.BIT_LENGTH, WideOperation.SQRT, WideOperation.RANGE)
_layout = data.StructLayout({"op": 5, "dst": 4, "a": 4, "kind": 2, "b": signed(CONSTANT_BITS)})


def assemble(instructions: Iterable[Sequence]) -> list[int]:
    """Words of ``(WideOperation, ...)`` tuples, closed by END; after the operation come

    ``dst, b`` for MOVE, ``dst, a`` for BIT_LENGTH and SQRT, ``range, a`` for RANGE, ``a`` for WRITE and ``dst, a, b``
    for the others. dst and a are numbers of lane registers; b is a :class:`Lane`, a :class:`Scalar` or a constant.
    Raises :class:`ProgramError` naming the instruction that cannot be encoded.
    """
    words = []
    for index, (code, *operands) in enumerate(instructions):
        op = WideOperation(code)
        want = 0 if op is WideOperation.END else 1 if op is WideOperation.WRITE else (
            2 if op is WideOperation.MOVE or op in _WITHOUT_B else 3)
        if len(operands) != want:
            raise ProgramError(f"instruction {index}: {op.name} takes {want} operands, got {len(operands)}")
        dst = a = b = 0
        if op is WideOperation.MOVE:
            dst, b = operands
        elif op is WideOperation.WRITE:
            a, = operands
        elif op in _WITHOUT_B:
            dst, a = operands
        elif operands:
            dst, a, b = operands
        kind, number = _Kind.CONSTANT, b
        if isinstance(b, Lane):
            kind, number = _Kind.LANE, b.number
        elif isinstance(b, Scalar):
            kind, number = _Kind.SCALAR, b.number
        registers = RANGES if op is WideOperation.RANGE else LANE_REGISTERS
        bound = 1 << CONSTANT_BITS - 1
        low, high = {_Kind.LANE: (0, LANE_REGISTERS), _Kind.SCALAR: (0, 64), _Kind.CONSTANT: (-bound, bound)}[kind]
        for what, value, least, limit in (("destination", dst, 0, registers), ("operand a", a, 0, LANE_REGISTERS),
                                          ("operand b", number, low, high)):
            if not least <= value < limit:
                raise ProgramError(f"instruction {index}: {op.name} {what} = {value} does not fit "
                                   f"{least}..{limit - 1}")
        words.append(op | dst << 5 | a << 9 | kind << 13 | (number & (1 << CONSTANT_BITS) - 1) << 15)
    if not words or words[-1] & 31 != WideOperation.END:
        words.append(int(WideOperation.END))
    return words


def _signed(value: int, bits: int) -> int:
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> bits - 1 else value


def disassemble(words: Iterable[int]) -> list[str]:
    """One line of text for each word, such as ``ADD l4, l0, s12``: l is a lane register, s a scalar register.

    Raises :class:`ProgramError` for an unknown operation.
    """
    lines = []
    for word in words:
        try:
            op = WideOperation(word & 31)
        except ValueError:
            raise ProgramError(f"unknown wide operation {word & 31} in word {word:#010x}") from None
        dst, a, number = f"l{word >> 5 & 15}", f"l{word >> 9 & 15}", _signed(word >> 15, CONSTANT_BITS)
        b = {_Kind.LANE: f"l{number}", _Kind.SCALAR: f"s{number}"}.get(word >> 13 & 3, str(number))
        operands = {WideOperation.END: (), WideOperation.WRITE: (a,), WideOperation.MOVE: (dst, b),
                    WideOperation.RANGE: (dst[1:], a)}.get(op, (dst, a) if op in _WITHOUT_B else (dst, a, b))
        lines.append(f"{op.name} {', '.join(operands)}".rstrip())
    return lines


def run(words: Sequence[int], lanes: list[list[int]], scalars: Sequence[int], ranges: list[int]) -> list[list[int]]:
    """One iteration of a program, in Python: changes ``lanes`` (registers of each lane) and ``ranges`` (the OR of the
    magnitudes) in place and returns the written vectors.
    """
    written = []
    for word in words:
        op, dst, a, kind = WideOperation(word & 31), word >> 5 & 15, word >> 9 & 15, word >> 13 & 3
        constant = _signed(word >> 15, CONSTANT_BITS)
        if op is WideOperation.END:
            break
        if op is WideOperation.WRITE:
            written.append([_signed(registers[a], 32) for registers in lanes])
            continue
        for registers in lanes:
            x = registers[a]
            y = (registers[constant] if kind == _Kind.LANE else scalars[constant] if kind == _Kind.SCALAR else
                 constant)
            match op:
                case WideOperation.MOVE:
                    result = y
                case WideOperation.ADD:
                    result = x + y
                case WideOperation.SUB:
                    result = x - y
                case WideOperation.MUL:
                    result = _signed(x, MULTIPLICAND_BITS) * _signed(y, MULTIPLIER_BITS)
                case WideOperation.SHIFT:
                    result = (x << y if y < BITS else 0) if y >= 0 else x >> min(-y, BITS - 1)
                case WideOperation.ROUND:
                    result = ((x << y if y < BITS else 0) if y >= 0 else
                              (x >> -y) + (x >> -y - 1 & 1) if y >= -62 else 0)
                case WideOperation.CLIP:
                    limit = (1 << TARGET_BITS[y] - 1) - 1
                    result = max(-limit, min(limit, x))
                case WideOperation.MIN:
                    result = min(x, y)
                case WideOperation.MAX:
                    result = max(x, y)
                case WideOperation.GATE:
                    result = x if y > 0 else 0
                case WideOperation.BIT_LENGTH:
                    result = x.bit_length()
                case WideOperation.SQRT:
                    result = math.isqrt(x & 0xFFFFFFFF)
                case WideOperation.DIVIDE:
                    x, y = x % (1 << BITS), y % (1 << BITS)
                    result = x // y if y else -1
                case WideOperation.RANGE:
                    ranges[dst] |= abs(x)
                    continue
            registers[dst] = _signed(result, BITS)
    return written


class WideLanes(wiring.Component):
    """Runs a microprogram once per iteration of five loops.

    At the start of an iteration lane registers 0, 1, 2 take the vectors of ``x``, ``y``, ``z``, sign-extended, and
    register 3 the unsigned random words of ``draw``, each if its bit of ``use`` is set. The other registers keep
    their values, also from one run to the next; they are not reset.

    Attributes
    ----------
    start : In(1)  begin; only while ``done``.
    count : In(16).array(5)  loop counts, stable while running. use : In(4)  bit 0: x, 1: y, 2: z, 3: draw.
    entry : In  first instruction of the program, stable while running.
    x, y, z : In streams of V x signed(32). draw : In stream of V x 32 bits.
    output : Out stream of V x signed(32).
    store_enable, store_address, store_word : In  change a word of the microprogram memory; only while ``done``.
    scalar_select : Out(6), scalar_value : In(signed(32))  read port of the scalar registers.
    done : Out(1)  no run under way. ranges : Out(7).array(4)  bit lengths of the largest magnitudes that RANGE has seen
        in the last run, valid while ``done``.
    starved : Out(1)  waits for a source. illegal : Out(1)  pulse: unknown operation; the run ends.

    Cycles of an iteration: one per source in use (at least one), one for END, 3 per instruction. Longer:
    BIT_LENGTH 3 plus the longest length, SQRT 3 + 18 V, DIVIDE 3 + 66 V (one unit serves the lanes in turn).
    After the last iteration up to 64 cycles for each of the 4 ranges.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        vectors = stream.Signature(data.ArrayLayout(signed(32), config.vector))
        super().__init__({
            "start": In(1), "count": In(16).array(5), "use": In(4), "entry": In(range(MICROPROGRAM_WORDS)),
            "x": In(vectors), "y": In(vectors), "z": In(vectors),
            "draw": In(stream.Signature(data.ArrayLayout(32, config.vector))), "output": Out(vectors),
            "store_enable": In(1), "store_address": In(range(MICROPROGRAM_WORDS)), "store_word": In(32),
            "scalar_select": Out(6), "scalar_value": In(signed(32)),
            "done": Out(1, init=1), "ranges": Out(7).array(RANGES), "starved": Out(1), "illegal": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = range(self.config.vector)
        m.submodules.nest = nest = LoopNest(5, {})
        for k in range(5):
            m.d.comb += nest.count[k].eq(self.count[k])
        m.d.comb += nest.load.eq(self.start)

        # Microprogram: `word` is always the instruction at `pc`.
        m.submodules.program = program = memory.Memory(shape=32, depth=MICROPROGRAM_WORDS, init=[])
        store, fetch = program.write_port(), program.read_port()
        pc, following = Signal(range(MICROPROGRAM_WORDS)), Signal(range(MICROPROGRAM_WORDS))
        m.d.comb += [store.en.eq(self.store_enable), store.addr.eq(self.store_address), store.data.eq(self.store_word),
                     following.eq(pc), fetch.addr.eq(following)]
        m.d.sync += pc.eq(following)
        word = data.View(_layout, fetch.data)

        # Lane registers: one memory, because all lanes use the same addresses.
        row = data.ArrayLayout(signed(BITS), self.config.vector)
        m.submodules.registers = registers = memory.Memory(shape=row, depth=LANE_REGISTERS, init=[])
        write = registers.write_port()
        port_a, port_b = registers.read_port(domain="comb"), registers.read_port(domain="comb")
        m.d.comb += [port_a.addr.eq(word.a), port_b.addr.eq(word.b[:4]), self.scalar_select.eq(word.b[:6])]

        op, dst, shared = Signal(WideOperation), Signal(4), Signal(signed(32))
        m.d.comb += shared.eq(Mux(word.kind == _Kind.SCALAR, self.scalar_value, word.b))
        pending = Signal(4)
        sources = (self.x, self.y, self.z, self.draw)
        serial, negate, ranging = Signal(range(self.config.vector)), Signal(), Signal()
        seen = [Signal(BITS, name=f"seen{k}") for k in range(RANGES)]

        a = [Signal(signed(BITS), name=f"a{i}") for i in lanes]
        b = [Signal(signed(BITS), name=f"b{i}") for i in lanes]
        total = [Signal(signed(BITS + 1), name=f"total{i}") for i in lanes]
        product = [Signal(signed(BITS), name=f"product{i}") for i in lanes]     # also counts and serial results
        shifted = [Signal(BITS + 1, name=f"shifted{i}") for i in lanes]         # with one more bit below
        right, vanishes = [Signal(name=f"right{i}") for i in lanes], [Signal(name=f"vanishes{i}") for i in lanes]

        m.submodules.square_root = root = SquareRoot(32)
        m.submodules.divider = divider = Divider(BITS, BITS)
        m.d.comb += [root.i.payload.eq(Array(a)[serial][:32]),
                     divider.i.payload.numerator.eq(Array(a)[serial]),
                     divider.i.payload.denominator.eq(Array(b)[serial])]

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += following.eq(self.entry)
                with m.If(self.start):
                    m.d.sync += [self.done.eq(0), pending.eq(self.use), *[bits.eq(0) for bits in seen],
                                 *[length.eq(0) for length in self.ranges]]
                    m.next = "LOAD"
            with m.State("LOAD"):
                chosen = Signal(4)
                m.d.comb += chosen.eq(pending & (~pending + 1))
                for k, source in enumerate(sources):
                    with m.If(chosen[k]):
                        m.d.comb += [source.ready.eq(1), write.en.eq(source.valid), write.addr.eq(k),
                                     self.starved.eq(~source.valid)]
                        m.d.comb += [write.data[i].eq(source.payload[i]) for i in lanes]
                        with m.If(source.valid):
                            m.d.sync += pending.eq(pending ^ chosen)
                with m.If((pending == 0) | (write.en & (pending == chosen))):
                    m.next = "OPERANDS"
            with m.State("OPERANDS"):
                m.d.sync += [op.eq(word.op), dst.eq(word.dst), serial.eq(0)]
                for i in lanes:
                    m.d.sync += [a[i].eq(port_a.data[i]),
                                 b[i].eq(Mux(word.kind == _Kind.LANE, port_b.data[i], shared))]
                m.next = "EXECUTE"
                with m.If(word.op == WideOperation.END):
                    m.d.comb += [following.eq(self.entry), nest.step.eq(1)]
                    m.d.sync += pending.eq(self.use)
                    m.next = "LOAD"
                    with m.If(nest.last):
                        m.next = "LENGTHS"
                with m.Elif(word.op > max(WideOperation)):
                    m.d.comb += self.illegal.eq(1)
                    m.next = "LENGTHS"
            with m.State("EXECUTE"):
                m.d.comb += [
                    ranging.eq((op == WideOperation.RANGE) | (op == WideOperation.BIT_LENGTH)),
                    negate.eq(op.matches(WideOperation.SUB, WideOperation.MIN, WideOperation.MAX)),
                ]
                for i in lanes:
                    minus = negate | (ranging & (a[i] < 0))
                    addend = Signal(signed(BITS), name=f"addend{i}")
                    amount = Signal(signed(BITS), name=f"amount{i}")
                    funnel = Signal(2 * BITS + 1, name=f"funnel{i}")
                    distance = Signal(range(BITS + 1), name=f"distance{i}")
                    m.d.comb += [
                        addend.eq(Mux(ranging, a[i], b[i])),
                        amount.eq(Mux(b[i] < -(BITS - 1), BITS - 1, -b[i])),
                        # A left shift by k is a right shift by 64 - k of the word above 64 zeros.
                        funnel.eq(Mux(b[i] < 0, Cat(Const(0, 1), a[i], a[i][-1].replicate(BITS)),
                                      Cat(Const(0, BITS + 1), a[i]))),
                        distance.eq(Mux(b[i] < 0, amount, Mux(b[i] > BITS - 1, 0, BITS - b[i]))),
                    ]
                    m.d.sync += [
                        total[i].eq(Mux(ranging, 0, a[i]) + Mux(minus, ~addend, addend) + minus),
                        product[i].eq(Mux(op == WideOperation.MUL,
                                          a[i][:MULTIPLICAND_BITS].as_signed() * b[i][:MULTIPLIER_BITS].as_signed(),
                                          0)),
                        shifted[i].eq(funnel >> distance),
                        right[i].eq(b[i] < 0), vanishes[i].eq(b[i] < -62),
                    ]
                m.next = "RESULT"
                with m.Switch(op):
                    with m.Case(WideOperation.BIT_LENGTH):
                        m.next = "COUNT"
                    with m.Case(WideOperation.SQRT):
                        m.next = "ROOT"
                    with m.Case(WideOperation.DIVIDE):
                        m.next = "DIVIDE"
            with m.State("COUNT"):
                m.next = "RESULT"
                for i in lanes:
                    with m.If(total[i] != 0):
                        m.d.sync += [total[i].eq(total[i] >> 1), product[i].eq(product[i] + 1)]
                        m.next = "COUNT"
            for state, unit, result in (("ROOT", root, root.o.payload.root),
                                        ("DIVIDE", divider, divider.o.payload.quotient)):
                with m.State(state):
                    m.d.comb += unit.i.valid.eq(1)
                    with m.If(unit.i.ready):
                        m.next = f"{state} RESULT"
                with m.State(f"{state} RESULT"):
                    m.d.comb += unit.o.ready.eq(1)
                    with m.If(unit.o.valid):
                        for i in lanes:
                            with m.If(serial == i):
                                m.d.sync += product[i].eq(result)
                        m.d.sync += serial.eq(serial + 1)
                        m.next = "RESULT"
                        with m.If(serial != self.config.vector - 1):
                            m.next = state
            with m.State("RESULT"):
                m.d.comb += [write.addr.eq(dst), following.eq(pc + 1),
                             write.en.eq(~op.matches(WideOperation.RANGE, WideOperation.WRITE))]
                for i in lanes:
                    result = Signal(signed(BITS), name=f"result{i}")
                    rounded = Signal(BITS, name=f"rounded{i}")
                    m.d.comb += [
                        rounded.eq(shifted[i][1:] + (shifted[i][0] & right[i] & (op == WideOperation.ROUND))),
                        write.data[i].eq(result),
                        result.eq(product[i]),
                    ]
                    with m.Switch(op):
                        with m.Case(WideOperation.MOVE):
                            m.d.comb += result.eq(b[i])
                        with m.Case(WideOperation.ADD, WideOperation.SUB):
                            m.d.comb += result.eq(total[i])
                        with m.Case(WideOperation.SHIFT):
                            m.d.comb += result.eq(rounded)
                        with m.Case(WideOperation.ROUND):
                            m.d.comb += result.eq(Mux(vanishes[i], 0, rounded))
                        with m.Case(WideOperation.CLIP):
                            m.d.comb += result.eq(a[i])
                            for code, bits in enumerate(TARGET_BITS):
                                limit = (1 << bits - 1) - 1
                                with m.If((b[i] == code) & (a[i] > limit)):
                                    m.d.comb += result.eq(limit)
                                with m.Elif((b[i] == code) & (a[i] < -limit)):
                                    m.d.comb += result.eq(-limit)
                        with m.Case(WideOperation.MIN):
                            m.d.comb += result.eq(Mux(total[i] < 0, a[i], b[i]))
                        with m.Case(WideOperation.MAX):
                            m.d.comb += result.eq(Mux(total[i] < 0, b[i], a[i]))
                        with m.Case(WideOperation.GATE):
                            m.d.comb += result.eq(Mux(b[i] > 0, a[i], 0))
                m.next = "OPERANDS"
                with m.If(op == WideOperation.RANGE):
                    magnitude = Signal(BITS)
                    for value in total:
                        magnitude = magnitude | value[:BITS]
                    for k, bits in enumerate(seen):
                        with m.If(dst == k):
                            m.d.sync += bits.eq(bits | magnitude)
                with m.If(op == WideOperation.WRITE):
                    m.d.comb += self.output.valid.eq(1)
                    with m.If(~self.output.ready):
                        m.d.comb += following.eq(pc)
                        m.next = "RESULT"
            with m.State("LENGTHS"):
                m.d.sync += self.done.eq(1)
                m.next = "IDLE"
                for bits, length in zip(seen, self.ranges, strict=True):
                    with m.If(bits != 0):
                        m.d.sync += [bits.eq(bits >> 1), length.eq(length + 1), self.done.eq(0)]
                        m.next = "LENGTHS"
        for i in lanes:
            m.d.comb += self.output.payload[i].eq(a[i][:32])
        return m
