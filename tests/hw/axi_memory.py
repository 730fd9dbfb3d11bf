"""AXI4 memory for simulations of the ports: latency, stalls, error responses, and a check of every master rule."""

from __future__ import annotations

from collections import deque

from amaranth.hdl import Cat

from hw.axi import INCR, PAGE_BYTES, Response

__all__ = ["AxiMemory"]


def _flows(stall):
    return not stall()


class AxiMemory:
    """Serves ``axi`` (an Axi4Read, Axi4Write or Axi4Master interface) from ``content``.

    Parameters
    ----------
    content : bytearray; addresses wrap at its length.
    latency : cycles from an accepted address (or last data beat) to the first response.
    stall : asked once per cycle and channel: holds back ready, read data and write responses.
    failing : byte addresses; a burst's beat (read) or a burst (write) that touches one answers SLVERR.

    ``reads`` and ``writes`` record the bursts as (address, beats). Give :meth:`serve_reads` and :meth:`serve_writes` to
    ``simulate`` as background benches.
    """

    def __init__(self, axi, content: bytearray, *, latency: int = 4, stall=lambda: False, failing=()):
        self.axi, self.content, self.latency, self.stall = axi, content, latency, stall
        self.failing = set(failing)
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.read_beats_open = 0
        self.write_bursts_open = 0

    def _check_burst(self, address: int, length: int, size: int, kind: int, width: int):
        beats, beat_bytes = length + 1, 1 << size
        assert kind == INCR, f"burst type {kind} instead of INCR"
        assert beat_bytes * 8 == width, f"beats of {beat_bytes} bytes on {width} data bits"
        assert address % beat_bytes == 0, f"unaligned burst address {address:#x}"
        assert address // PAGE_BYTES == (address + beats * beat_bytes - 1) // PAGE_BYTES, \
            f"burst of {beats} beats at {address:#x} crosses {PAGE_BYTES} bytes"
        return beats

    def _response(self, first: int, size: int) -> Response:
        return Response.SLVERR if any(first <= bad < first + size for bad in self.failing) else Response.OKAY

    async def serve_reads(self, ctx):
        axi, width = self.axi, len(self.axi.rdata)
        beat_bytes = width // 8
        beats: deque[tuple[int, int, bool]] = deque()   # earliest cycle, address, last
        ready = valid = False
        waiting = None
        cycle = 0
        async for _, _, arvalid, rready, *request in ctx.tick().sample(
                axi.arvalid, axi.rready, axi.araddr, axi.arlen, axi.arsize, axi.arburst):
            cycle += 1
            if waiting is not None:
                assert (arvalid, request) == (1, waiting), "read address changed before it was taken"
            waiting = request if arvalid and not ready else None
            if arvalid and ready:
                count = self._check_burst(*request, width)
                self.reads.append((request[0], count))
                beats.extend((cycle + self.latency, request[0] + k * beat_bytes, k == count - 1) for k in range(count))
            if valid and rready:
                beats.popleft()
                valid = False
            self.read_beats_open = len(beats)
            if not valid and beats and beats[0][0] <= cycle and _flows(self.stall):
                valid = True
                _, address, last = beats[0]
                at = address % len(self.content)
                ctx.set(axi.rdata, int.from_bytes(self.content[at:at + beat_bytes], "little"))
                ctx.set(axi.rresp, self._response(address, beat_bytes))
                ctx.set(axi.rlast, last)
            ready = _flows(self.stall)
            ctx.set(axi.rvalid, valid)
            ctx.set(axi.arready, ready)

    async def serve_writes(self, ctx):
        axi, width = self.axi, len(self.axi.wdata)
        beat_bytes = width // 8
        addresses: deque[tuple[int, int]] = deque()     # bursts without all their data
        data: deque[tuple[int, int, int]] = deque()
        responses: deque[tuple[int, Response]] = deque()
        address_ready = data_ready = valid = False
        waiting_address = waiting_data = None
        cycle = 0
        async for _, _, awvalid, wvalid, bready, data_beat, *request in ctx.tick().sample(
                axi.awvalid, axi.wvalid, axi.bready, Cat(axi.wdata, axi.wstrb, axi.wlast),
                axi.awaddr, axi.awlen, axi.awsize, axi.awburst):
            cycle += 1
            if waiting_address is not None:
                assert (awvalid, request) == (1, waiting_address), "write address changed before it was taken"
            if waiting_data is not None:
                assert (wvalid, data_beat) == (1, waiting_data), "write data changed before they were taken"
            waiting_address = request if awvalid and not address_ready else None
            waiting_data = data_beat if wvalid and not data_ready else None
            if awvalid and address_ready:
                count = self._check_burst(*request, width)
                self.writes.append((request[0], count))
                addresses.append((request[0], count))
            if wvalid and data_ready:
                data.append((data_beat & (1 << width) - 1, data_beat >> width & (1 << beat_bytes) - 1,
                             data_beat >> width + beat_bytes))
            while addresses and len(data) >= addresses[0][1]:
                address, count = addresses.popleft()
                for k in range(count):
                    value, strobe, last = data.popleft()
                    assert last == (k == count - 1), f"wlast = {last} on beat {k} of {count}"
                    for i in range(beat_bytes):
                        if strobe >> i & 1:
                            at = (address + k * beat_bytes + i) % len(self.content)
                            self.content[at] = value >> 8 * i & 0xFF
                responses.append((cycle + self.latency, self._response(address, count * beat_bytes)))
            if valid and bready:
                responses.popleft()
                valid = False
            self.write_bursts_open = len(addresses) + len(responses)
            if not valid and responses and responses[0][0] <= cycle and _flows(self.stall):
                valid = True
                ctx.set(axi.bresp, responses[0][1])
            address_ready, data_ready = _flows(self.stall), _flows(self.stall)
            ctx.set(axi.bvalid, valid)
            ctx.set(axi.awready, address_ready)
            ctx.set(axi.wready, data_ready)
