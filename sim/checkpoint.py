"""Checkpoints of a simulated training run: what lay in the core's memory at a step boundary, and where the run stood.

A file holds one JSON line (format, facts, names and shapes of the pieces, SHA-256 of it all) and then the pieces'
bytes. It is written beside its target and renamed, so that a kill at any moment leaves the old or the new one;
whatever else happened to it is found by the digest.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np

from .shared import SimulationError

FORMAT = "intrain checkpoint 2"


class CheckpointError(SimulationError):
    """One line that names the file and what is wrong with it."""


def save(path, pieces, facts):
    """Store the arrays of the dictionary `pieces` and the JSON-able dictionary `facts`."""
    path = Path(path)
    arrays = {name: np.asarray(array, order="C") for name, array in pieces.items()}
    header = {"format": FORMAT, "facts": facts,
              "pieces": [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]}
    header["sha256"] = _digest(header, [array.tobytes() for array in arrays.values()])
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(partial, "wb") as file:
            file.write(json.dumps(header).encode() + b"\n")
            for array in arrays.values():
                file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write checkpoint {path}: {error.strerror}") from None


def load(path):
    """The facts and the pieces {name: array} of a checkpoint; damage is named."""
    path = Path(path)
    try:
        line, _, body = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        raise CheckpointError(f"nothing to resume: there is no {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from None
    damaged = CheckpointError(f"checkpoint {path} is damaged: start the run again, or resume from another one")
    try:
        header = json.loads(line)
        found, facts, places = header["format"], header["facts"], header["pieces"]
        wanted = header.pop("sha256")
        places = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in places]
    except (ValueError, KeyError, TypeError):
        raise damaged from None
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {path} has the format {found!r}; this version reads {FORMAT!r}")
    pieces, start = {}, 0
    for name, dtype, shape in places:
        count = math.prod(shape)
        if start + count * dtype.itemsize > len(body):
            raise damaged
        pieces[name] = np.frombuffer(body, dtype, count, start).reshape(shape).copy()
        start += count * dtype.itemsize
    if start != len(body) or _digest(header, [body]) != wanted:
        raise damaged
    return facts, pieces


def _digest(header, pieces):
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
