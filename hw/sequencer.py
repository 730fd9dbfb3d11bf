"""Sequencer: fetches descriptors, hands them to the engines, loops over steps."""

from __future__ import annotations

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .descriptor import (
    ADDRESSES,
    BASES,
    DESCRIPTOR_BYTES,
    DESCRIPTOR_WORDS,
    FORMATS,
    SCALAR_OPERATIONS,
    Opcode,
    offsets,
)
from .interfaces import ADDRESS_BITS, ReadClient, line_address_bits
from .skid_buffer import SkidBuffer

__all__ = ["FETCH_LINES", "Sequencer", "DescriptorRegister", "descriptor_word"]

FETCH_LINES = 16        # lines fetched ahead, for which the memory port has room

WORD_INDEX = (DESCRIPTOR_WORDS - 1).bit_length()

#: One word of a descriptor on its way to an engine. `last` ends it; `legal` is then meaningful.
descriptor_word = data.StructLayout({"index": WORD_INDEX, "word": 32, "last": 1, "legal": 1})


def last_word(opcode: Opcode) -> int:
    """Index of the last word a descriptor of this opcode uses."""
    return max(word for word, _, _ in offsets(opcode).values())


class DescriptorRegister(wiring.Component):
    """Collects the words of one descriptor, which come in order, and shows its sections until it is taken.

    Parameters
    ----------
    opcodes : the formats this engine understands; their sections must have different labels.

    Attributes
    ----------
    words : from the sequencer. address : byte address of the descriptor being received.
    valid, release : the register holds a legal descriptor; `release` empties it.
    arriving : Out(1)  it will in the next cycle.
    opcode : Out(8). held_address : Out(32), where the held descriptor came from.
    header and one member per section label : views of the fields.
    """

    def __init__(self, *opcodes: Opcode):
        self.opcodes = opcodes
        self.sections = {label: (opcode, section) for opcode in opcodes for label, section in FORMATS[opcode]}
        super().__init__({
            "words": In(stream.Signature(descriptor_word)), "address": In(ADDRESS_BITS),
            "valid": Out(1), "arriving": Out(1), "release": In(1), "held_address": Out(ADDRESS_BITS),
            **{label: Out(section.layout) for label, (_, section) in self.sections.items()},
        })

    def elaborate(self, platform):
        m = Module()
        count = 1 + max(last_word(opcode) for opcode in self.opcodes)
        words = [Signal(32, name=f"word{k}", reset_less=True) for k in range(count)]
        # A word comes into a register beside those of the descriptor, and from there to its place. What is in it moves
        # there even if it is no word: the next one is written over it.
        staged = data.StructLayout({"word": descriptor_word, "address": ADDRESS_BITS})
        came, stage = Signal(), Signal(staged, reset_less=True)
        place = Signal(count, init=1)            # the k-th is the next word's
        full, accept = Signal(), Signal()        # no word may come; one does
        m.d.comb += [self.words.ready.eq(~full), accept.eq(self.words.valid & ~full),
                     self.arriving.eq(came & stage.word.last & stage.word.legal)]
        m.d.sync += [came.eq(accept), stage.word.eq(self.words.p), stage.address.eq(self.address)]
        for k, word in enumerate(words):
            with m.If(place[k]):
                m.d.sync += word.eq(stage.word.word)
        with m.If(accept & self.words.p.last):
            m.d.sync += full.eq(self.words.p.legal)
        with m.If(came):
            m.d.sync += place.eq(place << 1)
            with m.If(stage.word.last):
                m.d.sync += [self.valid.eq(stage.word.legal), self.held_address.eq(stage.address),
                             place.eq(~stage.word.legal)]
        with m.If(self.release):
            m.d.sync += [self.valid.eq(0), full.eq(0), place.eq(1)]
        for label, (opcode, _) in self.sections.items():
            for (owner, name), (word, bit, field) in offsets(opcode).items():
                if owner == label:
                    m.d.comb += getattr(self, label)[name].eq(words[word][bit:bit + field.bits])
        return m


class Sequencer(wiring.Component):
    """Fetches the program and issues each descriptor to its engine, in order; engines decide when it starts.

    One word per cycle goes to an engine, with a pause of a cycle after each line, so a descriptor takes about as many
    cycles as it has words; fetching runs ahead. LOOP is a barrier: it waits until both engines are idle, counts the
    step, adds the increments to the base registers and jumps. On an illegal descriptor the earlier ones finish and
    nothing later is issued.

    Attributes
    ----------
    start : In(1) doorbell. program : In(32) byte address of the first descriptor. limit : In(32) end of the window
        that may be fetched.
    memory : descriptor fetch.
    product, vector : word streams to the engines; `address` is the byte address of the descriptor being issued.
    engines_idle : In(1) everything issued is complete.
    iteration : Out(1) pulse: a new iteration begins, completion counts restart at zero.
    step_done : Out(1) pulse: an iteration that is a training step has ended.
    running : Out(1). finished : Out(1) pulse at END. illegal : Out(1) pulse, with `address` naming the descriptor.
    """

    def __init__(self, config: CoreConfig):
        self.config = config
        super().__init__({
            "start": In(1), "program": In(ADDRESS_BITS), "limit": In(ADDRESS_BITS),
            "memory": Out(ReadClient(config)),
            "product": Out(stream.Signature(descriptor_word)), "vector": Out(stream.Signature(descriptor_word)),
            "address": Out(ADDRESS_BITS),
            "engines_idle": In(1), "iteration": Out(1), "step_done": Out(1),
            "running": Out(1), "finished": Out(1), "illegal": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        line_shift = (config.line_bytes - 1).bit_length()
        words_per_line = config.line_bytes // 4
        request, response = self.memory.request, self.memory.response

        # Fetch: sequential lines ahead of need; after a jump the lines still on their way are dropped.
        fetching, flushing = Signal(), Signal()
        next_line = Signal(line_address_bits(config))
        # No request may wait in the port for room: it would be answered after the end, and the end waits for it.
        on_the_way = Signal(range(FETCH_LINES + 1))
        with m.If(~request.valid | request.ready):
            inside = (next_line < self.limit >> line_shift) & (on_the_way <= FETCH_LINES - 3)
            m.d.sync += [request.valid.eq(inside), request.p.eq(next_line)]
            with m.If(inside):
                m.d.sync += next_line.eq(next_line + 1)
        with m.If(~fetching):
            m.d.sync += request.valid.eq(0)
        sent, came = request.valid & request.ready, response.valid & response.ready
        drained = Signal()                   # no longer fetching, and nothing more will come
        m.d.sync += [on_the_way.eq(on_the_way + sent - came),
                     drained.eq((on_the_way == 0) & ~request.valid & ~fetching)]

        # The word in hand, with what its place in the descriptor says about it; `index` is that of the next one. A
        # line whose last word was taken is dropped in the next cycle.
        index = Signal(WORD_INDEX)
        rules = self._rules()
        hand = Signal(data.StructLayout({"valid": 1, "index": WORD_INDEX, "word": 32, "first": 1, "last": 1,
                                         "base": BASES, "checks": len(rules)}))
        word = hand.word
        line_words = data.View(data.ArrayLayout(32, words_per_line), response.p)
        place = index[:(words_per_line - 1).bit_length()]
        consume, empty, fill, drop = Signal(), Signal(), Signal(), Signal()
        free = Signal()                      # the register behind the hand
        issuing, looping, skipping = Signal(), Signal(), Signal()      # states PRODUCT and VECTOR; LOOP; SKIP
        m.d.comb += [consume.eq(hand.valid & ((issuing & free) | looping | (skipping & ~hand.first))),
                     empty.eq(~hand.valid | consume), fill.eq(response.valid & ~drop & ~flushing & empty),
                     response.ready.eq(flushing | drop)]
        m.d.sync += drop.eq(fill & place.all())
        with m.If(empty):
            m.d.sync += [hand.valid.eq(fill), hand.index.eq(index), hand.first.eq(index == 0),
                         word.eq(line_words[place])]
        with m.If(fill):
            m.d.sync += index.eq(index + 1)

        opcode, base_a, base_b = Signal(Opcode, init=Opcode.END), Signal(4), Signal(4)
        header = {name: (bit, field) for (label, name), (at, bit, field) in offsets(Opcode.END).items() if at == 0}

        def header_field(name):
            bit, field = header[name]
            return word[bit:bit + field.bits]

        bases = [Signal(ADDRESS_BITS, name=f"base{k}") for k in range(BASES)]        # register 0 stays 0
        count, target, iteration, is_step = Signal(32), Signal(ADDRESS_BITS), Signal(32), Signal()
        again = Signal()                     # settled long before the last word of a LOOP
        m.d.sync += again.eq(iteration + 1 < count)
        legal = Signal()

        # What the word taken next is: the opcode is known before word 1 is taken, and word 0 is nothing of this.
        last, base, checks = Signal(), Signal(range(BASES)), Signal(len(rules))
        increments = {offsets(Opcode.LOOP)["loop", f"increment{k}"][0]: k for k in range(1, BASES)}
        with m.Switch(opcode):
            for code in (Opcode.PRODUCT, Opcode.VECTOR, Opcode.SCALAR, Opcode.LOOP):
                with m.Case(code):
                    m.d.comb += last.eq(index == last_word(code))
                    for chosen, key in zip((base_a, base_b), ADDRESSES.get(code, ()), strict=False):
                        with m.If(index == offsets(code)[key][0]):
                            m.d.comb += base.eq(chosen)
                    for at, k in increments.items() if code == Opcode.LOOP else ():
                        with m.If(index == at):
                            m.d.comb += base.eq(k)
                    for k, places in enumerate(rules.values()):
                        m.d.comb += checks[k].eq(Cat(index == at for owner, at in places if owner == code).any())
        with m.If(empty):
            m.d.sync += [hand.last.eq(last), hand.base.eq(1 << base), hand.checks.eq(checks)]
        violation = Signal()
        m.d.comb += violation.eq((hand.checks & Cat(_broken(word, rule) for rule in rules)).any())
        with m.If(consume & violation):
            m.d.sync += legal.eq(0)

        # The word on its way to an engine: base registers are added to the addresses that take them. A LOOP adds its
        # increments to them in the same adder.
        # A buffer behind it takes it even if the engine does not, so that the hand does not look at the engines.
        to = data.StructLayout({"product": 1, "vector": 1})
        sending, sends, incremented = Signal(descriptor_word), Signal(to), Signal(BASES)
        m.submodules.sent = sent = SkidBuffer(data.StructLayout({"to": to, "word": descriptor_word}))
        addend = 0
        for k in range(1, BASES):
            addend = addend | (bases[k] & hand.base[k].replicate(ADDRESS_BITS))
            with m.If(incremented[k]):
                m.d.sync += bases[k].eq(sending.word)
        m.d.sync += incremented.eq(0)
        # `vacant` is the complement of `sends`: what moves every bit of the word has another net than the rest.
        vacant, moving = Signal(init=1), Signal()
        m.d.comb += [
            sent.input.valid.eq(sends.as_value().any()), sent.input.p.to.eq(sends), sent.input.p.word.eq(sending),
            free.eq(~sent.input.valid | sent.input.ready), moving.eq(sent.output.valid),
        ]
        with m.If(free):
            m.d.sync += [sends.eq(0), vacant.eq(1)]
        with m.If(vacant | sent.input.ready):
            m.d.sync += [sending.index.eq(hand.index), sending.word.eq(word + addend), sending.last.eq(hand.last)]
        for port, mine in ((self.product, sent.output.p.to.product), (self.vector, sent.output.p.to.vector)):
            m.d.comb += [port.valid.eq(sent.output.valid & mine), port.p.eq(sent.output.p.word),
                         port.p.legal.eq(legal & sent.output.p.word.last)]
            with m.If(mine):
                m.d.comb += sent.output.ready.eq(port.ready)

        # Engines get no word from before one is idle until its work is done, so their state of the last cycle does.
        quiet = Signal()
        m.d.sync += quiet.eq(self.engines_idle & ~moving)

        # A cycle after the decision; HEADER waits for the first line anyway.
        starting, jumping = Signal(), Signal()
        m.d.sync += [starting.eq(0), jumping.eq(0)]
        with m.If(starting | jumping):
            fetch_from = Mux(jumping, target, self.program)
            m.d.sync += [next_line.eq(fetch_from >> line_shift), self.address.eq(fetch_from), fetching.eq(1)]
        with m.If(starting):
            m.d.sync += [register.eq(0) for register in bases]
        with m.If(flushing):
            m.d.sync += [index.eq(0), hand.valid.eq(0)]

        m.d.comb += self.running.eq(1)
        m.d.sync += [self.iteration.eq(0), self.step_done.eq(0), self.illegal.eq(0)]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.running.eq(0)
                with m.If(self.start):
                    m.d.sync += [self.iteration.eq(1), starting.eq(1), iteration.eq(0)]
                    m.next = "HEADER"
            with m.State("HEADER"):
                with m.If(hand.valid):
                    m.d.sync += [opcode.eq(header_field("opcode")), base_a.eq(header_field("base_a")),
                                 base_b.eq(header_field("base_b")), legal.eq(1)]
                    with m.If(header_field("opcode") == Opcode.END):
                        m.next = "END"
                    with m.Elif(header_field("opcode") == Opcode.LOOP):
                        m.d.sync += looping.eq(1)
                        m.next = "LOOP"
                    with m.Elif(header_field("opcode") == Opcode.PRODUCT):
                        m.d.sync += issuing.eq(1)
                        m.next = "PRODUCT"
                    with m.Elif((header_field("opcode") == Opcode.VECTOR)
                                | (header_field("opcode") == Opcode.SCALAR)):
                        m.d.sync += issuing.eq(1)
                        m.next = "VECTOR"
                    with m.Else():
                        m.next = "ILLEGAL"
            for state, chosen in (("PRODUCT", sends.product), ("VECTOR", sends.vector)):
                with m.State(state):
                    with m.If(hand.valid & free):
                        m.d.sync += [chosen.eq(1), vacant.eq(0)]
                        with m.If(hand.last):
                            m.d.sync += [issuing.eq(0), skipping.eq(1)]
                            m.next = "SKIP"
            with m.State("SKIP"):            # the unused tail of the descriptor
                header_next = index == hand.valid        # the word in hand or to come is a header
                with m.If(~legal):
                    m.d.sync += skipping.eq(0)
                    m.next = "ILLEGAL"
                with m.Elif(header_next & ~moving):      # the last word leaves with the descriptor's address
                    m.d.sync += [skipping.eq(0), self.address.eq(self.address + DESCRIPTOR_BYTES)]
                    m.next = "HEADER"
            with m.State("LOOP"):
                table = offsets(Opcode.LOOP)
                with m.If(hand.valid):
                    with m.If(hand.index == table["loop", "target"][0]):
                        m.d.sync += target.eq(word)
                    with m.If(hand.index == table["loop", "count"][0]):
                        m.d.sync += count.eq(word)
                    with m.If(hand.index == table["loop", "step"][0]):
                        m.d.sync += is_step.eq(word[0])
                    m.d.sync += incremented.eq(hand.base)
                with m.If(hand.valid & hand.last):
                    m.d.sync += looping.eq(0)
                    m.next = "BARRIER"
            with m.State("BARRIER"):
                with m.If(~legal):
                    m.next = "ILLEGAL"
                with m.Elif(quiet):
                    m.d.sync += [self.iteration.eq(1), self.step_done.eq(is_step), iteration.eq(iteration + 1)]
                    with m.If(again):
                        m.d.sync += fetching.eq(0)
                        m.next = "JUMP"
                    with m.Else():
                        m.d.sync += [iteration.eq(0), skipping.eq(1)]
                        m.next = "SKIP"
            with m.State("JUMP"):
                m.d.comb += flushing.eq(1)
                with m.If(drained):
                    m.d.sync += jumping.eq(1)
                    m.next = "HEADER"
            with m.State("END"):
                with m.If(quiet):
                    m.d.sync += fetching.eq(0)
                    m.next = "STOP"
            with m.State("STOP"):
                m.d.comb += flushing.eq(1)
                with m.If(drained):
                    m.d.comb += self.finished.eq(1)
                    m.next = "IDLE"
            with m.State("ILLEGAL"):         # earlier descriptors finish first
                with m.If(quiet):
                    m.d.sync += self.illegal.eq(1)
                    m.next = "HALT"
            with m.State("HALT"):            # until the core is reset
                m.d.sync += fetching.eq(0)
                m.d.comb += flushing.eq(1)
        return m

    def _rules(self) -> dict[tuple[int, int, str, int], list[tuple[Opcode, int]]]:
        """The rules of the formats: (low bit, bits, kind, number) and the words of each format that must keep it."""
        line, vector = self.config.line_bytes, self.config.vector
        multiple, nonzero = "a multiple of", ("other than", 0)
        kept = {
            Opcode.PRODUCT: {
                **{(label, name): (multiple, line) for label in ("load_a", "load_b")
                   for name in ("address", "tile_stride", "run_stride")},
                ("feed", "mode"): ("other than", 3),
                **{("feed", f"{name}{k}"): nonzero for name, levels in (("tiles", 4), ("pixels", 3))
                   for k in range(levels)},
                ("store", "address"): (multiple, 4 * self.config.columns)},
            Opcode.VECTOR: {
                **{("vector", f"count{k}"): nonzero for k in range(5)},
                **{("vector", name): (multiple, vector) for name in ("source0", "target0", "target1", "source2")}},
            Opcode.SCALAR: {("scalar", "count"): ("at most", SCALAR_OPERATIONS)},
            Opcode.LOOP: {("loop", "count"): nonzero, ("loop", "target"): (multiple, DESCRIPTOR_BYTES)},
        }
        rules = {}
        for code, fields in kept.items():
            for key, rule in fields.items():
                at, low, field = offsets(code)[key]
                rules.setdefault((low, field.bits, *rule), []).append((code, at))
        return rules


def _broken(word, rule):
    """The word in hand breaks the rule of `Sequencer._rules`."""
    low, bits, kind, number = rule
    value = word[low:low + bits]
    if kind == "a multiple of":
        return value & (number - 1) != 0
    return value > number if kind == "at most" else value == number
