"""One self-contained HTML page about a training run: `python -m sim.report DIR` writes DIR/report.html.

It reads from the folder, all but the first optional:

`summary.json`
    method, model, data, batch, steps, seed; core, bit_exact, tensors_compared, not_compared (names), mismatch (text),
    test_accuracy, golden_accuracy, float_accuracy (0 to 1), cycles, macs, mac_utilization (0 to 1),
    cycles_per_second, seconds, build_seconds; `configuration`, `versions` (name: value; `rows` and `columns`
    of the configuration give the peak); `commands` (list of lines that reproduce the run).
`steps.jsonl`
    a line a step: step, loss, golden, float (mean loss of the batch) and bits ({tensor: bits used}).
`cycles.json`
    a list of {layer, pass, cycles, macs, busy, stalled_in, stalled_out, idle, bytes_read, bytes_written}: totals over
    the run, in network order; the four states are cycles of the engine that does the pass and add up to `cycles`.
    `engine` (text) is optional: engines that work side by side get a sum each.
"""

import argparse
import html
import io
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

STATES = ("busy", "stalled_in", "stalled_out", "idle")
NAMES = {"busy": "busy", "stalled_in": "waits for data", "stalled_out": "waits for room", "idle": "idle"}
# Light to dark with a hatch each, so that the bars can be told apart without colour.
FILLS = {
    "busy": ("#1f5f8b", ""),
    "stalled_in": ("#e8a33d", "///"),
    "stalled_out": ("#c8553d", "xxx"),
    "idle": ("#dfe3e6", ""),
}
LINES = {
    "loss": ("hardware (RTL)", {"color": "#1f5f8b", "linewidth": 3.5, "alpha": 0.55}),
    "golden": ("golden model", {"color": "#111111", "linewidth": 1.1, "linestyle": (0, (5, 3))}),
    "float": ("float32", {"color": "#c8553d", "linewidth": 1.6, "linestyle": (0, (1, 1.2))}),
}
SHAPES = (("#1f5f8b", "o"), ("#9a4a00", "s"), ("#2c6e3f", "^"), ("#5b3c88", "D"))
MAX_BARS = 40


class ReportError(Exception):
    """One line that says which file of the run is missing or wrong."""


def _load(folder, name, parse, empty=None):
    path = Path(folder) / name
    if not path.exists():
        if empty is None:
            raise ReportError(f"{path} is missing: is {folder} the folder of a finished run?")
        return empty
    try:
        return parse(path.read_text())
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from None


def _lines(text):
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _smooth(values, window):
    """Running mean over the last `window` values, so that a loss per batch can be read."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    first = np.maximum(np.arange(len(values)) + 1 - window, 0)
    return (sums[1:] - sums[first]) / (np.arange(len(values)) + 1 - first)


def plot_loss(steps):
    """Loss of hardware, golden model and float32 over the steps."""
    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    window = max(1, len(steps) // 60)
    for key, (label, style) in LINES.items():
        points = [(line["step"] + 1, line[key]) for line in steps if line.get(key) is not None]
        if points:
            where, losses = zip(*points, strict=True)
            axes.plot(where, _smooth(np.array(losses, float), window), label=label, **style)
    mean = f"\nmean of {window} steps" if window > 1 else ""
    axes.set(xlabel="training step", ylabel=f"loss of the batch (nats){mean}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def plot_cycles(passes, steps):
    """Stacked bar per layer and pass: thousands of cycles of one step by what the unit did."""
    shown = passes[:MAX_BARS]
    figure = Figure(figsize=(8.6, 1.1 + 0.3 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(shown))
    left = np.zeros(len(shown))
    for state in STATES:
        width = np.array([entry.get(state, 0) / steps / 1e3 for entry in shown])
        colour, hatch = FILLS[state]
        axes.barh(
            rows, width, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5, label=NAMES[state]
        )
        left += width
    axes.set_yticks(rows, [f"{entry['layer']} {entry['pass']}" for entry in shown], fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlim(0, left.max() * 1.02 if left.max() else 1)
    axes.set_xlabel("thousand cycles per training step")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


def plot_roofline(passes, peak, bandwidth):
    """MACs per cycle over MACs per byte of traffic, under the roof of `peak` and `bandwidth` bytes per cycle. Every
    pass has a number; its kind also has a shape."""
    points = []
    for entry in passes:
        moved = entry.get("bytes_read", 0) + entry.get("bytes_written", 0)
        if moved and entry["macs"] and entry["cycles"]:
            points.append((entry["macs"] / moved, entry["macs"] / entry["cycles"], entry["layer"], entry["pass"]))
    if not points:
        return None
    rows = -(-len(points) // max(1, len(points) // 14))
    figure = Figure(figsize=(8.6, max(3.8, 1.2 + 0.19 * rows)), layout="constrained")
    axes = figure.add_subplot()
    intensity, speed = (np.array([point[k] for point in points]) for k in (0, 1))
    ridge = peak / bandwidth
    span = np.geomspace(min(intensity.min(), ridge) / 3, max(intensity.max(), ridge) * 3, 200)
    axes.plot(span, np.minimum(peak, span * bandwidth), color="#111111", linewidth=1.4)
    shapes = dict(zip(dict.fromkeys(point[3] for point in points), SHAPES * len(points), strict=False))
    entries = []
    for number, (x, y, layer, kind) in enumerate(points, 1):
        colour, shape = shapes[kind]
        entries += axes.plot([x], [y], shape, markersize=8, color=colour, markeredgecolor="white", linestyle="none",
                             label=f"{number}  {layer} {kind}")
    for (x, y), numbers in _clusters(points, span[-1] / span[0]).items():
        axes.annotate(", ".join(map(str, numbers)), (x, y), (0, -7), textcoords="offset points", ha="center", va="top",
                      fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="MACs per byte moved", ylabel="MACs per cycle",
             ylim=(min(speed.min(), span[0] * bandwidth) / 1.5, peak * 1.8))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.text(span[-1], peak * 1.12, f"array: {peak} MACs per cycle ", ha="right", va="bottom", fontsize=8)
    axes.set_title(f"slope: memory, {bandwidth} bytes per cycle (half read, half written)", fontsize=9, loc="left")
    axes.grid(alpha=0.3, which="both")
    figure.legend(handles=entries, loc="outside right upper", frameon=False, fontsize=8, markerscale=0.9,
                  ncols=max(1, len(points) // 14), title="pass")
    return figure


def _clusters(points, span):
    """Numbers of the points by the place of their label: points too close for two labels share one."""
    near = 0.05 * np.log(span)
    places = {}
    for number, (x, y, *_) in enumerate(points, 1):
        for place in places:
            if abs(np.log(x / place[0])) < near and abs(np.log(y / place[1])) < near:
                places[place].append(number)
                break
        else:
            places[x, y] = [number]
    return places


def plot_bits(steps):
    """Bits used by every tensor over the steps, darker is wider; the range stands beside each row."""
    lines = [line for line in steps if line.get("bits")]
    if not lines:
        return None
    names = list(lines[-1]["bits"])
    every = [[line["bits"][name] for line in lines if name in line["bits"]] for name in names]
    ranges = [f"{min(bits)}" if min(bits) == max(bits) else f"{min(bits)} to {max(bits)}" for bits in every]
    lines = lines[:: max(1, len(lines) // 200)]
    widths = np.array([[line["bits"].get(name, np.nan) for line in lines] for name in names], float)
    figure = Figure(figsize=(8.6, 1.2 + 0.22 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    places = np.append([line["step"] for line in lines], lines[-1]["step"] + 1) + 0.5
    picture = axes.pcolormesh(places, np.arange(len(names) + 1) - 0.5, widths, cmap="cividis_r")
    axes.invert_yaxis()
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel="training step", ylabel="tensor")
    beside = axes.twinx()
    beside.set_ylim(axes.get_ylim())
    beside.set_yticks(range(len(names)), ranges, fontsize=7)
    beside.tick_params(length=0)
    beside.set_ylabel("smallest to largest (bits)", fontsize=8)
    figure.colorbar(picture, ax=[axes, beside], label="bits used", ticks=MaxNLocator(integer=True), pad=0.02)
    return figure


def _svg(figure, name):
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{html.escape(name)}" ', 1)


def _number(value):
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _percent(value):
    return f"{100 * value:.1f} %"


def _table(rows, head=None, numeric=0):
    """HTML table; `numeric`: its third and later columns are numbers, and so many rows at its end are sums."""
    rows = list(rows)
    cells = []
    if head:
        cells.append("<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in head) + "</tr>")
    for index, row in enumerate(rows):
        cells.append(
            ("<tr class=sum>" if index >= len(rows) - numeric else "<tr>")
            + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row)
            + "</tr>"
        )
    return f'<div class="scroll"><table{" class=numeric" if numeric else ""}>{"".join(cells)}</table></div>'


def _cycle_table(passes, steps, peak, cycles):
    """Rows per layer and pass, then one per engine; engines work side by side, so their sums may pass `cycles`."""
    head = ["layer", "pass", "cycles per step", "of the step", "MACs per step", "share of peak", "busy"]
    head += ["read B", "written B"] if any("bytes_read" in entry for entry in passes) else []
    engines = dict.fromkeys(entry.get("engine", "") for entry in passes)
    sums = [_sum(name, [entry for entry in passes if entry.get("engine", "") == name]) for name in engines]
    cycles = cycles or sum(entry["cycles"] for entry in passes)
    rows = []
    for entry in [*passes, *sums]:
        own = entry["cycles"]
        share = _percent(entry["macs"] / own / peak) if peak and entry["macs"] and own else "-"
        row = [entry["layer"], entry["pass"], _number(round(own / steps)), _percent(own / cycles) if cycles else "-"]
        row += [_number(round(entry["macs"] / steps)), share, _percent(entry.get("busy", 0) / own) if own else "-"]
        row += [_number(round(entry.get(key, 0) / steps)) for key in ("bytes_read", "bytes_written")]
        rows.append(row[: len(head)])
    return _table(rows, head, numeric=len(sums))


def _sum(engine, passes):
    keys = ("cycles", "macs", *STATES, "bytes_read", "bytes_written")
    total = {key: sum(entry.get(key, 0) for entry in passes) for key in keys}
    return {"layer": "all", "pass": engine, **total}


def _verdict(summary):
    if summary.get("bit_exact") is True:
        count = summary.get("tensors_compared")
        what = f"{_number(count)} tensors of {_number(summary['steps'])} steps" if count else "every compared tensor"
        return f'<p class="good">&#10003; Hardware and golden model are bit-identical: {what}.</p>'
    if summary.get("bit_exact") is False:
        text = summary.get("mismatch", "hardware and golden model differ")
        return f'<p class="bad">&#10007; {html.escape(str(text))}</p>'
    return '<p class="open">The tensors of this run were not compared.</p>'


def _tiles(summary):
    tiles = []
    for key, label, form in (
        ("test_accuracy", "test accuracy, measured on the hardware", _percent),
        ("golden_accuracy", "of the golden model", _percent),
        ("float_accuracy", "of float32", _percent),
        ("mac_utilization", "of peak over whole steps", _percent),
    ):
        if summary.get(key) is not None:
            tiles.append((form(summary[key]), label))
    if summary.get("cycles") and summary.get("steps"):
        tiles.append((_number(round(summary["cycles"] / summary["steps"])), "cycles per training step"))
    if summary.get("cycles_per_second"):
        tiles.append((_number(round(summary["cycles_per_second"])), "simulated cycles per second"))
    if summary.get("seconds"):
        tiles.append((f"{summary['seconds']:.0f} s", "wall time"))
    return '<div class="tiles">' + "".join(f"<div><b>{value}</b>{label}</div>" for value, label in tiles) + "</div>"


STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2126;background:#f4f5f6;margin:0}
main{max-width:960px;margin:0 auto;padding:24px 20px 60px}
section{background:#fff;border:1px solid #dfe3e6;border-radius:8px;padding:16px 20px;margin:16px 0}
h1{font-size:26px;margin:8px 0 0}h2{font-size:18px;margin:0 0 8px}p{margin:6px 0}
.good,.bad,.open{padding:10px 14px;border-radius:6px;font-weight:600}
.good{background:#e2f1e6;border-left:6px solid #2c7a44}.bad{background:#fbe5e1;border-left:6px solid #b23a25}
.open{background:#eee;border-left:6px solid #888}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin-top:12px}
.tiles div{background:#fff;border:1px solid #dfe3e6;border-radius:8px;padding:10px 14px;
flex:1 1 130px;font-size:13px;color:#55606a}
.tiles b{display:block;font-size:21px;color:#1c2126}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13px;width:100%}
th,td{padding:4px 10px;border-bottom:1px solid #e8ebed;text-align:left;vertical-align:top}
.numeric td:nth-child(n+3),.numeric th:nth-child(n+3){text-align:right;white-space:nowrap}
.sum td{font-weight:600;background:#f4f5f6}
pre{background:#1c2126;color:#f4f5f6;padding:12px 14px;border-radius:6px;overflow-x:auto;font-size:13px}
svg{width:100%;height:auto}.note{color:#55606a;font-size:13px}
"""


def _sections(folder, summary, steps, passes):
    """Yield (title, note, body) of every section that has data."""
    count = max(1, summary.get("steps") or len(steps))
    if any("loss" in line for line in steps):
        note = "Equal bits give equal losses: the dashed line lies on the wide one." if summary.get("bit_exact") else ""
        yield "Loss", note, _svg(plot_loss(steps), "loss over training steps")
    configuration = summary.get("configuration") or {}
    peak = configuration.get("rows", 0) * configuration.get("columns", 0)
    if passes:
        note = "Cycles of the unit that does the pass, per training step; hatched parts are waiting."
        if len(passes) > MAX_BARS:
            note += f" The first {MAX_BARS} of {len(passes)} passes are drawn; the table has all."
        yield "Where the cycles went", note, _svg(plot_cycles(passes, count), "cycles per layer and pass")
        note = "Share of peak: useful MACs / (rows x columns x cycles)."
        yield "Layers and passes", note, _cycle_table(passes, count, peak, summary.get("cycles"))
        bandwidth = configuration.get("beat_bytes", 0)
        figure = plot_roofline(passes, peak, 2 * bandwidth) if peak and bandwidth else None
        if figure:
            note = "Below the slope a pass waits for memory, below the flat part for the array."
            yield "Roofline", note, _svg(figure, "roofline per pass")
    figure = plot_bits(steps)
    if figure:
        yield "Bit widths", "Bits that the values of each tensor really use.", _svg(figure, "bits used per tensor")
    if (Path(folder) / "trace.json").exists():
        body = "<p>Open <code>trace.json</code> of this folder in ui.perfetto.dev to see the units over time.</p>"
        yield "Trace", "", body
    if summary.get("not_compared"):
        yield (
            "Not compared",
            "Tensors that this execution never materialises.",
            "<p>" + html.escape(", ".join(summary["not_compared"])) + "</p>",
        )
    if configuration:
        yield "Configuration", "", _table((name, _number(value)) for name, value in configuration.items())
    if summary.get("versions"):
        yield "Versions", "", _table(summary["versions"].items())
    if summary.get("commands"):
        yield "Reproduce", "", "<pre>" + html.escape("\n".join(summary["commands"])) + "</pre>"


def write_report(folder):
    """Write report.html into the folder of a run and return its path."""
    folder = Path(folder)
    summary = _load(folder, "summary.json", json.loads)
    steps = _load(folder, "steps.jsonl", _lines, [])
    passes = _load(folder, "cycles.json", json.loads, [])
    title = f"{summary.get('method', '?')} {summary.get('model', '?')} on {summary.get('data', '?')}"
    facts = [f"core {summary['core']}"] if summary.get("core") else []
    facts += [f"{name} {_number(summary[name])}" for name in ("batch", "steps", "seed") if name in summary]
    body = [
        f"<h1>{html.escape(title)}</h1><p class=note>{html.escape(', '.join(facts))}</p>",
        _verdict(summary),
        _tiles(summary),
    ]
    for name, note, content in _sections(folder, summary, steps, passes):
        note = f"<p class=note>{html.escape(note)}</p>" if note else ""
        body.append(f"<section><h2>{html.escape(name)}</h2>{note}{content}</section>")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )
    path = folder / "report.html"
    path.write_text(page)
    return path


def write_pictures(folder, target):
    """Write the loss and cycle plots of a run as PNG files into `target` (for the README); returns their paths."""
    summary = _load(folder, "summary.json", json.loads)
    steps = _load(folder, "steps.jsonl", _lines, [])
    passes = _load(folder, "cycles.json", json.loads, [])
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    figures = {"loss.png": plot_loss(steps) if steps else None}
    figures["cycles.png"] = plot_cycles(passes, max(1, summary.get("steps", 1))) if passes else None
    paths = []
    for name, figure in figures.items():
        if figure:
            figure.savefig(target / name, dpi=130)
            paths.append(target / name)
    return paths


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m sim.report", description="Write report.html of a training run.")
    parser.add_argument("folder", type=Path, help="folder of the run (has summary.json)")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="also write the plots as PNG files into DIR")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.folder))
        if options.pictures:
            for path in write_pictures(options.folder, options.pictures):
                print(path)
    except (ReportError, OSError) as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
