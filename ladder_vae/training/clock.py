"""The clock that the processes of a run share."""

import time

from runtime.distributed import ONE_PROCESS, Ranks


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
        """Seconds since some fixed moment."""
        return time.monotonic() if self.ranks.size == 1 else self._now

    def agree(self, signal: int) -> int:
        """Update the time, and share signals; never waits for a GPU.

        Takes the number of the signal that this process received, or 0 for none, and returns one
        that any process received.
        """
        now = time.monotonic() if self.ranks.is_first else 0.0
        self._now, number = self.ranks.largest(now, signal)
        return int(number)
