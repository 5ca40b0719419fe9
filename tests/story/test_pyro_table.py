"""The table of docs/pyro.md and the tests of its rows name the same entry points of Pyro."""

import importlib
from collections import Counter
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "pyro.md"


def table() -> list[list[str]]:
    """The cells of the table's rows, without headings."""
    text = PAGE.read_text().partition("<!-- rows -->")[2].partition("<!-- end rows -->")[0]
    lines = text.strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [cells for cells in rows if not cells[0].startswith("**")]


def marks() -> Counter[str]:
    """How many tests are marked with each row."""
    found: Counter[str] = Counter()
    for path in sorted(FOLDER.glob("test_*.py")):
        module = importlib.import_module(f"tests.story.{path.stem}")
        for name, test in vars(module).items():
            if name.startswith("test_"):
                found.update(getattr(test, "rows", ()))
    return found


def test_each_row_has_one_test_and_each_marked_test_a_row() -> None:
    rows = [cells[0] for cells in table()]
    assert len(rows) > 40
    assert marks() == Counter(rows) == dict.fromkeys(rows, 1)


def test_each_row_says_whether_and_how_it_works() -> None:
    for name, works, how in table():
        assert works in ("yes", "in a function", "in part", "slowly"), name
        assert how or works == "yes", name
