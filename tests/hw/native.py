"""A component as compiled code: Verilog by Amaranth, C++ by Verilator, called on numpy arrays.

Amaranth's own simulator runs a few thousand cycles per second; this runs millions, so units can be tested
exhaustively in seconds. Ports are addressed by their Verilog names (``x``, ``request__payload``, ...).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from amaranth.back import verilog

from sim.verilator import cache_folder, find_compiler, find_verilator

_HARNESS = r"""
#include "Vtop.h"
#include "verilated.h"
#include <cstdint>
#include <cstddef>
struct Random {            // xorshift: reproducible gaps and stalls
    uint64_t s;
    bool below(uint32_t p) { s ^= s << 13; s ^= s >> 7; s ^= s << 17; return uint32_t(s >> 32) < p; }
};
struct Instance { VerilatedContext context; Vtop top{&context}; };
static void edge(Vtop &t) { EDGE t.eval(); }
static void put(Vtop &t, int port, const uint32_t *w) { switch (port) { PUT } }
static void get(Vtop &t, int port, uint32_t *w) { switch (port) { GET } }
extern "C" {
void *make() { auto *i = new Instance; auto &t = i->top; RESET_ON t.eval(); edge(t); RESET_OFF t.eval(); return i; }
void drop(void *p) { delete static_cast<Instance *>(p); }
void set(void *p, int port, const uint32_t *w) { put(static_cast<Instance *>(p)->top, port, w); }
void trace(void *p, size_t cycles, int ins, const int *in, const int *in_words, const uint32_t *const *data,
           int outs, const int *out, const int *out_words, uint32_t *const *result) {
    Vtop &t = static_cast<Instance *>(p)->top;
    for (size_t c = 0; c < cycles; c++) {
        for (int k = 0; k < ins; k++) put(t, in[k], data[k] + c * in_words[k]);
        t.eval();
        for (int k = 0; k < outs; k++) get(t, out[k], result[k] + c * out_words[k]);
        edge(t);
    }
}
// Each source and sink has three ports: valid, ready, payload. Returns the cycles used, or -1 at the limit.
int64_t streams(void *p, size_t limit, uint64_t seed, uint32_t offer, uint32_t accept,
                int sources, const int *in, const int *in_words, const uint32_t *const *items, const size_t *counts,
                int sinks, const int *out, const int *out_words, uint32_t *const *results, const size_t *wanted) {
    Vtop &t = static_cast<Instance *>(p)->top;
    Random random{seed};
    size_t sent[16] = {}, got[16] = {};
    uint32_t valid[16] = {}, ready[16] = {};
    for (size_t c = 0; c < limit; c++) {
        for (int k = 0; k < sources; k++) {
            if (!valid[k]) valid[k] = sent[k] < counts[k] && random.below(offer);
            put(t, in[3 * k], &valid[k]);
            if (valid[k]) put(t, in[3 * k + 2], items[k] + sent[k] * in_words[k]);
        }
        for (int k = 0; k < sinks; k++) {
            ready[k] = got[k] < wanted[k] && random.below(accept);
            put(t, out[3 * k + 1], &ready[k]);
        }
        t.eval();
        for (int k = 0; k < sources; k++) {
            uint32_t taken = 0;
            get(t, in[3 * k + 1], &taken);
            if (valid[k] && taken) { sent[k]++; valid[k] = 0; }
        }
        bool done = true;
        for (int k = 0; k < sinks; k++) {
            uint32_t offered = 0;
            get(t, out[3 * k], &offered);
            if (offered && ready[k]) get(t, out[3 * k + 2], results[k] + got[k]++ * out_words[k]);
            done = done && got[k] == wanted[k];
        }
        for (int k = 0; k < sources; k++) done = done && sent[k] == counts[k];
        edge(t);
        if (done) return c + 1;
    }
    return -1;
}
}
"""


def _port_table(text: str, top: str) -> dict[str, tuple[str, int]]:
    """``{port: (direction, bits)}`` of module `top`."""
    module = re.search(rf"^module {re.escape(top)}\b.*?^endmodule", text, re.S | re.M)[0]
    found = re.findall(r"^\s*(input|output)\s+(?:wire\s+|reg\s+|signed\s+)*(?:\[(\d+):0\]\s*)?(\w+)\s*;", module, re.M)
    return {name: (direction, int(high or 0) + 1) for direction, high, name in found}


def _harness(ports: dict[str, tuple[str, int]]) -> str:
    put, get = [], []     # Verilator wants the unused upper bits of a port clear
    for number, (name, (_, bits)) in enumerate(ports.items()):
        words = -(-bits // 32)
        name = name.replace("__", "___05F")     # how Verilator writes two underscores in C++
        if bits > 64:
            clean = f" t.{name}[{words - 1}] &= {(1 << bits % 32) - 1}u;" if bits % 32 else ""
            put.append(f"case {number}: for (int k = 0; k < {words}; k++) t.{name}[k] = w[k];{clean} break;")
            get.append(f"case {number}: for (int k = 0; k < {words}; k++) w[k] = t.{name}[k]; break;")
        elif bits > 32:
            put.append(f"case {number}: t.{name} = (w[0] | uint64_t(w[1]) << 32) & {(1 << bits) - 1}ull; break;")
            get.append(f"case {number}: w[0] = uint32_t(t.{name}); w[1] = uint32_t(t.{name} >> 32); break;")
        else:
            put.append(f"case {number}: t.{name} = w[0] & {(1 << bits) - 1}u; break;")
            get.append(f"case {number}: w[0] = t.{name}; break;")
    clocked, reset = "clk" in ports, "rst" in ports
    return (_HARNESS.replace("EDGE", "t.clk = 1; t.eval(); t.clk = 0;" if clocked else "")
            .replace("RESET_ON", "t.rst = 1;" if reset else "").replace("RESET_OFF", "t.rst = 0;" if reset else "")
            .replace("PUT", " ".join(put)).replace("GET", " ".join(get)))


def _run(step, folder, tool):
    run = subprocess.run(step, cwd=folder, env=tool.environment, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{step[0]} failed:\n{run.stdout}{run.stderr}")


def _cached(suffix: str, identity: list[str], make) -> Path:
    """The cached result of ``make(folder) -> path``; complete or absent, whatever interrupts it."""
    digest = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:24]
    final = cache_folder() / "native" / f"{digest}{suffix}"
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent) as name:
            os.replace(make(Path(name)), final)
    return final


def _build(text: str, harness: str) -> Path:
    tool = find_verilator()
    compiler, version = find_compiler()
    root = Path(tool.environment.get("VERILATOR_ROOT") or "/usr/share/verilator")
    flags = ["-std=gnu++17", "-O1", "-fPIC", "-w", "-pthread", "-I.", f"-I{root}/include", f"-I{root}/include/vltstd"]
    identity = [str(tool.version), tool.command, version]

    def make_runtime(folder):
        sources = [f"{root}/include/{name}.cpp" for name in ("verilated", "verilated_threads")]
        _run([compiler, *flags, "-shared", *sources, "-o", "runtime.so"], folder, tool)
        return folder / "runtime.so"

    def make_unit(folder):
        (folder / "top.v").write_text(text)
        (folder / "harness.cpp").write_text(harness)
        _run([tool.command, "--cc", "top.v", "--top-module", "top", "--prefix", "Vtop", "-Mdir", ".", "-O3",
              "--no-timing", "--x-assign", "fast", "--x-initial", "fast", "-Wno-fatal", "-Wno-WIDTH",
              "-Wno-UNOPTFLAT"], folder, tool)
        sources = sorted(path.name for path in folder.glob("*.cpp"))
        _run([compiler, *flags, "-shared", *sources, str(runtime), f"-Wl,-rpath,{runtime.parent}", "-o", "unit.so"],
             folder, tool)
        return folder / "unit.so"

    runtime = _cached("-runtime.so", identity, make_runtime)
    return _cached(".so", [*identity, text, harness, str(runtime)], make_unit)


class Native:
    """One compiled component, reset and ready to run.

    ``trace(cycles, x=array, ...)`` drives every named input with one value per cycle (a scalar is held) and returns
    ``{output: array}`` as seen in each cycle before its clock edge. Arrays are int64 for ports up to 64 bits, else
    uint32 of shape (cycles, words), least significant word first; inputs may be given either way.

    ``streams(sources, sinks, ...)`` hands items over by valid and ready with random gaps, and collects as many items
    as asked for.
    """

    _instance = None

    def __init__(self, component):
        text = verilog.convert(component, name="top", strip_internal_attrs=True)
        self.ports = _port_table(text, "top")
        self._number = {name: k for k, name in enumerate(self.ports)}
        self._library = ctypes.CDLL(str(_build(text, _harness(self.ports))))
        self._library.make.restype = ctypes.c_void_p
        self._library.streams.restype = ctypes.c_int64
        self.reset()

    def reset(self):
        """A fresh instance: all registers at their initial values, all inputs zero."""
        self._drop()
        self._instance = ctypes.c_void_p(self._library.make())
        self.set(**{name: 1 for name in ("enable",) if name in self.ports})

    def _drop(self):
        if self._instance:
            self._library.drop(self._instance)
            self._instance = None

    def __del__(self):
        self._drop()

    def _words(self, name: str, values, count: int) -> np.ndarray:
        words = -(-self.ports[name][1] // 32)
        values = np.asarray(values)
        if values.ndim == 2 and values.dtype == np.uint32 and values.shape == (count, words):
            return np.ascontiguousarray(values)
        if words > 2:
            raise ValueError(f"{name} is wider than 64 bits: give uint32 of shape ({count}, {words})")
        wide = np.broadcast_to(values.astype(np.int64), (count,)).astype(np.uint64)
        return np.stack([(wide >> np.uint64(32 * k)).astype(np.uint32) for k in range(words)], axis=1)

    def _values(self, name: str, words: np.ndarray) -> np.ndarray:
        if words.shape[1] > 2:
            return words
        value = words[:, 0].astype(np.int64)
        return value | words[:, 1].astype(np.int64) << 32 if words.shape[1] == 2 else value

    def set(self, **values: int):
        """Drive inputs with constants until they are driven otherwise."""
        for name, value in values.items():
            words = -(-self.ports[name][1] // 32)
            raw = [(int(value) >> 32 * k) & 0xFFFFFFFF for k in range(words)]
            self._library.set(self._instance, self._number[name], (ctypes.c_uint32 * words)(*raw))

    def trace(self, cycles: int, outputs=None, **inputs) -> dict[str, np.ndarray]:
        outputs = list(outputs or (name for name, (direction, _) in self.ports.items() if direction == "output"))
        data = [self._words(name, values, cycles) for name, values in inputs.items()]
        result = [np.zeros((cycles, -(-self.ports[name][1] // 32)), np.uint32) for name in outputs]
        self._library.trace(self._instance, ctypes.c_size_t(cycles), *self._pack(list(inputs), data),
                            *self._pack(outputs, result))
        return {name: self._values(name, array) for name, array in zip(outputs, result, strict=True)}

    def streams(self, sources: dict, sinks: dict[str, int], *, offer: float = 1.0, accept: float = 1.0, seed: int = 1,
                limit: int = 10_000_000) -> tuple[dict[str, np.ndarray], int]:
        """Returns ``({sink: items}, cycles)``; raises TimeoutError when `limit` cycles do not deliver everything."""
        payloads = [f"{name}__payload" for name in sources]
        items = [self._words(port, values, len(values))
                 for port, values in zip(payloads, sources.values(), strict=True)]
        targets = [f"{name}__payload" for name in sinks]
        results = [np.zeros((count, -(-self.ports[port][1] // 32)), np.uint32)
                   for port, count in zip(targets, sinks.values(), strict=True)]

        def sides(names, arrays):
            parts = [self._number[f"{name}__{part}"] for name in names for part in ("valid", "ready", "payload")]
            pack = self._pack([f"{name}__payload" for name in names], arrays)
            counts = (ctypes.c_size_t * len(arrays))(*[len(array) for array in arrays])
            return pack[0], (ctypes.c_int * len(parts))(*parts), pack[2], pack[3], counts

        cycles = self._library.streams(
            self._instance, ctypes.c_size_t(limit), ctypes.c_uint64(seed * 0x9E3779B97F4A7C15 % 2**64 | 1),
            ctypes.c_uint32(min(int(offer * 2**32), 2**32 - 1)), ctypes.c_uint32(min(int(accept * 2**32), 2**32 - 1)),
            *sides(sources, items), *sides(sinks, results))
        if cycles < 0:
            raise TimeoutError(f"not everything was delivered in {limit} cycles")
        return {name: self._values(port, array)
                for name, port, array in zip(sinks, targets, results, strict=True)}, cycles

    def _pack(self, names, arrays):
        count = len(names)
        return (ctypes.c_int(count), (ctypes.c_int * count)(*[self._number[name] for name in names]),
                (ctypes.c_int * count)(*[array.shape[1] for array in arrays]),
                (ctypes.c_void_p * count)(*[array.ctypes.data for array in arrays]))


def lanes(array, bits: int) -> np.ndarray:
    """(cycles, lanes) integers -> (cycles, words) uint32, lane 0 in the low bits. `bits` is 8, 16, 32 or 64."""
    array = np.ascontiguousarray(np.asarray(array).astype(f"<i{bits // 8}"))
    raw = array.view(np.uint8).reshape(len(array), -1)
    raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 4)))
    return np.ascontiguousarray(raw).view("<u4")


def unlanes(words, bits: int, count: int) -> np.ndarray:
    """The inverse of :func:`lanes`: (cycles, count) signed integers."""
    words = np.asarray(words)
    if words.ndim == 1:
        words = np.stack([words & 0xFFFFFFFF, words >> 32 & 0xFFFFFFFF], axis=1)
    raw = np.ascontiguousarray(words.astype("<u4")).view(np.uint8)
    return np.ascontiguousarray(raw[:, :count * bits // 8]).view(f"<i{bits // 8}").astype(np.int64)
