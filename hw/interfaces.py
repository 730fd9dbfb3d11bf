"""Interfaces between the core's units and its memory port."""

from __future__ import annotations

from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig

__all__ = ["ADDRESS_BITS", "NO_BYPASS", "data_register", "line_address_bits", "ReadClient", "WriteClient", "write_line"]

ADDRESS_BITS = 32

#: Attributes of a memory whose user needs no word that is read in the cycle of its writing. Otherwise synthesis adds a
#: bypass to every block RAM, of registers and multiplexers as wide as its words, to give the old word there.
NO_BYPASS = {"no_rw_check": 1}


def line_address_bits(config: CoreConfig) -> int:
    """Width of a line address: the byte address without the offset inside a line."""
    return ADDRESS_BITS - (config.line_bytes - 1).bit_length()


def data_register(m: Module, port) -> Signal:
    """The register of an output that is data: without reset, as only what says that data is there needs one.

    A reset reaches every register that has it, in one cycle, and flip-flops share a slice only with the same reset.
    """
    register = Signal.like(port, name="data_register", reset_less=True)
    m.d.comb += port.eq(register)
    return register


class ReadClient(wiring.Signature):
    """Reads whole lines, from the client's point of view.

    request : line addresses, one line each. response : the lines, in request order.
    """

    def __init__(self, config: CoreConfig):
        super().__init__({
            "request": Out(stream.Signature(line_address_bits(config))),
            "response": In(stream.Signature(config.line_bits)),
        })


def write_line(config: CoreConfig) -> data.StructLayout:
    return data.StructLayout({"address": line_address_bits(config), "data": config.line_bits,
                              "strobe": config.line_bytes})


class WriteClient(wiring.Signature):
    """Writes lines, from the client's point of view.

    line : address, data and one strobe bit per byte. idle : every line handed over was acknowledged by memory.
    """

    def __init__(self, config: CoreConfig):
        super().__init__({"line": Out(stream.Signature(write_line(config))), "idle": In(1)})
