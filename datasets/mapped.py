"""`NAME.npy` for images that do not fit into memory: written row by row, and memory-mapped.

`NAME.json` beside it holds its size, its SHA-256, the SHA-256 of blocks spread over the file, and
what else the writer records. Each load checks size and blocks only, because reading all of a large
file would take too long.
"""

import hashlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from runtime.errors import UserError
from runtime.files import read_json, reading, write_atomically, write_json

_BLOCKS = 64
_BLOCK = 1 << 16  # bytes


def write_mapped(
    path: Path,
    shape: tuple[int, ...],
    rows: Iterable[np.ndarray],
    origin: Mapping[str, Any] = {},
) -> None:
    """Write the uint8 array of `shape` that consists of `rows`, completely or not at all.

    `origin` is added to the record.

    Raises:
        UserError: a file cannot be written.
    """

    def write(file: BinaryIO) -> None:
        digest = hashlib.sha256()
        for chunk in _npy_chunks(shape, rows):
            file.write(chunk)
            digest.update(chunk)
        file.flush()
        # The record comes first, so that an array with its final name always has one.
        checksums = _record(Path(file.name)) | {"sha256": digest.hexdigest()}
        write_json(record_path(path), checksums | dict(origin))

    write_atomically(path, write)


def open_mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map the array that `write_mapped` wrote; changes to it are not written back.

    Raises:
        UserError: the file differs from what was written, or has another shape.
    """
    with reading(path):
        found = _record(path)
    kept = read_json(record_path(path))
    if not (isinstance(kept, dict) and found.items() <= kept.items()):
        raise UserError(
            f"{path} is damaged or another file (its checksum differs from that in "
            f"{record_path(path)}): delete both to have them made again"
        )
    array = np.load(path, mmap_mode="c")
    if array.dtype != np.uint8 or array.shape != shape:
        raise UserError(
            f"{path} is another file (it is {array.dtype} {array.shape} where uint8 {shape} is "
            "expected): delete it to have it made again"
        )
    return array


def record_path(path: Path) -> Path:
    """The file beside `path` that holds its checksums."""
    return path.with_suffix(".json")


def _npy_chunks(shape: tuple[int, ...], rows: Iterable[np.ndarray]) -> Iterable[bytes]:
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    yield header.getvalue()
    for row in rows:
        yield row.tobytes()


def _record(path: Path) -> dict[str, Any]:
    """What each load checks: the size, and the SHA-256 of blocks spread over the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        for start in np.linspace(0, max(0, size - _BLOCK), _BLOCKS).astype(int).tolist():
            file.seek(start)
            digest.update(file.read(_BLOCK))
    return {"bytes": size, "sampled_sha256": digest.hexdigest()}
