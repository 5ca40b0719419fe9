"""Result files: results/benchmarks/NAME.json, most of them with one entry per measured case."""

from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import read_json

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "benchmarks"


def machine_of(case: dict[str, Any]) -> str:
    """The machine on which a case was measured."""
    return str(case["provenance"]["machine"])


def read_entries(path: Path, key: str, empty: Any) -> Any:
    """The entries under `key` of a result file; `empty` if there is no such file."""
    if not path.exists():
        return empty
    content = read_json(path)
    if not isinstance(content, dict) or key not in content:
        raise UserError(f"{path} is not a result of this benchmark: move it away")
    return content[key]


def known_cases(path: Path) -> list[dict[str, Any]]:
    """The cases in the file at `path`; none if there is no such file."""
    return read_entries(path, "cases", [])


def merged(path: Path, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases in the file at `path` and `found`, which replaces an earlier one of its key.

    The key of a case is its machine, preset and batch size.
    """

    def key(case: dict[str, Any]) -> tuple[str, str, int]:
        return machine_of(case), case["preset"], case["batch_size"]

    cases = known_cases(path)
    if not any(key(case) == key(found) for case in cases):
        return [*cases, found]
    return [found if key(case) == key(found) else case for case in cases]
