"""No run is lost: stops anywhere, kills, signals, full disks, numbers that go wrong."""

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import train_svi
from benchmarks.durability import differences, finish, start, survive, untimed_entries
from ladder_vae.evaluation.importance import importance_weighted_bounds
from ladder_vae.runs.checkpoint import write_checkpoint
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.run import Run
from runtime.errors import UserError
from runtime.files import AppendedFile
from train_svi import Training, collapsed_layers

LADDER = (
    "--preset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --batch-size 32 --dropout 0.2 "
    "--test-batch-size 297 --beta-anneal 5 --lr-warmup 3 --lr-decay none --ema 0.9 --device cpu "
    "--tr-log-interv 3 --ts-log-interv 4 --ll-interv 5 --ll-samples 2 --ll-images 20"
).split()
RESUME = ["--resume", "run", "--device", "cpu"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths lead into a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVAE_DATA", raising=False)


def train(*arguments: object) -> int:
    return train_svi.main([str(argument) for argument in arguments])


def stopping(monkeypatch: pytest.MonkeyPatch, is_time: Callable[[int], bool]) -> None:
    """Have SIGTERM come during the steps that `is_time` says it of."""
    original = Training.take_step

    def take_step(self: Training) -> None:
        original(self)
        if is_time(self.step):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Training, "take_step", take_step)


def shown_by_tensorboard(folder: str) -> dict[str, Any]:
    """What TensorBoard shows of a run: scalars, and the steps of pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guidance = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(folder, size_guidance=guidance).Reload()
    tags = events.Tags()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    shown |= {tag: [e.step for e in events.Images(tag)] for tag in tags["images"]}
    del shown["train/images_per_second"]
    return shown


# --- Stops ---


def test_a_stop_after_every_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of log intervals and before evaluations: weights and logs to the bit."""
    assert train(*LADDER, "--steps", 6, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stopping(patch, lambda step: True)
        assert train(*LADDER, "--steps", 6, "--out", "run") == 143
        for _ in range(5):
            assert train(*RESUME) == 143
    assert train(*RESUME) == 0  # the last evaluation was still to come
    assert differences(Path("whole"), Path("run")) == []
    assert shown_by_tensorboard("run") == shown_by_tensorboard("whole")
    with pytest.raises(UserError, match="has come to its end at step 6"):
        train(*RESUME)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_ended_at_random_moments_comes_out_the_same(
    number: signal.Signals, tmp_path: Path
) -> None:
    """A process of its own, ended three times; benchmarks/durability.py does it twenty times."""
    found = survive(tmp_path, 3, number, seed=1)
    assert found.ended == 3
    assert found.differences == []


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(*LADDER, "--steps", 4, "--out", "whole") == 0
    shutil.copytree("whole", "run")
    shutil.rmtree("run/checkpoints")
    Path("run/.config.json.0123abcd.part").write_text("half")
    capsys.readouterr()
    assert train(*RESUME) == 0
    assert "run has no checkpoint yet: begins again\n" in capsys.readouterr().err
    assert differences(Path("whole"), Path("run")) == []


def test_evaluations_leave_the_training_as_it_is() -> None:
    """Its random state above all: the weights are those of a run without any."""
    quiet = "--steps 5 --ts-log-interv 0 --ll-interv 0 --ema 0 --out quiet".split()
    assert train(*LADDER, *quiet) == 0
    often = "--steps 5 --ts-log-interv 1 --ll-interv 2 --ema 0 --out often".split()
    assert train(*LADDER, *often) == 0
    states = [
        Run.open(Path(name)).load_checkpoint(5, torch.device("cpu")) for name in ("quiet", "often")
    ]
    for name in ("weights", "cpu_random_state", "optimizer"):
        torch.testing.assert_close(states[1][name], states[0][name], rtol=0, atol=0)


@pytest.mark.parametrize("where", ["evaluation", "checkpoint"])
def test_a_second_signal_ends_the_run_at_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it evaluates and while it writes; what is there is whole, and goes on."""

    def twice(original: Callable[..., Any]) -> Callable[..., Any]:
        def interrupted(*args: Any, **kwargs: Any) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            return original(*args, **kwargs)

        return interrupted

    options = "--ckpt-interv 2 --steps 6 --out run".split()
    with monkeypatch.context() as patch:
        if where == "evaluation":
            patch.setattr(
                train_svi, "importance_weighted_bounds", twice(importance_weighted_bounds)
            )
        else:
            stopping(patch, lambda step: step == 3)
            patch.setattr(Run, "_prune", twice(Run._prune))
        process = start([*LADDER, *options], tmp_path / "log")
        assert finish(process) == 128 + signal.SIGINT, Path("log").read_text()
    assert "interrupted" not in Path("log").read_text()
    assert train(*RESUME) == 0
    assert train(*LADDER, *options[:-1], "whole") == 0
    assert differences(Path("whole"), Path("run")) == []


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
    assert line.endswith("; goes on from step 6")
    assert differences(Path("whole"), Path("run")) == []


def test_a_run_of_format_1_goes_on() -> None:
    """Its checkpoints held no sums of the log; weights are those of a run that never stopped."""
    assert train(*LADDER, "--steps", 3, "--out", "run") == 0
    run = Run.open(Path("run"))
    state = run.load_checkpoint(3, torch.device("cpu"))
    del state["log"]
    torch.save(state | {"format": 1, "skipped": 2}, run.checkpoint_path(3))
    config = json.loads(Path("run/config.json").read_text())
    for name in ("grad_spike", "checkpoint_minutes"):
        del config["config"][name]
    Path("run/config.json").write_text(json.dumps(config | {"format": 1}))
    assert train(*RESUME, "--steps", 6) == 0
    assert train(*LADDER, "--steps", 6, "--out", "whole") == 0
    assert {"metrics.jsonl", "log"} >= set(differences(Path("whole"), Path("run")))
    assert read_entries(Path("run/metrics.jsonl"))[-2]["train/skipped_updates"] == 2


def test_checkpoints_come_by_the_clock_too() -> None:
    """So often that each step is due, or never."""
    options = "--steps 4 --ts-log-interv 0 --ckpt-interv 0 --keep-checkpoints 9".split()
    assert train(*LADDER, *options, "--checkpoint-minutes", 1e-9, "--out", "often") == 0
    assert Run.open(Path("often")).checkpoint_steps() == [1, 2, 3, 4]
    assert train(*LADDER, *options, "--checkpoint-minutes", 0, "--out", "never") == 0
    assert Run.open(Path("never")).checkpoint_steps() == [4]


def test_the_best_checkpoint_is_kept() -> None:
    """That of the lowest held-out negative ELBO that the log shows, written for its sake."""
    options = "--steps 12 --lr 0.05 --ema 0 --ts-log-interv 3 --ckpt-interv 0".split()
    assert train(*LADDER, *options, "--keep-checkpoints", 1, "--out", "run") == 0
    bounds = {
        entry["step"]: entry["test/negative_elbo"]
        for entry in read_entries(Path("run/metrics.jsonl"))
        if "test/negative_elbo" in entry
    }
    run = Run.open(Path("run"))
    assert run.best_step() == min(bounds, key=lambda step: bounds[step])
    assert set(run.checkpoint_steps()) == {run.best_step(), 12}


# --- Full disks ---


class FullDisk:
    """While `is_full`, new files of some names cannot be written, or none be "appended" to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
        self.is_full = False
        original: Any = Path.open
        write: Any = AppendedFile.append

        def open_on_full_disk(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if self.is_full and mode == "xb" and re.search(pattern, path.name):
                return original(Path("/dev/full"), "wb", *args, **kwargs)
            return original(path, mode, *args, **kwargs)

        def append(file: Any, piece: bytes) -> None:
            if self.is_full and pattern == "appended":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(file, piece)

        monkeypatch.setattr(Path, "open", open_on_full_disk)
        monkeypatch.setattr(AppendedFile, "append", append)


def full_between(monkeypatch: pytest.MonkeyPatch, disk: FullDisk, first: int, last: int) -> None:
    """Have the disk full after steps `first` to `last`."""
    original = Training.take_step

    def take_step(self: Training) -> None:
        original(self)
        disk.is_full = first <= self.step <= last

    monkeypatch.setattr(Training, "take_step", take_step)


OFTEN = "--steps 6 --ckpt-interv 1 --tr-log-interv 1 --ts-log-interv 2 --keep-checkpoints 9".split()


@pytest.mark.parametrize(
    ("pattern", "lost"),
    [
        (r"\.\d\.pt\.", {"checkpoints/3.pt", "checkpoints/4.pt"}),
        (r"best\.json\.", set()),
        (r"png", {"images/samples-4.png", "images/reconstructions-4.png"}),
        ("appended", set()),
    ],
    ids=["checkpoints", "best", "pictures", "metrics"],
)
def test_a_disk_that_is_full_for_a_while_ends_no_run(
    pattern: str,
    lost: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is told of, one line each time; entries of the log and TensorBoard's are made up for."""
    assert train(*LADDER, *OFTEN, "--out", "whole") == 0
    capsys.readouterr()
    full_between(monkeypatch, FullDisk(monkeypatch, pattern), 3, 4)
    assert train(*LADDER, *OFTEN, "--out", "run") == 0
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert told
    assert all("No space left on device" in line for line in told)
    assert "Traceback" not in err
    files = [
        {str(p.relative_to(folder)) for p in folder.rglob("*") if "tfevents" not in p.name}
        for folder in (Path("whole"), Path("run"))
    ]
    assert files[0] - files[1] == lost
    assert files[1] <= files[0]  # no partial ones
    assert differences(Path("whole"), Path("run")) == []
    assert shown_by_tensorboard("run") == shown_by_tensorboard("whole")


def test_the_last_checkpoint_must_have_room(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is evaluated, and does not end as if all were well; it goes on from the last one."""
    with monkeypatch.context() as patch:
        full_between(patch, FullDisk(patch, r"\.\d\.pt\."), 5, 6)
        with pytest.raises(UserError, match=r"cannot write .*6\.pt \(No space left on device\)"):
            train(*LADDER, *OFTEN, "--out", "run")
    assert Run.open(Path("run")).checkpoint_steps() == [1, 2, 3, 4]
    assert train(*RESUME) == 0
    assert train(*LADDER, *OFTEN, "--out", "whole") == 0
    assert differences(Path("whole"), Path("run")) == []


# --- Numbers that go wrong ---


def spoiling(monkeypatch: pytest.MonkeyPatch, is_spoilt: Callable[[int], bool]) -> None:
    """Have the batches of some steps, counted from 0, be not finite."""
    from datasets import TrainingBatches

    original = TrainingBatches.__call__

    def batch(self: TrainingBatches, step: int) -> torch.Tensor:
        x = original(self, step)
        return torch.full_like(x, torch.nan) if is_spoilt(step) else x

    monkeypatch.setattr(TrainingBatches, "__call__", batch)


def test_steps_that_are_not_finite_are_skipped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without any option; nine in a row are borne."""
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
    """One line names the last good checkpoint and what to do; doing it goes on from there."""
    options = "--steps 40 --ts-log-interv 0 --ll-interv 0 --ckpt-interv 6".split()
    with monkeypatch.context() as patch:
        spoiling(patch, lambda step: step >= 7)
        assert train(*LADDER, *options, "--out", "run") == 1
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: step 20: 10 updates in a row were skipped")
        assert "the last good checkpoint is that of step 18: --resume run" in line
        assert "--lr" in line
        assert "--grad-clip" in line
        # As they were: tried again, it ends as it did.
        assert train(*RESUME) == 1
    assert train(*RESUME, "--steps", 20, "--lr", 1e-4, "--grad-clip", 1) == 0
    assert Run.open(Path("run")).config.lr == 1e-4


@pytest.mark.parametrize(
    ("kl", "free_bits", "expected"),
    [
        ([0.5, 0.52, 0.53], 0.5, {1, 2}),
        ([0.009, 0.011, -0.1], 0.0, {1, 3}),
        ([2.0, 3.0], 1.0, set()),
    ],
)
def test_a_layer_at_the_free_bits_has_collapsed(
    kl: Sequence[float], free_bits: float, expected: set[int]
) -> None:
    assert collapsed_layers(kl, free_bits) == expected


def test_collapse_and_recovery_are_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And shown at every entry, in the line and as a scalar."""
    calls = iter([set(), {2}, {1, 2}, {1, 2}, {1}, set()])
    monkeypatch.setattr(train_svi, "collapsed_layers", lambda kl, free_bits: next(calls))
    options = "--tr-log-interv 1 --ts-log-interv 0 --ll-interv 0 --steps 6 --out run".split()
    assert train(*LADDER, *options) == 0
    err = capsys.readouterr().err
    told = re.findall(r"(?m)^step (\d): KL of (.*)$", err)
    assert told == [
        ("2", "layer 2 has collapsed"),
        ("3", "layer 1 has collapsed"),
        ("5", "layer 2 has recovered"),
        ("6", "layer 1 has recovered"),
    ]
    flags = re.findall(r"(?m)^step \d: ELBO .*images/s(?:, KL collapsed in (.*))?$", err)
    assert flags == ["", "layer 2", "layers 1, 2", "layers 1, 2", "layer 1", ""]
    logged = [e for e in untimed_entries(Path("run")) if "train/loss" in e]
    assert [e["train_kl_collapsed/layer_02"] for e in logged] == [0, 1, 1, 1, 0, 0]


def test_another_network_s_state_is_refused_when_resuming() -> None:
    """Sums of another number of layers, say."""
    assert train(*LADDER, "--steps", 1, "--out", "run") == 0
    run = Run.open(Path("run"))
    state = run.load_checkpoint(1, torch.device("cpu"))
    write_checkpoint(run.checkpoint_path(1), state | {"log": {"totals": 3}})
    with pytest.raises(UserError, match="does not hold this run's state of training"):
        train(*RESUME, "--steps", 2)
