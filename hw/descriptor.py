"""The program format: every descriptor field, declared once.

A program is a list of fixed-size descriptors (64 words of 32 bits). This table is the single source for the
hardware's views (``StructLayout``), for the assembler and disassembler (:func:`encode`, :func:`decode`) and for
``docs/program.md``. Fields fill words from bit 0 upwards and never straddle two words.

No field depends on data: shifts, maxima and exponents live in the core's scalar registers.
"""

from __future__ import annotations

import dataclasses
import enum
import struct

from amaranth.hdl import signed, unsigned
from amaranth.lib import data

__all__ = ["Opcode", "Mode", "Field", "Section", "DESCRIPTOR_WORDS", "DESCRIPTOR_BYTES", "HEADER", "LOAD", "WEIGHTS",
           "FEED", "STORE", "VECTOR", "SCALAR", "LOOP", "FORMATS", "ProgramError", "encode", "decode", "offsets"]

DESCRIPTOR_WORDS = 64
DESCRIPTOR_BYTES = 4 * DESCRIPTOR_WORDS


class ProgramError(ValueError):
    """A descriptor that cannot be encoded or decoded."""


class Opcode(enum.IntEnum):
    END = 0        # stop, raise the interrupt
    PRODUCT = 1    # one block of a forward, error or gradient product
    VECTOR = 2     # one elementwise pass (requantize, update, loss ...) over a tensor
    SCALAR = 3     # a short program for the scalar registers
    LOOP = 4       # next iteration of the enclosing body, or fall through


class Mode(enum.IntEnum):
    """Pass of a product (architecture 3.1)."""
    FORWARD = 0    # weight-stationary; tiles enter from the left
    ERROR = 1      # weight-stationary; tiles enter from the top
    GRADIENT = 2   # output-stationary; left operand = errors, top operand = activations


@dataclasses.dataclass(frozen=True)
class Field:
    name: str
    bits: int
    doc: str
    signed: bool = False

    @property
    def shape(self):
        return signed(self.bits) if self.signed else unsigned(self.bits)


class Section:
    """A named group of fields that one unit takes as its command."""

    def __init__(self, name: str, *fields: Field):
        self.name = name
        self.fields = fields
        self.layout = data.StructLayout({field.name: field.shape for field in fields})

    def __repr__(self):
        return f"Section({self.name!r}, {len(self.fields)} fields)"


def _loop(prefix: str, levels: int, bits: int, doc: str, *, sign: bool = False) -> tuple[Field, ...]:
    return tuple(Field(f"{prefix}{k}", bits, doc.format(k), sign) for k in range(levels))


HEADER = Section(
    "header",
    Field("opcode", 8, "what to do: END, PRODUCT, VECTOR, SCALAR or LOOP"),
    Field("base_a", 4, "base register added to the first address of the descriptor (0 adds nothing)"),
    Field("base_b", 4, "base register added to the second address"),
    Field("tag", 16, "number of the layer and pass, for counters and reports; no effect on results"),
    Field("wait_product", 16, "start only when this many products of the current iteration are complete"),
    Field("wait_vector", 16, "start only when this many vector and scalar descriptors of the iteration are complete"),
)

# One operand buffer's load: `tiles` planes of `runs` runs of `lines` consecutive lines, stored one after the other.
LOAD = Section(
    "load",
    Field("address", 32, "byte address of the first run"),
    Field("tile_stride", 32, "bytes from one plane to the next"),
    Field("run_stride", 32, "bytes from one run to the next"),
    Field("tiles", 16, "planes"),
    Field("runs", 16, "runs in a plane"),
    Field("lines", 16, "lines in a run"),
    Field("enable", 1, "0 keeps what the buffer already holds"),
    Field("fold", 1, "1 expands raw image rows into vectors of kernel_bytes consecutive bytes"),
    Field("fold_slices", 6, "fold: vectors of one output position, ceil(kernel_bytes / vector)"),
    Field("fold_skip", 8, "fold: bytes to drop at the start of the first line"),
    Field("fold_kernel_bytes", 8, "fold: kernel width times channels"),
    Field("fold_step_bytes", 8, "fold: stride times channels"),
    Field("fold_pad_bytes", 8, "fold: zero bytes left of each row, padding times channels"),
    Field("fold_row_bytes", 16, "fold: bytes of an image row, width times channels"),
    Field("fold_columns", 16, "fold: output positions in a row"),
    Field("fold_rows", 16, "fold: image rows to expand"),
)

WEIGHTS = Section(
    "weights",
    Field("address", 32, "byte address of the first tile; its offset within a vector selects a slice of channels"),
    *_loop("stride", 4, 32, "bytes per step of tile loop {}", sign=True),
)

FEED = Section(
    "feed",
    Field("mode", 2, "FORWARD, ERROR or GRADIENT"),
    Field("first", 1, "1: results start from zero; 0: from what earlier blocks left in the accumulators"),
    Field("last", 1, "1: results leave for memory; 0: they stay in the accumulators"),
    Field("reduce", 4, "bit k: tile loop k runs over the reduction (WEIGHT-stationary passes)"),
    Field("row_step", 8, "tap row per step of pixel loop 1", True),
    Field("column_step", 8, "tap column per step of pixel loop 2", True),
    *_loop("tiles", 4, 16, "count of tile loop {} (0 is the outermost)"),
    *_loop("pixels", 3, 16, "count of pixel loop {} (image, row, column)"),
    Field("a_start", 16, "left operand: slice address of the first vector", True),
    *_loop("a_tile", 4, 16, "left operand: slices per step of tile loop {}", sign=True),
    *_loop("a_pixel", 3, 16, "left operand: slices per step of pixel loop {}", sign=True),
    Field("b_start", 16, "top operand: slice address of the first vector", True),
    *_loop("b_tile", 4, 16, "top operand: slices per step of tile loop {}", sign=True),
    *_loop("b_pixel", 3, 16, "top operand: slices per step of pixel loop {}", sign=True),
    Field("row_start", 16, "tap row of the first vector", True),
    Field("column_start", 16, "tap column of the first vector", True),
    *_loop("row_tile", 4, 8, "tap rows per step of tile loop {}", sign=True),
    *_loop("column_tile", 4, 8, "tap columns per step of tile loop {}", sign=True),
    Field("rows", 16, "taps outside rows 0..rows-1 read zero"),
    Field("columns", 16, "taps outside columns 0..columns-1 read zero"),
    *_loop("accumulator", 4, 16, "accumulator entries per step of tile loop {}"),
)

STORE = Section(
    "store",
    Field("address", 32, "byte address of the first result vector"),
    *_loop("stride", 4, 32, "bytes per step of store loop {}", sign=True),
    *_loop("count", 4, 16, "count of store loop {} (0 is the outermost)"),
    Field("run", 16, "result vectors in consecutive lines in the innermost loop"),
    Field("range_register", 6, "scalar register that takes the largest magnitude"),
    Field("range_clear", 1, "1 starts the maximum anew; 0 continues it"),
    Field("range_positive", 1, "1: only results above zero count, as when ReLU follows"),
)

VECTOR = Section(
    "vector",
    Field("function", 4, "see hw.vector.Function"),
    Field("rounding", 4, "golden.rounding.Rounding code"),
    Field("shift_register", 6, "scalar register with the right shift; values below 0 count as 0 unless `left`"),
    Field("relu", 1, "1 sets negative results to zero"),
    Field("mask", 1, "1 sets results to zero where source 1 is not above zero"),
    Field("pool", 1, "1 keeps the first maximum of every 4 consecutive vectors and writes its number to target 1"),
    Field("unpool", 1, "1 keeps a result only where source 2 equals the position in the pooling window"),
    Field("classes", 10, "loss: classes of a sample"),
    Field("source0_width", 2, "bytes of an element of source 0: 0 = one, 1 = two, 2 = four"),
    Field("source1_width", 2, "the same for source 1"),
    Field("target_width", 2, "the same for target 0"),
    Field("left", 1, "1: a negative shift is an exact left shift"),
    Field("limit", 7, "results are limited to this magnitude; 0: to the target width only"),
    Field("state", 1, "1: target 1 gets what the stages did to each element, and `pool` comes before them"),
    *_loop("count", 5, 16, "count of loop {} (0 is the outermost)"),
    Field("enable", 5, "bit 0: read source 1; bit 1: read source 2; bit 2: write target 1; bit 3: write target 0; "
          "bit 4: largest magnitude of the results to range_register"),
    Field("range_register", 6, "scalar register that takes the largest magnitude; WIDE: the bit length of range 0"),
    Field("range_clear", 1, "1 starts the maximum anew; 0 continues it"),
    Field("blocked", 2, "zero where source 2 has a state with bit 2 (clipped), bit 3 (not above zero) set"),
    Field("random_stream", 16, "stream of the random words (contract section 4), for roundings that draw"),
    Field("source0", 32, "byte address of source 0"),
    Field("source1", 32, "byte address of source 1"),
    *_loop("source0_stride", 5, 32, "source 0: bytes per step of loop {}", sign=True),
    *_loop("source1_stride", 5, 32, "source 1: bytes per step of loop {}", sign=True),
    Field("source2", 32, "byte address of source 2"),
    *_loop("source2_stride", 5, 32, "source 2: bytes per step of loop {}", sign=True),
    Field("target0", 32, "byte address of target 0"),
    *_loop("target0_stride", 5, 32, "target 0: bytes per step of loop {}", sign=True),
    Field("target1", 32, "byte address of target 1"),
    *_loop("target1_stride", 5, 32, "target 1: bytes per step of loop {}", sign=True),
    Field("random_start", 32, "random words: row-major index of the first element, times 0x9E3779B9 modulo 2**32"),
    *_loop("random_stride", 5, 32, "random words: index step of loop {}, multiplied likewise"),
    Field("label_log2", 5, "SQUARED_ERROR: log2 of the label's target"),
    Field("source2_width", 2, "bytes of an element of source 2, as of the others"),
    Field("microprogram", 9, "WIDE: address of the first instruction, see hw.microprogram"),
    Field("ranges", 3, "WIDE: number of ranges, 0 to 4, that go to range_register and the next registers"),
)

SCALAR_OPERATIONS = 40

SCALAR = Section(
    "scalar",
    Field("load", 32, "byte address of a word for operation WORD, if enable_load"),
    Field("dump", 32, "byte address that receives all scalar registers when the operations are done, if enable_dump"),
    Field("count", 8, "operations"),
    Field("enable_load", 1, "1 reads the line that holds the word at `load` first"),
    Field("enable_dump", 1, "1 writes all scalar registers to `dump` last: this is the step-done write"),
    Field("microprogram", 1, "1: the operations are no operations but words for the wide lanes (hw.microprogram)"),
    Field("microprogram_address", 9, "where the first of these words goes"),
    *_loop("operation", SCALAR_OPERATIONS, 32, "operation {}, see hw.scalar.Operation"),
)

BASES = 8

LOOP = Section(
    "loop",
    Field("target", 32, "byte address of the first descriptor of the body"),
    Field("count", 32, "iterations of the body in all; 1 is only a barrier, after which completion counts restart"),
    *_loop("increment", BASES, 32, "added to base register {} after each iteration (register 0 stays 0)", sign=True),
    Field("step", 1, "1: an iteration is a training step and STEP counts it"),
)

# Order of the sections in each descriptor; the first field called "address" (or listed in ADDRESSES) takes base_a.
FORMATS: dict[Opcode, tuple[tuple[str, Section], ...]] = {
    Opcode.END: (("header", HEADER),),
    Opcode.PRODUCT: (("header", HEADER), ("load_a", LOAD), ("load_b", LOAD), ("weights", WEIGHTS), ("feed", FEED),
                     ("store", STORE)),
    Opcode.VECTOR: (("header", HEADER), ("vector", VECTOR)),
    Opcode.SCALAR: (("header", HEADER), ("scalar", SCALAR)),
    Opcode.LOOP: (("header", HEADER), ("loop", LOOP)),
}

# (section, field) that receive base registers base_a and base_b.
ADDRESSES: dict[Opcode, tuple[tuple[str, str], ...]] = {
    Opcode.PRODUCT: (("load_a", "address"), ("load_b", "address")),
    Opcode.VECTOR: (("vector", "source0"), ("vector", "source1")),
    Opcode.SCALAR: (("scalar", "load"), ("scalar", "dump")),
}


def offsets(opcode: Opcode) -> dict[tuple[str, str], tuple[int, int, Field]]:
    """(section, field) -> (word, low bit, Field) for one descriptor format."""
    result, word, bit = {}, 0, 0
    for label, section in FORMATS[opcode]:
        if bit:
            word, bit = word + 1, 0
        for field in section.fields:
            if bit + field.bits > 32:
                word, bit = word + 1, 0
            result[label, field.name] = (word, bit, field)
            bit += field.bits
    if word >= DESCRIPTOR_WORDS:
        raise ProgramError(f"{opcode.name} needs {word + 1} words; a descriptor has {DESCRIPTOR_WORDS}")
    return result


def encode(opcode: Opcode, **sections: dict[str, int]) -> bytes:
    """Bytes of one descriptor from ``section={field: value}``; fields left out are 0.

    Raises :class:`ProgramError` naming the field when a value does not fit or a name is unknown.
    """
    opcode = Opcode(opcode)
    words = [0] * DESCRIPTOR_WORDS
    table = offsets(opcode)
    given = {(label, name): value for label, fields in sections.items() for name, value in fields.items()}
    given["header", "opcode"] = int(opcode)
    for key, value in given.items():
        if key not in table:
            raise ProgramError(f"{opcode.name} has no field {key[0]}.{key[1]}")
        word, bit, field = table[key]
        value = int(value)
        low, high = (-(1 << field.bits - 1), (1 << field.bits - 1) - 1) if field.signed else (0, (1 << field.bits) - 1)
        if not low <= value <= high:
            raise ProgramError(f"{opcode.name} {key[0]}.{key[1]} = {value} does not fit {low}..{high}")
        words[word] |= (value & (1 << field.bits) - 1) << bit
    return struct.pack(f"<{DESCRIPTOR_WORDS}I", *words)


def decode(raw: bytes) -> tuple[Opcode, dict[str, dict[str, int]]]:
    """The inverse of :func:`encode`: opcode and ``{section: {field: value}}``."""
    if len(raw) != DESCRIPTOR_BYTES:
        raise ProgramError(f"a descriptor has {DESCRIPTOR_BYTES} bytes, not {len(raw)}")
    words = struct.unpack(f"<{DESCRIPTOR_WORDS}I", raw)
    try:
        opcode = Opcode(words[0] & 0xFF)
    except ValueError:
        raise ProgramError(f"unknown opcode {words[0] & 0xFF}") from None
    sections: dict[str, dict[str, int]] = {label: {} for label, _ in FORMATS[opcode]}
    for (label, name), (word, bit, field) in offsets(opcode).items():
        value = words[word] >> bit & (1 << field.bits) - 1
        if field.signed and value >> field.bits - 1:
            value -= 1 << field.bits
        sections[label][name] = value
    return opcode, sections


def markdown() -> str:
    """The text of docs/program.md."""
    lines = [
        "# Program format", "",
        "Generated by `python -m hw program` from `hw/descriptor.py`.", "",
        f"A program is a list of descriptors of {DESCRIPTOR_BYTES} bytes ({DESCRIPTOR_WORDS} little-endian words of 32 "
        f"bits), aligned to {DESCRIPTOR_BYTES} bytes. The core runs them in order from PROGRAM to END. No field "
        "depends on data: shifts, maxima and exponents are computed on the core and live in its scalar registers.", ""]
    for opcode in FORMATS:
        lines += [f"## {opcode.name} (opcode {int(opcode)})", "",
                  "| word | bits | field | meaning |", "|---|---|---|---|"]
        for (label, name), (word, bit, field) in offsets(opcode).items():
            bits = f"{bit + field.bits - 1}:{bit}" if field.bits > 1 else f"{bit}"
            sign = " (signed)" if field.signed else ""
            lines.append(f"| {word} | {bits} | `{label}.{name}`{sign} | {field.doc} |")
        for base, (label, name) in zip("ab", ADDRESSES.get(opcode, ()), strict=False):
            lines += ["", f"The base register that `header.base_{base}` names is added to `{label}.{name}`."]
        lines.append("")
    return "\n".join(lines)
