"""CIFAR10: small photographs in colour.

A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009. Cached as
``cifar10.npz``: ``train`` (50000, 32, 32, 3), ``test`` (10000, 32, 32, 3), ``train_labels``
(50000,) and ``test_labels`` (10000,), all uint8. A file that has the images in another order than
the published one will do as well: splits, and the order within them, are the same.
"""

import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch

from runtime import random as draws
from runtime.errors import UserError
from runtime.files import writing

from .cache import Contents, load_arrays, sha256_of_values
from .download import DownloadError, published
from .images import ColourImages, ImageSet, Shape

SHAPE: Shape = (3, 32, 32)
BINARY = False
VALID_IMAGES = 5_000  # the training images with the smallest hashes
_SEED = 0


def image_hashes(images: np.ndarray) -> np.ndarray:
    """A 64-bit number for each of the images, uint8 (N, 32, 32, 3): uint64 (N,).

    The sum of an image's 32-bit words, each times an odd random 64-bit factor, modulo 2^64: of
    words as long as the factors, the high bits would count for too little.
    """
    words = images.reshape(len(images), -1).view("<u4")
    factors = draws.words(words.shape[1], _SEED) | np.uint64(1)
    return np.einsum("nw,w->n", words, factors)


def _digest_of_hashes(images: np.ndarray) -> str:
    """The same for the same images in any order."""
    return sha256_of_values(np.sort(image_hashes(images)).astype("<u8").view(np.uint8))


def _digest_of_sorted(labels: np.ndarray) -> str:
    return sha256_of_values(np.sort(labels))


CONTENTS = {
    "train": Contents(
        (50000, 32, 32, 3),
        "27df43bbe05f3cc00bd7f767e07b8e617ec1b650dd6a752d5e0ea8fba2dbe24c",
        _digest_of_hashes,
    ),
    "test": Contents(
        (10000, 32, 32, 3),
        "e7edce1a59769af215d64edba32dfdb86627dc839436338add45c9f296a3929b",
        _digest_of_hashes,
    ),
    "train_labels": Contents(
        (50000,),
        "a29f2a5ffc141bb1c9e1af453e9a5ef8c316b2f675f8cea1d849d220d33a14fb",
        _digest_of_sorted,
    ),
    "test_labels": Contents(
        (10000,),
        "a054c239a40ee7f2a5745e7e4bc11a51e9cb40c98134b602c1068e6a207487c6",
        _digest_of_sorted,
    ),
}


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from ``DATA_DIR/cifar10.npz``, which is made first if it is missing.

    It is made from the published archive, taken from ``data_dir`` where the user has put it there
    and downloaded otherwise. Images come in the order of their hashes: ``valid`` is the first
    5,000 of the training images, ``train`` the other 45,000.

    Raises:
        UserError: a file is damaged or another, or cannot be downloaded, read or written.
    """
    path = data_dir / "cifar10.npz"
    source = "test" if split == "test" else "train"
    arrays = load_arrays(path, CONTENTS, [source], lambda: _published(path), compress=False)
    images = arrays[source]
    order = np.argsort(image_hashes(images), kind="stable")
    return ColourImages("cifar10", split, SHAPE, torch.from_numpy(images[_rows(order, split)]))


def _rows(order: np.ndarray, split: str) -> np.ndarray:
    if split == "train":
        return order[VALID_IMAGES:]
    if split == "valid":
        return order[:VALID_IMAGES]
    return order


def _published(path: Path) -> dict[str, np.ndarray]:
    """The published archive, read by torchvision, which checks the MD5 of each file in it."""
    from torchvision.datasets import CIFAR10

    with writing(path), tempfile.TemporaryDirectory(prefix=".cifar10-", dir=path.parent) as folder:
        try:
            with (
                published(CIFAR10.url, path.parent, CIFAR10.tgz_md5) as file,
                tarfile.open(file) as archive,
            ):
                archive.extractall(folder, filter="data")
        except DownloadError as error:
            raise UserError(
                f"{path} is missing and cannot be made, as a download failed ({error}): put "
                f"{CIFAR10.filename} into {path.parent} by hand"
            ) from error
        train, test = (CIFAR10(folder, train=train) for train in (True, False))
        return {
            "train": train.data,
            "test": test.data,
            "train_labels": np.array(train.targets, np.uint8),
            "test_labels": np.array(test.targets, np.uint8),
        }
