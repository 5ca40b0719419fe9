"""README.md: its tables are what results/ holds, and its code and links are right."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from results import readme

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_results() -> None:
    """Nothing in a table is typed in by hand, or out of date."""
    assert set(re.findall(r"<!-- table (\w+) -->", TEXT)) == readme.TABLES.keys()
    assert readme.written(TEXT) == TEXT


def test_tables_follow_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that changes in results/ changes in the table."""
    metrics = {
        "elbo": 81.5,
        "iw": {"1": 81.4, "100": 79.0},
        "standard_error": {"elbo": 0.25, "1": 0.3, "100": 0.25},
        "bits_per_dim": {"elbo": 0.15, "1": 0.15, "100": 0.145},
        "trained": {"machine": "a machine", "commit": "abc"},
        "provenance": {"machine": "a machine", "commit": "abc"},
    }

    def read(name: str) -> dict[str, Any]:
        assert name == "demo/metrics.json"
        return metrics

    monkeypatch.setattr(readme, "read", read)
    table = readme.written("<!-- table demo -->\nold\n<!-- end -->")
    assert "| ELBO | 81.50 ± 0.25 | 0.150 |" in table
    assert "| 100 importance samples | 79.00 ± 0.25 | 0.145 |" in table
    assert "Obtained on a machine, commit abc." in table
    assert "old" not in table


def test_files_it_names_are_there() -> None:
    """Every relative link leads somewhere."""
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    relative = [link for link in links if "://" not in link]
    assert len(relative) > 10
    assert [link for link in relative if not (ROOT / link).exists()] == []


def test_its_program_runs() -> None:
    """The example of the pair as Pyro programs, as a reader would run it."""
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    program += "\nassert loss_fn.elbo.terms.kl.shape == (16, 3)"
    program += "\nassert [n for n in z_and_x.nodes if n[0] in 'zx'] == ['z_3', 'z_2', 'z_1', 'x']"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
