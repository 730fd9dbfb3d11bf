"""Programs as text."""

from __future__ import annotations

from . import compiler


def symbols(compiled: compiler.Compiled) -> dict:
    """What the addresses, registers and tags of a program mean, for JSON."""
    return {"regions": [[region.name, region.address, region.copies * region.nbytes, region.nbytes]
                        for region in compiled.regions.values()]}
