"""Steps that are not finite are skipped; too many in a row end the run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datasets import TrainingBatches
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.run import Run
from tests.tiny_runs import LADDER, RESUME, train

pytestmark = pytest.mark.usefixtures("own_folder")


def spoiling(monkeypatch: pytest.MonkeyPatch, is_spoilt: Callable[[int], bool]) -> None:
    """Make the batches of some steps, counted from 0, nan."""
    original = TrainingBatches.part

    def part(self: TrainingBatches, step: int, number: int, parts: int) -> torch.Tensor:
        x = original(self, step, number, parts)
        return torch.full_like(x, torch.nan) if is_spoilt(step) else x

    monkeypatch.setattr(TrainingBatches, "part", part)


def test_steps_that_are_not_finite_are_skipped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default; nine in a row do not end the run."""
    spoiling(monkeypatch, lambda step: 3 <= step < 12)
    assert train(*LADDER, "--steps", 15, "--ts-log-interv", 0, "--out", "run") == 0
    logged = [e for e in read_entries(Path("run/metrics.jsonl")) if "train/skipped_updates" in e]
    counts = {entry["step"]: entry["train/skipped_updates"] for entry in logged}
    assert counts == {3: 0, 6: 3, 9: 6, 12: 9, 15: 9}
    assert ["train/loss" in entry for entry in logged] == [True, False, False, False, True]
    state = Run.open(Path("run")).load_checkpoint(15, torch.device("cpu"))
    assert all(value.isfinite().all() for value in state["weights"].values())


def test_ten_skipped_updates_in_a_row_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line names the last good checkpoint and what to do; doing it continues from there."""
    options = "--steps 40 --ts-log-interv 0 --ll-interv 0 --ckpt-interv 6".split()
    with monkeypatch.context() as patch:
        spoiling(patch, lambda step: step >= 7)
        assert train(*LADDER, *options, "--out", "run") == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: step 20: 10 updates in a row were skipped")
        assert "the last good checkpoint is that of step 18: --resume run" in line
        assert "--lr" in line
        assert "--grad-clip" in line
        assert train(*RESUME) == 1  # unchanged, it diverges again
    assert train(*RESUME, "--steps", 20, "--lr", 1e-4, "--grad-clip", 1) == 0
    assert Run.open(Path("run")).config.lr == 1e-4
