"""Image data sets: downloaded once, checked, and read from the training device's memory.

To add a data set, write a module with `SHAPE`, `BINARY` and `load`, and add it to `_MODULES`.
The user's own images satisfy the same interface, see `datasets.own_images`.
"""

from pathlib import Path
from typing import Protocol

from datasets import (
    celeba,
    cifar10,
    digits,
    fashion_mnist,
    kmnist,
    mnist,
    multi_dsprites,
    omniglot,
    static_mnist,
    svhn,
)
from datasets.batches import TrainingBatches
from datasets.grey import GreyLevels
from datasets.images import ImageSet, Shape
from runtime.errors import UserError, did_you_mean

__all__ = [
    "NAMES",
    "SPLITS",
    "DataSet",
    "ImageSet",
    "TrainingBatches",
    "image_shape",
    "is_binary",
    "load",
]


class DataSet(Protocol):
    """What the module of a data set must define."""

    @property
    def SHAPE(self) -> Shape: ...  # noqa: N802

    @property
    def BINARY(self) -> bool: ...  # noqa: N802

    def load(self, split: str, data_dir: Path) -> ImageSet: ...


_MODULES: dict[str, DataSet] = {
    "celeba": celeba,
    "cifar10": cifar10,
    "digits": digits,
    "fashion_mnist": fashion_mnist,
    "fashion_mnist_grey": GreyLevels("fashion_mnist_grey", fashion_mnist),
    "kmnist": kmnist,
    "kmnist_grey": GreyLevels("kmnist_grey", kmnist),
    "mnist": mnist,
    "mnist_grey": GreyLevels("mnist_grey", mnist),
    "multi_dsprites": multi_dsprites,
    "omniglot": omniglot,
    "omniglot_grey": GreyLevels("omniglot_grey", omniglot),
    "static_mnist": static_mnist,
    "svhn": svhn,
}

NAMES = tuple(_MODULES)
SPLITS = ("train", "valid", "test", "train+valid")


def load(dataset: str | DataSet, split: str, data_dir: str | Path) -> ImageSet:
    """Load one split of a data set into main memory.

    The first call downloads or generates the data set and keeps it as `NAME.npz` in `data_dir`.
    `celeba` is kept as `celeba.npy` and memory-mapped, and only its batches move to a GPU; `digits`
    needs no file.

    Args:
        dataset: one of `NAMES`, or own images.
        split: one of `SPLITS`.
        data_dir: the folder of the data sets' files.

    Raises:
        UserError: there is no such data set or split, or its file is damaged or cannot be made.
    """
    module = _module(dataset)
    if split not in SPLITS:
        raise UserError(
            f"there is no split {split!r} of {dataset}: choose from {', '.join(SPLITS)}"
        )
    return module.load(split, Path(data_dir).expanduser())


def image_shape(dataset: str | DataSet) -> Shape:
    """(C, H, W) of a data set's images, without loading it; raises `UserError` for other names."""
    return _module(dataset).SHAPE


def is_binary(dataset: str | DataSet) -> bool:
    """Whether a data set's pixels are 0 or 1; the others have 256 levels.

    Raises `UserError` for other names.
    """
    return _module(dataset).BINARY


def _module(dataset: str | DataSet) -> DataSet:
    if not isinstance(dataset, str):
        return dataset
    if dataset not in _MODULES:
        raise UserError(
            f"there is no data set {dataset!r}: choose from {', '.join(NAMES)}"
            f"{did_you_mean(dataset, NAMES)}"
        )
    return _MODULES[dataset]
