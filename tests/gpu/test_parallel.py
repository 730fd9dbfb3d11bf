"""Several workers give the bits of one; a lost worker gives one line and a run that can be resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpu.group import Group
from gpu.ops import Ops
from tests.gpu.conftest import without_interpreter
from tests.gpu.workers import digests


def torchrun(workers, *arguments):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", *arguments]


def test_shards_cover_a_batch():
    group = Group()
    for size in (1, 3, 4, 7):
        group.size, covered = size, []
        for rank in range(size):
            group.rank = rank
            part = group.shard(10)
            covered += range(10)[part]
            assert 10 // size <= part.stop - part.start <= -(-10 // size)
        assert covered == list(range(10))


@pytest.mark.slow
def test_four_workers_equal_one(tmp_path):
    """Batches of 10 and 11 images also split unevenly."""
    script = Path(__file__).with_name("workers.py")
    command = torchrun(4, str(script), str(tmp_path / "digests.json"))
    subprocess.run(command, env=without_interpreter(), check=True, timeout=600, capture_output=True)
    assert json.loads((tmp_path / "digests.json").read_text()) == digests(Ops())


@pytest.mark.slow
def test_trainings_of_one_and_four_workers_write_the_same_files(gpu, tmp_path):
    flags = ["train", "--method", "wage", "--model", "tiny-cnn", "--steps", 20, "--batch", 70]
    for workers in (1, 4):
        code, _, errors = gpu(*flags, "--out", tmp_path / str(workers), workers=workers)
        assert code == 0, errors
    for name in ("digests.jsonl", "summary.json"):
        one, four = ((tmp_path / str(w) / name).read_text() for w in (1, 4))
        if name == "summary.json":
            one, four = ({**json.loads(text), "samples_per_second": 0} for text in (one, four))
        assert one == four


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the workers through /proc")
def test_a_killed_worker_leaves_one_error_and_a_resumable_run(gpu, tmp_path):
    out = tmp_path / "run"
    flags = ["--method", "niti", "--model", "tiny-cnn", "--seed", "4"]
    command = torchrun(2, "-m", "gpu", "train", *flags, "--epochs", "400", "--out", str(out))
    process = subprocess.Popen(command, env=without_interpreter(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (out / "checkpoint.npz").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    ranks = {}
    for pid in children(process.pid):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks[[e for e in environment if e.startswith(b"RANK=")][0]] = pid
    os.kill(ranks[b"RANK=1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if f"continue with --resume {out}" in line]
    # Worker 0 finds the other gone, or torchrun's SIGTERM comes first.
    assert len(lines) == 1 and ("error: a worker" in lines[0] or "stopped after step" in lines[0]), errors
    steps = len((out / "digests.jsonl").read_text().splitlines()) + 3
    code, _, errors = gpu("train", "--resume", out, "--steps", steps)
    assert code == 0, errors
    assert gpu("train", *flags, "--steps", steps, "--out", tmp_path / "whole")[0] == 0
    assert (out / "digests.jsonl").read_text() == (tmp_path / "whole" / "digests.jsonl").read_text()
