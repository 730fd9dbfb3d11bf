"""Sessions, memory model, snapshots and error handling, on the copier device."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scenarios

from sim import control, session, trace
from sim.shared import MemorySettings, RunFolder, SimulationError, SnapshotPlan

SOURCE, TARGET, STEP = 0x1000, 0x100000, 0x1C0004
SIZE = 2 << 20
DATA = np.random.default_rng(7).integers(0, 256, 1 << 17, dtype=np.uint8)
ROOT = Path(__file__).resolve().parents[2]


def copy(
    build,
    out,
    *,
    beats=40,
    blocks=3,
    plan=None,
    consumer=None,
    settings=None,
    waves=None,
    target=TARGET,
    **more,
):
    """Run the copy scenario; returns (result, the copied bytes, the bytes expected)."""
    size = beats * blocks * 16
    seen = {}
    parameters = {"source": SOURCE, "target": target, "beats": beats, "blocks": blocks, "step": STEP, **more}
    result = session.simulate(
        build,
        "scenarios:copy",
        parameters,
        out=out,
        settings=settings or MemorySettings(size=SIZE, latency=3),
        plan=plan,
        consumer=consumer,
        waves=waves,
        cycle_limit=2_000_000,
        prepare=lambda memory: memory.write("data", SOURCE, DATA),
        keep=lambda memory: seen.update(memory=memory.view.copy()),
    )
    return result, seen["memory"][target : target + size], DATA[:size]


@pytest.mark.parametrize("beat_bytes", [8, 16, 64])
def test_every_beat_width(copier_build, tmp_path, beat_bytes):
    result, _, _ = copy(copier_build(beat_bytes), tmp_path, plan=SnapshotPlan(STEP, slots=3), check_registers=True)
    assert result.value["status"] == 2
    assert (result.read_beats, result.write_beats, result.steps) == (120, 123, 3)


def test_copies_the_right_bytes_across_page_boundaries(copier_build, tmp_path):
    _, copied, expected = copy(copier_build(), tmp_path, beats=300, target=TARGET + 0xF80)
    assert (copied == expected).all()


def test_latency_and_rates_cost_the_cycles_they_should(copier_build, tmp_path):
    def cycles(**settings):
        result, copied, expected = copy(
            copier_build(), tmp_path, beats=160, blocks=1, settings=MemorySettings(size=SIZE, **settings)
        )
        assert (copied == expected).all()
        return result.value["cycles"][0]

    base = cycles(latency=1)
    # 160 beats are 10 bursts each way, plus the step word: 21 latencies.
    assert cycles(latency=11) == base + 21 * 10
    # At 4 bytes per cycle a beat of 16 bytes takes 4 cycles instead of 1; the credit spares the first beats.
    slow = cycles(latency=1, read_rate=4)
    assert base + 10 * 13 * 3 <= slow <= base + 160 * 3
    assert cycles(latency=1, write_rate=4) > base + 10 * 13 * 3


def test_random_stalls_change_the_time_but_not_the_data(copier_build, tmp_path):
    def run(seed):
        settings = MemorySettings(size=SIZE, latency=2, stall=0.4, seed=seed)
        result, copied, expected = copy(copier_build(), tmp_path, settings=settings)
        assert (copied == expected).all()
        return result.cycles

    first = run(1)
    assert run(1) == first != run(2)


@pytest.mark.parametrize("first", [SOURCE + 64, TARGET + 64])
def test_error_range_reaches_the_core(copier_build, tmp_path, first):
    settings = MemorySettings(size=SIZE, errors=(first, 16))
    result, copied, _ = copy(copier_build(), tmp_path, settings=settings)
    assert result.value["status"] & 4
    assert not copied[64:80].any()


def test_addresses_outside_the_memory_are_decode_errors(copier_build, tmp_path):
    result, _, _ = copy(copier_build(), tmp_path, target=SIZE)
    assert result.value["status"] & 4


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("crosses", "crosses a 4 KB boundary"),
        ("drops", "ARVALID fell before ARREADY"),
        ("last", "WLAST is 1 on beat 2 of 8"),
        ("changes", "data or strobe of a waiting W beat changed"),
    ],
)
def test_protocol_violations_are_named(copier_build, tmp_path, broken, message):
    settings = MemorySettings(size=SIZE, stall=0.3)
    with pytest.raises(SimulationError, match=message):
        copy(copier_build(), tmp_path, broken=broken, target=TARGET + 0xF80, settings=settings)


def test_overlapping_bursts_in_flight_are_counted(copier_build, tmp_path):
    # Copying to 16 beats further on reads back what the burst before wrote.
    behind = {"target": SOURCE + 256, "settings": MemorySettings(size=SIZE, latency=40)}
    assert copy(copier_build(), tmp_path, **behind)[0].hazards == 0
    assert copy(copier_build(), tmp_path, broken="eager", **behind)[0].hazards > 0


def test_bursts_in_flight_are_limited(copier_build, tmp_path):
    def cycles(outstanding):
        settings = MemorySettings(size=SIZE, latency=60, outstanding=outstanding)
        return copy(copier_build(), tmp_path, broken="eager", settings=settings)[0].value["cycles"][0]

    # Ignoring responses, the copier sends the next write while the last waits for its response, if it may.
    assert cycles(1) > cycles(8) + 60


def test_strobes_spare_the_other_bytes(copier_build, tmp_path):
    around = {}
    session.simulate(
        copier_build(),
        "scenarios:copy",
        {"source": SOURCE, "target": TARGET, "beats": 1, "blocks": 1, "step": STEP},
        out=tmp_path,
        settings=MemorySettings(size=SIZE),
        prepare=lambda memory: memory.write("pattern", STEP - 20, b"\xee" * 60),
        keep=lambda memory: around.update(bytes=memory.read(STEP - 20, 60).tobytes()),
    )
    assert around["bytes"] == b"\xee" * 20 + (1).to_bytes(4, "little") + b"\xee" * 36


def test_snapshots_show_memory_at_each_step(copier_build, tmp_path):
    plan = SnapshotPlan(STEP, ((TARGET, 16 * 40), (STEP, 4)), slots=8)
    seen = []

    def consumer(snapshot):
        seen.append(
            (
                snapshot.step,
                snapshot.value,
                snapshot.cycle,
                snapshot.regions[0].copy(),
                snapshot.regions[1].copy().view("<u4")[0],
            )
        )

    result, _, _ = copy(copier_build(), tmp_path, plan=plan, consumer=consumer, doorbells=2)
    assert [entry[0] for entry in seen] == [0, 1, 2, 3, 4, 5]
    assert [entry[1] for entry in seen] == [1, 2, 3, 1, 2, 3] == [entry[4] for entry in seen]
    assert sorted(entry[2] for entry in seen) == [entry[2] for entry in seen] and seen[-1][2] < result.cycles
    assert (seen[0][3] == DATA[:640]).all()
    # The second doorbell came after the host had overwritten the first 16 bytes.
    assert (seen[3][3][:16] == 1).all() and (seen[3][3][16:] == DATA[16:640]).all()


def test_activity_is_counted_by_tag_and_turned_into_events(copier_build, tmp_path):
    result, _, _ = copy(copier_build(), tmp_path, blocks=3)
    product, vector = result.activity
    assert product.sum() == vector.sum() == result.cycles == vector[0, 0]
    busy = product[10:13, 1]
    assert busy.min() > 40 and product[:, 1].sum() == busy.sum() + product[13, 1]
    assert abs(int(busy.sum()) - result.value["cycles"][0]) < 10
    events = result.events.tolist()
    assert [engine for _, engine, _ in events] == [0] * len(events)
    assert [tag for _, _, tag in events] == [10, 11, 12, 13, -1]
    starts = [cycle for cycle, _, _ in events]
    assert [b - a for a, b in zip(starts, starts[1:], strict=False)][:3] == busy.tolist()


def test_the_bare_loop_does_the_same_in_the_same_cycles(copier_build, tmp_path):
    build = copier_build(flavour="bare")
    registers = {scenarios.SOURCE: SOURCE, scenarios.TARGET: TARGET, scenarios.BEATS: 40, scenarios.BLOCKS: 3}
    registers |= {scenarios.STEP: STEP, scenarios.DOORBELL: 1}
    script = tmp_path / "script"
    (tmp_path / "data").write_bytes(b"xyz" + DATA.tobytes())
    lines = ["reset 4", f"load {SOURCE} 3 {DATA.size}"]
    lines += [f"write {register} {value}" for register, value in registers.items()]
    lines += ["interrupt 100000", f"read {scenarios.STATUS}", f"write {scenarios.STATUS} 0", f"read {scenarios.STATUS}"]
    script.write_text("\n".join(lines))
    with RunFolder.create(MemorySettings(size=SIZE, latency=3)) as folder:
        environment = {**os.environ, "INTRAIN_RUN_DIR": str(folder.path)}
        command = [build.executable, script, tmp_path / "data"]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.stdout.split() == ["0x018", "0x00000002", "0x018", "0x00000000"], run.stderr
        assert (folder.memory.read(TARGET, 40 * 3 * 16) == DATA[: 40 * 3 * 16]).all()
        busy = np.array(folder.activity[0, 10:13, 1])
        for wrong, message in (("jump 3", "unknown script word jump"), ("load 0 0 999999999", "load outside a file")):
            script.write_text(wrong)
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert run.returncode == 2 and message in run.stderr
    result, _, _ = copy(copier_build(), tmp_path / "cocotb")
    assert busy.tolist() == result.activity[0, 10:13, 1].tolist()


def test_trace_file_has_a_slice_per_piece_of_work(tmp_path):
    events = np.array([(5, 0, 1), (9, 1, 2), (20, 0, 2), (30, 1, -1), (50, 0, -1), (60, 1, 7)])
    trace.write_trace(tmp_path / "trace.json", events, {1: "fc forward", 2: "fc update"}, 100)
    entries = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    slices = {(e["tid"], e["name"], e["ts"], e["dur"]) for e in entries if e["ph"] == "X"}
    assert slices == {(0, "fc forward", 5, 15), (0, "fc update", 20, 30), (1, "fc update", 9, 21)}
    assert sum(e["ph"] == "M" for e in entries) == 3


def test_a_full_ring_fails_the_run(copier_build, tmp_path):
    plan = SnapshotPlan(STEP, ((TARGET, 640),), slots=2)
    with pytest.raises(SimulationError, match="snapshots were lost: the ring holds 2"):
        copy(copier_build(), tmp_path, plan=plan, consumer=lambda snapshot: time.sleep(0.2), blocks=20)


def test_a_blocking_ring_waits_for_the_reader(copier_build, tmp_path):
    plan = SnapshotPlan(STEP, ((TARGET, 640),), slots=2, blocks=True)
    seen = []
    copy(copier_build(), tmp_path, plan=plan, consumer=lambda snapshot: seen.append(snapshot.value), blocks=50)
    assert seen == list(range(1, 51))


def test_a_consumers_exception_ends_the_simulation(copier_build, tmp_path):
    plan = SnapshotPlan(STEP, ((TARGET, 640),), slots=1, blocks=True)

    def consumer(snapshot):
        raise KeyError("mismatch")

    start = time.monotonic()
    with pytest.raises(KeyError, match="mismatch"):
        copy(copier_build(), tmp_path, plan=plan, consumer=consumer, blocks=50)
    assert time.monotonic() - start < 8


def test_host_writes_are_logged_with_their_doorbell(copier_build, tmp_path):
    result, _, _ = copy(copier_build(), tmp_path, doorbells=3)
    assert [(write["doorbell"], write["name"], write["size"]) for write in result.host_writes] == [
        (0, "data", DATA.size),
        (1, "batch", 16),
        (2, "batch", 16),
    ]
    lines = (tmp_path / "host_writes.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(result.host_writes)


def test_the_memory_view_is_read_only(tmp_path):
    with RunFolder.create(MemorySettings(size=4096)) as folder:
        with pytest.raises(ValueError, match="read-only"):
            folder.memory.view[0] = 1
        folder.memory.write("words", 8, np.array([1, 2], np.int32))
        assert folder.memory.read(8, 2, np.int32).tolist() == [1, 2]
        with pytest.raises(SimulationError, match="do not fit"):
            folder.memory.write("too long", 4090, bytes(10))
        path = folder.path
    assert not path.exists()


def test_python_wakes_at_the_cycle_limit(copier_build, tmp_path):
    settings = MemorySettings(size=SIZE)
    for cycles in (5, 1000, 4321):
        result = session.simulate(copier_build(), "scenarios:idle", {"cycles": cycles}, out=tmp_path, settings=settings)
        assert cycles <= result.value["passed"] <= cycles + 1
        assert f"no interrupt after {cycles} cycles" in result.value["error"]
        assert result.loop_cycles >= cycles - 4


def test_the_hard_cycle_limit_is_named(copier_build, tmp_path):
    with pytest.raises(SimulationError, match="limit of [0-9]+ cycles is reached"):
        session.simulate(
            copier_build(),
            "scenarios:idle",
            {"cycles": 10**7},
            out=tmp_path,
            cycle_limit=50_000,
            settings=MemorySettings(size=SIZE),
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("simulation", "^made to fail$"),
        ("other", "^ZeroDivisionError: division by zero$"),
        ("exit", "ended without a result"),
    ],
)
def test_errors_in_a_scenario_are_one_line(copier_build, tmp_path, kind, message):
    with pytest.raises(SimulationError, match=message) as caught:
        session.simulate(
            copier_build(), "scenarios:fail", {"kind": kind}, out=tmp_path, settings=MemorySettings(size=SIZE)
        )
    assert "\n" not in str(caught.value)


def test_the_executable_alone_explains_itself(copier_build):
    environment = {key: value for key, value in os.environ.items() if key != "INTRAIN_RUN_DIR"}
    run = subprocess.run([copier_build().executable], env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.strip().splitlines() == [
        "simulation: error: INTRAIN_RUN_DIR is not set; start the simulation through sim.session"
    ]


def _start_long_run(tmp_path):
    """A process that simulates thousands of doorbells; returns it and its run folder."""
    script = (
        # A shell that runs the tests in the background may have switched the interrupt key off for its children.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from sim import session, verilator; from sim.shared import *; import copier\n"
        "build = verilator.build(copier.copier_verilog(16))\n"
        "parameters = dict(source=0x1000, target=0x100000, beats=200, blocks=50,\n"
        "                  step=0x1C0004, doorbells=10**6)\n"
        f"result = session.simulate(build, 'scenarios:copy', parameters, out={str(tmp_path)!r},\n"
        "                          settings=MemorySettings(size=2 << 20))\n"
        "print('stopped', result.stopped, len(result.value['cycles']), result.value['status'])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for base in (Path("/dev/shm"), Path("/tmp")):
            for folder in base.glob(f"intrain-run-{process.pid}-*"):
                try:
                    started = control.Control(folder / "control.bin").interrupts > 2
                except (OSError, ValueError):  # being made
                    continue
                if started:
                    return process, folder
        time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the simulation did not start: {process.communicate()}")


def _gone(pid):
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_an_interrupt_key_ends_after_the_current_doorbell(copier_build, tmp_path):
    copier_build()
    process, folder = _start_long_run(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    word, stopped, doorbells, status = out.split()
    assert (word, stopped, status) == ("stopped", "True", "2") and int(doorbells) > 2
    assert "stopping after the current doorbell" in err
    assert not folder.exists()


def test_a_killed_parent_takes_its_simulation_along(copier_build, tmp_path):
    copier_build()
    process, folder = _start_long_run(tmp_path)
    simulation = control.Control(folder / "control.bin").pid
    process.kill()
    process.communicate()
    assert _gone(simulation)
    # The next run removes what the killed one could not.
    with RunFolder.create(MemorySettings(size=4096)):
        assert not folder.exists()


def test_debug_build_writes_the_wave_window(copier_build, tmp_path):
    _, copied, expected = copy(copier_build(flavour="debug"), tmp_path, waves=(50, 150))
    assert (copied == expected).all()
    waves = (tmp_path / "waves.fst").read_bytes()
    assert waves[:1] == b"\0" and len(waves) > 2000
    # FST header block: type, length, first and last time (big endian).
    first, last = (int.from_bytes(waves[at : at + 8], "big") for at in (9, 17))
    assert (first, last) in [(2 * 50 - 1 + shift, 2 * 150 + shift) for shift in (-1, 0, 1)]


def test_waves_need_the_debug_flavour(copier_build, tmp_path):
    with pytest.raises(SimulationError, match="use the debug flavour"):
        copy(copier_build(), tmp_path, waves=(0, 10))


def test_external_memory_with_cocotbext_axi(copier_build, tmp_path):
    """The same pins under an independent AXI implementation, with random pauses."""
    pytest.importorskip("cocotbext.axi")
    result = session.simulate(
        copier_build(),
        "scenarios:with_cocotbext",
        {"source": SOURCE, "target": 0x8000, "step": 0xFF04, "data": DATA[: 16 * 50].tolist()},
        out=tmp_path,
        settings=MemorySettings(size=SIZE, external=True),
    )
    assert result.value == {"equal": True, "status": 2, "step": 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [("size", 1000), ("latency", 0), ("stall", 1.0), ("outstanding", 0), ("read_rate", -1)],
)
def test_bad_memory_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"memory {field} is {value!r}: use"):
        MemorySettings(**{field: value})


def test_control_block_has_only_known_fields(tmp_path):
    block = control.Control(tmp_path / "control.bin", create=True)
    block.cycle = 5
    assert control.Control(tmp_path / "control.bin").cycle == 5
    with pytest.raises(AttributeError, match="no field 'cylce'"):
        block.cylce = 1
    with pytest.raises(ValueError, match="1025 snapshot regions are too many"):
        block.set_regions([(0, 1)] * 1025)
