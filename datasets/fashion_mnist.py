"""Fashion-MNIST: clothes.

H. Xiao, K. Rasul and R. Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine
learning algorithms", 2017. Binarized, split and cached as MNIST is, as `fashion_mnist.npz`;
`fashion_mnist_grey` keeps the 256 levels.
"""

from pathlib import Path

import numpy as np

from datasets.cache import Contents, load_arrays
from datasets.grey import binarized, published_idx, rows_of
from datasets.images import ImageSet, Shape

SHAPE: Shape = (1, 28, 28)
BINARY = True
# The published files are checked by MD5, the cache by the npz file's own checksums.
CONTENTS = {
    "train": Contents((60000, 28, 28), None),
    "test": Contents((10000, 28, 28), None),
    "train_labels": Contents((60000,), None),
    "test_labels": Contents((10000,), None),
}
VALID_IMAGES = 10_000  # the last of the training images


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from `DATA_DIR/fashion_mnist.npz`; see `datasets.mnist.load`."""
    return binarized("fashion_mnist", split, grey(split, data_dir))


def grey(split: str, data_dir: Path) -> np.ndarray:
    """The grey levels of one split: uint8 (N, 28, 28)."""
    path = data_dir / "fashion_mnist.npz"
    source = "test" if split == "test" else "train"
    images = load_arrays(path, CONTENTS, [source], lambda: published_idx(path, "FashionMNIST"))[
        source
    ]
    return rows_of(images, split, VALID_IMAGES)
