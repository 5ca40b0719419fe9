"""How many steps of training fit into some minutes, by the rate that a short warm-up measures."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import UserError

# The share of the minutes that is left to log entries, evaluations and checkpoints on the way.
RESERVE = 0.05
# Steps that are not counted: compilation, and caches and clocks that have yet to warm up.
UNCOUNTED = 20
# The counted time is cut into so many stretches, whose median outlives a disturbance of a few.
_STRETCHES = 5


@dataclass(frozen=True)
class Rate:
    """What a warm-up measured."""

    steps_per_second: float
    steps: int  # that were counted


def measured_rate(
    step: Callable[[], object],
    clock: Callable[[], float],
    seconds: float,
    uncounted: int = UNCOUNTED,
) -> Rate:
    """The rate of `step`, by about `seconds` of calls after `uncounted` ones that do not count.

    `clock` gives seconds, once all that has been asked of the device is done. Each stretch has one
    step at least, so that a slow step takes longer than `seconds`.
    """
    for _ in range(uncounted):
        step()
    began = clock()
    step()
    # By one step, so that the clock, for which the device must come to rest, is asked seldom.
    first = max(clock() - began, 1e-9)
    count = max(1, round(seconds / _STRETCHES / first))
    rates = []
    for _ in range(_STRETCHES):
        began = clock()
        for _ in range(count):
            step()
        rates.append(count / max(clock() - began, 1e-9))
    return Rate(statistics.median(rates), _STRETCHES * count)


def fitted_steps(minutes: float, rate: Rate) -> int:
    """The steps of training for which there is time in `minutes`, without the reserve.

    Raises `UserError` where there is none for a single one.
    """
    steps = math.floor((1 - RESERVE) * 60 * minutes * rate.steps_per_second)
    if steps < 1:
        least = 1 / (60 * (1 - RESERVE) * rate.steps_per_second)
        raise UserError(
            f"--minutes is {minutes:g}, which leaves no time for a step; it must be at least "
            f"{least:.2g} here"
        )
    return steps
