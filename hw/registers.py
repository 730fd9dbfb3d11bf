"""The host's view of the core: AXI4-Lite slave, built from the register map."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .axi import REGISTER_ADDRESS_BITS, Axi4Lite, Response
from .config import CoreConfig
from .errors import ERROR_BITS
from .register_map import COUNTER_BITS, MAX_COUNTERS, REGISTERS, Access, Register, constants

__all__ = ["LiteSlave", "Registers"]

WORD_ADDRESS_BITS = REGISTER_ADDRESS_BITS - 2


class LiteSlave(wiring.Component):
    """AXI4-Lite slave that turns bus accesses into one write and one read access at a time.

    Attributes
    ----------
    bus : In(Axi4Lite).
    write : Out(1)  one cycle: store ``write_data`` under ``write_mask`` at word ``write_word``;
        ``write_refused`` In(1) in the same cycle answers SLVERR.
    read : Out(1)  one cycle: ``read_data`` In(32) of word ``read_word`` is taken, SLVERR if ``read_refused``.

    The word addresses are stable from the cycle before ``write`` or ``read`` on. A write takes at least three cycles
    from its last channel's handshake to BVALID, a read three to RVALID.
    """

    def __init__(self):
        super().__init__({
            "bus": In(Axi4Lite()),
            "write": Out(1), "write_word": Out(WORD_ADDRESS_BITS), "write_data": Out(32), "write_mask": Out(32),
            "write_refused": In(1),
            "read": Out(1), "read_word": Out(WORD_ADDRESS_BITS), "read_data": In(32), "read_refused": In(1)})

    def elaborate(self, platform):
        m = Module()
        bus = self.bus
        have_address, have_data, strobe, have_read = Signal(), Signal(), Signal(4), Signal()
        complete, decoded_write, decoded_read = Signal(), Signal(), Signal()
        m.d.sync += [decoded_write.eq(complete & ~self.write), decoded_read.eq(have_read & ~self.read)]
        m.d.comb += [
            complete.eq(have_address & have_data & ~bus.bvalid),
            self.write.eq(complete & decoded_write), self.read.eq(have_read & decoded_read),
            bus.awready.eq(~have_address), bus.wready.eq(~have_data),
            self.write_mask.eq(Cat(bit.replicate(8) for bit in strobe)),
            bus.arready.eq(~have_read & ~bus.rvalid),
        ]
        with m.If(bus.awvalid & bus.awready):
            m.d.sync += [have_address.eq(1), self.write_word.eq(bus.awaddr[2:])]
        with m.If(bus.wvalid & bus.wready):
            m.d.sync += [have_data.eq(1), self.write_data.eq(bus.wdata), strobe.eq(bus.wstrb)]
        with m.If(bus.bready):
            m.d.sync += bus.bvalid.eq(0)
        with m.If(self.write):
            m.d.sync += [have_address.eq(0), have_data.eq(0), bus.bvalid.eq(1),
                         bus.bresp.eq(Mux(self.write_refused, Response.SLVERR, Response.OKAY))]
        with m.If(bus.arvalid & bus.arready):
            m.d.sync += [have_read.eq(1), self.read_word.eq(bus.araddr[2:])]
        with m.If(bus.rready):
            m.d.sync += bus.rvalid.eq(0)
        with m.If(self.read):
            m.d.sync += [have_read.eq(0), bus.rvalid.eq(1), bus.rdata.eq(Mux(self.read_refused, 0, self.read_data)),
                         bus.rresp.eq(Mux(self.read_refused, Response.SLVERR, Response.OKAY))]
        return m


class Registers(wiring.Component):
    """All registers of ``hw.register_map`` and the life cycle of a run (docs/registers.md).

    Parameters
    ----------
    config : the configuration the read-only registers describe.
    counters : number of performance counters, at most 64.

    Attributes (to and from the core)
    ----------
    bus : In(Axi4Lite).  interrupt : Out(1), registered.
    start : Out(1)  one cycle, the doorbell; settings below are stable from here until the run ends.
    soft_reset : Out(1)  one cycle.
    program, window_base, window_limit, seed, step : Out(32).
    step_advance : In(1)  one cycle: the step counts up.
    zero : In(1)  a unit met an all-zero tensor: STATUS.zero, sticky.
    idle : In(1)  no unit works and memory owes no answer. After an error, the first idle cycle ends the run.
    done : In(1)  one cycle: the program has ended and all its writes are acknowledged.
    error : In(1)  an error; in the first cycle of a run in which it is high, ``error_code``, ``error_descriptor``
        and ``error_address`` are taken. It may stay high until ``soft_reset``.
    counter_select : Out  number of the counter that the host wants to see. counter : In(48)  its value, two cycles
        later.
    """

    def __init__(self, config: CoreConfig, counters: int):
        if not 1 <= counters <= MAX_COUNTERS:
            raise ValueError(f"the core has 1 to {MAX_COUNTERS} performance counters, not {counters}")
        self.config = config
        self.counters = counters
        super().__init__({
            "bus": In(Axi4Lite()), "interrupt": Out(1), "start": Out(1), "soft_reset": Out(1),
            "program": Out(32), "window_base": Out(32), "window_limit": Out(32), "seed": Out(32), "step": Out(32),
            "step_advance": In(1), "idle": In(1), "done": In(1), "zero": In(1),
            "error": In(1), "error_code": In(ERROR_BITS), "error_descriptor": In(32), "error_address": In(32),
            "counter_select": Out(range(MAX_COUNTERS)), "counter": In(COUNTER_BITS)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.slave = slave = LiteSlave()
        wiring.connect(m, wiring.flipped(self.bus), slave.bus)

        # What each field reads as. READ_WRITE and CLEAR fields are registers; COMMAND fields stay 0.
        values = {key: Const(value, 32) for key, value in constants(self.config, self.counters).items()}
        for register in REGISTERS:
            for field in register.fields:
                if (register.name, field.name) not in values:
                    values[register.name, field.name] = Signal(field.bits, name=f"{register.name}_{field.name}".lower())
        self._bus_access(m, slave, values)
        self._run(m, slave, values)

        m.d.comb += [self.counter_select.eq(values["COUNTER_SELECT", "index"]),
                     values["COUNTER_VALUE", "value"].eq(self.counter)]
        with m.If(slave.read & self._reading["COUNTER_VALUE"]):
            m.d.sync += values["COUNTER_VALUE_HIGH", "value"].eq(self.counter[32:])

        for name in ("program", "window_base", "window_limit", "seed", "step"):
            m.d.comb += getattr(self, name).eq(values[name.upper(), "value"])
        with m.If(self.step_advance):
            m.d.sync += values["STEP", "value"].eq(values["STEP", "value"] + 1)
        return m

    def _bus_access(self, m: Module, slave: LiteSlave, values: dict):
        """Reads, and writes to READ_WRITE and CLEAR fields; what is refused."""
        mask = slave.write_mask
        command = slave.write_data & mask
        # Which register an access means is decoded in the cycle before it.
        self._reading, self._writing, words = {}, {}, []
        for register in REGISTERS:
            name, word = register.name.lower(), Signal(32, name=f"{register.name}_word".lower())
            reading, writing = Signal(name=f"reading_{name}"), Signal(name=f"writing_{name}")
            self._reading[register.name], self._writing[register.name] = reading, writing
            m.d.sync += [reading.eq(slave.read_word == register.offset // 4),
                         writing.eq(slave.write_word == register.offset // 4)]
            m.d.comb += [word[field.low:field.low + field.bits].eq(values[register.name, field.name])
                         for field in register.fields]
            words.append(word)
        reading = Cat(self._reading.values())
        m.d.comb += [slave.read_refused.eq(~reading.any()), slave.read_data.eq(_chosen(reading, words)),
                     slave.write_refused.eq(~Cat(
                         self._writing[register.name] & ~self._refusal(register, command, values)
                         for register in REGISTERS if register.writable).any())]
        for register in REGISTERS:
            permitted = slave.write & self._writing[register.name] & ~self._refusal(register, command, values)
            for field in register.fields:
                value, part = values[register.name, field.name], slice(field.low, field.low + field.bits)
                if field.access == Access.READ_WRITE:
                    with m.If(permitted):
                        m.d.sync += value.eq((value & ~mask[part]) | command[part])
                elif field.access == Access.CLEAR:
                    with m.If(permitted):
                        m.d.sync += value.eq(value & ~command[part])

    def _refusal(self, register: Register, command: Signal, values: dict):
        if register.name == "CONTROL":
            start, reset = command[_low("CONTROL", "start")], command[_low("CONTROL", "reset")]
            return start & ~reset & (values["STATUS", "busy"] | values["STATUS", "error"] | ~self.idle)
        return values["STATUS", "busy"] if register.idle_only else Const(0)

    def _run(self, m: Module, slave: LiteSlave, values: dict):
        """Doorbell to end: status, error, cycles, interrupt."""
        command = slave.write_data & slave.write_mask
        control = slave.write & ~slave.write_refused & self._writing["CONTROL"]
        busy, done, error = (values["STATUS", name] for name in ("busy", "done", "error"))
        events = {name: values["IRQ_STATUS", name] for name in ("done", "error")}
        cycles = Signal(64)
        start, reset, failing, ended = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            reset.eq(control & command[_low("CONTROL", "reset")]),
            start.eq(control & command[_low("CONTROL", "start")] & ~reset),
            failing.eq(busy & self.error & ~error),
            ended.eq(busy & (error & self.idle | self.done & ~error & ~failing)),
            values["STATUS", "idle"].eq(self.idle), values["CYCLES", "value"].eq(cycles[:32]),
        ]
        m.d.sync += [self.start.eq(start), self.soft_reset.eq(reset),
                     self.interrupt.eq(Cat(event & values["IRQ_ENABLE", name] for name, event in events.items()).any())]
        with m.If(failing):
            m.d.sync += [error.eq(1), values["ERROR_CODE", "code"].eq(self.error_code),
                         values["ERROR_DESCRIPTOR", "value"].eq(self.error_descriptor),
                         values["ERROR_ADDRESS", "value"].eq(self.error_address)]
        with m.If(busy):
            m.d.sync += cycles.eq(cycles + 1)
        with m.If(ended):
            m.d.sync += [busy.eq(0), done.eq(~error), events["done"].eq(events["done"] | ~error),
                         events["error"].eq(events["error"] | error)]
        with m.If(self.zero):
            m.d.sync += values["STATUS", "zero"].eq(1)
        with m.If(self.start):       # the first cycle; `start` itself is late in its cycle
            m.d.sync += cycles.eq(1)
        with m.If(start):
            m.d.sync += [busy.eq(1), done.eq(0), values["STATUS", "zero"].eq(0)]
        with m.If(reset):
            m.d.sync += [signal.eq(0) for signal in (busy, done, error, values["STATUS", "zero"],
                                                       values["ERROR_CODE", "code"], *events.values())]
        with m.If(slave.read & self._reading["CYCLES"]):
            m.d.sync += values["CYCLES_HIGH", "value"].eq(cycles[32:])


def _chosen(one_hot, values):
    """The value whose bit is set, 0 if none is."""
    result = 0
    for bit, value in zip(one_hot, values, strict=True):
        result = result | (value & bit.replicate(len(value)))
    return result


def _low(register: str, field: str) -> int:
    return next(f.low for r in REGISTERS if r.name == register for f in r.fields if f.name == field)
