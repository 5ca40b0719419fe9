"""What the data sets of 28x28 grey images share: binarization, 256 levels, and MNIST's files."""

import gzip
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from datasets.download import PublishedFile, published
from datasets.images import (
    ColourImages,
    DynamicallyBinarizedImages,
    ImageSet,
    PackedImages,
    Shape,
)
from runtime import random as draws

_SEED = 0
_BINARIZATION = {"valid": 0, "test": 1}


class _Grey(Protocol):
    """A module of grey images."""

    def grey(self, split: str, data_dir: Path) -> np.ndarray: ...


class GreyLevels:
    """The images of a data set with their 256 levels, instead of binarized: `NAME_grey`."""

    BINARY = False

    def __init__(self, name: str, module: _Grey, shape: Shape = (1, 28, 28)) -> None:
        self.SHAPE = shape
        self._name = name
        self._module = module

    def load(self, split: str, data_dir: Path) -> ImageSet:
        """One split, from the same file as the binarized images."""
        images = self._module.grey(split, data_dir)[..., np.newaxis]
        return ColourImages(self._name, split, self.SHAPE, torch.from_numpy(images))


def binarized(name: str, split: str, grey: np.ndarray) -> ImageSet:
    """Grey images (N, H, W), each pixel drawn as Bernoulli(grey / 255).

    `train` and `train+valid` draw again at every reading; `valid` and `test` are one draw with a
    fixed seed.
    """
    images = grey[:, np.newaxis]
    if split in _BINARIZATION:
        binary = draws.bernoulli(images / 255, _SEED, _BINARIZATION[split])
        return PackedImages.pack(name, split, binary)
    _, height, width = grey.shape
    return DynamicallyBinarizedImages(name, split, (1, height, width), torch.from_numpy(images))


def rows_of(images: np.ndarray, split: str, valid: int) -> np.ndarray:
    """The rows of a split; the last `valid` training images are for validation."""
    if split == "train":
        return images[:-valid]
    if split == "valid":
        return images[-valid:]
    return images


def published_idx(path: Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of the four published files, whose URLs and MD5 torchvision's class `name` lists.

    Returns `train` (N, 28, 28), `test`, `train_labels` (N,) and `test_labels`, all uint8.
    """
    import torchvision.datasets

    listed = getattr(torchvision.datasets, name)
    sources = [
        PublishedFile([mirror + file for mirror in listed.mirrors], md5)
        for file, md5 in listed.resources
    ]
    arrays = {}
    with published(path, sources) as files:
        for split, prefix in (("train", "train"), ("test", "t10k")):
            images = gzip.decompress(files[f"{prefix}-images-idx3-ubyte.gz"].read_bytes())
            labels = gzip.decompress(files[f"{prefix}-labels-idx1-ubyte.gz"].read_bytes())
            # The IDX format: a header of 16 or 8 bytes, then the values in C order.
            arrays[split] = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28)
            arrays[f"{split}_labels"] = np.frombuffer(labels, np.uint8, offset=8)
    return arrays
