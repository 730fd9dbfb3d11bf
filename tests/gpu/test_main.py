"""`python -m gpu`: files, checkpoints shared with golden, and one line for what cannot be done."""

import json
import subprocess
import sys

import pytest
import torch

from golden.__main__ import main as golden_main
from golden.errors import InputError
from gpu import devices
from gpu.__main__ import main
from tests.gpu.conftest import without_interpreter


@pytest.fixture(autouse=True)
def cpu_operations(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")


def test_files_and_checkpoints_are_goldens(tmp_path, capsys):
    flags = ["--method", "dfp", "--model", "mlp", "--steps"]
    assert golden_main(["train", *flags, "12", "--out", str(tmp_path / "golden")]) == 0
    assert main(["train", *flags, "5", "--device", "cpu", "--out", str(tmp_path / "gpu")]) == 0
    assert golden_main(["train", "--resume", str(tmp_path / "gpu"), "--steps", "9"]) == 0
    assert main(["train", "--resume", str(tmp_path / "gpu"), "--steps", "12"]) == 0
    digests = [(tmp_path / name / "digests.jsonl").read_text() for name in ("golden", "gpu")]
    assert digests[0] == digests[1]
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("golden", "gpu")]
    assert all(summary.pop("samples_per_second") > 0 for summary in summaries) and summaries[0] == summaries[1]
    history = [(tmp_path / name / "history.jsonl").read_text().splitlines()[-1] for name in ("golden", "gpu")]
    assert json.loads(history[0])["bits"] == json.loads(history[1])["bits"]


def refused(capsys, *arguments) -> str:
    assert main(["train", *map(str, arguments)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_one_line_for_bad_input(tmp_path, capsys, monkeypatch):
    assert "--device must be" in refused(capsys, "--device", "tpu")
    assert "unknown method 'float'" in refused(capsys, "--method", "float")
    missing = refused(capsys, "--data", "mnist", "--data-dir", tmp_path, "--device", "cpu")
    assert f"no data folder {tmp_path / 'mnist'}" in missing
    assert "nothing to resume" in refused(capsys, "--resume", tmp_path)
    assert "power of two" in refused(capsys, "--method", "dfp", "--batch", 3)


def test_one_line_without_a_usable_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "use --device cpu" in refused(capsys, "--device", "cuda")
    assert devices.choose("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Old GPU")
    assert "Old GPU has compute capability 7.0, the int8 kernels need 8.0" in refused(capsys, "--device", "cuda")
    assert devices.choose("auto") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="start 1 workers"):
        devices.choose("cuda")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_in_a_step_loses_nothing(error, tmp_path, capsys, monkeypatch):
    from gpu.niti import Rules

    update, calls = Rules.update, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 2 * 7 + 2:  # the second tensor of step 7: the first is already updated
            raise error
        return update(self, *arguments)

    monkeypatch.setattr(Rules, "update", failing)
    line = refused(capsys, "--device", "cpu", "--steps", 10, "--out", tmp_path / "a")
    assert "out of memory" in line and "in step 7" in line and "--resume" in line
    monkeypatch.setattr(Rules, "update", update)
    assert main(["train", "--resume", str(tmp_path / "a"), "--steps", "10"]) == 0
    assert main(["train", "--device", "cpu", "--steps", "10", "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "digests.jsonl").read_text() == (tmp_path / "b" / "digests.jsonl").read_text()


@pytest.mark.parametrize("when", ["before a step", "after a step", "in an evaluation"])
def test_a_worker_lost_between_steps_loses_nothing(when, tmp_path, capsys, monkeypatch):
    from gpu.execution import OnDevice
    from gpu.parallel import WorkerLost

    step, forward, steps = OnDevice.step, OnDevice.forward, []

    def failing_step(self, *arguments):
        steps.append(1)
        if len(steps) == 46 and when == "before a step":
            raise WorkerLost("lost")
        return step(self, *arguments)

    def failing_collect(self, record, collect=OnDevice._collect):
        if len(steps) == 46 and when == "after a step":
            raise WorkerLost("lost")
        return collect(self, record)

    def failing_forward(self, images):
        if when == "in an evaluation":
            raise WorkerLost("lost")
        return forward(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(OnDevice, "step", failing_step)
        patch.setattr(OnDevice, "_collect", failing_collect)
        patch.setattr(OnDevice, "forward", failing_forward, raising=False)
        assert main(["train", "--device", "cpu", "--steps", "50", "--out", str(tmp_path / "a")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and "worker" in line and "--resume" in line
    assert main(["train", "--resume", str(tmp_path / "a"), "--steps", "50"]) == 0
    assert main(["train", "--device", "cpu", "--steps", "50", "--out", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a" / "digests.jsonl").read_text() == (tmp_path / "b" / "digests.jsonl").read_text()


def test_other_errors_are_not_hidden(tmp_path, monkeypatch):
    from gpu.niti import Rules

    def failing(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Rules, "update", failing)
    with pytest.raises(RuntimeError, match="a defect"):
        main(["train", "--device", "cpu", "--steps", "1", "--out", str(tmp_path)])


def test_missing_torch_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch', name='torch')")
    environment = without_interpreter()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    result = subprocess.run(
        [sys.executable, "-m", "gpu", "train"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 1 and result.stderr.strip() == "error: python -m gpu needs torch: pip install torch"


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    "method,model", [("niti", "mlp"), ("niti-2020", "lenet"), ("wage", "tiny-cnn"), ("dfp", "tiny-resnet")]
)
def test_a_gpu_gives_the_digests_of_golden(gpu, method, model, tmp_path):
    flags = ["train", "--method", method, "--model", model, "--data", "synthetic", "--steps", "20", "--batch", "16"]
    if model == "mlp":
        flags[6] = "digits"
    code, _, errors = gpu(*flags, "--device", "cuda", "--out", tmp_path / "gpu")
    assert code == 0, errors
    assert golden_main([*flags, "--out", str(tmp_path / "golden")]) == 0
    assert (tmp_path / "gpu" / "digests.jsonl").read_text() == (tmp_path / "golden" / "digests.jsonl").read_text()
