"""Commands that are interrupted, started twice, or run out of output or memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import evaluate
import train_svi
from ladder_vae.evaluation.importance import ImportanceSampler
from ladder_vae.evaluation.options import choose_images
from ladder_vae.runs.run import Run
from ladder_vae.training.trainer import Trainer
from runtime.signals import Interrupted
from tests.commands import ROOT, content, refusal, run, subprocess_environment
from tests.processes import in_processes
from tests.tiny_runs import LADDER, after_step, train

pytestmark = pytest.mark.usefixtures("own_folder")


def wait_for(path: Path, pattern: str, process: subprocess.Popen[Any]) -> None:
    """Wait until a file whose name matches `pattern` is in a folder and not empty."""
    while not any(file.stat().st_size for file in path.glob(pattern)):
        assert process.poll() is None
        time.sleep(0.02)


# --- Signals ---


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_of_a_terminal_or_scheduler_leaves_a_checkpoint(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step(monkeypatch, lambda step: os.kill(os.getpid(), number) if step == 3 else None)
    assert train(*LADDER, "--steps", 9, "--ckpt-interv", 0, "--out", "run") == 128 + number
    assert Run.open(Path("run")).checkpoint_steps() == [3]


def test_an_ignored_hangup_does_not_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        after_step(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGHUP))
        assert train(*LADDER, "--steps", 2, "--out", "run") == 0
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_an_interrupted_evaluation_says_how_to_continue(trained_run: Path) -> None:
    options = ["--samples", "1", "1000", "--batch-size", "1000", "--device", "cpu", "--out", "eval"]
    command = [sys.executable, ROOT / "evaluate.py", trained_run, *options]
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=subprocess_environment(),
    ) as process:
        wait_for(Path("eval/.progress"), "*", process)
        process.send_signal(signal.SIGUSR1)
        found = process.communicate()
    assert process.returncode == 128 + signal.SIGUSR1
    assert found == ("", "interrupted; the same command continues the evaluation\n")
    assert list(Path("eval/.progress").iterdir())


def test_an_evaluation_stops_between_groups_and_continues(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The group that was being computed is kept; the digits do not change."""
    options = ["--samples", 1, 3, "--limit", 40, "--batch-size", 30, "--device", "cpu"]
    done: list[int] = []
    group = ImportanceSampler.group

    def interrupted(self: ImportanceSampler, number: int) -> Any:
        done.append(number)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return group(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(ImportanceSampler, "group", interrupted)
        result = run(evaluate.main, trained_run, *options, "--out", "a")
        assert (result.code, result.err) == (128 + signal.SIGTERM, "interrupted\n")
        assert run(evaluate.main, trained_run, *options, "--out", "a").code == 0
        assert sorted(done) == list(range(4))  # none twice
    assert run(evaluate.main, trained_run, *options, "--out", "b").code == 0
    found = [json.loads(Path(name, "metrics.json").read_text()) for name in "ab"]
    assert found[0]["iw"] == found[1]["iw"]


def test_a_signal_to_one_process_of_an_evaluation_stops_all(
    trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ladder = evaluate.EvaluatedLadder.load(trained_run, device="cpu")
    images = ladder.images("test", "data")
    group = ImportanceSampler.group

    def work(ranks: Any) -> tuple[int, int]:
        done: list[int] = []

        def interrupted(self: ImportanceSampler, number: int) -> Any:
            done.append(number)
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
            return group(self, number)

        monkeypatch.setattr(ImportanceSampler, "group", interrupted)
        index = choose_images(images, None, 0)
        try:
            ladder.score(images, index, [1], Path("e"), batch_size=2, seed=0, ranks=ranks)
        except Interrupted as stop:
            return stop.signal, len(done)
        return 0, len(done)

    (first, groups), (second, own) = in_processes(2, work)
    assert (first, second, own) == (signal.SIGUSR1, signal.SIGUSR1, 1)
    assert groups < 70  # of 75


# --- One writer ---


def test_a_run_has_one_writer(trained_copy: Path) -> None:
    """A second --resume is refused; evaluate.py may run beside training."""
    options = "--steps 1000000 --tr-log-interv 1 --ts-log-interv 0 --ckpt-interv 0 --ll-interv 0"
    command = [sys.executable, ROOT / "train_svi.py", "--resume", trained_copy, *options.split()]
    before = sum(path.stat().st_size for path in trained_copy.glob("events*"))
    with subprocess.Popen(
        [*map(str, command), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=subprocess_environment(),
    ) as process:
        while sum(path.stat().st_size for path in trained_copy.glob("events*")) <= before + 200:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        said = refusal(train_svi.main, "--resume", trained_copy, "--steps", 50, "--device", "cpu")
        assert f"{trained_copy} is being written by process {process.pid} on " in said
        evaluated = run(
            evaluate.main, trained_copy, "--limit", 5, "--samples", 1, "--device", "cpu"
        )
        assert evaluated.code == 0
        process.send_signal(signal.SIGTERM)
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    last = Run.open(trained_copy).checkpoint_steps()[-1]
    assert train("--resume", trained_copy, "--steps", last + 1, "--device", "cpu") == 0


def test_runs_that_start_in_the_same_second_get_their_own_folders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(train_svi, "default_folder", lambda *_: Path("runs/digits-now"))
    for _ in range(3):
        assert train(*LADDER, "--steps", 1) == 0
    assert sorted(os.listdir("runs")) == ["digits-now", "digits-now-2", "digits-now-3"]


def test_a_new_run_in_a_folder_that_another_process_begins(tmp_path: Path) -> None:
    """Both find it empty; the lock decides."""
    from runtime.locks import Lock

    ready, told = os.pipe()
    process = os.fork()
    if process == 0:
        Path("run").mkdir()
        lock = Lock(Path("run/.lock"), "")
        os.write(told, b".")
        signal.pause()
        lock.release()
    os.read(ready, 1)
    said = refusal(train_svi.main, *LADDER, "--steps", 1, "--out", "run")
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert f"run is being written by process {process} on" in said
    assert os.listdir("run") == [".lock"]
    assert train(*LADDER, "--steps", 1, "--out", "run") == 0


# --- Starts that fail ---


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_failed_start_leaves_nothing_that_refuses_the_same_command(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Trainer) -> None:
        raise error

    command = [*LADDER, "--steps", 1, "--out", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", fail)
        result = run(train_svi.main, *command)
    assert result.code == 2
    assert result.err.startswith(
        "error: the main memory is not enough: give a smaller --batch-size"
    )
    assert content(tmp_path) == {}
    assert train(*command) == 0


def test_a_resumed_run_whose_start_fails_stays(
    trained_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trained_copy / "checkpoints").rename(trained_copy / "elsewhere")
    monkeypatch.setattr(Trainer, "take_step", lambda _: 1 // 0)
    assert run(train_svi.main, "--resume", trained_copy, "--device", "cpu").code == 3
    assert (trained_copy / "config.json").exists()


# --- Output and memory ---


def test_training_and_evaluation_without_any_output() -> None:
    """In a folder whose name is not UTF-8, under an ASCII encoding."""
    name = os.fsdecode(b"caf\xe9")
    environment = subprocess_environment(PYTHONIOENCODING="ascii")

    def code(redirection: str, *arguments: object) -> int:
        shell = ["sh", "-c", f'exec "$0" "$@" {redirection}', sys.executable]
        return subprocess.run([*shell, *map(str, arguments)], env=environment).returncode

    options = ["--steps", 3, "--tr-log-interv", 1, "--ckpt-interv", 2]
    assert code(">/dev/full 2>&-", ROOT / "train_svi.py", *LADDER, *options, "--out", name) == 0
    assert Run.open(Path(name)).checkpoint_steps() == [2, 3]
    options = ["--samples", 1, "--limit", 5, "--device", "cpu"]
    assert code(">&- 2>/dev/full", ROOT / "evaluate.py", name, *options) == 0
    assert "metrics.json" in os.listdir(Path(name, "eval", "3-limit-5-samples-1"))


def test_an_evaluation_that_does_not_fit_into_main_memory(trained_run: Path) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        options = ["--samples", 1, 10**6, "--batch-size", 10**9, "--device", "cpu", "--out", "eval"]
        said = refusal(evaluate.main, trained_run, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert said.startswith("error: the main memory is not enough: ")
    assert said.endswith("give a smaller number to --batch-size\n")
