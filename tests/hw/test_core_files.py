"""Generated files: byte-identical Verilog, documents that follow the code, command-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from amaranth.lib.wiring import Out
from amaranth.sim import Simulator

from hw import descriptor, register_map, verilog
from hw.__main__ import main
from hw.config import PRESETS, ConfigError, CoreConfig, load
from hw.descriptor import Opcode, ProgramError, decode, encode, offsets
from hw.top import Top

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name, text", [("registers", register_map.markdown), ("program", descriptor.markdown)])
def test_generated_documents_are_current(name, text):
    assert (ROOT / f"docs/{name}.md").read_text() == text(), f"run: python -m hw {name} > docs/{name}.md"


def test_verilog_is_byte_identical_and_described(tmp_path):
    here, description = verilog.generate(PRESETS["tiny"])
    command = [sys.executable, "-m", "hw", "rtl", "--core", "tiny", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True)
    assert (tmp_path / "intrain_tiny.v").read_text() == here
    assert str(ROOT) not in here and sys.prefix not in here       # the same wherever the sources lie
    sidecar = json.loads((tmp_path / "intrain_tiny.json").read_text())
    assert sidecar == json.loads(json.dumps(description))
    assert sidecar["ports"]["m_axi_rdata"] == {"direction": "In", "width": 8 * PRESETS["tiny"].beat_bytes}
    for port in sidecar["ports"]:
        assert port in here


@pytest.mark.parametrize("opcode", Opcode)
def test_descriptors_survive_encoding(opcode):
    table = offsets(opcode)
    sections = {}
    for k, ((label, name), (_, _, field)) in enumerate(table.items()):
        if name != "opcode":
            value = (k * 0x9E3779B1 + 1) % (1 << field.bits)
            if field.signed and value >> field.bits - 1:
                value -= 1 << field.bits
            sections.setdefault(label, {})[name] = value
    back_opcode, back = decode(encode(opcode, **sections))
    assert back_opcode == opcode
    for label, fields in sections.items():
        for name, value in fields.items():
            assert back[label][name] == value
    # No two fields share a bit.
    used = [(word, bit + b) for word, bit, field in table.values() for b in range(field.bits)]
    assert len(used) == len(set(used))


@pytest.mark.parametrize("sections, message", [
    ({"loop": {"count": 1 << 32}}, "LOOP loop.count = 4294967296 does not fit"),
    ({"loop": {"cuont": 1}}, "no field loop.cuont"),
])
def test_bad_fields_are_named(sections, message):
    with pytest.raises(ProgramError, match=message):
        encode(Opcode.LOOP, **sections)


def test_bad_bytes_are_refused():
    with pytest.raises(ProgramError, match="256 bytes, not 4"):
        decode(b"1234")
    with pytest.raises(ProgramError, match="unknown opcode 9"):
        decode(bytes([9]) + bytes(255))


@pytest.mark.parametrize("text, message", [
    ("rows = 12\ncolumns = 8\n", "rows must be a power of two from 4 to 32, not 12; the nearest legal value is"),
    ("rows = 8\n", "missing key 'columns'"),
    ("rows = 8\ncolumns = 8\nspeed = 3\n", "unknown key 'speed'"),
    ("rows = 8.5\ncolumns = 8\n", "rows must be an integer"),
    ("rows = 8\ncolumns = 32\nlanes = 8\n",
     "lanes must be a power of two from 16 to 32, not 8; the nearest legal value is 16"),
    ("rows = 4\ncolumns = 4\nlanes = 2\n",
     "lanes must be a power of two from 4 to 4, not 2; the nearest legal value is 4"),
    ("rows = 16\ncolumns = 4\nlanes = 12\n",
     "lanes must be a power of two from 8 to 16, not 12; the nearest legal value"),
    ("rows = 8\ncolumns = 8\nlanes = 16\n",
     "lanes must be a power of two from 4 to 8, not 16; the nearest legal value is 8"),
    ("rows = 8\ncolumns = 8\nlanes = 4\nbeat_bytes = 32\n", "beat_bytes must be a power of two from 8 to 16, not 32"),
    ("rows = 32\ncolumns = 32\nlanes = 16\nweight_lines = 32\n", "weight_lines must be a power of two from 64 to"),
    ("rows = \n", "not valid TOML"),
    ('rows = 8\ncolumns = 8\nmethods = ["niti", "adam"]\n', "methods must be a list of one or more of niti, wage, dfp"),
    ("rows = 8\ncolumns = 8\nmethods = []\n", "methods must be a list of one or more of niti, wage, dfp"),
])
def test_bad_core_files_get_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert main(["rtl", "--core", str(path), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unknown_core_lists_the_presets():
    with pytest.raises(ConfigError, match="unknown core 'huge': choose one of tiny, small, small-niti, small-wage"):
        load("huge")
    with pytest.raises(ConfigError, match="does not exist"):
        load("nowhere.toml")


def test_a_toml_core_is_a_configuration(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('rows = 4\ncolumns = 16\nbuffer_lines = 128\nmethods = ["dfp", "niti"]\n')
    assert load(str(path)) == CoreConfig(name="mine", rows=4, columns=16, buffer_lines=128, methods=("niti", "dfp"))
    core = load(str(path))
    assert (core.lanes, core.parts, core.line_bytes, core.beat_bytes, core.vectors_per_line) == (16, 1, 64, 64, 4)


def test_half_the_lanes_make_lines_half_as_long(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("rows = 4\ncolumns = 16\nlanes = 8\n")
    core = load(str(path))
    assert core == CoreConfig(name="mine", rows=4, columns=16, lanes=8)
    assert (core.parts, core.line_bytes, core.beat_bytes, core.vectors_per_line) == (2, 32, 32, 2)


def test_no_handshake_before_reset_is_over():
    """A one-cycle rst is seen a cycle later and for three cycles; in these every port's valid and ready are low."""
    top = Top(PRESETS["tiny"])
    handshakes = [getattr(top, name) for name, member in top.core.signature.members.items()
                  if member.flow == Out and name.endswith(("valid", "ready"))]
    seen = []

    async def watch(context):
        for rst in (0, 0, 0, 0, 1, 0, 0, 0):
            context.set(top.rst, rst)
            for clk in (0, 1):
                context.set(top.clk, clk)
                await context.delay(1e-8)
            seen.append((any(context.get(port) for port in handshakes), context.get(top.s_axi_awready)))

    simulator = Simulator(top)
    simulator.add_testbench(watch)
    simulator.run()
    # After each edge: power-up reset (two), running, running, rst at the edge, two more cycles of reset, running.
    assert [ready for _, ready in seen] == [0, 0, 1, 1, 0, 0, 0, 1]
    assert not any(some for some, ready in seen if not ready)
