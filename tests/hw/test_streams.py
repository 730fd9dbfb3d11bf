"""The stream helpers against a queue: what is put is got, stalls stall, and broken streams are found."""

import pytest
from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.fifo import SyncFIFO
from amaranth.lib.wiring import In, Out

from tests.hw.streams import STALLS, simulate, stalls, stream_check, stream_get, stream_put


class Queue(wiring.Component):
    """Four entries; ``broken`` changes the payload of a waiting item."""
    i: In(stream.Signature(8))
    o: Out(stream.Signature(8))

    def __init__(self, broken: bool = False):
        self.broken = broken
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        m.submodules.fifo = fifo = SyncFIFO(width=8, depth=4)
        wiring.connect(m, wiring.flipped(self.i), fifo.w_stream)
        m.d.comb += [self.o.valid.eq(fifo.r_rdy), fifo.r_en.eq(self.o.ready),
                     self.o.payload.eq(fifo.r_data ^ (fifo.level[1] if self.broken else 0))]
        return m


def transfer(pattern, broken=False, items=tuple(range(100))):
    dut = Queue(broken)
    source, sink = stalls(pattern)
    cycles, received = 0, []

    async def put(ctx):
        await stream_put(ctx, dut.i, items, stall=source)

    async def get(ctx):
        received.extend(await stream_get(ctx, dut.o, len(items), stall=sink))

    async def count(ctx):
        nonlocal cycles
        async for _ in ctx.tick():
            cycles += 1

    async def check(ctx):
        await stream_check(ctx, dut.o)

    simulate(dut, put, get, background=(count, check))
    assert received == list(items)
    return cycles


@pytest.mark.parametrize("pattern", STALLS)
def test_every_item_arrives_in_order(pattern):
    cycles = transfer(pattern)
    assert (cycles < 110) == (pattern == "none")


def test_a_payload_that_changes_while_it_waits_is_found():
    with pytest.raises(AssertionError, match="payload changed"):
        transfer("sink", broken=True, items=[0] * 100)


def test_a_deadlock_is_found():
    dut = Queue()

    async def get(ctx):
        await stream_get(ctx, dut.o, 1)

    with pytest.raises(AssertionError, match="not finished after 50 cycles"):
        simulate(dut, get, limit=50)


def test_unknown_pattern_is_refused():
    with pytest.raises(ValueError, match="choose one of none, source, sink, both"):
        stalls("sometimes")
