"""Sequencer: fetches descriptors, hands them to the engines, loops over steps."""

from __future__ import annotations

from amaranth.hdl import Array, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .config import CoreConfig
from .descriptor import ADDRESSES, BASES, DESCRIPTOR_BYTES, DESCRIPTOR_WORDS, FORMATS, Opcode, offsets
from .interfaces import ADDRESS_BITS, ReadClient, line_address_bits

__all__ = ["Sequencer", "DescriptorRegister", "descriptor_word"]

WORD_INDEX = (DESCRIPTOR_WORDS - 1).bit_length()

#: One word of a descriptor on its way to an engine. `last` ends it; `legal` is then meaningful.
descriptor_word = data.StructLayout({"index": WORD_INDEX, "word": 32, "last": 1, "legal": 1})


def last_word(opcode: Opcode) -> int:
    """Index of the last word a descriptor of this opcode uses."""
    return max(word for word, _, _ in offsets(opcode).values())


class DescriptorRegister(wiring.Component):
    """Collects the words of one descriptor and shows its sections until it is taken.

    Parameters
    ----------
    opcodes : the formats this engine understands; their sections must have different labels.

    Attributes
    ----------
    words : from the sequencer. address : byte address of the descriptor being received.
    valid, release : the register holds a legal descriptor; `release` empties it.
    opcode : Out(8). held_address : Out(32), where the held descriptor came from.
    header and one member per section label : views of the fields.
    """

    def __init__(self, *opcodes: Opcode):
        self.opcodes = opcodes
        self.sections = {label: (opcode, section) for opcode in opcodes for label, section in FORMATS[opcode]}
        super().__init__({
            "words": In(stream.Signature(descriptor_word)), "address": In(ADDRESS_BITS),
            "valid": Out(1), "release": In(1), "held_address": Out(ADDRESS_BITS),
            **{label: Out(section.layout) for label, (_, section) in self.sections.items()},
        })

    def elaborate(self, platform):
        m = Module()
        count = 1 + max(last_word(opcode) for opcode in self.opcodes)
        words = [Signal(32, name=f"word{k}") for k in range(count)]
        m.d.comb += self.words.ready.eq(~self.valid)
        with m.If(self.words.valid & self.words.ready):
            for k, word in enumerate(words):
                with m.If(self.words.p.index == k):
                    m.d.sync += word.eq(self.words.p.word)
            with m.If(self.words.p.last):
                m.d.sync += [self.valid.eq(self.words.p.legal), self.held_address.eq(self.address)]
        with m.If(self.release):
            m.d.sync += self.valid.eq(0)
        for label, (opcode, _) in self.sections.items():
            for (owner, name), (word, bit, field) in offsets(opcode).items():
                if owner == label:
                    m.d.comb += getattr(self, label)[name].eq(words[word][bit:bit + field.bits])
        return m


class Sequencer(wiring.Component):
    """Fetches the program and issues each descriptor to its engine, in order; engines decide when it starts.

    One word per cycle goes to an engine, so a descriptor takes about as many cycles as it has words; fetching runs
    ahead. LOOP is a barrier: it waits until both engines are idle, counts the step, adds the increments to the base
    registers and jumps. On an illegal descriptor the earlier ones finish and nothing later is issued.

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
        on_the_way = Signal(16)
        m.d.comb += [request.valid.eq(fetching & (next_line < self.limit >> line_shift)), request.p.eq(next_line)]
        with m.If(request.valid & request.ready):
            m.d.sync += next_line.eq(next_line + 1)
        sent, came = request.valid & request.ready, response.valid & response.ready
        m.d.sync += on_the_way.eq(on_the_way + sent - came)

        # The word in hand.
        index = Signal(WORD_INDEX)
        word = Signal(32)
        line_words = data.View(data.ArrayLayout(32, words_per_line), response.p)
        m.d.comb += word.eq(line_words[index[:(words_per_line - 1).bit_length()]])
        consume = Signal()                   # go on to the next word; drops the line when it was its last
        line_end = index[:(words_per_line - 1).bit_length()].all()
        m.d.comb += response.ready.eq(flushing | (consume & line_end))
        with m.If(consume):
            m.d.sync += index.eq(index + 1)

        opcode, base_a, base_b = Signal(Opcode, init=Opcode.END), Signal(4), Signal(4)
        header = {name: (bit, field) for (label, name), (at, bit, field) in offsets(Opcode.END).items() if at == 0}

        def header_field(name):
            bit, field = header[name]
            return word[bit:bit + field.bits]

        bases = Array(Signal(ADDRESS_BITS, name=f"base{k}") for k in range(BASES))
        count, target, iteration, is_step = Signal(32), Signal(ADDRESS_BITS), Signal(32), Signal()
        legal = Signal()

        # The word as the engine gets it: base registers added to the addresses that take them.
        relocated = Signal(32)
        m.d.comb += relocated.eq(word)
        last_index = Signal(WORD_INDEX)
        with m.Switch(opcode):
            for code in (Opcode.PRODUCT, Opcode.VECTOR, Opcode.SCALAR, Opcode.LOOP):
                with m.Case(code):
                    m.d.comb += last_index.eq(last_word(code))
                    for base, key in zip((base_a, base_b), ADDRESSES.get(code, ()), strict=False):
                        with m.If(index == offsets(code)[key][0]):
                            m.d.comb += relocated.eq(word + bases[base])
        violation = Signal()
        self._rules(m, opcode, index, word, violation)
        for port in (self.product, self.vector):
            m.d.comb += [port.p.index.eq(index), port.p.word.eq(relocated), port.p.last.eq(index == last_index),
                         port.p.legal.eq(legal & ~violation)]

        fetch_from = Signal(ADDRESS_BITS)
        m.d.comb += fetch_from.eq(self.program)
        restart = Signal()
        with m.If(restart):
            m.d.sync += [next_line.eq(fetch_from >> line_shift), self.address.eq(fetch_from), index.eq(0)]

        m.d.comb += self.running.eq(1)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.running.eq(0)
                with m.If(self.start):
                    m.d.comb += restart.eq(1)
                    m.d.sync += [iteration.eq(0), fetching.eq(1), *(base.eq(0) for base in bases)]
                    m.d.comb += self.iteration.eq(1)
                    m.next = "HEADER"
            with m.State("HEADER"):
                with m.If(response.valid):
                    m.d.sync += [opcode.eq(header_field("opcode")), base_a.eq(header_field("base_a")),
                                 base_b.eq(header_field("base_b")), legal.eq(1)]
                    with m.If(header_field("opcode") == Opcode.END):
                        m.next = "END"
                    with m.Elif(header_field("opcode") == Opcode.LOOP):
                        m.next = "LOOP"
                    with m.Elif(header_field("opcode") == Opcode.PRODUCT):
                        m.next = "PRODUCT"
                    with m.Elif((header_field("opcode") == Opcode.VECTOR)
                                | (header_field("opcode") == Opcode.SCALAR)):
                        m.next = "VECTOR"
                    with m.Else():
                        m.next = "ILLEGAL"
            for state, port in (("PRODUCT", self.product), ("VECTOR", self.vector)):
                with m.State(state):
                    m.d.comb += [port.valid.eq(response.valid), consume.eq(port.valid & port.ready)]
                    with m.If(violation & response.valid):
                        m.d.sync += legal.eq(0)
                    with m.If(consume & port.p.last):
                        m.next = "SKIP"
                        with m.If(~port.p.legal):
                            m.next = "ILLEGAL"
            with m.State("SKIP"):            # the unused tail of the descriptor
                m.d.comb += consume.eq(response.valid)
                with m.If(index == 0):
                    m.d.comb += consume.eq(0)
                    m.d.sync += self.address.eq(self.address + DESCRIPTOR_BYTES)
                    m.next = "HEADER"
            with m.State("LOOP"):
                m.d.comb += consume.eq(response.valid)
                table = offsets(Opcode.LOOP)
                with m.If(response.valid):
                    with m.If(violation):
                        m.d.sync += legal.eq(0)
                    with m.If(index == table["loop", "target"][0]):
                        m.d.sync += target.eq(word)
                    with m.If(index == table["loop", "count"][0]):
                        m.d.sync += count.eq(word)
                    with m.If(index == table["loop", "step"][0]):
                        m.d.sync += is_step.eq(word[0])
                    for k in range(1, BASES):
                        with m.If(index == table["loop", f"increment{k}"][0]):
                            m.d.sync += bases[k].eq(bases[k] + word)
                with m.If(consume & (index == last_index)):
                    m.next = "BARRIER"
                    with m.If(~(legal & ~violation)):
                        m.next = "ILLEGAL"
            with m.State("BARRIER"):
                with m.If(self.engines_idle):
                    m.d.comb += [self.iteration.eq(1), self.step_done.eq(is_step)]
                    m.d.sync += iteration.eq(iteration + 1)
                    with m.If(iteration + 1 < count):
                        m.d.sync += fetching.eq(0)
                        m.next = "JUMP"
                    with m.Else():
                        m.d.sync += iteration.eq(0)
                        m.next = "SKIP"
            with m.State("JUMP"):
                m.d.comb += flushing.eq(1)
                with m.If((on_the_way == 0) & ~request.valid):
                    m.d.comb += [restart.eq(1), fetch_from.eq(target)]
                    m.d.sync += fetching.eq(1)
                    m.next = "HEADER"
            with m.State("END"):
                with m.If(self.engines_idle):
                    m.d.sync += fetching.eq(0)
                    m.next = "STOP"
            with m.State("STOP"):
                m.d.comb += flushing.eq(1)
                with m.If((on_the_way == 0) & ~request.valid):
                    m.d.comb += self.finished.eq(1)
                    m.next = "IDLE"
            with m.State("ILLEGAL"):         # earlier descriptors finish first
                with m.If(self.engines_idle):
                    m.d.comb += self.illegal.eq(1)
                    m.next = "HALT"
            with m.State("HALT"):            # until the core is reset
                m.d.sync += fetching.eq(0)
                m.d.comb += flushing.eq(1)
        return m

    def _rules(self, m, opcode, index, word, violation):
        """Set ``violation`` when the word in hand breaks a rule of its format."""
        line = self.config.line_bytes
        vector = self.config.vector
        aligned_lines = [("load_a", "address"), ("load_b", "address"), ("load_a", "tile_stride"),
                         ("load_a", "run_stride"), ("load_b", "tile_stride"), ("load_b", "run_stride")]
        rules = {Opcode.PRODUCT: [(key, lambda v, n=line: v & (n - 1) != 0) for key in aligned_lines],
                 Opcode.LOOP: [(("loop", "count"), lambda v: v == 0),
                               (("loop", "target"), lambda v, n=DESCRIPTOR_BYTES: v & (n - 1) != 0)]}
        rules[Opcode.PRODUCT] += [(("feed", "mode"), lambda v: v == 3)]
        rules[Opcode.PRODUCT] += [(("feed", f"tiles{k}"), lambda v: v == 0) for k in range(4)]
        rules[Opcode.PRODUCT] += [(("feed", f"pixels{k}"), lambda v: v == 0) for k in range(3)]
        rules[Opcode.PRODUCT] += [(("store", "address"), lambda v: v & (4 * self.config.columns - 1) != 0)]
        rules[Opcode.VECTOR] = [(("vector", f"count{k}"), lambda v: v == 0) for k in range(5)]
        rules[Opcode.VECTOR] += [(("vector", name), lambda v, n=vector: v & (n - 1) != 0)
                                 for name in ("source0", "target0", "target1", "source2")]
        rules[Opcode.SCALAR] = [(("scalar", "count"), lambda v: v > 40)]
        with m.Switch(opcode):
            for code, checks in rules.items():
                with m.Case(code):
                    for key, broken in checks:
                        at, bit, field = offsets(code)[key]
                        with m.If((index == at) & broken(word[bit:bit + field.bits])):
                            m.d.comb += violation.eq(1)
