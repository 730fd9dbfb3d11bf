"""Wide lanes: 64-bit integer processors under one microprogram, four lanes of a vector to each processor."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .divider import Divider
from .isqrt import SquareRoot
from .loop_nest import LoopNest
from .microprogram import BITS, LANE_REGISTERS, MICROPROGRAM_WORDS, RANGES, Kind, WideOperation, word_layout
from .wide_lane import WideLane

__all__ = ["WideLanes"]

# Lanes that take turns on a processor. A result is written four cycles after its operands were read, which is when
# the next instruction reads the same lane: neither forwarding nor waiting is needed.
TURNS = 4


class WideLanes(wiring.Component):
    """Runs a microprogram once per iteration of five loops.

    At the start of an iteration lane registers 0, 1, 2 take the vectors of ``x``, ``y``, ``z``, sign-extended, and
    register 3 the unsigned random words of ``draw``, each if its bit of ``use`` is set. The other registers keep
    their values, also from one run to the next; they are not reset.

    V / 4 processors (:mod:`hw.wide_lane`) serve the V lanes: in turn t of an instruction, processor p executes it for
    lane ``t * V / 4 + p``. A quarter of the area costs little time, because the pipeline is four stages deep anyway.

    Attributes
    ----------
    start : In(1)  begin; only while ``done``.
    count : In(16).array(5)  loop counts, stable while running. use : In(4)  bit 0: x, 1: y, 2: z, 3: draw.
    entry : In  first instruction of the program, stable while running and in the cycle before.
    x, y, z : In streams of V x signed(32). draw : In stream of V x 32 bits.
    output : Out stream of V x signed(32).
    store_enable, store_address, store_word : In  change a word of the microprogram memory; only while ``done``.
    scalar_select : Out(6), scalar_value : In(signed(32))  read port of the scalar registers.
    done : Out(1)  no run under way. ranges : Out(7).array(4)  bit lengths of the largest magnitudes that RANGE has seen
        in the last run, valid while ``done``.
    starved : Out(1)  waits for a source. illegal : Out(1)  pulse: unknown operation; the run ends.

    Cycles of an iteration: one per source in use (at least one), one for END, 4 per instruction, 2 more if the last
    instruction changes a register. SQRT takes 18 V more, DIVIDE 66 V (one unit serves the lanes in turn).
    After the last iteration up to 64 cycles for each of the 4 ranges, all at once.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        vectors = stream.Signature(data.ArrayLayout(signed(32), config.vector))
        super().__init__({
            "start": In(1), "count": In(16).array(5), "use": In(4), "entry": In(range(MICROPROGRAM_WORDS)),
            "x": In(vectors), "y": In(vectors), "z": In(vectors),
            "draw": In(stream.Signature(data.ArrayLayout(32, config.vector))), "output": Out(vectors),
            "store_enable": In(1), "store_address": In(range(MICROPROGRAM_WORDS)), "store_word": In(32),
            "scalar_select": Out(6), "scalar_value": In(signed(32)),
            "done": Out(1, init=1), "ranges": Out(7).array(RANGES), "starved": Out(1), "illegal": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes, processors = self.config.vector, self.config.vector // TURNS
        m.submodules.nest = nest = LoopNest(5, {})
        for k in range(5):
            m.d.comb += nest.count[k].eq(self.count[k])
        m.d.comb += nest.load.eq(self.start)

        # Microprogram: `fetch.data` is always the instruction at `pc`, `word` the one that is executed.
        m.submodules.program = program = memory.Memory(shape=32, depth=MICROPROGRAM_WORDS, init=[])
        store, fetch = program.write_port(), program.read_port()
        pc, following = Signal(range(MICROPROGRAM_WORDS)), Signal(range(MICROPROGRAM_WORDS))
        word = Signal(word_layout, reset_less=True)
        m.d.comb += [store.en.eq(self.store_enable), store.addr.eq(self.store_address), store.data.eq(self.store_word),
                     following.eq(pc), fetch.addr.eq(following)]
        m.d.sync += pc.eq(following)

        # Lane registers: one memory, because all lanes use the same addresses.
        row = data.ArrayLayout(signed(BITS), lanes)
        m.submodules.registers = registers = memory.Memory(shape=row, depth=LANE_REGISTERS, init=[])
        write = registers.write_port(granularity=1)
        port_a, port_b = registers.read_port(domain="comb"), registers.read_port(domain="comb")
        shared = Signal(signed(32))
        m.d.comb += [port_a.addr.eq(word.a), port_b.addr.eq(word.b[:4]), self.scalar_select.eq(word.b[:6]),
                     shared.eq(Mux(word.kind == Kind.SCALAR, self.scalar_value, word.b))]

        # Operands of the instruction, for the lanes whose turn it is; what becomes of the result two cycles later.
        turn = Signal(range(TURNS))
        operands = data.ArrayLayout(signed(BITS), processors)
        op, a, b = (Signal(shape, name=name, reset_less=True) for name, shape in
                    (("op", WideOperation), ("a", operands), ("b", operands)))
        fate = data.StructLayout({"valid": 1, "writes": 1, "dst": 4, "turn": range(TURNS)})
        stages = [Signal(fate, name=f"stage{k}") for k in (1, 2, 3)]
        issue, waits = Signal(), Signal()       # operands are taken; their result waits for a serial unit
        resume = Signal()                       # ... which now has it
        writes = ~word.op.matches(WideOperation.RANGE, WideOperation.WRITE)
        m.d.sync += [stages[0].valid.eq((issue & ~waits) | resume), stages[1].eq(stages[0]), stages[2].eq(stages[1])]
        with m.If(issue):
            m.d.sync += [op.eq(word.op), stages[0].dst.eq(word.dst), stages[0].turn.eq(turn), turn.eq(turn + 1),
                         stages[0].writes.eq(writes)]
            for p in range(processors):
                own_a, own_b = (Array(port.data[t * processors + p] for t in range(TURNS))[turn]
                                for port in (port_a, port_b))
                m.d.sync += [a[p].eq(own_a), b[p].eq(Mux(word.kind == Kind.LANE, own_b, shared))]

        # Processors.
        serial = Signal(range(max(2, processors)))      # a Verilog signal has at least one bit
        answers = Signal(data.ArrayLayout(BITS, processors), reset_less=True)
        results, magnitude = [], 0
        for p in range(processors):
            m.submodules[f"lane{p}"] = lane = WideLane()
            m.d.comb += [lane.op.eq(op), lane.a.eq(a[p]), lane.b.eq(b[p]), lane.serial.eq(answers[p])]
            results.append(lane.result)
            magnitude = magnitude | lane.magnitude
        seen = [Signal(BITS, name=f"seen{k}") for k in range(RANGES)]
        counts_range = Signal()
        m.d.sync += counts_range.eq(stages[0].valid & (op == WideOperation.RANGE))
        for k, bits in enumerate(seen):
            with m.If(counts_range & (stages[1].dst == k)):
                m.d.sync += bits.eq(bits | magnitude)

        written = stages[2]
        m.d.comb += write.addr.eq(written.dst)
        for lane in range(lanes):
            t, p = divmod(lane, processors)
            m.d.comb += [write.data[lane].eq(results[p]),
                         write.en[lane].eq(written.valid & written.writes & (written.turn == t))]

        # A vector leaves when its last lanes have been collected.
        collects, full = Signal(), Signal()
        m.d.comb += [collects.eq(stages[0].valid & (op == WideOperation.WRITE)), self.output.valid.eq(full)]
        with m.If(full & self.output.ready):
            m.d.sync += full.eq(0)
        with m.If(collects):
            for lane in range(lanes):
                t, p = divmod(lane, processors)
                with m.If(stages[0].turn == t):
                    m.d.sync += self.output.payload[lane].eq(a[p])
            with m.If(stages[0].turn == TURNS - 1):
                m.d.sync += full.eq(1)

        m.submodules.square_root = root = SquareRoot(32)
        m.submodules.divider = divider = Divider(BITS, BITS)
        takes_root = op == WideOperation.SQRT
        m.d.comb += [root.i.payload.eq(Array(a)[serial][:32]),
                     divider.i.payload.numerator.eq(Array(a)[serial]),
                     divider.i.payload.denominator.eq(Array(b)[serial])]

        # The source to load, and those after it. Results of the last iteration go first: there is one write port.
        chosen, rest, writing = Signal(4), Signal(4), Signal()
        sources = (self.x, self.y, self.z, self.draw)
        m.d.sync += writing.eq((issue & writes) | resume
                               | Cat(stage.valid & stage.writes for stage in stages[:2]).any())

        def choose(sources):
            first = sources & (~sources + 1)
            return [chosen.eq(first), rest.eq(sources & ~first)]

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += following.eq(self.entry)
                with m.If(self.start):
                    m.d.sync += [self.done.eq(0), *choose(self.use), *[bits.eq(0) for bits in seen],
                                 *[length.eq(0) for length in self.ranges]]
                    m.next = "LOAD"
            with m.State("LOAD"):
                m.d.sync += word.eq(fetch.data)
                loads = Signal()
                with m.If(~writing):
                    m.d.comb += [loads.eq((chosen & Cat(source.valid for source in sources)).any()),
                                 self.starved.eq(chosen.any() & ~loads), write.en.eq(loads.replicate(lanes))]
                    for k, source in enumerate(sources):
                        m.d.comb += source.ready.eq(chosen[k])
                        with m.If(chosen[k]):
                            m.d.comb += write.addr.eq(k)
                            m.d.comb += [write.data[lane].eq(source.payload[lane]) for lane in range(lanes)]
                    with m.If(loads):
                        m.d.sync += choose(rest)
                    with m.If((chosen == 0) | (loads & (rest == 0))):
                        m.next = "ISSUE"
            with m.State("ISSUE"):
                with m.If((turn == 0) & (word.op == WideOperation.END)):
                    m.d.comb += [following.eq(self.entry), nest.step.eq(1)]
                    m.d.sync += choose(self.use)
                    m.next = "LOAD"
                    with m.If(nest.last):
                        m.next = "LENGTHS"
                with m.Elif((turn == 0) & (word.op > max(WideOperation))):
                    m.d.comb += self.illegal.eq(1)
                    m.next = "LENGTHS"
                with m.Elif((turn == 0) & (word.op == WideOperation.WRITE) & (collects | (full & ~self.output.ready))):
                    pass
                with m.Else():
                    m.d.comb += [issue.eq(1), waits.eq(word.op.matches(WideOperation.SQRT, WideOperation.DIVIDE))]
                    with m.If(waits):
                        m.next = "ASK"
                    with m.If(turn == 0):
                        m.d.comb += following.eq(pc + 1)
                    with m.If(turn == TURNS - 1):
                        m.d.sync += word.eq(fetch.data)
            with m.State("ASK"):
                m.d.comb += [root.i.valid.eq(takes_root), divider.i.valid.eq(~takes_root)]
                with m.If(Mux(takes_root, root.i.ready, divider.i.ready)):
                    m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += [root.o.ready.eq(1), divider.o.ready.eq(1)]
                with m.If(root.o.valid | divider.o.valid):
                    m.d.sync += [Array(answers)[serial].eq(Mux(takes_root, root.o.payload.root,
                                                               divider.o.payload.quotient)),
                                 serial.eq(serial + 1)]
                    m.next = "ASK"
                    with m.If(serial == processors - 1):
                        m.d.comb += resume.eq(1)
                        m.d.sync += serial.eq(0)
                        m.next = "ISSUE"
            with m.State("LENGTHS"):
                with m.If(~Cat(stage.valid for stage in stages).any() & ~full):
                    m.d.sync += self.done.eq(1)
                    m.next = "IDLE"
                    for bits, length in zip(seen, self.ranges, strict=True):
                        with m.If(bits != 0):
                            m.d.sync += [bits.eq(bits >> 1), length.eq(length + 1), self.done.eq(0)]
                            m.next = "LENGTHS"
        return m
