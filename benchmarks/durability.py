"""Tests what training survives: kills, signals, damaged checkpoints, a full disk, random input.

    python -m benchmarks.durability [--kills 20] [--seed 0]

Trains a tiny ladder in a process that is killed at random moments and resumed each time; the
result must equal that of an undisturbed run, bit for bit. Does the same with two processes that
share each batch, one of which is killed. Damages checkpoints at random places, all of which must be
detected. If the user may mount a small file system, trains on one that fills up and is cleared
again. Runs the tests with random input and counts their cases. Writes results/durability.json.
"""

import importlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import train_svi
from benchmarks.harness.arguments import benchmark_parser
from benchmarks.harness.processes import rank_environments as rank_environments
from benchmarks.harness.records import ROOT
from evaluate import at_least
from ladder_vae.runs.checkpoint import Damaged, read_checkpoint
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.provenance import provenance
from ladder_vae.runs.run import Run
from runtime.errors import UserError, run_command
from runtime.files import write_json

RESULT = ROOT / "results" / "durability.json"
CPU = torch.device("cpu")
# A ladder whose step takes some milliseconds, with everything that has a state: dropout, batch
# normalisation, a moving average, and changing KL weight and learning rate.
LADDER = (
    "--preset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --batch-size 32 --dropout 0.2 "
    "--test-batch-size 297 --beta-anneal 30 --lr-warmup 10 --ema 0.9 --device cpu "
    "--tr-log-interv 2 --ckpt-interv 3 --ts-log-interv 7 --ll-interv 10 --ll-samples 2 "
    "--ll-images 20"
).split()


@dataclass(frozen=True)
class Survival:
    """The result of a run that was interrupted repeatedly."""

    ended: int  # number of interruptions
    differences: list[str]  # from the undisturbed run; empty if it survived


def import_once() -> None:
    """Import what training imports late, so that forked processes need not."""
    for name in (
        "ladder_vae.training.tensorboard_events",
        "sklearn.datasets",
        "torchvision.transforms",
        "torchvision.utils",
    ):
        importlib.import_module(name)


def start(
    arguments: Sequence[object], log: Path, environment: Mapping[str, str] | None = None
) -> int:
    """Train in a process forked from this one; returns its number."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.environ.update(environment or {})
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            run_command(lambda: train_svi.main([str(argument) for argument in arguments]))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def start_ranks(count: int, arguments: Sequence[object], log: Path) -> list[int]:
    """Train in several processes that share each batch; returns their numbers, by rank."""
    return [start(arguments, log, environment) for environment in rank_environments(count)]


def finish(process: int) -> int:
    """Wait for a process; returns its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def end_at_random(
    processes: Sequence[int], folder: Path, number: signal.Signals, rng: random.Random
) -> int:
    """Send a signal to one of the processes after a few log entries and milliseconds.

    Returns its exit code after all of them have ended.
    """
    process = rng.choice(processes)
    wanted = size(folder / "metrics.jsonl") + rng.choice([0, 0, 1, 300, 600, 1200])
    while size(folder / "metrics.jsonl") < wanted:
        if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            break
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.15))
    os.kill(process, number)  # the process exists until it is waited for
    code = finish(process)
    for other in processes:
        if other != process:
            os.kill(other, signal.SIGTERM)  # as torchrun does
            finish(other)
    return code


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def survive(
    folder: Path, kills: int, number: signal.Signals, seed: int, ranks: int = 1
) -> Survival:
    """Train one run undisturbed and one that the signal `number` interrupts `kills` times.

    With several processes, a random one gets the signal. Raises `UserError` if the run cannot be
    resumed.
    """
    rng = random.Random(seed)
    steps = ["--steps", 8 * kills + 10]
    log = folder / "log"
    undisturbed, disturbed = folder / "undisturbed", folder / "disturbed"
    if any(map(finish, start_ranks(ranks, [*LADDER, *steps, "--out", undisturbed], log))):
        raise UserError(f"the undisturbed run failed; see {log}")
    ended = 0
    while ended < kills:
        begun = (disturbed / "config.json").exists()
        how = ["--resume", disturbed, "--device", "cpu"] if begun else [*LADDER, *steps]
        processes = start_ranks(ranks, how if begun else [*how, "--out", disturbed], log)
        code = end_at_random(processes, disturbed, number, rng)
        if code not in (-number, 128 + number):
            raise UserError(f"a run ended with code {code} before it got the signal; see {log}")
        ended += 1
    resumed = start_ranks(ranks, ["--resume", disturbed, "--device", "cpu"], log)
    if code := max(map(finish, resumed), key=abs):
        raise UserError(f"the resumed run ended with code {code}; see {log}")
    return Survival(ended, differences(undisturbed, disturbed))


def differences(a: Path, b: Path) -> list[str]:
    """The parts in which two runs differ, apart from the time they took."""
    found = []
    runs = [Run.open(folder) for folder in (a, b)]
    if runs[0].best() != runs[1].best():
        found.append("best checkpoint")
    states = [run.load_checkpoint(None, CPU) | {"minutes": 0} for run in runs]
    found += [name for name in states[0] if not same(states[0][name], states[1][name])]
    if untimed_entries(a) != untimed_entries(b):
        found.append("metrics.jsonl")
    if left := [path.name for path in b.rglob("*.part")]:
        found.append(f"partial files {left}")
    return found


def untimed_entries(folder: Path) -> list[dict[str, Any]]:
    """The entries of metrics.jsonl without the values that depend on the clock."""
    timed = {"time", "train/images_per_second"}
    entries = read_entries(folder / "metrics.jsonl")
    return [{name: entry[name] for name in entry.keys() - timed} for entry in entries]


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def damaged_refused(path: Path, count: int, seed: int) -> tuple[int, int]:
    """Damage a checkpoint `count` times; returns how many were detected, and `count`."""
    rng = random.Random(seed)
    whole, refused = path.read_bytes(), 0
    for case in range(count):
        changed = bytearray(whole)
        if case % 2:
            changed[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        else:
            del changed[rng.randrange(len(whole)) :]
        path.write_bytes(changed)
        try:
            read_checkpoint(path, CPU)
        except Damaged:
            refused += 1
    path.write_bytes(whole)
    return refused, count


@contextmanager
def small_file_system(folder: Path, size: str) -> Iterator[bool]:
    """A small file system at `folder`; yields whether it could be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def survive_full_disk(folder: Path) -> dict[str, Any] | None:
    """Train while the disk fills up and is cleared again; None if none can be mounted."""
    with small_file_system(folder / "small", "4m") as mounted:
        if not mounted:
            return None
        run, log = folder / "small" / "run", folder / "full.log"
        process = start([*LADDER, "--steps", 200, "--out", run], log)
        metrics, ballast = run / "metrics.jsonl", folder / "small" / "ballast"
        wait_for(lambda: size(metrics) > 2000)
        fill(ballast)
        wait_for(lambda: log.read_text().count("no checkpoint of step") >= 3)
        last_good = Run.open(run).newest_whole(CPU)[0]
        ballast.unlink()
        code = finish(process)
        reference = folder / "roomy"
        if finish(start([*LADDER, "--steps", 200, "--out", reference], log)):
            raise UserError(f"the undisturbed run failed; see {log}")
        shutil.copytree(run, folder / "copy")
        return {
            "exit_code": code,
            "warnings": log.read_text().count("warning: "),
            "checkpoint_while_full": None if last_good is None else last_good["step"],
            "differences": differences(reference, folder / "copy"),
        }


def wait_for(happens: Callable[[], bool]) -> None:
    """Wait until `happens` returns true; raises `UserError` after two minutes."""
    deadline = time.monotonic() + 120
    while not happens():
        if time.monotonic() > deadline:
            raise UserError("the run on the small file system does not continue")
        time.sleep(0.01)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def random_input_cases() -> dict[str, int]:
    """Run the tests with random input; returns the number of cases of each test."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [str(path) for path in sorted((ROOT / "tests").rglob("test_fuzz*.py"))]
        options = ["-o", "junit_family=legacy", f"--junitxml={report}"]
        if subprocess.run([sys.executable, "-m", "pytest", *tests, *options], cwd=ROOT).returncode:
            raise UserError("the tests with random input fail")
        return {
            case.attrib["name"]: int(entry.attrib["value"])
            for case in ElementTree.parse(report).iter("testcase")
            for entry in case.iter("property")
            if entry.attrib["name"] == "cases"
        }


def results(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """The results of everything but random input, with files in `folder`."""
    result: dict[str, Any] = {"seed": seed}
    for ranks in (1, 2):
        for number in (signal.SIGKILL, signal.SIGTERM):
            kind = number.name if ranks == 1 else f"{number.name}_of_one_of_{ranks}"
            (folder / kind).mkdir()
            found = survive(folder / kind, kills, number, seed, ranks)
            result[kind] = {"survived": found.ended, "differences": found.differences}
            print(f"{kind}: {found.ended} times; differences: {found.differences}", flush=True)
    run = Run.open(folder / signal.SIGKILL.name / "disturbed")
    newest = run.checkpoint_path(run.checkpoint_steps()[-1])
    refused, count = damaged_refused(newest, 500, seed)
    result["damaged_checkpoints"] = {"refused": refused, "of": count}
    print(f"damaged checkpoints detected: {refused} of {count}", flush=True)
    result["full_disk"] = survive_full_disk(folder)
    print(f"full disk: {result['full_disk']}", flush=True)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("durability", "Measure what training survives.")
    parser.add_argument(
        "--kills", type=at_least(1), default=20, metavar="N", help="of each kind (default: 20)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the random moments (default: 0)"
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    import_once()
    with tempfile.TemporaryDirectory() as folder:
        result = results(Path(folder), arguments.kills, arguments.seed)
    result["made_up_cases"] = random_input_cases()
    print(f"random input: {sum(result['made_up_cases'].values())} cases")
    write_json(RESULT, result | {"provenance": provenance(CPU)})
    return 0


if __name__ == "__main__":
    run_command(main)
