"""What distinguishes several runs: their options, and their seeds."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ladder_vae.reports.tables import Column
from ladder_vae.runs.command_line import OPTIONS, flag
from ladder_vae.runs.run import Run

Options = Mapping[str, Any]
# Options with a column of their own, or without influence on the training.
_NOT_COMPARED = {"dataset", "seed"} | {
    name for name, field in OPTIONS.items() if field.metadata["group"] == "monitoring"
}


def training_options(metrics_file: Path) -> Options | None:
    """The options of the run in whose folder an evaluation is; None if it is in no run folder."""
    for folder in list(metrics_file.absolute().parents)[:3]:
        if (folder / "config.json").is_file():
            return Run.open(folder).config.options()
    return None


def option_columns(runs: Sequence[Options | None]) -> list[Column]:
    """A column for each training option that differs between the runs that are known."""
    known = [options for options in runs if options is not None]
    names = [
        name
        for name in OPTIONS
        if name not in _NOT_COMPARED and len({str(options[name]) for options in known}) > 1
    ]
    return [
        Column(
            flag(name),
            ["" if options is None else _shown(options[name]) for options in runs],
            is_number=OPTIONS[name].type in (int, float),
        )
        for name in names
    ]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def seed_groups(runs: Sequence[tuple[Options | None, Any, Any]]) -> list[list[int]]:
    """The rows of runs that differ by their training seed alone, two or more in each group.

    `runs` holds the options of each run, its training seed, and what else must be equal.
    """
    groups: dict[str, list[int]] = {}
    for row, (options, _, rest) in enumerate(runs):
        if options is not None:
            compared = {
                n: v for n, v in options.items() if n == "dataset" or n not in _NOT_COMPARED
            }
            groups.setdefault(repr((compared, rest)), []).append(row)
    return [
        rows
        for rows in groups.values()
        if len({runs[row][1] for row in rows}) == len(rows) > 1  # not the same run twice
    ]


def mean_and_deviation(values: Sequence[float], decimals: int) -> str:
    """The mean and the standard deviation, with N - 1 degrees of freedom."""
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return f"{mean:.{decimals}f} ± {deviation:.{decimals}f}"
