"""A file ``NAME.npy`` for images too many to load: written row by row, read by memory map.

Beside it lies ``NAME.json`` with its size and SHA-256, and the SHA-256 of blocks sampled over the
whole file, which are checked at each load: all of a large file would take too long.
"""

import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from runtime.errors import UserError
from runtime.files import write_atomically

from .cache import reading, require_no_folder

_BLOCKS = 64
_BLOCK = 1 << 16  # bytes


def write_mapped(path: Path, shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> None:
    """Write the array of ``shape`` whose ``rows`` these are, uint8: all of it, or nothing.

    Raises:
        UserError: a file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        for chunk in _npy_chunks(shape, rows):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        record = _record(Path(file.name)) | {"sha256": digest.hexdigest()}
        # Before the array is there under its own name: no whole array is without its record.
        text = json.dumps(record, indent=1) + "\n"
        write_atomically(record_path(path), lambda beside: beside.write(text.encode()))

    write_atomically(path, write)


def open_mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array that `write_mapped` wrote, as a memory map. Changes of it are not written.

    Raises:
        UserError: the files are not what they were when they were written, or another shape's.
    """
    require_no_folder(path)
    with reading(path):
        found = _record(path)
    if found != _kept_record(path):
        raise _damaged(path, f"it is not what {record_path(path)} says")
    try:
        with reading(path):
            array = np.load(path, mmap_mode="c")
    except (EOFError, ValueError) as error:
        raise _damaged(path, f"it cannot be read: {' '.join(str(error).split())}") from error
    if array.dtype != np.uint8 or array.shape != shape:
        raise _damaged(path, f"it is {array.dtype} {array.shape} where uint8 {shape} is expected")
    return array


def record_path(path: Path) -> Path:
    """The file beside ``path`` that holds its check sums."""
    return path.with_suffix(".json")


def _npy_chunks(shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> Iterable[bytes]:
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    yield header.getvalue()
    for row in rows:
        yield row.tobytes()


def _record(path: Path) -> dict[str, Any]:
    """What is checked at each load: the size, and the SHA-256 of blocks from first to last."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        for start in np.linspace(0, max(0, size - _BLOCK), _BLOCKS).astype(int).tolist():
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return {"bytes": size, "sampled_sha256": digest.hexdigest()}


def _kept_record(path: Path) -> dict[str, Any]:
    record = record_path(path)
    try:
        with reading(record):
            kept = json.loads(record.read_bytes())
        return {name: kept[name] for name in ("bytes", "sampled_sha256")}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{record} does not hold the check sums of {path}: delete both to have them made again"
        ) from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged or another file ({what}): delete it to have it made again")
