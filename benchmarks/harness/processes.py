"""Runs each method of a benchmark in its own process.

So no method is affected by another's allocator settings, compiled code or peak memory. A process
waits until it is asked for its next turn.
"""

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pyro
import torch

from benchmarks.harness.memory import GIB, available_memory, peak_bytes
from benchmarks.harness.timing import medians, runs_per_turn, seconds
from runtime.device import keep_freed_memory
from runtime.errors import UserError

_ADVICE = "choose fewer --lines or a smaller --batch-sizes"


class Timed:
    """Something that is run and timed repeatedly, in the process that measures it.

    Subclasses set `run`. `keeps_memory` says whether the C library keeps freed memory, as in our
    scripts, or has its default settings.
    """

    run: Callable[[], object]

    def __init__(self, device: torch.device, *, keeps_memory: bool) -> None:
        self.device = device
        if keeps_memory:
            keep_freed_memory()

    def warm_up(self) -> None:
        """The first run compiles; by the second, memory and optimizer state are allocated."""
        self._first = seconds(self.run, self.device)
        if self.device.type == "cuda":
            seconds(self.run, self.device, runs=10)  # CUDA graphs are recorded within these
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds(self.run, self.device)
        self._runs = runs_per_turn(seconds(self.run, self.device))

    def first(self) -> float:
        """Seconds of the first run."""
        return self._first

    def turn(self) -> float:
        """Seconds of one run, the mean over a turn."""
        return seconds(self.run, self.device, self._runs)

    def peak(self) -> int:
        """Peak memory in bytes."""
        return peak_bytes(self.device)


def _serve(connection: Any, make: Callable[[], Timed], threads: int) -> None:
    """The main function of a process: answers until the connection is closed."""
    torch.set_num_threads(threads)
    try:
        with pyro.validation_enabled(False):
            timed = make()
            timed.warm_up()
            connection.send(("answer", timed.peak()))
            while True:
                connection.send(("answer", getattr(timed, connection.recv())()))
    except (EOFError, KeyboardInterrupt, BrokenPipeError):
        pass
    except Exception as error:
        connection.send(("error", f"{type(error).__name__}: {error}"))


class Process:
    """A `Timed` in its own process, which calls `make` to create it and then warms it up."""

    def __init__(self, name: str, make: Callable[[], Timed]) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, torch.get_num_threads()))
        self._process.start()
        other.close()
        try:
            self.peak_when_warm: int = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str) -> Any:
        """The result of a method of the `Timed`."""
        self._connection.send(method)
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"the process of {self.name} ended with exit code {self._process.exitcode}: if it "
                f"ran out of memory, {_ADVICE}"
            ) from None
        if kind == "error":
            raise UserError(f"{self.name} failed: {answer}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


@contextmanager
def processes(
    makers: Mapping[str, Callable[[], Timed]], device: torch.device
) -> Iterator[list[Process]]:
    """A warm process for each maker; raises `UserError` when memory runs short."""
    with ExitStack() as stack:
        started: list[Process] = []
        for name, make in makers.items():
            largest = max((process.peak_when_warm for process in started), default=0)
            if largest > 0.9 * available_memory(device):
                raise UserError(
                    f"there is no memory left for {name} besides {len(started)} others of up to "
                    f"{largest / GIB:.1f} GiB: {_ADVICE}"
                )
            started.append(stack.enter_context(closing(Process(name, make))))
        yield started


def median_seconds(started: Iterable[Process], repeats: int) -> dict[str, float]:
    """Seconds of one run of each process, by name, the median over `repeats` turns."""
    return medians({process.name: _turn_of(process) for process in started}, repeats)


def _turn_of(process: Process) -> Callable[[], float]:
    return lambda: process.ask("turn")


def rank_environments(count: int) -> list[dict[str, str]]:
    """Environment variables of `count` processes that work together, as torchrun sets them.

    A process on its own needs none.
    """
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    return [same | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]


def _call(environment: dict[str, str], function: Callable[..., Any], values: Any) -> Any:
    os.environ.update(environment)
    return function(*values)


def in_fresh_processes(count: int, function: Callable[..., Any], *values: Any) -> list[Any]:
    """The results of a function in `count` fresh processes that work together.

    If one of them fails, the others are killed, which might otherwise wait for it.
    """
    others = set(multiprocessing.active_children())
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        calls = [pool.submit(_call, e, function, values) for e in rank_environments(count)]
        finished, _ = wait(calls, return_when=FIRST_EXCEPTION)
        errors = [error for call in finished if (error := call.exception()) is not None]
        if errors:
            for process in set(multiprocessing.active_children()) - others:
                process.kill()
            if isinstance(errors[0], BrokenProcessPool):
                raise UserError("a process was killed: it may have run out of memory")
            raise errors[0]
        return [call.result() for call in calls]
