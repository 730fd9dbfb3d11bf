"""A step again, with waves; what is said at the first mismatch."""

import re

import numpy as np
import pytest

import golden.train
from golden import data as data_module
from golden.niti import Niti
from hw.config import PRESETS
from sim import doorbells, replay, waves
from sim.__main__ import main
from sim.shared import SimulationError


def lz4(data: bytes) -> bytes:
    """The uncompressed bytes of an LZ4 block."""
    out, at = bytearray(), 0

    def length(low):
        nonlocal at
        while low >= 15:
            low += data[at]
            at += 1
            if data[at - 1] != 255:
                break
        return low

    while at < len(data):
        token = data[at]
        at += 1
        literals = length(token >> 4)
        out += data[at:at + literals]
        at += literals
        if at >= len(data):
            break
        offset = data[at] | data[at + 1] << 8
        at += 2
        for _ in range(length(token & 15) + 4):
            out.append(out[-offset])
    return bytes(out)


def fst_names(path) -> set[str]:
    """Signals of an FST file as GTKWave names them."""
    data, at, names = path.read_bytes(), 0, set()
    while at < len(data):
        kind, size = data[at], int.from_bytes(data[at + 1:at + 9], "big")
        if kind == 6:
            tree = lz4(data[at + 17:at + 1 + size])
            place, scope = 0, []

            def text(place, tree=tree):
                end = tree.index(0, place)
                return tree[place:end].decode(), end + 1

            def number(place, tree=tree):
                while tree[place] & 128:
                    place += 1
                return place + 1

            while place < len(tree):
                tag = tree[place]
                if tag == 254:
                    name, place = text(place + 2)
                    _, place = text(place)
                    scope.append(name)
                elif tag == 255:
                    scope.pop()
                    place += 1
                elif tag in (252, 253):
                    _, place = text(place + 3)
                    place = number(place)
                else:
                    name, place = text(place + 2)
                    place = number(number(place))
                    names.add(".".join([*scope, name.replace(" ", "")]))
        at += 1 + size
    return names


def fst_range(path) -> tuple[int, int]:
    """First and last time of an FST file."""
    head = path.read_bytes()
    return tuple(int.from_bytes(head[at:at + 8], "big") for at in (9, 17))


def view_names(path) -> list[str]:
    return [line for line in path.read_text().splitlines() if re.match(r"\w+\.\w", line)]


def check_waves(folder):
    """The view's signals are in the waveform, and the window is where the view starts."""
    chosen = view_names(folder / "view.gtkw")
    assert {"intrain.clk", "intrain.irq", "intrain.trace_vector_tag[15:0]", "intrain.m_axi_araddr[31:0]"} <= set(chosen)
    assert set(chosen) <= fst_names(folder / "waves.fst")
    start = int(re.search(r"\[timestart\] (\d+)", (folder / "view.gtkw").read_text())[1])
    first, last = fst_range(folder / "waves.fst")
    assert abs(first - start) <= 2 and last > first + 200


def test_the_span_of_a_pass_is_that_of_the_last_step():
    events = np.array([[10, 0, 5], [20, 1, 7], [30, 0, -1], [40, 1, -1], [110, 0, 5], [120, 1, 7], [130, 0, 6],
                       [140, 1, -1], [150, 0, -1]])
    played = replay.Played(None, None, 100, 160, events)
    assert played.span(5) == (110, 130) and played.span(6) == (130, 150) and played.span(7) == (120, 140)
    assert played.span(9) == played.span(None) == (100, 160)


def test_the_view_shows_every_port_in_the_window(tmp_path):
    verilog = doorbells.generated_verilog(PRESETS["tiny"])
    waves.write_view(tmp_path / "view.gtkw", verilog, "intrain", "title", 100, 1100, 200)
    text = (tmp_path / "view.gtkw").read_text()
    assert "[timestart] 199\n" in text and re.search(r"^\*-\d+\.0+ 399( -1){26}$", text, re.M)
    ports = waves.port_widths(verilog, "intrain")
    shown = {name.partition(".")[2].partition("[")[0] for name in view_names(tmp_path / "view.gtkw")}
    constant = {"m_axi_arburst", "m_axi_arsize", "m_axi_awburst", "m_axi_awsize", "m_axi_arcache", "m_axi_awcache",
                "m_axi_arprot", "m_axi_awprot", "m_axi_arlock", "m_axi_awlock", "m_axi_arqos", "m_axi_awqos"}
    assert set(ports) - shown <= constant


def test_bad_requests_are_one_line(tmp_path, capsys):
    assert main(["replay", str(tmp_path), "--step", "0"]) == 1
    assert capsys.readouterr().err == f"error: nothing to resume: there is no {tmp_path / 'checkpoint'}\n"


@pytest.mark.slow
def test_a_step_of_a_good_run(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "--core", "tiny", "--steps", "4", "--test-images", "0", "--out", str(out)]) == 0
    assert main(["replay", str(out), "--step", "2"]) == 0
    said = capsys.readouterr().out
    assert "replayed: every tensor of step 2 is golden's" in said
    assert f"gtkwave {out / 'replay-2' / 'view.gtkw'}" in said
    check_waves(out / "replay-2")
    assert main(["replay", str(out), "--step", "4"]) == 1
    assert "--step must be 0 to 3, the steps of this run, got 4" in capsys.readouterr().err
    (out / "digests.jsonl").write_text((out / "digests.jsonl").read_text().replace('"weights": "', '"weights": "0'))
    with pytest.raises(SimulationError, match="checkpoint .* is not of this run"):
        replay.replay(out, 2)


@pytest.mark.slow
def test_the_first_mismatch_names_its_descriptor_and_leaves_waves(tmp_path, capsys, monkeypatch):
    """Golden is made wrong in one weight of one step, so that the core must seem wrong there."""
    step = Niti._step

    def wrong(self, x, exponent, labels, trace):
        step(self, x, exponent, labels, trace)
        if self.step_index == 5:
            w, exponent = self.state["fc1.weight"]
            w = w.copy()
            w[2, 7] ^= 1
            self.state["fc1.weight"] = w, exponent
            trace.record["fc1.weight"] = w

    monkeypatch.setattr(Niti, "_step", wrong)
    for compare in ("full", "digests"):
        out = tmp_path / compare
        assert main(["train", "--core", "tiny", "--steps", "9", "--compare", compare, "--out", str(out)]) == 1
        said = capsys.readouterr().err
        assert "error: step 5, layer fc1, tensor weight, index [2, 7]: expected " in said
        assert re.search(r"made by\n +17 +0x\w+ +VECTOR +fc1 update .*\n +do +UPDATE over .*\n +source 0 +fc1.gradient",
                         said)
        assert re.search(r"replayed: step 5, layer fc1, tensor weight, index \[2, 7\]: ", said)
        assert f"gtkwave {out / 'replay-5' / 'view.gtkw'}" in said
        check_waves(out / "replay-5")


@pytest.mark.slow
def test_a_fault_in_the_hardware_is_found_and_replayed(tmp_path, capsys, monkeypatch):
    """The constant log2(e) of the loss units is wrong, so the error at the output is the first wrong tensor."""
    verilog = doorbells.generated_verilog(PRESETS["tiny"])
    assert verilog.count("16'hb8aa") == 3          # niti's, and dfp's twice
    broken = verilog.replace("16'hb8aa", "16'hb0aa")
    monkeypatch.setattr(doorbells, "generated_verilog", lambda config: broken)
    out = tmp_path / "run"
    assert main(["train", "--core", "tiny", "--steps", "9", "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert re.search(r"error: step \d, layer fc1, tensor error", said)
    assert re.search(r"made by\n.*VECTOR +fc1 loss", said)
    check_waves(next(out.glob("replay-*")))


def test_the_replayed_program_lies_where_the_runs_lay():
    """The addresses that a mismatch and the waves name are the run's: they depend on the run's number of steps."""
    network = golden.train.build("niti", "mlp", 1, data="digits", batch=32)
    dataset = data_module.load("digits")
    run, again = (doorbells.Programs(PRESETS["tiny"], network, dataset, 9) for _ in range(2))
    (whole,) = doorbells.training_doorbells(network, dataset, 9, run.capacity)
    network.step_index = 5
    (one,) = doorbells.training_doorbells(network, dataset, 6, again.capacity)
    assert one.first == 5 and len(one.batches) == 1
    assert again.of(one).tensors == run.of(whole).tensors
