"""``python -m sim estimate``: cycles by layer and pass without running the core.

A queueing model: the program's descriptors pass through the units, each a process that knows when it can go on.
Nothing is computed, and no cycle is stepped through: between two events times follow in closed form. The grain is a
memory line or vector at the ports and in the vector engine, a tile in the array, a burst on the memory channels. What
it knows is the documented timing of the units; docs/estimate.md says how close it comes and where it simplifies.

* sequencer: a descriptor takes a cycle per word; the program's lines are fetched ahead as far as their FIFO goes;
* an engine's units take their part of a descriptor when they are free and its dependencies are met;
* each client of memory has its coalescer (:class:`Collector`); bursts of all clients take turns, data comes in order,
  with memory's latency, rate and credit (:class:`Channel`); writes wait for room in their client's buffer;
* operand buffers: two banks, a line may be used when it has arrived; folding shifts a byte per cycle;
* weight ring: tiles are fetched ahead as far as there is room; a tile needs n cycles to shift in, tiles follow every
  max(pixels, 2 n - 1) cycles;
* results wait for room in their FIFO; a store command ends with its acknowledgement;
* vector passes: readers run ahead as far as their FIFOs go, one vector, or part of one if there are fewer lanes, per
  cycle passes the lanes if all sources are there and the writers have room; a pass ends with its acknowledgement;
* scalar programs take four cycles an operation; the loss unit walks through its states once a sample.

The cycles of a (layer, pass) are defined as in the simulation, where the core's trace outputs are counted by tag
(``sim.train._cycles``): for products, from the cycle in which the block is decoded (or the block before has left the
feeder, if later) to its last fed vector; for vector passes, those in which the engine holds a descriptor, under the tag
of the descriptor released to it last, so a pass that follows at once takes over the wait for the acknowledgement.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import json
import math
from collections import defaultdict, deque
from pathlib import Path

import numpy as np

from golden.rounding import Rounding
from hw.array import SystolicArray
from hw.axi import PAGE_BYTES
from hw.coalescer import BURST_LINES
from hw.config import CoreConfig
from hw.core import READERS, WRITERS
from hw.descriptor import DESCRIPTOR_WORDS, FORMATS, Mode, Opcode
from hw.feeder import FEED_LATENCY, result_control
from hw.lanes import DRAWING
from hw.random_words import RandomWords
from hw.read_port import OUTSTANDING_LINES, READ_PATIENCE
from hw.round_shift import RoundShift
from hw.scalar import REGISTERS
from hw.sequencer import last_word
from hw.shared_fold import FOLD_LINES
from hw.vector import Function
from hw.write_port import BUFFER_LINES, WRITE_PATIENCE

from .layout import ceil_div
from .program import CompileError
from .shared import MemorySettings

__all__ = ["Estimate", "estimate", "estimate_passes", "estimate_network"]

# Fixed parts of the pipelines, in cycles.
ADDRESS = 3              # from a burst's turn to its address at memory, and a request's way into its port
ADDRESS_QUEUE = 4        # addresses waiting behind the one that memory is shown
RESPONSE_QUEUE = 3       # through a response FIFO
ACCUMULATOR = 4          # from a result on the last column to the store
ROUND = 1 + RoundShift.latency       # with the register before the rounder
BEHIND = 8               # from the rounder to a writer: queue, stages, a register; vectors wait in them
DRAW = RandomWords.key_latency + RandomWords.latency     # until the random words of the first vector are there
RANGE = 3                # from the last result to the scalar register, and two cycles a level of the compare tree
NOTES = 256              # parts of vectors by which a vector reader requests ahead (hw.vector_reader)
POOL_HOLD = 2            # cycles in which a window's second result, of two parts, keeps the pool from its next vector
WEIGHT_STAGES, DIVIDERS, DIVISION = 8, 4, 14      # of the loss unit (hw.loss, hw.divider)


class Gate:
    """Processes that wait for a change."""

    def __init__(self, clock: Clock):
        self.clock, self.waiting = clock, []

    def open(self):
        for process in self.waiting:
            self.clock.at(self.clock.now, process)
        self.waiting = []


class Clock:
    """Runs processes: generators that yield the cycle to go on in, or a gate to wait for. Those in ``last`` come after
    the others of the same cycle."""

    def __init__(self):
        self.now, self._queue, self._order, self.last = 0, [], itertools.count(), set()

    def at(self, time, process):
        heapq.heappush(self._queue, (max(self.now, time), process in self.last, next(self._order), process))

    def run(self):
        while self._queue:
            self.now, _, _, process = heapq.heappop(self._queue)
            try:
                what = next(process)
            except StopIteration:
                continue
            if isinstance(what, Gate):
                what.waiting.append(process)
            else:
                self.at(what, process)


class Burst:
    """Consecutive lines of one client on their way.

    ``issue``: cycle of its turn, once known; then also ``start``, the cycle of its first beat. Beat b passes in cycle
    start + max(b, ceil(lead + b * beat_cost)): ``lead`` <= 0 is the memory's credit from earlier rest.
    """

    __slots__ = ("lines", "issue", "start", "lead", "cost", "beats", "acknowledged", "loaded")

    def __init__(self, channel):
        self.lines, self.issue, self.start, self.lead = 1, None, None, 0.0
        self.cost, self.beats = channel.cost, channel.beats

    def beat(self, number: int) -> int:
        return self.start + (number if self.cost == 1 else max(number, math.ceil(self.lead + number * self.cost)))

    def arrival(self, line: int) -> int:
        """The cycle after a line's last beat: reads show it to the client."""
        return self.beat((line + 1) * self.beats - 1) + 1

    @property
    def end(self) -> int:
        return self.arrival(self.lines - 1)

    def sent(self, line: int) -> int:
        """Writes: the cycle in which a line leaves its client's buffer."""
        number = (line + 1) * self.beats - 1
        return self.beat(number - 1) if number else self.loaded


class Channel:
    """Read or write channel of the memory port: bursts by turns, data in order."""

    def __init__(self, clock: Clock, clients, config: CoreConfig, rate: int, settings: MemorySettings, *, write: bool):
        self.clock, self.write = clock, write
        self.beats = config.line_bytes // config.beat_bytes
        self.cost = max(1, config.beat_bytes / rate) if rate else 1
        self.latency, self.bursts = max(1, settings.latency), settings.outstanding
        self.clients = {name: number for number, name in enumerate(clients)}
        self.pending: dict[str, deque[Burst]] = defaultdict(deque)      # no empty ones
        self.work, self.issued = Gate(clock), Gate(clock)
        self.flying: deque[Burst] = deque()
        self.accepts: deque[int] = deque([0] * (ADDRESS_QUEUE + 1), ADDRESS_QUEUE + 1)
        self.ends: deque[int] = deque([0] * self.bursts, self.bursts)       # of the latest bursts
        self.last, self.next_issue, self.free, self.allowed = 0, 0, 0, 0.0
        self.acknowledged = self.lines = 0
        pump = self._pump()
        clock.last.add(pump)
        clock.at(0, pump)

    def post(self, client: str, burst: Burst):
        self.pending[client].append(burst)
        self.work.open()

    def done_at(self, burst: Burst) -> int:
        return burst.acknowledged if self.write else burst.end

    def _allowed(self) -> int:
        """When the next burst may be issued: lines under way and queued addresses are limited."""
        now = self.clock.now
        while self.flying and self.done_at(self.flying[0]) <= now:
            self.lines -= self.flying.popleft().lines
        time, rest = max(self.next_issue, self.accepts[0] + 1), self.lines
        for burst in self.flying:
            over = rest - (OUTSTANDING_LINES - BURST_LINES)
            if over <= 0:
                break
            if not self.write and over < burst.lines:
                time = max(time, burst.arrival(over - 1))
                break
            rest -= burst.lines
            time = max(time, self.done_at(burst))
        return time

    def _issue(self, burst: Burst):
        now = self.clock.now
        burst.issue = now
        accept = max(now + ADDRESS, self.accepts[-1] + 1, self.ends[0])
        self.accepts.append(accept)
        if self.write:
            burst.loaded = max(now + ADDRESS, self.free - 1)
            earliest = max(burst.loaded + 1, accept + 1)
        else:
            earliest = max(accept + self.latency, self.free)
        # Memory's credit: at most two beats, so after a rest the second comes at once.
        burst.start = max(earliest, math.ceil(self.allowed))
        allowed = max(self.allowed, burst.start - self.cost)
        burst.lead = allowed - burst.start
        self.allowed = allowed + burst.lines * self.beats * self.cost
        self.free = burst.end
        if self.write:
            self.acknowledged = burst.acknowledged = max(burst.end + self.latency, self.acknowledged + 1)
            self.ends.append(burst.acknowledged)
        else:
            self.ends.append(burst.end)
        self.flying.append(burst)
        self.lines += burst.lines

    def _pump(self):
        count = len(self.clients)
        while True:
            if not self.pending:
                yield self.work
                continue
            time = self._allowed()
            if time > self.clock.now:
                yield time
                continue
            name = min(self.pending, key=lambda name: (self.clients[name] - self.last - 1) % count)
            self.last = self.clients[name]
            self._issue(self.pending[name].popleft())
            if not self.pending[name]:
                del self.pending[name]
            self.next_issue = self.clock.now + 1
            self.issued.open()


class Collector:
    """A client's coalescer (:mod:`hw.coalescer`) between its buffers: lines become bursts. One is collected while two
    wait for their turn; two lines wait for the coalescer, so a client is done with a line before it is taken. Its
    processes may compute cycles ahead of the clock; a burst is posted when the clock is there."""

    def __init__(self, channel: Channel, client: str, patience: int, page: int):
        self.channel, self.clock, self.client = channel, channel.clock, client
        self.patience, self.page = patience, page
        self.open: Burst | None = None       # being collected
        self.sent: Burst | None = None       # handed on last
        self.before: Burst | None = None     # and the one before that
        self.takes = deque([-1] * 2, 2)      # when the latest lines were taken
        self.last = self.following = 0       # cycle of the latest line, and the line after it

    def _room(self):
        """Process: the cycle from which a burst may be handed on, and the open one may grow."""
        if self.before is None:
            return 0
        while self.before.issue is None:
            yield self.channel.issued
        return self.before.issue + 1

    def _full(self) -> bool:
        return self.open.lines == BURST_LINES or self.following % self.page == 0

    def _expiry(self, room: int) -> int:
        """When the open burst closes if no line comes."""
        return max(self.last, room - 1) + 1 + (0 if self._full() else self.patience)

    def _close(self, time: int):
        yield time + 1
        self.channel.post(self.client, self.open)
        self.before, self.sent, self.open = self.sent, self.open, None

    def quick(self, line: int, valid: int, ready: int):
        """``add`` for a line that joins the open burst; None if it may not."""
        burst, before, last = self.open, self.before, self.last
        if (burst is None or line != self.following or burst.lines == BURST_LINES or line % self.page == 0
                or before is None or before.issue is None):
            return None
        room = before.issue + 1
        if valid >= (last if last >= room else room - 1) + 1 + self.patience:
            return None
        burst.lines += 1
        self.following += 1
        self.last = ready if ready > room else room
        self.takes.append(self.last)
        return self.last

    def add(self, line: int, valid: int, ready: int):
        """Process: the cycle in which a line is taken that is offered from ``valid`` on and may be taken from ``ready``
        on. It belongs to ``open`` then."""
        if self.open is not None:
            room = yield from self._room()
            expiry = self._expiry(room)
            if not self._full() and valid < expiry:
                ready = max(ready, room)
                if line == self.following:
                    self.open.lines += 1
                    self.following, self.last = line + 1, ready
                    self.takes.append(ready)
                    return ready
                expiry = ready
            yield from self._close(expiry)
            ready = max(ready, expiry)
        self.open, self.following, self.last = Burst(self.channel), line + 1, ready
        self.takes.append(ready)
        return ready

    def passed(self, valid: int) -> int:
        """The cycle in which the next line, offered from ``valid`` on, leaves the client for the buffers."""
        return max(valid, self.takes[0] + 1)

    def stream(self, lines, ends, begin: int, place):
        """Process: lines offered one a cycle from ``begin`` on, which part at ``ends``; ``place(first, burst)`` is told
        of each burst. Returns the cycle after the last line."""
        first = 0
        for end in ends:
            last = yield from self.add(lines[first], begin, begin)
            if end - first > 1:
                room = yield from self._room()
                last = max(last + 1, room) + end - first - 2
                self.open.lines = end - first
                self.last, self.following = last, lines[end - 1] + 1
            place(first, self.open)
            begin, first = last + 1, end
        return begin

    def pause(self, gate: Gate):
        """Process: the next line is not known yet; returns when something may have changed."""
        if self.open is None:
            yield gate
            return
        expiry = self._expiry((yield from self._room()))
        if self.clock.now <= expiry:
            yield expiry + 1
        else:
            yield from self._close(expiry)

    def finish(self):
        """Process: no line follows."""
        if self.open is not None:
            yield from self._close(self._expiry((yield from self._room())))


def walk(counts, strides, address: int) -> np.ndarray:
    """Addresses of nested loops, the outermost first."""
    result = np.array([address], np.int64)
    for count, stride in zip(counts, strides, strict=True):
        result = (result[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
    return result


def bursts(lines: np.ndarray, page: int) -> list[int]:
    """Ends (exclusive) of the bursts that the coalescer makes of line addresses offered one a cycle."""
    breaks = np.flatnonzero((np.diff(lines) != 1) | (lines[1:] % page == 0)) + 1
    starts = np.concatenate([[0], breaks, [len(lines)]])
    ends = [np.arange(first + BURST_LINES, last, BURST_LINES) for first, last in zip(starts, starts[1:], strict=False)
            if last - first > BURST_LINES]
    return np.sort(np.concatenate([starts[1:], *ends])).tolist() if ends else starts[1:].tolist()


def pooled_parts(index: int, parts: int) -> int:
    """How many parts the pool takes for its result ``index`` after those for the one before."""
    return 1 if index % parts else 3 * parts + 1


class Source:
    """A vector reader's walk: vectors in parts, and a request for every line that differs from the one before."""

    def __init__(self, lines: np.ndarray):
        fresh = np.concatenate([[True], np.diff(lines) != 0])
        self.lines, self.first = lines[fresh].tolist(), np.flatnonzero(fresh).tolist()
        self.places: list[tuple[Burst, int]] = []        # of the requested lines
        self.responses: list[int] = []                   # when each line was taken from its FIFO
        self.taken: list[int] = []                       # when each part was taken
        self.line, self.next_first = 0, 0


class Port:
    """A client of the write port: its coalescer and the buffer of its data."""

    def __init__(self, model: Estimate, client: str):
        self.model, self.collector = model, model.collectors[client]
        self.buffered: deque[tuple[Burst, int]] = deque()    # as many lines as the buffer and its output hold

    def quick(self, line: int, valid: int):
        passed = self.collector.passed(valid)
        if len(self.buffered) > BUFFER_LINES:
            burst, place = self.buffered[0]
            if burst.start is None:
                return None
            passed = max(passed, burst.sent(place) + 1)
        if self.collector.quick(line, passed, passed) is None:
            return None
        self._hold()
        return passed

    def _hold(self):
        burst = self.collector.open
        self.buffered.append((burst, burst.lines - 1))
        if len(self.buffered) > BUFFER_LINES + 1:
            self.buffered.popleft()

    def write(self, line: int, valid: int):
        """Process: the cycle in which the port takes a line offered from ``valid`` on."""
        passed = self.collector.passed(valid)
        if len(self.buffered) > BUFFER_LINES:
            burst, place = self.buffered[0]
            while burst.start is None:
                if burst is self.collector.open:
                    yield from self.collector.pause(self.model.writes.issued)
                else:
                    yield self.model.writes.issued
            passed = max(passed, burst.sent(place) + 1)
        yield from self.collector.add(line, passed, passed)
        self._hold()
        return passed

    def drain(self):
        """Process: until every line is acknowledged."""
        yield from self.collector.finish()
        burst = self.collector.sent
        while burst.start is None:
            yield self.model.writes.issued
        self.model.last_write = max(self.model.last_write, burst.end)
        if burst.acknowledged > self.model.clock.now:
            yield burst.acknowledged


class Load:
    """A band in an operand buffer: when its lines are there."""

    def __init__(self):
        self.pieces: list[tuple[int, Burst]] = []        # (first line, burst), in order
        self.times: list[int] = []                       # of each line, if they were folded
        self.complete = False

    def covering(self, line: int):
        if line < len(self.times):
            return self.times[line]
        for first, burst in self.pieces:
            if first <= line < first + burst.lines:
                return burst.arrival(line - first) + 1 if burst.start is not None else None
        return None


class Item:
    """A descriptor on its way."""

    def __init__(self, block, tag):
        self.block, self.tag = block, tag
        self.sections = {label: defaultdict(int, block.sections.get(label, {})) for label, _ in FORMATS[block.opcode]}
        self.runnable = None
        self.taken = 0


class Estimate:
    """Timeline of one program on one core and memory; ``cycles[tag]`` after construction.

    ``total``: cycles from the doorbell to the interrupt (a program without END: to its last descriptor's decoding).
    ``first`` is when the first product was decoded, ``last_write`` the cycle after the last beat written.
    """

    def __init__(self, config: CoreConfig, blocks, tags: dict, settings: MemorySettings):
        self.config, self.settings = config, settings
        self.clock = clock = Clock()
        self.reads = Channel(clock, READERS, config, settings.read_rate, settings, write=False)
        self.writes = Channel(clock, WRITERS, config, settings.write_rate, settings, write=True)
        self.page = PAGE_BYTES // config.line_bytes
        self.collectors = {name: Collector(self.reads, name, READ_PATIENCE, self.page) for name in READERS}
        self.collectors |= {name: Collector(self.writes, name, WRITE_PATIENCE, self.page) for name in WRITERS}
        array = SystolicArray(config, result_control(config))
        array._MustUse__silence = True              # only asked for its latencies, never elaborated
        self.settle = array.settle
        self.array_latency = {mode: array.latency(mode) for mode in Mode}
        self.cycles: dict = defaultdict(int)
        self.last_write = 0
        self.first = None
        self._state = {"product": None, "vector": None}
        self._since = {"product": 0, "vector": 0}
        self.gate = Gate(clock)                     # completions and decoders
        self.count = defaultdict(int)               # fed, stored, completed, issued_product, issued_vector
        self.decoded: dict[str, Item | None] = {"product": None, "vector": None}
        self.ports = {name: deque() for name in ("load_a", "load_b", "weights", "feed", "store", "vector")}
        self.port_gate = {name: Gate(clock) for name in self.ports}
        self.feeding: Item | None = None
        self._weights()
        self._operands()
        self._results()
        self.command, self.command_gate = None, Gate(clock)
        clock.at(0, self._sequencer(blocks, tags))
        clock.at(0, self._feeder())
        clock.at(0, self._store())
        clock.at(0, self._vector_command())
        clock.at(0, self._vector())
        self.total = None
        clock.run()
        if not (self.total is not None and self._idle("product") and self._idle("vector")):
            raise RuntimeError(f"the estimate came to a standstill in cycle {clock.now}: a unit waits for what never "
                               "comes; the core would hang as well, or the model is wrong: simulate this program")

    # Who works for which tag

    def _account(self, engine: str, tag):
        now = self.clock.now
        if self._state[engine] is not None:
            self.cycles[self._state[engine]] += now - self._since[engine]
        self._state[engine], self._since[engine] = tag, now

    def _product_state(self):
        if self.feeding is not None:
            tag = self.feeding.tag
        else:
            tag = self.decoded["product"].tag if self.decoded["product"] else None
        self._account("product", tag)

    # Sequencer

    def _fetch(self, lines: int):
        """The program's lines: requested as far ahead as their FIFO goes."""
        collector, depth = self.collectors["program"], READERS["program"]
        time = 0
        for line in range(lines):
            while line - depth >= len(self.fetched):
                yield from collector.pause(self.fetch_gate)
            begin = max(time + 1, self.fetched[line - depth] if line >= depth else 0)
            time = yield from collector.add(line, begin, begin)
            self.program.append((collector.open, collector.open.lines - 1))
        yield from collector.finish()

    def _sequencer(self, blocks, tags):
        clock, words = self.clock, self.config.line_bytes // 4
        self.program: list[tuple[Burst, int]] = []      # where each line comes
        self.fetched: list[int] = []                     # when it was used up and its place is free
        self.fetch_gate = Gate(clock)
        clock.at(0, self._fetch(len(blocks) * DESCRIPTOR_WORDS // words + READERS["program"]))
        index = 0

        def header():
            """Process: waits for the next word."""
            line = index // words
            while line >= len(self.program) or self.program[line][0].start is None:
                yield self.reads.issued
            burst, place = self.program[line]
            yield burst.arrival(place) + RESPONSE_QUEUE

        def advance(count):
            """Process: consumes words, one a cycle."""
            nonlocal index
            while count:
                yield from header()
                part = min(count, words - index % words)
                yield clock.now + part
                index, count = index + part, count - part
                if index % words == 0:
                    self.fetched.append(clock.now)
                    self.fetch_gate.open()

        for block in blocks:
            yield from header()
            yield clock.now + 1
            if block.opcode in (Opcode.END, Opcode.LOOP):
                if block.opcode is Opcode.LOOP:
                    yield from advance(last_word(Opcode.LOOP) + 1)
                while not (self._idle("product") and self._idle("vector")):
                    yield self.gate
                if block.opcode is Opcode.LOOP:
                    for name in ("fed", "stored", "completed", "issued product", "issued vector"):
                        self.count[name] = 0
                    yield from advance(DESCRIPTOR_WORDS - last_word(Opcode.LOOP) - 1)
                    yield clock.now + 1
                else:                                # what was fetched ahead is dropped, a line a cycle
                    burst, place = self.program[-1]
                    while burst.start is None:
                        yield self.reads.issued
                    yield max(clock.now + len(self.program) - len(self.fetched),
                              burst.arrival(place) + RESPONSE_QUEUE) + 2
                continue
            engine = "product" if block.opcode is Opcode.PRODUCT else "vector"
            while self.decoded[engine] is not None:
                yield self.gate
            used = last_word(block.opcode) + 1
            yield from advance(used)
            item = Item(block, tags[block.layer, block.step])
            self.decoded[engine] = item
            if self.first is None and engine == "product":
                self.first = clock.now
            self._product_state()
            clock.at(clock.now, self._dispatch(engine, item))
            yield from advance(DESCRIPTOR_WORDS - used)
            yield clock.now + 1
        self.total = clock.now

    def _idle(self, engine: str) -> bool:
        if engine == "product":
            return self.decoded["product"] is None and self.count["fed"] == self.count["stored"] == self.count[
                "issued product"]
        return self.decoded["vector"] is None and self.count["completed"] == self.count["issued vector"]

    def _dispatch(self, engine: str, item: Item):
        header = item.sections["header"]
        while not (self.count["completed"] >= header["wait_vector"] and self.count["fed"] >= header["wait_product"]
                   and self.count["stored"] >= header["wait_product"]):
            yield self.gate
        item.runnable = self.clock.now
        names = ("load_a", "load_b", "weights", "feed", "store") if engine == "product" else ("vector",)
        item.parts = len(names)
        for name in names:
            self.ports[name].append(item)
            self.port_gate[name].open()

    def _take(self, name: str):
        """The next descriptor for a unit; returns when the unit sees it."""
        while not self.ports[name]:
            yield self.port_gate[name]
        item = self.ports[name].popleft()
        item.taken += 1
        if item.taken == item.parts:
            engine = "vector" if name == "vector" else "product"
            self.count[f"issued {engine}"] += 1
            self.clock.at(self.clock.now + 1, self._release(engine))
        return item

    def _release(self, engine):
        self.decoded[engine] = None
        self._product_state()
        self.gate.open()
        return
        yield

    # Operand buffers

    def _operands(self):
        self.begun, self.advanced = {"a": 0, "b": 0}, {"a": 0, "b": 0}
        self.loads = {"a": [], "b": []}
        self.load_gate = Gate(self.clock)
        for which in "ab":
            self.clock.at(0, self._loader(which))

    def _loader(self, which: str):
        clock, config = self.clock, self.config
        name = f"load_{which}"
        while True:
            item = yield from self._take(name)
            yield clock.now + 1
            load = item.sections[name]
            if not load["enable"]:
                yield clock.now + 1
                continue
            number = self.begun[which]
            if number >= 2 and self.advanced[which] < number:
                while self.advanced[which] < number:
                    yield self.load_gate
                yield clock.now + 1
            current = Load()
            self.begun[which] += 1
            self.loads[which].append(current)
            self.load_gate.open()
            lines = walk([load["tiles"], load["runs"], load["lines"]],
                         [load["tile_stride"], load["run_stride"], config.line_bytes], load["address"])
            lines //= config.line_bytes
            if load["fold"]:
                yield from self._fold(name, load, current, lines.tolist())
            else:
                collector = self.collectors[name]

                def place(first, burst, current=current):
                    current.pieces.append((first, burst))
                    self.load_gate.open()
                yield from collector.stream(lines.tolist(), bursts(lines, self.page), clock.now + 1, place)
                yield from collector.finish()
                final = current.pieces[-1][1]
                while final.start is None:
                    yield self.reads.issued
                yield final.end + 1
            current.complete = True
            self.load_gate.open()
            yield clock.now + 1

    def _raw(self, name: str, lines: list[int], places: list, freed: list[int], gate: Gate):
        """Requests of a folding load: at most FOLD_LINES lines before the folding unit."""
        collector = self.collectors[name]
        time = self.clock.now
        for number, line in enumerate(lines):
            while number - FOLD_LINES >= len(freed):
                yield from collector.pause(gate)
            begin = max(time + 1, freed[number - FOLD_LINES] if number >= FOLD_LINES else 0)
            time = yield from collector.add(line, begin, begin)
            places.append((collector.open, collector.open.lines - 1))
        yield from collector.finish()

    def _fold(self, name: str, load, current: Load, lines: list[int]):
        """A folding load: raw lines are shifted out byte by byte, windows leave slice by slice (hw.fold)."""
        clock, line_bytes, per_line = self.clock, self.config.line_bytes, self.config.vectors_per_line
        places, freed, gate = [], [], Gate(clock)
        clock.at(clock.now, self._raw(name, lines, places, freed, gate))
        pad, kernel, step = load["fold_pad_bytes"], load["fold_kernel_bytes"], load["fold_step_bytes"]
        stop, columns, slices = pad + load["fold_row_bytes"], load["fold_columns"], load["fold_slices"]
        shown = current.times = []
        time = clock.now + 1                         # of the next shift
        left = position = pushed = 0                 # raw bytes in hand; shifts of this row; vectors pushed
        taken = 0                                    # cycle of the latest raw byte

        def shift(target, skip=False):
            """Process: shifts up to position ``target`` of the row."""
            nonlocal time, left, position, taken
            while position < target:
                if not skip and position < pad:
                    count = min(target, pad) - position
                elif not skip and position >= stop:
                    count = target - position
                else:
                    if not left:
                        number = len(freed)
                        while number >= len(places) or places[number][0].start is None:
                            yield self.reads.issued
                        burst, place = places[number]
                        popped = max(burst.arrival(place) + 1, taken)
                        freed.append(popped + 1)
                        gate.open()
                        time, left = max(time + 1, popped + 1), line_bytes
                    count = min(left, (target if skip else min(target, stop)) - position)
                    left -= count
                    taken = time + count - 1
                time += count
                position += count

        yield from shift(load["fold_skip"], skip=True)
        time += 1                                    # to the first row's start
        for _ in range(load["fold_rows"]):
            time, position = time + 1, 0
            for column in range(columns):
                yield from shift(kernel + column * step)
                for _ in range(slices):              # pushed from the cycle after the last shift on
                    pushed += 1
                    if pushed % per_line == 0:
                        shown.append(time + 2)
                    time += 1
                time -= 1
                if time - clock.now > 64:
                    self.load_gate.open()
            last = time
            yield from shift(stop)
            time = max(last + 1, time + 1)
            self.load_gate.open()
        time += 1
        if pushed % per_line:
            time += per_line - pushed % per_line
            shown.append(time + 1)
        self.load_gate.open()
        yield max(time + 1, clock.now)

    def _available(self, which: str, line: int):
        """Process: returns the time from which a line of the current load can be read."""
        load_number = self.advanced[which] - 1
        while len(self.loads[which]) <= load_number:
            yield self.load_gate
        load = self.loads[which][load_number]
        while True:
            time = load.covering(line)
            if time is not None:
                return time
            if load.complete:
                return self.clock.now
            yield self.reads.issued if load.pieces and load.pieces[-1][1].start is None else self.load_gate

    def _pending(self, which: str) -> bool:
        number = self.advanced[which] - 1
        return number >= len(self.loads[which]) or not self.loads[which][number].complete

    # Weights

    def _weights(self):
        self.tiles: deque = deque()                 # (burst, place of the last line, lines) of each requested tile
        self.ring_free: list[int] = []              # when each line's place is free again
        self.ring_gate, self.tile_gate = Gate(self.clock), Gate(self.clock)
        self.clock.at(0, self._weight_requests())

    def _weight_requests(self):
        clock, config, collector, asked = self.clock, self.config, self.collectors["weights"], 0
        while True:
            if not self.ports["weights"]:
                yield from collector.finish()
            item = yield from self._take("weights")
            yield clock.now + 1
            feed, weights = item.sections["feed"], item.sections["weights"]
            if feed["mode"] == Mode.GRADIENT:
                yield clock.now + 1
                continue
            n = (config.columns if feed["mode"] == Mode.FORWARD else config.rows) // config.vectors_per_line
            starts = walk([feed[f"tiles{k}"] for k in range(4)], [weights[f"stride{k}"] for k in range(4)],
                          weights["address"] - weights["address"] % config.line_bytes) // config.line_bytes
            time = clock.now
            for start in starts.tolist():
                for line in range(start, start + n):
                    need = asked - config.weight_lines
                    while need >= len(self.ring_free):
                        yield from collector.pause(self.ring_gate)
                    begin = time + 1
                    if need >= 0 and self.ring_free[need] > begin:
                        begin = self.ring_free[need]
                    time = collector.quick(line, begin, begin)
                    if time is None:
                        time = yield from collector.add(line, begin, begin)
                    asked += 1
                self.tiles.append((collector.open, collector.open.lines - 1, n))
                self.tile_gate.open()
            yield time + 1

    def _tile(self):
        """Process: arrival of the next weight tile and its lines."""
        while not self.tiles:
            yield self.tile_gate
        burst, place, lines = self.tiles[0]
        while burst.start is None:
            yield self.reads.issued
        self.tiles.popleft()
        return burst.arrival(place) + 1, lines

    # Feeder

    def _feeder(self):
        clock, config = self.clock, self.config
        mode, last_fire = Mode.FORWARD, -1e9
        ready_next = -1e9                           # earliest boundary, from the last one
        closed = -1e9                               # last boundary of the gradient pass
        self.reserved = 0
        shifted_ahead = None
        end = -1e9
        pending_rows = 0                            # results of the gradient tile that is not closed yet
        while True:
            item = yield from self._take("feed")
            yield clock.now + 1
            self.feeding = item
            self._product_state()
            feed = item.sections["feed"]
            gradient = feed["mode"] == Mode.GRADIENT
            if feed["mode"] != mode:
                yield last_fire + FEED_LATENCY + self.settle + 1
                mode = Mode(feed["mode"])
                ready_next = -1e9
                shifted_ahead = None
            began = clock.now                       # the cycle that starts the loops
            for which in "ab":
                if item.sections[f"load_{which}"]["enable"]:
                    self.advanced[which] += 1
            self.load_gate.open()
            counts = [feed[f"tiles{k}"] for k in range(4)]
            pixels = feed["pixels0"] * feed["pixels1"] * feed["pixels2"]
            edge = {"a": config.rows, "b": config.columns}
            starts, spans = {}, {}
            for which in "ab":
                per_line = config.line_bytes // edge[which]
                starts[which] = walk(counts, [feed[f"{which}_tile{k}"] for k in range(4)], feed[f"{which}_start"])
                spans[which] = sum((feed[f"pixels{k}"] - 1) * feed[f"{which}_pixel{k}"] for k in range(3))
                starts[which] = (starts[which], per_line)
            reduce = feed["reduce"]
            final = np.array([feed["last"] and all(i == c - 1 for k, (i, c) in enumerate(zip(t, counts, strict=True))
                                                   if reduce >> k & 1)
                              for t in itertools.product(*map(range, counts))], bool)
            n = config.columns if mode == Mode.FORWARD else config.rows
            time = began + 1                        # earliest next vector
            for tile in range(len(final)):
                if gradient:
                    # The boundary closes the tile before, whose rows leave then.
                    time = max(time, closed + config.rows)
                    if pending_rows:
                        time = max(time, (yield from self._room(pending_rows)))
                else:
                    arrival, lines = yield from self._tile()
                    if shifted_ahead is not None and tile == 0 and max(arrival, shifted_ahead) <= end:
                        begin = max(arrival, shifted_ahead)
                    else:
                        begin = max(arrival, ready_next - n, began + 1 if tile == 0 else 0)
                    self.ring_free += lines * [begin + n + 1]
                    self.ring_gate.open()
                    time = max(time, begin + n)
                yield max(time, clock.now)
                time = max(time, clock.now)
                # Operands that are still on their way.
                stop = time + pixels - 1
                needs = []
                for which in "ab"[:1 + gradient]:
                    if self._pending(which):
                        addresses, per_line = starts[which]
                        first = max(0, int(addresses[tile])) // per_line
                        last = max(0, int(addresses[tile]) + spans[which]) // per_line
                        needs.append((which, first, last))
                        time = max(time, (yield from self._available(which, first)))
                stop = time + pixels - 1
                for which, first, last in needs:
                    count = last - first + 1
                    for line in [*range(first + 7, last, 8), last]:
                        at = yield from self._available(which, line)
                        stop = max(stop, at + pixels * (last - line + 1) / count - 1)
                if not gradient and final[tile]:
                    stop = max(stop, (yield from self._room(pixels)))
                    self._results_from(time, stop, pixels, mode)
                if gradient:
                    if pending_rows:
                        self._results_from(time, time + pending_rows - 1, pending_rows, mode)
                    closed = time
                    pending_rows = config.rows if feed["last"] else 0
                else:
                    ready_next = time + 2 * n - 1
                if stop > clock.now:
                    yield stop if tile == len(final) - 1 else max(clock.now, time)
                boundary, time = time, stop + 1
            end = stop
            yield end
            following = self.decoded["product"]
            if following is item or following is not None and (
                    following.runnable is None or following.sections["feed"]["mode"] != mode):
                following = None
            if gradient and following is None:
                end = max(stop + 1, closed + config.rows)
                if pending_rows:
                    end = max(end, (yield from self._room(pending_rows)))
                    self._results_from(end, end + pending_rows - 1, pending_rows, mode)
                    pending_rows = 0
                yield end
                closed = end
            last_fire = end + (config.rows if gradient else 0)
            shifted_ahead = None
            if not gradient and following is not None:
                shifted_ahead = max(boundary + n - 1, following.runnable, boundary + 1)
            self.count["fed"] += 1
            yield clock.now + 1
            self.feeding = None
            self._product_state()
            self.gate.open()

    # Results and store

    def _results(self):
        self.produced: deque = deque()              # (time of the first, count, cycles between them)
        self.result_gate, self.accepted_gate = Gate(self.clock), Gate(self.clock)
        self.accepted: list[int] = []               # when the store hands over each result

    def _results_from(self, first, last, count, mode):
        """Vectors fed from `first` to `last` are results; the store sees them later."""
        way = FEED_LATENCY + self.array_latency[mode] + self.config.columns + ACCUMULATOR
        self.produced.append((first + way, count, (last - first) / max(1, count - 1)))
        self.result_gate.open()

    def _room(self, count):
        """Process: time at which `count` more results have a place; reserves them."""
        self.reserved += count
        need = self.reserved - self.config.result_entries
        while len(self.accepted) < need:
            yield self.accepted_gate
        return self.accepted[need - 1] if need > 0 else 0

    def _store(self):
        clock, config = self.clock, self.config
        port = Port(self, "store")
        pieces = config.result_lines
        begin, count, pace, used = 0, 0, 0, 0
        while True:
            item = yield from self._take("store")
            yield clock.now + 1
            store, enabled = item.sections["store"], item.sections["feed"]["last"]
            if enabled:
                addresses = walk([store[f"count{k}"] for k in range(4)] + [store["run"]],
                                 [store[f"stride{k}"] for k in range(4)] + [4 * config.vector], store["address"])
                time = clock.now
                for first in (addresses // config.line_bytes).tolist():
                    if used == count:
                        while not self.produced:
                            yield from port.collector.pause(self.result_gate)
                        begin, count, pace = self.produced.popleft()
                        used = 0
                    ready = max(time + 1, begin + int(used * pace))
                    used += 1
                    for line in range(first, first + pieces):
                        time = port.quick(line, ready)
                        if time is None:
                            time = yield from port.write(line, ready)
                        ready = time + 1
                    self.accepted.append(time)
                    if self.accepted_gate.waiting:
                        self.accepted_gate.open()
                yield from port.drain()
            self.count["stored"] += 1
            yield clock.now + 1
            self.gate.open()

    # Vector engine

    def _vector_command(self):
        """The engine's command register: free for the next descriptor before the last one is acknowledged."""
        while True:
            item = yield from self._take("vector")
            yield self.clock.now + 1
            if self._state["vector"] is not None:
                self._account("vector", item.tag)
            self.command = item
            self.command_gate.open()
            while self.command is not None:
                yield self.command_gate
            yield self.clock.now + 1

    def _command_done(self):
        self.command = None
        self.command_gate.open()

    def _vector(self):
        clock = self.clock
        ports = [Port(self, name) for name in ("target0", "target1")]
        while True:
            while self.command is None:
                yield self.command_gate
            item = self.command
            self._account("vector", item.tag)
            if item.block.opcode is Opcode.SCALAR:
                yield from self._scalar(item.sections["scalar"], ports[0])
                self._command_done()
            else:
                yield from self._elementwise(item.sections["vector"], ports)
            yield clock.now + 1
            self.count["completed"] += 1
            self._account("vector", None)
            self.gate.open()

    def _scalar(self, scalar, port):
        """Process: a SCALAR descriptor that the engine sees now; returns in its last cycle."""
        clock, config = self.clock, self.config
        time = clock.now + 4
        if scalar["enable_load"]:
            collector = self.collectors["source0"]
            yield from collector.add(0, time, time)
            yield from collector.finish()
            while collector.sent.start is None:
                yield self.reads.issued
            time = collector.sent.end + RESPONSE_QUEUE + 1
        time += 4 * scalar["count"] + 1
        if scalar["enable_dump"]:
            for line in range(ceil_div(4 * REGISTERS, config.line_bytes)):
                time += config.line_bytes // 4 + 1
                time = yield from port.write(line, time)
            yield max(clock.now, time + 2)
            yield from port.drain()
            time = clock.now + 1
        yield time

    def _elementwise(self, vector, ports):
        """Process: a VECTOR descriptor that the engine sees now; returns in its last cycle."""
        clock, config = self.clock, self.config
        counts, parts = [vector[f"count{k}"] for k in range(5)], config.parts
        total = math.prod(counts) * parts

        def lines_of(name, width, loops, parts):
            """Lines of the parts of a source's or target's vectors, in loop order."""
            strides = [vector[f"{name}_stride{k}"] for k in range(5)] + [config.lanes << width]
            return walk([*loops, parts], strides, vector[name]) // config.line_bytes

        loss, pool, enabled = vector["function"] == Function.NITI_LOSS, vector["pool"], vector["enable"]
        labels = loss or vector["function"] == Function.SQUARED_ERROR
        start = clock.now + 6                        # first request
        taken = Gate(clock)
        sources: list[Source | None] = []
        for k in range(3):
            if vector["function"] == Function.FILL or k and not enabled >> k - 1 & 1:
                sources.append(None)
                continue
            single = labels and k == 1
            loops = counts[:4] + [1] if single else counts
            source = Source(lines_of(f"source{k}", vector[f"source{k}_width"], loops, 1 if single else parts))
            sources.append(source)
            clock.at(start, self._source(f"source{k}", source, taken, start))
        targets = []
        loops = counts[:3] + [1, 1] if pool else counts
        written = math.prod(loops) * parts           # parts of a target
        last = bool(pool and not vector["state"])    # the pool comes after the lanes
        for k in range(2):
            if not enabled >> 3 - k & 1:
                continue
            lines = lines_of(f"target{k}", 0 if k else vector["target_width"], loops, parts)
            targets.append((ports[k], lines.tolist()))
        if loss:
            results = self._loss(vector, sources, taken, math.prod(counts[:4]), counts[4])
        else:
            results = self._lanes(written if not last else total, sources, taken, start, pool=pool and not last,
                                  label_every=counts[4] * parts if labels else 1,
                                  first=start + DRAW if self._draws(vector) else start)
        self._written = start
        handed, end = 0, start                       # parts handed to the writers; when the last line has left
        while handed < written:
            time = None
            for _ in range(pooled_parts(handed, parts) if last else 1):
                # The lanes' next result; until its time is known they wait.
                while True:
                    what = next(results)
                    if not isinstance(what, tuple):
                        yield what
                        continue
                    time = what[0]
                    break
                self._written = max(self._written, time)
            latest = time = max(time, self._written) + last
            for port, lines in targets:
                line = lines[handed]
                if handed + 1 == written or lines[handed + 1] != line:       # the line is whole
                    at = port.quick(line, time + 1)
                    if at is None:
                        at = yield from port.write(line, time + 1)
                    end, latest = max(end, at), max(latest, at - 1)      # the next part may come as the line leaves
            self._written = latest - last
            handed += 1
            if last and parts > 1 and handed % parts == 0:
                self._written += POOL_HOLD
        end = max(end, latest)
        if end + 1 > clock.now:
            yield end + 1
        self._command_done()
        for port, _ in targets:
            yield from port.collector.finish()
        for port, _ in targets:
            yield from port.drain()
        end += 2 + (RANGE + 2 * (config.lanes - 1).bit_length()) * (enabled >> 4 & 1)
        if clock.now < end:
            yield end

    @staticmethod
    def _draws(vector) -> bool:
        lanes = vector["function"] in (Function.ELEMENTWISE, Function.UPDATE, Function.SQUARED_ERROR)
        return lanes and Rounding(vector["rounding"]) in DRAWING

    def _take_vector(self, source, index: int, free: int):
        """Process: the cycle in which a reader takes its vector ``index``, if its register is free from ``free`` on."""
        if index == source.next_first:
            line = source.line
            while line >= len(source.places) or source.places[line][0].start is None:
                yield self.reads.issued
            burst, place = source.places[line]
            time = burst.arrival(place) + RESPONSE_QUEUE
            if time < free:
                time = free
            source.responses.append(time)
            source.line = line = line + 1
            source.next_first = source.first[line] if line < len(source.first) else -1
        else:
            time = max(free, source.taken[-1] + 1)
        source.taken.append(time)
        return time

    def _lanes(self, total: int, sources, taken, start: int, *, pool: bool, label_every: int, first: int):
        """Process that yields (time,) of each result, and what it waits for before it knows. Vectors come in parts.
        ``pool``: four of source 0 make one. ``label_every``: results for a part of source 1. ``first``: when the lanes
        may begin.
        """
        if sources[0] is None:                       # FILL
            for index in range(total):
                yield (start + 1 + index,)
            return
        main, others = sources[0], [source for source in sources[1:] if source is not None]
        parts = self.config.parts
        entered, step, free, drawn = first - 1, 0, 0, 0      # drawn: parts that the pool has taken
        steps = deque([0] * ROUND, ROUND)
        for index in range(total):
            if pool:
                free = max(free, steps[0])           # of the pool's register, when its window goes on
                for _ in range(pooled_parts(index, parts)):
                    time = yield from self._take_vector(main, drawn, free)
                    free, drawn = time + 1, drawn + 1
                if parts > 1 and (index + 1) % parts == 0:
                    free += POOL_HOLD
                entered = max(time + 3, entered + 1, steps[0])
            else:
                time = yield from self._take_vector(main, index, entered)
                entered = max(time + 1, entered + 1, steps[0])
            ready = max(entered + ROUND, step + 1, self._written - BEHIND)
            for source in others:
                if index % label_every:
                    continue
                ready = max(ready, 1 + (yield from self._take_vector(source, index // label_every, step)))
            step = ready
            steps.append(step)
            if taken.waiting:
                taken.open()
            yield (step + 1 + BEHIND,)

    def _loss(self, vector, sources, taken, samples: int, vectors: int):
        """Process like ``_lanes``: see hw.loss for its states."""
        logits, labels = sources[:2]
        classes, lanes, parts = vector["classes"], self.config.lanes, vectors * self.config.parts
        finish = (classes - 1) * ceil_div(DIVISION, DIVIDERS) + DIVISION
        load = held = label_held = 0                 # first class; when the readers' registers are free
        for sample in range(samples):
            load = max(load, 1 + (yield from self._take_vector(labels, sample, label_held)))
            for k in range(parts):           # one of padding is dropped
                time = yield from self._take_vector(logits, sample * parts + k, held)
                load = max(load, time + 1) + max(1, 2 * min(lanes, classes - k * lanes))
                held = load - 1
            taken.open()
            divide = load + 1 + classes + WEIGHT_STAGES + 1
            label_held = divide + WEIGHT_STAGES + finish + 2
            send = label_held + 3
            for k in range(parts):           # one of padding leaves when the one before has
                send += max(2, 2 * min(lanes, classes - k * lanes))
                load = send
                yield (send,)
                send = max(send, self._written)

    def _source(self, name, source, taken, start: int):
        """Requests of one source, as far ahead as its FIFO and its notes go."""
        collector, depth, first = self.collectors[name], READERS[name], source.first
        time = start - 1
        before = -1
        for number, (line, index) in enumerate(zip(source.lines, first, strict=True)):
            noted, place = index - NOTES, number - depth
            while noted >= len(source.taken):
                yield from collector.pause(taken)
            valid = time + index - before
            if noted >= 0 and source.taken[noted] >= valid:
                valid = source.taken[noted] + 1
            ready = valid = collector.passed(valid)
            if place >= 0:
                while place >= len(source.responses):
                    if collector.open is not None and valid < collector._expiry((yield from collector._room())):
                        yield taken                   # held
                    else:
                        yield from collector.pause(taken)
                if source.responses[place] >= ready:
                    ready = source.responses[place] + 1
            if collector.quick(line, valid, ready) is None:
                yield from collector.add(line, valid, ready)
            time, before = valid, index
            source.places.append((collector.open, collector.open.lines - 1))
        yield from collector.finish()


def estimate(config: CoreConfig, program, settings: MemorySettings) -> Estimate:
    """Timeline of a :class:`sim.program.Program`; ``cycles`` by (layer, pass)."""
    return Estimate(config, program.blocks, {key: key for key in program.tags}, settings)


def estimate_passes(config: CoreConfig, shapes, settings: MemorySettings) -> list[int]:
    """Cycles of each single product pass of `sim.products`, in its order and as it counts them."""
    from .products import Plan

    rows = []
    for item in Plan(config, shapes, operands=False).passes:
        timeline = Estimate(config, item.blocks, {(item.shape.name, item.step): 0}, settings)
        rows.append(round(timeline.last_write - timeline.first))
    return rows


def add_arguments(parser: argparse.ArgumentParser):
    from .products import add_memory_arguments

    parser.add_argument("--method", default="niti")
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--out", type=Path, help="folder for estimate.json")
    add_memory_arguments(parser)


def main(options, config: CoreConfig) -> int:
    from golden import data as data_module

    from .products import memory_settings

    settings = memory_settings(options)
    batch = data_module.data_set(options.data).batch if options.batch is None else options.batch
    compiled, timeline = estimate_network(config, options.method, options.model, options.data, batch, settings)
    elements = config.rows * config.columns
    rows = [{"layer": layer, "pass": step, "cycles": round(cycles), "macs": compiled.macs.get((layer, step), 0)}
            for (layer, step), cycles in timeline.cycles.items()]
    print(f"{'layer':12} {'pass':18} {'cycles':>10} {'share':>7}")
    for row in rows:
        share = f"{100 * row['macs'] / (elements * row['cycles']):6.1f}%" if row["macs"] else ""
        print(f"{row['layer']:12} {row['pass']:18} {row['cycles']:10} {share:>7}")
    macs = sum(row["macs"] for row in rows)
    print(f"{'step':12} {'':18} {round(timeline.total):10} {100 * macs / (elements * timeline.total):6.1f}%")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "estimate.json").write_text(json.dumps(
            {"core": config.name, "model": options.model, "data": options.data, "batch": batch,
             "memory": dataclasses.asdict(settings), "cycles": round(timeline.total),
             "share": macs / (elements * timeline.total), "rows": rows}, indent=1) + "\n")
    return 0


def estimate_network(config: CoreConfig, method: str, model: str, data: str, batch: int, settings: MemorySettings):
    """(compiled, timeline) of one training step."""
    import golden.train

    from .compiler import compile_training

    if method == "dfp":
        raise CompileError("the estimate knows no microprograms: use --method niti, niti-2020 or wage; "
                           "python -m sim train measures dfp")
    network = golden.train.build(method, model, 1, data=data, batch=batch)
    compiled = compile_training(config, network, batch=batch, capacity=1, steps=1, rate=network.learning_rate())
    return compiled, estimate(config, compiled.program, settings)
