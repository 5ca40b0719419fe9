"""The cached `NAME.npz` of a data set: made once, complete or not at all, checked at each load."""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.download import one_reason
from runtime.errors import UserError
from runtime.files import reading, write_atomically, writing


def sha256_of_values(array: np.ndarray) -> str:
    """SHA-256 of the values of a uint8 array in C order."""
    return hashlib.sha256(array.data).hexdigest()


class Contents(NamedTuple):
    """The shape of a data set's uint8 array, and the SHA-256 that `digest` computes of it.

    `sha256` None means that only the npz file's own checksum is checked.
    """

    shape: tuple[int, ...]
    sha256: str | None
    digest: Callable[[np.ndarray], str] = sha256_of_values


def load_arrays(
    path: Path,
    expected: Mapping[str, Contents],
    names: Iterable[str],
    make: Callable[[], Mapping[str, np.ndarray]],
    *,
    compress: bool = True,
) -> dict[str, np.ndarray]:
    """The uint8 arrays `names` of the npz file `path`, checked against `expected`.

    If the file is missing, `make` returns all arrays of `expected`, which are checked and written.
    Pass `compress=False` for arrays that barely shrink: without compression they load faster.

    Raises:
        UserError: the contents are not as expected, or the file cannot be read or written.
    """
    if not os.path.exists(path):
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        made = make()
        try:
            checked = _checked(made, expected)
        except ValueError as error:
            raise UserError(
                f"{path} was not made: {error}, which differs from the published data"
            ) from error
        save = np.savez_compressed if compress else np.savez
        write_atomically(path, lambda file: save(file, allow_pickle=False, **checked))
    return _read(path, {name: expected[name] for name in names})


def _read(path: Path, expected: Mapping[str, Contents]) -> dict[str, np.ndarray]:
    with reading(path), path.open("rb") as file:
        try:
            with np.load(file) as archive:
                return _checked(archive, expected)
        except OSError:
            raise
        except Exception as error:  # NumPy, zipfile and zlib raise many kinds
            raise UserError(
                f"{path} is damaged or another file ({one_reason(error)}): delete it to have it "
                "made again, or put the right one there"
            ) from error


def _checked(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, Contents]
) -> dict[str, np.ndarray]:
    """The expected arrays in C order; raises `ValueError` if one differs."""
    checked = {}
    for name, contents in expected.items():
        if name not in arrays:
            raise ValueError(f"there is no array '{name}'")
        array = np.ascontiguousarray(arrays[name])
        if array.dtype != np.uint8 or array.shape != contents.shape:
            raise ValueError(
                f"the array '{name}' is {array.dtype} {array.shape} "
                f"where uint8 {contents.shape} is expected"
            )
        if contents.sha256 is not None and contents.digest(array) != contents.sha256:
            raise ValueError(
                f"the array '{name}' has SHA-256 {contents.digest(array)}, not {contents.sha256}"
            )
        checked[name] = array
    return checked
