"""Image data sets: each is downloaded and checked once, then read on the training device.

A new data set is a module with a ``SHAPE`` and a ``load``, and one line in `_MODULES`.
"""

from pathlib import Path
from typing import Protocol

from errors import UserError

from . import digits, mnist, static_mnist
from .batches import TrainingBatches
from .images import ImageSet, Shape

__all__ = ["NAMES", "SPLITS", "ImageSet", "TrainingBatches", "image_shape", "load"]


class _Module(Protocol):
    """What the module of a data set offers."""

    SHAPE: Shape

    def load(self, split: str, data_dir: Path) -> ImageSet: ...


_MODULES: dict[str, _Module] = {
    "digits": digits,
    "mnist": mnist,
    "static_mnist": static_mnist,
}

NAMES = tuple(_MODULES)
SPLITS = ("train", "valid", "test", "train+valid")


def load(name: str, split: str, data_dir: str | Path) -> ImageSet:
    """One split of a data set, in main memory; downloaded into ``data_dir`` the first time.

    Args:
        name: one of `NAMES`.
        split: one of `SPLITS`.
        data_dir: an existing folder that holds ``NAME.npz``, or will. ``digits`` does not use it.

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


def _module(name: str) -> _Module:
    if name not in _MODULES:
        raise UserError(f"there is no data set {name!r}: choose from {', '.join(NAMES)}")
    return _MODULES[name]
