"""Devices by name, and the memory allocator."""

import platform
import subprocess
import sys

import pytest
import torch

from runtime.device import choose_device
from runtime.errors import UserError
from tests.commands import ROOT

# Counts the pages that the kernel clears for five arrays of 40 MiB, one after the other, after
# twenty others have grown the heap.
FAULTS = """
import resource, torch
{call}
for _ in range(20):
    torch.zeros(10 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.zeros(10 * 2**20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(call=call)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="affects only glibc")
def test_freed_memory_is_reused() -> None:
    kept = faults("import runtime.device; runtime.device.keep_freed_memory()")
    assert kept < faults("") / 10


@pytest.mark.parametrize(
    ("name", "local_rank", "gpus", "expected"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 0, 2, "cuda"),
        ("auto", 1, 2, "cuda:1"),
        ("cuda", 1, 2, "cuda:1"),
        ("cuda:0", 1, 2, "cuda:0"),
        ("cpu", 1, 2, "cpu"),
    ],
)
def test_each_process_uses_its_own_gpu(
    name: str, local_rank: int, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert choose_device(name, local_rank) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("tpu", 0, "it must be auto, cpu, cuda or cuda:N"),
        ("meta", 0, "it must be auto, cpu, cuda or cuda:N"),
        ("cuda", 0, "PyTorch finds no GPU; use --device cpu"),
        ("cuda:2", 2, "PyTorch finds only 2 GPUs"),
    ],
)
def test_missing_devices_are_refused(
    name: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UserError, match=message):
        choose_device(name)
