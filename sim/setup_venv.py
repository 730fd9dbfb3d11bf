"""Make `.venv` from the lock files: `python3 sim/setup_venv.py [LOCK ...]`.

Runs on the system's Python before anything is installed, so it uses the standard library only. A lock file
counts as installed when `.venv/.locks/NAME` holds its digest, which is written last: an interrupted
installation is repeated, a finished one costs nothing. Two runs at once wait for each other.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST = (3, 11)


class SetupError(Exception):
    """One line that says what is wrong and what to do."""


def python_in(venv_dir):
    return Path(venv_dir) / "bin" / "python"


def _works(venv_dir):
    """Whether the environment's interpreter starts and has pip (a copied or half-made folder has not)."""
    try:
        check = [str(python_in(venv_dir)), "-c", "import pip, sys; print(sys.prefix)"]
        prefix = subprocess.run(check, capture_output=True, text=True, check=True).stdout.strip()
        return os.path.realpath(prefix) == os.path.realpath(venv_dir)
    except (OSError, subprocess.CalledProcessError):
        return False


def _create(venv_dir):
    if sys.version_info < OLDEST:
        raise SetupError(
            "Python {}.{} is too old: install Python {}.{} or newer and run make PYTHON=python3.x".format(
                *sys.version_info[:2], *OLDEST
            )
        )
    try:
        import ensurepip  # noqa: F401  (Debian ships it in a package of its own)
    except ImportError:
        raise SetupError("this Python cannot make virtual environments: install the package python3-venv") from None
    shutil.rmtree(venv_dir, ignore_errors=True)
    venv.EnvBuilder(with_pip=True, symlinks=True).create(str(venv_dir))


def _digest(lock):
    return hashlib.sha256(Path(lock).read_bytes()).hexdigest()


def install(locks, venv_dir):
    """Install the lock files that the environment does not have yet; returns the names of those installed."""
    venv_dir = Path(venv_dir)
    venv_dir.parent.mkdir(parents=True, exist_ok=True)
    with open(str(venv_dir) + ".lock", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if not _works(venv_dir):
            _create(venv_dir)
        stamps = venv_dir / ".locks"
        stamps.mkdir(exist_ok=True)
        missing = [
            lock
            for lock in locks
            if not (stamps / lock.name).exists() or (stamps / lock.name).read_text() != _digest(lock)
        ]
        names = ", ".join(lock.name for lock in missing)
        if missing:
            start = time.monotonic()
            print(f"setup: installing {names} into {venv_dir}", flush=True)
            command = [str(python_in(venv_dir)), "-m", "pip", "install", "--quiet", "--no-input"]
            command += ["--disable-pip-version-check", "--no-compile", "--prefer-binary"]
            for lock in missing:
                command += ["-r", str(lock)]
            if subprocess.run(command).returncode:
                raise SetupError(
                    f"pip could not install {names} (its message is above); check the network, the free disk "
                    "space and the Python version, then run the same command again"
                )
            for lock in missing:
                (stamps / lock.name).write_text(_digest(lock))
            print(f"setup: done in {time.monotonic() - start:.0f} s", flush=True)
        for lock in locks:
            os.utime(stamps / lock.name)
        return [lock.name for lock in missing]


def main(arguments):
    locks = [ROOT / name for name in arguments or ["requirements.lock"]]
    try:
        for lock in locks:
            if not lock.is_file():
                raise SetupError(f"no lock file {lock}")
        install(locks, os.environ.get("VENV", ROOT / ".venv"))
    except (SetupError, OSError) as error:
        print(f"setup: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
