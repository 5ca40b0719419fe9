"""Figures that are measured a case at a time and kept in one file."""

import json
from pathlib import Path
from typing import Any

from runtime.errors import UserError


def machine_of(case: dict[str, Any]) -> str:
    """What a case was measured on."""
    return str(case["provenance"]["machine"])


def _key(case: dict[str, Any]) -> tuple[str, str, int]:
    return machine_of(case), case["preset"], case["batch_size"]


def merged(path: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of the file at `path`, with `found` in the place of the one it repeats, or last.

    A case is a machine, a preset and a batch size.
    """
    cases = known(path)
    if not any(_key(case) == _key(found) for case in cases):
        return [*cases, found]
    return [found if _key(case) == _key(found) else case for case in cases]


def known(path: Path) -> list[dict[str, Any]]:
    """The cases of the file at `path`; none where there is no such file."""
    try:
        cases: list[dict[str, Any]] = json.loads(path.read_text())["cases"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} holds no figures of this benchmark: move it away") from None
    return cases
