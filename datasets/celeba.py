"""CelebA: faces of celebrities, cropped to 148x148 and resized to 64x64.

Z. Liu, P. Luo, X. Wang and X. Tang, "Deep learning face attributes in the wild", ICCV 2015; the
aligned images, with the crop of A. B. L. Larsen et al., "Autoencoding beyond pixels using a learned
similarity metric", ICML 2016. Cached as `celeba.npy`, (202599, 64, 64, 3) uint8, with `train`,
`valid` and `test` in this order, and its checksums in `celeba.json`.
"""

import itertools
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import numpy as np
import torch

from datasets.download import one_reason, require_md5
from datasets.images import ImageSet, MappedImages, Shape
from datasets.mapped import open_mapped, write_mapped
from runtime.errors import UserError
from runtime.files import writing

SHAPE: Shape = (3, 64, 64)
BINARY = False
COUNTS = {"train": 162_770, "valid": 19_867, "test": 19_962}  # in published order
_IMAGES, _PARTITION = "img_align_celeba", "list_eval_partition.txt"
_SIZE = (178, 218)  # width and height of a published image
_CROP = (15, 35, 163, 183)  # its central 148x148: left, top, right, bottom


def load(split: str, data_dir: Path) -> ImageSet:
    """One of the published splits, memory-mapped from `DATA_DIR/celeba.npy`.

    A missing `celeba.npy` is made, in a few minutes, from two published files in `DATA_DIR/celeba`:
    `list_eval_partition.txt` and `img_align_celeba.zip`, or the folder `img_align_celeba` extracted
    from it. Missing files are downloaded, which needs the package gdown, and kept.

    Raises:
        UserError: a file has unexpected contents, or cannot be downloaded, read or written.
    """
    path = data_dir / "celeba.npy"
    shape = (sum(COUNTS.values()), 64, 64, 3)
    if not os.path.exists(path):
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
    """The images' names, split by split, from lines such as `000001.jpg 0`."""
    require_md5(partition, _file_list()[_PARTITION][1])
    lines = [line.split() for line in partition.read_text().splitlines()]
    return [
        name
        for number in range(len(COUNTS))
        for name, its_number in lines
        if int(its_number) == number
    ]


def _prepared(folder: Path, names: list[str]) -> Iterator[np.ndarray]:
    """The cropped and resized images, each uint8 (64, 64, 3)."""
    from tqdm import tqdm

    with _opener(folder) as open_image:
        for name in tqdm(names, desc="celeba.npy", unit=" images"):
            try:
                with open_image(name) as file:
                    image = _crop(file)
            except Exception as error:  # Pillow and zipfile raise many kinds
                raise UserError(
                    f"image {name} in {folder / _IMAGES} cannot be used ({one_reason(error)}): put "
                    f"the published {_IMAGES}.zip into {folder}"
                ) from error
            yield image


@contextmanager
def _opener(folder: Path) -> Iterator[Callable[[str], IO[bytes]]]:
    """A function that opens an image by name, from the archive if it exists, else the folder."""
    archive = folder / f"{_IMAGES}.zip"
    if archive.exists():
        require_md5(archive, _file_list()[archive.name][1])
        with zipfile.ZipFile(archive) as opened:
            yield lambda name: opened.open(f"{_IMAGES}/{name}")
    else:
        yield lambda name: (folder / _IMAGES / name).open("rb")


def _crop(file: IO[bytes]) -> np.ndarray:
    """The result of torchvision's CenterCrop(148) and Resize(64)."""
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
    """Download the needed files that are missing."""
    wanted = [] if os.path.exists(folder / _PARTITION) else [_PARTITION]
    if not os.path.isdir(folder / _IMAGES) and not os.path.exists(folder / f"{_IMAGES}.zip"):
        wanted.append(f"{_IMAGES}.zip")
    for name in wanted:
        _download(name, folder, path)


def _download(name: str, folder: Path, path: Path) -> None:
    from torchvision.datasets.utils import download_file_from_google_drive

    with writing(folder / name):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            file_id, md5 = _file_list()[name]
            try:
                download_file_from_google_drive(file_id, temporary, name, md5)
            except Exception as error:  # gdown's, requests' and torchvision's
                raise UserError(
                    f"{path} is missing and cannot be made, because the download of {name} from "
                    f"Google Drive failed ({one_reason(error)}): put {_IMAGES}.zip and "
                    f"{_PARTITION} from mmlab.ie.cuhk.edu.hk/projects/CelebA.html into {folder} "
                    "by hand"
                ) from error
            Path(temporary, name).replace(folder / name)


def _file_list() -> dict[str, tuple[str, str]]:
    """Google Drive's file id and the MD5 of each published file, as torchvision lists them."""
    from torchvision.datasets import CelebA

    return {name: (file_id, md5) for file_id, md5, name in CelebA.file_list}
