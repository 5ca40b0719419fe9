"""CIFAR10: small photographs in colour.

A. Krizhevsky, "Learning multiple layers of features from tiny images", 2009. Cached as
`cifar10.npz`: `train` (50000, 32, 32, 3), `test` (10000, 32, 32, 3), `train_labels` (50000,) and
`test_labels` (10000,), all uint8. The file may hold the images in any order: splits, and the order
within them, do not depend on it.
"""

import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from datasets.cache import Contents, load_arrays, sha256_of_values
from datasets.download import PublishedFile, published
from datasets.images import ColourImages, ImageSet, Shape
from runtime import random as draws

SHAPE: Shape = (3, 32, 32)
BINARY = False
VALID_IMAGES = 5_000  # the training images with the smallest hashes
_SEED = 0


def image_hashes(images: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each image of uint8 (N, 32, 32, 3): uint64 (N,).

    The hash is sum_i factor_i word_i modulo 2^64, with 32-bit words of the image and fixed random
    odd 64-bit factors. (The high bits of 64-bit words would hardly affect it.)
    """
    words = images.reshape(len(images), -1).view("<u4")
    factors = draws.words(words.shape[1], _SEED) | np.uint64(1)
    return np.einsum("nw,w->n", words, factors)


def _digest_of_hashes(images: np.ndarray) -> str:
    """A digest that does not depend on the order of the images."""
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
    """One split, from `DATA_DIR/cifar10.npz`.

    A missing `cifar10.npz` is made from the published archive, which is downloaded unless it is in
    `data_dir`. Images are in the order of their hashes: `valid` is the first 5,000 training images,
    `train` the other 45,000.

    Raises:
        UserError: a file has unexpected contents, or cannot be downloaded, read or written.
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
    """The arrays of the published archive, read by torchvision."""
    from torchvision.datasets import CIFAR10

    source = PublishedFile([CIFAR10.url], CIFAR10.tgz_md5)
    with (
        published(path, [source]) as files,
        TemporaryDirectory(prefix=".cifar10-", dir=path.parent) as folder,
        tarfile.open(files[source.name]) as archive,
    ):
        archive.extractall(folder, filter="data")
        train, test = (CIFAR10(folder, train=train) for train in (True, False))
    return {
        "train": train.data,
        "test": test.data,
        "train_labels": np.array(train.targets, np.uint8),
        "test_labels": np.array(test.targets, np.uint8),
    }
