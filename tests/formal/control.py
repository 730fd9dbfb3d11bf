"""Control: no engine gets a descriptor before what it waits for has happened; LOOP and END wait for both engines.

In the first proof the core's decoders, queues and counts are real. Its engines, the units inside the product engine,
the sequencer, registers and memory ports are boxes whose outputs the solver chooses: descriptors come with any
dependencies, and engines finish at any time, in order. The second proof has the sequencer, and memory and engines as
the boxes; it shows what the first one assumes of the sequencer.
"""

from __future__ import annotations

from amaranth.hdl import Assert, Assume, Elaboratable, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import Out

from .harness import (
    BY_BITS,
    Fault,
    Proof,
    after,
    anyconst,
    anyseq,
    assume_stream,
    check_stream,
    delayed,
    elaborated,
    free_inputs,
    latest,
)

PARTS = ("buffer_a", "buffer_b", "weights", "feeder", "store")     # units that take their part of a PRODUCT


def _box(original, made: list):
    """A unit with the ports of `original`, whose outputs are free."""
    class Box(wiring.Component):
        def __init__(self, *arguments):
            self.name = original.__name__
            unit = original(*arguments)
            unit._MustUse__used = True       # only its ports are wanted: no warning that it is never elaborated
            super().__init__(unit.signature)
            made.append(self)

        def elaborate(self, platform):
            m = Module()
            for path, member, value in self.signature.flatten(self):
                if member.flow is Out:
                    m.d.comb += value.eq(anyseq(m, member.shape, "__".join(map(str, path))))
            return m
    return Box


class _Received:
    """Descriptors that a decoder has taken, and what the watched one waits for."""

    def __init__(self, m, words, watched):
        self.count = Signal(4)
        place = Signal.like(words.p.index)
        self.product, self.vector = Signal(16), Signal(16)      # of the watched descriptor
        product, vector = Signal(16), Signal(16)                # of the one being received
        now = words.valid & words.ready
        word = words.p.word
        waits = {}
        for name, register, value in (("product", product, word[:16]), ("vector", vector, word[16:])):
            waits[name] = Mux(words.p.index == 1, value, register)
            with m.If(now):
                m.d.sync += register.eq(waits[name])
        with m.If(now):
            m.d.sync += place.eq(Mux(words.p.last, 0, place + 1))
        with m.If(now & words.p.last & words.p.legal):
            m.d.sync += self.count.eq(self.count + 1)
            with m.If(self.count == watched):
                m.d.sync += [self.product.eq(waits["product"]), self.vector.eq(waits["vector"])]
        # A count that lies 2**15 or more ahead cannot be told from one that is behind (hw.product.reached).
        # No format ends with the header or the word after it; SequencerProof shows the order of the words.
        m.d.comb += [Assume((words.p.index != 1) | ~(word[15] | word[31])), Assume(~words.p.last | (words.p.index > 1)),
                     Assume(words.p.index == place)]


class DependencyProof(Elaboratable):
    """A unit sees its part of a descriptor only when enough products and vector descriptors are complete, each part
    once; and `engines_idle` means that everything issued is complete."""

    def elaborate(self, platform):
        m = Module()
        core, product = latest("hw.core"), latest("hw.product")
        made = []
        boxes = {name: _box(getattr(product, name), made)
                 for name in ("OperandBuffer", "WeightRing", "SystolicArray", "Accumulator", "Store", "Feeder")}
        outer = {name: _box(getattr(core, name), made)
                 for name in ("Registers", "Sequencer", "VectorEngine", "ReadPort", "WritePort")}
        decoder = {"DescriptorRegister": latest("hw.sequencer").DescriptorRegister}
        dut = core.Core(latest("hw.config").PRESETS["tiny"])
        m.submodules.dut = elaborated(dut, product=boxes | decoder, core=outer | decoder | {
            "ProductEngine": product.ProductEngine, "reached": product.reached})
        free_inputs(m, dut)
        units = {box.name: box for box in made if box.name != "OperandBuffer"}
        sequencer, engine = units["Sequencer"], units["VectorEngine"]
        feeder, store = units["Feeder"], units["Store"]
        commands = dict(zip(PARTS, (*(box.command for box in made if box.name == "OperandBuffer"),
                                    units["WeightRing"].command, feeder.command, store.command), strict=True))

        watched = anyconst(m, 3, "watched_descriptor")
        products, vectors = (_Received(m, words, watched) for words in (sequencer.product, sequencer.vector))
        # What the boxes have finished, in all and in this iteration.
        finished, counts = {}, {}
        for name, pulse in (("fed", feeder.done), ("stored", store.done), ("completed", engine.done)):
            finished[name], counts[name] = Signal(4, name=f"{name}_ever"), Signal(16, name=f"{name}_count")
            m.d.sync += [finished[name].eq(finished[name] + pulse),
                         counts[name].eq(Mux(sequencer.iteration, 0, counts[name] + pulse))]

        def met(received):
            return ((counts["fed"] >= received.product) & (counts["stored"] >= received.product)
                    & (counts["completed"] >= received.vector))

        begun = {}
        for name, valid, ready, received in (
                *((name, command.valid, command.ready, products) for name, command in commands.items()),
                ("vector", engine.vector.valid | engine.scalar.valid,
                 Mux(engine.vector.valid, engine.vector.ready, engine.scalar.ready), vectors)):
            taken = Signal(4, name=f"{name}_taken")
            m.d.sync += taken.eq(taken + (valid & ready))
            begun[name] = taken + valid
            new = valid & ~delayed(m, valid & ~ready, 1)
            m.d.comb += [Assert(~valid | (taken < received.count), "a descriptor that was not issued"),
                         Assert(~(new & (taken == watched)) | met(received), "started before what it waits for")]
        m.d.comb += Assert(~(engine.vector.valid & engine.scalar.valid), "two commands at once")
        idle = sequencer.engines_idle
        m.d.comb += Assert(~idle | ((finished["fed"] == products.count) & (finished["stored"] == products.count)
                                    & (finished["completed"] == vectors.count)), "idle with work to do")
        # The boxes finish what they have begun; the sequencer starts an iteration as SequencerProof shows.
        words = sequencer.product.valid | sequencer.vector.valid
        m.d.comb += [
            Assume(~feeder.done | (finished["fed"] < begun["feeder"])),
            Assume(~store.done | (finished["stored"] < begun["store"])),
            Assume(~engine.done | (finished["completed"] < begun["vector"])),
            Assume(~sequencer.iteration | (idle & ~words)),
            Assume(~words | after(m, 1)),          # the engines are in reset in the first cycle
            *(Assume(~flag) for flag in (
                units["Registers"].soft_reset, sequencer.illegal, engine.illegal, engine.exponent_saturated,
                units["ReadPort"].error, units["WritePort"].error, units["Accumulator"].overflow)),
        ]
        return m


class SequencerProof(Elaboratable):
    """Any program, any engines: words of a descriptor come in order and one descriptor at a time; an iteration, the
    report of an illegal descriptor and the end of the program come only when both engines are idle; nothing is
    fetched from outside the window, and no fetched line is left over when the program ends."""

    def elaborate(self, platform):
        m = Module()
        sequencer = latest("hw.sequencer").Sequencer(latest("hw.config").PRESETS["tiny"])
        m.submodules.dut = dut = sequencer
        free_inputs(m, dut, keep=("limit",))
        request, response = dut.memory.request, dut.memory.response
        for stream in (dut.product, dut.vector):      # a fetch may be withdrawn, at a jump and at the end
            check_stream(m, stream)
        assume_stream(m, response)
        m.d.comb += [dut.limit.eq(anyconst(m, 32, "limit")),
                     Assert(~request.valid | (request.payload < dut.limit[4:]), "a fetch outside the window")]
        on_the_way = Signal(5)
        sent, came = request.valid & request.ready, response.valid & response.ready
        m.d.sync += on_the_way.eq(on_the_way + sent - came)
        m.d.comb += [Assume(~response.valid | (on_the_way != 0)),
                     Assert(~dut.finished | (on_the_way == 0), "a line is left over")]

        expected, stopped, idle_since = Signal(6), Signal(), Signal(init=1)
        words = dut.product.valid | dut.vector.valid
        idle = delayed(m, dut.engines_idle & ~words, 1)      # engines without words stay idle
        m.d.sync += idle_since.eq(~words & (idle_since | dut.engines_idle))
        for port in (dut.product, dut.vector):
            with m.If(port.valid):
                m.d.comb += Assert(port.p.index == expected, "a word out of order")
                with m.If(port.ready):
                    m.d.sync += expected.eq(Mux(port.p.last, 0, expected + 1))
        with m.If(dut.illegal):
            m.d.sync += stopped.eq(1)
        starting = dut.start & ~dut.running
        m.d.comb += [
            Assert(~(dut.product.valid & dut.vector.valid), "words for both engines"),
            Assert(~dut.iteration | (~words & delayed(m, idle | starting, 1)), "an iteration begins too early"),
            Assert(~dut.step_done | dut.iteration, "a step ends without its iteration"),
            Assert(~dut.illegal | delayed(m, idle, 1), "earlier descriptors are not complete"),
            Assert(~dut.finished | idle_since, "finished before the engines"),
            Assert(~stopped | ~(words | dut.iteration | dut.finished), "work after an illegal descriptor"),
        ]
        return m


PROOFS = [
    Proof("control/dependencies", DependencyProof, 17, (
        Fault("hw/product.py", "& reached(self.stored, decode.header.wait_product))", ")"),
        Fault("hw/product.py", "~(count - target)[15]", "~(count + 1 - target)[15]"),
        Fault("hw/product.py", "register.i.valid.eq(runnable & ~taken[k])", "register.i.valid.eq(runnable)"),
        Fault("hw/product.py", "& (self.stored == issued))", ")"),
        Fault("hw/core.py", "vector.stored.eq(product.stored)", "vector.stored.eq(product.fed)"),
        Fault("hw/product.py", "~decode.valid & ~decode.arriving", "~decode.valid"),
        Fault("hw/core.py", "~decode.valid & ~decode.arriving", "~decode.valid"),
        Fault("hw/core.py", "& reached(self.completed, decode.header.wait_vector)", ""),
        Fault("hw/sequencer.py", "self.valid.eq(stage.word.legal)", "self.valid.eq(1)"),
        Fault("hw/sequencer.py", "full.eq(0), place.eq(1)", "full.eq(0)")), engine=BY_BITS),
    Proof("control/sequencer", SequencerProof, 26, (
        Fault("hw/sequencer.py", "quiet.eq(self.engines_idle & ~moving)", "quiet.eq(1)"),
        Fault("hw/sequencer.py", "next_line < self.limit >> line_shift", "1"),
        Fault("hw/sequencer.py", "(on_the_way == 0) & ~request.valid & ~fetching", "1")), engine=BY_BITS),
]
