"""Triton's interpreter for all kernels of this folder, one thread, and no tests where torch is missing."""

import os
import subprocess
import sys

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
torch = pytest.importorskip("torch", reason="torch is not installed (make test installs it)")
torch.set_num_threads(1)


def without_interpreter() -> dict[str, str]:
    """The environment of a user, one thread per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    environment.pop("TRITON_INTERPRET", None)
    return environment


@pytest.fixture
def gpu():
    """Runs `python -m gpu ...` in its own process: (return code, stdout, stderr)."""

    def run(*arguments, workers=1, **environment):
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m"] if workers > 1 else []
        command = [sys.executable, "-m", *launcher, "gpu", *map(str, arguments)]
        result = subprocess.run(
            command, env=without_interpreter() | environment, capture_output=True, text=True, timeout=600
        )
        return result.returncode, result.stdout, result.stderr

    return run
