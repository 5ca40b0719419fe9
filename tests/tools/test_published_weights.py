"""tools.export_weights and tools.import_weights: the same digits from one file."""

import json
from pathlib import Path

import pytest

import evaluate
from ladder_vae.runs.published import read_published
from ladder_vae.runs.run import Run
from tests.commands import refusal, run
from tools import export_weights, import_weights


def test_imported_weights_score_the_same(trained_copy: Path, tmp_path: Path) -> None:
    """The scores are equal to the last digit; the imported run holds the moving average."""
    file, copy = tmp_path / "digits.safetensors", tmp_path / "copy"
    assert run(export_weights.main, trained_copy, "--out", file).code == 0
    result = run(import_weights.main, file, "--out", copy)
    assert result.code == 0
    assert f"python evaluate.py {copy}" in result.out
    found = []
    for folder in (trained_copy, copy):
        options = "--samples 1 2 --limit 20 --device cpu".split()
        assert run(evaluate.main, folder, *options).code == 0
        found.append(json.loads((folder / "eval" / "30" / "metrics.json").read_text()))
    for name in ("elbo", "iw", "kl_per_layer", "standard_error", "trained", "step"):
        assert found[1][name] == found[0][name], name
    assert Run.open(copy).config == Run.open(trained_copy).config


@pytest.mark.parametrize(("checkpoint", "step"), [("last", 30), ("20", 20)])
def test_any_checkpoint_can_be_exported(
    checkpoint: str, step: int, trained_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    arguments = [trained_run, "--checkpoint", checkpoint, "--out", file]
    assert run(export_weights.main, *arguments).code == 0
    assert read_published(file)[0]["step"] == step


@pytest.mark.parametrize("checkpoint", ["first", "9" * 5000, "3"])
def test_missing_checkpoints_are_refused(
    checkpoint: str, trained_run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    arguments = [trained_run, "--checkpoint", checkpoint, "--out", file]
    assert "checkpoint" in refusal(export_weights.main, *arguments)
    assert not file.exists()


def test_other_files_are_not_imported(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"weights")
    assert str(file) in refusal(import_weights.main, file, "--out", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
