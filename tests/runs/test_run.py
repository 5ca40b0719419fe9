"""Run folders: which checkpoints are kept, the best one, and the newest undamaged one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ladder_vae.runs.checkpoint import Damaged, weights_only
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from runtime.errors import UserError

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
STEPS = (1, 2, 3, 4)


def state() -> dict[str, Any]:
    return weights_only({"w": torch.arange(3.0)})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = RunConfig.of(
        dataset="digits",
        z_dims=[2, 2],
        downsample=[0, 1],
        n_filters=4,
        blocks_per_layer=1,
        keep_checkpoints=2,
    )
    return Run.create(tmp_path / "run", config, SHAPE, {"commit": "abc"})


def test_a_run_folder_is_read_as_it_was_written(run: Run) -> None:
    assert Run.open(run.path) == run
    (run.path / "other.txt").touch()
    with pytest.raises(UserError, match=f"{run.path} holds another run"):
        Run.create(run.path, run.config, SHAPE, {})


def test_a_run_of_another_version_is_refused(run: Run) -> None:
    """In one line that names both formats."""
    path = run.path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(
        UserError, match=r"another version .*\(format 2; this version reads format 3\)"
    ):
        Run.open(run.path)


def test_the_newest_and_the_best_are_kept(run: Run) -> None:
    for step, bound in zip(STEPS, (90.0, 80.0, 85.0, float("nan")), strict=True):
        run.save_checkpoint(step, state())
        if run.is_better(step, bound):
            run.mark_best(step, bound)
    assert run.checkpoint_steps() == [2, 3, 4]
    assert Run.open(run.path).best_step() == 2
    run.save_checkpoint(5, state())
    run.mark_best(5, 70.0)
    assert run.checkpoint_steps() == [4, 5]
    assert run.best() == (5, 70.0)


def test_without_a_checkpoint_there_is_no_best(run: Run) -> None:
    assert run.best_step() is None
    run.save_checkpoint(1, state())
    assert run.best_step() is None
    run.mark_best(1, 50.0)
    run.checkpoint_path(1).unlink()
    assert run.best_step() is None  # it no longer exists
    assert run.is_better(2, 60.0)


def test_after_going_back_later_checkpoints_do_not_count(run: Run) -> None:
    """A run that resumed from an older checkpoint keeps the newest ones that it writes."""
    for step in (8, 9):
        run.save_checkpoint(step, state())
    for step in STEPS:
        run.save_checkpoint(step, state())
    assert run.checkpoint_steps() == [3, 4, 8, 9]


@pytest.mark.parametrize("text", ["", "[]", '{"step": 1}', '{"step": 1, "negat'])
def test_a_damaged_best_json_is_refused(text: str, run: Run) -> None:
    run.save_checkpoint(1, state())
    (run.path / "checkpoints" / "best.json").write_text(text)
    with pytest.raises(UserError, match=r"best\.json is damaged"):
        run.best_step()


def test_the_newest_undamaged_checkpoint_is_found(run: Run) -> None:
    """With the errors of newer ones; if all are damaged, the error names the newest."""
    for step in STEPS[:2]:
        run.save_checkpoint(step, state())
    run.checkpoint_path(2).write_bytes(b"not a checkpoint")
    found, damaged = run.newest_whole(CPU)
    assert found is not None
    assert found["step"] == 1
    assert [str(run.checkpoint_path(2)) in str(d) for d in damaged] == [True]
    with pytest.raises(Damaged, match=r"2\.pt"):
        run.load_checkpoint(None, CPU)  # evaluation uses no other in its place
    run.checkpoint_path(1).write_bytes(b"")
    with pytest.raises(Damaged, match=r"2\.pt"):
        run.newest_whole(CPU)
    shutil.rmtree(run.path / "checkpoints")
    assert run.newest_whole(CPU) == (None, [])


@pytest.mark.parametrize("name", ["first", "9" * 5000, "-1", "4.0"])
def test_checkpoints_have_a_step_or_are_best_or_last(name: str, run: Run) -> None:
    assert run.step_called("last") is None
    assert run.step_called("12") == 12
    with pytest.raises(UserError, match="--checkpoint is"):
        run.step_called(name)
    with pytest.raises(UserError, match="has no best checkpoint"):
        run.step_called("best")
    run.save_checkpoint(3, state())
    run.mark_best(3, 50.0)
    assert run.step_called("best") == 3
