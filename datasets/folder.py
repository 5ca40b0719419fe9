"""Images of the user's own, in a folder of picture files.

Pictures are read as data: no resizing, no thresholding, nothing guessed. What does not fit the
model as it is, is refused by name.
"""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from runtime.errors import UserError

from .cache import reading
from .images import ColourImages, ImageSet, PackedImages, Shape

if TYPE_CHECKING:
    from PIL import Image

# What Pillow calls the formats that are read, and their files' suffixes. Others are not even tried:
# it would run Ghostscript on PostScript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# Modes of Pillow with 8 bits to the channel at most, in the display's own colours.
_GREY, _COLOUR = {"1", "L", "LA"}, {"P", "PA", "RGB", "RGBA"}


def load_folder(path: Path, shape: Shape, *, binary: bool) -> tuple[ImageSet, list[str]]:
    """All images in a folder, not in folders within it, and their files' names, in that order.

    They are the files whose suffix is one of `SUFFIXES`, sorted by name. Each must be of `shape`
    (C, H, W). For C = 1 colour pictures will do whose channels are all equal; for C = 3 grey
    pictures will not. ``binary`` images may hold black (0) and white (255) alone. The set is called
    like the folder, its split "folder".

    Raises:
        UserError: there is no such folder, no image in it, or one that is damaged or of another
            kind.
    """
    folder = Path(os.path.expanduser(path))
    files = _image_files(folder)
    channels, height, width = shape
    images = np.empty((len(files), height, width, channels), np.uint8)
    for image, file in zip(images, files, strict=True):
        image[:] = _fitting(read_picture(file), file, shape)
        if binary:
            _require_binary(image, file)
    name = folder.resolve().name
    names = [file.name for file in files]
    if binary:
        return PackedImages.pack(name, "folder", images.transpose(0, 3, 1, 2)), names
    return ColourImages(name, "folder", shape, torch.from_numpy(images)), names


def _image_files(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):  # without an error, whatever the path
        raise UserError(f"there is no folder {folder}: give one that holds images")
    with reading(folder):
        files = sorted(_visible_images(folder.iterdir()), key=lambda file: file.name)
    if not files:
        raise UserError(f"{folder} holds no image: put some there, {', '.join(SUFFIXES)}")
    return files


def _visible_images(paths: Iterable[Path]) -> list[Path]:
    return [
        path
        for path in paths
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    ]


def read_picture(path: Path) -> np.ndarray:
    """The levels of a picture file: uint8 (H, W, 1) where it is grey, (H, W, 3) where coloured.

    A palette counts as colour. Photographs are turned as their orientation tag says.

    Raises:
        UserError: the file is damaged or no picture, or holds several frames, transparent pixels,
            or pixels that are neither grey of 8 bits nor RGB.
    """
    image, frames = _decoded(path)
    if frames > 1:
        raise UserError(f"{path} holds {frames} frames: save one of them by itself")
    if image.mode not in _GREY | _COLOUR:
        raise UserError(
            f"{path} has pixels of the kind {image.mode}: save it in grey of 8 bits or in RGB"
        )
    kind = "L" if image.mode in _GREY else "RGB"
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert(f"{kind}A")
        if np.asarray(image)[..., -1].min() < 255:
            raise UserError(f"{path} is transparent in places: flatten it onto a background")
    levels = np.asarray(image.convert(kind))
    return levels.reshape(*levels.shape[:2], -1)


def _decoded(path: Path) -> tuple["Image.Image", int]:
    """The first frame of a picture file, and how many there are."""
    from PIL import Image, ImageOps

    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_FORMATS)
            frames = getattr(image, "n_frames", 1)
            return ImageOps.exif_transpose(image), frames  # a copy, decoded to the last pixel
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read {path} ({error.strerror}): give read access to it") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: give a smaller image"
        ) from None
    except Exception:  # Pillow's errors are of many kinds, and speak to programmers
        raise UserError(
            f"{path} is damaged or no image: replace it by a whole PNG, JPEG, BMP, GIF, WebP or "
            "TIFF file, or remove it"
        ) from None


def _fitting(levels: np.ndarray, path: Path, shape: Shape) -> np.ndarray:
    """`levels` (H, W, 1 or 3) as an image of `shape` (C, H, W): (H, W, C)."""
    channels, *size = shape
    height, width, found = levels.shape
    if [height, width] != size:
        raise UserError(
            f"{path} is {width} wide and {height} high; the model's images are {size[1]} wide and "
            f"{size[0]} high"
        )
    if channels == 1 and found == 3:
        if (levels != levels[..., :1]).any():
            raise UserError(f"{path} is in colour and the model's images are grey: save it in grey")
        return levels[..., :1]
    if channels != found:
        raise UserError(f"{path} is grey and the model's images are in colour: give a colour image")
    return levels


def _require_binary(levels: np.ndarray, path: Path) -> None:
    between = levels[(levels > 0) & (levels < 255)]
    if len(between):
        raise UserError(
            f"{path} has levels between black (0) and white (255), such as {between[0]}, and the "
            "model is of binary images: binarize it first, for example at 128"
        )
