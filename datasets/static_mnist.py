"""Statically binarized MNIST: its publishers drew each pixel once.

H. Larochelle and I. Murray, "The neural autoregressive distribution estimator", AISTATS 2011,
with the binarization of R. Salakhutdinov and I. Murray, "On the quantitative analysis of deep
belief networks", ICML 2008. Published as three text files, cached as `static_mnist.npz`:
`train` (50000, 98), `valid` (10000, 98) and `test` (10000, 98) uint8, `numpy.packbits` of
the 784 pixels of each row-major 28x28 image. `test` is sorted by digit.
"""

from pathlib import Path

import numpy as np
import torch

from datasets.cache import Contents, load_arrays
from datasets.download import PublishedFile, published
from datasets.images import ImageSet, PackedImages, Shape

SHAPE: Shape = (1, 28, 28)
BINARY = True
URL = "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/"
MD5 = {
    "binarized_mnist_train.amat": "db28b1a6ae0fe70cbd3da91acf46e477",
    "binarized_mnist_valid.amat": "bf37822a04e94123630de6a7dfd9c9ef",
    "binarized_mnist_test.amat": "14e41ae11040adba6ab8cb291eda0dd8",
}
CONTENTS = {
    "train": Contents(
        (50000, 98), "727146c35424b019f3e350e1e69faa05644a0abaf787e3f4e1a9632220a13906"
    ),
    "valid": Contents(
        (10000, 98), "a256ac44ae26be720fad8616a05ed6ecfd1619930d9a208379bb2a4405df5b6d"
    ),
    "test": Contents(
        (10000, 98), "9fcd8da6f0fdf09b2ba30fe63a0bb784042a0de82563172530229b983e294ff2"
    ),
}


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from `DATA_DIR/static_mnist.npz`.

    A missing `static_mnist.npz` is made from the published files, which are downloaded unless they
    are in `data_dir`.

    Raises:
        UserError: a file has unexpected contents, or cannot be downloaded, read or written.
    """
    path = data_dir / "static_mnist.npz"
    names = split.split("+")
    arrays = load_arrays(path, CONTENTS, names, lambda: _pack_published(path))
    packed = np.concatenate([arrays[name] for name in names])
    return PackedImages("static_mnist", split, SHAPE, torch.from_numpy(packed))


def _pack_published(path: Path) -> dict[str, np.ndarray]:
    with published(path, [PublishedFile([URL + name], md5) for name, md5 in MD5.items()]) as files:
        return {split: pack_amat(files[f"binarized_mnist_{split}.amat"]) for split in CONTENTS}


def pack_amat(path: Path) -> np.ndarray:
    """Pack a published text file of N images: uint8 (N, 98).

    A row is an image's 784 digits 0 or 1, separated by single spaces, and a newline.
    """
    text = np.fromfile(path, np.uint8).reshape(-1, 784, 2)  # a digit and its separator
    return np.packbits(text[:, :, 0] == ord("1"), axis=1)
