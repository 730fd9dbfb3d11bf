"""Both ports and the registers in Verilator: against the C++ memory, which checks the protocol, and against
cocotbext-axi, an AXI implementation that knows nothing of this project."""

import numpy as np
import pytest

from hw.config import PRESETS, CoreConfig
from hw.errors import ErrorCode
from sim import session, verilator
from sim.shared import MemorySettings
from tests.hw.copy_top import copy_top_verilog

pytestmark = pytest.mark.slow

SOURCE, TARGET, SIZE = 0x1FC0, 0x20F40, 1 << 18     # runs that start in the middle of a page
CONFIGS = {"tiny": PRESETS["tiny"], "narrow": CoreConfig(name="narrow", rows=8, columns=4, beat_bytes=8)}
DONE, ERROR, IDLE = 2, 4, 8
DATA = np.random.default_rng(5).integers(0, 256, 1 << 15, dtype=np.uint8)


def simulate(name, scenario, out, *, lines, memory=None, **parameters):
    """Runs a scenario; returns (result, the bytes of the target area, the bytes expected there)."""
    config = CONFIGS[name]
    seen = {}
    result = session.simulate(
        verilator.build(copy_top_verilog(config)), f"tests.hw.port_scenarios:{scenario}",
        {"source": SOURCE, "target": TARGET, "lines": lines, **parameters}, out=out,
        settings=memory or MemorySettings(size=SIZE), prepare=lambda view: view.write("data", SOURCE, DATA),
        keep=lambda view: seen.update(view=view.view.copy()))
    size = lines * config.line_bytes
    return result, seen["view"][TARGET:TARGET + size], DATA[:size]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("latency, stall", [(1, 0.0), (30, 0.0), (5, 0.3), (40, 0.6)])
def test_copy(name, latency, stall, tmp_path):
    memory = MemorySettings(size=SIZE, latency=latency, stall=stall, outstanding=64)
    result, copied, expected = simulate(name, "copy", tmp_path, lines=600, memory=memory, limit=SIZE)
    assert result.value["STATUS"] == DONE | IDLE
    assert result.value["IRQ_STATUS"] == 1
    assert (copied == expected).all()
    beats = 600 * CONFIGS[name].line_bytes // CONFIGS[name].beat_bytes
    assert (result.read_beats, result.write_beats) == (beats, beats)


def test_throughput_with_128_cycles_of_latency(tmp_path):
    """Reads and writes at once, full bursts and isolated lines mixed: still almost one line per cycle each way."""
    memory = MemorySettings(size=SIZE, latency=128, outstanding=255)
    result, copied, expected = simulate("tiny", "copy", tmp_path, lines=2000, memory=memory, limit=SIZE)
    assert (copied == expected).all()
    assert result.value["CYCLES"] <= 2000 + 2 * 128 + 150


def test_soft_resets_in_the_middle_break_no_transaction(tmp_path):
    memory = MemorySettings(size=SIZE, latency=20, stall=0.3)
    result, copied, expected = simulate("narrow", "copy", tmp_path, lines=600, memory=memory, limit=SIZE,
                                        reset_after=[1, 5, 9, 14, 22, 31, 47, 60, 100, 333])
    assert result.value["STATUS"] == DONE | IDLE
    assert (copied == expected).all()


@pytest.mark.parametrize("where, code", [("read", ErrorCode.READ_FAILED), ("write", ErrorCode.WRITE_FAILED),
                                         ("window", ErrorCode.WRITE_OUTSIDE_WINDOW)])
def test_errors_stop_and_the_next_run_works(where, code, tmp_path):
    bad = {"read": SOURCE + 0x200, "write": TARGET + 0x200, "window": TARGET + 0x200}[where]
    memory = MemorySettings(size=SIZE, latency=9, stall=0.2, errors=(0, 0) if where == "window" else (bad, 16))
    result, copied, expected = simulate("tiny", "fail_and_recover", tmp_path, lines=64, memory=memory,
                                        limit=bad if where == "window" else SIZE, good_limit=SIZE)
    failed, recovered = result.value
    assert failed["STATUS"] == ERROR | IDLE
    assert failed["ERROR_CODE"] == code
    assert failed["IRQ_STATUS"] == 2
    if where == "read":
        assert failed["ERROR_ADDRESS"] == bad
    else:       # a burst, or the first line of either client outside the window
        assert TARGET <= failed["ERROR_ADDRESS"] < TARGET + 64 * 16
    assert recovered["STATUS"] == DONE | IDLE
    assert (copied == expected).all()


@pytest.mark.parametrize("name, pause", [("tiny", 0.0), ("tiny", 0.5), ("narrow", 0.3)])
def test_with_cocotbext_axi(name, pause, tmp_path):
    pytest.importorskip("cocotbext.axi")
    size = 100 * CONFIGS[name].line_bytes
    memory = MemorySettings(size=SIZE, external=True)
    result, _, _ = simulate(name, "with_cocotbext", tmp_path, lines=100, memory=memory, data=DATA[:size].tolist(),
                            seed=1, pause=pause)
    assert result.value == {"refused": [True] * 6, "strobed": 0x4433AA11, "busy_refused": True, "equal": True,
                            "status": DONE | IDLE, "irq_status": 1}


def test_the_memory_sees_what_it_should_refuse(tmp_path):
    """The check of the check: a copy beyond the memory is answered with an error, not with data."""
    result, _, _ = simulate("tiny", "copy", tmp_path, lines=64, limit=0xFFFF_FFFF,
                            memory=MemorySettings(size=TARGET // 4096 * 4096))
    assert result.value["STATUS"] == ERROR | IDLE
    assert result.value["ERROR_CODE"] == ErrorCode.WRITE_FAILED


def test_the_generated_verilog_has_no_lint_warnings():
    for config in CONFIGS.values():
        assert verilator.lint(copy_top_verilog(config)) == []
