"""What a PRODUCT descriptor means, written out in numpy: the reference for the tiler and for the product engine.

It follows the text of docs/core.md and hw/descriptor.py field by field, one vector at a time, with no overlap, no
pipeline and no sharing with the compiler.
"""

import itertools

import numpy as np

from hw.descriptor import Mode


class BlockModel:
    """Executes product blocks on a bytearray-like memory."""

    def __init__(self, config, memory: np.ndarray):
        self.config, self.memory = config, memory
        self.a = self.b = None
        self.entries = np.zeros((config.accumulator_entries, config.columns), np.int64)
        self.scalars = [0] * 64

    def _fold(self, load, raw):
        v, kernel, step = self.config.vector, load["fold_kernel_bytes"], load["fold_step_bytes"]
        raw = raw[load["fold_skip"]:]
        vectors = []
        for r in range(load["fold_rows"]):
            row = raw[r * load["fold_row_bytes"]:(r + 1) * load["fold_row_bytes"]]
            row = np.concatenate([np.zeros(load["fold_pad_bytes"], np.int8), row, np.zeros(kernel, np.int8)])
            for c in range(load["fold_columns"]):
                taps = row[c * step:c * step + kernel]
                vectors.append(np.pad(taps, (0, load["fold_slices"] * v - len(taps))))
        return np.concatenate(vectors)

    def _load(self, load):
        line = self.config.line_bytes
        parts = []
        for tile, run in itertools.product(range(load["tiles"]), range(load["runs"])):
            start = load["address"] + tile * load.get("tile_stride", 0) + run * load.get("run_stride", 0)
            assert start % line == 0
            parts.append(self.memory[start:start + load["lines"] * line])
        data = np.concatenate(parts).view(np.int8)
        if load.get("fold"):
            data = self._fold(load, data)
        assert len(data) <= self.config.buffer_lines * line, "the load does not fit its buffer"
        return data

    def run(self, sections):
        config, (rows, columns, v) = self.config, (self.config.rows, self.config.columns, self.config.vector)
        feed, weights = sections["feed"], sections["weights"]
        if sections["load_a"].get("enable"):
            self.a = self._load(sections["load_a"])
        if sections["load_b"].get("enable"):
            self.b = self._load(sections["load_b"])

        def f(name):
            return feed.get(name, 0)

        results = []
        tile_loops = [range(f(f"tiles{k}")) for k in range(4)]
        pixel_loops = [range(f(f"pixels{k}")) for k in range(3)]
        assert all(tile_loops) and all(pixel_loops), "a loop count of zero"
        for t in itertools.product(*tile_loops):
            first = f("first") and all(t[k] == 0 for k in range(4) if f("reduce") >> k & 1)
            last = f("last") and all(t[k] == tile_loops[k][-1] for k in range(4) if f("reduce") >> k & 1)
            entry = sum(t[k] * f(f"accumulator{k}") for k in range(4))
            if f("mode") != Mode.GRADIENT:
                at = weights["address"] + sum(t[k] * weights.get(f"stride{k}", 0) for k in range(4))
                base, slice_ = at - at % v, at % v
                forward = f("mode") == Mode.FORWARD
                count, width = (columns, rows) if forward else (rows, columns)
                tile = np.stack([self.memory[base + r * v + slice_:][:width].view(np.int8) for r in range(count)])
                tile = tile.astype(np.int64)
            sums = np.zeros((rows, columns), np.int64)
            vectors = []
            for p in itertools.product(*pixel_loops):
                row = f("row_start") + sum(t[k] * f(f"row_tile{k}") for k in range(4)) + p[1] * f("row_step")
                column = (f("column_start") + sum(t[k] * f(f"column_tile{k}") for k in range(4))
                          + p[2] * f("column_step"))
                inside = 0 <= row < f("rows") and 0 <= column < f("columns")

                def read(buffer, name, lanes, t=t, p=p):
                    at = (f(f"{name}_start") + sum(t[k] * f(f"{name}_tile{k}") for k in range(4))
                          + sum(p[k] * f(f"{name}_pixel{k}") for k in range(3)))
                    assert 0 <= at and (at + 1) * lanes <= len(buffer), "reads outside the loaded band"
                    return buffer[at * lanes:(at + 1) * lanes].astype(np.int64)
                if f("mode") == Mode.GRADIENT:
                    if inside:
                        sums += np.outer(read(self.a, "a", rows), read(self.b, "b", columns))
                else:
                    left = read(self.a, "a", rows) if inside else np.zeros(rows, np.int64)
                    vectors.append(left @ (tile.T if f("mode") == Mode.FORWARD else tile))
            vectors = sums if f("mode") == Mode.GRADIENT else np.array(vectors)
            assert entry + len(vectors) <= config.accumulator_entries, "results leave the accumulator"
            where = slice(entry, entry + len(vectors))
            self.entries[where] = vectors if first else self.entries[where] + vectors
            if last:
                results.extend(self.entries[where].copy())
        if f("last"):
            self._store(sections["store"], results)

    def _store(self, store, results):
        v, columns = self.config.vector, self.config.columns
        results = iter(results)
        largest = 0
        for c in itertools.product(*(range(store[f"count{k}"]) for k in range(4))):
            at = store["address"] + sum(c[k] * store.get(f"stride{k}", 0) for k in range(4))
            for k in range(store["run"]):
                vector = next(results)
                assert np.abs(vector).max(initial=0) < 2**31
                ranged = np.maximum(vector, 0) if store.get("range_positive") else np.abs(vector)
                largest = max(largest, int(ranged.max(initial=0)))
                self.memory[at + k * 4 * v:][:4 * columns] = vector.astype("<i4").view(np.uint8)
        assert next(results, None) is None, "more results than store loops"
        register = store["range_register"]
        self.scalars[register] = largest if store["range_clear"] else max(self.scalars[register], largest)
