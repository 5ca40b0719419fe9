"""A run's metrics.jsonl: one object per log entry."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import UserError

# An entry's step and scalars, by tag.
Entry = dict[str, float]


def finite_entries(path: Path) -> list[Entry]:
    """The entries of metrics.jsonl, also while it grows, without scalars that were not finite.

    Raises `UserError` where the file is damaged.
    """
    return [
        {tag: value for tag, value in entry.items() if value is not None and abs(value) < 1e300}
        for entry in read_entries(path)
    ]


def held_out_split(entries: Sequence[Entry]) -> str | None:
    """The split that evaluations during the training used; None before the first one."""
    for entry in entries:
        for tag in entry:
            split, _, name = tag.partition("/")
            if name == "negative_elbo" and split != "train":
                return split
    return None


def newest(entries: Sequence[Entry], tag: str) -> Entry | None:
    """The last entry that has the scalar `tag`."""
    return next((entry for entry in reversed(entries) if tag in entry), None)


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, none where there is no file, but for a last one cut short.

    Raises `UserError` where it is damaged.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None
    entries = []
    for line in lines:
        if not line.endswith(b"\n"):
            continue  # cut short when the run was killed
        try:
            entries.append(json.loads(line))
        except (ValueError, RecursionError):
            entries.append(None)
        if not _is_entry(entries[-1]):
            shown = line.strip()[:40].decode(errors="replace")
            raise UserError(f"{path} is damaged: {shown!r} is no entry of it")
    return entries


def _is_entry(entry: Any) -> bool:
    """Whether it is what `Monitor.scalars` writes."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("step"), int)
        and all(value is None or isinstance(value, int | float) for value in entry.values())
    )
