"""Image data sets: each is downloaded and checked once, then read on the training device.

A new data set is a module with a ``SHAPE``, ``BINARY`` and a ``load``, and one line in `_MODULES`.
"""

from pathlib import Path
from typing import Protocol

from runtime.errors import UserError

from . import celeba, cifar10, digits, mnist, multi_dsprites, static_mnist, svhn
from .batches import TrainingBatches
from .images import ImageSet, Shape

__all__ = ["NAMES", "SPLITS", "ImageSet", "TrainingBatches", "image_shape", "is_binary", "load"]


class _Module(Protocol):
    """What the module of a data set offers."""

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
    """One split of a data set, in main memory; put into ``data_dir`` the first time.

    ``celeba`` is memory-mapped: it is read from its file, and only batches of it move to a GPU.

    Args:
        name: one of `NAMES`.
        split: one of `SPLITS`.
        data_dir: the folder that holds ``NAME.npz`` (``celeba.npy``), or will; ``digits`` does
            not use it.

    Raises:
        UserError: there is no such data set or split, or its file cannot be had or is damaged.
    """
    module = _module(name)
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r} of {name}: choose from {', '.join(SPLITS)}")
    return module.load(split, Path(data_dir).expanduser())


def image_shape(name: str) -> Shape:
    """(C, H, W) of a data set's images, known without loading it.

    Raises:
        UserError: there is no such data set.
    """
    return _module(name).SHAPE


def is_binary(name: str) -> bool:
    """Whether a data set's pixels are 0 or 1, for which a Bernoulli likelihood suits.

    The others have 256 levels, for which a discretized likelihood suits.

    Raises:
        UserError: there is no such data set.
    """
    return _module(name).BINARY


def _module(name: str) -> _Module:
    if name not in _MODULES:
        raise UserError(f"there is no data set {name!r}: choose from {', '.join(NAMES)}")
    return _MODULES[name]
