"""Peak and available memory."""

import os
import resource

import torch

GIB = 2**30


def peak_bytes(device: torch.device) -> int:
    """This process's peak memory: its resident set on the CPU, PyTorch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_memory(device: torch.device) -> int:
    """Bytes that a process can still allocate."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
