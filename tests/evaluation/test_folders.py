"""The folder of an evaluation: its name, and which of a run's evaluations comes last."""

from pathlib import Path
from typing import Any

import pytest

from ladder_vae.evaluation.folders import evaluation_folder, evaluation_folders

NAMES: dict[str, dict[str, Any]] = {
    "30-train+valid-samples-1-5000": {"split": "train+valid", "samples": [1, 5000]},
    "30-valid-limit-7": {"split": "valid", "limit": 7},
    "30-valid": {"split": "valid"},
    "30-limit-9": {"limit": 9},
    "30-limit-10-seed-3": {"limit": 10, "seed": 3},
    "30-limit-10": {"limit": 10},
    "30-samples-1": {"samples": [1]},
    "30-seed-1": {"seed": 1},
    "30-temperature-0.7-1e-05": {"temperature": [0.7, 1e-5]},
    "30": {},
    "30-samples-1-100-1000": {"samples": [1, 100, 1000]},
}


@pytest.mark.parametrize(("name", "settings"), NAMES.items())
def test_a_folder_is_named_after_what_is_not_the_default(
    name: str, settings: dict[str, Any]
) -> None:
    assert evaluation_folder(Path("run"), 30, **settings) == Path("run", "eval", name)


def test_equal_temperatures_are_the_default() -> None:
    assert evaluation_folder(Path("run"), 30, temperature=[1.0, 1.0]).name == "30"


def test_more_general_evaluations_come_later(tmp_path: Path) -> None:
    """And those of a later step after them; other folders are none of ours."""
    names = [*NAMES, "200-valid-limit-1"]
    for name in sorted([*names, "30-test", "030", "30-limit-x", "best", "40"]):
        (tmp_path / "eval" / name).mkdir(parents=True)
        if name != "40":  # without metrics
            (tmp_path / "eval" / name / "metrics.json").touch()
    assert [folder.name for folder in evaluation_folders(tmp_path)] == names
