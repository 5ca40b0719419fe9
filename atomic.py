"""Files that are either what they were or complete, whatever interrupts their writing."""

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from errors import UserError


@contextmanager
def temporary_file(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` to write in, gone at the end unless renamed by then.

    Raises `UserError` where it cannot be written, as in a read-only folder or on a full disk.
    """
    # Not `tempfile`: its files are private to the user, and data and runs are often shared.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with writing(path), temporary.open("xb") as file:
            yield file
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failure to write `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): make room and give write access "
            "there, or choose another folder"
        ) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through `write`, and its folder first; raises as `temporary_file` does."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)
    # The new name, too, shall outlast a failure of power.
    with suppress(OSError):  # not every file system knows this
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partial_files(folder: Path) -> None:
    """Remove what writers left in a folder and those below it when they were killed."""
    for path in folder.rglob(".*.part"):
        path.unlink(missing_ok=True)


class AppendedFile:
    """A file that grows by whole pieces: a piece that does not fit on the disk leaves no trace."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def append(self, piece: bytes) -> None:
        """Add a piece, or raise `OSError` and leave the file as it was."""
        written = 0
        try:
            while written < len(piece):  # a nearly full disk takes a part
                written += self._file.write(piece[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(piece)

    def sync(self) -> None:
        """Have the file outlast a failure of power."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
