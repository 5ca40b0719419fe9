"""An array file of images to train on: .npy, or .npz with the arrays train, valid and test.

Images are uint8, or floats in [0, 1], which are rounded to 256 levels; (N, H, W), (N, H, W, C) or
(N, C, H, W) with C = 1 or 3. Integers 0 and 1, and booleans, are binary images.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from datasets import splits
from datasets.download import one_reason
from datasets.images import Shape
from datasets.picture_folder import resized
from runtime.errors import UserError
from runtime.files import reading

_BLOCK = 1024  # images


class ArrayFile:
    """A source of own images, with the interface of `PictureFolder`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def stamp(self) -> str:
        with reading(self.path):
            status = self.path.stat()
        return f"{status.st_size} bytes, {status.st_mtime_ns}"

    def prepare(self, size: Sequence[int], folder: Path) -> "PreparedArrays":
        with reading(self.path), self.path.open("rb") as file:
            fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        arrays = _arrays(self.path)
        checked = {name: _channels_last(a, f"{self.path} ({name})") for name, a in arrays.items()}
        shapes = {array.shape[1:] for array in checked.values()}
        if len(shapes) > 1:
            raise UserError(
                f"the arrays in {self.path} differ in image size: "
                + ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            )
        return PreparedArrays(self.path, checked, tuple(size), fingerprint)


class PreparedArrays:
    """Checked arrays, with the interface of `PreparedPictures`."""

    def __init__(
        self,
        path: Path,
        arrays: Mapping[str, np.ndarray],
        size: tuple[int, ...],
        fingerprint: str,
    ) -> None:
        self._path = path
        self._arrays = arrays
        height, width, channels = arrays["train"].shape[1:]
        self._size = size or (height, width)
        self.shape: Shape = (channels, self._size[0], self._size[1])
        self.fingerprint = fingerprint
        highest, between = 0.0, False
        for array in arrays.values():
            for block in _blocks(array):
                highest = max(highest, _check_range(block, path))
                between |= _has_levels_between(block)
        # Integers 0 and 1 are binary; as levels of 255 they would all be black.
        self._is_zero_or_one = arrays["train"].dtype == np.uint8 and highest <= 1
        is_resized = self._size != (height, width)
        self.binary = not is_resized and (not between or self._is_zero_or_one)
        self._index = _index(arrays)
        self.counts = {split: len(rows) for split, (_, rows) in self._index.items()}

    def rows(self) -> Iterator[np.ndarray]:
        from tqdm import tqdm

        with tqdm(total=sum(self.counts.values()), desc=self._path.name, disable=None) as bar:
            for source, index in self._index.values():
                for start in range(0, len(index), _BLOCK):
                    block = self._arrays[source][index[start : start + _BLOCK]]
                    levels = self._levels(block)
                    yield np.stack([resized(image, self._size) for image in levels])
                    bar.update(len(block))

    def _levels(self, block: np.ndarray) -> np.ndarray:
        if block.dtype == np.uint8 and not self._is_zero_or_one:
            return block
        return np.rint(block * np.float64(255)).astype(np.uint8)

    def finish(self) -> None:
        """There are no intermediate results."""


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by split; an array without a name, or the only one, is train."""
    try:
        with reading(path):
            # A .npy file is read block by block, so it may exceed the main memory.
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            named = {"array": found} if isinstance(found, np.ndarray) else dict(found)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} is damaged or no array file ({one_reason(error)})") from None
    except Exception as error:  # zipfile and zlib raise many kinds
        raise UserError(f"{path} is damaged ({one_reason(error)})") from None
    if len(named) == 1:
        return {"train": next(iter(named.values()))}
    arrays = {splits.NAMES[name]: array for name, array in named.items() if name in splits.NAMES}
    if len(arrays) < len(named) or "train" not in arrays:
        raise UserError(
            f"{path} holds the arrays {', '.join(named) or '(none)'}: it must hold one array, or "
            "train and, if you like, valid and test"
        )
    return arrays


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    """A view (N, H, W, C); raises `UserError` for what are no images."""
    if array.dtype != np.uint8 and array.dtype.kind not in "bf":
        raise UserError(f"{name} is {array.dtype}: give uint8, or floats in [0, 1]")
    if array.ndim == 3:
        array = array[..., np.newaxis]
    elif array.ndim == 4 and array.shape[-1] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise UserError(
            f"{name} has the shape {array.shape}: give (N, H, W), or (N, H, W, C) or (N, C, H, W) "
            "with C = 1 or 3"
        )
    return array


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _BLOCK):
        yield array[start : start + _BLOCK]


def _check_range(block: np.ndarray, path: Path) -> float:
    """The highest value; raises `UserError` for floats that are not in [0, 1]."""
    low, high = float(block.min()), float(block.max())
    if block.dtype.kind == "f" and not (low >= 0 and high <= 1):
        if np.isnan(block).any():
            raise UserError(f"{path} holds NaN: give floats in [0, 1], or uint8")
        advice = "; divide by 255, or store uint8" if 1 < high <= 255 and low >= 0 else ""
        raise UserError(f"{path} holds values from {low:g} to {high:g}: give [0, 1]{advice}")
    return high


def _has_levels_between(block: np.ndarray) -> bool:
    """Whether some levels are neither the lowest nor the highest."""
    top = 255 if block.dtype == np.uint8 else 1
    return bool(((block != 0) & (block != top)).any())


def _index(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    """For each split, the array that its images come from and their places there."""
    missing = {"valid", "test"} - arrays.keys()
    drawn = np.array([splits.by_hash(str(i), missing) for i in range(len(arrays["train"]))])
    index: dict[str, tuple[str, np.ndarray]] = {}
    for split in splits.ORDER:
        if split == "train" or split in missing:
            index[split] = ("train", np.flatnonzero(drawn == split))
        else:
            index[split] = (split, np.arange(len(arrays[split])))
    return index
