"""The walk of a loss unit over the classes of a sample: how logits come and errors leave, in parts of a vector."""

from __future__ import annotations

from amaranth.hdl import Module, Mux, Signal

__all__ = ["CLASS_BITS", "ClassWalk", "data_only"]

CLASS_BITS = 10


def data_only(shape=1) -> Signal:
    """A register without reset, as only what says that its data is there needs one."""
    return Signal(shape, reset_less=True, src_loc_at=1)


class ClassWalk:
    """Registers and states in ``m`` that :class:`hw.loss.NitiLoss` and :class:`hw.softmax.Softmax` have in common.

    Its methods belong into the state machine; ``store`` into a state STORE, ``place`` where ``error`` is not valid.

    Parameters
    ----------
    parts : of a vector, 1 or 2. The part without classes that may follow the last class is skipped and padded.
    classes, logits, label, error : of the unit.

    Attributes
    ----------
    position, last : the class at hand, and whether it is the last. lane : its place in its part.
    """

    def __init__(self, m: Module, parts: int, classes, logits, label, error):
        self.m, self.parts, self.logits, self.error = m, parts, logits, error
        self.position, self.last = Signal(CLASS_BITS, name="position"), Signal(name="last")
        self.lane = Signal(range(len(error.payload)), name="lane")
        self._penultimate = Signal(CLASS_BITS, name="penultimate", reset_less=True)
        self._odd = Signal(name="odd")           # the part at hand is the second of its vector
        # It; the label: a ready comes from a register, as the sources have many readers.
        self._takes, self._takes_label = Signal(name="takes"), Signal(name="takes_label")
        emptied = Signal(name="emptied")         # a part of the error has left: its lanes are cleared for the next one
        m.d.comb += [logits.ready.eq(self._takes), label.ready.eq(self._takes_label)]
        m.d.sync += [self._takes.eq(0), self._takes_label.eq(0), self._penultimate.eq(classes - 2),
                     emptied.eq(error.valid & error.ready)]
        with m.If(error.valid & error.ready):
            m.d.sync += error.valid.eq(0)
        with m.If(emptied):
            m.d.sync += error.payload.eq(0)

    def advance(self, state: str, done: str):
        """On to the next class in ``state``, or to ``done``."""
        m = self.m
        m.d.sync += [self.position.eq(Mux(self.last, 0, self.position + 1)),
                     self.last.eq(self.position == self._penultimate)]
        m.next = state
        with m.If(self.last):
            m.next = done

    def load(self, there):
        """A logit is at hand if ``there``: on to STORE."""
        with self.m.If(there):
            self.m.d.sync += self._takes.eq(self._ends)
            self.m.next = "STORE"

    def store(self, done: str):
        """The logit is stored: on to the next one in LOAD, or to ``done``."""
        self._next_lane()
        self.advance("LOAD", done)
        if self.parts > 1:
            self.m.d.sync += self._takes.eq(self.last & ~self._odd)
        self._part_ends("SKIP")

    def place(self, value, state: str):
        """``value`` is the error of the class: on to the next one in ``state``, or to the next sample in LOAD."""
        self._next_lane()
        self.m.d.sync += [self.error.payload[self.lane].eq(value), self.error.valid.eq(self._ends)]
        self.advance(state, "LOAD")
        self._part_ends("PAD")

    def take_label(self):
        """The label is taken in the next cycle."""
        self.m.d.sync += self._takes_label.eq(1)

    def parts_without_classes(self, done: str):
        """The states that take such a part of the logits, on to ``done``, and send one of the error."""
        m = self.m
        if self.parts == 1:
            return
        with m.State("SKIP"):
            m.d.sync += self._takes.eq(~self.logits.valid)
            with m.If(self.logits.valid):
                m.next = done
        with m.State("PAD"):
            with m.If(~self.error.valid):
                m.d.sync += self.error.valid.eq(1)
                m.next = "LOAD"

    @property
    def _ends(self):
        return self.last | self.lane.all()

    def _next_lane(self):
        self.m.d.sync += self.lane.eq(Mux(self.last, 0, self.lane + 1))

    def _part_ends(self, padding: str):
        if self.parts > 1:
            with self.m.If(self._ends):
                self.m.d.sync += self._odd.eq(~self.last & ~self._odd)
            with self.m.If(self.last & ~self._odd):
                self.m.next = padding
