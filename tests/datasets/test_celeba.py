"""CelebA, on ten synthetic images in its published layout."""

import errno
import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from PIL import Image
from torchvision import transforms
from torchvision.datasets import CelebA

import datasets
from datasets import celeba, mapped
from datasets.images import MappedImages
from tests.made_data import everything, forbid_network, refusal

COUNTS = {"train": 5, "valid": 3, "test": 2}
SPLIT_OF_IMAGE = [0, 0, 1, 0, 2, 1, 0, 0, 2, 1]
NAMES = [f"{number:06}.jpg" for number in range(1, 11)]
NEEDED = ("img_align_celeba.zip", "list_eval_partition.txt")


class Published:
    """The published files, in the folder into which users put them: `DATA_DIR/celeba`."""

    def __init__(self, data_dir: Path) -> None:
        self.folder = data_dir / "celeba"
        self.archive = self.folder / "img_align_celeba.zip"
        self.partition = self.folder / "list_eval_partition.txt"
        self.extracted = self.folder / "img_align_celeba"
        self.file = data_dir / "celeba.npy"

    def extract(self) -> None:
        with zipfile.ZipFile(self.archive) as archive:
            archive.extractall(self.folder)

    def extract_alone(self) -> None:
        self.extract()
        self.archive.unlink()

    def files(self) -> set[str]:
        return {str(p.relative_to(self.file.parent)) for p in self.file.parent.rglob("*")}


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    forbid_network(monkeypatch)
    published = Published(tmp_path)
    published.folder.mkdir()
    pictures = {name: picture(seed) for seed, name in enumerate(NAMES)}
    lines = {
        "list_eval_partition.txt": "{} {}",
        "identity_CelebA.txt": "{} 7",
        "list_attr_celeba.txt": "{}  1 -1",
        "list_bbox_celeba.txt": "{}    95  71 226 313",
        "list_landmarks_align_celeba.txt": "{} 69  109 106",
    }
    headers = {
        "list_attr_celeba.txt": "10\nSmiling Young \n",
        "list_bbox_celeba.txt": "10\nimage_id x_1 y_1 width height\n",
        "list_landmarks_align_celeba.txt": "10\nlefteye_x lefteye_y righteye_x\n",
    }
    for name, line in lines.items():
        rows = [line.format(*row) + "\n" for row in zip(NAMES, SPLIT_OF_IMAGE, strict=True)]
        (published.folder / name).write_text(headers.get(name, "") + "".join(rows))
    published.archive.write_bytes(zipped(pictures))
    monkeypatch.setattr(celeba, "COUNTS", COUNTS)
    trust_files(published, monkeypatch)
    return published


def trust_files(published: Published, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept the files of the test as the published ones."""
    file_list = [
        (f"address of {p.name}", hashlib.md5(p.read_bytes()).hexdigest(), p.name)
        for p in sorted(published.folder.iterdir())
        if p.is_file()
    ]
    monkeypatch.setattr(CelebA, "file_list", file_list)


def picture(seed: int, size: tuple[int, int] = (178, 218), mode: str = "RGB") -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (14, 11, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size).convert(mode).save(file, "JPEG", quality=90)
    return file.getvalue()


def zipped(pictures: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, body in pictures.items():
            archive.writestr(f"img_align_celeba/{name}", body)
    return file.getvalue()


def numbers(split: str) -> list[int]:
    """The numbers of the images of a split, from 0."""
    order = [
        [i for i, its_split in enumerate(SPLIT_OF_IMAGE) if its_split == number]
        for number in range(3)
    ]
    train, valid, test = order
    return {"train": train, "valid": valid, "test": test, "train+valid": train + valid}[split]


# Contents


@pytest.mark.parametrize("split", datasets.SPLITS)
def test_images_are_cropped_and_resized(published: Published, split: str) -> None:
    images = datasets.load("celeba", split, published.file.parent)
    assert isinstance(images, MappedImages)
    assert (images.name, images.split, images.shape) == ("celeba", split, (3, 64, 64))
    assert len(images) == len(numbers(split))
    expected = []
    for number in numbers(split):
        with Image.open(io.BytesIO(picture(number))) as image:
            crop = image.crop((15, 35, 15 + 148, 35 + 148))
            expected.append(np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR)))
    levels = np.stack(expected).transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_array_equal(everything(images), levels / np.float32(255))


@pytest.mark.parametrize("split", COUNTS)
def test_images_are_torchvisions(published: Published, split: str) -> None:
    published.extract()
    chain = transforms.Compose(
        [transforms.CenterCrop(148), transforms.Resize(64), transforms.ToTensor()]
    )
    theirs = CelebA(str(published.file.parent), split=split, transform=chain)
    ours = everything(datasets.load("celeba", split, published.file.parent))
    np.testing.assert_array_equal(ours, np.stack([image.numpy() for image, _ in theirs]))


def test_the_published_counts_are_the_default() -> None:
    assert celeba.COUNTS == {"train": 162_770, "valid": 19_867, "test": 19_962}
    assert sum(celeba.COUNTS.values()) == 202_599


def test_the_file_is_in_the_promised_format(published: Published) -> None:
    before = published.files()
    datasets.load("celeba", "test", published.file.parent)
    assert published.files() == before | {"celeba.npy", "celeba.json"}
    array = np.load(published.file)
    assert (array.dtype, array.shape) == (np.uint8, (10, 64, 64, 3))
    record = json.loads(published.file.with_suffix(".json").read_text())
    assert record["sha256"] == hashlib.sha256(published.file.read_bytes()).hexdigest()
    assert record["bytes"] == published.file.stat().st_size


@pytest.mark.parametrize("also_archive", [True, False])
def test_an_extracted_folder_gives_the_same_images(
    published: Published, also_archive: bool
) -> None:
    first = everything(datasets.load("celeba", "train", published.file.parent))
    published.file.unlink()
    if also_archive:
        published.extract()
    else:
        published.extract_alone()
    again = everything(datasets.load("celeba", "train", published.file.parent))
    np.testing.assert_array_equal(first, again)


def test_the_prepared_file_needs_none_of_the_published(
    published: Published, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first = everything(datasets.load("celeba", "valid", published.file.parent))
    shown = capfd.readouterr()
    assert "celeba.npy: 100%" in shown.err
    assert shown.out == ""
    shutil.rmtree(published.folder)
    again = everything(datasets.load("celeba", "valid", published.file.parent))
    np.testing.assert_array_equal(first, again)
    assert capfd.readouterr() == ("", "")


def test_a_damaged_file_is_refused_and_left_alone(published: Published) -> None:
    datasets.load("celeba", "valid", published.file.parent)
    body = published.file.read_bytes()[:-1]
    published.file.write_bytes(body)
    line = refusal(lambda: datasets.load("celeba", "valid", published.file.parent))
    assert f"{published.file} is damaged or another file" in line
    assert published.file.read_bytes() == body


# Interrupted preparations


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_preparation_leaves_nothing_and_can_be_repeated(
    published: Published, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    before = published.files()
    while_writing: set[str] = set()
    chunks = mapped._npy_chunks

    def broken(*args: Any) -> Iterator[bytes]:
        for number, chunk in enumerate(chunks(*args)):
            if number == 5:
                while_writing.update(published.files() - before)
                raise failure
            yield chunk

    with monkeypatch.context() as patch:
        patch.setattr(mapped, "_npy_chunks", broken)
        if isinstance(failure, KeyboardInterrupt):
            with pytest.raises(KeyboardInterrupt):
                datasets.load("celeba", "valid", published.file.parent)
        else:
            line = refusal(lambda: datasets.load("celeba", "valid", published.file.parent))
            assert f"cannot write {published.file} (No space left)" in line
    assert [name.endswith(".part") for name in while_writing] == [True]
    assert published.files() == before
    assert len(datasets.load("celeba", "valid", published.file.parent)) == 3


def test_a_preparation_killed_before_a_rename_can_be_repeated(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def killed_before(name: str, source: Any, target: Any) -> None:
        if Path(target).name == name:
            raise KeyboardInterrupt
        replace(source, target)

    for name in ("celeba.json", "celeba.npy"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", partial(killed_before, name))
            with pytest.raises(KeyboardInterrupt):
                datasets.load("celeba", "valid", published.file.parent)
        assert not published.file.exists()
    (published.file.parent / ".celeba.npy.0123abcd.part").write_bytes(b"left by a power cut")
    assert len(datasets.load("celeba", "valid", published.file.parent)) == 3


# Files with other contents


def test_an_archive_or_partition_of_another_kind_is_refused(published: Published) -> None:
    for path in (published.archive, published.partition):
        body = path.read_bytes()
        for wrong in (body[: len(body) // 2], b"<html>quota exceeded</html>", b""):
            path.write_bytes(wrong)
            line = refusal(lambda: datasets.load("celeba", "valid", published.file.parent))
            assert f"{path} is not the published file" in line
            assert "MD5" in line
            assert path.read_bytes() == wrong
        path.write_bytes(body)
    assert "celeba.npy" not in published.files()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "No such file"),
        (b"", "cannot identify"),
        (b"<html>not found</html>", "cannot identify"),
        (picture(3)[:-900], "truncated"),
        (picture(3, size=(64, 64)), "it is RGB of 64x64 where RGB of 178x218 is expected"),
        (picture(3, mode="L"), "it is L of 178x218 where RGB of 178x218 is expected"),
    ],
)
def test_a_picture_of_another_kind_is_named(
    published: Published, body: bytes | None, reason: str
) -> None:
    published.extract_alone()
    path = published.extracted / NAMES[3]
    path.unlink()
    if body is not None:
        path.write_bytes(body)
    before = published.files()
    line = refusal(lambda: datasets.load("celeba", "valid", published.file.parent))
    assert f"image {NAMES[3]} in {published.extracted} cannot be used" in line
    assert reason in line
    assert f"put the published img_align_celeba.zip into {published.folder}" in line
    assert published.files() == before


def test_a_picture_that_the_archive_lacks_is_named(
    published: Published, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.archive.write_bytes(zipped({name: picture(0) for name in NAMES[:-1]}))
    trust_files(published, monkeypatch)
    line = refusal(lambda: datasets.load("celeba", "valid", published.file.parent))
    assert f"image {NAMES[-1]} in {published.extracted} cannot be used" in line
    assert "celeba.npy" not in published.files()


# Downloads


def download_from(
    source: Path, monkeypatch: pytest.MonkeyPatch, asked: list[tuple[str, str]]
) -> None:
    def download(file_id: str, root: str, filename: str, md5: str) -> None:
        asked.append((file_id, filename))
        shutil.copyfile(source / filename, Path(root, filename))

    monkeypatch.setattr("torchvision.datasets.utils.download_file_from_google_drive", download)


@pytest.mark.parametrize("missing", [NEEDED, NEEDED[:1], NEEDED[1:]])
def test_what_is_missing_is_downloaded_and_kept(
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    missing: tuple[str, ...],
) -> None:
    asked: list[tuple[str, str]] = []
    data_dir = tmp_path / "new" / "data"
    for name in set(NEEDED) - set(missing):
        (data_dir / "celeba").mkdir(parents=True)
        shutil.copyfile(published.folder / name, data_dir / "celeba" / name)
    download_from(published.folder, monkeypatch, asked)
    assert len(datasets.load("celeba", "test", data_dir)) == 2
    assert sorted(asked) == [(f"address of {name}", name) for name in sorted(missing)]
    assert {p.name for p in (data_dir / "celeba").iterdir()} == set(NEEDED)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (RuntimeError("'gdown' is required.\nInstall it"), "'gdown' is required. Install it"),
        (OSError("connection reset"), "connection reset"),
        (Exception("Too many users\n\n\thave viewed this file"), "Too many users have viewed"),
    ],
)
def test_a_download_that_fails_says_what_to_put_where(
    published: Published,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Exception,
    reason: str,
) -> None:
    def fail(file_id: str, root: str, filename: str, md5: str) -> NoReturn:
        Path(root, filename).write_bytes(b"half of it")
        raise failure

    monkeypatch.setattr("torchvision.datasets.utils.download_file_from_google_drive", fail)
    data_dir = tmp_path / "new"
    line = refusal(lambda: datasets.load("celeba", "train", data_dir))
    assert f"{data_dir / 'celeba.npy'} is missing and cannot be made" in line
    assert reason in line
    assert "put img_align_celeba.zip and list_eval_partition.txt from" in line
    assert f"into {data_dir / 'celeba'} by hand" in line
    assert [p for p in data_dir.rglob("*") if p.is_file()] == []


def test_an_interrupted_download_leaves_no_file(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(file_id: str, root: str, filename: str, md5: str) -> NoReturn:
        Path(root, filename).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("torchvision.datasets.utils.download_file_from_google_drive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        datasets.load("celeba", "train", tmp_path / "new")
    assert [p for p in (tmp_path / "new").rglob("*") if p.is_file()] == []


def test_a_data_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refusal(
        lambda: datasets.load("celeba", "test", tmp_path / "file")
    )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
