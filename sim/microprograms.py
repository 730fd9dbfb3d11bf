"""The programs that the wide lanes run for dynamic fixed point (`golden.dfp`), and their place in the core's memory.

Lane registers 0, 1, 2 hold the elements of sources 0, 1, 2 and register 3 the random words. Scalar operands are named
and bound to registers by the compiler.
"""

from __future__ import annotations

from collections.abc import Callable

from hw.microprogram import MICROPROGRAM_WORDS, Lane, Scalar, assemble
from hw.microprogram import WideOperation as Op

from .program import CompileError

__all__ = ["Microprograms", "aligned", "requantize"]

X, Y, Z, DRAW, A, B = range(6)
STATE_CODE = 1               # 16 bits, as CLIP counts


def aligned(terms, scalar: Callable[[str], int]) -> list[tuple]:
    """Register A = sum of ``(register, mantissa, name of the exponent's distance to the grid)``."""
    program = []
    for k, (register, mantissa, shift) in enumerate(terms):
        target = B if k else A
        if mantissa != 1:
            program.append((Op.MUL, target, register, mantissa))
            register = target
        program.append((Op.ROUND, target, register, Scalar(scalar(shift))))
        if k:
            program.append((Op.ADD, A, A, Lane(B)))
    return program


def requantize(scalar: Callable[[str], int], code: int, name: str = "amount") -> list[tuple]:
    """Register A = A / 2**shift, stochastically rounded and saturated, with S[amount] = 32 - shift.

    (a + (word >> 32 - shift)) >> shift is (a * 2**(32 - shift) + word) >> 32 for shifts up to 32; above, the first
    shift drops the excess bits, as golden does. A negative shift is exact.
    """
    return [(Op.SHIFT, A, A, Scalar(scalar(name))), (Op.ADD, A, A, Lane(DRAW)), (Op.SHIFT, A, A, -32),
            (Op.CLIP, A, A, code)]


class Microprograms:
    """Hands out places in the microprogram memory; equal programs share one."""

    def __init__(self):
        self.words: list[int] = []
        self.entries: dict[tuple, int] = {}

    def __getitem__(self, program) -> int:
        """Address of the program's first instruction."""
        words = tuple(assemble(program))
        if words not in self.entries:
            self.entries[words] = len(self.words)
            self.words += words
            if len(self.words) > MICROPROGRAM_WORDS:
                raise CompileError(f"the network's microprograms need more than {MICROPROGRAM_WORDS} words")
        return self.entries[words]
