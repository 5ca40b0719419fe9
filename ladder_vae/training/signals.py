"""Signals that end a run in order."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

# Under torchrun one signal may come twice: from who sent it to all processes, and from torchrun,
# which passes on its own.
_SAME_SIGNAL = 2.0  # seconds


class Interruption:
    """Notes the first SIGINT or SIGTERM, for the run to end in order; a second one acts at once.

    Args:
        agree: where several processes share the work, turns the number of the signal that has come
            to this one, or 0, into that of one that has come to any.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signal: int | None = None  # what ends the run
        self._agree = agree
        self._noted: int | None = None  # what has come to this process
        self._noted_at = 0.0

    def __enter__(self) -> Self:
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._noted is None:
            self._noted, self._noted_at = number, now
        elif self._agree is None or now - self._noted_at > _SAME_SIGNAL:
            os._exit(128 + number)
        if self._agree is None:
            self.signal = self._noted

    def agree(self) -> None:
        """Have all processes know of a signal that has come to one; to be called on all alike."""
        if self._agree is not None:
            self.signal = self._agree(self._noted or 0) or None

    def check(self) -> None:
        """Raise `Interrupted` once a signal has come that is agreed on."""
        if self.signal is not None:
            raise Interrupted

    def on_images(self, _: int) -> None:
        """Agree and check, between two groups of images of an evaluation."""
        self.agree()
        self.check()


class Interrupted(Exception):  # noqa: N818 (no error)
    """An evaluation was broken off by a signal."""
