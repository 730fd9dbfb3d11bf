"""The scalar unit: 64 registers for shifts, maxima and exponents, and the short programs that compute them.

An operation is one 32-bit word: ``op`` in bits 0-5, ``dst`` 6-11, ``a`` 12-17, ``b`` 18-23 and ``imm`` 24-31
(signed). SET uses bits 12-31 as one signed constant; SELECT_ZERO and SELECT_POSITIVE use the low six bits of
``imm`` as the number of a third register. A word of zeros does nothing (SET of register 0).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from functools import reduce
from operator import or_

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .descriptor import SCALAR, SCALAR_OPERATIONS, ProgramError
from .interfaces import NO_BYPASS, ReadClient, WriteClient, data_register
from .range_detector import range_result

__all__ = ["Operation", "REGISTERS", "ZERO", "STEP", "ScalarUnit", "assemble", "disassemble", "operation_slot", "run",
           "scalar_command"]

REGISTERS = 64
ZERO = 0
"""Register that reads as zero."""
STEP = 63
"""Register that reads as the number of the training step."""

# A command without its operations, and where these are: which half of their memory.
scalar_command = data.StructLayout({
    field.name: field.shape for field in SCALAR.fields if not field.name.startswith("operation")} | {"half": 1})
# An operation on its way to that memory.
operation_slot = data.StructLayout({"valid": 1, "half": 1, "number": range(SCALAR_OPERATIONS), "word": 32})

EXPONENT_LIMIT = 32767
SQRT2 = 0xB504F334
"""Smallest integer above sqrt(2) * 2**31: from here on, the next power of two is the nearer one."""


class Operation(enum.IntEnum):
    """What a scalar operation writes to ``dst``. Arithmetic is signed 32 bits and wraps."""
    SET = 0               # constant (signed 20 bits)
    ADD = 1               # a + b
    SUB = 2               # a - b
    ADDI = 3              # a + imm
    MIN = 4               # the smaller of a and b
    MAX = 5               # the larger of a and b
    CEIL_LOG2 = 6         # golden.range.ceil_log2 of a, taken as unsigned
    BIT_LENGTH = 7        # golden.range.bit_length of a, taken as unsigned
    NEAREST_LOG2 = 8      # golden.range.nearest_log2 of a, as unsigned; of 0: 0 and the note `zero_range`
    SELECT_ZERO = 9       # a if register imm is 0, else b
    SELECT_POSITIVE = 10  # a if register imm is above 0, else b
    WORD = 11             # the 32-bit word fetched from address `load` of the descriptor
    EXPONENT = 12         # a + b, saturated to signed 16 bits with the error `exponent`


_FIELDS = {
    Operation.SET: ("constant",),
    Operation.ADDI: ("a", "imm"),
    Operation.CEIL_LOG2: ("a",), Operation.BIT_LENGTH: ("a",), Operation.NEAREST_LOG2: ("a",),
    Operation.SELECT_ZERO: ("a", "b", "c"), Operation.SELECT_POSITIVE: ("a", "b", "c"),
    Operation.WORD: (),
}
_PLACES = {"dst": (6, 6, False), "a": (12, 6, False), "b": (18, 6, False), "c": (24, 6, False),
           "imm": (24, 8, True), "constant": (12, 20, True)}    # first bit, bits, signed


def _names(operation: Operation) -> tuple[str, ...]:
    return "dst", *_FIELDS.get(operation, ("a", "b"))


def assemble(operations: Iterable[Sequence[int]]) -> list[int]:
    """Words of ``(Operation, dst, ...)`` tuples; after ``dst`` come

    ``constant`` for SET, nothing for WORD, ``a`` for the logarithms, ``a, imm`` for ADDI, ``a, b, c`` for
    SELECT_ZERO and SELECT_POSITIVE (c is the tested register), ``a, b`` for the others.
    Raises :class:`ProgramError` naming the operation for a wrong number of operands, a value that does not
    fit, a write to a read-only register or too many operations for one descriptor.
    """
    words = []
    for index, (code, *operands) in enumerate(operations):
        try:
            operation = Operation(code)
        except ValueError:
            raise ProgramError(f"scalar operation {index}: unknown code {code}") from None
        names = _names(operation)
        if len(operands) != len(names):
            raise ProgramError(f"scalar operation {index}: {operation.name} takes {', '.join(names)}; "
                               f"got {len(operands)} operands")
        word = int(operation)
        for name, value in zip(names, operands, strict=True):
            low_bit, bits, sign = _PLACES[name]
            low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if sign else (0, (1 << bits) - 1)
            if not low <= value <= high:
                raise ProgramError(f"scalar operation {index}: {operation.name} {name} = {value} "
                                   f"does not fit {low}..{high}")
            word |= (int(value) & (1 << bits) - 1) << low_bit
        if operands[0] in (ZERO, STEP) and word:
            raise ProgramError(f"scalar operation {index}: {operation.name} writes register "
                               f"{operands[0]}, which is read-only; use 1..{STEP - 1}")
        words.append(word)
    if len(words) > SCALAR_OPERATIONS:
        raise ProgramError(f"{len(words)} scalar operations; a descriptor holds {SCALAR_OPERATIONS}: "
                           "split them")
    return words


def _decode(word: int) -> tuple[Operation, dict[str, int]]:
    try:
        operation = Operation(word & 63)
    except ValueError:
        raise ProgramError(f"unknown scalar operation {word & 63} in word {word:#010x}") from None
    fields = {}
    for name in _names(operation):
        low_bit, bits, sign = _PLACES[name]
        value = word >> low_bit & (1 << bits) - 1
        fields[name] = value - (1 << bits) if sign and value >> bits - 1 else value
    return operation, fields


def disassemble(words: Iterable[int]) -> list[str]:
    """One line of text for each word, such as ``ADDI r5, r4, -7``.

    Raises :class:`ProgramError` for an unknown code.
    """
    lines = []
    for word in words:
        operation, fields = _decode(word)
        operands = (str(value) if name in ("imm", "constant") else f"r{value}" for name, value in fields.items())
        lines.append(f"{operation.name} {', '.join(operands)}")
    return lines


def run(words: Iterable[int], registers: Sequence[int], word: int = 0) -> tuple[list[int], set[str]]:
    """What :class:`ScalarUnit` does, in Python: the registers afterwards and the names of the errors.

    ``registers`` are 64 signed 32-bit values, entry 63 being the step; ``word`` is what WORD gives.
    """
    values = list(registers)
    if len(values) != REGISTERS:
        raise ValueError(f"{REGISTERS} registers are needed, not {len(values)}")
    values[ZERO] = 0
    errors = set()
    for code in words:
        operation, f = _decode(code)
        a, b, c = (values[f.get(name, ZERO)] for name in ("a", "b", "c"))
        magnitude = a & 0xFFFFFFFF
        match operation:
            case Operation.SET:
                result = f["constant"]
            case Operation.ADD:
                result = a + b
            case Operation.SUB:
                result = a - b
            case Operation.ADDI:
                result = a + f["imm"]
            case Operation.MIN:
                result = min(a, b)
            case Operation.MAX:
                result = max(a, b)
            case Operation.CEIL_LOG2:
                result = (magnitude - 1).bit_length() if magnitude else 0
            case Operation.BIT_LENGTH:
                result = magnitude.bit_length()
            case Operation.NEAREST_LOG2:
                power = max(magnitude.bit_length() - 1, 0)
                result = power + (magnitude * magnitude > 1 << 2 * power + 1)
                if not magnitude:
                    errors.add("zero_range")
            case Operation.SELECT_ZERO:
                result = a if c == 0 else b
            case Operation.SELECT_POSITIVE:
                result = a if c > 0 else b
            case Operation.WORD:
                result = word
            case Operation.EXPONENT:
                result = max(-EXPONENT_LIMIT - 1, min(EXPONENT_LIMIT, a + b))
                if result != a + b:
                    errors.add("exponent")
        if f["dst"] not in (ZERO, STEP):
            values[f["dst"]] = (result + (1 << 31)) % (1 << 32) - (1 << 31)
    return values, errors


class ScalarUnit(wiring.Component):
    """Holds the scalar registers, runs SCALAR descriptors and takes maxima from the product engine.

    A command fetches the line that holds the word at ``load`` (``enable_load``), runs the operations and
    then, with ``enable_dump``, writes all 64 registers as little-endian int32, register k at ``dump + 4 k``
    (``dump`` must be the start of a line), once all earlier lines of ``write`` are acknowledged. The registers
    are not reset: a program sets what it reads.

    Attributes
    ----------
    operation : In(operation_slot)  an operation of a command that comes later; in the other half of the memory than
        those of the command that runs.
    command : In stream of scalar_command; ready for one cycle at the end of the command.
    done : Out(1)  pulse with ``ready``: everything the command wrote is acknowledged.
    range : In(range_result)  S[register] = value if clear else max(S[register], value), unsigned; accepted
        in every other cycle.
    step : In(32)  what register 63 reads.
    store_enable, store_address, store_word : Out  a command with ``microprogram`` gives the wide lanes its words
        here, one in every other cycle, instead of running operations.
    select, value : value of register ``select`` of two cycles before, while no command is running. A change of
        ``step`` takes up to 6 cycles more, in which no command may begin.
    read, write : memory clients, one line at a time.
    exponent, zero_range, illegal : Out(1)  pulses: EXPONENT saturated; NEAREST_LOG2 of 0; unknown operation (it
        writes nothing) or a count above the descriptor's size (nothing runs).

    Throughput: 4 cycles an operation, 5 for EXPONENT, 7 for the three that count bits, more while ranges arrive. The
    dump takes one cycle per register and one or more per line. A range is in its register 4 cycles later; operations
    wait for that.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            "operation": In(operation_slot), "command": In(stream.Signature(scalar_command)), "done": Out(1),
            "range": In(range_result), "step": In(32),
            "select": In(range(REGISTERS)), "value": Out(signed(32)),
            "read": Out(ReadClient(config)), "write": Out(WriteClient(config)),
            "store_enable": Out(1), "store_address": Out(9), "store_word": Out(32),
            "exponent": Out(1), "zero_range": Out(1), "illegal": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes = self.config.lanes
        line_bits = (self.config.line_bytes - 1).bit_length()
        command = self.command.p

        m.submodules.registers = registers = memory.Memory(shape=signed(32), depth=REGISTERS, init=[])
        write = registers.write_port()

        def read_port(address):
            port = registers.read_port(domain="comb")
            m.d.comb += port.addr.eq(address)
            return port.data

        index = Signal(range(SCALAR_OPERATIONS + 1))  # of the next operation
        ended = Signal()                              # no operation is left; two cycles after a change of `index`
        m.d.sync += ended.eq(index == command.count)
        # A block RAM, with a register behind it as its output is late. `index` is two cycles old then.
        number_bits = (SCALAR_OPERATIONS - 1).bit_length()
        m.submodules.operations = operations = memory.Memory(shape=32, depth=2 << number_bits, init=[],
                                                             attrs=NO_BYPASS | {"ram_style": "block"})
        slot, coming = operations.write_port(), operations.read_port()
        m.d.comb += [slot.en.eq(self.operation.valid), slot.data.eq(self.operation.word),
                     slot.addr.eq(Cat(self.operation.number, self.operation.half)),
                     coming.addr.eq(Cat(index[:number_bits], command.half))]
        operation = data.View(data.StructLayout({"op": 6, "dst": 6, "a": 6, "b": 6, "imm": signed(8)}),
                              Signal(32, name="operation", reset_less=True))
        # The address of port b is in a register of its own, which also counts through what is dumped. Its word stays in
        # the memory's output while the operation waits for its operands.
        address_b = Signal(range(REGISTERS), reset_less=True)
        m.d.sync += address_b.eq(coming.data[18:24])
        m.d.comb += self.store_word.eq(operation.as_value())

        # A range is read-modify-write: arrival, old value, comparison, larger one.
        arrived, compared, written = (Signal(range_result, name=name) for name in ("arrived", "compared", "written"))
        old, kept, larger = Signal(32, reset_less=True), Signal(32, reset_less=True), Signal(32)
        replaces = Signal()
        m.d.sync += [arrived.eq(self.range), compared.eq(arrived), written.eq(compared), kept.eq(old),
                     replaces.eq(compared.clear | (old < compared.value))]
        m.d.comb += larger.eq(Mux(replaces, written.value, kept))
        pending = self.range.valid | arrived.valid | compared.valid | written.valid

        running = Signal()                            # a register: the address must come early
        a = read_port(Mux(arrived.valid, arrived.register, operation.a))
        b = read_port(address_b)
        select, operand_c = Signal.like(self.select), Signal(signed(32))
        m.d.sync += [select.eq(self.select),
                     operand_c.eq(read_port(Mux(running, operation.imm.as_unsigned()[:6], select))),
                     old.eq(Mux(written.valid & (written.register == arrived.register), larger, a))]
        m.d.comb += self.value.eq(operand_c)

        chosen, result = Signal(signed(32)), Signal(signed(32))
        # Registers: states COMMIT; FETCH and STORE.
        committing, fetching = Signal(), Signal()
        m.d.sync += fetching.eq(0)
        with m.If(fetching | (committing & ~written.valid)):
            m.d.sync += operation.as_value().eq(coming.data)
        known, writes = Signal(), Signal()
        # Between commands ZERO and STEP are written in turn, as results are, so that nothing tells them from the others
        # where a register is read.
        refreshing, turn = Signal(), Signal()
        m.d.sync += refreshing.eq(0)
        m.d.comb += [write.addr.eq(Mux(refreshing, Mux(turn, STEP, ZERO), operation.dst)), write.data.eq(result),
                     write.en.eq((committing & writes) | refreshing)]
        with m.If(written.valid):
            m.d.comb += [write.addr.eq(written.register), write.data.eq(larger),
                         write.en.eq(~written.register.matches(ZERO, STEP))]

        # First cycle of an operation: operands. Second: sum and normalisation begun. Counting bits takes three cycles
        # more. Then the choice of the result; last, its writing.
        operand_a, operand_b = Signal(signed(32)), Signal(signed(32))
        subtracts, immediate = Signal(), Signal()
        total, empty_c = Signal(signed(33)), Signal()     # empty_c: operand c is 0
        begun, normal = Signal(32), Signal(32)        # operand a shifted left until bit 31 is set, and how far
        far, zeros = Signal(2), Signal(5)
        exact, below = Signal(), Signal()             # a power of two; nearer to the next lower one
        word = Signal(32)

        def normalised(value, distances):
            """``value`` shifted left by each distance if that loses no one; the choices, the last lowest."""
            choices = []
            for distance in distances:
                empty = Signal(name=f"top_{distance}_empty")
                narrowed = Signal(32, name=f"normal_{distance}")
                m.d.comb += [empty.eq(value[32 - distance:] == 0),
                             narrowed.eq(Mux(empty, value << distance, value))]
                value, choices = narrowed, [empty, *choices]
            return value, Cat(choices)

        length, bits = Signal(6), Signal(6)           # of operand a; what an operation makes of it
        m.d.comb += length.eq(Mux(normal[-1], 32 - zeros, 0))
        # By 16 and 8 at once: which bytes are empty is known early.
        bytes_empty = [operand_a[k:k + 8] == 0 for k in (8, 16, 24)]
        upper = bytes_empty[1] & bytes_empty[2]
        choices = Cat(Mux(upper, bytes_empty[0], bytes_empty[2]), upper)
        at_16 = Array(operand_a.as_unsigned()[:32 - 8 * k] << 8 * k for k in range(4))[choices]
        at_1, more_choices = normalised(begun, (4, 2, 1))
        m.d.sync += [begun.eq(at_16), far.eq(choices), normal.eq(at_1), zeros.eq(Cat(more_choices, far)),
                     exact.eq(normal == 1 << 31), below.eq(normal < SQRT2)]
        first, over, under = Signal(), Signal(), Signal()       # first: a is chosen, not b
        beyond = total[EXPONENT_LIMIT.bit_length():]            # copies of the sign, if the limit is kept

        def is_one(*operations):
            """A register, right from the second cycle of an operation on."""
            flag = Signal(name=f"is_{operations[0].name.lower()}")
            m.d.sync += flag.eq(operation.op.matches(*operations))
            return flag

        less, greater, zero, positive = (is_one(operation) for operation in (
            Operation.MIN, Operation.MAX, Operation.SELECT_ZERO, Operation.SELECT_POSITIVE))
        constant, fetched, exponent = is_one(Operation.SET), is_one(Operation.WORD), is_one(Operation.EXPONENT)
        sums = is_one(Operation.ADD, Operation.SUB, Operation.ADDI)
        counting = is_one(Operation.CEIL_LOG2, Operation.BIT_LENGTH, Operation.NEAREST_LOG2)
        choosing = less | greater | zero | positive
        early = Signal(signed(32))                    # a constant or the word from memory
        m.d.sync += [
            early.eq(Mux(constant, operation.as_value()[12:].as_signed(), Mux(fetched, word.as_signed(), 0))),
            over.eq(exponent & ~total[-1] & beyond.any()), under.eq(exponent & total[-1] & ~beyond.all()),
        ]
        sources = ((sums | (exponent & ~over & ~under), total), (over, EXPONENT_LIMIT), (under, -EXPONENT_LIMIT - 1),
                   (choosing & first, operand_a), (choosing & ~first, operand_b), (counting, bits))
        m.d.comb += [
            first.eq((less & (total < 0)) | (greater & (total >= 0)) | (zero & empty_c)
                     | (positive & ~empty_c & ~operand_c[-1])),
            chosen.eq(reduce(or_, (Mux(flag, value, 0) for flag, value in sources), early)),
            known.eq(exponent | sums | choosing | counting | constant | fetched),
        ]

        unknown, beyond_limit, no_range = Signal(), Signal(), Signal()    # of the result
        m.d.sync += self.store_enable.eq(0)
        line = self.write.line
        line_data = data_register(m, line.p.data)
        lane = address_b[:(lanes - 1).bit_length()]
        m.d.comb += [line.p.strobe.eq(~0), self.read.request.p.eq(command.load >> line_bits)]
        with m.FSM():
            with m.State("IDLE"):
                following = turn ^ (refreshing & ~written.valid)
                m.d.sync += [turn.eq(following), refreshing.eq(1), result.eq(Mux(following, self.step, 0))]
                with m.If(self.command.valid):
                    m.d.sync += [running.eq(1), refreshing.eq(0)]
                    with m.If(command.count > SCALAR_OPERATIONS):
                        m.d.comb += self.illegal.eq(1)
                        m.next = "DONE"
                    with m.Elif(command.microprogram):
                        m.next = "STORED"
                    with m.Elif(command.enable_load):
                        m.d.sync += self.read.request.valid.eq(1)
                        m.next = "LOAD"
                    with m.Else():
                        m.d.sync += fetching.eq(1)
                        m.next = "FETCH"
            with m.State("STORE"):
                m.next = "STORED"
                with m.If(ended):
                    m.next = "DONE"
                with m.Else():
                    m.d.sync += [index.eq(index + 1), self.store_enable.eq(1),
                                 self.store_address.eq(command.microprogram_address + index)]
            with m.State("STORED"):
                m.d.sync += fetching.eq(1)
                m.next = "STORE"
            with m.State("LOAD"):
                with m.If(self.read.request.ready):
                    m.d.sync += [self.read.request.valid.eq(0), self.read.response.ready.eq(1)]
                    m.next = "LOADED"
            with m.State("LOADED"):
                with m.If(self.read.response.valid):
                    m.d.sync += [self.read.response.ready.eq(0),
                                 word.eq(self.read.response.p.word_select(command.load[2:line_bits], 32)),
                                 fetching.eq(1)]
                    m.next = "FETCH"
            with m.State("FETCH"):
                m.next = "OPERANDS"
            with m.State("OPERANDS"):
                m.d.sync += [
                    operand_a.eq(a), operand_b.eq(b),
                    subtracts.eq(operation.op.matches(Operation.SUB, Operation.MIN, Operation.MAX)),
                    immediate.eq(operation.op == Operation.ADDI),
                ]
                with m.If(ended):
                    m.d.sync += index.eq(0)
                    m.next = "DONE"
                    with m.If(command.enable_dump):
                        m.next = "QUIET"
                with m.Elif(~pending):
                    m.d.sync += index.eq(index + 1)
                    m.next = "COMPUTE"
            with m.State("COMPUTE"):
                addend = (Mux(immediate, operation.imm, operand_b) ^ subtracts.replicate(32))[:32].as_signed()
                m.d.sync += [total.eq(operand_a + addend + subtracts), empty_c.eq(operand_c == 0)]
                m.next = "RESULT"
                with m.If(operation.op.matches(Operation.CEIL_LOG2, Operation.BIT_LENGTH, Operation.NEAREST_LOG2)):
                    m.next = "NORMALIZE"
                with m.If(operation.op == Operation.EXPONENT):
                    m.next = "LIMIT"
            with m.State("LIMIT"):
                m.next = "RESULT"
            with m.State("NORMALIZE"):
                m.next = "COUNT"
            with m.State("COUNT"):
                m.next = "ROUND"
            with m.State("ROUND"):
                m.d.sync += bits.eq(length)
                with m.If(operation.op == Operation.CEIL_LOG2):
                    m.d.sync += bits.eq(length - exact)
                with m.If((operation.op == Operation.NEAREST_LOG2) & normal[-1]):
                    m.d.sync += bits.eq(length - below)
                m.next = "RESULT"
            with m.State("RESULT"):
                m.d.sync += [
                    result.eq(chosen), unknown.eq(~known), writes.eq(known & ~operation.dst.matches(ZERO, STEP)),
                    committing.eq(1), beyond_limit.eq(over | under),
                    no_range.eq((operation.op == Operation.NEAREST_LOG2) & (length == 0)),
                ]
                m.next = "COMMIT"
            with m.State("COMMIT"):
                with m.If(~written.valid):
                    m.d.comb += [self.illegal.eq(unknown), self.exponent.eq(beyond_limit),
                                 self.zero_range.eq(no_range)]
                    m.d.sync += committing.eq(0)
                    m.next = "OPERANDS"
            with m.State("QUIET"):
                m.d.sync += [line.p.address.eq(command.dump >> line_bits), address_b.eq(0)]
                with m.If(self.write.idle & ~pending):
                    m.next = "COLLECT"
            with m.State("COLLECT"):
                m.d.sync += [line_data.word_select(lane, 32).eq(b), address_b.eq(address_b + 1)]
                with m.If(lane.all()):
                    m.d.sync += line.valid.eq(1)
                    m.next = "DUMP"
            with m.State("DUMP"):
                m.d.sync += address_b.eq(address_b)      # it waits
                with m.If(line.ready):
                    m.d.sync += [line.valid.eq(0), line.p.address.eq(line.p.address + 1)]
                    m.next = "COLLECT"
                    with m.If(address_b == 0):
                        m.next = "DUMPED"
            with m.State("DUMPED"):
                # `idle` falls in the cycle after the last transfer at the latest, which is this one.
                m.next = "ACKNOWLEDGE"
            with m.State("ACKNOWLEDGE"):
                with m.If(self.write.idle):
                    m.next = "DONE"
            with m.State("DONE"):
                m.d.sync += index.eq(0)
                m.d.comb += [self.command.ready.eq(1), self.done.eq(1)]
                m.d.sync += running.eq(0)
                m.next = "IDLE"
        return m
