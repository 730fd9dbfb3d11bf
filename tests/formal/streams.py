"""Streams: every unit's outputs keep an item valid and unchanged until it is taken; queues keep order."""

from __future__ import annotations

from amaranth.hdl import Elaboratable, Module

from .harness import Fault, Proof, assume_stream, check_order, check_stream, free_inputs, stream_ports


class StreamProof(Elaboratable):
    """Free inputs, input streams by the rule: every output stream of the unit follows the rule."""

    def __init__(self, make, off=()):
        self.make, self.off = make, off      # off: inputs that stay 0

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = self.make()
        free_inputs(m, dut, keep=self.off)
        for _name, stream, leaves in stream_ports(dut):
            (check_stream if leaves else assume_stream)(m, stream)
        return m


class Order(Elaboratable):
    """Everything comes out once, in order, unchanged and after the unit's latency."""

    def __init__(self, make, latency):
        self.make, self.latency = make, latency

    def elaborate(self, platform):
        m = Module()
        m.submodules.dut = dut = self.make()
        free_inputs(m, dut, keep=("clear",))
        check_order(m, dut.input, dut.output, latency=self.latency)
        return m


def _unit(module, name, *arguments, core="tiny"):
    def make():
        import importlib

        from hw.config import PRESETS
        unit = getattr(importlib.import_module(module), name)
        return unit(*[PRESETS[core] if argument == "core" else argument for argument in arguments])
    return make


def _falling():
    from hw.fifo import Fifo
    return Fifo(2, 2, fall_through=True)


_HANDOVER = ("with m.If(~busy):", "with m.If(left == 0):")

PROOFS = [
    Proof("fifo/order", lambda: Order(_unit("hw.fifo", "Fifo", 2, 2), 2), 7, (
        Fault("hw/fifo.py", "free.eq(~output.valid | output.ready)", "free.eq(1)"),)),
    Proof("fifo/deep_order", lambda: Order(_unit("hw.fifo", "Fifo", 2, 17), 3), 8, (
        Fault("hw/fifo.py", "get.eq(some & (~fetched | free))", "get.eq(some)"),)),
    Proof("fifo/fall_through", lambda: Order(_falling, 1), 7, (
        Fault("hw/fifo.py", "self.input.valid & ~some & free", "self.input.valid & free"),
        Fault("hw/fifo.py", "some | self.input.valid", "some"))),
    Proof("skid_buffer/order", lambda: Order(_unit("hw.skid_buffer", "SkidBuffer", 2), 0), 7, (
        Fault("hw/skid_buffer.py", "with m.If(~held):", "with m.If(1):"),)),
    Proof("skid_buffer/stream", lambda: StreamProof(_unit("hw.skid_buffer", "SkidBuffer", 4)), 3, (
        Fault("hw/skid_buffer.py", "held.eq(waits)", "held.eq(0)"),)),
    Proof("relay_station/order", lambda: Order(_unit("hw.relay_station", "RelayStation", 2), 1), 7, (
        Fault("hw/relay_station.py", "with m.If(skid.input.ready):", "with m.If(1):"),)),
    Proof("fifo/stream", lambda: StreamProof(_unit("hw.fifo", "Fifo", 4, 2), off=("clear",)), 8, (
        Fault("hw/fifo.py", "free.eq(~output.valid | output.ready)", "free.eq(1)"),)),
    Proof("fifo/deep_stream", lambda: StreamProof(_unit("hw.fifo", "Fifo", 4, 17), off=("clear",)), 8, (
        Fault("hw/fifo.py", "free.eq(~output.valid | output.ready)", "free.eq(1)"),)),
    Proof("divider/stream", lambda: StreamProof(_unit("hw.divider", "Divider", 8, 5)), 3, (
        Fault("hw/divider.py", *_HANDOVER),), induction=True),
    Proof("isqrt/stream", lambda: StreamProof(_unit("hw.isqrt", "SquareRoot", 8)), 3, (
        Fault("hw/isqrt.py", *_HANDOVER),), induction=True),
    Proof("loss/stream", lambda: StreamProof(_unit("hw.loss", "NitiLoss", "core", 4)), 3, (
        Fault("hw/loss.py", "with m.If(~self.error.valid):", "with m.If(1):"),), induction=True),
]
