"""Wide lanes: 64-bit integer processors under one microprogram, four lanes of a vector to each processor."""

from __future__ import annotations

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, memory, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .divider import Divider
from .interfaces import NO_BYPASS, data_register
from .isqrt import SquareRoot
from .loop_nest import LoopNest
from .microprogram import BITS, LANE_REGISTERS, MICROPROGRAM_WORDS, RANGES, Kind, WideOperation, word_layout
from .wide_lane import WideLane, decoded, lane_control

__all__ = ["WideLanes"]

# Lanes that take turns on a processor. A result is written four cycles after its operands were read, which is when
# the next instruction reads the same lane: neither forwarding nor waiting is needed.
TURNS = 4


class WideLanes(wiring.Component):
    """Runs a microprogram once per iteration of five loops, for each part of L = ``config.lanes`` elements of the
    iteration's vectors.

    At the start of an iteration lane registers 0, 1, 2 take the vectors of ``x``, ``y``, ``z``, sign-extended, and
    register 3 the unsigned random words of ``draw``, each if its bit of ``use`` is set. The other registers keep
    their values, also from one run to the next; they are not reset. Each part of a vector has registers of its own.

    L / 4 processors (:mod:`hw.wide_lane`) serve the L lanes: in turn t of an instruction, processor p executes it for
    lane ``t * L / 4 + p``. A quarter of the area costs little time, because the pipeline is four stages deep anyway.

    Attributes
    ----------
    start : In(1)  begin; only while ``done``.
    count : In(16).array(5)  loop counts, stable while running. use : In(4)  bit 0: x, 1: y, 2: z, 3: draw.
    entry : In  first instruction of the program, stable while running and in the cycle before.
    x, y, z : In streams of L x signed(32). draw : In stream of L x 32 bits.
    output : Out stream of L x signed(32).
    store_enable, store_address, store_word : In  change a word of the microprogram memory; only while ``done``.
    scalar_select : Out(6), scalar_value : In(signed(32))  read port of the scalar registers; the value is that of the
        selection of two cycles before.
    done : Out(1)  no run under way. ranges : Out(7).array(4)  bit lengths of the largest magnitudes that RANGE has seen
        in the last run, valid while ``done``.
    starved : Out(1)  waits for a source. illegal : Out(1)  pulse: unknown operation; the run ends.

    Cycles of a run: five to begin, and of a part: one per source in use (at least one) and one more, one for END, 4 per
    instruction, one more for a WRITE right after a WRITE, one more if the last instruction changes a register. SQRT
    takes 18 L more, DIVIDE 66 L (one unit serves the lanes in turn). After the last iteration up to 64 cycles for each
    of the 4 ranges, all at once.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        vectors = stream.Signature(data.ArrayLayout(signed(32), config.lanes))
        super().__init__({
            "start": In(1), "count": In(16).array(5), "use": In(4), "entry": In(range(MICROPROGRAM_WORDS)),
            "x": In(vectors), "y": In(vectors), "z": In(vectors),
            "draw": In(stream.Signature(data.ArrayLayout(32, config.lanes))), "output": Out(vectors),
            "store_enable": In(1), "store_address": In(range(MICROPROGRAM_WORDS)), "store_word": In(32),
            "scalar_select": Out(6), "scalar_value": In(signed(32)),
            "done": Out(1, init=1), "ranges": Out(7).array(RANGES), "starved": Out(1), "illegal": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        if "dfp" not in self.config.methods:
            return m             # only the ports, with nothing to do
        lanes, processors = self.config.lanes, self.config.lanes // TURNS
        parts = self.config.parts
        m.submodules.nest = nest = LoopNest(5 + (parts > 1), {})
        m.d.comb += [*(nest.count[k].eq(self.count[k]) for k in range(5)),
                     *(count.eq(parts) for count in nest.count[5:])]

        # Microprogram: `word` is executed, `upcoming` comes next, also around the end of an iteration, and `fetch.data`
        # is the instruction at `pc`. What has to be known about the word is in registers beside it.
        m.submodules.program = program = memory.Memory(shape=32, depth=MICROPROGRAM_WORDS, init=[], attrs=NO_BYPASS)
        store, fetch = program.write_port(), program.read_port()
        pc, following = Signal(range(MICROPROGRAM_WORDS)), Signal(range(MICROPROGRAM_WORDS))
        word, upcoming = Signal(word_layout, reset_less=True), Signal(word_layout, reset_less=True)
        m.d.comb += [store.en.eq(self.store_enable), store.addr.eq(self.store_address), store.data.eq(self.store_word),
                     following.eq(pc), fetch.addr.eq(following)]
        m.d.sync += pc.eq(following)
        proceed = Signal()                      # to the next word
        again, repeats = Signal(), Signal()     # an iteration has ended, and it was not the last; and the next begins
        fresh, known = Signal(), Signal()       # `upcoming` is new; and what comes after it is known
        after = Signal.like(pc)
        shared, of_lane = Signal(signed(32), reset_less=True), Signal(reset_less=True)
        ends, unknown, writes = (Signal(name=name, reset_less=True) for name in ("ends", "unknown", "writes"))
        work = Signal(lane_control, reset_less=True)
        m.d.comb += self.scalar_select.eq(upcoming.b[:6])
        m.d.sync += [fresh.eq(proceed), known.eq(fresh), again.eq(0),
                     after.eq(Mux(upcoming.op == WideOperation.END, self.entry, pc + 1))]
        with m.If(known):
            m.d.comb += following.eq(after)
        with m.If(proceed):
            m.d.sync += [
                word.eq(upcoming), upcoming.eq(fetch.data),
                shared.eq(Mux(upcoming.kind == Kind.SCALAR, self.scalar_value, upcoming.b)),
                of_lane.eq(upcoming.kind == Kind.LANE), work.eq(decoded(upcoming.op)),
                ends.eq(upcoming.op == WideOperation.END), unknown.eq(upcoming.op > max(WideOperation)),
                writes.eq(~upcoming.op.matches(WideOperation.RANGE, WideOperation.WRITE)),
            ]

        # Lane registers: all lanes use the same addresses; the upper half of the rows is that of second parts. One
        # memory, with addresses, for each half of the words, so that a bit of an address has half the readers.
        half = BITS // 2
        part = Signal() if parts > 1 else Const(0, 0)
        write_address, write_enable = Signal(range(parts * LANE_REGISTERS)), Signal(lanes)
        written_rows, rows_a, rows_b = [], [], []
        for k in range(2):
            m.submodules[f"registers{k}"] = registers = memory.Memory(
                shape=data.ArrayLayout(half, lanes), depth=parts * LANE_REGISTERS, init=[])
            write = registers.write_port(granularity=1)
            m.d.comb += [write.addr.eq(write_address), write.en.eq(write_enable)]
            written_rows.append(write.data)
            for name, operand, rows in (("a", upcoming.a, rows_a), ("b", upcoming.b, rows_b)):
                port, address = registers.read_port(domain="comb"), Signal(4, name=f"address_{name}{k}",
                                                                           reset_less=True, attrs={"keep": 1})
                with m.If(proceed):
                    m.d.sync += address.eq(operand[:4])
                m.d.comb += port.addr.eq(Cat(address, part))
                rows.append(port.data)

        # Operands of the instruction, for the lanes whose turn it is; what becomes of the result two cycles later.
        # `turns` select the halves of wide operands; `phase`, their copy, decides.
        turns = [[Signal(range(TURNS), name=f"turn_{name}{k}", attrs={"keep": 1}) for k in range(2)] for name in "ab"]
        phase = Signal(range(TURNS), attrs={"keep": 1})
        operands = data.ArrayLayout(signed(BITS), processors)
        control, a, b, minus = (Signal(shape, name=name, reset_less=True) for name, shape in
                                (("control", lane_control), ("a", operands), ("b", operands), ("minus", processors)))
        fate = data.StructLayout({"valid": 1, "writes": 1, "dst": 4 + len(part), "turn": range(TURNS)})
        stages = [Signal(fate, name=f"stage{k}") for k in (1, 2, 3)]
        # Operands are taken; no serial unit works on them (not inverted, as the multipliers' registers must have it).
        issue, flows = Signal(), Signal(init=1)
        resume = Signal()                       # a serial unit has the result for which an instruction waited
        m.d.sync += [stages[0].valid.eq((issue & ~work.serial) | resume),
                     stages[1].eq(stages[0]), stages[2].eq(stages[1])]
        with m.If(issue):
            m.d.sync += [turn.eq(phase + 1) for turn in (*turns[0], *turns[1], phase)]
        with m.If(issue & work.serial):
            m.d.sync += flows.eq(0)
        with m.If(resume):
            m.d.sync += flows.eq(1)
        with m.If(flows):
            m.d.sync += [control.eq(work), stages[0].dst.eq(Cat(word.dst[:4], part)), stages[0].turn.eq(phase),
                         stages[0].writes.eq(writes)]
            for p in range(processors):
                own_a, own_b = (Cat(Array(row[t * processors + p] for t in range(TURNS))[turn]
                                    for row, turn in zip(rows, pair, strict=True)).as_signed()
                                for rows, pair in ((rows_a, turns[0]), (rows_b, turns[1])))
                m.d.sync += [a[p].eq(own_a), b[p].eq(Mux(of_lane, own_b, shared)),
                             minus[p].eq(Mux(work.range, own_a[-1], work.subtract))]

        # Processors.
        serial = Signal(range(max(2, processors)))      # a Verilog signal has at least one bit
        answers = Signal(data.ArrayLayout(BITS, processors), reset_less=True)
        results, magnitude = [], 0
        for p in range(processors):
            m.submodules[f"lane{p}"] = lane = WideLane()
            m.d.comb += [lane.control.eq(control), lane.a.eq(a[p]), lane.b.eq(b[p]), lane.minus.eq(minus[p]),
                         lane.serial.eq(answers[p])]
            results.append(lane.result)
            magnitude = magnitude | lane.magnitude
        seen = [Signal(BITS, name=f"seen{k}", reset_less=True) for k in range(RANGES)]
        lengths = [Signal(7, name=f"length{k}", reset_less=True) for k in range(RANGES)]
        m.d.comb += [out.eq(length) for out, length in zip(self.ranges, lengths, strict=True)]
        nonzero, measuring = Signal(RANGES), Signal()       # of a bit length at a time
        counts_range = Signal()
        m.d.sync += counts_range.eq(stages[0].valid & control.range)
        for k, (bits, length) in enumerate(zip(seen, lengths, strict=True)):
            m.d.sync += nonzero[k].eq(bits[1:].any() | (bits[0] & ~(measuring & nonzero[k])))
            with m.If(counts_range & (stages[1].dst[:4] == k)):
                m.d.sync += bits.eq(bits | magnitude)
            with m.If(measuring & nonzero[k]):
                m.d.sync += [bits.eq(bits >> 1), length.eq(length + 1)]

        # One write port, for results and for what is loaded, which comes through a register: `chosen` is the source, 0
        # except while loading. `selects`, its copy, is what the wide words see.
        chosen, selects = (Signal(4, name=name, attrs={"keep": 1}) for name in ("chosen", "selects"))
        rest, loads = Signal(4), Signal()
        sources = (self.x, self.y, self.z, self.draw)
        written, turns_written = Signal(), Signal(TURNS)
        m.d.sync += written.eq(stages[1].valid & stages[1].writes)
        m.d.sync += [turns_written[t].eq(stages[1].valid & stages[1].writes & (stages[1].turn == t))
                     for t in range(TURNS)]
        m.d.comb += [
            loads.eq((chosen & Cat(source.valid for source in sources)).any()),
            self.starved.eq(chosen.any() & ~loads),
            *(source.ready.eq(bit) for source, bit in zip(sources, chosen, strict=True)),
        ]
        loaded, into = Signal(), Signal(len(write_address), reset_less=True)
        m.d.sync += [loaded.eq(loads),
                     into.eq(Cat(selects[1] | selects[3], selects[2] | selects[3], Const(0, 2), part))]
        m.d.comb += write_address.eq(Mux(written, stages[2].dst, into))
        for lane in range(lanes):
            t, p = divmod(lane, processors)
            value = 0
            for source, bit in zip(sources[:3], selects, strict=False):
                value = value | (source.payload[lane][:] & bit.replicate(32))
            word_loaded = Signal(signed(33), name=f"loaded{lane}", reset_less=True)      # random words are unsigned
            m.d.sync += word_loaded.eq(Cat(value | (self.draw.payload[lane] & selects[3].replicate(32)), value[-1]))
            m.d.comb += [Cat(row[lane] for row in written_rows).eq(Mux(written, results[p], word_loaded)),
                         write_enable[lane].eq(turns_written[t] | loaded)]

        # A vector leaves when its last lanes have been collected.
        collects, full = Signal(), Signal()
        collected = data_register(m, self.output.payload)
        m.d.comb += [collects.eq(stages[0].valid & control.write), self.output.valid.eq(full)]
        with m.If(full & self.output.ready):
            m.d.sync += full.eq(0)
        with m.If(collects):
            for lane in range(lanes):
                t, p = divmod(lane, processors)
                with m.If(stages[0].turn == t):
                    m.d.sync += collected[lane].eq(a[p])
            with m.If(stages[0].turn == TURNS - 1):
                m.d.sync += full.eq(1)

        m.submodules.square_root = root = SquareRoot(32)
        m.submodules.divider = divider = Divider(BITS, BITS)
        takes_root = control.root
        m.d.comb += [root.i.payload.eq(Array(a)[serial][:32]),
                     divider.i.payload.numerator.eq(Array(a)[serial]),
                     divider.i.payload.denominator.eq(Array(b)[serial])]

        def choose(sources):
            first = sources & (~sources + 1)
            return [chosen.eq(first), selects.eq(first), rest.eq(sources & ~first)]

        opening, turned = Signal(), Signal()     # turned: an iteration ends
        if parts > 1:
            m.d.sync += part.eq(~opening & (part ^ turned))
        m.d.comb += [nest.step.eq(again), nest.load.eq(opening), nest.begin.eq(opening)]
        m.d.sync += opening.eq(0)
        with m.If(opening):
            m.d.sync += [*[bits.eq(0) for bits in seen], *[length.eq(0) for length in lengths]]
        m.d.sync += self.illegal.eq(0)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += following.eq(self.entry)
                with m.If(self.start):
                    m.d.sync += [self.done.eq(0), opening.eq(1)]
                    m.next = "FETCH"
            with m.State("FETCH"):
                m.d.comb += proceed.eq(1)
                m.next = "SELECT"
            with m.State("SELECT"):
                m.next = "SELECTED"
            with m.State("SELECTED"):
                m.next = "BEGIN"
            with m.State("BEGIN"):
                m.d.comb += proceed.eq(1)
                m.d.sync += choose(self.use)
                m.next = "LOAD"
            with m.State("LOAD"):
                with m.If(loads):
                    m.d.sync += choose(rest)
                with m.If((chosen == 0) | (loads & (rest == 0))):
                    m.next = "LOADED"
            with m.State("LOADED"):          # the last word is written
                m.d.comb += proceed.eq(repeats)
                m.d.sync += repeats.eq(0)
                m.next = "ISSUE"
            with m.State("ISSUE"):
                with m.If((phase == 0) & ends):
                    # Results of the last instruction go first.
                    m.next = "SETTLE"
                    with m.If(~(stages[0].valid & stages[0].writes)):
                        m.d.sync += choose(self.use)
                        m.next = "LOAD"
                    m.d.comb += turned.eq(1)
                    m.d.sync += [again.eq(1), repeats.eq(1)]
                    with m.If(nest.last):
                        m.d.sync += [again.eq(0), repeats.eq(0), *choose(Const(0, 4))]
                        m.next = "DRAIN"
                with m.Elif((phase == 0) & unknown):
                    m.d.sync += self.illegal.eq(1)
                    m.next = "DRAIN"
                with m.Elif((phase == 0) & work.write & (collects | full)):
                    pass
                with m.Else():
                    m.d.comb += [issue.eq(1), proceed.eq(phase == TURNS - 1)]
                    with m.If(work.serial):
                        m.next = "ASK"
            with m.State("SETTLE"):
                m.d.sync += choose(self.use)
                m.next = "LOAD"
            with m.State("ASK"):
                m.d.comb += [root.i.valid.eq(takes_root), divider.i.valid.eq(~takes_root)]
                with m.If(Mux(takes_root, root.i.ready, divider.i.ready)):
                    m.next = "ANSWER"
            with m.State("ANSWER"):
                m.d.comb += [root.o.ready.eq(1), divider.o.ready.eq(1)]
                # Not a multiplexer, of which synthesis makes a late reset of the bits that a root lacks.
                answer = root.o.payload.root & takes_root.replicate(len(root.o.payload.root))
                quotient = divider.o.payload.quotient & (~takes_root).replicate(BITS)
                m.d.sync += Array(answers)[serial].eq(answer | quotient)
                with m.If(root.o.valid | divider.o.valid):
                    m.d.sync += serial.eq(serial + 1)
                    m.next = "ASK"
                    with m.If(serial == processors - 1):
                        m.d.comb += resume.eq(1)
                        m.d.sync += serial.eq(0)
                        m.next = "ISSUE"
            with m.State("DRAIN"):
                with m.If(~Cat(stage.valid for stage in stages).any() & ~full):
                    m.d.sync += measuring.eq(1)
                    m.next = "LENGTHS"
            with m.State("LENGTHS"):
                with m.If(nonzero == 0):
                    m.d.sync += [self.done.eq(1), measuring.eq(0)]
                    m.next = "IDLE"
        return m
