"""Checkpoints: round trip, damage, interrupted writing."""

import os

import numpy as np
import pytest

from sim import checkpoint

RANDOM = np.random.default_rng(5)
PIECES = {"fc0.weight": RANDOM.integers(0, 256, 100, dtype=np.uint8), "empty": np.zeros((0, 3), np.int16),
          "float": RANDOM.standard_normal((3, 4)).astype(np.float32), "scalar": np.array(7, np.int64)}
FACTS = {"step": 45, "cycle": 123456, "method": "niti"}


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "c", PIECES, FACTS)
    facts, pieces = checkpoint.load(tmp_path / "c")
    assert facts == FACTS and list(pieces) == list(PIECES)
    for name, piece in pieces.items():
        assert piece.dtype == PIECES[name].dtype and piece.shape == PIECES[name].shape and (piece == PIECES[name]).all()
        piece += 1                              # belongs to the caller


def test_every_changed_byte_is_found(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, PIECES, FACTS)
    good = path.read_bytes()
    for place in range(len(good)):
        for bit in (1, 128):
            bad = bytearray(good)
            bad[place] ^= bit
            path.write_bytes(bad)
            with pytest.raises(checkpoint.CheckpointError, match=f"checkpoint {path} (is damaged|has the format)"):
                checkpoint.load(path)


@pytest.mark.parametrize("length", [0, 10, 150, -1])
def test_a_cut_file_is_found(tmp_path, length):
    path = tmp_path / "c"
    checkpoint.save(path, PIECES, FACTS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(checkpoint.CheckpointError, match="is damaged: start the run again"):
        checkpoint.load(path)


def test_a_failed_write_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "c"
    checkpoint.save(path, PIECES, FACTS)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoint.CheckpointError, match="cannot write checkpoint .*No space left"):
        checkpoint.save(path, PIECES, {"step": 90})
    assert checkpoint.load(path)[0] == FACTS
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_a_missing_one_is_named(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=f"nothing to resume: there is no {tmp_path / 'none'}"):
        checkpoint.load(tmp_path / "none")
