"""Scores a whole image set, in one process or several, and resumes after an interruption.

Each group of images is saved to a progress file as soon as it is finished. A group's results
depend on nothing but the group (see `importance.py`), so neither an interruption nor the number of
processes changes a digit.
"""

import hashlib
import struct
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ladder_vae.evaluation.importance import Bounds, ImportanceSampler
from runtime.distributed import Ranks
from runtime.errors import UserError
from runtime.files import to_json, writing

# A record is the group's number and a checksum, followed by the group's table in float64.
_HEADER = struct.Struct("<qI")


def _checksum(number: int, content: bytes) -> int:
    """The CRC-32 of a table. It starts from the group's number, so it covers that as well."""
    return zlib.crc32(content, number)


def fingerprint(module: nn.Module, sampler: ImportanceSampler, others: Mapping[str, Any]) -> str:
    """A hash of everything that the results depend on: weights, images, blocks and seed.

    `others` holds further values that they depend on, such as the versions of the code.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    settings = {
        "images": [sampler.images.name, sampler.images.split, list(sampler.images.shape)],
        "samples": sampler.samples,
        "blocks": [sampler.blocks.images, sampler.blocks.samples],
        "seed": sampler.seed,
        "from_prior": sampler.from_prior,
    }
    digest.update(to_json(settings | dict(others)).encode())
    images, generator = sampler.images, torch.Generator(sampler.images.device).manual_seed(0)
    for part in sampler.index.split(1000):
        digest.update(part.numpy().tobytes())
        levels = (images.batch(part.to(images.index_device), generator) * 255).round().byte()
        digest.update(levels.cpu().numpy().tobytes())
    return digest.hexdigest()


class ProgressFile:
    """The finished groups of a scoring, on disk until the scoring is complete.

    Each process appends to its own file, whose name begins with `key`. Reading a file stops at the
    first incomplete or damaged record; its group and those after it are computed again.
    """

    def __init__(self, folder: Path, key: str, sampler: ImportanceSampler) -> None:
        self.folder = folder
        self.key = key
        self._sampler = sampler

    def read(self) -> dict[int, Tensor]:
        """The tables of the finished groups, by the group's number."""
        tables: dict[int, Tensor] = {}
        for path in sorted(self.folder.glob(f"{self.key}.*")):
            with suppress(OSError):  # groups that cannot be read are computed again
                tables |= self._records(path.read_bytes())
        return tables

    @contextmanager
    def opened(self) -> Iterator[Callable[[int, Tensor], None]]:
        """Open a new file for this process; yields the function that saves a finished group."""
        path = self.folder / f"{self.key}.{uuid.uuid4().hex[:8]}"
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: closing a buffered file after a failed write would fail again.
            file = path.open("xb", buffering=0)

        def add(number: int, table: Tensor) -> None:
            content = table.numpy().tobytes()
            with writing(path):
                file.write(_HEADER.pack(number, _checksum(number, content)) + content)

        with file:
            yield add

    def remove(self) -> None:
        """Remove the files, once their results are saved elsewhere."""
        for path in self.folder.glob(f"{self.key}.*"):
            with suppress(OSError):  # such as another user's file
                path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: another scoring has files there
            self.folder.rmdir()

    def _records(self, content: bytes) -> dict[int, Tensor]:
        """The complete records at the start of a file."""
        tables = {}
        start = 0
        while start + _HEADER.size <= len(content):
            number, checksum = _HEADER.unpack_from(content, start)
            if not 0 <= number < len(self._sampler):
                break
            rows = self._sampler.size(number)
            start += _HEADER.size
            table = content[start : start + 8 * rows * self._sampler.columns]
            if _checksum(number, table) != checksum:
                break
            start += len(table)
            tables[number] = torch.frombuffer(bytearray(table), dtype=torch.float64).view(rows, -1)
        return tables


def score(
    sampler: ImportanceSampler,
    progress: ProgressFile,
    ranks: Ranks,
    check: Callable[[], object] = lambda: None,
) -> Bounds:
    """All bounds of `sampler`, in every process: read from `progress`, or computed.

    Shows a progress bar with the mean bound so far. `check` is called before each group and may
    raise to interrupt the scoring. Raises `UserError` if the progress file cannot be written.
    """
    tables = ranks.share(progress.read() if ranks.is_first else {})
    missing = [number for number in range(len(sampler)) if number not in tables]
    shown = sys.stderr.isatty() and ranks.is_first
    found: dict[int, Tensor] = {}
    with (
        progress.opened() as save,
        tqdm(total=0, unit="image", dynamic_ncols=True, disable=not shown) as bar,
    ):
        mine = missing[ranks.rank :: ranks.size]
        running = _RunningBound(sampler, tables)
        bar.total = running.count + sum(sampler.size(number) for number in mine)
        bar.update(running.count)
        for number in mine:
            check()
            found[number] = _group_table(sampler, number)
            save(number, found[number])
            running.add(found[number])
            bar.set_postfix_str(str(running), refresh=False)
            bar.update(len(found[number]))
    for part in ranks.collect(found):
        tables |= part
    return sampler.in_order(tables[number] for number in range(len(sampler)))


def _group_table(sampler: ImportanceSampler, number: int) -> Tensor:
    try:
        return sampler.group(number).table()
    except torch.OutOfMemoryError:
        size = sampler.blocks.images * sampler.blocks.samples
        raise UserError(
            f"{size:,} images at a time do not fit into the GPU's memory: give a smaller "
            "--batch-size"
        ) from None


class _RunningBound:
    """For the progress bar: the mean negative bound at the largest K over the images so far."""

    def __init__(self, sampler: ImportanceSampler, tables: Mapping[int, Tensor]) -> None:
        self.samples = sampler.samples
        self.count = 0
        self._sum = 0.0
        for table in tables.values():
            self.add(table)

    def add(self, table: Tensor) -> None:
        bounds = Bounds.from_table(table, self.samples).importance_weighted[self.samples[-1]]
        self._sum -= bounds.sum().item()
        self.count += len(table)

    def __str__(self) -> str:
        return f"{self._sum / self.count:.2f} nats, K = {self.samples[-1]}"
