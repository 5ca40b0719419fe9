"""MNIST, binarized dynamically for training and statically for evaluation.

Y. LeCun, C. Cortes and C. Burges, "The MNIST database of handwritten digits". Cached as
`mnist.npz`: `train` (60000, 28, 28), `test` (10000, 28, 28), `train_labels` (60000,) and
`test_labels` (10000,), all uint8 and in MNIST's own order.
"""

import gzip
from pathlib import Path

import numpy as np
import torch

from datasets.cache import Contents, load_arrays
from datasets.download import PublishedFile, published
from datasets.images import DynamicallyBinarizedImages, ImageSet, PackedImages, Shape
from runtime import random as draws

SHAPE: Shape = (1, 28, 28)
BINARY = True
CONTENTS = {
    "train": Contents(
        (60000, 28, 28), "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757"
    ),
    "test": Contents(
        (10000, 28, 28), "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161"
    ),
    "train_labels": Contents(
        (60000,), "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13"
    ),
    "test_labels": Contents(
        (10000,), "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5"
    ),
}
VALID_IMAGES = 10_000  # the last of the training images
_SEED = 0
_BINARIZATION = {"valid": 0, "test": 1}


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from `DATA_DIR/mnist.npz`.

    A missing `mnist.npz` is made from the four published files, which are downloaded unless they
    are in `data_dir`. `train` and `train+valid` draw each pixel from Bernoulli(grey / 255) every
    time a batch is read; `valid` and `test` are one such draw with a fixed seed.

    Raises:
        UserError: a file has unexpected contents, or cannot be downloaded, read or written.
    """
    path = data_dir / "mnist.npz"
    source = "test" if split == "test" else "train"
    grey = load_arrays(path, CONTENTS, [source], lambda: _published(path))[source]
    images = _rows(grey, split)[:, np.newaxis]
    if split in _BINARIZATION:
        binary = draws.bernoulli(images / 255, _SEED, _BINARIZATION[split])
        return PackedImages.pack("mnist", split, binary)
    return DynamicallyBinarizedImages("mnist", split, SHAPE, torch.from_numpy(images))


def _rows(grey: np.ndarray, split: str) -> np.ndarray:
    if split == "train":
        return grey[:-VALID_IMAGES]
    if split == "valid":
        return grey[-VALID_IMAGES:]
    return grey


def _published(path: Path) -> dict[str, np.ndarray]:
    """The arrays of the four published files, whose URLs and MD5 torchvision lists."""
    from torchvision.datasets import MNIST

    sources = [
        PublishedFile([mirror + name for mirror in MNIST.mirrors], md5)
        for name, md5 in MNIST.resources
    ]
    arrays = {}
    with published(path, sources) as files:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images = gzip.decompress(files[f"{prefix}-images-idx3-ubyte.gz"].read_bytes())
            labels = gzip.decompress(files[f"{prefix}-labels-idx1-ubyte.gz"].read_bytes())
            # The IDX format: a header of 16 or 8 bytes, then the values in C order.
            arrays[split] = np.frombuffer(images, np.uint8, offset=16).reshape(-1, *SHAPE[1:])
            arrays[f"{split}_labels"] = np.frombuffer(labels, np.uint8, offset=8)
    return arrays
