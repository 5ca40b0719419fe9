"""Image data sets: downloaded once, checked, and read from the training device's memory.

To add a data set, write a module with `SHAPE`, `BINARY` and `load` (see `_Module`), and add it to
`_MODULES`.
"""

from pathlib import Path
from typing import Protocol

from datasets import celeba, cifar10, digits, mnist, multi_dsprites, static_mnist, svhn
from datasets.batches import TrainingBatches
from datasets.images import ImageSet, Shape
from runtime.errors import UserError

__all__ = ["NAMES", "SPLITS", "ImageSet", "TrainingBatches", "image_shape", "is_binary", "load"]


class _Module(Protocol):
    """What the module of a data set must define."""

    SHAPE: Shape
    BINARY: bool

    def load(self, split: str, data_dir: Path) -> ImageSet: ...


_MODULES: dict[str, _Module] = {
    "celeba": celeba,
    "cifar10": cifar10,
    "digits": digits,
    "mnist": mnist,
    "multi_dsprites": multi_dsprites,
    "static_mnist": static_mnist,
    "svhn": svhn,
}

NAMES = tuple(_MODULES)
SPLITS = ("train", "valid", "test", "train+valid")


def load(name: str, split: str, data_dir: str | Path) -> ImageSet:
    """Load one split of a data set into main memory.

    The first call downloads or generates the data set and keeps it as `NAME.npz` in `data_dir`.
    `celeba` is kept as `celeba.npy` and memory-mapped, and only its batches move to a GPU; `digits`
    needs no file.

    Args:
        name: one of `NAMES`.
        split: one of `SPLITS`.
        data_dir: the folder of the data sets' files.

    Raises:
        UserError: there is no such data set or split, or its file is damaged or cannot be made.
    """
    module = _module(name)
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r} of {name}: choose from {', '.join(SPLITS)}")
    return module.load(split, Path(data_dir).expanduser())


def image_shape(name: str) -> Shape:
    """(C, H, W) of a data set's images, without loading it; raises `UserError` for other names."""
    return _module(name).SHAPE


def is_binary(name: str) -> bool:
    """Whether a data set's pixels are 0 or 1; the others have 256 levels.

    Raises `UserError` for other names.
    """
    return _module(name).BINARY


def _module(name: str) -> _Module:
    if name not in _MODULES:
        raise UserError(f"there is no data set {name!r}: choose from {', '.join(NAMES)}")
    return _MODULES[name]
