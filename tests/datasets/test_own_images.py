"""The user's own images: folders and array files, splits, changes of the source, and refusals."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import folder, own_images, picture_folder, splits
from datasets.own_images import OwnImages
from tests.made_data import everything, levels, refusal

SPLITS = {"train": 5, "valid": 2, "test": 3}


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def prepare(path: Path, size: Sequence[int] = ()) -> OwnImages:
    return own_images.prepare(path, size, path.parent / "data")


def read(own: OwnImages, split: str) -> np.ndarray:
    """The levels of a split: uint8 (N, C, H, W)."""
    images = datasets.load(own, split, Path(own.path).parent / "data")
    return np.rint(255 * everything(images)).astype(np.uint8)


def refused(path: Path, size: Sequence[int] = ()) -> str:
    """The line with which images are refused; nothing that looks prepared is left."""
    line = refusal(lambda: prepare(path, size))
    assert list((path.parent / "data" / "own").glob("*.npy")) == []
    return line


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with the three splits, of 6x4 pictures in colour."""
    folder = tmp_path / "photos"
    for split, count in SPLITS.items():
        for number, picture in enumerate(levels(count, 6, 4, 3)):
            save(folder / split / f"{number}.png", picture)
    return folder


# --- Folders ---


def test_folders_of_splits(photos: Path) -> None:
    own = prepare(photos)
    assert (own.shape, own.binary, own.counts) == ((3, 6, 4), False, SPLITS)
    for split, count in SPLITS.items():
        np.testing.assert_array_equal(
            read(own, split), levels(count, 6, 4, 3).transpose(0, 3, 1, 2)
        )
    both = [read(own, "train"), read(own, "valid")]
    np.testing.assert_array_equal(read(own, "train+valid"), np.concatenate(both))
    images = datasets.load(own, "test", photos.parent / "data")
    assert images.name == own.name == f"photos-{own.fingerprint[:8]}"


def test_names_decide_the_splits(tmp_path: Path) -> None:
    """About a tenth each, in subfolders too, and the same after pictures were added."""
    folder = tmp_path / "photos"
    for number in range(200):
        save(folder / f"{number % 3}" / f"{number}.png", np.full((2, 2), number, np.uint8))
    before = prepare(folder)
    assert before.shape == (1, 2, 2)
    assert sum(before.counts.values()) == 200
    assert all(10 <= before.counts[split] <= 32 for split in ("valid", "test"))
    valid = set(read(before, "valid")[:, 0, 0, 0].tolist())
    assert valid == {
        n for n in range(200) if splits.by_hash(f"{n % 3}/{n}.png", {"valid", "test"}) == "valid"
    }
    for number in range(200, 230):
        save(folder / f"{number}.png", np.full((2, 2), number, np.uint8))
    after = set(read(prepare(folder), "valid")[:, 0, 0, 0].tolist())
    assert {number for number in after if number < 200} == valid


def test_a_missing_split_is_cut_from_the_training_images(photos: Path) -> None:
    for file in (photos / "valid").iterdir():
        file.unlink()
    for number, picture in enumerate(levels(60, 6, 4, 3)):
        save(photos / "train" / f"more-{number}.png", picture)
    counts = prepare(photos).counts
    assert counts["test"] == 3
    assert counts["train"] + counts["valid"] == 65
    assert 1 <= counts["valid"] <= 16


def test_pictures_are_cropped_at_the_centre_and_resized(photos: Path) -> None:
    """A constant stays constant, and what is outside the crop leaves no trace."""
    for file in photos.rglob("*.png"):
        wide = np.zeros((8, 24, 3), np.uint8)
        wide[:, 8:16] = (10, 200, 30)
        save(file, wide)
    own = prepare(photos, (4, 4))
    assert own.shape == (3, 4, 4)
    expected = np.broadcast_to(np.array([10, 200, 30]).reshape(3, 1, 1), (5, 3, 4, 4))
    np.testing.assert_array_equal(read(own, "train"), expected)


def test_reduction_is_antialiased() -> None:
    """Stripes of one pixel become grey, which a filter without a wider support would miss."""
    stripes = np.zeros((64, 64, 1), np.uint8)
    stripes[:, ::2] = 255
    small = picture_folder.resized(stripes, (8, 8))
    assert small.shape == (8, 8, 1)
    assert abs(small.astype(int) - 127).max() <= 8
    assert picture_folder.resized(stripes, (64, 64)) is stripes


def test_binary_pictures_are_recognised(tmp_path: Path) -> None:
    for split, count in SPLITS.items():
        for number, picture in enumerate(levels(count, 6, 4)):
            black = np.where(picture > 99, 255, 0).astype(np.uint8)
            save(tmp_path / "a" / split / f"{number}.png", black)
    own = prepare(tmp_path / "a")
    assert (own.shape, own.binary) == ((1, 6, 4), True)
    assert datasets.is_binary(own)
    images = datasets.load(own, "train", tmp_path / "data")
    assert set(images.batch(torch.arange(5)).unique().tolist()) == {0, 1}


# --- Array files ---


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW", "float", "bool", "01"])
def test_arrays_of_every_layout(tmp_path: Path, layout: str) -> None:
    channels = 3 if "C" in layout else 1
    arrays = {split: levels(n, 6, 4, channels) for split, n in SPLITS.items()}
    expected = arrays
    if layout in ("bool", "01"):
        expected = {split: np.where(a > 99, 255, 0) for split, a in arrays.items()}
    stored = {
        "NHW": lambda a: a[..., 0],
        "NHWC": lambda a: a,
        "NCHW": lambda a: a.transpose(0, 3, 1, 2),
        "float": lambda a: (a / 255).astype(np.float32),
        "bool": lambda a: a > 99,
        "01": lambda a: (a > 99).astype(np.uint8),
    }[layout]
    np.savez(tmp_path / "a.npz", **{split: stored(a) for split, a in arrays.items()})
    own = prepare(tmp_path / "a.npz")
    assert (own.shape, own.counts) == ((channels, 6, 4), SPLITS)
    assert own.binary == (layout in ("bool", "01"))
    for split in SPLITS:
        np.testing.assert_array_equal(read(own, split), expected[split].transpose(0, 3, 1, 2))


def test_one_array_is_split(tmp_path: Path) -> None:
    images = levels(100, 5, 5)
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "b.npz", images)
    first, second = prepare(tmp_path / "a.npy"), prepare(tmp_path / "b.npz", (3, 3))
    assert first.counts == second.counts
    assert second.shape == (1, 3, 3)
    rows = np.concatenate([read(first, split) for split in SPLITS])[:, 0]
    order = np.lexsort(rows.reshape(100, -1).T)
    expected = np.lexsort(images.reshape(100, -1).T)
    np.testing.assert_array_equal(rows[order], images[expected])


# --- Prepared once; changes are noticed ---


def test_images_are_prepared_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = prepare(photos)
    monkeypatch.setattr(own_images, "write_mapped", None)
    assert prepare(photos) == own
    (path,) = (photos.parent / "data/own").glob("*.npy")
    assert path.name == f"photos-6x4-{own.fingerprint[:12]}.npy"
    assert [p.suffix for p in path.parent.iterdir() if p != path] == [".json"]


def test_an_interrupted_preparation_continues(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the block with the damaged picture is decoded again."""
    monkeypatch.setattr(picture_folder, "_BLOCK", 4)
    last = photos / "test" / "2.png"
    whole = last.read_bytes()
    last.write_bytes(whole[:-30])
    assert f"{last} is damaged" in refused(photos)
    last.write_bytes(whole)
    decoded: list[str] = []

    def counted(path: Path) -> np.ndarray:
        decoded.append(path.name)
        return folder.read_picture(path)

    monkeypatch.setattr(picture_folder, "read_picture", counted)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set())  # decode in this process
    own = prepare(photos)
    assert len(decoded) == 2  # ten pictures in blocks of 4, 4 and 2
    np.testing.assert_array_equal(read(own, "test"), levels(3, 6, 4, 3).transpose(0, 3, 1, 2))
    assert list((photos.parent / "data/own").glob(".*")) == []


def test_a_changed_source_is_noticed(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run keeps the images that it began with; a new run gets the new ones."""
    own = prepare(photos)
    before = read(own, "train")
    save(photos / "train" / "new.png", levels(1, 6, 4, 3)[0])
    own_images._warn_of_changes.cache_clear()
    np.testing.assert_array_equal(read(own, "train"), before)
    assert capsys.readouterr().err == (
        f"warning: {photos} has changed since it was prepared; the run uses the images of then\n"
    )
    changed = prepare(photos)
    assert capsys.readouterr().err == (
        f"{photos} has changed since it was prepared: prepares it again\n"
    )
    assert changed.counts["train"] == 6
    assert changed.fingerprint != own.fingerprint
    np.testing.assert_array_equal(read(own, "train"), before)


def test_copied_pictures_are_the_same(photos: Path) -> None:
    """The fingerprint depends on contents, not on times."""
    own = prepare(photos)
    for file in photos.rglob("*.png"):
        os.utime(file, ns=(1, 1))
    assert prepare(photos) == own


def test_images_that_moved(photos: Path) -> None:
    own, data = prepare(photos), photos.parent / "data"
    path = own.prepared_path(data)
    kept = path.read_bytes()
    path.unlink()
    assert len(datasets.load(own, "test", data)) == 3  # prepared again
    assert path.read_bytes() == kept
    path.unlink()
    save(photos / "train" / "0.png", levels(7, 6, 4, 3)[0])
    line = refusal(lambda: datasets.load(own, "test", data))
    assert f"{photos} has changed since the run began (10 images then, 10 now)" in line
    photos.rename(photos.parent / "elsewhere")
    line = refusal(lambda: datasets.load(own, "test", data))
    assert f"there is neither {photos} nor {path}" in line


def test_the_record_survives_json(photos: Path) -> None:
    own = prepare(photos)
    assert OwnImages.from_dict(json.loads(json.dumps(asdict(own)))) == own


# --- Refusals ---


def test_pictures_that_do_not_fit_together(photos: Path) -> None:
    save(photos / "train" / "0.png", levels(1, 8, 4, 3)[0])
    assert refused(photos).endswith(
        "differ in height and width: 6x4 (9), 8x4 (1); give --image-size H W to crop and resize "
        "them"
    )
    save(photos / "train" / "0.png", levels(1, 6, 4)[0])
    assert refused(photos) == (
        f"{photos} mixes 1 grey pictures, such as train/0.png, and 9 in colour, such as "
        "train/1.png: save all as grey or all as RGB"
    )


def test_an_unreadable_picture(photos: Path) -> None:
    file = photos / "valid" / "1.png"
    file.write_text("no picture")
    assert f"{file} is damaged or no image" in refused(photos)


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    assert refused(tmp_path / "empty").startswith(f"{tmp_path / 'empty'} holds no picture")
    line = f"there is no {tmp_path / 'nowhere'}: give a folder of pictures, a .npy or a .npz file"
    assert refused(tmp_path / "nowhere") == line
    (tmp_path / "a.txt").touch()
    assert "neither a folder of pictures nor" in refused(tmp_path / "a.txt")


def test_pictures_outside_the_splits(photos: Path) -> None:
    save(photos / "extra.png", levels(1, 6, 4, 3)[0])
    assert "extra.png is in none of them" in refused(photos)
    (photos / "extra.png").unlink()
    (photos / "train").rename(photos / ".train")
    assert "no pictures in train" in refused(photos)


def test_too_few_images(tmp_path: Path) -> None:
    save(tmp_path / "a" / "0.png", levels(1, 6, 4)[0])
    assert "has 1 images, of which none falls into" in refused(tmp_path / "a")


@pytest.mark.parametrize(
    ("arrays", "line"),
    [
        ({"a": np.full((9, 2, 2), np.nan)}, "holds NaN: give floats in [0, 1], or uint8"),
        ({"a": np.full((9, 2, 2), 255.0)}, "from 255 to 255: give [0, 1]; divide by 255"),
        ({"a": np.full((9, 2, 2), -0.5)}, "holds values from -0.5 to -0.5: give [0, 1]"),
        ({"a": np.zeros((9, 2, 2), np.int64)}, "is int64: give uint8, or floats in [0, 1]"),
        ({"a": np.zeros((9, 2), np.uint8)}, "has the shape (9, 2): give (N, H, W)"),
        ({"a": np.zeros((9, 2, 2, 2), np.uint8)}, "has the shape (9, 2, 2, 2): give (N, H, W)"),
        ({"a": np.zeros((0, 2, 2), np.uint8)}, "has the shape (0, 2, 2, 1): give (N, H, W)"),
        (
            {"train": np.zeros((9, 2, 2), np.uint8), "labels": np.zeros(9)},
            "holds the arrays train, labels: it must hold one array, or train and",
        ),
        (
            {"train": np.zeros((9, 2, 2), np.uint8), "test": np.zeros((9, 3, 2), np.uint8)},
            "differ in image size: train (9, 2, 2), test (9, 3, 2)",
        ),
        ({"a": np.array([None])}, "is damaged or no array file"),
    ],
)
def test_arrays_that_are_no_images(
    tmp_path: Path, arrays: dict[str, np.ndarray], line: str
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    found = refused(path)
    assert str(path) in found
    assert line in found


def test_a_damaged_array_file(tmp_path: Path) -> None:
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_bytes(b"no array")
        assert f"{tmp_path / name} is damaged" in refused(tmp_path / name)
