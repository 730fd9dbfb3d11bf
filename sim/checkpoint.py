"""Checkpoints of a simulated training run: pieces of the core's memory at a step boundary, and where the run stood.

A file holds one JSON line (format, facts, places and sizes of the pieces, SHA-256 of all that follows) and then the
pieces' bytes. It is written beside its target and renamed, so that a kill at any moment leaves the old or the new
one; whatever else happened to it is found by the digest.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

FORMAT = "intrain checkpoint 1"


class CheckpointError(Exception):
    """One line that names the file and what is wrong with it."""


def save(path, memory, regions, facts):
    """Store the (address, bytes) `regions` of a byte array `memory` and the JSON-able dictionary `facts`."""
    path = Path(path)
    pieces = [np.ascontiguousarray(memory[address : address + size]) for address, size in regions]
    for (address, size), piece in zip(regions, pieces, strict=True):
        if piece.size != size:
            raise ValueError(f"{size} bytes at {address:#x} lie outside a memory of {len(memory)} bytes")
    header = {"format": FORMAT, "facts": facts, "regions": [list(map(int, region)) for region in regions]}
    header["sha256"] = _digest(header, pieces)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            for piece in pieces:
                file.write(piece.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror}") from None


def load(path):
    """The facts and the pieces [(address, byte array), ...] of a checkpoint; damage is named."""
    path = Path(path)
    try:
        line, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from None
    damaged = CheckpointError(f"checkpoint {path} is damaged: delete it, or resume from another one")
    try:
        header = json.loads(line)
        found, facts, regions = header["format"], header["facts"], header["regions"]
        wanted = header.pop("sha256")
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {path} has the format {found!r}; this version reads {FORMAT!r}")
    data = np.frombuffer(body, np.uint8)
    if data.size != sum(size for _, size in regions):
        raise damaged
    ends = np.cumsum([size for _, size in regions])
    pieces = [data[end - size : end] for (_, size), end in zip(regions, ends, strict=True)]
    if _digest(header, pieces) != wanted:
        raise damaged
    return facts, [(address, piece) for (address, _), piece in zip(regions, pieces, strict=True)]


def _digest(header, pieces):
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for piece in pieces:
        digest.update(piece.data)
    return digest.hexdigest()
