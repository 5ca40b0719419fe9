"""SVHN: house numbers in street photographs, cropped to 32x32.

Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu and A. Y. Ng, "Reading digits in natural images
with unsupervised feature learning", NIPS workshop 2011. Cached as ``svhn.npz``: ``train``
(73257, 32, 32, 3), ``test`` (26032, 32, 32, 3), ``train_labels`` (73257,) and ``test_labels``
(26032,), all uint8 and in the published order; the digit 0 has label 0. The 531,131 easier
images of the published set ``extra`` are not used.
"""

from pathlib import Path

import numpy as np
import torch

from runtime import random as draws
from runtime.errors import UserError

from .cache import Contents, load_arrays
from .download import DownloadError, published
from .images import ColourImages, ImageSet, Shape

SHAPE: Shape = (3, 32, 32)
BINARY = False
# The published files are checked by MD5 when they are read; the cache by its own check sums.
CONTENTS = {
    "train": Contents((73257, 32, 32, 3), None),
    "test": Contents((26032, 32, 32, 3), None),
    "train_labels": Contents((73257,), None),
    "test_labels": Contents((26032,), None),
}
VALID_IMAGES = 6_000  # of the training images, drawn once
_SEED = 0


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from ``DATA_DIR/svhn.npz``, which is made first if it is missing.

    It is made from the two published files, taken from ``data_dir`` where the user has put them
    there and downloaded otherwise. ``valid`` is a fixed random 6,000 of the training images,
    ``train`` the other 67,257.

    Raises:
        UserError: a file is damaged or another, or cannot be downloaded, read or written.
    """
    path = data_dir / "svhn.npz"
    source = "test" if split == "test" else "train"
    arrays = load_arrays(path, CONTENTS, [source], lambda: _published(path), compress=False)
    images = _rows(arrays[source], split)
    return ColourImages("svhn", split, SHAPE, torch.from_numpy(images))


def _rows(images: np.ndarray, split: str) -> np.ndarray:
    order = draws.permutation(len(images), _SEED)
    if split == "train":
        return images[np.sort(order[VALID_IMAGES:])]
    if split == "valid":
        return images[np.sort(order[:VALID_IMAGES])]
    return images


def _published(path: Path) -> dict[str, np.ndarray]:
    arrays = {}
    for split in ("train", "test"):
        arrays[split], arrays[f"{split}_labels"] = _published_split(path, split)
    return arrays


def _published_split(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a published file, whose address and MD5 torchvision knows."""
    from scipy.io import loadmat  # type: ignore[import-untyped]
    from torchvision.datasets import SVHN

    url, _, md5 = SVHN.split_list[split]
    try:
        with published(url, path.parent, md5) as file:
            matrices = loadmat(file, appendmat=False)
    except DownloadError as error:
        names = " and ".join(SVHN.split_list[name][1] for name in ("train", "test"))
        raise UserError(
            f"{path} is missing and cannot be made, as a download failed ({error}): put "
            f"{names} into {path.parent} by hand"
        ) from error
    # X is (H, W, C, N); y is (N, 1), with 10 for the digit 0.
    return matrices["X"].transpose(3, 0, 1, 2), matrices["y"][:, 0] % 10
