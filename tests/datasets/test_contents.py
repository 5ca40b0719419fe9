"""The images of each data set, on small synthetic files in the published formats."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import SVHN

import datasets
from datasets import ImageSet, cifar10, static_mnist, svhn
from tests.datasets.conftest import MAKERS
from tests.made_data import (
    Made,
    Server,
    contents,
    everything,
    levels,
    packed_sha256,
    refusal,
    svhn_file,
)

PINNED_DIGITS = {
    "train": "f1b6f435920ecd50e2e7e3ca2e1dd0777d09dba59c01a82039f8ce267a2ad0c7",
    "valid": "ceec05772ce404a1376c8beeec979bc879b3de97d9185ed6657aec7b6db72df1",
    "test": "09c9d5b27072853f1ede67161b2d19733097f09de9316addeb860e1e54124585",
    "train+valid": "c0b21d075104f7cfe5a570e1019106d705a2505dec63fb2b425877e877f050a5",
}
# Of the made images.
PINNED_MNIST = {
    "valid": "9fea28ee6c98cf66467833238be43a5140a3f099570aa5326409df2638dc31a5",
    "test": "fe979a35fbcdc81c8d74a3413ae349cfc1bd4cc880ef49711abbc001fb847448",
}
# If these change, the data set has changed.
PINNED_SVHN = [2, 3, 11, 13, 20, 53]


def test_names_splits_and_shapes() -> None:
    assert {name: datasets.image_shape(name) for name in datasets.NAMES} == {
        "celeba": (3, 64, 64),
        "cifar10": (3, 32, 32),
        "digits": (1, 8, 8),
        "fashion_mnist": (1, 28, 28),
        "fashion_mnist_grey": (1, 28, 28),
        "kmnist": (1, 28, 28),
        "kmnist_grey": (1, 28, 28),
        "mnist": (1, 28, 28),
        "mnist_grey": (1, 28, 28),
        "multi_dsprites": (3, 64, 64),
        "omniglot": (1, 28, 28),
        "omniglot_grey": (1, 28, 28),
        "static_mnist": (1, 28, 28),
        "svhn": (3, 32, 32),
    }
    assert datasets.SPLITS == ("train", "valid", "test", "train+valid")


def test_binary_sets_are_known() -> None:
    binary = [name for name in datasets.NAMES if datasets.is_binary(name)]
    assert binary == [
        *("digits", "fashion_mnist", "kmnist", "mnist", "multi_dsprites", "omniglot"),
        "static_mnist",
    ]


def test_an_unknown_name_or_split_lists_what_there_is(tmp_path: Path) -> None:
    for call in (
        lambda: datasets.load("minst", "train", tmp_path),
        lambda: datasets.image_shape("minst"),
        lambda: datasets.is_binary("minst"),
    ):
        line = refusal(call)
        assert "'minst'" in line
        assert ", ".join(datasets.NAMES) in line
        assert line.endswith("; did you mean mnist?")
    line = refusal(lambda: datasets.load("digits", "validation", tmp_path))
    assert "'validation'" in line
    assert "train, valid, test, train+valid" in line


# Grey images


@pytest.mark.parametrize("name", ["fashion_mnist", "kmnist", "omniglot", "mnist"])
def test_grey_sets_are_binarized_or_keep_their_levels(
    name: str, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training images are drawn again at each reading; the levels are those published."""
    made = MAKERS[name](server, monkeypatch)
    train, valid = (datasets.load(f"{name}_grey", split, tmp_path) for split in ("train", "valid"))
    assert (train.name, len(valid)) == (f"{name}_grey", 4)
    grey = np.rint(255 * np.concatenate([everything(train), everything(valid)])[:, 0])
    published = made.arrays["train"]
    assert sorted(map(bytes, grey.astype(np.uint8))) == sorted(map(bytes, published))

    drawn = datasets.load(name, "train+valid", tmp_path)
    rows = torch.arange(len(published))
    mean = torch.stack([drawn.batch(rows) for _ in range(400)]).mean(0)[:, 0].numpy()
    assert np.abs(mean - published / 255).max() < 5 * np.sqrt(0.25 / 400)
    test = everything(datasets.load(name, "test", tmp_path))
    np.testing.assert_array_equal(test, everything(datasets.load(name, "test", tmp_path)))
    assert set(np.unique(test)) == {0, 1}


# digits, static_mnist and mnist


def test_digits_are_these(tmp_path: Path, no_network: None) -> None:
    nowhere = tmp_path / "nowhere"
    splits = {split: datasets.load("digits", split, nowhere) for split in datasets.SPLITS}
    assert [len(splits[s]) for s in datasets.SPLITS] == [1200, 300, 297, 1500]
    assert {images.shape for images in splits.values()} == {(1, 8, 8)}
    assert {s: packed_sha256(splits[s]) for s in datasets.SPLITS} == PINNED_DIGITS
    together = np.concatenate([everything(splits["train"]), everything(splits["valid"])])
    np.testing.assert_array_equal(together, everything(splits["train+valid"]))
    assert not nowhere.exists()


def test_digits_are_drawn_with_their_grey_levels(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    p = load_digits().images / 16
    splits = (datasets.load("digits", split, tmp_path) for split in ("train", "valid", "test"))
    per_pixel = np.concatenate([everything(images) for images in splits]).sum((0, 1))
    deviation = np.sqrt((p * (1 - p)).sum(0))
    assert (np.abs(per_pixel - p.sum(0)) <= 4 * deviation).all()
    assert per_pixel.sum() > 0


def test_static_mnist_is_what_was_published(
    tmp_path: Path, made_static_mnist: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    a = made_static_mnist.arrays
    a["train+valid"] = np.concatenate([a["train"], a["valid"]])
    for split in datasets.SPLITS:
        images = datasets.load("static_mnist", split, str(tmp_path))
        assert (images.name, images.split) == ("static_mnist", split)
        bits = np.unpackbits(a[split], axis=1).reshape(-1, 1, 28, 28)
        np.testing.assert_array_equal(everything(images), bits)
    shown = capfd.readouterr()
    assert "100%" in shown.err
    assert shown.out == ""


ROW = b" ".join([b"0", b"1"] * 392) + b"\n"


def test_text_rows_are_packed_in_order(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(ROW + ROW[::-1][1:] + b"\n")
    assert static_mnist.pack_amat(tmp_path / "rows").tolist() == [
        [0b01010101] * 98,
        [0b10101010] * 98,
    ]


def test_mnist_trains_on_fresh_draws(tmp_path: Path, made_mnist: Made) -> None:
    grey = made_mnist.arrays["train"]
    for split, expected in (("train", grey[:8]), ("train+valid", grey)):
        images = datasets.load("mnist", split, tmp_path)
        assert (len(images), images.shape) == (len(expected), (1, 28, 28))
        generator = torch.Generator().manual_seed(0)
        drawn = [images.batch(torch.arange(len(images)), generator) for _ in range(300)]
        assert not torch.equal(drawn[0], drawn[1])
        mean = torch.stack(drawn).mean(0)[:, 0].double().numpy()
        p = expected / 255
        deviation = np.abs(mean - p) / np.sqrt(np.maximum(p * (1 - p), 1e-12) / 300)
        assert deviation.max() < 6


def test_mnist_is_scored_on_fixed_draws(tmp_path: Path, made_mnist: Made) -> None:
    sources = {"valid": made_mnist.arrays["train"][8:], "test": made_mnist.arrays["test"]}
    for split, grey in sources.items():
        images = datasets.load("mnist", split, tmp_path)
        drawn = everything(images)
        assert drawn.shape == (len(grey), 1, 28, 28)
        np.testing.assert_array_equal(drawn, everything(images))
        np.testing.assert_array_equal(drawn, everything(datasets.load("mnist", split, tmp_path)))
        p = grey / 255
        assert abs(drawn.sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())
        assert np.corrcoef(drawn.flat, p.flat)[0, 1] > 0.5
        assert packed_sha256(images) == PINNED_MNIST[split]


# cifar10


def images_of(split: ImageSet) -> list[bytes]:
    """The images' bytes, each (H, W, C)."""
    bytes_of = np.rint(255 * everything(split)).astype(np.uint8).transpose(0, 2, 3, 1)
    return [image.tobytes() for image in bytes_of]


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


# svhn


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
