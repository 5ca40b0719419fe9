"""Reading a run's metrics.jsonl, which has one JSON object per log entry."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import reading

# An entry's step and scalars, by tag.
Entry = dict[str, float]


def finite_entries(path: Path) -> list[Entry]:
    """The entries of a metrics.jsonl, without values that are not finite.

    Can be called while training writes the file. Raises `UserError` if it is damaged.
    """
    return [
        {tag: value for tag, value in entry.items() if value is not None and abs(value) < 1e300}
        for entry in read_entries(path)
    ]


def held_out_split(entries: Sequence[Entry]) -> str | None:
    """The split used for evaluations during training; None before the first evaluation."""
    for entry in entries:
        for tag in entry:
            split, _, name = tag.partition("/")
            if name == "negative_elbo" and split != "train":
                return split
    return None


def newest(entries: Sequence[Entry], tag: str) -> Entry | None:
    """The last entry that has the scalar `tag`, or None."""
    return next((entry for entry in reversed(entries) if tag in entry), None)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; none if there is no file.

    Ignores a last line that was cut off. Raises `UserError` if the file is damaged.
    """
    if not path.exists():
        return []
    with reading(path):
        lines = path.read_bytes().splitlines(keepends=True)
    entries = []
    for line in lines:
        if not line.endswith(b"\n"):
            continue  # the run was killed while writing it
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError):
            entries.append(None)
        if not _is_entry(entries[-1]):
            shown = line.strip()[:40].decode(errors="replace")
            raise UserError(f"{path} is damaged: {shown!r} is not a log entry")
    return entries


def _is_entry(entry: Any) -> bool:
    """Whether `entry` has the form that `training.logger.Monitor.scalars` writes."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("step"), int)
        and all(value is None or isinstance(value, int | float) for value in entry.values())
    )
