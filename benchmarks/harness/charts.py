"""Charts of benchmark results."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness.lines import Line
from benchmarks.harness.operations import KINDS
from benchmarks.harness.records import machine_of
from ladder_vae.reports.charts import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_GRID, _INK = "#e2e2e2", "#333333"
# Convolutions are blue, everything else is not.
_COLOURS = dict(
    zip(
        KINDS,
        (
            *("#2f6db3", "#1d4675", "#d1701f", "#e8a33d", "#3a8f5c", "#8fbf6f", "#8a4fa3"),
            *("#c08bd1", "#b3323e", "#e58b93", "#7a6a3a", "#b8a978", "#b5b5b5"),
        ),
        strict=True,
    )
)


def _new_figure(height: float, rows: int = 1, columns: int = 1) -> tuple["Figure", list["Axes"]]:
    """A grid of charts, 8 inches wide at 100 pixels per inch."""
    from matplotlib.figure import Figure  # takes a while to import
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(8.0, height), dpi=100, layout=layout)
    charts = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in charts:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, charts


def draw_profiles(path: Path, cases: Sequence[Mapping[str, Any]]) -> None:
    """Write a bar for each line: a step's time, divided by kind of operation.

    `cases` are those of training.json. Lines without a profile are skipped; without any profile, no
    file is written. A bar's length is the time of the line's step; its parts are shares of a
    profiled step. A mark shows the time of the step's convolutions alone, if it was measured.
    """
    shown = [case for case in cases if any("profile_ms" in line for line in case["lines"].values())]
    if not shown:
        return
    counts = [sum("profile_ms" in line for line in case["lines"].values()) for case in shown]
    height = 1.6 + sum(0.85 + 0.34 * count for count in counts)
    figure, charts = _new_figure(height, rows=len(shown))
    for axes, case in zip(charts, shown, strict=True):
        _draw_case(axes, dict(case))
    used = {
        kind: bar
        for axes in charts
        for kind, bar in zip(*reversed(axes.get_legend_handles_labels()), strict=True)
    }
    figure.legend(
        [used[kind] for kind in KINDS if kind in used],
        [kind for kind in KINDS if kind in used],
        loc="outside lower center",
        ncols=4,
        frameon=False,
        fontsize="small",
    )
    write_figure(path, figure)


def _draw_case(axes: "Axes", case: dict[str, Any]) -> None:
    lines = {name: line for name, line in case["lines"].items() if "profile_ms" in line}
    for row, (name, line) in enumerate(lines.items()):
        scale = line["ms_per_step"] / sum(line["profile_ms"].values())
        left = 0.0
        for kind in KINDS:
            width = scale * line["profile_ms"].get(kind, 0.0)
            if width:
                axes.barh(row, width, left=left, height=0.7, color=_COLOURS[kind], label=kind)
            left += width
        floor = case["lines"].get(Line(*name.split("/")).floor)
        if floor is not None:
            axes.plot([floor["ms_per_step"]] * 2, [row - 0.45, row + 0.45], color=_INK, lw=1.6)
    axes.set_yticks(range(len(lines)), list(lines), fontsize="small")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("ms per step; the mark is its convolutions alone", fontsize="small")
    title = f"{case['preset']}, batch {case['batch_size']}, {machine_of(case)}"
    axes.set_title(title, loc="left", fontsize=11)


def draw_scaling(path: Path, series: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a chart for each series: milliseconds per step against the varied size, log-log.

    `series` maps the name of the varied size to points with `value`, `ours_ms`, `convolutions_ms`
    and `operations`. The dotted line is proportional to the operations, through the largest point.
    """
    from matplotlib.ticker import LogLocator

    rows = math.ceil(len(series) / 2)
    figure, charts = _new_figure(3.5 * rows, rows, 2)
    for axes, (name, points) in zip(charts, series.items(), strict=False):
        values = [point["value"] for point in points]
        expected = [
            points[-1]["ours_ms"] * point["operations"] / points[-1]["operations"]
            for point in points
        ]
        axes.plot(values, [p["ours_ms"] for p in points], "o-", ms=4, color="#2f6db3", label="step")
        floor = [point["convolutions_ms"] for point in points]
        axes.plot(values, floor, "s-", ms=4, color="#d1701f", label="its convolutions alone")
        axes.plot(values, expected, ":", color="#666666", label="proportional to operations")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(values, [str(value) for value in values])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_xlabel(name)
        axes.set_ylabel("ms per step")
    charts[0].legend(frameon=False, fontsize="small")
    write_figure(path, figure)


def draw_learning(path: Path, runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Write the training curves of all runs, and their final ELBOs.

    `runs` are those of learning.json, by options and seed. Points of a curve are means over the
    steps between log entries; each seed has its own line, in the colour of its options.
    """
    colours = dict(zip(runs, ("#666666", "#2f6db3", "#d1701f", "#3a8f5c", "#8a4fa3"), strict=False))
    figure, (curves, ends) = _new_figure(4.5, columns=2)
    for row, (name, seeds) in enumerate(runs.items()):
        for number, run in enumerate(seeds.values()):
            curves.plot(
                run["curve"]["step"],
                run["curve"]["negative_elbo"],
                lw=1.0,
                color=colours[name],
                label=name if number == 0 else None,
            )
            elbo = run["test"]["by_precision"]["float32"]["negative_elbo"]["mean"]
            ends.plot([elbo], [row], "o", ms=6, color=colours[name])
    # The first tenth of a run is far above the rest: it does not determine the axis.
    later = [
        value
        for seeds in runs.values()
        for run in seeds.values()
        for step, value in zip(run["curve"]["step"], run["curve"]["negative_elbo"], strict=True)
        if 10 * step >= run["steps"]
    ]
    if later:
        curves.set_ylim(min(later) - 1, max(later) + 1)
    curves.set_xlabel("step")
    curves.set_ylabel("negative ELBO in training, nats")
    curves.legend(frameon=False, fontsize="small")
    ends.set_yticks(range(len(runs)), list(runs), fontsize="small")
    ends.invert_yaxis()
    ends.set_xlabel("negative ELBO of the test images, nats\n(one point per seed)")
    write_figure(path, figure)


def draw_time_to_quality(
    path: Path, found: Mapping[str, Any], curves: Mapping[str, Sequence[Mapping[str, float]]]
) -> None:
    """Write the negative ELBO of each way against minutes, with a line at each mark.

    `found` is the content of time_to_quality.json, `curves` are those of the ways.
    """
    figure, (axes,) = _new_figure(4.0)
    for (name, way), colour in zip(
        found["ways"].items(), ("#666666", "#2f6db3", "#d1701f"), strict=False
    ):
        minutes = [point["images"] / way["images_per_second"] / 60 for point in curves[name]]
        elbos = [point["elbo"] for point in curves[name]]
        axes.plot(minutes, elbos, "o-", ms=3, color=colour, label=way["says"])
    for mark in found["marks"]:
        axes.axhline(mark, color=_GRID, lw=1, zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(min(found["marks"]) - 2, max(found["marks"]) + 20)
    axes.set_xlabel("minutes")
    axes.set_ylabel("negative ELBO of the validation images, nats")
    axes.legend(frameon=False, fontsize="small")
    write_figure(path, figure)
