"""Reading and writing files: an interruption leaves no half-written file, errors are one line."""

import json
import math
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from runtime.errors import UserError


@contextmanager
def temporary_file(path: Path) -> Iterator[BinaryIO]:
    """A new temporary file beside `path`, deleted at the end unless it was renamed.

    Raises `UserError` if it cannot be written, as in a read-only folder or on a full disk.
    """
    # `tempfile` would make files that only the user may read, but data and runs are often shared.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with writing(path), temporary.open("xb") as file:
            yield file
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


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
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
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
    """Delete the temporary files that killed processes left in a folder and its subfolders."""
    for path in folder.rglob(".*.part"):
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
