"""Checkpoints: round trip, damage, interrupted writing."""

import os

import numpy as np
import pytest

from sim import checkpoint

MEMORY = np.random.default_rng(5).integers(0, 256, 4096, dtype=np.uint8)
REGIONS = [(16, 100), (1000, 7), (2000, 0), (4000, 96)]
FACTS = {"step": 45, "cycle": 123456, "method": "niti"}


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "c", MEMORY, REGIONS, FACTS)
    facts, pieces = checkpoint.load(tmp_path / "c")
    assert facts == FACTS
    assert [address for address, _ in pieces] == [16, 1000, 2000, 4000]
    for (address, size), (_, piece) in zip(REGIONS, pieces, strict=True):
        assert (piece == MEMORY[address : address + size]).all() and piece.size == size


def test_every_changed_byte_is_found(tmp_path):
    path = tmp_path / "c"
    checkpoint.save(path, MEMORY, REGIONS, FACTS)
    good = path.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(checkpoint.CheckpointError, match=f"checkpoint {path} (is damaged|has the format)"):
            checkpoint.load(path)


@pytest.mark.parametrize("length", [0, 10, 150, -1])
def test_a_cut_file_is_found(tmp_path, length):
    path = tmp_path / "c"
    checkpoint.save(path, MEMORY, REGIONS, FACTS)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(checkpoint.CheckpointError, match="is damaged: delete it"):
        checkpoint.load(path)


def test_a_failed_write_keeps_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "c"
    checkpoint.save(path, MEMORY, REGIONS, FACTS)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoint.CheckpointError, match="cannot write checkpoint .*No space left"):
        checkpoint.save(path, MEMORY, REGIONS, {"step": 90})
    assert checkpoint.load(path)[0] == FACTS
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_messages(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="cannot read checkpoint .*No such file"):
        checkpoint.load(tmp_path / "none")
    with pytest.raises(ValueError, match="10 bytes at 0xffc lie outside a memory of 4096 bytes"):
        checkpoint.save(tmp_path / "c", MEMORY, [(4092, 10)], {})
