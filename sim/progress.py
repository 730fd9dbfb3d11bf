"""How far a simulated run is: steps done, loss, cycles per second, time left."""

import sys
import time

LIVE_SECONDS, LINE_SECONDS = 0.5, 30.0
INFERENCE_SHARE = 1 / 3
"""Of a training step's time, until the first inference is measured: one of three products."""


def duration(seconds):
    """Rounded for people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress:
    """One live line on a terminal, else a line every `LINE_SECONDS`. `training` and `testing` are the steps and test
    batches to come, `done` the training steps of the run already made."""

    def __init__(self, done, training, testing, stream=None, clock=time.monotonic):
        self.stream, self.clock = stream or sys.stderr, clock
        self.live = self.stream.isatty()
        self.first, self.total, self.made = done, {"training": training, "testing": testing}, {}
        self.spent = {}
        self.since = self.shown = None
        self.loss = None

    def step(self, kind, loss=None):
        """A step of `kind` ("training" or "testing") is compared; `loss` is its mean loss."""
        now = self.clock()
        if self.since is not None:
            self.spent[kind] = self.spent.get(kind, 0) + now - self.since
        self.since = now
        self.made[kind] = self.made.get(kind, 0) + 1
        self.loss = loss if loss is not None else self.loss

    def left(self):
        """Seconds left, or None before anything is known."""
        if not any(self.spent.values()):
            return None
        each = {kind: spent / self.made[kind] for kind, spent in self.spent.items()}
        each.setdefault("training", each.get("testing", 0) / INFERENCE_SHARE)
        each.setdefault("testing", each["training"] * INFERENCE_SHARE)
        return sum(each[kind] * (total - self.made.get(kind, 0)) for kind, total in self.total.items())

    def text(self, cycles, seconds):
        steps = self.first + self.made.get("training", 0)
        parts = [f"step {steps:,} of {self.first + self.total['training']:,}"]
        if self.made.get("testing"):
            parts.append(f"test batch {self.made['testing']:,} of {self.total['testing']:,}")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if seconds:
            parts.append(f"{cycles:,} cycles, {cycles / seconds:,.0f} cycles/s")
        if self.left() is not None:
            parts.append(f"{duration(self.left())} left")
        return ", ".join(parts)

    def update(self, cycles, seconds):
        """Show the state when it is time to; `cycles` and `seconds` are the simulation's."""
        now = self.clock()
        if self.since is None:                      # the clock of the first step starts with the simulation's
            self.since = now if cycles else None
        self.shown = now if self.shown is None else self.shown
        if now - self.shown < (LIVE_SECONDS if self.live else LINE_SECONDS):
            return
        self.shown = now
        self._write(self.text(cycles, seconds), end="" if self.live else "\n")

    def close(self, cycles, seconds):
        """Leave a last line."""
        if self.made:
            self._write(self.text(cycles, seconds), end="\n")

    def _write(self, text, end):
        print(f"\r{text}\x1b[K" if self.live else text, end=end, file=self.stream, flush=True)
