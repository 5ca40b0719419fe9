"""Signals stop a run cleanly; the processes of a run agree on them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.durability import differences, finish, start
from ladder_vae.evaluation.importance import importance_weighted_bounds
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.run import Run
from ladder_vae.training import held_out
from runtime.signals import Interrupted, Interruption
from tests.commands import ROOT, subprocess_environment
from tests.tiny_runs import LADDER, RESUME, stopping, train, training_entries

pytestmark = pytest.mark.usefixtures("own_folder")


def test_a_signal_stops_the_run_cleanly() -> None:
    """Ctrl-C in a terminal: the step is finished and kept, and the run can be resumed."""
    options = "--steps 0 --tr-log-interv 1 --ts-log-interv 0 --ckpt-interv 0 --ll-interv 0"
    command = [sys.executable, ROOT / "train_svi.py", *LADDER, *options.split(), "--out", "run"]
    metrics = Path("run/metrics.jsonl")
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=subprocess_environment(),
    ) as process:
        deadline = time.monotonic() + 240
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGINT
    assert "trains until interrupted" in out
    assert "Traceback" not in err
    (step,) = Run.open(Path("run")).checkpoint_steps()
    assert err.endswith(f"interrupted after step {step}\n")
    assert [entry["step"] for entry in read_entries(metrics)] == list(range(1, step + 1))
    assert not list(Path("run").rglob("*.part"))

    assert train(*RESUME, "--steps", step + 2) == 0
    assert Run.open(Path("run")).checkpoint_steps() == [step, step + 2]
    assert [entry["step"] for entry in training_entries("run")] == list(range(1, step + 3))


def sending(*signals: signal.Signals) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps a function: this process receives the signals before each call."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def interrupted(*args: Any, **kwargs: Any) -> Any:
            for number in signals:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        return interrupted

    return wrap


def test_a_signal_interrupts_an_evaluation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run leaves a checkpoint of the step before, and restores the signal's handler."""
    handler = signal.getsignal(signal.SIGINT)
    interrupted = sending(signal.SIGINT)(importance_weighted_bounds)
    monkeypatch.setattr(held_out, "importance_weighted_bounds", interrupted)
    options = "--steps 9 --ts-log-interv 2 --ckpt-interv 0 --out run".split()
    assert train(*LADDER, *options) == 128 + signal.SIGINT
    assert capsys.readouterr().err == "interrupted after step 2\n"
    assert Run.open(Path("run")).checkpoint_steps() == [2]
    assert not Path("run/images").exists()
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("where", ["evaluation", "checkpoint"])
def test_a_second_signal_exits_at_once(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During an evaluation or while writing; the files are complete, and the run resumes."""
    twice = sending(signal.SIGTERM, signal.SIGINT)
    options = "--ckpt-interv 2 --steps 6 --out run".split()
    with monkeypatch.context() as patch:
        if where == "evaluation":
            interrupted = twice(importance_weighted_bounds)
            patch.setattr(held_out, "importance_weighted_bounds", interrupted)
        else:
            stopping(patch, lambda step: step == 3)
            patch.setattr(Run, "_prune", twice(Run._prune))
        process = start([*LADDER, *options], tmp_path / "log")
        assert finish(process) == 128 + signal.SIGINT, Path("log").read_text()
    assert "interrupted" not in Path("log").read_text()
    assert train(*RESUME) == 0
    assert train(*LADDER, *options[:-1], "whole") == 0
    assert differences(Path("whole"), Path("run")) == []


def test_a_signal_counts_after_agreement_and_a_forwarded_one_is_ignored() -> None:
    """torchrun forwards a signal that all processes have already received."""
    with Interruption(lambda number: number) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        interruption.check()
        interruption.agree()
        with pytest.raises(Interrupted):
            interruption.check()
    assert interruption.signal == signal.SIGTERM
