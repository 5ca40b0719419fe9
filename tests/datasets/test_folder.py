"""Images from a folder: which files are read, and every kind of error."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.folder import SUFFIXES, load_folder, read_picture
from datasets.images import ColourImages, PackedImages, Shape
from tests.made_data import everything, levels, refusal

COLOUR: Shape = (3, 5, 7)
GREY: Shape = (1, 5, 7)


def save(path: Path, array: np.ndarray, **options: Any) -> None:
    Image.fromarray(array).save(path, **options)


def refused(path: Path, shape: Shape = GREY, *, binary: bool = False) -> str:
    """The one-line error for a folder."""
    return refusal(lambda: load_folder(path, shape, binary=binary))


# What is read


def test_colour_images(tmp_path: Path) -> None:
    """Sorted by name, as level / 255, from every lossless format."""
    pictures = levels(5, 5, 7, 3)
    names = ["10.png", "9.bmp", "B.PNG", "a.tiff", "b.webp"]  # sorted as text
    for name, picture in reversed(list(zip(names, pictures, strict=True))):
        save(tmp_path / name, picture, **({"lossless": True} if name == "b.webp" else {}))
    images, found = load_folder(tmp_path, COLOUR, binary=False)
    assert isinstance(images, ColourImages)
    assert found == names
    assert (images.name, images.split, images.shape) == (tmp_path.name, "folder", COLOUR)
    expected = pictures.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(everything(images), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_binary_images_are_packed(tmp_path: Path, channels: int) -> None:
    pixels = levels(4, 5, 7, channels) > 127
    for i, picture in enumerate(pixels):
        save(tmp_path / f"{i}.png", (255 * picture).astype(np.uint8).squeeze())
    images, _ = load_folder(tmp_path, (channels, 5, 7), binary=True)
    assert isinstance(images, PackedImages)
    np.testing.assert_array_equal(everything(images), pixels.transpose(0, 3, 1, 2))
    some = images.batch(torch.tensor([2, 0]))
    np.testing.assert_array_equal(some, pixels[[2, 0]].transpose(0, 3, 1, 2))


def test_grey_images_of_every_kind(tmp_path: Path) -> None:
    """Grey, one bit, grey in colour channels or a palette, and an opaque alpha channel."""
    bright = np.where(levels(1, 5, 7)[0] > 127, 255, 0).astype(np.uint8)
    grey = Image.fromarray(bright)
    opaque = grey.convert("RGBA")
    kinds = {
        "0.png": grey,
        "1.png": grey.convert("1"),
        "2.png": grey.convert("RGB"),
        "3.png": grey.convert("RGB").convert("P"),
        "4.gif": grey,
        "5.png": grey.convert("LA"),
        "6.png": opaque,
        "7.tif": grey.convert("1"),
    }
    for name, image in kinds.items():
        image.save(tmp_path / name)
    images, names = load_folder(tmp_path, GREY, binary=True)
    assert names == list(kinds)
    expected = np.broadcast_to(bright > 0, (len(kinds), *GREY))
    np.testing.assert_array_equal(everything(images), expected)


def test_jpeg_is_read_as_pillow_does(tmp_path: Path) -> None:
    save(tmp_path / "a.jpg", levels(1, 5, 7, 3)[0])
    with Image.open(tmp_path / "a.jpg") as image:
        np.testing.assert_array_equal(read_picture(tmp_path / "a.jpg"), np.asarray(image))


def test_photographs_are_turned(tmp_path: Path) -> None:
    """Orientation tag 6 means a quarter turn clockwise."""
    picture = levels(1, 5, 7)[0]
    image = Image.fromarray(picture)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png")[..., 0], np.rot90(picture, -1))


def test_other_files_are_ignored(tmp_path: Path) -> None:
    """Files without an image's suffix, hidden ones and folders."""
    save(tmp_path / "a.png", levels(1, 5, 7)[0])
    (tmp_path / "labels.csv").touch()
    (tmp_path / "._a.png").touch()
    (tmp_path / "b.png").mkdir()
    _, names = load_folder(tmp_path, GREY, binary=False)
    assert names == ["a.png"]


# What is refused


def test_folders_without_images(tmp_path: Path) -> None:
    assert (
        refused(tmp_path / "no")
        == f"there is no folder {tmp_path / 'no'}: give one that holds images"
    )
    assert "there is no folder" in refused(tmp_path / ("n" * 300))
    (tmp_path / "file").touch()
    assert "there is no folder" in refused(tmp_path / "file")
    line = refused(tmp_path)
    assert f"{tmp_path} holds no image" in line
    assert all(suffix in line for suffix in SUFFIXES)


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s not in (".jpeg", ".tif")])
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_files(tmp_path: Path, suffix: str, damage: str) -> None:
    path = tmp_path / f"a{suffix}"
    save(path, levels(1, 50, 70)[0])
    whole = path.read_bytes()
    body = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no image at all\n" * 100}
    path.write_bytes(body[damage])
    line = refused(tmp_path, (1, 50, 70))
    assert line.startswith(f"{path} is damaged or no image")


def test_formats_that_run_programs_are_not_tried(tmp_path: Path) -> None:
    """PostScript in a file named like an image is not tried."""
    Image.new("L", (7, 5)).save(tmp_path / "a.png", format="EPS")
    assert "a.png is damaged or no image" in refused(tmp_path)


def test_another_size(tmp_path: Path) -> None:
    save(tmp_path / "a.png", levels(1, 7, 5)[0])
    assert refused(tmp_path) == (
        f"{tmp_path / 'a.png'} is 5 wide and 7 high but the model's images are 7 wide and 5 high"
    )


def test_colour_for_grey_and_grey_for_colour(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture = levels(1, 5, 7, 3)[0]
    save(path, picture)
    assert f"{path} is in colour but the model's images are grey" in refused(tmp_path)
    picture[..., 1:] = picture[..., :1]
    picture[4, 6, 2] ^= 1  # the smallest difference
    save(path, picture)
    assert f"{path} is in colour but the model's images are grey" in refused(tmp_path)
    save(path, picture[..., 0])
    assert f"{path} is grey but the model's images are in colour" in refused(tmp_path, COLOUR)


def test_levels_for_binary_images(tmp_path: Path) -> None:
    picture = np.where(levels(1, 5, 7)[0] > 127, 255, 0).astype(np.uint8)
    save(tmp_path / "a.png", picture)
    picture[3, 2] = 254
    save(tmp_path / "b.png", picture)
    line = refused(tmp_path, binary=True)
    assert line.startswith(f"{tmp_path / 'b.png'} has levels between")
    assert "such as 254" in line
    assert "binarize it first, for example at 128" in line


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "L", "1"])
def test_transparent_pixels(tmp_path: Path, mode: str) -> None:
    """In an alpha channel, or as a transparent level or colour."""
    path = tmp_path / "a.png"
    grey = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8))
    if mode in ("LA", "RGBA"):
        grey.putalpha(Image.fromarray(np.array([[255, 255], [254, 255]], np.uint8)))
        grey.convert(mode).save(path)
    else:
        grey.convert(mode).save(path, transparency=0)
    assert f"{path} is transparent in places" in refused(tmp_path, (1, 2, 2))


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "CMYK"), ("a.tif", "F"), ("a.png", "I;16"), ("a.tif", "LAB")]
)
def test_pixels_of_other_kinds(tmp_path: Path, name: str, mode: str) -> None:
    """CMYK, floating point, 16 bits and LAB."""
    Image.new(mode, (7, 5)).save(tmp_path / name)
    assert f"{tmp_path / name} has pixels of Pillow's mode {mode}" in refused(tmp_path)


@pytest.mark.parametrize("suffix", [".gif", ".png", ".tif", ".webp"])
def test_several_frames(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    frames = [Image.fromarray(frame) for frame in levels(3, 5, 7)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert f"{path} holds 3 frames" in refused(tmp_path)


@pytest.mark.parametrize("limit", [34, 17])
def test_decompression_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """35 pixels: Pillow warns above its limit and raises above twice its limit."""
    path = tmp_path / "a.png"
    save(path, levels(1, 5, 7)[0])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert refused(tmp_path) == f"{path} has more than {limit} pixels: give a smaller image"


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "a.png", levels(1, 5, 7)[0])

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    assert f"cannot read {tmp_path / 'a.png'} (Permission denied)" in refused(tmp_path)
