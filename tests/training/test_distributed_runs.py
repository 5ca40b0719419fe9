"""Runs by several processes: one run folder, one clock, torchrun's restarts, and mistakes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import train_svi
from benchmarks.durability import differences, same, untimed_entries
from ladder_vae.runs.run import Run
from ladder_vae.training import data_parallel as parallel
from ladder_vae.training import signals
from ladder_vae.training.schedule import learning_rate
from ladder_vae.training.signals import Clock
from runtime.distributed import Ranks
from tests import tiny_runs
from tests.commands import ROOT, refusal, subprocess_environment
from tests.processes import in_processes, train_in
from tests.tiny_runs import RESUME

CPU = torch.device("cpu")
LADDER = [*tiny_runs.LADDER, "--batch-size", "36", "--test-batch-size", "80"]
pytestmark = pytest.mark.usefixtures("own_folder")


# --- One run ---


def test_several_processes_write_one_run() -> None:
    """With the entries, pictures, checkpoints and lines of one process; only the noise differs."""
    assert train_in(1, *LADDER, "--steps", 10, "--out", "alone") == [0]
    Path("log").unlink()
    assert train_in(2, *LADDER, "--steps", 10, "--out", "run") == [0, 0]
    files = [
        Counter(re.sub(r"tfevents.*", "tfevents", str(p.relative_to(f))) for p in f.rglob("*"))
        for f in (Path("alone"), Path("run"))
    ]
    assert files[1] == files[0]
    shared, alone = untimed_entries(Path("run")), untimed_entries(Path("alone"))
    assert [entry.keys() for entry in shared] == [entry.keys() for entry in alone]
    assert [entry["step"] for entry in shared] == [3, 4, 5, 6, 8, 9, 10, 10]
    lines = Path("log").read_text().splitlines()
    assert [line for line, count in Counter(lines).items() if count > 1] == []
    assert sum(line.startswith("step 3: ELBO") for line in lines) == 1
    assert "on 2 x cpu" in lines[0]
    assert Run.open(Path("run")).provenance["machine"].startswith("2 x ")
    # Log entries are means over the whole batch: in the first steps the noise matters little.
    for name in ("train/reconstruction", "train/learning_rate"):
        assert shared[0][name] == pytest.approx(alone[0][name], rel=0.05)


def test_data_dependent_initialisation_uses_the_whole_batch() -> None:
    """All processes start with the weights of one process."""
    arguments = train_svi.parse_arguments([*LADDER, "--data-dep-init", "--dry-run"])

    def work(ranks: Ranks) -> dict[str, Tensor]:
        trainer, _ = train_svi.prepare(arguments, ranks)
        return trainer.loss_fn.state_dict()

    alone = work(Ranks())
    assert all(same(weights, alone) for weights in in_processes(3, work))


def test_two_processes_resume_bit_for_bit() -> None:
    assert train_in(2, *LADDER, "--steps", 8, "--out", "whole") == [0, 0]
    assert train_in(2, *LADDER, "--steps", 8, "--ckpt-interv", 5, "--out", "run") == [0, 0]
    Path("run/checkpoints/8.pt").unlink()
    assert train_in(2, *RESUME) == [0, 0]
    assert differences(Path("whole"), Path("run")) == []


def test_checkpoints_move_between_numbers_of_processes() -> None:
    """One, two, one, three: only the noise depends on the number of processes."""
    states: list[dict[str, Any]] = []
    for count, steps in ((1, 3), (2, 6), (1, 9), (3, 12)):
        how = RESUME if states else [*LADDER, "--out", "run"]
        assert train_in(count, *how, "--steps", steps) == [0] * count
        states.append(Run.open(Path("run")).load_checkpoint(steps, CPU))
    assert [len(state.get("ranks", [])) for state in states] == [0, 2, 0, 3]
    entries = untimed_entries(Path("run"))
    assert [e["step"] for e in entries if "train/loss" in e] == [3, 6, 9, 12]
    assert [e["step"] for e in entries if "test/negative_elbo" in e] == [3, 4, 6, 8, 9, 12]
    assert [int(state["average"]["updates"]) for state in states] == [3, 6, 9, 12]


def test_with_another_number_of_processes_noise_is_still_reproducible() -> None:
    """It depends on the seed, the step and the process."""
    assert train_in(2, *LADDER, "--steps", 3, "--out", "run") == [0, 0]
    state = Run.open(Path("run")).load_checkpoint(3, CPU)

    def noise(ranks: Ranks, seed: int = 42) -> Tensor:
        parallel.restore_random_state(state, ranks, CPU, seed)
        return torch.rand(2)

    found = [noise(Ranks(rank, 3)) for rank in (0, 1, 2)]
    assert torch.equal(found[1], noise(Ranks(1, 3)))
    assert len({tuple(value.tolist()) for value in found}) == 3
    assert not torch.equal(found[1], noise(Ranks(1, 3), seed=43))
    kept = [noise(Ranks(rank, 2)) for rank in (0, 1)]
    torch.set_rng_state(state["ranks"][1]["cpu_random_state"])
    assert torch.equal(kept[1], torch.rand(2))
    assert not torch.equal(*kept)


# --- Time ---


def test_time_is_the_first_process_s_and_signals_reach_all() -> None:
    """Time stands still in between, so that all processes see the same."""

    def work(ranks: Ranks) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "monotonic", lambda: 100.0 if ranks.is_first else 7.0)
            clock = Clock(ranks)
            seen: list[Any] = [clock.now]
            patch.setattr(time, "monotonic", lambda: 150.0 if ranks.is_first else 999.0)
            seen.append(clock.now)
            seen.append(clock.agree(signal.SIGTERM if ranks.rank == 1 else 0))
        return [*seen, clock.now]

    assert in_processes(2, work) == [[100.0, 100.0, signal.SIGTERM, 150.0]] * 2


def test_all_processes_follow_the_first_one_s_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints, schedule and length follow it, whatever the other clocks show."""
    ticks = iter(range(100))

    class Time:
        @staticmethod
        def monotonic() -> float:  # a tenth of a minute later each time, on the first rank
            return next(ticks) * 6.0 if os.environ["RANK"] == "0" else -1e9 * next(ticks)

    monkeypatch.setattr(signals, "time", Time)
    options = "--max-minutes 0.95 --lr-decay cosine --ckpt-interv 0 --checkpoint-minutes 0.25 "
    options += "--ts-log-interv 20 --ll-interv 0 --tr-log-interv 1 --keep-checkpoints 9 --out run"
    assert train_in(2, *LADDER, *options.split()) == [0, 0], Path("log").read_text()
    run = Run.open(Path("run"))
    assert run.checkpoint_steps() == [3, 6, 9, 10]
    rates = [e["train/learning_rate"] for e in untimed_entries(run.path) if "train/loss" in e]
    expected = [learning_rate(run.config, step, step * 0.1 / 0.95) for step in range(10)]
    assert rates == pytest.approx(expected)


# --- Mistakes ---


def torchrun(*arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*launcher, *map(str, arguments)]


def test_under_torchrun_one_process_reports_a_mistake() -> None:
    """In one line; torchrun adds its own."""
    script = [ROOT / "train_svi.py", *LADDER, "--steps", 1, "--out", "run"]
    command = torchrun(*script, "--batch-size", 5)
    done = subprocess.run(
        command, env=subprocess_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    own = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert own == ["error: --batch-size is 5, which 2 processes cannot share evenly; use 4 or 6"]
    assert done.stdout == ""
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sync-bn"], "--sync-bn needs GPUs"),
        (["--device", "cuda:1"], "--device is cuda:1 for 2 processes, which need one GPU each"),
        (["--batch-size", "2", "--downsample", "1", "1"], None),
        (["--downsample", "1", "2", "--blocks-per-layer", "2", "--batch-size", "2"], "1x1"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
)
def test_options_that_do_not_suit_several_processes_are_refused(
    options: Sequence[str], said: str | None
) -> None:
    codes = train_in(2, *LADDER, "--steps", 1, *options, "--out", "run")
    lines = [x for x in Path("log").read_text().splitlines() if x.startswith("error")]
    if said is None:
        assert codes == [0, 0], lines
        return
    assert codes == [2, 2]
    assert len(lines) == 1
    assert said in lines[0]
    assert not Path("run").exists()


def test_a_run_with_synchronised_batch_normalisation_continues_in_one_process() -> None:
    """A single process has the whole batch, so it needs no synchronisation."""
    assert train_in(1, *LADDER, "--steps", 2, "--out", "run") == [0]
    run = Run.open(Path("run"))
    replace(run, config=replace(run.config, sync_bn=True)).write_config()
    assert train_in(1, *RESUME, "--steps", 4) == [0]
    assert train_in(1, *LADDER, "--steps", 4, "--out", "whole") == [0]
    assert {"metrics.jsonl"} >= set(differences(Path("whole"), Path("run")))


# --- torchrun's restarts ---


def restarted(monkeypatch: pytest.MonkeyPatch, attempt: int, name: str) -> None:
    """Set the variables that torchrun --max-restarts 2 sets."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)


def test_restarts_need_a_run_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    restarted(monkeypatch, 0, "a")
    said = refusal(train_svi.main, *LADDER, "--steps", 1)
    assert "--max-restarts needs a run folder to resume: add --out RUN" in said
    assert not Path("runs").exists()


def test_another_attempt_resumes_only_its_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of another command is refused in every attempt; a finished run stays unchanged."""
    command = [*LADDER, "--steps", "2", "--out", "run"]
    restarted(monkeypatch, 0, "a")
    assert train_svi.main(command) == 0
    entries = untimed_entries(Path("run"))
    for attempt in (0, 1):
        restarted(monkeypatch, attempt, "b")
        assert "run holds another run" in refusal(train_svi.main, *command)
    restarted(monkeypatch, 1, "a")
    assert train_svi.main(command) == 0
    assert untimed_entries(Path("run")) == entries
    Path("run/checkpoints/2.pt").unlink()
    restarted(monkeypatch, 2, "a")
    assert train_svi.main(command) == 0
    assert untimed_entries(Path("run")) == entries


def test_without_rdzv_id_the_log_folder_identifies_a_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Because torchrun calls all of them "none"."""
    command = [*LADDER, "--steps", "1", "--out", "run"]
    for folder, attempt in (("x", 0), ("x", 1), ("y", 1)):
        restarted(monkeypatch, attempt, "none")
        error = f"/tmp/torchelastic_1/none_{folder}/attempt_{attempt}/0/error.json"
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", error)
        if folder == "x":
            assert train_svi.main(command) == 0
        else:
            assert "run holds another run" in refusal(train_svi.main, *command)
