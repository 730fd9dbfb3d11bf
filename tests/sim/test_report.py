"""The report, from synthetic runs."""

import json
import re
from html.parser import HTMLParser

import numpy as np

from sim import report

LAYERS = ("fc1", "fc2")
PASSES = ("forward", "error", "gradient", "update")


def write_run(folder, **changes):
    """A run of 120 steps of a two-layer network; `changes` override entries of the summary."""
    rng = np.random.default_rng(3)
    steps = []
    for step in range(120):
        loss = 2.3 * np.exp(-step / 40) + 0.1 + 0.05 * rng.random()
        bits = {
            f"{layer} {kind}": int(rng.integers(5, 8)) for layer in LAYERS for kind in ("input", "error", "gradient")
        }
        steps.append({"step": step, "loss": loss, "golden": loss, "float": loss * 0.95, "bits": bits})
    cycles = []
    for index, layer in enumerate(LAYERS):
        for number, name in enumerate(PASSES):
            total = 120 * (3000 - 900 * index + 250 * number)
            macs = 0 if name == "update" else total * 40
            states = [int(total * share) for share in (0.7, 0.15, 0.05)]
            cycles.append(
                {
                    "layer": layer,
                    "pass": name,
                    "cycles": total,
                    "macs": macs,
                    **dict(zip(report.STATES, [*states, total - sum(states)], strict=True)),
                    "bytes_read": total * 5,
                    "bytes_written": total * (2 + number),
                }
            )
    total = sum(entry["cycles"] for entry in cycles)
    summary = {
        "method": "niti",
        "model": "mlp",
        "data": "digits",
        "core": "small",
        "batch": 32,
        "steps": 120,
        "seed": 1,
        "bit_exact": True,
        "tensors_compared": 2400,
        "test_accuracy": 0.9636,
        "golden_accuracy": 0.9636,
        "float_accuracy": 0.9692,
        "cycles": total,
        "mac_utilization": 0.523,
        "cycles_per_second": 812345.6,
        "seconds": 41.2,
        "configuration": {"rows": 8, "columns": 8, "beat_bytes": 16},
        "versions": {"intrain": "0.1.0", "verilator": "5.048"},
        "commands": ["make cosim CORE=small", "python -m sim train --method niti <&>"],
        "not_compared": ["fc1.mask"],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    (folder / "cycles.json").write_text(json.dumps(cycles))
    return summary, steps, cycles


class Checker(HTMLParser):
    """Collects text and external references, and that tags are closed."""

    void = {"meta", "br"}

    def __init__(self):
        super().__init__()
        self.stack, self.external, self.text, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.void:
            self.stack.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith(("#", "data:")):
                self.external.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    checker = Checker()
    checker.feed(path.read_text())
    assert not checker.stack
    return checker, " ".join(checker.text)


def test_report_is_self_contained_and_complete(tmp_path):
    _, _, cycles = write_run(tmp_path)
    checker, text = parse(report.write_report(tmp_path))
    assert checker.external == []
    assert not re.search(r"url\((?!#)|@import|<script", (tmp_path / "report.html").read_text())
    assert checker.tags.count("svg") == 4
    for expected in ("bit-identical: 2,400 tensors of 120 steps", "96.4 %", "96.9 %", "812,346", "52.3 %", "fc1.mask"):
        assert expected in text
    assert "python -m sim train --method niti <&>" in text
    # 3000 cycles and 40 MACs a cycle on 64 elements.
    assert "3,000" in text and "62.5 %" in text
    total = sum(entry["cycles"] for entry in cycles)
    assert f"{total // 120:,}" in text


def test_a_mismatch_is_shown_first(tmp_path):
    message = "step 3, fc1, weights, index 7: expected 5, got <6>, cycle 9000, seed 1"
    write_run(tmp_path, bit_exact=False, mismatch=message)
    _, text = parse(report.write_report(tmp_path))
    assert message in text and "bit-identical" not in text


def test_missing_parts_are_left_out(tmp_path):
    write_run(tmp_path)
    (tmp_path / "cycles.json").unlink()
    (tmp_path / "steps.jsonl").write_text("")
    (tmp_path / "summary.json").write_text('{"method": "wage", "model": "m", "data": "d", "steps": 4}')
    checker, text = parse(report.write_report(tmp_path))
    assert "svg" not in checker.tags and "not compared" in text


def test_numbers_in_the_plots_are_those_of_the_run(tmp_path):
    _, steps, cycles = write_run(tmp_path)
    axes = report.plot_loss(steps[:50]).axes[0]
    assert [line.get_label() for line in axes.lines] == ["hardware (RTL)", "golden model", "float32"]
    assert np.allclose(axes.lines[0].get_ydata(), [line["loss"] for line in steps[:50]])
    assert axes.get_xlabel() and axes.get_ylabel()
    bars = report.plot_cycles(cycles, 120).axes[0].patches
    assert np.isclose(sum(bar.get_width() for bar in bars), sum(entry["cycles"] for entry in cycles) / 120 / 1e3)
    roof = report.plot_roofline(cycles, 64, 32).axes[0]
    drawn = {round(float(y), 6) for line in roof.lines[1:] for y in line.get_ydata()}
    assert drawn == {40.0}


def test_the_plots_can_be_read_without_colour(tmp_path):
    """Every roofline point has a number that the legend explains, every kind of pass a shape, every row its range."""
    _, steps, cycles = write_run(tmp_path)
    figure = report.plot_roofline(cycles, 64, 32)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    passes = [(entry["layer"], entry["pass"]) for entry in cycles if entry["macs"]]
    assert legend == [f"{number}  {layer} {kind}" for number, (layer, kind) in enumerate(passes, 1)]
    labels = [text.get_text() for text in figure.axes[0].texts if re.fullmatch(r"[\d, ]+", text.get_text())]
    assert sorted(int(number) for label in labels for number in label.split(",")) == list(range(1, len(passes) + 1))
    shapes = {line.get_label().split()[-1]: line.get_marker() for line in figure.axes[0].lines[1:]}
    assert len(set(shapes.values())) == len(shapes) == 3
    figure = report.plot_bits(steps)
    rows = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert rows == ["5 to 7"] * 6
    for axes in (*report.plot_loss(steps).axes, *report.plot_cycles(cycles, 120).axes):
        assert axes.get_xlabel()
    assert len({hatch for _, hatch in report.FILLS.values()}) == 3       # busy and idle are dark and light


def test_no_text_overlaps_in_the_plots(tmp_path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _, steps, cycles = write_run(tmp_path)
    many = [{**entry, "layer": f"layer{i}"} for i in range(5) for entry in cycles]
    for figure in (
        report.plot_loss(steps),
        report.plot_cycles(cycles, 120),
        report.plot_cycles(many, 120),
        report.plot_roofline(cycles, 64, 32),
        report.plot_bits(steps),
    ):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        for axes in figure.axes:
            labels = [label for axis in (axes.xaxis, axes.yaxis) for label in [*axis.get_ticklabels(), axis.label]]
            boxes = [label.get_window_extent(renderer) for label in labels if label.get_text() and label.get_visible()]
            overlaps = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
            assert not overlaps


def test_command_line(tmp_path, capsys):
    write_run(tmp_path / "run")
    assert report.main([str(tmp_path / "run"), "--pictures", str(tmp_path / "pictures")]) == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["cycles.png", "loss.png"]
    assert report.main([str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "summary.json is missing" in error
    (tmp_path / "run" / "cycles.json").write_text("[{")
    assert report.main([str(tmp_path / "run")]) == 1
    assert "cycles.json cannot be read" in capsys.readouterr().err
