"""The user's own images for training: a folder of pictures, or an array file.

The first use prepares them: it writes `DATA_DIR/own/NAME-HxW-FINGERPRINT.npy`, which training maps
into memory, and a record beside it. The fingerprint depends on the contents of the source and on
its splits, so a run finds the images that it was trained on also after the source has changed.
"""

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datasets.array_file import ArrayFile
from datasets.images import ImageSet, MappedImages, Shape
from datasets.mapped import open_mapped, record_path, write_mapped
from datasets.picture_folder import PictureFolder
from datasets.splits import ORDER
from runtime.errors import UserError
from runtime.files import read_json


@dataclass(frozen=True, kw_only=True)
class OwnImages:
    """What a run records of its own images; it loads them like the module of a data set."""

    path: str  # the absolute path of the source
    shape: Shape
    binary: bool
    fingerprint: str
    counts: Mapping[str, int]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "OwnImages":
        """The images that `dataclasses.asdict` described."""
        return cls(**{**values, "shape": tuple(values["shape"])})

    @property
    def SHAPE(self) -> Shape:  # noqa: N802 (the interface of a data set's module)
        return self.shape

    @property
    def BINARY(self) -> bool:  # noqa: N802
        return self.binary

    @property
    def name(self) -> str:
        """A name that other images do not share."""
        return f"{Path(self.path).stem}-{self.fingerprint[:8]}"

    def prepared_path(self, data_dir: Path) -> Path:
        """The memory-mapped file."""
        _, height, width = self.shape
        name = f"{Path(self.path).stem}-{height}x{width}-{self.fingerprint[:12]}.npy"
        return data_dir / "own" / name

    def load(self, split: str, data_dir: Path) -> ImageSet:
        """One split, memory-mapped; prepares the images again if their prepared file is missing.

        Prints a warning if the source has changed since it was prepared.

        Raises:
            UserError: there is neither the prepared file nor the source, or the source has other
                images than before.
        """
        path = self.prepared_path(data_dir)
        if not path.exists():
            if not os.path.exists(self.path):
                raise UserError(
                    f"the images of this run have moved: there is neither {self.path} nor {path}, "
                    "which was prepared from it; put one of them back there"
                )
            found = prepare(self.path, self.shape[1:], data_dir)
            if found.fingerprint != self.fingerprint:
                raise UserError(
                    f"{self.path} has changed since the run began ({_total(self.counts)} images "
                    f"then, {_total(found.counts)} now): restore it, or put {path} there, which "
                    "holds the images of the run"
                )
        _warn_of_changes(self.path, read_json(record_path(path)).get("stamp"))
        channels, height, width = self.shape
        rows = open_mapped(path, (_total(self.counts), height, width, channels))
        images = rows[_rows_of(split, self.counts)]
        return MappedImages(self.name, split, self.shape, torch.from_numpy(images))


# Stands for images that are not prepared yet, of which every likelihood is possible.
UNKNOWN = OwnImages(path="", shape=(1, 1, 1), binary=True, fingerprint="", counts={})


def is_path(dataset: str) -> bool:
    """Whether a `--dataset` that is not a name is meant as a path."""
    return os.sep in dataset or dataset.endswith((".npy", ".npz")) or os.path.exists(dataset)


def prepare(path: str | Path, size: Sequence[int], data_dir: str | Path) -> OwnImages:
    """Prepare the images at `path`, unless they are prepared already.

    Args:
        path: a folder of pictures, or an array file, .npy or .npz.
        size: (H, W), to which images are cropped at the centre and resized; empty for the size
            that all of them have.
        data_dir: the folder of the data sets' files.

    Raises:
        UserError: an image cannot be used, or the images do not fit together.
    """
    source = open_source(path)
    folder = Path(data_dir).expanduser() / "own"
    asked = list(size)
    earlier = [
        record
        for record in map(read_json, sorted(folder.glob("*.json")))
        if record["source"] == str(source.path) and record["asked"] == asked
    ]
    stamp = source.stamp
    for record in earlier:
        if record["stamp"] == stamp:
            return OwnImages.from_dict(record["images"])
    if earlier:
        print(f"{path} has changed since it was prepared: prepares it again", file=sys.stderr)
    prepared = source.prepare(asked, folder)
    for split in ORDER:
        if not prepared.counts[split]:
            raise UserError(
                f"{path} has {_total(prepared.counts)} images, of which none falls into {split}: "
                "add images, or choose the splits yourself (docs/data.md)"
            )
    own = OwnImages(
        path=str(source.path),
        shape=prepared.shape,
        binary=prepared.binary,
        fingerprint=prepared.fingerprint,
        counts=dict(prepared.counts),
    )
    channels, height, width = own.shape
    write_mapped(
        own.prepared_path(folder.parent),
        (_total(own.counts), height, width, channels),
        prepared.rows(),
        {"source": own.path, "stamp": stamp, "asked": asked, "images": asdict(own)},
    )
    prepared.finish()
    return own


def open_source(path: str | Path) -> PictureFolder | ArrayFile:
    """The images at a path; raises `UserError` if there are none."""
    given = Path(path).expanduser()
    if os.path.isdir(given):
        return PictureFolder(given.resolve())
    if not os.path.exists(given):
        raise UserError(f"there is no {given}: give a folder of pictures, a .npy or a .npz file")
    if given.suffix not in (".npy", ".npz"):
        raise UserError(f"{given} is neither a folder of pictures nor a .npy or .npz file")
    return ArrayFile(given.resolve())


@functools.cache  # one warning, although each split is loaded
def _warn_of_changes(path: str, stamp: str) -> None:
    if os.path.exists(path) and open_source(path).stamp != stamp:
        print(
            f"warning: {path} has changed since it was prepared; the run uses the images of then",
            file=sys.stderr,
        )


def _rows_of(split: str, counts: Mapping[str, int]) -> slice:
    first, _, last = split.partition("+")
    ends = np.cumsum([counts[name] for name in ORDER]).tolist()
    start, end = ORDER.index(first), ORDER.index(last or first)
    return slice(ends[start] - counts[first], ends[end])


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())
