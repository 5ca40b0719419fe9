"""Reading and writing files: an interruption leaves no half-written file, errors are one line."""

import fcntl
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import UserError


def utf_8(text: str) -> str:
    """`text` with escapes for what is not UTF-8, as in the name of a file."""
    return text.encode(errors="backslashreplace").decode()


def path_argument(text: str) -> Path:
    """The path in a command-line argument; ~ is the home folder, as in `--out=~/runs`."""
    return Path(os.path.expanduser(text))


def exists(path: Path) -> bool:
    """Whether there is a file or folder.

    Raises `UserError` if the file system does not say, as without permission for the folder.
    """
    try:
        with reading(path):
            path.stat()
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return False
        raise
    return True


def names_in(folder: Path) -> list[str]:
    """The names in a folder in order; none if there is no such folder.

    Raises `UserError` if the folder cannot be read.
    """
    if not exists(folder):
        return []
    with reading(folder):
        return sorted(os.listdir(folder))


@contextmanager
def temporary_file(path: Path) -> Iterator[BinaryIO]:
    """A new temporary file beside `path`, deleted at the end unless it was renamed.

    Raises `UserError` if it cannot be written, as in a read-only folder or on a full disk.
    """
    with writing(path):
        temporary, file = _new_partial_file(path)
        try:
            with file:
                yield file
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _new_partial_file(path: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `path`, locked while it is written."""
    while True:
        # `tempfile` would make files that only the user may read, but data and runs are often
        # shared.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
        file = temporary.open("xb")
        with suppress(OSError):  # some file systems have no locks
            fcntl.lockf(file, fcntl.LOCK_EX)
        if os.path.exists(file.name):  # or another process removed it before it was locked
            return temporary, file
        file.close()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): make room and give write access "
            "there, or choose another folder"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn a failure to read `path` into a `UserError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror or error})") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file by calling `write`, and create its folder; raises `UserError` on failure."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path) as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)
    # Sync the folder too, so that the new name survives a power failure.
    with suppress(OSError):  # some file systems do not support this
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partial_files(folder: Path) -> None:
    """Delete the temporary files that killed processes left in a folder and its subfolders.

    A file that a process is writing stays, and so does one that cannot be deleted.
    """
    for path in folder.rglob(".*.part"):
        with suppress(OSError), path.open("r+b") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises `UserError` if it cannot be read or is not JSON."""
    with reading(path):
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON; numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write(f"{to_json(value, indent=2)}\n".encode()))


def write_text(path: Path, text: str) -> None:
    """Write `utf_8(text)`, atomically."""
    write_atomically(path, lambda file: file.write(utf_8(text).encode()))


class AppendedFile:
    """A file to append records to; a record that does not fit on the disk is not written at all."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def append(self, record: bytes) -> None:
        """Append a record, or raise `OSError` and leave the file unchanged."""
        written = 0
        try:
            while written < len(record):  # a nearly full disk accepts only a part
                written += self._file.write(record[written:])
        except OSError:
            os.ftruncate(self._file.fileno(), self._size)
            raise
        self._size += len(record)

    def sync(self) -> None:
        """Flush the file to disk, so that it survives a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()
