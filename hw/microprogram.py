"""Microprograms of the wide lanes: operations, assembler, disassembler and their meaning in Python.

Arithmetic that needs more than a shift (aligned sums, updates, normalisation) is a short program over 64-bit lane
registers. All lanes execute the same instruction. An instruction is one word: ``op`` in bits 0-4, ``dst`` 5-8, ``a``
9-12, the kind of ``b`` 13-14 and ``b`` 15-31 (a lane register, a scalar register or a signed constant).
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Sequence

from amaranth.hdl import signed
from amaranth.lib import data

from .descriptor import ProgramError
from .lanes import TARGET_BITS

__all__ = ["WideOperation", "Lane", "Scalar", "Kind", "word_layout", "LANE_REGISTERS", "MICROPROGRAM_WORDS",
           "RANGES", "BITS", "assemble", "disassemble", "run"]

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


class Kind(enum.IntEnum):
    """What operand b is."""
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
word_layout = data.StructLayout({"op": 5, "dst": 4, "a": 4, "kind": 2, "b": signed(CONSTANT_BITS)})


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
        kind, number = Kind.CONSTANT, b
        if isinstance(b, Lane):
            kind, number = Kind.LANE, b.number
        elif isinstance(b, Scalar):
            kind, number = Kind.SCALAR, b.number
        registers = RANGES if op is WideOperation.RANGE else LANE_REGISTERS
        bound = 1 << CONSTANT_BITS - 1
        low, high = {Kind.LANE: (0, LANE_REGISTERS), Kind.SCALAR: (0, 64), Kind.CONSTANT: (-bound, bound)}[kind]
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
        b = {Kind.LANE: f"l{number}", Kind.SCALAR: f"s{number}"}.get(word >> 13 & 3, str(number))
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
            y = (registers[constant] if kind == Kind.LANE else scalars[constant] if kind == Kind.SCALAR else
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
