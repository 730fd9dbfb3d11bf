"""A saved view for GTKWave beside a waveform."""

import re
from pathlib import Path

BITS, HEX, DECIMAL, COMMENT = "@28", "@22", "@24", "@200"
GROUPS = (
    ("clock and interrupt", r"clk|rst|irq"),
    ("what the engines do (tag: layer and pass; activity: docs/simulation.md)", r"trace_\w+"),
    ("memory: read address", r"m_axi_ar(valid|ready|addr|len|id)"),
    ("memory: read data", r"m_axi_r(valid|ready|data|last|id|resp)"),
    ("memory: write address", r"m_axi_aw(valid|ready|addr|len|id)"),
    ("memory: write data", r"m_axi_w(valid|ready|data|strb|last)"),
    ("memory: write response", r"m_axi_b(valid|ready|resp|id)"),
    ("registers", r"s_axi_\w+"),
)

MARKERS = 27
"""Times of the zoom line: the primary marker and those named a to z."""


def port_widths(verilog, top):
    """{port: bits} of module `top`, in order."""
    module = re.search(rf"^module {re.escape(top)}\b.*?^endmodule", verilog, re.S | re.M)[0]
    found = re.findall(r"\b(?:input|output)\s+(?:wire\s+|reg\s+)?(?:\[(\d+):0\]\s*)?(\w+)\s*;", module)
    return {name: int(high or 0) + 1 for high, name in found}


def write_view(path, verilog, top, title, first, last, marker):
    """Write the view of `waves.fst` in the same folder: the ports of `top` in groups, from cycle `first` to `last`,
    with the marker at cycle `marker`. Cycle c rises at time 2c - 1."""
    ports = port_widths(verilog, top)
    zoom = -max(1, (2 * (last - first)).bit_length() - 9)      # about 512 pixels for all of it
    lines = [f"[*] {title}", '[dumpfile] "waves.fst"', f'[savefile] "{Path(path).name}"',
             f"[timestart] {2 * first - 1}",
             f"*{zoom}.000000 {2 * marker - 1} {' '.join(['-1'] * (MARKERS - 1))}", f"[treeopen] {top}."]
    for name, pattern in GROUPS:
        chosen = [port for port in ports if re.fullmatch(pattern, port)]
        lines += [COMMENT, f"-{name}"] if chosen else []
        for port in chosen:
            form = BITS if ports[port] == 1 else DECIMAL if port.startswith("trace") else HEX
            bits = f"[{ports[port] - 1}:0]" if ports[port] > 1 else ""
            lines += [form, f"{top}.{port}{bits}"]
    Path(path).write_text("\n".join([*lines, ""]))
