"""Locks end with their process, and partial files that are being written stay."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.files import remove_partial_files, write_atomically
from runtime.locks import Lock


@pytest.fixture
def elsewhere() -> Iterator[Callable[[Callable[[], object]], int]]:
    """Calls a function in a forked process that then waits; returns the process's number."""
    processes: list[int] = []

    def fork(work: Callable[[], object]) -> int:
        ready, done = os.pipe()
        process = os.fork()
        if process == 0:
            kept = work()
            os.write(done, b"." if kept is not None else b"-")
            signal.pause()
            os._exit(0)
        processes.append(process)
        os.read(ready, 1)
        return process

    yield fork
    for process in processes:
        kill(process)


def kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def test_a_lock_names_its_holder_and_ends_with_it(
    tmp_path: Path, elsewhere: Callable[[Callable[[], object]], int]
) -> None:
    path = tmp_path / "lock"
    process = elsewhere(lambda: Lock(path, "it is used"))
    expected = f"^it is used by process {process} on {socket.gethostname()}: wait until it ends"
    with pytest.raises(UserError, match=expected):
        Lock(path, "it is used")
    kill(process)
    Lock(path, "it is used").release()


def test_a_lock_is_not_inherited(
    tmp_path: Path, elsewhere: Callable[[Callable[[], object]], int]
) -> None:
    """A forked process, such as a compiler's, may live longer."""
    lock = Lock(tmp_path / "lock", "it is used")
    elsewhere(lambda: lock)
    lock.release()
    Lock(tmp_path / "lock", "it is used").release()


def test_a_file_that_another_process_is_writing_stays(
    tmp_path: Path, elsewhere: Callable[[Callable[[], object]], int]
) -> None:
    def write() -> None:
        def wait(file: object) -> None:
            os.write(told, b".")
            signal.pause()

        write_atomically(tmp_path / "file", wait)

    ready, told = os.pipe()
    process = os.fork()
    if process == 0:
        write()
    os.read(ready, 1)
    remove_partial_files(tmp_path)
    assert len(list(tmp_path.glob(".file.*.part"))) == 1
    kill(process)
    remove_partial_files(tmp_path)
    assert os.listdir(tmp_path) == []
