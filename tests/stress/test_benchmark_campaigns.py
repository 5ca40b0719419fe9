"""The durability benchmark's campaign of kills, and benchmarks that start many processes."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from benchmarks import durability, memory, parallel
from benchmarks.harness.processes import in_fresh_processes
from runtime.distributed import joined_ranks
from runtime.errors import UserError


def test_durability(tmp_path: Path) -> None:
    """Every interrupted run equals the undisturbed one; every damage is detected."""
    durability.import_once()
    found = durability.results(tmp_path, kills=10, seed=3)
    for number in (signal.SIGKILL, signal.SIGTERM):
        for kind in (number.name, f"{number.name}_of_one_of_2"):
            assert found[kind] == {"survived": 10, "differences": []}
    assert found["damaged_checkpoints"] == {"refused": 500, "of": 500}
    full = found["full_disk"]
    if full is not None:  # this user may mount a small file system
        assert (full["exit_code"], full["differences"]) == (0, [])
        assert full["warnings"] > 0
        assert full["checkpoint_while_full"] is not None


def test_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, and two that share each batch."""
    monkeypatch.setattr(parallel, "RESULT", tmp_path / "parallel.json")
    threads = torch.get_num_threads()
    try:
        assert parallel.main(["--presets", "digits", "--steps", "1", "--repeats", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads((tmp_path / "parallel.json").read_text())
    rates = found["throughput"]["digits"]["images_per_second"]
    assert rates.keys() == {"1", "2"}
    assert min(rates.values()) > 0
    assert found["batch_norm"]["digits"].keys() == {"2", "4", "8"}


def test_memory_in_fresh_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak of a training step grows with the batch; imports hide that of small evaluations."""
    monkeypatch.setattr(memory, "RESULT", tmp_path / "memory.json")
    assert memory.main(["--presets", "digits", "--batch-size", "1024"]) == 0
    found = json.loads((tmp_path / "memory.json").read_text())["figures"]["digits"]
    sizes = {"2", "4", "16", "64", "256", "1024"}
    assert (
        found["training"]["peak_bytes"].keys() == found["evaluation"]["peak_bytes"].keys() == sizes
    )
    assert found["training"]["peak_bytes"]["1024"] > 1.5 * found["training"]["peak_bytes"]["2"]


def fail_on_one(number: int) -> None:
    with joined_ranks() as ranks:
        if ranks.rank == number:
            raise UserError(f"process {number} fails")
        ranks.share(0)  # waits for the other one


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_failing_process_ends_the_others() -> None:
    for number in (0, 1):
        with pytest.raises(UserError, match=f"process {number} fails|a process was killed"):
            in_fresh_processes(2, fail_on_one, number)
    with pytest.raises(UserError, match="a process was killed"):
        in_fresh_processes(1, killed)
