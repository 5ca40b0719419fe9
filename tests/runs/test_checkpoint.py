"""Checkpoint files: ordinary torch files with a checksum that detects any damage."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ladder_vae.runs.checkpoint import (
    FORMAT,
    Damaged,
    load_weights,
    read_checkpoint,
    weights_only,
    write_checkpoint,
)
from runtime.errors import UserError

CPU = torch.device("cpu")


def state() -> dict[str, Any]:
    return weights_only({"w": torch.arange(3.0)}) | {"step": 1}


def test_a_checkpoint_is_an_ordinary_torch_file(tmp_path: Path) -> None:
    """With a comment in its archive, which other readers ignore."""
    path = tmp_path / "1.pt"
    write_checkpoint(path, state())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")
    by_torch = torch.load(path, weights_only=True)
    assert_close(by_torch["weights"], read_checkpoint(path, CPU)["weights"], rtol=0, atol=0)


def test_any_changed_bit_is_detected(tmp_path: Path) -> None:
    """One in each of 200 places all over the file, including the checksum."""
    path = tmp_path / "1.pt"
    write_checkpoint(path, state())
    whole = path.read_bytes()
    for i in range(0, len(whole), max(1, len(whole) // 200)):
        changed = bytearray(whole)
        changed[i] ^= 1 << (i % 8)
        path.write_bytes(changed)
        with pytest.raises(Damaged, match=r"1\.pt is damaged"):
            read_checkpoint(path, CPU)
    path.write_bytes(whole)
    assert read_checkpoint(path, CPU)["step"] == 1


def test_a_checkpoint_without_its_checksum_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "1.pt"
    torch.save(state() | {"format": FORMAT}, path)
    with pytest.raises(Damaged, match="its checksum does not match"):
        read_checkpoint(path, CPU)


def test_a_checkpoint_of_another_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "1.pt"
    with monkeypatch.context() as patch:
        patch.setattr("ladder_vae.runs.checkpoint.FORMAT", 2)
        write_checkpoint(path, state())
    message = r"1\.pt was written by another version .*\(format 2; this version reads format 3\)"
    with pytest.raises(UserError, match=message):
        read_checkpoint(path, CPU)


def test_a_missing_checkpoint_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_checkpoint(tmp_path / "1.pt", CPU)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(UserError, match=r"do not fit the network in config\.json: .*mismatch"):
        load_weights(nn.Linear(2, 3), nn.Linear(2, 4).state_dict())
