"""Memory that is freed is used again."""

import platform
import subprocess
import sys

import pytest

from tests.commands import ROOT

# How many pages the kernel has to clear for twenty feature maps of 64 MiB, one after the other,
# once there have been so many before that the heap has room for them.
FAULTS = """
import resource, torch
{call}
for _ in range(20):
    torch.zeros(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.zeros(2**24)
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_pages_are_cleared_once() -> None:
    kept = faults("import allocator; allocator.keep_freed_memory()")
    assert kept < faults("") / 10
