"""CelebA: faces of celebrities, cropped to 148x148 and resized to 64x64.

Z. Liu, P. Luo, X. Wang and X. Tang, "Deep learning face attributes in the wild", ICCV 2015; the
aligned images. The crop is that of A. B. L. Larsen et al., "Autoencoding beyond pixels using a
learned similarity metric", ICML 2016. Prepared once as ``celeba.npy``, (202599, 64, 64, 3) uint8,
``train``, ``valid`` and ``test`` one after the other, with its check sums in ``celeba.json``.
"""

import itertools
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from runtime.errors import UserError
from runtime.files import writing

from .cache import reading
from .download import require_md5
from .images import ImageSet, MappedImages, Shape
from .mapped import open_mapped, write_mapped

SHAPE: Shape = (3, 64, 64)
BINARY = False
COUNTS = {"train": 162_770, "valid": 19_867, "test": 19_962}  # in the order of their numbers
# What reading a damaged picture or archive raises.
_UNUSABLE = (KeyError, OSError, SyntaxError, ValueError, zipfile.BadZipFile, zlib.error)
_IMAGES, _PARTITION = "img_align_celeba", "list_eval_partition.txt"
_SIZE = (178, 218)  # of a published image, width and height
_CROP = (15, 35, 163, 183)  # its central 148x148: left, top, right, bottom


def load(split: str, data_dir: Path) -> ImageSet:
    """One of the published splits, memory-mapped from ``DATA_DIR/celeba.npy``.

    If that is missing it is made, in some minutes, from two published files in
    ``DATA_DIR/celeba``: ``list_eval_partition.txt`` and ``img_align_celeba.zip``, or a folder
    ``img_align_celeba`` with what is in the latter. What is missing of these is downloaded, which
    needs the package gdown, and kept.

    Raises:
        UserError: a file is damaged or another, or cannot be downloaded, read or written.
    """
    path = data_dir / "celeba.npy"
    shape = (sum(COUNTS.values()), 64, 64, 3)
    with reading(path):
        missing = not path.exists()
    if missing:
        folder = data_dir / "celeba"
        _require_published(folder, path)
        names = _names(folder / _PARTITION)
        write_mapped(path, shape, _prepared(folder, names))
    images = open_mapped(path, shape)[_rows(split)]
    return MappedImages("celeba", split, SHAPE, torch.from_numpy(images))


def _rows(split: str) -> slice:
    ends = dict(zip(COUNTS, itertools.accumulate(COUNTS.values()), strict=True))
    first, _, last = split.partition("+")
    return slice(ends[first] - COUNTS[first], ends[last or first])


def _names(partition: Path) -> list[str]:
    """The images' names in the order of the splits, from lines like ``000001.jpg 0``."""
    require_md5(partition, _file_list()[_PARTITION][1])
    lines = [line.split() for line in partition.read_text().splitlines()]
    return [
        name
        for number in range(len(COUNTS))
        for name, its_number in lines
        if int(its_number) == number
    ]


def _prepared(folder: Path, names: list[str]) -> Iterator[np.ndarray]:
    """The images cropped and resized: each uint8 (64, 64, 3)."""
    from tqdm import tqdm

    with _opener(folder) as open_image:
        for name in tqdm(names, desc="celeba.npy", unit=" images"):
            try:
                with open_image(name) as file:
                    image = _crop(file)
            except _UNUSABLE as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"image {name} in {folder / _IMAGES} cannot be used ({reason}): put the "
                    f"published {_IMAGES}.zip into {folder}"
                ) from error
            yield image


@contextmanager
def _opener(folder: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """What opens an image by its name, in the archive or else in the folder."""
    archive = folder / f"{_IMAGES}.zip"
    if archive.exists():
        require_md5(archive, _file_list()[archive.name][1])
        with zipfile.ZipFile(archive) as opened:
            yield lambda name: opened.open(f"{_IMAGES}/{name}")
    else:
        yield lambda name: (folder / _IMAGES / name).open("rb")


def _crop(file: IO[bytes]) -> np.ndarray:
    """What torchvision's CenterCrop(148) and Resize(64) make of a picture."""
    from PIL import Image

    with Image.open(file) as image:
        if image.size != _SIZE or image.mode != "RGB":
            raise ValueError(
                f"it is {image.mode} of {image.size[0]}x{image.size[1]} where RGB of "
                f"{_SIZE[0]}x{_SIZE[1]} is expected"
            )
        height, width = SHAPE[1:]
        return np.asarray(image.crop(_CROP).resize((width, height), Image.Resampling.BILINEAR))


def _require_published(folder: Path, path: Path) -> None:
    """Download what is not there of the published files that are needed."""
    with reading(folder):
        wanted = [] if (folder / _PARTITION).exists() else [_PARTITION]
        if not (folder / _IMAGES).is_dir() and not (folder / f"{_IMAGES}.zip").exists():
            wanted.append(f"{_IMAGES}.zip")
    for name in wanted:
        _download(name, folder, path)


def _download(name: str, folder: Path, path: Path) -> None:
    from torchvision.datasets.utils import download_file_from_google_drive

    with writing(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        writing(folder / name),
        tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary,
    ):
        address, md5 = _file_list()[name]
        try:
            download_file_from_google_drive(address, temporary, name, md5)
        # gdown's own errors, requests' and torchvision's: they have no base of their own.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{path} is missing and cannot be made, as the download of {name} from Google "
                f"Drive failed ({reason}): put {_IMAGES}.zip and {_PARTITION} from "
                f"mmlab.ie.cuhk.edu.hk/projects/CelebA.html into {folder} by hand"
            ) from error
        Path(temporary, name).replace(folder / name)


def _file_list() -> dict[str, tuple[str, str]]:
    """Address at Google Drive and MD5 of each published file, which torchvision knows."""
    from torchvision.datasets import CelebA

    return {name: (address, md5) for address, md5, name in CelebA.file_list}
