"""Runs that are killed again and again: the result is that of an undisturbed run, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.durability import differences, survive
from tests import tiny_runs
from tests.commands import ROOT, subprocess_environment
from tests.processes import train_in
from tests.tiny_runs import RESUME

LADDER = [*tiny_runs.LADDER, "--batch-size", "36", "--test-batch-size", "80"]
KILLS = 10
pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_interrupted_at_random_moments(number: signal.Signals, tmp_path: Path) -> None:
    found = survive(tmp_path, KILLS, number, seed=3)
    assert found.ended == KILLS
    assert found.differences == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_of_two_processes_one_of_which_is_interrupted(
    number: signal.Signals, tmp_path: Path
) -> None:
    """The other one ends by itself."""
    found = survive(tmp_path, KILLS, number, seed=2, ranks=2)
    assert found.ended == KILLS
    assert found.differences == []
    lines = Path("log").read_text().splitlines()
    assert not any("Traceback" in line for line in lines)
    if number == signal.SIGKILL:
        said = [line for line in lines if line.startswith("error")]
        assert said
        assert set(said) == {
            "error: one of 2 processes has died; --resume continues from the newest checkpoint"
        }


def test_three_processes_resume_bit_for_bit() -> None:
    """With three, the order of summation matters."""
    assert train_in(3, *LADDER, "--steps", 8, "--out", "whole") == [0, 0, 0]
    assert train_in(3, *LADDER, "--steps", 8, "--ckpt-interv", 5, "--out", "run") == [0, 0, 0]
    Path("run/checkpoints/8.pt").unlink()
    assert train_in(3, *RESUME) == [0, 0, 0]
    assert differences(Path("whole"), Path("run")) == []


def torchrun(*arguments: object) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return [*launcher, *map(str, arguments)]


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_torchrun_restarts_a_run_from_its_newest_checkpoint() -> None:
    """After one of its processes is killed; the result is the same, bit for bit."""
    options = "--ckpt-interv 5 --steps 60 --ts-log-interv 0 --ll-interv 0".split()
    script = [ROOT / "train_svi.py", *LADDER, *options]
    command = torchrun("--max-restarts", 1, *script, "--out", "run")
    environment = subprocess_environment()
    with (
        Path("torchrun.log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environment) as launcher,
    ):
        deadline = time.monotonic() + 120
        while not list(Path("run/checkpoints").glob("*.pt")):
            assert launcher.poll() is None, Path("torchrun.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(children(launcher.pid)[1], signal.SIGKILL)
        assert launcher.wait(120) == 0, Path("torchrun.log").read_text()
    said = Path("torchrun.log").read_text().splitlines()
    assert sum(line.startswith("run folder run") for line in said) == 2
    assert sum(line.startswith("error: one of 2 processes has died") for line in said) <= 1
    assert not any("Traceback" in line for line in said)
    assert train_in(2, *LADDER, *options, "--out", "whole") == [0, 0]
    assert differences(Path("whole"), Path("run")) == []
