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

from ladder_vae.evaluation.groups import Found, Sampler
from runtime.device import enough_memory
from runtime.distributed import Ranks
from runtime.files import names_in, to_json, writing
from runtime.signals import Interrupted, Interruption

# A record is the group's number and a checksum, followed by the group's table in float64.
_HEADER = struct.Struct("<qI")


def _checksum(number: int, content: bytes) -> int:
    """The CRC-32 of a table. It starts from the group's number, so it covers that as well."""
    return zlib.crc32(content, number)


def fingerprint(module: nn.Module, sampler: Sampler[Any], others: Mapping[str, Any]) -> str:
    """A hash of everything that the results depend on: weights, images, blocks and seed.

    `others` holds further values that they depend on, such as the versions of the code.
    """
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    settings = {
        "images": [sampler.images.name, sampler.images.split, list(sampler.images.shape)],
        **sampler.settings(),
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

    def __init__(self, folder: Path, key: str, sampler: Sampler[Any]) -> None:
        self.folder = folder
        self.key = key
        self._sampler = sampler

    def read(self) -> dict[int, Tensor]:
        """The tables of the finished groups, by the group's number."""
        tables: dict[int, Tensor] = {}
        for path in self._files():
            with suppress(OSError):  # such as another user's; it is computed again
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
        for path in self._files():
            with suppress(OSError):  # such as another user's file
                path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: another scoring has files there
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        names = names_in(self.folder)
        return [self.folder / name for name in names if name.startswith(f"{self.key}.")]

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
    sampler: Sampler[Found],
    progress: ProgressFile,
    ranks: Ranks,
    check: Callable[[], object] = lambda: None,
) -> Found:
    """All results of `sampler`, in every process: read from `progress`, or computed.

    Shows a progress bar with the mean bound so far. `check` is called before each group and may
    raise to interrupt the scoring. After a signal to any process, all stop before their next group
    and raise `Interrupted`. Raises `UserError` if the progress file cannot be written.
    """
    tables = ranks.share(progress.read() if ranks.is_first else {})
    missing = [number for number in range(len(sampler)) if number not in tables]
    shown = sys.stderr.isatty() and ranks.is_first
    found: dict[int, Tensor] = {}
    interruption = Interruption(ranks.any_signal if ranks.size > 1 else None)
    with (
        interruption,
        progress.opened() as save,
        tqdm(total=0, unit="image", dynamic_ncols=True, disable=not shown) as bar,
    ):
        mine = missing[ranks.rank :: ranks.size]
        running = _RunningBound(sampler, tables)
        bar.total = running.count + sum(sampler.size(number) for number in mine)
        bar.update(running.count)
        for number in mine:
            check()
            interruption.agree()
            if interruption.signal is not None:
                break
            found[number] = _group_table(sampler, number)
            save(number, found[number])
            running.add(found[number])
            bar.set_postfix_str(str(running), refresh=False)
            bar.update(len(found[number]))
        parts = ranks.collect((found, interruption.signal))
    for part, received in parts:
        if received is not None:
            raise Interrupted(received)
        tables |= part
    return sampler.in_order(tables[number] for number in range(len(sampler)))


def _group_table(sampler: Sampler[Any], number: int) -> Tensor:
    with enough_memory(
        f"{sampler.pairs:,} images at a time; give a smaller number to --batch-size"
    ):
        return sampler.group(number).table()


class _RunningBound:
    """For the progress bar: the mean negative bound over the images so far."""

    def __init__(self, sampler: Sampler[Any], tables: Mapping[int, Tensor]) -> None:
        self._sampler = sampler
        self.count = 0
        self._sum = 0.0
        for table in tables.values():
            self.add(table)

    def add(self, table: Tensor) -> None:
        self._sum -= self._sampler.bound(table).sum().item()
        self.count += len(table)

    def __str__(self) -> str:
        return f"{self._sum / self.count:.2f} nats, {self._sampler.describe_bound()}"
