"""SVHN: house numbers in street photographs, cropped to 32x32.

Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu and A. Y. Ng, "Reading digits in natural images
with unsupervised feature learning", NIPS workshop 2011. Cached as `svhn.npz`: `train`
(73257, 32, 32, 3), `test` (26032, 32, 32, 3), `train_labels` (73257,) and `test_labels` (26032,),
all uint8 and in the published order; the digit 0 has label 0. The 531,131 easier images of the
published set `extra` are not used.
"""

from pathlib import Path

import numpy as np
import torch

from datasets.cache import Contents, load_arrays
from datasets.download import PublishedFile, published
from datasets.images import ColourImages, ImageSet, Shape
from runtime import random as draws

SHAPE: Shape = (3, 32, 32)
BINARY = False
# The published files are checked by MD5, the cache by the npz file's own checksums.
CONTENTS = {
    "train": Contents((73257, 32, 32, 3), None),
    "test": Contents((26032, 32, 32, 3), None),
    "train_labels": Contents((73257,), None),
    "test_labels": Contents((26032,), None),
}
VALID_IMAGES = 6_000  # random training images
_SEED = 0


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from `DATA_DIR/svhn.npz`.

    A missing `svhn.npz` is made from the two published files, which are downloaded unless they are
    in `data_dir`. `valid` is a fixed random choice of 6,000 training images, `train` the other
    67,257.

    Raises:
        UserError: a file has unexpected contents, or cannot be downloaded, read or written.
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
    """Images and labels of the published files, whose URLs and MD5 torchvision lists."""
    from scipy.io import loadmat  # type: ignore[import-untyped]
    from torchvision.datasets import SVHN

    sources = [SVHN.split_list[split] for split in ("train", "test")]
    arrays = {}
    with published(path, [PublishedFile([url], md5) for url, _, md5 in sources]) as files:
        for split, file in zip(("train", "test"), files.values(), strict=True):
            matrices = loadmat(file, appendmat=False)
            # X is (H, W, C, N); y is (N, 1), with 10 for the digit 0.
            arrays[split] = matrices["X"].transpose(3, 0, 1, 2)
            arrays[f"{split}_labels"] = matrices["y"][:, 0] % 10
    return arrays
