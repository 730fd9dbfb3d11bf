"""The project as a whole: environment set-up, make targets, import rules, doctor."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sim import doctor, setup_venv

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("cosim", "test", "rtl", "formal", "mutations", "bench", "accuracy", "setup", "doctor", "clean")
LOCKS = sorted(ROOT.glob("requirements*.lock"))
PACKAGES = ("golden", "hw", "sim", "gpu")
MAY_IMPORT = {"golden": set(), "hw": {"golden"}, "sim": {"golden", "hw"}, "gpu": {"golden"}}


def pins(lock):
    lines = [line.split("#")[0].strip() for line in lock.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = {canonical(name) for lock in LOCKS for name in pins(lock)}
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    assert {canonical(re.match(r"[\w.-]+", name)[0]) for name in wanted} <= locked
    assert pins(ROOT / "requirements-gpu.lock")["torch"] == "2.13.0"


def test_no_package_is_pinned_twice():
    names = [canonical(name) for lock in LOCKS for name in pins(lock)]
    assert len(names) == len(set(names))


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """Path of an environment to make; pip's calls are recorded instead of run."""
    calls = []
    run = subprocess.run

    def recorded(command, **options):
        if "install" not in command:
            return run(command, **options)
        calls.append([Path(word).name for word in command if word.endswith(".lock")])
        return subprocess.CompletedProcess(command, 1 if recorded.fails else 0)

    recorded.fails = False
    monkeypatch.setattr(setup_venv.subprocess, "run", recorded)
    return tmp_path / "venv", calls, recorded


def test_setup_is_done_once_and_repeated_when_unfinished(environment, tmp_path):
    venv, calls, pip = environment
    lock = tmp_path / "some.lock"
    lock.write_text("numpy==2.0\n")
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text("half copied")  # what an interrupted set-up may leave
    pip.fails = True
    with pytest.raises(setup_venv.SetupError, match="pip could not install some.lock"):
        setup_venv.install([lock], venv)
    pip.fails = False
    assert setup_venv.install([lock], venv) == ["some.lock"]
    assert setup_venv.install([lock], venv) == []
    assert calls == [["some.lock"]] * 2
    lock.write_text("numpy==2.1\n")
    assert setup_venv.install([lock], venv) == ["some.lock"]
    assert subprocess.check_output([venv / "bin" / "python", "-c", "print(1)"]) == b"1\n"


def test_setup_errors_are_one_line(capsys, monkeypatch, tmp_path):
    assert setup_venv.main(["nothing.lock"]) == 1
    assert capsys.readouterr().err == f"setup: error: no lock file {ROOT / 'nothing.lock'}\n"
    monkeypatch.setattr(setup_venv.sys, "version_info", (3, 9, 1))
    monkeypatch.setenv("VENV", str(tmp_path / "venv"))
    assert setup_venv.main([]) == 1
    error = capsys.readouterr().err
    assert "Python 3.9 is too old: install Python 3.11" in error and error.count("\n") == 1


def make(*arguments):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", "-C", str(ROOT), *arguments], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("target", TARGETS)
def test_make_has_the_target(target):
    run = make("-n", target)
    assert run.returncode == 0, run.stderr
    assert f"make {target}" in make("help").stdout


def test_targets_set_up_their_environment():
    """In a fresh clone every target that runs our code makes its environment first."""
    for target in set(TARGETS) - {"doctor", "clean"}:
        lines = make("-n", target, "VENV=/nonexistent/venv").stdout.splitlines()
        assert any("setup_venv.py requirements.lock" in line for line in lines[1:2] + lines[:2]), (target, lines)


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


def imports(path):
    """Top-level names that a module imports, at any depth of the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_they_may(package):
    for path in (ROOT / package).rglob("*.py"):
        others = (set(imports(path)) & set(PACKAGES)) - {package} - MAY_IMPORT[package]
        assert not others, f"{path} imports {others}"


@pytest.mark.parametrize("package", ["golden", "gpu"])
def test_software_packages_work_without_hardware_tools(package):
    if not (ROOT / package).is_dir():
        pytest.skip(f"{package}/ does not exist yet")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / package).rglob("*.py")]
    names = [name for name in names if not name.endswith("__main__")]
    code = "import sys\nfor name in ('amaranth', 'cocotb', 'rich', 'pooch'): sys.modules[name] = None\n"
    code += f"import importlib\nfor name in {names!r}: importlib.import_module(name)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if "No module named 'torch'" in run.stderr or "No module named 'triton'" in run.stderr:
        pytest.skip("torch or triton is not installed")
    assert run.returncode == 0, run.stderr


def test_doctor_finds_this_machine_fit(capsys):
    assert doctor.main() == 0
    assert capsys.readouterr().out.endswith("everything needed is here\n")


def test_doctor_names_what_is_missing_and_the_fix(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("VENV", str(tmp_path / "venv"))
    monkeypatch.setenv("INTRAIN_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 10 << 20))
    assert doctor.main() == 1
    lines = {line[9:23].strip(): line for line in capsys.readouterr().out.splitlines()}
    for name, fix in (
        ("compiler", "apt-get install g++"),
        ("make", "apt-get install make"),
        ("perl", "apt-get install perl"),
        ("cache", "set INTRAIN_CACHE"),
        ("data", "correct or unset INTRAIN_DATA"),
    ):
        assert lines[name].startswith("missing") and fix in lines[name]
    assert lines["environment"].startswith("note") and "make setup" in lines["environment"]


def test_doctor_checks_that_the_compiler_works(monkeypatch, tmp_path):
    broken = tmp_path / "g++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1 || exit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert doctor.check_compiler()[:2] == ("missing", f"{broken} cannot compile C++17")
