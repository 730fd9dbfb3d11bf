"""Finished products on their way to memory, with their largest magnitude."""

from __future__ import annotations

from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .address_stream import AddressStream
from .config import CoreConfig
from .descriptor import STORE
from .interfaces import WriteClient
from .range_detector import RangeDetector, range_result

__all__ = ["store_command", "range_result", "Store"]

store_command = data.StructLayout({"enable": 1, "store": STORE.layout})


class Store(wiring.Component):
    """Writes the result vectors of product blocks to memory (docs/core.md, descriptor section ``store``).

    For each iteration of loops 0 to 3 the next ``run`` result vectors go to consecutive vectors of memory. A result
    that is longer than a line leaves in two; of one that is shorter, the address's offset in the line selects which
    ``4 * columns`` bytes are written.

    Attributes
    ----------
    command : In stream of store_command. enable = 0: done at once, without results or range.
    result : In stream of ``columns`` int32, lane 0 lowest.
    memory : Out(WriteClient). ``idle`` must be low from the cycle after a line was handed over until it is
        acknowledged.
    range : Out(range_result)  valid for one cycle per enabled command, before or together with its ``done``.
    done : Out(1)  one cycle per command, in order: all lines acknowledged, range delivered.
    busy, stalled_in, stalled_out : Out(1)  for counters: an enabled command is in progress; it waits for a
        result; it waits for memory to take or acknowledge lines.

    One line, or one vector that is shorter, per cycle. Between two enabled commands lie the memory's write latency and
    two cycles, at least ``RangeDetector.latency`` + 2: results wait in the accumulator's FIFO meanwhile.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            "command": In(stream.Signature(store_command)),
            "result": In(stream.Signature(config.columns * 32)),
            "memory": Out(WriteClient(config)),
            "range": Out(range_result), "done": Out(1),
            "busy": Out(1), "stalled_in": Out(1), "stalled_out": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, store = self.config, self.command.payload.store
        pieces = config.result_lines
        m.submodules.addresses = addresses = AddressStream(5 + (pieces > 1))
        m.submodules.detector = detector = RangeDetector(min(config.columns, config.lanes))
        for k in range(4):
            m.d.comb += [addresses.count[k].eq(store[f"count{k}"]), addresses.stride[k].eq(store[f"stride{k}"])]
        m.d.comb += [addresses.count[4].eq(store.run), addresses.stride[4].eq(4 * config.vector),
                     addresses.start.eq(store.address)]
        # The second half of a result waits here, so that the result is taken with its first.
        resting, piece, takes = Const(0), self.result.payload, Const(1)
        if pieces > 1:
            resting, takes = Signal(), Signal(init=1)        # the second half leaves next, and the complement
            rest = Signal(config.line_bits, reset_less=True)
            m.d.comb += [addresses.count[5].eq(pieces), addresses.stride[5].eq(config.line_bytes)]
            with m.If(self.memory.line.valid & self.memory.line.ready):
                m.d.sync += [resting.eq(takes), takes.eq(resting)]
            with m.If(takes):
                m.d.sync += rest.eq(piece[config.line_bits:])
            piece = Mux(takes, piece[:config.line_bits], rest)

        line, item = self.memory.line, addresses.item
        parts = config.line_bits // len(piece)       # results in a line
        part_bits = (len(piece) // 8 - 1).bit_length()
        line_bits = (config.line_bytes - 1).bit_length()
        part = item.payload.address[part_bits:line_bits]
        m.d.comb += [
            line.payload.address.eq(item.payload.address[line_bits:]),
            line.payload.data.eq(piece.replicate(parts)),
            line.payload.strobe.eq(Cat((part == k).replicate(len(piece) // 8) for k in range(parts))),
            self.range.valid.eq(detector.complete),
            self.range.register.eq(store.range_register),
            self.range.clear.eq(store.range_clear),
            self.range.value.eq(detector.value),
        ]
        # What leaves goes to the range detector a cycle later.
        for k, lane in enumerate(detector.lanes):
            result, seen = piece.word_select(k, 32).as_signed(), Signal(signed(32), name=f"seen{k}", reset_less=True)
            m.d.sync += seen.eq(Mux(store.range_positive & (result < 0), 0, result))
            m.d.comb += lane.eq(seen)
        sent = line.valid & line.ready
        m.d.sync += [detector.valid.eq(sent), detector.clear.eq(sent & item.payload.first),
                     detector.last.eq(sent & item.payload.last)]

        # There is an address from the first cycle of SEND to its last, when `sending` is high, too.
        sending = Signal()
        m.d.comb += [line.valid.eq(sending & (self.result.valid | resting)),
                     self.result.ready.eq(sending & line.ready & takes),
                     item.ready.eq((self.result.valid | resting) & line.ready)]
        ranged = Signal()       # the command's range was delivered in an earlier cycle
        with m.FSM():
            with m.State("IDLE"):
                m.d.sync += ranged.eq(0)
                with m.If(self.command.valid):
                    with m.If(self.command.payload.enable):
                        m.d.sync += addresses.load.eq(1)
                        m.next = "BEGIN"
                    with m.Else():
                        m.d.comb += [self.command.ready.eq(1), self.done.eq(1)]
            with m.State("BEGIN"):
                m.d.comb += self.busy.eq(1)
                m.d.sync += [addresses.load.eq(0), sending.eq(1)]
                m.next = "SEND"
            with m.State("SEND"):
                m.d.comb += [
                    self.busy.eq(1),
                    self.stalled_in.eq(~line.valid), self.stalled_out.eq(line.valid & ~line.ready),
                ]
                with m.If(line.valid & line.ready & item.payload.last):
                    m.d.sync += sending.eq(0)
                    m.next = "ACKNOWLEDGE"
            with m.State("ACKNOWLEDGE"):
                m.d.comb += [self.busy.eq(1), self.stalled_out.eq(~self.memory.idle)]
                with m.If(detector.complete):
                    m.d.sync += ranged.eq(1)
                with m.If(self.memory.idle & (detector.complete | ranged)):
                    m.d.comb += [self.command.ready.eq(1), self.done.eq(1)]
                    m.next = "IDLE"
        return m
