"""Locks on files, which end with the process that holds them."""

import fcntl
import os
import socket
import sys
from pathlib import Path

from runtime.errors import UserError
from runtime.files import writing


class Lock:
    """An exclusive lock on a file; the file says who holds it, and stays.

    A POSIX lock: it ends when the process does, is not inherited by a fork, and works over NFS if
    the server runs its lock service. On a file system without locks one line warns.

    Args:
        path: the file; made if it is missing.
        what: what the holder does, for the message, such as "runs/a is being trained".

    Raises `UserError` if another process holds the lock, or the file cannot be written.
    """

    def __init__(self, path: Path, what: str) -> None:
        with writing(path):
            self._file = path.open("a+b", buffering=0)
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read(300).decode(errors="replace").strip() or "another process"
            self._file.close()
            raise UserError(f"{what} by {holder}: wait until it ends, or stop it") from None
        except OSError as error:
            print(
                f"warning: cannot lock {path} ({error.strerror}): make sure that no other process "
                "uses this folder",
                file=sys.stderr,
            )
        with writing(path):
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """End the lock."""
        self._file.close()
