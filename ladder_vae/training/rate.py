"""Measures the rate of training steps, and how many of them fit into a time budget."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from runtime.errors import UserError

# The fraction of the budget that is reserved for log entries, evaluations and checkpoints.
RESERVE = 0.05
# The first steps are not timed: blocks compile, and caches and clock rates settle.
UNCOUNTED = 20
# The timed steps are split into this many stretches; their median ignores a short disturbance.
_STRETCHES = 5


@dataclass(frozen=True)
class Rate:
    """The result of a warm-up."""

    steps_per_second: float
    steps: int  # that were timed


def measured_rate(
    step: Callable[[], object],
    clock: Callable[[], float],
    seconds: float,
    uncounted: int = UNCOUNTED,
) -> Rate:
    """Measure the rate of `step` over about `seconds`, after `uncounted` calls.

    `clock` waits until the device is idle and returns seconds. Each stretch has at least one step,
    so slow steps take longer than `seconds`.
    """
    for _ in range(uncounted):
        step()
    began = clock()
    step()
    # One timed step gives the number of steps in a stretch. The clock waits for the device, so it
    # is read rarely.
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
    """The number of training steps that fit into `minutes` minus the reserve.

    Raises `UserError` if not even one step fits.
    """
    steps = math.floor((1 - RESERVE) * 60 * minutes * rate.steps_per_second)
    if steps < 1:
        least = 1 / (60 * (1 - RESERVE) * rate.steps_per_second)
        raise UserError(
            f"--minutes is {minutes:g}, too short for a single step; it must be at least "
            f"{least:.2g} here"
        )
    return steps
