"""What VECTOR descriptors do to memory, in numpy: written from the descriptor's documentation, not from the engine."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from golden import dfp, random
from golden.niti import loss_gradient
from golden.rounding import Rounding, saturate
from hw import microprogram
from hw.vector import Function

TYPES = (np.int8, np.int16, np.int32)
BITS = (8, 16, 32)

__all__ = ["BITS", "TYPES", "Wide", "execute"]


@dataclasses.dataclass
class Wide:
    """State of the wide lanes, and the scalar registers that they and their ranges use."""

    lanes: list[list[int]]
    scalars: list[int]
    words: list[int] = dataclasses.field(default_factory=lambda: [0] * microprogram.MICROPROGRAM_WORDS)

    @classmethod
    def of(cls, lanes: int):
        return cls([[0] * microprogram.LANE_REGISTERS for _ in range(lanes)], [0] * 64)


def softmax_sums(logits, exponent: int, label: int) -> np.ndarray:
    """golden.dfp.softmax_gradient of one sample before it is rounded: its probabilities, by the definition."""
    distance = (logits.max() - logits) * dfp.LOG2_E
    shift = 7 - exponent
    octaves = np.minimum(distance >> min(shift, 62) if shift >= 0 else distance << min(-shift, 13), 31 * dfp.OCTAVE)
    e = dfp.EXPONENTIALS[octaves % dfp.OCTAVE] >> octaves // dfp.OCTAVE
    return e * 2**dfp.PROBABILITY_BITS // e.sum() - (np.arange(len(e)) == label) * 2**dfp.PROBABILITY_BITS


class _Walk:
    """One source or target: vectors at the addresses of an iteration."""

    def __init__(self, memory: np.ndarray, lanes: int, fields: dict, name: str, width: int):
        self.memory, self.lanes, self.type = memory, lanes, np.dtype(TYPES[width])
        self.address = fields.get(name, 0)
        self.strides = [fields.get(f"{name}_stride{k}", 0) for k in range(5)]

    def place(self, index) -> slice:
        start = self.address + sum(i * s for i, s in zip(index, self.strides, strict=True))
        return slice(start, start + self.lanes * self.type.itemsize)

    def read(self, index) -> np.ndarray:
        return self.memory[self.place(index)].copy().view(self.type).astype(np.int64)

    def write(self, index, vector):
        self.memory[self.place(index)] = vector.astype(self.type).view(np.uint8)


def execute(fields: dict, memory: np.ndarray, lanes: int, register: int, seed: int = 0, step: int = 0,
            state: Wide | None = None) -> int:
    """Applies one descriptor to ``memory`` (bytes) and returns the largest magnitude of the results. ``register`` is
    S[shift_register], ``state`` what WIDE needs; fields left out are 0.
    """
    get = lambda name: fields.get(name, 0)    # noqa: E731
    source0 = _Walk(memory, lanes, fields, "source0", get("source0_width"))
    source1 = _Walk(memory, lanes, fields, "source1", get("source1_width"))
    source2 = _Walk(memory, lanes, fields, "source2", get("source2_width"))
    target0 = _Walk(memory, lanes, fields, "target0", get("target_width"))
    target1 = _Walk(memory, lanes, fields, "target1", 0)
    counts = [max(1, get(f"count{k}")) for k in range(5)]
    bits, shift = BITS[get("target_width")], min(max(register, -64 if get("left") else 0), 62)
    rounding = Rounding(get("rounding"))

    def draw(index):
        """The contract's words of a vector; the descriptor's numbers are indices times INDEX_MULTIPLIER."""
        product = get("random_start") + sum(i * get(f"random_stride{k}") for k, i in enumerate(index))
        first = product * pow(random.INDEX_MULTIPLIER, -1, 1 << 32)
        words = random.word(seed, step, get("random_stream"), np.array([(first + j) % 2**32 for j in range(lanes)]))
        return words.astype(np.int64) >> (16 if rounding is Rounding.STOCHASTIC_16 else 0)

    largest = [0]

    def limited(y):
        bound = get("limit") or (1 << bits - 1) - 1
        return np.clip(y, -bound, bound)

    def write(index, y):
        largest[0] = max(largest[0], int(np.abs(y).max()))
        if get("enable") & 8:
            target0.write(index, y)

    def rounded(index, x=None):
        x = source0.read(index) if x is None else x
        if shift < 0:                    # multiplied in Python's integers: they do not wrap
            return saturate(np.clip([int(v) << -shift for v in x], -2**40, 2**40), bits)
        return saturate(rounding.compute(x, shift, draw(index) if rounding.needs_draw else None), bits)

    def stages(index):
        y = rounded(index)
        if get("relu"):
            y = np.maximum(y, 0)
        if get("mask"):
            y = np.where(source1.read(index) > 0, y, 0)
        if get("unpool"):
            y = np.where(source2.read(index) & 3 == 2 * index[2] + index[4], y, 0)
        if get("blocked"):
            y = np.where(source2.read(index) >> 2 & get("blocked"), 0, y)
        return limited(y)

    def with_state(index):
        """Pooled sums through the stages, and the byte of what they did."""
        x, place = source0.read(index), 0
        if get("pool"):
            window = np.stack([source0.read((*index[:3], *inner)) for inner in itertools.product(range(2), range(2))])
            x, place = window.max(axis=0), window.argmax(axis=0)
        shown = np.maximum(x, 0) if get("relu") else x
        clipped = [abs(int(v)) * 2.0**-shift > (1 << bits - 1) - 1 for v in shown]     # exact: a power of two
        y = rounded(index, x)
        return limited(np.maximum(y, 0) if get("relu") else y), place + 4 * np.array(clipped) + 8 * (x <= 0)

    def labels(sample):
        return source1.read((*sample, 0))[sample[3]] & 0xFF

    match Function(get("function")):
        case Function.ELEMENTWISE if get("state"):
            for index in itertools.product(*map(range, counts[:3] + [1, 1] if get("pool") else counts)):
                y, state = with_state(index)
                write(index, y)
                if get("enable") & 4:
                    target1.write(index, state)
        case Function.ELEMENTWISE if get("pool"):
            for outer in itertools.product(*map(range, counts[:3])):
                window = np.stack([stages((*outer, *inner)) for inner in itertools.product(range(2), range(2))])
                write((*outer, 0, 0), window.max(axis=0))
                if get("enable") & 4:
                    target1.write((*outer, 0, 0), window.argmax(axis=0))
        case Function.ELEMENTWISE:
            for index in itertools.product(*map(range, counts)):
                write(index, stages(index))
        case Function.UPDATE:
            for index in itertools.product(*map(range, counts)):
                write(index, limited(source1.read(index) - rounded(index)))
        case Function.SQUARED_ERROR:
            for index in itertools.product(*map(range, counts)):
                target = np.arange(index[4] * lanes, (index[4] + 1) * lanes) == labels(index[:4])
                write(index, limited(rounded(index) - (target << get("label_log2"))))
        case Function.FILL:
            for index in itertools.product(*map(range, counts)):
                target0.write(index, np.zeros(lanes))
        case Function.WIDE:
            ranges, words = [0] * microprogram.RANGES, state.words[get("microprogram"):]
            for index in itertools.product(*map(range, counts)):
                inputs = {0: source0.read(index)}
                if get("enable") & 1:
                    inputs[1] = source1.read(index)
                if get("enable") & 2:
                    inputs[2] = source2.read(index)
                if rounding.needs_draw:
                    inputs[3] = draw(index)
                for number, vector in inputs.items():
                    for lane, value in zip(state.lanes, vector.tolist(), strict=True):
                        lane[number] = value
                for vector in microprogram.run(words, state.lanes, state.scalars, ranges):
                    target0.write(index, np.array(vector))
            for k in range(get("ranges")):
                state.scalars[get("range_register") + k] = ranges[k].bit_length()
        case Function.SOFTMAX:
            for sample in itertools.product(*map(range, counts[:4])):
                tiles = [(*sample, tile) for tile in range(counts[4])]
                logits = np.concatenate([source0.read(tile) for tile in tiles])[:get("classes")]
                error = np.zeros(counts[4] * lanes, np.int64)
                error[:len(logits)] = softmax_sums(logits, register, labels(sample))
                for tile, part in zip(tiles, error.reshape(-1, lanes), strict=True):
                    write(tile, part)
        case Function.NITI_LOSS:
            for sample in itertools.product(*map(range, counts[:4])):
                tiles = [(*sample, tile) for tile in range(counts[4])]
                logits = np.concatenate([source0.read(tile) for tile in tiles])[:get("classes")]
                label = labels(sample)
                error = np.zeros(counts[4] * lanes)
                error[:len(logits)] = loss_gradient(logits[None], register, [label])[0]
                for tile, part in zip(tiles, error.reshape(-1, lanes), strict=True):
                    target0.write(tile, part)
    return largest[0]
