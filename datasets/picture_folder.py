"""A folder of pictures to train on: found, checked and decoded by several processes.

Pictures are the files with one of `SUFFIXES`, also in subfolders. If there are subfolders called
train, valid and test, they are the splits. Decoded blocks are kept until all are done, so that an
interrupted preparation continues where it was.
"""

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from datasets import splits
from datasets.folder import SUFFIXES, picture_header, read_picture
from datasets.images import Shape
from runtime.errors import UserError
from runtime.files import reading, write_atomically

_BLOCK = 256  # pictures


class _Picture(NamedTuple):
    """A picture's path in the folder, its split, and what changes with its content."""

    name: str
    split: str
    bytes: int
    modified: int  # nanoseconds


class PictureFolder:
    """A source of own images.

    Attributes:
        path: the absolute path.
        stamp: changes with names, sizes and modification times; known without reading the pictures.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pictures = _in_splits(path, _found(path))

    @property
    def stamp(self) -> str:
        return hashlib.sha256(repr(self._pictures).encode()).hexdigest()

    def prepare(self, size: Sequence[int], folder: Path) -> "PreparedPictures":
        """Decode all pictures; an interrupted call continues from what it left in `folder`.

        `size` is (H, W), or empty for the size that all pictures have. Raises `UserError` if a
        picture cannot be used, or the pictures do not fit together.
        """
        shape = self._shape(size)
        key = hashlib.sha256(f"{self.path}\n{shape}".encode()).hexdigest()[:12]
        partial_folder = folder / f".{self.path.name}-{key}.partial"
        blocks = [self._pictures[i : i + _BLOCK] for i in range(0, len(self._pictures), _BLOCK)]
        files = [partial_folder / f"{_key(block)}.npz" for block in blocks]
        jobs = [job for job in zip(blocks, files, strict=True) if not job[1].exists()]
        decode = partial(_decode_block, self.path, shape, bool(size))
        for _ in _in_parallel(decode, jobs, f"preparing {self.path.name}"):
            pass
        return PreparedPictures(shape, self._pictures, files, partial_folder)

    def _shape(self, size: Sequence[int]) -> Shape:
        """(C, H, W) of the prepared images; raises `UserError` if the pictures do not agree."""
        names = [picture.name for picture in self._pictures]
        jobs = [names[i : i + _BLOCK] for i in range(0, len(names), _BLOCK)]
        read = partial(_read_headers, self.path)
        headers = [h for block in _in_parallel(read, jobs, "reading sizes") for h in block]
        channels = Counter(header[0] for header in headers)
        if len(channels) > 1:
            grey, colour = (
                next(n for n, h in zip(names, headers, strict=True) if h[0] == c) for c in (1, 3)
            )
            raise UserError(
                f"{self.path} mixes {channels[1]:,} grey pictures, such as {grey}, and "
                f"{channels[3]:,} in colour, such as {colour}: save all as grey or all as RGB"
            )
        sizes = Counter(header[1:] for header in headers)
        if not size and len(sizes) > 1:
            shown = ", ".join(f"{h}x{w} ({n:,})" for (h, w), n in sizes.most_common(4))
            more = f" and {len(sizes) - 4:,} other sizes" if len(sizes) > 4 else ""
            raise UserError(
                f"the pictures in {self.path} differ in height and width: {shown}{more}; "
                "give --image-size H W to crop and resize them"
            )
        height, width = size or next(iter(sizes))
        return (next(iter(channels)), height, width)


class PreparedPictures:
    """Decoded pictures in the size of the model, in block files.

    Attributes:
        shape: (C, H, W).
        binary: whether all levels are 0 or 255.
        fingerprint: SHA-256 of the files' names, splits and contents.
        counts: the number of images of each split.
    """

    def __init__(
        self, shape: Shape, pictures: Sequence[_Picture], files: Sequence[Path], folder: Path
    ) -> None:
        self.shape = shape
        self._files = files
        self._folder = folder
        found = Counter(picture.split for picture in pictures)
        self.counts = {split: found[split] for split in splits.ORDER}
        self.binary = True
        digest = hashlib.sha256()
        names = iter(pictures)
        for file in files:
            with np.load(file) as block:
                self.binary &= bool(block["binary"])
                for sha256 in block["sha256"]:
                    picture = next(names)
                    digest.update(f"{picture.split}\n{picture.name}\n".encode() + sha256.tobytes())
        self.fingerprint = digest.hexdigest()

    def rows(self) -> Iterator[np.ndarray]:
        """All images, split by split, in blocks uint8 (n, H, W, C)."""
        for file in self._files:
            with np.load(file) as block:
                yield block["images"]

    def finish(self) -> None:
        """Remove the block files."""
        shutil.rmtree(self._folder, ignore_errors=True)


def resized(levels: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """An image uint8 (H, W, C), cropped at the centre to the shape of `size` and resized to it.

    Lanczos filter, whose support grows with the reduction, so that nothing is aliased.
    """
    from PIL import Image

    height, width = size
    if levels.shape[:2] == (height, width):
        return levels
    scale = min(levels.shape[0] / height, levels.shape[1] / width)
    cut = [max(1, round(scale * side)) for side in (height, width)]
    top, left = ((have - want) // 2 for have, want in zip(levels.shape, cut, strict=False))
    # Crop first: Pillow's `box` would let the filter see pixels outside.
    cropped = levels[top : top + cut[0], left : left + cut[1]]
    image = Image.fromarray(cropped.squeeze(-1) if levels.shape[-1] == 1 else cropped)
    fitted = image.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(fitted).reshape(height, width, -1)


# --- The files ---


def _found(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Path, size and time of each picture in a folder and its subfolders; hidden ones excluded."""

    def refuse(error: OSError) -> None:
        raise error

    with reading(folder):
        for place, folders, files in os.walk(folder, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                    path = Path(place, name)
                    status = path.stat()
                    found = path.relative_to(folder).as_posix()
                    yield found, status.st_size, status.st_mtime_ns


def _in_splits(folder: Path, found: Iterator[tuple[str, int, int]]) -> list[_Picture]:
    """The pictures by split and name; raises `UserError` if there is none to train on."""
    files = sorted(found)
    if not files:
        raise UserError(f"{folder} holds no picture: put some there, {', '.join(SUFFIXES)}")
    named = [splits.NAMES.get(name.partition("/")[0].lower(), "") for name, _, _ in files]
    named = [split if "/" in name else "" for split, (name, _, _) in zip(named, files, strict=True)]
    given = set(named) - {""}
    if given and "" in named:
        raise UserError(
            f"{folder} has folders for its splits, but {files[named.index('')][0]} is in none of "
            "them: move it into train, valid or test"
        )
    if given and "train" not in given:
        raise UserError(f"{folder} has a folder {given.pop()} but no pictures in train: add some")
    missing = {"valid", "test"} - given
    pictures = [
        _Picture(name, splits.by_hash(name, missing) if split in ("", "train") else split, *status)
        for split, (name, *status) in zip(named, files, strict=True)
    ]
    return sorted(pictures, key=lambda picture: (splits.ORDER.index(picture.split), picture.name))


def _key(block: Sequence[_Picture]) -> str:
    return hashlib.sha256(repr(block).encode()).hexdigest()[:16]


# --- What the processes do ---


def _read_headers(folder: Path, names: Sequence[str]) -> list[tuple[int, int, int]]:
    """(C, H, W) of each picture."""
    return [picture_header(folder / name) for name in names]


def _decode_block(
    folder: Path, shape: Shape, resize: bool, job: tuple[Sequence[_Picture], Path]
) -> None:
    """Write the file of a block: its images, and the SHA-256 of their files."""
    pictures, file = job
    channels, height, width = shape
    images = np.empty((len(pictures), height, width, channels), np.uint8)
    sha256 = np.empty((len(pictures), 32), np.uint8)
    for row, picture in enumerate(pictures):
        path = folder / picture.name
        levels = read_picture(path)
        if levels.shape[-1] != channels or not (resize or levels.shape == images.shape[1:]):
            raise UserError(f"{path} was replaced while it was read: start the command again")
        images[row] = resized(levels, (height, width))
        with reading(path), path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").digest()
        sha256[row] = np.frombuffer(digest, np.uint8)
    binary = bool(((images == 0) | (images == 255)).all())
    write_atomically(
        file, lambda opened: np.savez(opened, images=images, sha256=sha256, binary=binary)
    )


class _Jobs(Dataset[Any]):
    """The result of each job, or the `UserError` that it raised."""

    def __init__(self, do: Callable[[Any], Any], jobs: Sequence[Any]) -> None:
        self._do = do
        self._jobs = jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def __getitem__(self, number: int) -> Any:
        try:
            return self._do(self._jobs[number])
        except UserError as error:
            return error


def _unchanged(result: Any) -> Any:
    return result


def _in_parallel(do: Callable[[Any], Any], jobs: Sequence[Any], words: str) -> Iterator[Any]:
    """The results of `do` for each job, in order, from one process per core.

    torch's DataLoader serves as the pool: its processes end with this one, however that ends.
    """
    from tqdm import tqdm

    workers = 0 if len(jobs) < 3 else min(len(jobs), len(os.sched_getaffinity(0)))
    loader: DataLoader[Any] = DataLoader(
        _Jobs(do, jobs), batch_size=None, num_workers=workers, collate_fn=_unchanged
    )
    for result in tqdm(loader, desc=words, unit=" blocks", disable=None):
        if isinstance(result, UserError):
            raise result
        yield result
