"""Programs as text: ``python -m sim disassemble PROGRAM``."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path

import numpy as np

from golden.rounding import Rounding
from hw.config import CoreConfig
from hw.descriptor import ADDRESSES, DESCRIPTOR_BYTES, SCALAR_OPERATIONS, Mode, Opcode, ProgramError, decode
from hw.microprogram import disassemble as disassemble_wide
from hw.scalar import REGISTERS, STEP, disassemble
from hw.vector import Function

from .accesses import accesses

__all__ = ["Symbols", "disassemble_path", "listing", "producers", "symbols", "text"]

BASES = {1: "images of the step", 2: "labels of the step", 3: "input exponent of the step"}
"""What the compiler uses the base registers for."""
WIDTHS = {0: "int8", 1: "int16", 2: "int32"}


@dataclasses.dataclass
class Symbols:
    """Names for what a program refers to: ``regions`` (name, address, bytes of all copies), ``registers`` and
    ``tags`` by number, the core, and what the program is."""

    regions: list = dataclasses.field(default_factory=list)
    registers: dict = dataclasses.field(default_factory=dict)
    tags: dict = dataclasses.field(default_factory=dict)
    core: CoreConfig | None = None
    title: str = ""
    address: int = 0

    def place(self, address: int) -> str:
        """An address as region+offset."""
        for name, first, size in self.regions:
            if first <= address < first + size:
                return f"{name}+{address - first:#x}" if address > first else name
        return f"{address:#x}"

    def register(self, number: int) -> str:
        name = self.registers.get(number)
        return f"r{number} ({name})" if name else f"r{number}"

    def to_json(self) -> dict:
        return {**dataclasses.asdict(self), "registers": list(self.registers.items()), "tags": list(self.tags.items())}

    @classmethod
    def from_json(cls, value: dict) -> Symbols:
        core = value["core"] and CoreConfig(**value["core"])
        return cls(**{**value, "registers": dict(value["registers"]), "tags": dict(value["tags"]), "core": core})


def symbols(compiled, title: str = "") -> Symbols:
    """The names of a :class:`sim.compiler.Compiled` program."""
    # Numbers beyond the registers stand for dumps inside a step.
    registers = {STEP: "step", **{number: name for name, number in compiled.scalars.items() if number < REGISTERS}}
    for block in compiled.program.blocks:
        if block.opcode is Opcode.PRODUCT and block.sections["feed"]["last"]:
            registers.setdefault(block.sections["store"]["range_register"], f"maximum of {block.layer} {block.step}")
        elif block.opcode is Opcode.VECTOR:
            registers.setdefault(block.sections["vector"].get("shift_register", 0), "shift")
    tags = {compiled.program.first_tag + number: " ".join(filter(None, key))
            for number, key in enumerate(compiled.program.tags)}
    regions = [[region.name, region.address, region.copies * region.nbytes] for region in compiled.regions.values()]
    registers.pop(0, None)
    return Symbols(regions, registers, tags, compiled.config, title, compiled.program.address)


def _extent(counts) -> str:
    return " x ".join(str(count) for count in counts)


def _address(names: Symbols, opcode, sections, label, name) -> str:
    """An address with the base register that is added to it."""
    place = names.place(sections[label][name])
    for base, key in zip(("base_a", "base_b"), ADDRESSES.get(opcode, ()), strict=False):
        number = sections["header"][base]
        if key == (label, name) and number:
            place += f" + base {number} ({BASES.get(number, 'of the step')})"
    return place


def _product(names: Symbols, sections) -> list[str]:
    feed, weights, store = sections["feed"], sections["weights"], sections["store"]
    lines = []
    for which in "ab":
        load = sections[f"load_{which}"]
        if not load["enable"]:
            lines.append(f"load {which.upper()}    keeps what the buffer holds")
            continue
        text = f"{_address(names, Opcode.PRODUCT, sections, f'load_{which}', 'address')}: " \
               f"{load['tiles']} planes of {load['runs']} runs of {load['lines']} lines"
        if load["fold"]:
            text += (f"; folds {load['fold_rows']} image rows of {load['fold_row_bytes']} bytes into "
                     f"{load['fold_columns']} positions of {load['fold_kernel_bytes']} bytes")
        lines.append(f"load {which.upper()}    {text}")
    mode = Mode(feed["mode"])
    tiles, pixels = ([feed[f"{loop}{k}"] for k in range(count)] for loop, count in (("tiles", 4), ("pixels", 3)))
    if mode is not Mode.GRADIENT:
        lines.append(f"weights   {names.place(weights['address'])}: {math.prod(tiles)} tiles")
    reduce = [str(k) for k in range(4) if feed["reduce"] >> k & 1]
    text = f"{mode.name}: tiles {_extent(tiles)}, pixels {_extent(pixels)} (image, row, column)"
    text += f"; sums over tile loop {' and '.join(reduce)}" if reduce else ""
    text += f"; taps inside {feed['rows']} x {feed['columns']}" if mode is not Mode.GRADIENT else ""
    lines.append(f"feed      {text}; {'starts from zero' if feed['first'] else 'adds to the accumulators'}")
    if feed["last"]:
        extent = _extent([store[f"count{k}"] for k in range(4)])
        clear = "starting anew" if store["range_clear"] else "continued"
        lines.append(f"store     {names.place(store['address'])}: {extent} runs of {store['run']} vectors; largest "
                     f"magnitude, {clear}, to {names.register(store['range_register'])}")
    else:
        lines.append("store     nothing: the sums stay in the accumulators")
    return lines


def _vector(names: Symbols, sections) -> list[str]:
    vector = sections["vector"]
    function = Function(vector["function"])
    text = f"{function.name} over {_extent([vector[f'count{k}'] for k in range(5)])}"
    if function in (Function.ELEMENTWISE, Function.UPDATE):
        rounding = next(rule.name for rule in Rounding if rule.code == vector["rounding"])
        text += f", shift {names.register(vector['shift_register'])}, {rounding.lower()}"
    if function is Function.WIDE:
        text += f", microprogram {vector['microprogram']}"
        if vector["ranges"]:
            text += f", {vector['ranges']} bit lengths from {names.register(vector['range_register'])} on"
    if function in (Function.NITI_LOSS, Function.SOFTMAX):
        text += f", {vector['classes']} classes, exponent {names.register(vector['shift_register'])}"
    for name, what in (("relu", "ReLU"), ("mask", "zero where source 1 is not above zero"), ("pool", "2x2 maximum"),
                       ("unpool", "to the place of the maximum")):
        text += f", {what}" if vector[name] else ""
    lines = [f"do        {text}"]
    enabled = {"source0": function is not Function.FILL, "source1": vector["enable"] & 1,
               "source2": vector["enable"] & 2, "target0": vector["enable"] & 8, "target1": vector["enable"] & 4}
    widths = {"source0": vector["source0_width"], "source1": vector["source1_width"],
              "target0": vector["target_width"]}
    for name, on in enabled.items():
        if on:
            strides = _extent([vector[f"{name}_stride{k}"] for k in range(5)]).replace(" x ", ", ")
            lines.append(f"{name[:-1]} {name[-1]}  {_address(names, Opcode.VECTOR, sections, 'vector', name)}: "
                         f"{WIDTHS.get(widths.get(name, 0), '?')}, strides {strides}")
    return lines


def _scalar(names: Symbols, sections) -> list[str]:
    scalar = sections["scalar"]
    lines = []
    if scalar["enable_load"]:
        lines.append(f"load      {_address(names, Opcode.SCALAR, sections, 'scalar', 'load')}")
    words = [scalar[f"operation{k}"] for k in range(min(scalar["count"], SCALAR_OPERATIONS))]
    if scalar["microprogram"]:
        start = scalar["microprogram_address"]
        return [f"microprogram word {start + k:3}  {line}" for k, line in enumerate(disassemble_wide(words))]
    for operation in disassemble(words):
        used = dict.fromkeys(int(part[1:]) for part in operation.replace(",", "").split()[1:] if part[0] == "r")
        comment = ", ".join(f"r{number} {names.registers[number]}" for number in used if number in names.registers)
        lines.append(f"{operation:40}{'; ' if comment else ''}{comment}".rstrip())
    if scalar["enable_dump"]:
        place = _address(names, Opcode.SCALAR, sections, "scalar", "dump")
        # Dumps inside a step lie behind that of its end.
        lines.append(f"dump      all registers to {place}{'' if '+' in place else ': the step is done'}")
    return lines


def _loop(names: Symbols, sections) -> list[str]:
    loop = sections["loop"]
    if loop["count"] == 1:
        return ["waits for everything before it"]
    steps = [f"base {k} ({BASES[k]})" if k in BASES else f"base {k}" for k in range(8) if loop[f"increment{k}"]]
    moved = [f"{name} += {loop[f'increment{name.split()[1]}']}" for name in steps]
    what = "training steps" if loop["step"] else "turns"
    return [f"back to {loop['target']:#x} until {loop['count']} {what} are made", *moved]


_LINES = {Opcode.PRODUCT: _product, Opcode.VECTOR: _vector, Opcode.SCALAR: _scalar, Opcode.LOOP: _loop,
          Opcode.END: lambda names, sections: ["raises the interrupt"]}


def text(raw: bytes, number: int, address: int, names: Symbols) -> list[str]:
    """One descriptor: a line with its number, address, opcode, layer and pass, then a line per thing it does."""
    opcode, sections = decode(raw)
    header = sections["header"]
    tag = names.tags.get(header["tag"], f"tag {header['tag']}") if opcode not in (Opcode.LOOP, Opcode.END) else ""
    waits = [f"{header[f'wait_{engine}']} {what}" for engine, what in (("product", "products"), ("vector", "vectors"))
             if header[f"wait_{engine}"]]
    head = f"{number:4}  {address:#010x}  {opcode.name:8} {tag:24} {'after ' + ', '.join(waits) if waits else ''}"
    return [head.rstrip(), *(f"      {line}" for line in _LINES[opcode](names, sections))]


def listing(image: bytes, address: int, names: Symbols) -> list[str]:
    """All descriptors of a program up to END; raises `ProgramError` that names the place."""
    if not image or len(image) % DESCRIPTOR_BYTES:
        raise ProgramError(f"{len(image)} bytes are no program: descriptors have {DESCRIPTOR_BYTES} bytes")
    lines = [f"; {names.title}"] if names.title else []
    for number in range(len(image) // DESCRIPTOR_BYTES):
        start = number * DESCRIPTOR_BYTES
        raw = image[start:start + DESCRIPTOR_BYTES]
        try:
            lines += text(raw, number, address + start, names)
        except (ProgramError, ValueError, StopIteration) as error:
            reason = str(error) or "unknown rounding"
            raise ProgramError(f"descriptor {number} at {address + start:#x}: {reason}") from None
        if raw[0] == Opcode.END:
            return lines
    raise ProgramError("the program has no END")


def producers(compiled, name: str, index: tuple | None) -> list[int]:
    """Numbers of the descriptors that make an element of golden's record ``name`` (an exponent: ``index`` None)."""
    blocks = compiled.program.blocks
    if name in compiled.scalars:
        register = compiled.scalars[name] % REGISTERS        # the rest says in which dump of the step
        return [number for number, block in enumerate(blocks) if block.opcode is Opcode.SCALAR
                and any(block.sections["scalar"].get(f"operation{k}", 0) >> 6 & 63 == register
                        for k in range(block.sections["scalar"]["count"]))]
    tensor = compiled.tensors[name]
    line = element_address(tensor, index) // compiled.config.line_bytes * compiled.config.line_bytes
    return [number for number, block in enumerate(blocks)
            if any(access.write and line in access.lines
                   for access in accesses(compiled.config, block.opcode, block.sections))]


def element_address(tensor, index: tuple) -> int:
    """Byte address of an element of a :class:`sim.compiler.Tensor`."""
    marked = np.zeros(tensor.shape, tensor.region.layout.dtype)
    marked[index] = 1
    return tensor.region.address + int(np.flatnonzero(np.frombuffer(tensor.region.layout.pack(marked), np.uint8))[0])


def disassemble_path(path: Path, address: int | None = None) -> list[str]:
    """The listing of a program file, or of every program of a run's folder. A file that a run wrote finds its names
    in the programs.json beside it; others start at ``address`` (default 0)."""
    path = Path(path)
    if path.is_dir():
        folder = path / "run" if (path / "run").is_dir() else path
        files = sorted(folder.glob("program-*.bin"), key=lambda file: int(file.stem.split("-")[1]))
        if not files:
            raise ProgramError(f"{path} is no folder of a run: it has no run/program-0.bin")
        return [line for file in files for line in [*disassemble_path(file, address), ""]][:-1]
    try:
        image = path.read_bytes()
    except OSError as error:
        raise ProgramError(f"cannot read {path}: {error.strerror}") from None
    names, beside = Symbols(), path.parent / "programs.json"
    if beside.exists():
        try:
            known = json.loads(beside.read_text())
            names = Symbols.from_json(known[hashlib.sha256(image).hexdigest()])
        except KeyError:
            pass
        except (ValueError, TypeError) as error:
            raise ProgramError(f"{beside} is damaged: {error}") from None
    try:
        return listing(image, names.address if address is None else address, names)
    except ProgramError as error:
        raise ProgramError(f"{path}: {error}") from None
