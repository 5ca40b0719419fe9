"""Standard output and error that never fail: what cannot be printed is lost, and nothing else."""

import io
import os
import sys
from typing import Any

_DESCRIPTORS = {"stdout": 1, "stderr": 2}


class _Descriptor(io.RawIOBase):
    """Writes to a file descriptor, and drops what it does not accept.

    That is the case on a full disk, in a closed pipe and on a terminal that is gone.
    """

    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, data: Any) -> int:
        try:
            return os.write(self._number, data)
        except OSError:
            return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)


def unfailing(number: int, encoding: str, *, by_line: bool, at_once: bool = False) -> io.TextIOBase:
    """A text stream to a file descriptor that raises no error.

    Characters that `encoding` lacks are written as escapes.
    """
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(number)),
        encoding,
        errors="backslashreplace",
        line_buffering=by_line,
        write_through=at_once,
    )


def protect_output() -> None:
    """Replace this process's `sys.stdout` and `sys.stderr` by streams that never fail.

    Streams that are already replaced, as by `redirect_stdout`, stay.
    """
    null = _close_gaps()
    for name, number in _DESCRIPTORS.items():
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is None:  # closed when the process started
            replaced = unfailing(null, "utf-8", by_line=True)
        else:
            stream.flush()
            by_line = name == "stderr" or stream.line_buffering
            replaced = unfailing(
                number, stream.encoding, by_line=by_line, at_once=stream.write_through
            )
        setattr(sys, name, replaced)


def _close_gaps() -> int:
    """Open the null device in place of closed standard descriptors; returns a descriptor of it.

    Otherwise the next file that is opened would get the number of standard error, and libraries
    would write their messages into it.
    """
    null = os.open(os.devnull, os.O_RDWR)
    while null <= 2:
        null = os.open(os.devnull, os.O_RDWR)
    return null
