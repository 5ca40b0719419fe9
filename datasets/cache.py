"""One ``NAME.npz`` for each data set: made once, whole or not at all, and checked at each load."""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from runtime.errors import UserError
from runtime.files import write_atomically, writing

# What reading a damaged npz file raises.
_UNREADABLE = (
    EOFError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class _UnexpectedError(Exception):
    """Arrays are not those of the data set; the message says in what."""


def sha256_of_values(array: np.ndarray) -> str:
    """SHA-256 of the values of a uint8 array in C order."""
    return hashlib.sha256(array.data).hexdigest()


class Contents(NamedTuple):
    """What a uint8 array of a data set must be: its shape, and the SHA-256 that ``digest`` makes.

    Where ``sha256`` is None the values are not known beforehand, and the check sum that an npz
    file has of each of its arrays is the only one.
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
    """The uint8 arrays ``names`` out of the file ``path``, checked against ``expected``.

    If there is no such file, ``make`` is called for all the arrays, which are checked and
    written there first; without ``compress`` where that would gain little room and make
    loading slow.

    Raises:
        UserError: the file is not what is expected, or cannot be read or written.
    """
    with reading(path):
        missing = not path.exists()
    if missing:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            made = _checked(make(), expected)
        except _UnexpectedError as error:
            raise UserError(
                f"{path} was not made: {error}, which is not what is published"
            ) from error
        _write(path, made, np.savez_compressed if compress else np.savez)
    return _read(path, {name: expected[name] for name in names})


def _write(path: Path, arrays: Mapping[str, np.ndarray], save: Callable[..., None]) -> None:
    write_atomically(path, lambda file: save(file, allow_pickle=False, **arrays))


def _read(path: Path, expected: Mapping[str, Contents]) -> dict[str, np.ndarray]:
    require_no_folder(path)
    try:
        with reading(path), path.open("rb") as file:
            return _checked(_unzip(file, expected), expected)
    except _UnexpectedError as error:
        raise UserError(
            f"{path} is damaged or another file ({error}): delete it to have it made again, "
            "or put the right one there"
        ) from error


def _unzip(file: BinaryIO, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Those of the arrays ``names`` that there are; the others are not even read."""
    if not zipfile.is_zipfile(file):
        raise _UnexpectedError("it is no npz file, or a part of one")
    file.seek(0)
    try:
        with np.load(file) as archive:
            return {name: archive[name] for name in names if name in archive.files}
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise _UnexpectedError(f"it cannot be read: {reason}") from error


def _checked(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, Contents]
) -> dict[str, np.ndarray]:
    """The arrays in C order, once each is known to be the one expected."""
    checked = {}
    for name, contents in expected.items():
        if name not in arrays:
            raise _UnexpectedError(f"there is no array '{name}'")
        array = np.ascontiguousarray(arrays[name])
        if array.dtype != np.uint8 or array.shape != contents.shape:
            raise _UnexpectedError(
                f"the array '{name}' is {array.dtype} {array.shape} "
                f"where uint8 {contents.shape} is expected"
            )
        if contents.sha256 is not None and contents.digest(array) != contents.sha256:
            raise _UnexpectedError(
                f"the array '{name}' has SHA-256 {contents.digest(array)}, not {contents.sha256}"
            )
        checked[name] = array
    return checked


def require_no_folder(path: Path) -> None:
    """Raises `UserError` if ``path`` is a folder, which nobody should be told to delete."""
    if path.is_dir():
        raise UserError(f"{path} is a folder where a file is expected: move it away")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns a failure to read ``path`` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror or error}): give read access to it, or choose "
            "another data folder"
        ) from error
