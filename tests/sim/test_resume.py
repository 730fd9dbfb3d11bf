"""Stopped, killed and resumed runs give what an uninterrupted one gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import golden.train
from golden import data as data_module
from hw.config import PRESETS
from sim import checkpoint, doorbells, train
from sim.__main__ import main
from sim.shared import SimulationError

ROOT = Path(__file__).resolve().parents[2]
STEPS, TEST_IMAGES = 10, 64


@pytest.fixture(scope="module", autouse=True)
def short_doorbells():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doorbells, "STEPS_PER_DOORBELL", 4)
        yield


def run(out, steps=STEPS, seed=1, floating=True, **options):
    network = golden.train.build("niti", "mlp", seed, data="digits", batch=32, **options)
    return train.train(PRESETS["tiny"], network, data_module.load("digits"), steps, out, test_images=TEST_IMAGES,
                       floating=floating, log=lambda line: None)


def resume(out, *more):
    return main(["train", "--resume", str(out), *more])


def results(out):
    """All that must not depend on interruptions: everything but the cycles since the process's start and the idle
    cycles of an engine between doorbells. Cycles of waiting come last and apart."""
    found = [(out / "digests.jsonl").read_text()]
    found += [{**json.loads(line), "cycle": 0} for line in (out / "steps.jsonl").read_text().splitlines()]
    rows = json.loads((out / "cycles.json").read_text())
    found += [{**row, "detail": {**row["detail"], "idle": 0, "dependency": 0}} for row in rows]
    summary = json.loads((out / "summary.json").read_text())
    names = ("steps", "bit_exact", "tensors_compared", "not_compared", "test_accuracy", "float_accuracy", "cycles",
             "doorbells", "mac_utilization", "test_images")
    return found, {name: summary[name] for name in names}, [row["detail"]["dependency"] for row in rows]


def assert_same(out, uninterrupted):
    *found, waited = results(out)
    *expected, without = results(uninterrupted)
    assert found == expected
    # After a reset the array needs no change of mode for its first block.
    assert all(abs(a - b) <= 1 for a, b in zip(waited, without, strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three doorbells: 4, 4 and 2 steps."""
    out = tmp_path_factory.mktemp("whole")
    run(out)
    return out


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of it to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


class Killed(BaseException):
    pass


@pytest.mark.parametrize("checkpoints, before", [(0, False), (1, True), (1, False), (3, False)])
def test_a_run_that_died_goes_on_with_the_same_results(whole, tmp_path, monkeypatch, checkpoints, before):
    """It dies before or after its n-th checkpoint after the first, with lines of later steps in the files."""
    save, count = checkpoint.save, iter(range(-1, 10))

    def dying(path, *rest):
        last = next(count) == checkpoints - 1
        if not last or not before:
            save(path, *rest)
        if last:
            with (path.parent / "digests.jsonl").open("a") as file:
                file.write('{"step": 999, "weights": "torn')
            raise Killed

    monkeypatch.setattr(checkpoint, "save", dying)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "checkpoint")[0]["account"]["step"] == [0, 4, 8, 10][checkpoints - before]
    assert resume(tmp_path) == 0
    assert_same(tmp_path, whole)
    names = [json.loads(line)["name"] for line in (tmp_path / "host_writes.jsonl").read_text().splitlines()]
    assert names.count("program") == 3 + 1 and names.count("fc0.weight") == (1 if checkpoints - before == 0 else 2)


def test_wide_masters_and_more_steps_than_planned(tmp_path):
    run(tmp_path / "a", 7, weight_bits=16)
    run(tmp_path / "b", 3, weight_bits=16)
    assert resume(tmp_path / "b", "--steps", "7", "--weight-bits", "16", "--core", "tiny") == 0
    assert (tmp_path / "a" / "digests.jsonl").read_text() == (tmp_path / "b" / "digests.jsonl").read_text()


def test_the_state_comes_from_the_cores_memory(finished):
    """A checkpoint whose bytes are not what the core had after that step is refused, although its digest is right."""
    path = finished / "checkpoint"
    facts, pieces = checkpoint.load(path)
    pieces["memory:fc0.weight"][0] ^= 1
    checkpoint.save(path, pieces, facts)
    with pytest.raises(SimulationError, match=f"checkpoint {path} is not of this run: after step 10"):
        train.load(finished)


def _one_line(capsys, *parts):
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and all(part in error for part in ("error: ", *parts)), error


@pytest.mark.parametrize("arguments, message", [
    (["--seed", "2"], "--seed 1, not 2"), (["--core", "small"], "--core tiny, not small"),
    (["--model", "lenet"], "--model mlp, not lenet"), (["--batch", "16"], "--batch 32, not 16"),
    (["--method", "niti-2020"], "--method niti, not"), (["--weight-bits", "16"], "--weight-bits 8, not 16"),
    (["--data", "mnist"], "--data digits, not mnist"),
])
def test_another_core_model_or_seed_is_refused(whole, capsys, arguments, message):
    assert resume(whole, *arguments) == 1
    _one_line(capsys, f"checkpoint {whole / 'checkpoint'}", message)


def test_checkpoints_that_do_not_fit_are_named(finished, tmp_path, capsys, monkeypatch):
    path = finished / "checkpoint"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert resume(finished) == 1
    _one_line(capsys, f"checkpoint {path} is damaged")
    run(tmp_path / "other", 10, seed=2, floating=False)
    capsys.readouterr()
    shutil.copy(tmp_path / "other" / "checkpoint", path)
    assert resume(finished) == 1
    _one_line(capsys, f"checkpoint {path} is not of this run")
    path.write_bytes(good)
    (finished / "digests.jsonl").write_text("")
    assert resume(finished) == 1
    _one_line(capsys, f"checkpoint {path} is of step 10", "has only 0 lines")
    path.unlink()
    assert resume(finished) == 1
    _one_line(capsys, f"nothing to resume: there is no {path}")


def test_a_changed_core_is_refused(finished, capsys, monkeypatch):
    verilog = doorbells.generated_verilog(PRESETS["tiny"])
    monkeypatch.setattr(doorbells, "generated_verilog", lambda config: verilog + "// changed\n")
    assert resume(finished, "--steps", "12") == 1
    _one_line(capsys, f"checkpoint {finished / 'checkpoint'} was made by another version of core 'tiny'")


def test_a_finished_run_wants_more_steps(finished, capsys):
    assert resume(finished) == 1
    _one_line(capsys, "already has 10 steps")
    assert resume(finished, "--steps", "5") == 1
    _one_line(capsys, "already has 10 steps")
    assert resume(finished, "--out", "elsewhere") == 1
    _one_line(capsys, "--out is fixed")


def test_two_runs_do_not_share_a_folder(tmp_path):
    with train._own(tmp_path), pytest.raises(SimulationError, match=f"another run is writing to {tmp_path}"):
        run(tmp_path)


def test_a_full_disk_is_one_line_and_can_be_resumed(tmp_path, monkeypatch, capsys, whole):
    fsync, calls = os.fsync, iter(range(100))

    def full(number):
        if next(calls) == 4:                    # the lines before the second checkpoint
            raise OSError(28, "No space left on device")
        fsync(number)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SimulationError, match=f"cannot write to {tmp_path}: No space left on device; when that is "
                                              f"mended, continue with python -m sim train --resume {tmp_path}"):
        run(tmp_path)
    monkeypatch.undo()
    assert resume(tmp_path) == 0
    assert_same(tmp_path, whole)


def _start(out, *more):
    """The command in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "sim", "train", "--core", "tiny", "--test-images", str(TEST_IMAGES),
                             *more], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONUNBUFFERED": "1"},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))


def _wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen within a minute")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_run_that_goes_on(tmp_path, number):
    out = tmp_path / "run"
    process = _start(out, "--steps", "2000", "--out", str(out))
    _wait_for(lambda: (out / "checkpoint").exists() and checkpoint.load(out / "checkpoint")[0]["account"]["step"])
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    done = checkpoint.load(out / "checkpoint")[0]["account"]["step"]
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == (f"stopped after step {done} of 2000: continue with python -m sim train "
                                      f"--resume {out}")
    assert len((out / "digests.jsonl").read_text().splitlines()) == done
    assert resume(out, "--steps", str(done + 1)) == 0
    golden_network = golden.train.build("niti", "mlp", 1, data="digits", batch=32)
    golden.train.train(golden_network, data_module.load("digits"), done + 1, tmp_path / "golden")
    assert (out / "digests.jsonl").read_text() == (tmp_path / "golden" / "digests.jsonl").read_text()


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, monkeypatch):
    """Killed without warning at random moments, until it once gets through."""
    out, random, kills = tmp_path / "run", np.random.default_rng(4), 0
    process = _start(out, "--steps", "120", "--out", str(out))
    _wait_for(lambda: (out / "checkpoint").exists())
    for _ in range(6):
        time.sleep(random.uniform(0.5, 6))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
        process = _start(out, "--resume", str(out))
    process.communicate()
    assert kills >= 2
    if process.returncode:                      # the last kill came after the end
        assert (out / "summary.json").exists()
    monkeypatch.setattr(doorbells, "STEPS_PER_DOORBELL", 45)
    run(tmp_path / "whole", 120)
    assert_same(out, tmp_path / "whole")
