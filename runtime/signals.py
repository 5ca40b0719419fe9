"""Signals that stop a program cleanly.

SIGINT is Ctrl-C, and SIGHUP a terminal that closes. Slurm sends SIGTERM, or another one that the
user chooses, such as SIGUSR1, before the time limit. SIGHUP has no effect if it was ignored when
the program started, as by nohup.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

# Under torchrun a signal may arrive twice: from the sender, for example Ctrl-C in a terminal, which
# signals all processes, and from torchrun, which forwards it. A second one within this time is
# ignored.
_SAME_SIGNAL = 2.0  # seconds


class Interrupted(KeyboardInterrupt):
    """A signal stopped the program."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


def _handle(handler: Callable[[int, FrameType | None], object]) -> dict[int, Any]:
    """Call `handler` at the signals that stop a program; returns the previous handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}  # only the main thread may change handlers
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def _restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def raising_interrupted() -> Iterator[None]:
    """Raise `Interrupted` inside as soon as a signal arrives."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    previous = _handle(stop)
    try:
        yield
    finally:
        _restore(previous)


class Interruption:
    """Notes the first signal, so that work stops where it is safe; a second one exits at once.

    Args:
        agree: where several processes share the work: takes the number of the signal that this
            process received, or 0, and returns one that any process received.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signal: int | None = None  # the signal that stops the work
        self._agree = agree
        self._noted: int | None = None  # the signal that this process received
        self._noted_at = 0.0

    def __enter__(self) -> Self:
        self._previous = _handle(self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _restore(self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted is None:
            self._noted, self._noted_at = number, now
        elif self._agree is None or now - self._noted_at > _SAME_SIGNAL:
            os._exit(128 + number)
        if self._agree is None:
            self.signal = self._noted

    def agree(self) -> None:
        """Let all processes know of a signal that one received."""
        if self._agree is not None:
            self.signal = self._agree(self._noted or 0) or None

    def check(self) -> None:
        """Raise `Interrupted` after a signal on which the processes have agreed."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    def between_groups(self) -> None:
        """Agree and check; evaluations call this before each group of images."""
        self.agree()
        self.check()

    def on_images(self, _: int) -> None:
        """Agree and check, after a group of images."""
        self.between_groups()
