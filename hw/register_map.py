"""The register map, declared once: hardware, JSON sidecar, C header and docs/registers.md all come from here."""

from __future__ import annotations

import dataclasses
import enum

from .config import METHODS, CoreConfig
from .errors import ERROR_BITS, ErrorCode

__all__ = ["Access", "RegisterField", "Register", "REGISTERS", "IDENTIFIER", "VERSION", "MAX_COUNTERS", "COUNTER_BITS",
           "offset", "constants", "as_json", "c_header", "markdown"]

IDENTIFIER = int.from_bytes(b"INTR", "little")
VERSION = (1, 2)         # of registers and program format; the first number changes when drivers must change
MAX_COUNTERS = 64
COUNTER_BITS = 48


class Access(enum.StrEnum):
    READ = "r"             # the core's value; writing has no effect
    READ_WRITE = "rw"      # the host's value
    COMMAND = "w1"         # writing 1 acts once; reads 0
    CLEAR = "rw1c"         # set by the core, cleared by writing 1


@dataclasses.dataclass(frozen=True)
class RegisterField:
    name: str
    low: int
    bits: int
    access: Access
    doc: str

    @property
    def mask(self) -> int:
        return ((1 << self.bits) - 1) << self.low


@dataclasses.dataclass(frozen=True)
class Register:
    """One 32-bit word. ``idle_only``: the core refuses writes (SLVERR) while it is busy."""
    name: str
    offset: int
    doc: str
    fields: tuple[RegisterField, ...]
    idle_only: bool = False

    @property
    def writable(self) -> bool:
        return any(field.access != Access.READ for field in self.fields)


def _word(name: str, at: int, access: Access, doc: str, *, idle_only: bool = False) -> Register:
    return Register(name, at, doc, (RegisterField("value", 0, 32, access, ""),), idle_only)


def _read(name: str, low: int, bits: int, doc: str) -> RegisterField:
    return RegisterField(name, low, bits, Access.READ, doc)


REGISTERS = (
    _word("ID", 0x000, Access.READ, "The letters INTR, first letter in the lowest byte."),
    Register("VERSION", 0x004, "Version of the register map and the program format.", (
        _read("minor", 0, 16, "changes with additions"),
        _read("major", 16, 16, "changes when drivers must change"))),
    Register("ARRAY", 0x008, "Shape of the systolic array and width of the memory port.", (
        _read("rows", 0, 8, "rows of the array"), _read("columns", 8, 8, "columns of the array"),
        _read("beat_bytes", 16, 8, "bytes of one AXI4 data beat"), _read("line_bytes", 24, 8, "bytes of one line"))),
    Register("BUFFERS", 0x00C, "Operand buffers.", (
        _read("buffer_lines", 0, 16, "lines in each bank of an operand buffer"),
        _read("weight_lines", 16, 16, "lines of the weight ring"))),
    Register("RESULTS", 0x010, "Result storage.", (
        _read("accumulator_entries", 0, 16, "int32 vectors below the array"),
        _read("result_entries", 16, 16, "int32 vectors waiting for memory"))),
    Register("COUNTERS", 0x014, "Performance counters.", (_read("count", 0, 8, "number of counters"),)),
    Register("METHODS", 0x018, "Training methods the core is built for.",
             tuple(_read(method, k, 1, f"1: it runs {method}") for k, method in enumerate(METHODS))),
    Register("CONTROL", 0x020, "Commands. A start while STATUS.busy or STATUS.error is 1 or STATUS.idle is 0 is "
             "refused (SLVERR), unless the same write resets: then only the reset acts.", (
                 RegisterField("start", 0, 1, Access.COMMAND, "doorbell: run the program at PROGRAM; clears "
                               "STATUS.done, STATUS.zero and CYCLES"),
                 RegisterField("reset", 1, 1, Access.COMMAND, "soft reset: stop at once; clears STATUS, ERROR_CODE "
                               "and IRQ_STATUS. Needed after an error. Wait for STATUS.idle before the next start"))),
    Register("STATUS", 0x024, "State of the core.", (
        _read("busy", 0, 1, "1 from the doorbell until the program has ended or an error has stopped it"),
        _read("done", 1, 1, "1: the program ended without error"),
        _read("error", 2, 1, "1: an error occurred, see ERROR_CODE; later work does not start"),
        _read("idle", 3, 1, "1: no unit works and memory owes no answer"),
        _read("zero", 4, 1, "1: since the doorbell the nearest power of two of an all-zero tensor was asked for; the "
              "program went on, and what was scaled by it is zero"))),
    Register("ERROR_CODE", 0x028, "Why STATUS.error is 1, the first reason.",
             (_read("code", 0, ERROR_BITS, "see the table of error codes"),)),
    _word("ERROR_DESCRIPTOR", 0x02C, Access.READ, "Byte address of the descriptor at fault."),
    _word("ERROR_ADDRESS", 0x030, Access.READ, "Byte address of the access at fault, for memory errors."),
    _word("PROGRAM", 0x040, Access.READ_WRITE, "Byte address of the first descriptor.", idle_only=True),
    _word("WINDOW_BASE", 0x044, Access.READ_WRITE, "First byte address the core may touch.", idle_only=True),
    _word("WINDOW_LIMIT", 0x048, Access.READ_WRITE, "First byte address after what the core may touch; only whole "
          "lines inside are used.", idle_only=True),
    _word("STEP", 0x04C, Access.READ_WRITE, "Absolute training step: the host sets the first, the core counts.",
          idle_only=True),
    _word("SEED", 0x050, Access.READ_WRITE, "Seed of the random words.", idle_only=True),
    Register("IRQ_ENABLE", 0x060, "Which events raise the interrupt pin.", (
        RegisterField("done", 0, 1, Access.READ_WRITE, "1: IRQ_STATUS.done raises it"),
        RegisterField("error", 1, 1, Access.READ_WRITE, "1: IRQ_STATUS.error raises it"))),
    Register("IRQ_STATUS", 0x064, "Events since they were last cleared.", (
        RegisterField("done", 0, 1, Access.CLEAR, "a program ended without error"),
        RegisterField("error", 1, 1, Access.CLEAR, "an error stopped a program and the core is idle again"))),
    _word("CYCLES", 0x070, Access.READ, "Clock cycles while busy since the doorbell, low half. Reading it captures the "
          "high half."),
    _word("CYCLES_HIGH", 0x074, Access.READ, "High half of CYCLES when CYCLES was read last."),
    Register("COUNTER_SELECT", 0x080, "Which performance counter COUNTER_VALUE shows.",
             (RegisterField("index", 0, 6, Access.READ_WRITE, "number of the counter"),)),
    _word("COUNTER_VALUE", 0x084, Access.READ, "Low half of the selected counter, 0 if there is none. Reading it "
          "captures the high half."),
    Register("COUNTER_VALUE_HIGH", 0x088, "High half of the counter when COUNTER_VALUE was read last.",
             (_read("value", 0, COUNTER_BITS - 32, ""),)),
)


def offset(name: str) -> int:
    """Byte offset of the register called ``name``."""
    for register in REGISTERS:
        if register.name == name:
            return register.offset
    raise KeyError(f"no register {name!r}; known: {', '.join(register.name for register in REGISTERS)}")


def constants(config: CoreConfig, counters: int) -> dict[tuple[str, str], int]:
    """(register, field) -> value of the fields that describe the configuration."""
    sizes = {"ARRAY": ("rows", "columns", "beat_bytes", "line_bytes"), "BUFFERS": ("buffer_lines", "weight_lines"),
             "RESULTS": ("accumulator_entries", "result_entries")}
    return {("ID", "value"): IDENTIFIER, ("VERSION", "major"): VERSION[0], ("VERSION", "minor"): VERSION[1],
            ("COUNTERS", "count"): counters,
            **{("METHODS", method): int(method in config.methods) for method in METHODS},
            **{(name, field): getattr(config, field) for name, fields in sizes.items() for field in fields}}


def as_json() -> dict:
    """Registers and error codes for the JSON sidecar."""
    return {
        "registers": [{
            "name": register.name, "offset": register.offset, "description": register.doc,
            "idle_only": register.idle_only,
            "fields": [{"name": field.name, "low": field.low, "bits": field.bits, "access": str(field.access),
                        "description": field.doc} for field in register.fields],
        } for register in REGISTERS],
        "error_codes": [{"name": code.name, "value": int(code), "description": code.doc} for code in ErrorCode],
    }


def c_header() -> str:
    """A C header with offsets, field positions, masks and error codes."""
    lines = ["/* Registers of the intrain core. Generated by `python -m hw registers`. */",
             "#ifndef INTRAIN_REGISTERS_H", "#define INTRAIN_REGISTERS_H", ""]
    for register in REGISTERS:
        lines.append(f"#define INTRAIN_{register.name} 0x{register.offset:03x}u")
        for field in register.fields:
            if field.name != "value":
                name = f"INTRAIN_{register.name}_{field.name.upper()}"
                lines += [f"#define {name}_SHIFT {field.low}", f"#define {name}_MASK 0x{field.mask:08x}u"]
    lines.append("")
    lines += [f"#define INTRAIN_ERROR_{code.name} {int(code)} /* {code.doc} */" for code in ErrorCode]
    return "\n".join([*lines, "", "#endif", ""])


def markdown() -> str:
    """The text of docs/registers.md."""
    lines = [
        "# Registers", "",
        "Generated by `python -m hw registers` from `hw/register_map.py`.", "",
        "AXI4-Lite, 32-bit registers, byte strobes honoured. The two lowest address bits are ignored. Offsets not "
        "listed answer SLVERR, and so do writes to registers without a writable field; neither changes anything. "
        "Registers marked *idle* refuse writes with SLVERR while STATUS.busy is 1. Bits without a field read 0.", "",
        "Access: `r` read only; `rw` read and write; `w1` writing 1 acts, reads 0; `rw1c` writing 1 clears.", "",
        "| offset | register | bits | field | access | meaning |", "|---|---|---|---|---|---|"]
    for register in REGISTERS:
        mark = " *idle*" if register.idle_only else ""
        only = register.fields[0] if register.fields[0].name == "value" else None
        if only:
            bits, access = f"{only.bits - 1}:0", f"`{only.access}`"
        else:
            bits, access = "", ""
        lines.append(f"| 0x{register.offset:03x} | **{register.name}**{mark} | {bits} | | {access} | {register.doc} |")
        for field in register.fields:
            if field is not only:
                top = field.low + field.bits - 1
                bits = f"{top}:{field.low}" if field.bits > 1 else f"{field.low}"
                lines.append(f"| | | {bits} | {field.name} | `{field.access}` | {field.doc} |")
    lines += ["", "## Error codes", "", "| code | name | meaning |", "|---|---|---|"]
    lines += [f"| {int(code)} | {code.name} | {code.doc} |" for code in ErrorCode]
    return "\n".join([*lines, ""])
