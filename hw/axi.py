"""AXI4 and AXI4-Lite signatures and their flat port names (AMBA AXI specification, IHI 0022)."""

from __future__ import annotations

import enum

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .interfaces import ADDRESS_BITS

__all__ = ["ID_BITS", "PAGE_BYTES", "INCR", "Response", "Axi4Read", "Axi4Write", "Axi4Master", "Axi4Lite",
           "flat_members", "connect_flat"]

ID_BITS = 4
PAGE_BYTES = 4096      # no burst may cross a multiple of this
INCR = 1               # burst type: the address goes up
REGISTER_ADDRESS_BITS = 12


class Response(enum.IntEnum):
    OKAY = 0
    SLVERR = 2
    DECERR = 3


def _address(prefix: str) -> dict[str, wiring.Member]:
    return {prefix + name: member for name, member in {
        "id": Out(ID_BITS), "addr": Out(ADDRESS_BITS), "len": Out(8), "size": Out(3), "burst": Out(2),
        "valid": Out(1), "ready": In(1)}.items()}


class Axi4Read(wiring.Signature):
    """The read channels AR and R, from the master's point of view."""

    def __init__(self, config: CoreConfig):
        super().__init__({**_address("ar"), "rid": In(ID_BITS), "rdata": In(8 * config.beat_bytes), "rresp": In(2),
                          "rlast": In(1), "rvalid": In(1), "rready": Out(1)})


class Axi4Write(wiring.Signature):
    """The write channels AW, W and B, from the master's point of view."""

    def __init__(self, config: CoreConfig):
        super().__init__({**_address("aw"), "wdata": Out(8 * config.beat_bytes), "wstrb": Out(config.beat_bytes),
                          "wlast": Out(1), "wvalid": Out(1), "wready": In(1),
                          "bid": In(ID_BITS), "bresp": In(2), "bvalid": In(1), "bready": Out(1)})


class Axi4Master(wiring.Signature):
    """All five channels, from the master's point of view."""

    def __init__(self, config: CoreConfig):
        super().__init__({**Axi4Write(config).members, **Axi4Read(config).members})


class Axi4Lite(wiring.Signature):
    """AXI4-Lite with 32-bit data and a 4 KB space, from the master's point of view."""

    def __init__(self):
        super().__init__({
            "awaddr": Out(REGISTER_ADDRESS_BITS), "awprot": Out(3), "awvalid": Out(1), "awready": In(1),
            "wdata": Out(32), "wstrb": Out(4), "wvalid": Out(1), "wready": In(1),
            "bresp": In(2), "bvalid": In(1), "bready": Out(1),
            "araddr": Out(REGISTER_ADDRESS_BITS), "arprot": Out(3), "arvalid": Out(1), "arready": In(1),
            "rdata": In(32), "rresp": In(2), "rvalid": In(1), "rready": Out(1)})


def flat_members(prefix: str, signature: wiring.Signature) -> dict[str, wiring.Member]:
    """The members of ``signature`` as ports ``PREFIX_MEMBER`` of a top-level component."""
    return {f"{prefix}_{name}": member for name, member in signature.members.items()}


def connect_flat(m: Module, top: wiring.Component, prefix: str, inner: wiring.PureInterface):
    """Joins the ports ``PREFIX_*`` that :func:`flat_members` made with an inner component's interface.

    ``inner`` may have a part of the members only (for example the read channels).
    """
    for name, member in inner.signature.members.items():
        outer, port = getattr(top, f"{prefix}_{name}"), getattr(inner, name)
        m.d.comb += outer.eq(port) if member.flow == Out else port.eq(outer)
