"""`python -m hw synth`: counts, clock rates and messages, with stand-ins for the tools (real ones take minutes)."""

import json
import os
import re
from types import SimpleNamespace

import pytest

from hw import synthesis
from hw.__main__ import main
from hw.config import PRESETS

CELLS = {"LUT4": 100, "CCU2C": 7, "TRELLIS_FF": 50, "MULT18X18D": 16}


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Installs shell scripts as yosys and nextpnr-ecp5."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def install(**scripts):
        for name, body in scripts.items():
            path = folder / name.replace("_", "-")
            path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{name} 1.0" && exit\n{body}\n')
            path.chmod(0o755)

    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(synthesis.verilog, "convert", lambda *_, **__: "module design; endmodule\n")
    (tmp_path / "counts").write_text("header " + json.dumps({"modules": {"\\design": {"num_cells_by_type": CELLS}}}))
    (tmp_path / "netlist").write_text(json.dumps({"modules": {"design": {
        "attributes": {"top": "1"}, "cells": {}, "netnames": {},
        "ports": {"clk": {"direction": "input", "bits": [2]}}}}}))
    install(yosys=f"cp {tmp_path}/counts cells.json; cp {tmp_path}/netlist netlist.json",
            nextpnr_ecp5="""[ "$1" = --help ] && exit
seed=$(echo "$@" | sed 's/.*--seed \\([0-9]*\\).*/\\1/')
echo "{\\"fmax\\": {\\"clk\\": {\\"achieved\\": 10$seed.04}}}" > report-$seed.json""")
    return install


def test_cells_and_rates_reach_the_table(tools, tmp_path):
    row = synthesis.run("array", PRESETS["tiny"], "ecp5", tmp_path, log=lambda _: None)
    assert row["LUT"] == 100 and row["carry"] == 7 and row["DSP"] == 16 and row["block RAM"] == 0
    assert row["mhz"] == [101.0, 102.0, 103.0] and row["mhz_median"] == 102.0 and row["mhz_spread"] == 2.0
    text = synthesis.table([row], [{**row, "LUT": 90}])
    assert "| array | tiny | ecp5 | 100 (+10) | 7 | 50 | 16 |" in text and "| 6.2 | 102.0 (2.0) |" in text


def test_seeds_run_side_by_side(tools, tmp_path):
    """A seed waits here for the other: one after the other, neither ends."""
    tools(nextpnr_ecp5="""for seed; do [ "$last" = --seed ] && break; last=$seed; done
touch started-$seed
for i in $(seq 100); do [ -e started-1 -a -e started-2 ] && break; sleep 0.1; done
[ -e started-1 -a -e started-2 ] && echo "{\\"fmax\\": {\\"clk\\": {\\"achieved\\": 10$seed}}}" > report-$seed.json""")
    row = synthesis.run("array", PRESETS["tiny"], "ecp5", tmp_path, seeds=(1, 2), jobs=2, log=lambda _: None)
    assert row["mhz"] == [101, 102]
    with pytest.raises(synthesis.SynthesisError, match="--jobs 1 or more"):
        synthesis.run("array", PRESETS["tiny"], "ecp5", tmp_path, jobs=0, log=lambda _: None)


@pytest.mark.parametrize("design, mapping, options", [
    ("array", "-run begin:check", "--freq 150 .* --placer heap .* --router router1"),
    ("core", "-run begin:map_luts; abc -dress -lut 4:5; .* -run map_cells:check",
     "--freq 100 .* --placer static .* --router router1")])
def test_a_core_is_mapped_and_placed_in_its_own_way(tools, tmp_path, design, mapping, options):
    row = synthesis.run(design, PRESETS["tiny"], "ecp5", tmp_path, seeds=(1,), log=lambda _: None)
    assert re.search(mapping, row["script"]) and re.search(options, row["place_and_route"])


def test_a_placement_is_refined_again_where_nextpnr_has_python(tools, tmp_path):
    def options(**arguments):
        row = synthesis.run("core", PRESETS["tiny"], "ecp5", tmp_path, seeds=(1,), log=lambda _: None, **arguments)
        return row["place_and_route"]

    assert "--pre-route" not in options()
    with pytest.raises(synthesis.SynthesisError, match="no Python.*--refinements 0"):
        options(refinements=1)
    tools(nextpnr_ecp5='''[ "$1" = --help ] && echo "  --pre-route arg" >&2 && exit
[ "$(echo "$@" | grep -o "pre-route refine.py")" ] && echo ctx.place >> calls
echo "{\\"fmax\\": {\\"clk\\": {\\"achieved\\": 101}}}" > report-1.json''')
    folder = tmp_path / "core-tiny-ecp5"
    assert "--pre-route refine.py" in options(refinements=3) and (folder / "calls").read_text().count("ctx.place") == 1
    calls = []
    exec((folder / "refine.py").read_text(), {"ctx": SimpleNamespace(place=lambda: calls.append("place"))})
    assert len(calls) == 3
    assert "--pre-route" not in options()
    with pytest.raises(synthesis.SynthesisError, match="only the placer static"):
        options(refinements=1, placer="heap")
    with pytest.raises(synthesis.SynthesisError, match="cannot be refined -1 times"):
        options(refinements=-1)


def test_block_rams_stand_where_a_placement_before_wants_them(tools, tmp_path):
    """The placement comes first, leaves no report, and what it says is in the netlist that is placed and routed."""
    ram = {"type": "DP16KD", "parameters": {}, "attributes": {}, "connections": {"CLKA": [2]},
           "port_directions": {"CLKA": "input"}}
    netlist = json.loads((tmp_path / "netlist").read_text())
    netlist["modules"]["design"]["cells"]["ram"] = ram
    (tmp_path / "netlist").write_text(json.dumps(netlist))
    ram["attributes"] = {"NEXTPNR_BEL": "X6/Y22/EBR1"}
    (tmp_path / "placed").write_text(json.dumps(netlist))
    tools(nextpnr_ecp5=f"""case "$*" in
*"--no-route --write placed.json"*) cp {tmp_path}/placed placed.json;;
*) grep -q '"BEL": "X' pins.json && echo '{{"fmax": {{"clk": {{"achieved": 101}}}}}}' > report-1.json;;
esac""")

    def rates(floorplans, sites=None):
        return synthesis.run("core", PRESETS["tiny"], "ecp5", tmp_path, seeds=(1,), floorplans=floorplans, sites=sites,
                             log=lambda _: None)["mhz"]

    assert rates(1) == [101] and rates(2) == [101]
    with pytest.raises(synthesis.SynthesisError, match="stopped early"):        # no site: the script leaves no report
        rates(0)
    with pytest.raises(synthesis.SynthesisError, match="--floorplans 0 or more"):
        rates(-1)
    kept = tmp_path / "core-tiny-ecp5" / "sites.json"
    assert not kept.exists()
    rates(1)
    assert json.loads(kept.read_text()).keys() == {"ram#0"}
    assert rates(0, kept) == rates(0, kept) == [101]        # taken from where it will be left again
    for text, message in (("{}", "has no site for 'ram#0'"), ("[]", "an object of sites"),
                          ("{", "no floorplan in .*sites.json")):
        kept.write_text(text)
        with pytest.raises(synthesis.SynthesisError, match=message):
            rates(0, kept)
        assert kept.read_text() == text         # what is refused is not lost
    with pytest.raises(synthesis.SynthesisError, match="choose --floorplans or --sites"):
        rates(1, kept)
    (tmp_path / "placed").write_text((tmp_path / "netlist").read_text())
    with pytest.raises(synthesis.SynthesisError, match="no floorplan: cell 'ram' is not placed"):
        rates(1)


def test_a_tool_that_cannot_tell_its_version_is_named(tmp_path):
    tool = tmp_path / "yosys"
    tool.write_text("#!/bin/sh\necho no such library >&2\nexit 127\n")
    tool.chmod(0o755)
    with pytest.raises(synthesis.SynthesisError, match="yosys --version failed with exit status 127: no such library"):
        synthesis._version(str(tool))


def test_elements_are_counted_for_arrays_only(tools, tmp_path):
    row = synthesis.run("divider", PRESETS["tiny"], "ecp5", tmp_path, route=False, log=lambda _: None)
    assert synthesis.table([row]).splitlines()[-1].endswith("| 0 |  |  |")


@pytest.mark.parametrize("design", [pytest.param(name, marks=[pytest.mark.slow] if name == "core" else [])
                                    for name in synthesis.DESIGNS])
def test_every_design_generates_verilog(design, tmp_path, monkeypatch):
    """Without yosys: a stand-in takes the Verilog that `run` writes."""
    monkeypatch.setattr(synthesis, "_tool", str)
    monkeypatch.setattr(synthesis, "_version", lambda tool: f"{tool} 1.0")
    counts = "header " + json.dumps({"modules": {"\\design": {"num_cells_by_type": CELLS}}})
    monkeypatch.setattr(synthesis, "_finish", lambda *_: 0)
    monkeypatch.setattr(synthesis, "_call", lambda command, log, result: result.write_text(counts))
    row = synthesis.run(design, PRESETS["tiny"], "ecp5", tmp_path, route=False, log=lambda _: None)
    text = next(tmp_path.glob("*/design.v")).read_text()
    ports = re.search(r"^module \\design ?\((.*?)\);", text, re.MULTILINE | re.DOTALL)[1]
    assert {"clk", "rst"} < {port.strip() for port in ports.split(",")} and "always @(posedge" in text
    assert row["design"] == design and row["LUT"] == 100


def test_other_families_are_only_synthesised(tools, tmp_path):
    assert "mhz" not in synthesis.run("array", PRESETS["tiny"], "xcup", tmp_path, log=lambda _: None)


@pytest.mark.parametrize("broken, message", [
    ({"yosys": "echo Executing ABC"}, "yosys stopped early with exit status 0 after 'Executing ABC'"),
    ({"yosys": "echo '{\"modules\": {}}' > cells.json"}, "no cell count"),
    ({"nextpnr_ecp5": "echo ERROR: no room; exit 1"}, "stopped early with exit status 1 after 'ERROR: no room'"),
    ({"nextpnr_ecp5": "echo '{\"fmax\": {}}' > report-1.json"}, "no clock"),
])
def test_a_tool_without_a_result_is_an_error(tools, tmp_path, capsys, broken, message):
    tools(**broken)
    assert main(["synth", "--core", "tiny", "--design", "array", "--out", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments, message", [
    (["--design", "alu"], "unknown design 'alu'"), (["--device", "ice40"], "unknown device 'ice40'"),
    (["--core", "giant"], "giant")])
def test_bad_arguments_are_one_line(tools, tmp_path, capsys, arguments, message):
    assert main(["synth", "--core", "tiny", "--out", str(tmp_path), *arguments]) in (1, 2)
    assert message in capsys.readouterr().err.splitlines()[-1]
