"""The user's own images, in a folder of image files.

Images are neither resized nor thresholded. An image that does not fit the model is an error, whose
message names the file.
"""

import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from datasets.images import ColourImages, ImageSet, PackedImages, Shape
from runtime.errors import UserError
from runtime.files import reading

if TYPE_CHECKING:
    from PIL import Image

# Pillow's names of the supported formats, and their suffixes. No other format is tried, because
# Pillow would run Ghostscript on PostScript.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
_ORIENTATION = 0x0112  # the Exif tag
# Pillow's modes of at most 8 bits per channel, in the display's colours.
_GREY, _COLOUR = {"1", "L", "LA"}, {"P", "PA", "RGB", "RGBA"}


def load_folder(path: Path, shape: Shape, *, binary: bool) -> tuple[ImageSet, list[str]]:
    """The images in a folder, without its subfolders, and their file names, sorted.

    Images are the files whose name ends in one of `SUFFIXES`. Each must have `shape` (C, H, W). If
    C = 1, colour images whose channels are all equal count as grey; if C = 3, grey images are an
    error. `binary` images must be black (0) and white (255) only. The image set has the folder's
    name and the split "folder".

    Raises:
        UserError: there is no such folder, no image in it, or one that is damaged or does not fit.
    """
    folder = Path(os.path.expanduser(path))
    files = _image_files(folder)
    channels, height, width = shape
    images = np.empty((len(files), height, width, channels), np.uint8)
    for image, file in zip(images, files, strict=True):
        image[:] = load_picture(file, shape, binary=binary)
    name = folder.resolve().name
    names = [file.name for file in files]
    if binary:
        return PackedImages.pack(name, "folder", images.transpose(0, 3, 1, 2)), names
    return ColourImages(name, "folder", shape, torch.from_numpy(images)), names


def load_picture(path: Path, shape: Shape, *, binary: bool) -> np.ndarray:
    """The levels of an image file, uint8 (H, W, C), which must fit as for `load_folder`."""
    levels = _fitting(read_picture(path), path, shape)
    if binary:
        _require_binary(levels, path)
    return levels


def _image_files(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):  # unlike Path.is_dir, never raises
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


def picture_header(path: Path) -> tuple[int, int, int]:
    """(C, H, W) of what `read_picture` returns for an image file, from the file's header alone.

    Raises:
        UserError: the file is damaged or no image.
    """
    from PIL import Image

    with _opened(path) as image:
        width, height = image.size
        # A PNG's own method would decode the picture.
        if Image.Image.getexif(image).get(_ORIENTATION, 1) >= 5:  # rotated by a quarter
            width, height = height, width
        return (3 if image.mode in _COLOUR else 1, height, width)


def read_picture(path: Path) -> np.ndarray:
    """The levels of an image file: uint8 (H, W, 1) if it is grey, (H, W, 3) if it is in colour.

    A palette counts as colour. Photographs are rotated according to their orientation tag.

    Raises:
        UserError: the file is damaged or no image, or has several frames, transparent pixels, or
            pixels that are neither 8-bit grey nor RGB.
    """
    image, frames, is_deep = _decoded(path)
    if frames > 1:
        raise UserError(f"{path} holds {frames} frames: save one of them as a file")
    if is_deep:
        raise UserError(f"{path} has more than 8 bits per channel: save it as 8-bit grey or RGB")
    if image.mode not in _GREY | _COLOUR:
        raise UserError(
            f"{path} has pixels of Pillow's mode {image.mode}: save it as 8-bit grey or RGB"
        )
    kind = "L" if image.mode in _GREY else "RGB"
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert(f"{kind}A")
        if np.asarray(image)[..., -1].min() < 255:
            raise UserError(f"{path} is transparent in places: flatten it onto a background")
    levels = np.asarray(image.convert(kind))
    return levels.reshape(*levels.shape[:2], -1)


def _decoded(path: Path) -> tuple["Image.Image", int, bool]:
    """The first frame of an image file, the number of frames, and whether the file is deep.

    A deep file has more than 8 bits per channel, which Pillow drops if there are several channels.
    """
    from PIL import ImageOps

    with _opened(path) as image:
        frames = getattr(image, "n_frames", 1)
        is_deep = _is_deep(image)  # before decoding forgets it
        return ImageOps.exif_transpose(image), frames, is_deep  # a copy, completely decoded


@contextmanager
def _opened(path: Path) -> Iterator["Image.Image"]:
    """An image file, not decoded yet; Pillow's errors inside become `UserError`s."""
    from PIL import Image

    with reading(path):
        content = io.BytesIO(path.read_bytes())
    try:
        with warnings.catch_warnings(action="ignore"):
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield Image.open(content, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{path} has more than {Image.MAX_IMAGE_PIXELS:,} pixels: give a smaller image"
        ) from None
    except Exception:  # Pillow raises many kinds, with messages for programmers
        raise UserError(
            f"{path} is damaged or no image: replace it by a complete PNG, JPEG, BMP, GIF, WebP or "
            "TIFF file, or remove it"
        ) from None


def _is_deep(image: Any) -> bool:
    if image.format == "TIFF":
        bits_per_sample = 258
        return max(image.tag_v2.get(bits_per_sample, (1,))) > 8
    # Such as RGB;16B in PNG. BMP's BGR;16 is a pixel of 16 bits.
    return any(re.search(r";16[BLN]", str(tile.args)) for tile in image.tile)


def _fitting(levels: np.ndarray, path: Path, shape: Shape) -> np.ndarray:
    """`levels` (H, W, 1 or 3) as (H, W, C), for images of `shape` (C, H, W)."""
    channels, *size = shape
    height, width, found = levels.shape
    if [height, width] != size:
        raise UserError(
            f"{path} is {width} wide and {height} high but the model's images are {size[1]} "
            f"wide and {size[0]} high"
        )
    if channels == 1 and found == 3:
        if (levels != levels[..., :1]).any():
            raise UserError(f"{path} is in colour but the model's images are grey: save it in grey")
        return levels[..., :1]
    if channels != found:
        raise UserError(f"{path} is grey but the model's images are in colour: give a colour image")
    return levels


def _require_binary(levels: np.ndarray, path: Path) -> None:
    between = levels[(levels > 0) & (levels < 255)]
    if len(between):
        raise UserError(
            f"{path} has levels between black (0) and white (255), such as {between[0]}, but the "
            "model's images are binary: binarize it first, for example at 128"
        )
