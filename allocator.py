"""How the C library keeps memory for a network that runs on the processor.

Feature maps are tens of MiB. By default glibc maps memory of that size anew for each of them and
gives it back at once, so that the kernel clears every page of every map again. Told to keep what is
freed, it hands the same pages out again.
"""

import ctypes
import platform

# The options of mallopt(3) and their values.
_TRIM_THRESHOLD, _NEVER = -1, 2**31 - 1
_MMAP_MAX, _NONE = -4, 0


def keep_freed_memory() -> None:
    """Have memory that is freed used again in this process; only glibc needs to be told, and is."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_MAX, _NONE)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
