"""`python3 -m sim.doctor`: what is missing on this machine, and the fix.

Uses the standard library only and runs before anything is installed; every check is a function that returns
(level, what was found, what to do), level being "ok", "missing" (something will not work) or "note".
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OK, MISSING, NOTE = "ok", "missing", "note"
OLDEST = (3, 11)
BUILD_BYTES = 2 << 30
MEMORY_BYTES = 3 << 30


def _output(*command):
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def check_python():
    version = platform.python_version()
    if sys.version_info < OLDEST:
        return MISSING, f"Python {version}", "install Python 3.11 or newer and run make PYTHON=python3.x"
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        return MISSING, f"Python {version} without venv", "install python3-venv (Debian: apt-get install python3-venv)"
    return OK, f"Python {version}", ""


def check_compiler():
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    for name in wanted:
        version = _output(name, "--version") if shutil.which(name) else None
        if version is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "check.cpp"
            source.write_text("#include <memory>\nint main() { return *std::make_unique<int>(0); }\n")
            if _output(name, "-std=gnu++17", str(source), "-o", str(Path(folder) / "check")) is None:
                return MISSING, f"{name} cannot compile C++17", "install a complete g++ (Debian: apt-get install g++)"
        return OK, version.splitlines()[0], ""
    return MISSING, f"no C++ compiler ({', '.join(wanted)})", "install g++ (Debian: apt-get install g++)"


def _check_command(name, why):
    path = shutil.which(name)
    if path:
        return OK, path, ""
    return MISSING, f"no {name} ({why})", f"install {name} (Debian: apt-get install {name})"


def check_make():
    return _check_command("make", "builds the simulation")


def check_perl():
    return _check_command("perl", "Verilator's front end")


def check_environment():
    python = Path(os.environ.get("VENV", ROOT / ".venv")) / "bin" / "python"
    if not python.exists():
        return NOTE, "no .venv yet", "make setup (every target does it by itself)"
    code = "import amaranth, cocotb, numpy, sklearn; print(amaranth.__version__, cocotb.__version__, numpy.__version__)"
    found = _output(str(python), "-c", code)
    if found is None:
        return MISSING, f"{python.parent.parent} is incomplete", "rm -rf .venv && make setup"
    return OK, "amaranth {}, cocotb {}, numpy {}".format(*found.split()), ""


def check_verilator():
    python = Path(os.environ.get("VENV", ROOT / ".venv")) / "bin" / "python"
    if not python.exists():
        return NOTE, "comes with .venv", "make setup"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from sim.verilator import find_verilator, BuildError\n"
    code += "try: print('Verilator {}.{:03}'.format(*find_verilator().version))\nexcept BuildError as e: print('!', e)"
    found = _output(str(python), "-c", code)
    if not found or found.startswith("!"):
        return MISSING, (found or "Verilator does not start").lstrip("! "), "make setup"
    return OK, found, ""


def check_libpython():
    python = Path(os.environ.get("VENV", ROOT / ".venv")) / "bin" / "python"
    if not python.exists():
        return NOTE, "not checked before make setup", ""
    found = _output(str(python), "-c", "import find_libpython; print(find_libpython.find_libpython() or '')")
    if not found:
        fix = "use a Python built with --enable-shared (Debian: apt-get install libpython3-dev)"
        return MISSING, "Python's shared library, which cocotb loads, is not there", fix
    return OK, found, ""


def check_cache():
    folder = Path(
        os.environ.get("INTRAIN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "intrain"
    )
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        return MISSING, f"build cache {folder} is not writable", "set INTRAIN_CACHE to a folder you may write"
    free = shutil.disk_usage(existing).free
    if free < BUILD_BYTES:
        return MISSING, f"build cache {folder}: {free >> 20} MB free", "free 2 GB or set INTRAIN_CACHE to another disk"
    return OK, f"build cache {folder}, {free >> 30} GB free", ""


def check_memory():
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = f"{available >> 30} GB of memory, {os.cpu_count()} processors"
    if available < MEMORY_BYTES:
        return NOTE, text, "large cores may not compile; use CORE=small or tiny"
    return OK, text, ""


def check_shared_memory():
    free = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").exists() else 0
    if free < 256 << 20:
        return (
            NOTE,
            f"/dev/shm has {free >> 20} MB",
            f"simulated memory goes to {tempfile.gettempdir()} (slower)",
        )
    return OK, f"/dev/shm has {free >> 20} MB", ""


def check_data():
    folder = os.environ.get("INTRAIN_DATA")
    if not folder:
        return OK, "data set digits is bundled; INTRAIN_DATA is not set, others are downloaded", ""
    if not Path(folder).is_dir():
        return MISSING, f"INTRAIN_DATA={folder} does not exist", "correct or unset INTRAIN_DATA"
    names = [name for name in ("mnist", "fashion-mnist", "cifar-10") if (Path(folder) / name).is_dir()]
    return OK, f"INTRAIN_DATA={folder}: {', '.join(names) or 'no known data set'}", ""


def check_gpu():
    found = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") if shutil.which("nvidia-smi") else None
    if not found:
        return NOTE, "no GPU", "not needed: gpu/ runs on the CPU, kernels in Triton's interpreter"
    return OK, found.splitlines()[0], ""


CHECKS = {
    "python": check_python,
    "compiler": check_compiler,
    "make": check_make,
    "perl": check_perl,
    "environment": check_environment,
    "verilator": check_verilator,
    "libpython": check_libpython,
    "cache": check_cache,
    "memory": check_memory,
    "shared memory": check_shared_memory,
    "data": check_data,
    "gpu": check_gpu,
}


def main():
    missing = 0
    for name, check in CHECKS.items():
        level, found, fix = check()
        missing += level == MISSING
        print(f"{level:8} {name:14} {found}" + (f" -> {fix}" if fix else ""))
    print(f"{missing} missing" if missing else "everything needed is here")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
