"""Colour images, and CIFAR10 and SVHN on small made files.

What they share with the other downloaded sets (cache, downloads, damage) is in test_datasets.py.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import SVHN

import datasets
from datasets import ImageSet, TrainingBatches, cifar10, svhn
from datasets.images import ColourImages, MappedImages
from datasets.mapped import open_mapped, record_path, write_mapped
from tests.made_data import (
    Made,
    Server,
    contents,
    everything,
    forbid_network,
    levels,
    make_cifar10,
    make_svhn,
    refusal,
    serving,
    svhn_file,
)

# A change of these is a change of the data set.
PINNED_SVHN = [2, 3, 11, 13, 20, 53]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def made_cifar10(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_cifar10(server, monkeypatch)


@pytest.fixture
def made_svhn(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_svhn(server, monkeypatch)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)


def images_of(split: ImageSet) -> list[bytes]:
    """The images as the bytes that they are made of, (H, W, C)."""
    bytes_of = np.rint(255 * everything(split)).astype(np.uint8).transpose(0, 2, 3, 1)
    return [image.tobytes() for image in bytes_of]


# --- Image sets ---


@pytest.mark.parametrize("kind", [ColourImages, MappedImages])
def test_a_batch_is_the_levels_over_255(kind: type[ImageSet]) -> None:
    stored = torch.from_numpy(levels(9, 5, 7, 3))
    images = kind("made", "train", (3, 5, 7), stored)
    assert (len(images), images.shape) == (9, (3, 5, 7))
    index = torch.tensor([8, 0, 3, 0])
    batch = images.batch(index)
    assert (batch.dtype, batch.shape) == (torch.float32, (4, 3, 5, 7))
    assert batch.is_contiguous()
    expected = stored.numpy()[index.numpy()].transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_array_equal(batch.numpy(), expected / np.float32(255))


def test_every_level_comes_back_as_it_was() -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    batch = ColourImages("made", "train", (3, 16, 16), stored).batch(torch.tensor([0]))
    assert (batch.min(), batch.max()) == (0, 1)
    for channel in batch[0]:
        assert (channel.flatten() * 255).round().int().tolist() == list(range(256))


def test_colour_images_move_whole() -> None:
    images = ColourImages("made", "valid", (3, 2, 4), torch.zeros((5, 2, 4, 3)).byte())
    moved = images.to("meta")
    assert type(moved) is ColourImages
    assert [i.device.type for i in (images, moved)] == ["cpu", "meta"]
    assert moved.index_device.type == "meta"
    assert (moved.name, moved.split, moved.shape, len(moved)) == ("made", "valid", (3, 2, 4), 5)


def test_mapped_images_stay_and_their_batches_move() -> None:
    images = MappedImages("made", "valid", (3, 2, 4), torch.from_numpy(levels(5, 2, 4, 3)))
    moved = images.to("meta")
    assert type(moved) is MappedImages
    assert [i.device.type for i in (images, moved)] == ["cpu", "meta"]
    assert moved.index_device.type == "cpu"
    assert (moved.name, moved.split, moved.shape, len(moved)) == ("made", "valid", (3, 2, 4), 5)
    batch = moved.batch(torch.tensor([4, 2, 2]))
    assert (batch.device.type, batch.shape) == ("meta", (3, 3, 2, 4))
    back = moved.to("cpu")
    np.testing.assert_array_equal(everything(back), everything(images))


def test_training_batches_of_mapped_images_are_those_of_images_in_memory() -> None:
    stored = torch.from_numpy(levels(10, 4, 4, 3))
    ours, theirs = (
        TrainingBatches(kind("made", "train", (3, 4, 4), stored), 4, seed=1)
        for kind in (MappedImages, ColourImages)
    )
    for step in range(5):
        assert torch.equal(ours(step), theirs(step))


# --- Memory-mapped files ---


@pytest.fixture
def mapped(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A file larger than what is sampled of it."""
    array = levels(600, 64, 64, 3)
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
        warnings.simplefilter("error")  # as torch warns of memory that cannot be written
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
    assert "delete it to have it made again" in line
    assert path.read_bytes() == body


def test_a_mapped_file_of_another_shape_is_refused(mapped: tuple[Path, np.ndarray]) -> None:
    path, _ = mapped
    line = refusal(lambda: open_mapped(path, (601, 64, 64, 3)))
    assert f"{path} is damaged or another file" in line
    assert "uint8 (600, 64, 64, 3) where uint8 (601, 64, 64, 3) is expected" in line


@pytest.mark.parametrize("body", [None, b"", b"{", b"[]", b'{"bytes": 1}', b"\xff"])
def test_a_mapped_file_without_its_check_sums_is_refused(
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
    assert "No such file" in line or f"check sums of {path}: delete both" in line


def test_a_folder_in_the_place_of_a_mapped_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made.npy").mkdir()
    line = refusal(lambda: open_mapped(tmp_path / "made.npy", (1,)))
    assert f"{tmp_path / 'made.npy'} is a folder" in line


# --- CIFAR10 ---


def test_cifar10_is_what_was_published(tmp_path: Path, made_cifar10: Made) -> None:
    splits = {split: datasets.load("cifar10", split, tmp_path) for split in datasets.SPLITS}
    assert {s: len(splits[s]) for s in splits} == {
        "train": 11,
        "valid": 4,
        "test": 6,
        "train+valid": 15,
    }
    for split, images in splits.items():
        assert (images.name, images.split, images.shape) == ("cifar10", split, (3, 32, 32))
    found = {split: images_of(images) for split, images in splits.items()}
    published = {s: [i.tobytes() for i in made_cifar10.arrays[s]] for s in ("train", "test")}
    assert sorted(found["train+valid"]) == sorted(published["train"])
    assert sorted(found["test"]) == sorted(published["test"])
    assert not set(found["train"]) & set(found["valid"])
    assert found["valid"] + found["train"] == found["train+valid"]


def test_cifar10_has_its_validation_images_by_hash(tmp_path: Path, made_cifar10: Made) -> None:
    train = made_cifar10.arrays["train"]
    hashes = cifar10.image_hashes(train)
    smallest = sorted(range(len(train)), key=lambda i: hashes[i])[:4]
    valid = images_of(datasets.load("cifar10", "valid", tmp_path))
    assert valid == [train[i].tobytes() for i in smallest]


@pytest.mark.parametrize("bit", [1, 128])
def test_a_change_of_any_one_or_two_bytes_changes_an_images_hash(bit: int) -> None:
    image = levels(1, 32, 32, 3)
    changed = np.repeat(image, 2 * 3072, 0).reshape(2, 3072, -1)
    each = np.arange(3072)
    changed[:, each, each] ^= bit
    changed[1, each, each - 4] ^= bit
    images = np.concatenate([image, *changed.reshape(2, 3072, 32, 32, 3)])
    assert len(set(cifar10.image_hashes(images).tolist())) == 1 + 2 * 3072


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_cifar10_in_any_order_gives_the_same_splits(
    tmp_path: Path, made_cifar10: Made, no_network: None, save: Callable[..., None]
) -> None:
    a = made_cifar10.arrays
    rng = np.random.default_rng(0)
    folders = []
    for number in range(3):
        orders = {name: rng.permutation(len(a[name])) for name in ("train", "test")}
        shuffled = {name: a[name][orders[name.partition("_")[0]]] for name in a}
        folders.append(tmp_path / str(number))
        folders[-1].mkdir()
        save(folders[-1] / "cifar10.npz", **shuffled)
    for split in datasets.SPLITS:
        first, *others = (everything(datasets.load("cifar10", split, f)) for f in folders)
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_a_cifar10_file_with_an_image_twice_is_refused(
    tmp_path: Path, made_cifar10: Made, no_network: None
) -> None:
    a = dict(made_cifar10.arrays)
    a["train"] = a["train"].copy()
    a["train"][3] = a["train"][4]
    np.savez(tmp_path / "cifar10.npz", allow_pickle=False, **a)
    line = refusal(lambda: datasets.load("cifar10", "valid", tmp_path))
    assert f"{tmp_path / 'cifar10.npz'} is damaged or another file" in line
    assert "'train' has SHA-256" in line
    assert len(datasets.load("cifar10", "test", tmp_path)) == 6


def test_an_archive_of_cifar10_that_holds_something_else_is_refused(
    tmp_path: Path, made_cifar10: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = cifar10.CONTENTS | {"test_labels": contents({"": np.zeros(6, np.uint8)})[""]}
    monkeypatch.setattr(cifar10, "CONTENTS", expected)
    line = refusal(lambda: datasets.load("cifar10", "test", tmp_path))
    assert f"{tmp_path / 'cifar10.npz'} was not made" in line
    assert "'test_labels' has SHA-256" in line
    assert list(tmp_path.iterdir()) == []


# --- SVHN ---


def test_svhn_is_what_was_published(tmp_path: Path, made_svhn: Made) -> None:
    splits = {split: datasets.load("svhn", split, tmp_path) for split in datasets.SPLITS}
    for split, images in splits.items():
        assert (images.name, images.split, images.shape) == ("svhn", split, (3, 32, 32))
    found = {split: images_of(images) for split, images in splits.items()}
    assert found["test"] == [image.tobytes() for image in made_svhn.arrays["test"]]
    together = [image.tobytes() for image in made_svhn.arrays["train"]]
    assert found["train+valid"] == together
    assert [len(found[split]) for split in ("train", "valid")] == [8, 5]
    assert sorted(found["train"] + found["valid"]) == sorted(together)
    for split in ("train", "valid"):  # in the published order
        numbers = [together.index(image) for image in found[split]]
        assert numbers == sorted(numbers)


def test_svhns_validation_images_are_these() -> None:
    first = np.arange(73257).reshape(-1, 1)
    valid, train = (svhn._rows(first, split)[:, 0] for split in ("valid", "train"))
    assert (len(valid), len(train)) == (6000, 67257)
    assert sorted([*valid, *train]) == list(range(73257))
    assert valid[:6].tolist() == PINNED_SVHN


@pytest.mark.parametrize(
    ("images", "labels", "expected"),
    [
        (levels(12, 32, 32, 3), 12, "'train' is uint8 (12, 32, 32, 3) where uint8 (13, 32, 32, 3)"),
        (levels(13, 28, 28, 3), 13, "'train' is uint8 (13, 28, 28, 3)"),
        (levels(13, 32, 32, 3) / 255, 13, "'train' is float64"),
        (levels(13, 32, 32, 3), 12, "'train_labels' is uint8 (12,)"),
    ],
)
def test_svhn_files_with_something_else_are_refused(
    tmp_path: Path,
    made_svhn: Made,
    monkeypatch: pytest.MonkeyPatch,
    images: np.ndarray,
    labels: int,
    expected: str,
) -> None:
    body = svhn_file(images, np.ones(labels, np.uint8))
    url, name, _ = SVHN.split_list["train"]
    made_svhn.files[name] = body
    entry = [url, name, hashlib.md5(body).hexdigest()]
    monkeypatch.setitem(SVHN.split_list, "train", entry)
    line = refusal(lambda: datasets.load("svhn", "train", tmp_path))
    assert f"{tmp_path / 'svhn.npz'} was not made" in line
    assert expected in line
    assert list(tmp_path.iterdir()) == []
