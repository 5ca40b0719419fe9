"""The device that a script runs on, and its memory."""

import ctypes
import platform

import torch

from runtime.errors import UserError


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device called `name`: cpu, cuda, cuda:N, or auto for a GPU if there is one.

    With cuda or auto, each process on a machine uses the GPU with its `local_rank`.

    Raises `UserError` if there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device is {name!r}; it must be auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            found = f"finds only {count} GPU{'s' * (count > 1)}" if count else "finds no GPU"
            raise UserError(f"--device is {name!r} but PyTorch {found}; use --device cpu")
    return device


# The options of mallopt(3) and their values.
_TRIM_THRESHOLD, _NEVER = -1, 2**31 - 1
_MMAP_MAX, _NONE = -4, 0


def keep_freed_memory() -> None:
    """Make glibc keep and reuse freed memory: the kernel would have to clear new pages."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, _NONE)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
