"""``python -m sim estimate``: cycles by layer and pass without running the core.

The estimate walks a program's descriptors and follows when each unit starts and ends its part. Nothing is computed
and no cycle is stepped through: the grain is a burst of memory lines, a tile of the array, and 16 vectors of an
elementwise pass. What it knows is the documented timing of the units:

* sequencer: a descriptor takes a cycle per word; the program's lines are fetched ahead as far as its FIFO goes;
* an engine's units take their part of a descriptor when they are free and its dependencies are met;
* read channel: bursts of all clients by turns, in order, with memory's latency and rate and at most
  ``OUTSTANDING_LINES`` lines under way; write channel alike, with buffers of 32 lines a client;
* operand buffers: two banks, a line may be used when it has arrived; folding takes a byte per cycle;
* weight ring: tiles are fetched ahead as far as there is room; a tile needs n cycles to shift in, tiles follow every
  max(pixels, 2 n - 1) cycles;
* results wait for room in their FIFO; a store command ends with its acknowledgement;
* vector passes move one vector per cycle if all sources have arrived; a pass ends with its acknowledgement;
* scalar programs take three cycles an operation; the loss unit's time is per class and sample (:mod:`hw.loss`).

The cycles of a (layer, pass) are those in which its engine works or waits for it: for products from the moment
its descriptor is decoded (or the block before ended, if later) to its last fed vector; for vector passes from
the start to the acknowledgement, as the core's trace outputs count them (`sim.train`).
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import heapq
import itertools
import json
from collections import defaultdict, deque
from pathlib import Path

import numpy as np

from golden.rounding import Rounding
from hw.array import SystolicArray
from hw.coalescer import BURST_LINES
from hw.config import CoreConfig
from hw.core import READERS, WRITERS
from hw.descriptor import DESCRIPTOR_WORDS, FORMATS, Mode, Opcode
from hw.feeder import FEED_LATENCY, result_control
from hw.lanes import DRAWING
from hw.operand_buffer import FOLD_LINES
from hw.random_words import RandomWords
from hw.read_port import OUTSTANDING_LINES, READ_PATIENCE
from hw.scalar import REGISTERS
from hw.sequencer import last_word
from hw.vector import Function
from hw.write_port import BUFFER_LINES, WRITE_PATIENCE

from .layout import ceil_div
from .program import CompileError
from .shared import MemorySettings

__all__ = ["Estimate", "estimate", "estimate_passes", "estimate_network"]

# Fixed parts of the pipelines, in cycles (docstrings of hw.read_port, hw.write_port, hw.operand_buffer, hw.vector).
READ_ISSUE = 4           # from a burst's last line to its address at memory
READ_RETURN = 1          # from a line's last beat to its use in the operand buffer
FIFO_RETURN = 3          # the same through a response FIFO
WRITE_ISSUE = 5          # from a burst's last line to its first beat
WRITE_RETURN = 2         # from the acknowledgement to the client's `idle`
ACCUMULATOR = 3          # from a result on the last column to the store
LANES = 1                # from a vector's arrival to the writer
LOSS = 26.25             # per sample (hw.loss)
VECTOR_GRAIN = 16


class Gate:
    """Processes that wait for a change."""

    def __init__(self, clock: Clock):
        self.clock, self.waiting = clock, []

    def open(self):
        for process in self.waiting:
            self.clock.at(self.clock.now, process)
        self.waiting = []


class Clock:
    """Runs processes: generators that yield the time to go on at, or a gate to wait for."""

    def __init__(self):
        self.now, self._queue, self._order = 0, [], itertools.count()

    def at(self, time, process):
        heapq.heappush(self._queue, (max(self.now, time), next(self._order), process))

    def run(self):
        while self._queue:
            self.now, _, process = heapq.heappop(self._queue)
            try:
                what = next(process)
            except StopIteration:
                continue
            if isinstance(what, Gate):
                what.waiting.append(process)
            else:
                self.at(what, process)


@dataclasses.dataclass
class Burst:
    """Lines on their way. Once ``start`` is known, the first is complete at start + ``whole`` and the others follow
    every ``cost`` cycles, ``credit`` cycles earlier if the channel rested before."""

    lines: int
    cost: float
    whole: float = 1.0
    start: float | None = None
    credit: float = 0.0
    acknowledged: float | None = None

    def arrival(self, line: int) -> float:
        return self.start + self.whole + line * self.cost - (self.credit if line else 0)

    @property
    def end(self) -> float:
        return self.arrival(self.lines - 1)


class Channel:
    """Read or write channel: bursts by turns, data in order."""

    def __init__(self, clock: Clock, clients, cost: float, whole: int, settings: MemorySettings, *, write: bool):
        self.clock, self.cost, self.whole, self.write = clock, cost, whole, write
        self.latency, self.bursts = settings.latency, settings.outstanding
        self.pending: dict[str, deque] = {name: deque() for name in clients}
        self.work, self.issued = Gate(clock), Gate(clock)
        self.flying: deque[Burst] = deque()
        self.last, self.next_issue, self.free = next(iter(clients)), 0.0, 0.0
        self.lines = 0
        self.busy = 0.0
        clock.at(0, self._pump())

    def post(self, client: str, lines: int) -> Burst:
        burst = Burst(lines, self.cost, self.whole)
        self.pending[client].append(burst)
        self.work.open()
        return burst

    def done_at(self, burst: Burst) -> float:
        return burst.acknowledged if self.write else burst.end

    def _allowed(self) -> float:
        """When the next burst may be issued: lines and bursts under way are limited."""
        while self.flying and self.done_at(self.flying[0]) <= self.clock.now:
            self.lines -= self.flying.popleft().lines
        time, rest = self.next_issue, self.lines
        for burst in self.flying:
            if rest <= OUTSTANDING_LINES - BURST_LINES:
                break
            over = rest - (OUTSTANDING_LINES - BURST_LINES)
            if not self.write and over < burst.lines:
                time = max(time, burst.arrival(over - 1))
                break
            rest -= burst.lines
            time = max(time, self.done_at(burst))
        return time

    def _begin(self, burst: Burst, earliest: float):
        """Memory's rate is a credit of at most two beats: after a rest one line may come early."""
        spare = self.cost - self.whole
        base = max(self.free, earliest)
        burst.start = max(self.free - spare, earliest)
        burst.credit = burst.start - base + spare
        self.free = base + burst.lines * self.cost

    def _pump(self):
        while True:
            clients = [name for name, queue in self.pending.items() if queue]
            if not clients:
                yield self.work
                continue
            time = self._allowed()
            if time > self.clock.now:
                yield time
                continue
            names = list(self.pending)
            turn = names.index(self.last)
            self.last = min(clients, key=lambda name: (names.index(name) - turn - 1) % len(names))
            burst = self.pending[self.last].popleft()
            now = self.clock.now
            self.next_issue = now + 1
            if self.write:
                first = now + WRITE_ISSUE
                if len(self.flying) >= self.bursts:
                    first = max(first, self.flying[len(self.flying) - self.bursts].acknowledged + 1)
                self._begin(burst, first)
                burst.acknowledged = burst.end + self.latency
            else:
                address = now + READ_ISSUE
                if len(self.flying) >= self.bursts:
                    address = max(address, self.flying[len(self.flying) - self.bursts].end)
                self._begin(burst, address + self.latency)
            self.busy += burst.lines * self.cost
            self.flying.append(burst)
            self.lines += burst.lines
            self.issued.open()


def walk(counts, strides, address: int) -> np.ndarray:
    """Addresses of nested loops, the outermost first."""
    result = np.array([address], np.int64)
    for count, stride in zip(counts, strides, strict=True):
        result = (result[:, None] + np.arange(count, dtype=np.int64) * stride).reshape(-1)
    return result


def bursts(lines: np.ndarray, page: int, times=None, patience: int = READ_PATIENCE) -> np.ndarray:
    """Ends (exclusive) of the bursts that the coalescer makes of consecutive line addresses, where lines that come
    at ``times`` more than its patience apart part them."""
    parted = (np.diff(lines) != 1) | (lines[1:] % page == 0)
    if times is not None:
        parted |= np.diff(times) > patience
    breaks = np.flatnonzero(parted) + 1
    starts = np.concatenate([[0], breaks, [len(lines)]])
    ends = [np.arange(first + BURST_LINES, last, BURST_LINES) for first, last in zip(starts, starts[1:], strict=False)
            if last - first > BURST_LINES]
    return np.sort(np.concatenate([starts[1:], *ends])) if ends else starts[1:]


class Load:
    """A band in an operand buffer: when its lines are there."""

    def __init__(self, lines: int):
        self.lines, self.number = lines, None
        self.pieces: list[tuple[int, Burst]] = []        # (first line, burst), in order
        self.complete = False

    def covering(self, line: int):
        for first, burst in self.pieces:
            if first <= line < first + burst.lines:
                return burst.arrival(line - first) + READ_RETURN if burst.start is not None else None
        return None


class Item:
    """A descriptor on its way."""

    def __init__(self, block, tag):
        self.block, self.tag = block, tag
        self.sections = {label: defaultdict(int, block.sections.get(label, {})) for label, _ in FORMATS[block.opcode]}
        self.runnable = None
        self.taken = 0
        self.loads: dict[str, Load | None] = {}


class Estimate:
    """Timeline of one program on one core and memory; ``cycles[tag]`` after construction.

    ``total`` ends with the last write, ``first`` is when the first product was decoded.
    """

    def __init__(self, config: CoreConfig, blocks, tags: dict, settings: MemorySettings):
        self.config, self.settings = config, settings
        self.clock = clock = Clock()
        beats = config.line_bytes // config.beat_bytes

        def cost(rate):
            return max(beats, config.line_bytes / rate) if rate else beats
        self.reads = Channel(clock, READERS, cost(settings.read_rate), beats, settings, write=False)
        self.writes = Channel(clock, WRITERS, cost(settings.write_rate), beats, settings, write=True)
        self.page = 4096 // config.line_bytes
        array = SystolicArray(config, result_control(config))
        array._MustUse__silence = True              # only asked for its latencies, never elaborated
        self.settle = array.settle
        self.array_latency = {mode: array.latency(mode) for mode in Mode}
        self.cycles: dict = defaultdict(float)
        self.last_write = 0.0
        self.first = None
        self.span: dict = {}
        self._state = {"product": None, "vector": None}
        self._since = {"product": 0.0, "vector": 0.0}
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
        clock.run()
        self.total = self.clock.now

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

    def _sequencer(self, blocks, tags):
        clock, config = self.clock, self.config
        words = config.line_bytes // 4
        queue: deque[tuple[Burst, int]] = deque()
        ahead, total, have = READERS["program"], len(blocks) * DESCRIPTOR_WORDS // words + READERS["program"], 0
        burst = min(ahead, BURST_LINES)
        yield clock.now + burst
        queue.append((self.reads.post("program", burst), burst))
        asked = burst
        index, line = 0, None                    # word and line in hand

        def advance(count):
            """Consume words; yields until their lines are there."""
            nonlocal index, line, have, asked
            for _ in range(count):
                if index % words == 0 or line is None:
                    while True:
                        first, size = queue[0]
                        if first.start is None:
                            yield self.reads.issued
                            continue
                        break
                    time = first.arrival(have) + FIFO_RETURN
                    if time > clock.now:
                        yield time
                    line = True
                index += 1
                if index % words == 0:
                    have += 1
                    if have == queue[0][1]:
                        queue.popleft()
                        have = 0
                    if asked < total:
                        queue.append((self.reads.post("program", 1), 1))
                        asked += 1
            yield clock.now + count

        for block in blocks:
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
            if engine == "vector":
                self._tag = item.tag
                if self._state["vector"] is not None:
                    self._account("vector", item.tag)
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
            while number >= 2 and self.advanced[which] < number:
                yield self.load_gate
            current = Load(0)
            self.begun[which] += 1
            self.loads[which].append(current)
            self.load_gate.open()
            lines = walk([load["tiles"], load["runs"], load["lines"]],
                         [load["tile_stride"], load["run_stride"], config.line_bytes], load["address"])
            lines //= config.line_bytes
            if load["fold"]:
                yield from self._fold(name, load, current, len(lines))
            else:
                done, previous = 0, None
                for end in bursts(lines, self.page).tolist():
                    yield clock.now + end - done + self._patience(end, lines, done, READ_PATIENCE)
                    while previous is not None and previous.start is None:
                        yield self.reads.issued
                    previous = self.reads.post(name, end - done)
                    current.pieces.append((done, previous))
                    self.load_gate.open()
                    done = end
                while previous.start is None:
                    yield self.reads.issued
                yield previous.end + READ_RETURN - 1
            current.complete = True
            self.load_gate.open()
            yield clock.now + 1

    def _fold(self, name: str, load, current: Load, raw: int):
        """Raw lines arrive at most FOLD_LINES ahead; a row takes a cycle per byte, padding included."""
        clock, config = self.clock, self.config
        shifts = max(load["fold_pad_bytes"] + load["fold_row_bytes"],
                     load["fold_kernel_bytes"] + (load["fold_columns"] - 1) * load["fold_step_bytes"])
        row = 2 + max(shifts, load["fold_columns"] * load["fold_slices"])
        cycles = row / load["fold_row_bytes"]       # per raw byte
        left = load["fold_skip"] + load["fold_rows"] * load["fold_row_bytes"]
        packed = ceil_div(load["fold_rows"] * load["fold_columns"] * load["fold_slices"], 4)
        posted: deque[Burst] = deque()
        first = min(FOLD_LINES, raw)
        yield clock.now + first
        burst = self.reads.post(name, first)
        posted.extend((burst, k) for k in range(first))
        asked, shown, time = first, 0, clock.now
        for k in range(raw):
            burst, place = posted.popleft()
            while burst.start is None:
                yield self.reads.issued
            time = max(time, burst.arrival(place) + READ_RETURN)
            yield time
            if asked < raw:
                yield clock.now + READ_PATIENCE + 2
                posted.append((self.reads.post(name, 1), 0))
                asked += 1
            time += min(config.line_bytes, left) * cycles
            left -= config.line_bytes
            ready = min(packed, int(packed * (k + 1) / raw))
            if ready > shown:
                cost = (time - clock.now) / (ready - shown)
                current.pieces.append((shown, Burst(ready - shown, cost, start=clock.now)))
                shown = ready
                self.load_gate.open()
        yield time
        current.pieces.append((shown, Burst(packed - shown + 1, 0, start=clock.now)))

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
            yield self.reads.issued if not load.pieces or load.pieces[-1][1].start is None else self.load_gate

    def _pending(self, which: str) -> bool:
        number = self.advanced[which] - 1
        return number >= len(self.loads[which]) or not self.loads[which][number].complete

    def _patience(self, end: int, lines, done: int, patience: int) -> int:
        """Further cycles until the coalescer closes a burst: nothing follows that would close it."""
        full = end - done == BURST_LINES or (lines[end - 1] + 1) % self.page == 0
        return patience if end == len(lines) and not full else 0

    # Weights

    def _weights(self):
        self.tiles: deque = deque()                 # (burst, lines before it) of each requested tile
        self.ring_used = 0
        self.ring_gate, self.tile_gate = Gate(self.clock), Gate(self.clock)
        self.clock.at(0, self._weight_requests())

    def _weight_requests(self):
        clock, config = self.clock, self.config
        while True:
            item = yield from self._take("weights")
            yield clock.now + 1
            feed, weights = item.sections["feed"], item.sections["weights"]
            if feed["mode"] == Mode.GRADIENT:
                yield clock.now + 1
                continue
            n = (config.columns if feed["mode"] == Mode.FORWARD else config.rows) // 4
            starts = walk([feed[f"tiles{k}"] for k in range(4)], [weights[f"stride{k}"] for k in range(4)],
                          weights["address"] - weights["address"] % config.line_bytes) // config.line_bytes
            lines = (starts[:, None] + np.arange(n)).reshape(-1)
            done, previous = 0, None
            for end in bursts(lines, self.page).tolist():
                size = end - done
                while self.ring_used + size > config.weight_lines:
                    yield self.ring_gate
                self.ring_used += size
                yield clock.now + size
                while previous is not None and previous.start is None:
                    yield self.reads.issued
                previous = self.reads.post("weights", size)
                # Lines of the last tile that this burst completes.
                for tile in range(done // n, end // n + (end % n > 0)):
                    last = (tile + 1) * n - 1
                    if done <= last < end:
                        self.tiles.append((previous, last - done, n))
                self.tile_gate.open()
                done = end
            yield clock.now + 1

    def _tile(self):
        """Process: arrival of the next weight tile and its lines."""
        while not self.tiles:
            yield self.tile_gate
        burst, place, lines = self.tiles[0]
        while burst.start is None:
            yield self.reads.issued
        self.tiles.popleft()
        return burst.arrival(place) + READ_RETURN, lines

    def _free_ring(self, time, lines):
        yield time
        self.ring_used -= lines
        self.ring_gate.open()

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
                    clock.at(begin + n + 1, self._free_ring(begin + n + 1, lines))
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
        self.accepted: deque = deque()              # (results in all, time) as the store takes them
        self.accepted_count = 0

    def _results_from(self, first, last, count, mode):
        """Vectors fed from `first` to `last` are results; the store sees them later."""
        way = FEED_LATENCY + self.array_latency[mode] + self.config.columns + ACCUMULATOR
        self.produced.append((first + way, count, (last - first + 1) / count))
        self.result_gate.open()

    def _room(self, count):
        """Process: time at which `count` more results have a place; reserves them."""
        self.reserved += count
        need = self.reserved - self.config.result_entries
        while self.accepted_count < need:
            yield self.accepted_gate
        while self.accepted and self.accepted[0][0] < need:
            self.accepted.popleft()
        return self.accepted[0][1] if self.accepted and need > 0 else 0

    def _write(self, client: str, size: int, buffered: deque):
        """Process: hand a burst to the write channel; waits while the client's buffer is full."""
        while buffered and sum(burst.lines for burst in buffered) + size > BUFFER_LINES + BURST_LINES:
            head = buffered[0]
            while head.start is None:
                yield self.writes.issued
            if head.end > self.clock.now:
                yield head.end
            buffered.popleft()
        burst = self.writes.post(client, size)
        buffered.append(burst)
        return burst

    def _store(self):
        clock, config = self.clock, self.config
        buffered: deque[Burst] = deque()
        segment, used = None, 0
        while True:
            item = yield from self._take("store")
            yield clock.now + 1
            store, enabled = item.sections["store"], item.sections["feed"]["last"]
            if enabled:
                addresses = walk([store[f"count{k}"] for k in range(4)] + [store["run"]],
                                 [store[f"stride{k}"] for k in range(4)] + [config.line_bytes], store["address"])
                yield clock.now + 1
                lines = addresses // config.line_bytes
                done, burst = 0, None
                for end in bursts(lines, self.page).tolist():
                    while done < end:
                        while segment is None or used == segment[1]:
                            while not self.produced:
                                yield self.result_gate
                            segment, used = self.produced.popleft(), 0
                        # Results that come slowly leave in short bursts.
                        size = end - done if segment[2] <= 2 else min(4, end - done)
                        left, time = size, clock.now
                        while left:
                            if used == segment[1]:
                                while not self.produced:
                                    yield self.result_gate
                                segment, used = self.produced.popleft(), 0
                            part = min(left, segment[1] - used)
                            time = max(time + part, segment[0] + (used + part) * segment[2])
                            used += part
                            left -= part
                        yield max(clock.now, time) + self._patience(done + size, lines, done, WRITE_PATIENCE)
                        burst = yield from self._write("store", size, buffered)
                        self.accepted_count += size
                        self.accepted.append((self.accepted_count, clock.now))
                        self.accepted_gate.open()
                        done += size
                while burst.start is None:
                    yield self.writes.issued
                self.last_write = max(self.last_write, burst.end)
                self.span[item.tag] = burst.end
                yield burst.acknowledged + WRITE_RETURN
            self.count["stored"] += 1
            yield clock.now + 1
            self.gate.open()

    # Vector engine

    def _vector_command(self):
        """The engine's command register: free for the next descriptor before the last one is acknowledged."""
        while True:
            item = yield from self._take("vector")
            yield self.clock.now + 1
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
        while True:
            while self.command is None:
                yield self.command_gate
            item = self.command
            self._account("vector", self._tag)
            if item.block.opcode is Opcode.SCALAR:
                yield from self._scalar(item.sections["scalar"])
            else:
                yield from self._elementwise(item.sections["vector"])
            if self.command is item:
                self._command_done()
            self.count["completed"] += 1
            yield clock.now + 1
            self._account("vector", None)
            self.gate.open()

    def _scalar(self, scalar):
        clock, config = self.clock, self.config
        yield clock.now + 2
        if scalar["enable_load"]:
            burst = self.reads.post("source0", 1)
            while burst.start is None:
                yield self.reads.issued
            yield burst.end + FIFO_RETURN + 2
        yield clock.now + 3 * scalar["count"] + 2
        if scalar["enable_dump"]:
            lines = ceil_div(4 * REGISTERS, config.line_bytes)
            gap = REGISTERS // lines + 1
            yield clock.now + 3
            if gap > WRITE_PATIENCE:
                for _ in range(lines):
                    yield clock.now + gap
                    burst = self.writes.post("target0", 1)
            else:
                yield clock.now + gap * lines
                burst = self.writes.post("target0", lines)
            while burst.start is None:
                yield self.writes.issued
            yield burst.acknowledged + WRITE_RETURN + (WRITE_PATIENCE if lines < BURST_LINES else 0)

    def _elementwise(self, vector):
        clock, config = self.clock, self.config
        counts = [vector[f"count{k}"] for k in range(5)]
        total = int(np.prod(counts))
        loss, pool = vector["function"] == Function.NITI_LOSS, vector["pool"]
        labels = loss or vector["function"] == Function.SQUARED_ERROR
        elementwise = vector["function"] in (Function.ELEMENTWISE, Function.UPDATE, Function.SQUARED_ERROR)
        drawing = elementwise and Rounding(vector["rounding"]) in DRAWING
        yield clock.now + 4
        progress = Gate(clock)
        state = {"consumed": 0}
        sources, targets = [], []

        def lines_of(name, loop_counts):
            addresses = walk(loop_counts, [vector[f"{name}_stride{k}"] for k in range(5)], vector[name])
            lines = addresses // config.line_bytes
            fresh = np.concatenate([[True], np.diff(lines) != 0])
            return lines[fresh], np.flatnonzero(fresh)

        enabled = vector["enable"]
        for k in range(3):
            if k and not enabled >> k - 1 & 1:
                continue
            name = f"source{k}"
            loop_counts = counts[:4] + [1] if labels and k == 1 else counts
            lines, iterations = lines_of(name, loop_counts)
            scale = counts[4] if labels and k == 1 else 1
            source = {"atoms": bursts(lines, self.page, iterations).tolist(), "first": iterations * scale,
                      "hard": set(bursts(lines, self.page).tolist()), "ends": [], "posted": []}
            sources.append(source)
            clock.at(clock.now, self._source(name, source, READERS[name], progress, state))
        for name in ("target0", "target1"):
            if not enabled >> {"target0": 3, "target1": 2}[name] & 1:
                continue
            loop_counts = counts[:3] + [1, 1] if pool else counts
            lines, iterations = lines_of(name, loop_counts)
            # Lines that come slowly, because sources are slow, leave one by one.
            pace = max(1.0, sum(len(source["first"]) for source in sources) * self.reads.cost / total)
            pace = 100 if loss else pace * (4 if pool else 1)
            ends = bursts(lines, self.page, iterations * pace, WRITE_PATIENCE)
            # The last vector of each burst's last line.
            after = np.append(iterations, int(np.prod(loop_counts)))[ends] * (4 if pool else 1)
            targets.append({"name": name, "ends": ends, "after": after, "sent": 0, "buffered": deque(), "last": None})
        time = clock.now + (RandomWords.key_latency + RandomWords.latency + 1 if drawing else 0)
        if loss:
            classes = vector["classes"]
            per_sample = classes * (3 + max(1, 13 / 4)) + counts[4] + LOSS
            grain = counts[4]
        else:
            grain = VECTOR_GRAIN
        done = 0
        while done < total:
            stop = min(total, done + grain)
            ready = 0
            for source in sources:
                line = int(np.searchsorted(source["first"], stop - 1, "right")) - 1
                while not source["ends"] or source["ends"][-1] <= line:
                    yield self.reads.issued
                number = bisect.bisect_right(source["ends"], line)
                while source["posted"][number].start is None:
                    yield self.reads.issued
                first = source["ends"][number - 1] if number else 0
                ready = max(ready, source["posted"][number].arrival(line - first) + FIFO_RETURN)
            time = max(time + (per_sample if loss else stop - done), ready + 1)
            yield max(clock.now, time)
            time = clock.now
            done = stop
            state["consumed"] = done
            progress.open()
            for target in targets:
                while target["sent"] < len(target["ends"]) and target["after"][target["sent"]] <= done:
                    k = target["sent"]
                    size = int(target["ends"][k] - (target["ends"][k - 1] if k else 0))
                    target["last"] = yield from self._write(target["name"], size, target["buffered"])
                    target["sent"] += 1
            time = max(time, clock.now)
        yield clock.now + LANES
        self._command_done()
        if enabled >> 4 & 1:
            yield clock.now + 3 + (config.vector - 1).bit_length()
        if targets:
            yield clock.now + WRITE_PATIENCE
        for target in targets:
            while target["last"].start is None:
                yield self.writes.issued
            self.last_write = max(self.last_write, target["last"].end)
            if target["last"].acknowledged + WRITE_RETURN > clock.now:
                yield target["last"].acknowledged + WRITE_RETURN

    def _source(self, name, source, depth, progress, state):
        """Requests of one source, as far ahead as its FIFO and its notes go."""
        clock, posted, atoms, first = self.clock, source["posted"], source["atoms"], source["first"]

        def fits(end):
            used = int(np.searchsorted(first, state["consumed"], "right")) - 1       # lines left behind
            return (end - max(used, 0) <= depth or end - done > depth) and first[end - 1] - state["consumed"] < 256

        done = k = 0
        while k < len(atoms):
            end, before = atoms[k], done
            while not fits(end):
                yield progress
            while True:
                yield clock.now + max(end - before, int(first[end - 1] - first[before - 1]) if before else 0)
                # While the burst before waits for its turn, this one grows.
                while posted and posted[-1].start is None:
                    if (k + 1 < len(atoms) and end not in source["hard"] and atoms[k + 1] - done <= BURST_LINES
                            and fits(atoms[k + 1])):
                        break
                    yield self.reads.issued
                else:
                    break
                k += 1
                before, end = end, atoms[k]
            posted.append(self.reads.post(name, end - done))
            source["ends"].append(end)
            self.reads.issued.open()
            done = end
            k += 1


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


def estimate_network(config: CoreConfig, method: str, model: str, data: str, batch: int, settings: MemorySettings,
                     rate: int | None = None):
    """(compiled, timeline) of one training step."""
    import golden.train

    from .compiler import compile_training

    if method == "dfp":
        raise CompileError("the estimate knows no microprograms: use --method niti, niti-2020 or wage; "
                           "python -m sim train measures dfp")
    network = golden.train.build(method, model, 1, data=data, batch=batch)
    rate = network.learning_rate() if rate is None else rate
    compiled = compile_training(config, network, batch=batch, capacity=1, steps=1, rate=rate)
    return compiled, estimate(config, compiled.program, settings)
