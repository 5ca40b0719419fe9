"""Memory-mapped arrays and their checksums."""

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from datasets.images import MappedImages
from datasets.mapped import open_mapped, record_path, write_mapped
from tests.made_data import (
    everything,
    levels,
    refusal,
)


@pytest.fixture(scope="module")
def array() -> np.ndarray:
    """An array of more bytes than a load checks."""
    return levels(600, 64, 64, 3)


@pytest.fixture
def mapped(tmp_path: Path, array: np.ndarray) -> tuple[Path, np.ndarray]:
    write_mapped(tmp_path / "made.npy", array.shape, iter(array))
    return tmp_path / "made.npy", array


def test_a_mapped_file_is_the_rows_and_an_npy_file(mapped: tuple[Path, np.ndarray]) -> None:
    path, array = mapped
    assert {p.name for p in path.parent.iterdir()} == {"made.npy", "made.json"}
    np.testing.assert_array_equal(np.load(path), array)
    opened = open_mapped(path, array.shape)
    assert isinstance(opened, np.memmap)
    np.testing.assert_array_equal(opened, array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch would warn about read-only memory
        images = MappedImages("made", "train", (3, 64, 64), torch.from_numpy(opened[3:5]))
    np.testing.assert_array_equal(everything(images)[1, 2], array[4, :, :, 2] / np.float32(255))


def test_writing_to_the_map_does_not_change_the_file(mapped: tuple[Path, np.ndarray]) -> None:
    path, array = mapped
    open_mapped(path, array.shape)[:] = 0
    np.testing.assert_array_equal(np.load(path), array)


@pytest.mark.parametrize(
    "damage",
    [
        lambda body: body[:-1],
        lambda body: body + b"\0",
        lambda body: b"",
        lambda body: bytes([body[0] ^ 1]) + body[1:],
        lambda body: body[:-1] + bytes([body[-1] ^ 1]),
        lambda body: body[: len(body) // 2] + bytes(len(body) - len(body) // 2),
        lambda body: body[:3000000] + bytes(1 << 18) + body[3000000 + (1 << 18) :],
    ],
)
def test_a_damaged_mapped_file_is_refused_and_left_alone(
    mapped: tuple[Path, np.ndarray], damage: Callable[[bytes], bytes]
) -> None:
    path, array = mapped
    body = damage(path.read_bytes())
    path.write_bytes(body)
    line = refusal(lambda: open_mapped(path, array.shape))
    assert f"{path} is damaged or another file" in line
    assert "delete both to have them made again" in line
    assert path.read_bytes() == body


def test_a_mapped_file_of_another_shape_is_refused(mapped: tuple[Path, np.ndarray]) -> None:
    path, _ = mapped
    line = refusal(lambda: open_mapped(path, (601, 64, 64, 3)))
    assert f"{path} is another file" in line
    assert "uint8 (600, 64, 64, 3) where uint8 (601, 64, 64, 3) is expected" in line


@pytest.mark.parametrize("body", [None, b"", b"{", b"[]", b'{"bytes": 1}', b"\xff"])
def test_a_mapped_file_without_its_checksums_is_refused(
    mapped: tuple[Path, np.ndarray], body: bytes | None
) -> None:
    path, array = mapped
    record = record_path(path)
    if body is None:
        record.unlink()
    else:
        record.write_bytes(body)
    line = refusal(lambda: open_mapped(path, array.shape))
    assert str(record) in line
    assert "there is no file" in line or "is damaged" in line


def test_a_folder_in_the_place_of_a_mapped_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made.npy").mkdir()
    line = refusal(lambda: open_mapped(tmp_path / "made.npy", (1,)))
    assert f"cannot read {tmp_path / 'made.npy'} (Is a directory)" in line
