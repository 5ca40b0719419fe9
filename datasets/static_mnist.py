"""Statically binarized MNIST: every pixel drawn once, by those who published it.

H. Larochelle and I. Murray, "The neural autoregressive distribution estimator", AISTATS 2011,
with the binarization of R. Salakhutdinov and I. Murray, "On the quantitative analysis of deep
belief networks", ICML 2008. Published as three text files, cached as ``static_mnist.npz``:
``train`` (50000, 98), ``valid`` (10000, 98) and ``test`` (10000, 98) uint8, `numpy.packbits` of
the 784 pixels of each row-major 28x28 image. ``test`` is sorted by digit.
"""

from pathlib import Path

import numpy as np
import torch

from runtime.errors import UserError

from .cache import Contents, load_arrays
from .download import DownloadError, downloaded, require_md5
from .images import ImageSet, PackedImages, Shape

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
_PIXELS = 784
_SPACE, _NEWLINE, _ZERO, _ONE = b" \n01"


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from ``DATA_DIR/static_mnist.npz``.

    If that is missing it is made from the published files, taken from ``data_dir`` where the
    user has put them there and downloaded otherwise.

    Raises:
        UserError: a file is damaged or another, or cannot be downloaded, read or written.
    """
    path = data_dir / "static_mnist.npz"
    names = split.split("+")
    arrays = load_arrays(path, CONTENTS, names, lambda: _pack_published(path))
    packed = np.concatenate([arrays[name] for name in names])
    return PackedImages("static_mnist", split, SHAPE, torch.from_numpy(packed))


def _pack_published(path: Path) -> dict[str, np.ndarray]:
    return {split: _pack_file(path, f"binarized_mnist_{split}.amat") for split in CONTENTS}


def _pack_file(path: Path, name: str) -> np.ndarray:
    own = path.parent / name
    if own.exists():
        packed = pack_amat(own)  # before the sum, as it can say in which row the fault is
        require_md5(own, MD5[name])
        return packed
    try:
        with downloaded(URL + name, path.parent, MD5[name]) as file:
            return pack_amat(file)
    except DownloadError as error:
        raise UserError(
            f"{path} is missing and cannot be made, as a download failed ({error}): put "
            f"{', '.join(MD5)} into {path.parent} by hand"
        ) from error


def pack_amat(path: Path) -> np.ndarray:
    """Read a text file of binary images, one to a row: uint8 (N, 98), packed.

    Each row is 784 digits 0 or 1 separated by one space, and a newline.

    Raises:
        UserError: the file cannot be read, or a row is not like that.
    """
    try:
        text = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): put the right one there"
        ) from error
    _require_rows(text, path)
    pairs = text.reshape(-1, _PIXELS, 2)  # a digit, and what separates it from the next
    _require_digits(pairs, path)
    return np.packbits(pairs[:, :, 0] == _ONE, axis=1)


def _require_rows(text: np.ndarray, path: Path) -> None:
    ends = np.flatnonzero(text == _NEWLINE)
    if len(text) == 0 or text[-1] != _NEWLINE:
        raise UserError(f"{path} does not end with a newline: it is cut off; put a whole one there")
    lengths = np.diff(ends, prepend=-1) - 1
    wrong = np.flatnonzero(lengths != 2 * _PIXELS - 1)
    if len(wrong):
        raise UserError(
            f"{path}: row {wrong[0] + 1} has {lengths[wrong[0]]} characters where "
            f"{2 * _PIXELS - 1} are expected, {_PIXELS} digits separated by one space: put the "
            "published file there"
        )


def _require_digits(pairs: np.ndarray, path: Path) -> None:
    right = np.empty(pairs.shape, bool)
    right[:, :, 0] = (pairs[:, :, 0] == _ZERO) | (pairs[:, :, 0] == _ONE)
    right[:, :-1, 1] = pairs[:, :-1, 1] == _SPACE
    right[:, -1, 1] = True  # the newline
    if not right.all():
        row, column = divmod(int(np.argmin(right)), 2 * _PIXELS)
        expected = "a space" if column % 2 else "0 or 1"
        raise UserError(
            f"{path}: row {row + 1} has {chr(pairs[row].flat[column])!r} as character "
            f"{column + 1} where {expected} is expected: put the published file there"
        )
