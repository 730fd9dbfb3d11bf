"""Reset reaches all that matters: registers and memories with unknown or random contents before it change nothing."""

import functools
import json
import os
import re
import shutil

import pytest

import golden.train
import sim.train
from golden import data as data_module
from hw.config import PRESETS
from sim import doorbells, verilator
from sim.session import simulate
from sim.verilator import at_collisions, at_power_up, build

VERILOG = """module intrain(clk);
  reg [3:0] count = 4'h0;
  reg \\$auto$verilog_backend.cc:2355:dump_module$17  = 0;
  reg flag  = 1'h1;
  reg [7:0] ram [15:0];
  integer word_ram;
  initial for (word_ram = 0; word_ram < 16; word_ram = word_ram + 1)
    ram[word_ram] = 0;
  reg [7:0] rom [1:0];
  initial begin
    rom[0] = 8'h05;
    rom[1] = 8'h00;
  end
endmodule
"""


def test_power_up_leaves_only_what_a_chip_has():
    text = at_power_up(VERILOG)
    assert "  reg [3:0] count;" in text and re.search(r"reg flag ?;", text) and "word_ram" not in text
    assert "dump_module$17  = 0;" in text and "rom[0] = 8'h05;" in text
    assert not re.search(r"reg (\[.*\] )?[a-z_]+ *=", at_power_up(doorbells.generated_verilog(PRESETS["tiny"])))


def test_a_word_that_is_written_meanwhile_is_wrong_without_a_bypass():
    """In every block RAM that promises synthesis that this word is not used; training in the debug flavour, below,
    shows that it is not."""
    modules = doorbells.generated_verilog(PRESETS["tiny"]).split("endmodule")
    found = set()
    for before, after in zip(modules, at_collisions("endmodule".join(modules)).split("endmodule"), strict=True):
        promised = set(re.findall(r"no_rw_check.*\n(?:  \(\*.*\n)*  reg \[\d+:0\] (\S+) +\[", before))
        read = {name for name in promised if re.search(rf"_ <= {re.escape(name)} ?\[", before)}
        changed = set(re.findall(r"\) \? ~(\S+?) ?\[.*\] : ", after))
        assert changed == read
        found |= changed
    assert found == {"entries", "results", "ram", "memory", "operations", "\\program"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["niti", "dfp"])
def test_random_contents_before_reset_change_no_bit_and_no_cycle(tmp_path, monkeypatch, method):
    monkeypatch.setattr(verilator, "build", functools.partial(build, flavour="debug"))
    runs = []
    for seed in (1, 2, 3):
        monkeypatch.setattr(sim.train, "simulate", functools.partial(simulate, seed=seed))
        network = golden.train.build(method, "mlp", 1, data="digits", batch=8)
        summary = sim.train.train(PRESETS["tiny"], network, data_module.load("digits"), 2, tmp_path / str(seed),
                                  intermediates=True, test_images=8, floating=False, log=lambda line: None)
        assert summary["bit_exact"]
        cycles = [json.loads(line)["cycles"] for line in
                  (tmp_path / str(seed) / "run" / "records.jsonl").read_text().splitlines()]
        runs.append((cycles, (tmp_path / str(seed) / "digests.jsonl").read_text()))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("iverilog"), reason="needs iverilog on PATH")
@pytest.mark.parametrize("method", ["niti", "dfp"])
def test_no_unknown_bit_reaches_a_port_or_memory(tmp_path, monkeypatch, method):
    """Four states: a training step on a core of which nothing is known before reset."""
    from cocotb_tools.runner import get_runner

    network = golden.train.build(method, "mlp", 1, data="digits", batch=4)
    dataset = data_module.load("digits")
    programs = doorbells.Programs(PRESETS["tiny"], network, dataset, 1)
    (doorbell,) = doorbells.training_doorbells(network, dataset, 1, programs.capacity)
    compiled = programs.of(doorbell)
    plan = doorbells.Plan(tmp_path)
    plan.add(compiled, doorbell, network, compiled.state(network.state))
    plan.close()
    size = programs.memory_bytes
    (tmp_path / "power_up.json").write_text(json.dumps({"bytes": size, "seed": network.seed}))

    (tmp_path / "intrain.v").write_text(at_power_up(doorbells.generated_verilog(PRESETS["tiny"])))
    for name in [name for name in os.environ if name.startswith("COCOTB_")]:
        monkeypatch.delenv(name)
    runner = get_runner("icarus")
    runner.build(sources=[tmp_path / "intrain.v"], hdl_toplevel="intrain", build_dir=tmp_path / "icarus",
                 timescale=("1ns", "1ns"), log_file=tmp_path / "build.log")
    runner.test(test_module="tests.sim.power_up", hdl_toplevel="intrain", build_dir=tmp_path / "icarus",
                test_dir=tmp_path, log_file=tmp_path / "simulation.log", results_xml=str(tmp_path / "results.xml"),
                extra_env={"POWER_UP_FOLDER": str(tmp_path), "COCOTB_RESOLVE_X": "ZEROS"})
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["ports"], "first cycle after reset with an unknown bit"
    assert found["status"] & 6 == 2      # done, no error
    # Only dumps of the scalar registers, which have no reset, may hold what no operation has written.
    dumps = range(compiled.dump.address, compiled.dump.end)
    assert all(address in dumps for address in found["unknown_bytes"])
    network.step(*doorbell.batches[0])
    memory = (tmp_path / "memory.bin").read_bytes()
    for region, data in compiled.state(network.state):
        if region.name != compiled.dump.name:       # whose other registers are not the network's state
            assert memory[region.address:][:len(data)] == bytes(data), region.name
