"""Signals that stop a run cleanly, and the clock that the processes of a run share."""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from runtime.distributed import ONE_PROCESS, Ranks

# Under torchrun a signal may arrive twice: from the sender, for example Ctrl-C in a terminal, which
# signals all processes, and from torchrun, which forwards it. A second one within this time is
# ignored.
_SAME_SIGNAL = 2.0  # seconds


class Interrupted(Exception):  # noqa: N818 (not an error)
    """A signal stopped the run."""


class Interruption:
    """Notes the first SIGINT or SIGTERM so that the run stops cleanly; a second one exits at once.

    Args:
        agree: `Clock.agree` if several processes share the work. It takes the number of the signal
            that this process received, or 0, and returns one that any process received.
    """

    def __init__(self, agree: Callable[[int], int] | None = None) -> None:
        self.signal: int | None = None  # the signal that stops the run
        self._agree = agree
        self._noted: int | None = None  # the signal that this process received
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
        """Share a signal that one process received with all. All must call this together."""
        if self._agree is not None:
            self.signal = self._agree(self._noted or 0) or None

    def check(self) -> None:
        """Raise `Interrupted` if the processes have agreed on a signal."""
        if self.signal is not None:
            raise Interrupted

    def on_images(self, _: int) -> None:
        """Agree and check; evaluations call this after each group of images."""
        self.agree()
        self.check()


class Clock:
    """Time and signals on which all processes agree.

    A single process simply reads its clock. Several use the first one's time, which advances only
    when they call `agree`, so that all take the same decisions.
    """

    def __init__(self, ranks: Ranks = ONE_PROCESS) -> None:
        self.ranks = ranks
        self._now = ranks.share(time.monotonic())

    @property
    def now(self) -> float:
        """Seconds since an arbitrary fixed moment."""
        return time.monotonic() if self.ranks.size == 1 else self._now

    def agree(self, signal: int) -> int:
        """Update the time, and share signals; never waits for a GPU.

        Takes the number of the signal that this process received, or 0 for none, and returns one
        that any process received.
        """
        now = time.monotonic() if self.ranks.is_first else 0.0
        self._now, number = self.ranks.largest(now, signal)
        return int(number)
