"""Signals that end a run in order."""

import os
import signal
from types import FrameType, TracebackType
from typing import Self


class Interruption:
    """Notes the first SIGINT or SIGTERM, for the run to end in order; a second one acts at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

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
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number

    def check(self, _: int = 0) -> None:
        """Raise `Interrupted` once a signal has come."""
        if self.signal is not None:
            raise Interrupted


class Interrupted(Exception):  # noqa: N818 (no error)
    """An evaluation was broken off by a signal."""
