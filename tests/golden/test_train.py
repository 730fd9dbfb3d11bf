"""Training runs, their files, resuming, and what the command line refuses."""

import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from golden import data, schedules
from golden.__main__ import main
from golden.errors import InputError
from golden.train import METHODS, Progress, build, evaluate, load_checkpoint, save_checkpoint, step
from golden.train import train as train_network

RUNS = [("niti", "mlp"), ("niti-2020", "tiny-cnn"), ("wage", "tiny-cnn"), ("dfp", "tiny-cnn-bn"), ("float", "mlp")]


def train(out, *flags):
    assert main(["train", "--out", str(out), *flags]) == 0
    return json.loads((out / "summary.json").read_text()), (out / "digests.jsonl").read_text()


@pytest.mark.parametrize("method,model", RUNS)
def test_resume_equals_uninterrupted(method, model, tmp_path):
    """Across the end of an epoch, with a checkpoint in the middle of the next."""
    digits = data.load("digits")

    def run(out, stops):
        network = build(method, model, 1, batch=64)
        for stop in stops:
            if stop != stops[0]:
                network, _ = load_checkpoint(out)
            summary = train_network(network, digits, stop, out, progress=Progress(io.StringIO()))
        return summary, (out / "digests.jsonl").read_text()

    summary, digests = run(tmp_path / "a", [26])
    resumed, same = run(tmp_path / "b", [24, 26])
    assert same == digests and [json.loads(line)["step"] for line in digests.splitlines()] == list(range(26))
    assert resumed["test_accuracy"] == summary["test_accuracy"] and resumed["final_loss"] == summary["final_loss"]


def test_seed_decides_and_command_line_resumes(tmp_path):
    _, digests = train(tmp_path / "a", "--steps", "6", "--augment")
    _, again = train(tmp_path / "b", "--steps", "4", "--augment")
    assert digests.startswith(again)
    assert main(["train", "--resume", str(tmp_path / "b"), "--steps", "6"]) == 0
    assert (tmp_path / "b" / "digests.jsonl").read_text() == digests
    for flags in (["--seed", "2"], []):
        _, other = train(tmp_path / "c", "--steps", "1", *flags)
        assert other.splitlines()[0] != digests.splitlines()[0]


def test_augmentation_of_the_first_epochs(tmp_path):
    _, always = train(tmp_path / "a", "--steps", "46", "--augment")
    train(tmp_path / "b", "--steps", "40", "--augment", "1")
    assert main(["train", "--resume", str(tmp_path / "b"), "--steps", "46"]) == 0
    of_one_epoch = (tmp_path / "b" / "digests.jsonl").read_text()
    assert of_one_epoch.splitlines()[:45] == always.splitlines()[:45]
    assert of_one_epoch.splitlines()[45] != always.splitlines()[45]


def test_summary_and_history(tmp_path):
    summary, _ = train(tmp_path, "--epochs", "2")
    expected = {"method": "niti", "model": "mlp", "data": "digits", "batch": 32, "steps": 90, "seed": 1}
    assert expected.items() <= summary.items()
    assert 0.85 < summary["test_accuracy"] <= 1 and 0 < summary["final_loss"] < 2
    history = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert len(history) == 90 and [line["step"] for line in history if "epoch" in line] == [44, 89]
    assert 6 <= history[-1]["bits"]["fc1.activation"] <= 8
    assert history[-1]["test_accuracy"] == summary["test_accuracy"]
    assert (tmp_path / "training.png").stat().st_size > 10_000


def test_digest_hashes_state_in_network_order():
    network = build("niti", "mlp", 1)
    content = b"".join(a.tobytes() + np.int32(e).tobytes() for a, e in network.state.values())
    assert network.digest() == hashlib.sha256(content).hexdigest()
    dfp = build("dfp", "tiny-cnn-bn", 1)
    expected = (
        "conv0.weight conv0.momentum bn0.gamma bn0.gamma_momentum bn0.beta bn0.beta_momentum bn0.mean bn0.variance"
    )
    assert " ".join(list(dfp.state)[:8]) == expected
    before = dfp.digest()
    dfp.state["bn0.mean"] = dfp.state["bn0.mean"][0], -15
    assert dfp.digest() != before


def test_evaluation_uses_the_training_batch_and_counts_only_real_images():
    digits = data.load("digits")
    network = build("niti", "mlp", 1, batch=100)
    result = evaluate(network, digits.test_images, digits.test_labels)
    assert len(result.predictions) == 357
    last = np.concatenate([digits.test_images[300:], np.zeros((43, 8, 8, 1), np.uint8)])
    assert (result.predictions[300:] == network.predict(last)[:57]).all()
    assert result.accuracy == np.mean(result.predictions == digits.test_labels)


def test_interrupt_leaves_a_resumable_run(tmp_path):
    command = [sys.executable, "-m", "golden", "train", "--model", "tiny-cnn", "--out", str(tmp_path / "a")]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--epochs", "200"], env=environment, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "a" / "checkpoint.npz").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continue with --resume" in errors and "Traceback" not in errors
    steps = load_checkpoint(tmp_path / "a")[0].step_index
    assert len((tmp_path / "a" / "digests.jsonl").read_text().splitlines()) == steps
    assert main(["train", "--resume", str(tmp_path / "a"), "--steps", str(steps + 5)]) == 0
    _, digests = train(tmp_path / "b", "--model", "tiny-cnn", "--steps", str(steps + 5))
    assert (tmp_path / "a" / "digests.jsonl").read_text() == digests


def test_lines_beyond_the_checkpoint_are_cut(tmp_path):
    train(tmp_path, "--steps", "10")
    for name in ("digests.jsonl", "history.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write('{"step": 10, "partial')
    assert main(["train", "--resume", str(tmp_path), "--steps", "12"]) == 0
    assert [json.loads(line)["step"] for line in (tmp_path / "digests.jsonl").read_text().splitlines()] == list(
        range(12)
    )


@pytest.mark.slow
@pytest.mark.parametrize("method,model", [run for run in RUNS if run[0] != "float"])
def test_thread_count_changes_nothing(method, model, tmp_path):
    digests = set()
    for threads in ("1", "2", "3"):
        out = tmp_path / threads
        command = ["train", "--method", method, "--model", model, "--steps", "6", "--batch", "256", "--out", str(out)]
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        subprocess.run([sys.executable, "-m", "golden", *command], env=environment, check=True, capture_output=True)
        digests.add((out / "digests.jsonl").read_text())
    assert len(digests) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "method,model,accuracy",
    [
        ("niti", "mlp", 0.95),
        ("niti-2020", "mlp", 0.95),
        ("dfp", "mlp", 0.95),
        ("wage", "mlp", 0.8),
        ("niti", "tiny-cnn", 0.96),
        ("dfp", "tiny-cnn-bn", 0.96),
    ],
)
def test_digits_are_learned_in_ten_epochs(method, model, accuracy, tmp_path):
    summary, _ = train(tmp_path, "--method", method, "--model", model)
    assert summary["test_accuracy"] >= accuracy


def test_schedules_depend_on_the_epoch_only():
    assert [schedules.learning_rate("niti", "vgg-small-7", e) for e in (0, 99, 100, 149, 150)] == [5, 5, 4, 4, 3]
    assert [schedules.learning_rate("wage", "wage-vgg7", e) for e in (199, 200, 250)] == [3, 0, -3]
    network = build("niti", "mlp", 1, batch=32)
    assert network.steps_per_epoch == 45
    network.step_index = 44
    before = network.learning_rate()
    network.step_index = 45 * 7
    assert (network.epoch, network.learning_rate()) != (0, before)
    with pytest.raises(InputError, match="unknown method 'adam'"):
        schedules.learning_rate("adam", "mlp", 0)


def test_rates_replace_the_schedule_and_are_resumed(tmp_path):
    assert schedules.parse("wage", "0:3, 20:-2") == [(0, 3), (20, -2)]
    assert schedules.parse("dfp", "0:205p-13,6:51p-15") == [(0, (205, -13)), (6, (51, -15))]
    network = build("niti", "mlp", 1, batch=32, rates="0:4,2:1")
    assert [network.learning_rate(epoch) for epoch in range(4)] == [4, 4, 1, 1]
    network.step_index = 2 * network.steps_per_epoch
    save_checkpoint(network, tmp_path)
    assert load_checkpoint(tmp_path)[0].learning_rate() == 1
    assert network.learning_rate(7) != build("niti", "mlp", 1).learning_rate(7)


@pytest.mark.parametrize("method, rates, message", [
    ("wage", "3", "'3' is not EPOCH:RATE as wage takes it, such as 0:3,5:1"),
    ("dfp", "0:3", "'0:3' is not EPOCH:RATE as dfp takes it, such as 0:205p-13"),
    ("wage", "1:3", "epochs must begin with 0 and increase"),
    ("wage", "0:3,5:2,5:1", "epochs must begin with 0 and increase"),
    ("niti", "0:-1", "-1 is outside 0..15"),
    ("float", "0:256p-3", "256 is outside 1..255"),
])
def test_bad_rates_are_refused(method, rates, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build(method, "mlp", 1, rates=rates)


def test_memory_of_lenet_at_batch_256():
    """One training step of each integer method stays far below 2 GiB."""
    script = (
        "import resource, numpy as np\n"
        "from golden.train import build, step\n"
        "x = np.random.default_rng(0).integers(0, 256, (256, 28, 28, 1), dtype=np.uint8)\n"
        "for method in ('niti', 'wage', 'dfp'):\n"
        "    step(build(method, 'lenet', 1, data='mnist', batch=256), x, np.arange(256) % 10)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert int(result.stdout) < 2 * 2**20


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--method", "adam"], "unknown method 'adam': choose from niti, niti-2020, wage, dfp, float"),
        (["--model", "vgg"], "unknown model 'vgg': choose from mlp"),
        (["--data", "imagenet"], "unknown data 'imagenet': choose from digits"),
        (["--batch", "2000"], "--batch must be 1..1440 (the training images), got 2000"),
        (["--batch", "0"], "--batch must be 1..1440"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--epochs", "-1"], "--epochs must be at least 1, got -1"),
        (["--augment", "0"], "--augment takes a number of epochs, at least 1, not 0"),
        (["--seed", "-1"], "--seed must be 0..4294967295, got -1"),
        (["--data", "mnist", "--data-dir", "nowhere"], "no data folder nowhere/mnist"),
        (["--method", "dfp", "--batch", "48"], "--batch must be a power of two for dfp, got 48: use 32 or 64"),
        (["--method", "niti", "--model", "tiny-resnet"], "method niti has no rule for BatchNorm (bn0 of tiny-resnet)"),
        (["--model", "lenet"], "lenet does not fit digits images"),
        (["--method", "dfp", "--weight-bits", "16"], "method dfp has no option 'weight_bits'"),
        (["--weight-bits", "12"], "weight_bits must be 8 or 16, got 12"),
        (["--resume", "nowhere"], "nothing to resume: nowhere has no checkpoint.npz"),
    ],
)
def test_bad_flags_get_one_line_and_a_failing_exit(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("INTRAIN_DATA", raising=False)
    out = [] if "--resume" in flags else ["--out", str(tmp_path / "out")]
    assert main(["train", *flags, *out]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and message in errors and errors.count("\n") == 1


def test_resume_refuses_other_settings_and_damage(tmp_path, capsys):
    train(tmp_path, "--steps", "3")
    assert main(["train", "--resume", str(tmp_path), "--seed", "2"]) == 1
    assert "--seed is fixed by the run" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path), "--steps", "3"]) == 1
    assert "already has 3 steps" in capsys.readouterr().err
    (tmp_path / "checkpoint.npz").write_bytes(b"PK\x03\x04 damaged")
    assert main(["train", "--resume", str(tmp_path), "--steps", "5"]) == 1
    assert "checkpoint.npz is damaged" in capsys.readouterr().err


def test_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", "--steps", "1", "--out", str(tmp_path / "file")]) == 1
    assert "cannot write to" in capsys.readouterr().err


def test_bad_batches_of_a_step():
    digits = data.load("digits")
    images, labels = digits.train_images[:8], digits.train_labels[:8]
    network = build("niti", "mlp", 1)
    for bad_images, bad_labels, message in (
        (images, labels + 9, "labels must be 0..9"),
        (images, labels[:7], "8 images but labels of shape"),
        (images, labels / 1.0, "labels must be integers"),
        (images.astype(np.int32), labels, "images must be uint8"),
        (images[:, :7], labels, "images must be uint8"),
        ((np.full((8, 8, 8, 1), -128, np.int8), -5), labels, "converted images must be int8 -127..127"),
    ):
        with pytest.raises(InputError, match=message):
            step(network, bad_images, bad_labels)
    assert network.step_index == 0
    step(network, images, labels)
    with pytest.raises(InputError, match="batches of 8, got 4 images"):
        step(network, images[:4], labels[:4])


def test_methods():
    assert list(METHODS) == ["niti", "niti-2020", "wage", "dfp", "float"]
