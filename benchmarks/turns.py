"""Times of several ways to do the same, taken in turns.

Whatever else the machine does, or its clock, then slows all of them alike.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

# A turn is as many runs as take about so long: more of them where one is over in no time.
TURN_SECONDS = 0.3
MOST_RUNS = 200


def seconds(run: Callable[[], object], device: torch.device, runs: int = 1) -> float:
    """Of one run, the mean over `runs`, with all that they start on the device finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(runs):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / runs


def runs_per_turn(taken: float) -> int:
    """How many runs make a turn, where one takes `taken` seconds."""
    return max(1, min(MOST_RUNS, round(TURN_SECONDS / max(taken, 1e-9))))


def medians(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of what each way returns, seconds, over `repeats` turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(way())
    return {name: statistics.median(taken) for name, taken in times.items()}
