"""The copier's Verilog and builds, shared by the tests of the simulation infrastructure."""

import sys
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the simulation imports `scenarios` and `copier` by name


@cache
def copier_verilog(beat_bytes):
    import copier

    return copier.copier_verilog(beat_bytes)


@pytest.fixture(scope="session")
def copier_build():
    """Function (beat_bytes, flavour) -> finished build."""
    from sim import verilator

    return lambda beat_bytes=16, flavour="fast": verilator.build(copier_verilog(beat_bytes), flavour=flavour)
