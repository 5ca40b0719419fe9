"""Ways to do the same, each in a process of its own that does nothing unless asked.

None then has another's allocator, compiled code or peak memory: the C library cannot be told to
forget that it keeps freed memory, and compiled code looks through all that was compiled before it.
The one who compares them has each take a turn when it is its time.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pyro
import torch

from benchmarks.memory import GIB, available_memory, peak_bytes
from benchmarks.turns import medians, runs_per_turn, seconds
from runtime.device import keep_freed_memory
from runtime.errors import UserError


class Timed:
    """Something to be run again and again, in the process that it is measured in.

    Subclasses set `run`. `keeps_memory`: the C library is told to, as our scripts do; it is left as
    it is otherwise.
    """

    run: Callable[[], object]

    def __init__(self, device: torch.device, *, keeps_memory: bool) -> None:
        self.device = device
        if keeps_memory:
            keep_freed_memory()

    def warm_up(self) -> None:
        """The first run compiles; in a second one memory and the optimizer's state are in place."""
        self._first = seconds(self.run, self.device)
        if self.device.type == "cuda":
            seconds(self.run, self.device, runs=10)  # by the end of which a graph is recorded
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds(self.run, self.device)
        self._runs = runs_per_turn(seconds(self.run, self.device))

    def first(self) -> float:
        """Seconds of the first run."""
        return self._first

    def turn(self) -> float:
        """Seconds of a run."""
        return seconds(self.run, self.device, self._runs)

    def peak(self) -> int:
        """Bytes; the process's own on the CPU."""
        return peak_bytes(self.device)


def _serve(connection: Any, make: Callable[[], Timed], threads: int) -> None:
    """The main function of a process: answers until the other end is gone."""
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
    """A `Timed` in a process of its own, warm; `make` is to make it there."""

    def __init__(self, name: str, make: Callable[[], Timed]) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        target = (other, make, torch.get_num_threads())
        self._process = context.Process(target=_serve, args=target)
        self._process.start()
        other.close()
        try:
            self.peak_when_warm: int = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str) -> Any:
        """What a method of the `Timed` returns."""
        self._connection.send(method)
        return self._answer()

    def _answer(self) -> Any:
        try:
            kind, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise UserError(
                f"the process of {self.name} ended with exit code {self._process.exitcode}: if its "
                "memory was the reason, choose fewer --lines or a smaller --batch-sizes"
            ) from None
        if kind == "error":
            raise UserError(f"{self.name} cannot run: {answer}")
        return answer

    def close(self) -> None:
        """End it."""
        self._connection.close()
        self._process.join()


@contextmanager
def processes(
    makers: Mapping[str, Callable[[], Timed]], device: torch.device
) -> Iterator[list[Process]]:
    """One for each maker by name, all warm; started one after the other, while memory is left."""
    with ExitStack() as stack:
        started: list[Process] = []
        for name, make in makers.items():
            largest = max((process.peak_when_warm for process in started), default=0)
            if largest > 0.9 * available_memory(device):
                raise UserError(
                    f"no memory is left for {name} beside {len(started)} others of up to "
                    f"{largest / GIB:.1f} GiB: choose fewer --lines or a smaller --batch-sizes"
                )
            started.append(stack.enter_context(closing(Process(name, make))))
        yield started


def median_seconds(started: Iterable[Process], repeats: int) -> dict[str, float]:
    """Of one run of each, by name, over `repeats` turns."""
    return medians({process.name: _turn_of(process) for process in started}, repeats)


def _turn_of(process: Process) -> Callable[[], float]:
    return lambda: process.ask("turn")
