"""Why the core stopped: one code for the ERROR_CODE register, and a latch that keeps the first report."""

from __future__ import annotations

import enum

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .interfaces import ADDRESS_BITS

__all__ = ["ERROR_BITS", "ErrorCode", "ErrorReport", "ErrorLatch"]

ERROR_BITS = 4
CLIENT_BITS = 4


class ErrorCode(enum.IntEnum):
    """Contents of ERROR_CODE; each member carries a description for people in ``doc``."""

    def __new__(cls, value: int, doc: str):
        member = int.__new__(cls, value)
        member._value_ = value
        member.doc = doc
        return member

    NONE = 0, "no error"
    ILLEGAL_DESCRIPTOR = 1, "a descriptor has an unknown opcode or a field out of range"
    READ_OUTSIDE_WINDOW = 2, "a read outside WINDOW_BASE to WINDOW_LIMIT was requested; memory did not see it"
    WRITE_OUTSIDE_WINDOW = 3, "a write outside WINDOW_BASE to WINDOW_LIMIT was requested; memory did not see it"
    READ_FAILED = 4, "memory answered a read with an error response"
    WRITE_FAILED = 5, "memory answered a write with an error response"
    ACCUMULATOR_OVERFLOW = 6, "a sum of products left the int32 range"
    EXPONENT_SATURATED = 7, "a tensor's exponent left the signed 16-bit range"


class ErrorReport(wiring.Signature):
    """One source of errors: ``valid`` for one cycle with code, byte address and client (0 where not used)."""

    def __init__(self):
        super().__init__({"valid": Out(1), "report": Out(data.StructLayout({
            "code": ERROR_BITS, "address": ADDRESS_BITS, "client": CLIENT_BITS}))})


class ErrorLatch(wiring.Component):
    """Keeps the first of many errors until it is cleared.

    Attributes
    ----------
    sources : In(ErrorReport).array(n); of simultaneous reports the lowest index wins.
    found : Out(1)  an error is kept or was reported in the cycle before.
    clear : In(1)  forgets the error, and what is reported in this cycle or was in the one before.
    error, code, address, client : the error, from the second cycle after its report on.
    """

    def __init__(self, sources: int):
        if sources < 1:
            raise ValueError(f"an error latch needs at least one source, not {sources}")
        super().__init__({"sources": In(ErrorReport()).array(sources), "clear": In(1), "found": Out(1),
                          "error": Out(1), "code": Out(ERROR_BITS), "address": Out(ADDRESS_BITS),
                          "client": Out(CLIENT_BITS)})

    def elaborate(self, platform):
        m = Module()
        # The sources report late in a cycle, so the choice between them ends in a register of its own.
        reported, report = Signal(), Signal.like(self.sources[0].report)
        valid = Cat(source.valid for source in self.sources)
        m.d.sync += reported.eq(valid.any() & ~self.clear)
        m.d.sync += report.eq(self.sources[-1].report)      # loaded in every cycle: without an enable it is faster
        for source in reversed(list(self.sources)[:-1]):
            with m.If(source.valid):
                m.d.sync += report.eq(source.report)
        m.d.comb += self.found.eq(self.error | reported)
        with m.If(self.clear):
            m.d.sync += self.error.eq(0)
        with m.Elif(reported & ~self.error):
            m.d.sync += [self.error.eq(1), self.code.eq(report.code), self.address.eq(report.address),
                         self.client.eq(report.client)]
        return m
