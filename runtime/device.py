"""The device that a script runs on, and its memory."""

import ctypes
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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


def bf16_instructions() -> str | None:
    """The processor's fastest instructions for bf16: amx_bf16, avx512_bf16, or None."""
    # Older versions of PyTorch do not know what the processor can do.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return next((name for name in ("amx_bf16", "avx512_bf16") if capabilities.get(name)), None)


# What PyTorch, oneDNN and C++ say if there is not enough main memory. PyTorch has no type for it.
_NO_MEMORY = re.compile(
    "can't allocate memory|bad_alloc|could not create a memory object|Cannot allocate memory"
    "|Storage size calculation overflowed|numel: integer multiplication overflow"
)


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Turn a lack of the GPU's or of main memory into a `UserError` that ends with `advice`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(f"the GPU's memory is not enough: {advice}") from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        raise UserError(f"the main memory is not enough: {advice}") from None


# The options of mallopt(3) and their values.
_TRIM_THRESHOLD, _NEVER = -1, 2**31 - 1
_MMAP_MAX, _NONE = -4, 0


def keep_freed_memory() -> None:
    """Make glibc keep and reuse freed memory: the kernel would have to clear new pages."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, _NONE)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
