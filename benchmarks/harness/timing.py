"""Times of several methods, measured in turns: other load on the machine slows all alike."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

TURN_SECONDS = 0.3  # a turn repeats a short run until about this much time has passed
MOST_RUNS = 200


def seconds(run: Callable[[], object], device: torch.device, runs: int = 1) -> float:
    """Mean time of one call of `run`, including everything that it starts on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(runs):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / runs


def runs_per_turn(run_seconds: float) -> int:
    """Number of runs in a turn if one run takes `run_seconds`."""
    return max(1, min(MOST_RUNS, round(TURN_SECONDS / max(run_seconds, 1e-9))))


def medians(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """By name, the median of the seconds that each way returns over `repeats` turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            times[name].append(way())
    return {name: statistics.median(taken) for name, taken in times.items()}
