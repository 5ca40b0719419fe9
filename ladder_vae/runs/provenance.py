"""How a result was obtained: code, libraries and machine."""

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import pyro
import torch

from runtime.device import bf16_instructions


def provenance(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """The commit, machine and versions that result files and run folders record."""
    return {
        "commit": commit(),
        "machine": f"{processes} x " * (processes > 1) + machine(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
    }


def commit() -> str | None:
    """The checked-out commit, with -dirty if tracked files differ from it; None outside git."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def machine(device: torch.device) -> str:
    """The GPU's name, or the processor's with its bf16 instructions and PyTorch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    instructions, threads = bf16_instructions(), torch.get_num_threads()
    processor = _processor() + (f" with {instructions}" if instructions else "")
    return f"{processor}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
