"""Resuming: an interrupted run gives the result of an uninterrupted one, bit for bit."""

import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

import train_svi
from benchmarks.durability import differences, survive
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.run import Run
from runtime.errors import UserError
from tests.commands import content, refusal, words
from tests.tiny_runs import LADDER, RESUME, shown_by_tensorboard, stopping, train, training_entries

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("own_folder")


# --- The same result ---


def test_a_run_stopped_after_every_step_gives_the_same_result(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also between log entries and before evaluations: weights, state, logs and TensorBoard."""
    assert train(*LADDER, "--steps", 6, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stopping(patch, lambda step: True)
        assert train(*LADDER, "--steps", 6, "--out", "run") == 143
        for _ in range(5):
            assert train(*RESUME) == 143
    assert train(*RESUME) == 0  # the last evaluation was still missing
    assert differences(Path("whole"), Path("run")) == []
    assert shown_by_tensorboard("run") == shown_by_tensorboard("whole")
    assert Run.open(Path("run")).config == Run.open(Path("whole")).config
    with pytest.raises(UserError, match="finished at step 6"):
        train(*RESUME)


def test_a_killed_process_is_resumed_and_gives_the_same_result(tmp_path: Path) -> None:
    """One kill at a random moment; `make stress` and benchmarks/durability.py do more."""
    found = survive(tmp_path, 1, signal.SIGKILL, seed=1)
    assert found.ended == 1
    assert found.differences == []


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(*LADDER, "--steps", 4, "--out", "whole") == 0
    shutil.copytree("whole", "run")
    shutil.rmtree("run/checkpoints")
    Path("run/.config.json.0123abcd.part").write_text("half")
    capsys.readouterr()
    assert train(*RESUME) == 0
    assert "run has no checkpoint yet; starting again\n" in capsys.readouterr().err
    assert differences(Path("whole"), Path("run")) == []


def test_evaluations_do_not_change_training() -> None:
    """Neither its random state nor its weights."""
    for name, intervals in (("quiet", (0, 0)), ("often", (1, 2))):
        often = ("--ts-log-interv", intervals[0], "--ll-interv", intervals[1])
        assert train(*LADDER, "--steps", 5, "--ema", 0, *often, "--out", name) == 0
    states = [Run.open(Path(name)).load_checkpoint(5, CPU) for name in ("quiet", "often")]
    for name in ("weights", "cpu_random_state"):
        torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=0)
    optimizers = [state["svi"]["optimizer"] for state in states]
    torch.testing.assert_close(optimizers[1], optimizers[0], rtol=0, atol=0)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_it_used(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(*LADDER, "--ckpt-interv", 2, "--steps", 8, "--out", "whole") == 0
    shutil.copytree("whole", "run")
    path = Path("run/checkpoints/8.pt")
    path.write_bytes(path.read_bytes()[:-1000])
    capsys.readouterr()
    assert train(*RESUME) == 0
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning")]
    assert line.startswith(f"warning: {path} is damaged")
    assert line.endswith("; resuming from step 6")
    assert differences(Path("whole"), Path("run")) == []


def test_steps_after_the_checkpoint_are_logged_once() -> None:
    """A run that was killed between checkpoints repeats those steps."""
    options = words("--tr-log-interv 1 --ckpt-interv 2 --ts-log-interv 0 --ll-interv 0")
    assert train(*LADDER, *options, "--steps", 5, "--out", "run") == 0
    Path("run/checkpoints/5.pt").unlink()
    with Path("run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # cut off
    assert train(*RESUME, "--steps", 6) == 0
    assert [entry["step"] for entry in training_entries("run")] == [1, 2, 3, 4, 5, 6]


# --- What may change ---


def test_a_finished_run_is_not_resumed(trained_copy: Path) -> None:
    before = content(trained_copy)
    for options in ([], ["--steps", 30], ["--steps", 5]):
        line = refusal(train_svi.main, "--resume", trained_copy, "--device", "cpu", *options)
        assert f"{trained_copy} finished at step 30" in line
        assert "--steps" in line
    assert content(trained_copy) == before


@pytest.mark.parametrize(
    "option",
    [
        ["--wd", "0.5"],
        ["--zdims", "2", "3"],
        ["--seed", "1"],
        ["--batch-size", "16"],
        ["--no-gated"],
        ["--dataset", "mnist"],
    ],
    ids=" ".join,
)
def test_other_options_cannot_change(trained_copy: Path, option: list[str]) -> None:
    before = content(trained_copy)
    line = refusal(train_svi.main, "--resume", trained_copy, "--steps", 31, *option)
    name = option[0].replace("--no-", "--")
    assert re.search(rf"{name} is \S.*in the run to resume and cannot be changed", line)
    assert content(trained_copy) == before


def test_the_same_value_is_not_a_change(trained_copy: Path) -> None:
    same = words("--zdims 2 2 --likelihood auto --batch-size 32 --steps 31 --device cpu")
    assert train("--resume", trained_copy, *same) == 0
    assert Run.open(trained_copy).checkpoint_steps()[-2:] == [30, 31]


def test_a_run_continues_in_another_precision(trained_copy: Path) -> None:
    """As on another machine; weights and evaluations stay in float32."""
    options = words("--steps 31 --precision bf16 --compile no --device cpu")
    assert train("--resume", trained_copy, *options) == 0
    run = Run.open(trained_copy)
    assert run.config.precision == "bf16"
    weights = run.load_checkpoint(31, CPU)["weights"]
    assert {w.dtype for w in weights.values()} <= {torch.float32, torch.int64}
    last = read_entries(trained_copy / "metrics.jsonl")[-1]
    assert math.isfinite(last["test/negative_elbo"])
    line = refusal(
        *(train_svi.main, "--resume", trained_copy),
        *words("--steps 32 --precision tf32 --device cpu"),
    )
    assert "--precision tf32 needs a GPU" in line


@pytest.mark.parametrize(
    "options", [["--out", "other"], ["--preset", "digits"], ["--dry-run"]], ids=" ".join
)
def test_resuming_does_not_combine_with_options_of_new_runs(
    trained_copy: Path, options: list[str]
) -> None:
    line = refusal(train_svi.main, "--resume", trained_copy, "--steps", 31, *options)
    assert options[0] in line


def test_published_weights_cannot_be_trained(trained_copy: Path) -> None:
    from ladder_vae.runs.checkpoint import weights_only

    run = Run.open(trained_copy)
    weights = run.load_checkpoint(30, CPU)["weights"]
    run.save_checkpoint(30, weights_only(weights))
    line = refusal(train_svi.main, "--resume", trained_copy, "--steps", 31, "--device", "cpu")
    assert "only weights" in line
