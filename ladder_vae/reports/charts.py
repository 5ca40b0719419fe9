"""Charts of metrics, in one style.

The functions named draw_... write PNG files 800 pixels wide and raise `UserError` if that fails.
Nothing here uses matplotlib's global state (pyplot), and the same metrics give the same file, byte
for byte.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ladder_vae.reports.tables import layer_name
from runtime.files import utf_8, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

_WIDTH, _HEIGHT, _DPI = 8.0, 4.5, 100  # inches, and pixels per inch
# The text and the axes: a grey that is legible on white and on black.
INK = "#6f757d"
BLUE, ORANGE = "#3f83cc", "#d9812b"
COLOURS = [BLUE, ORANGE, "#4c9f62", "#9a63b5", "#c24a55", "#8a7a45"]
_BINS = 40


def new_chart(
    title: str, x_label: str, y_label: str, *, width: float = _WIDTH, height: float = _HEIGHT
) -> tuple["Figure", "Axes"]:
    """An empty chart in the common style."""
    from matplotlib.figure import Figure  # takes a second to import
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=layout)
    axes = figure.add_subplot()
    if title:
        axes.set_title(utf_8(title), loc="left", fontsize=13)
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(which="both", colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    axes.set_prop_cycle(color=COLOURS)
    axes.set_axisbelow(True)
    return figure, axes


def label_plainly(axis: "Axis") -> None:
    """Label a logarithmic axis by numbers such as 21, not 2.1 times a power of ten."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        """Labels the ticks that `LogFormatter` chooses."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,g}" if super().__call__(x, pos) else ""

    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain(minor_thresholds=(1.5, 0.5)))


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as a PNG file."""
    # No matplotlib version in the file: it would differ between machines.
    metadata = {"Software": None}
    write_atomically(path, lambda file: figure.savefig(file, format="png", metadata=metadata))


def draw_kl_by_layer(path: Path, kl: Sequence[float]) -> None:
    """Draw a bar for each layer's KL in nats, bottom to top as in `kl`."""
    depth = len(kl)
    title = f"KL by layer: {sum(kl):.2f} nats in total"
    figure, axes = new_chart(title, "nats per image", "", height=1.4 + 0.3 * depth)
    bars = axes.barh(range(1, depth + 1), kl, color=BLUE, height=0.7)
    axes.bar_label(bars, [f"{value:.3g}" for value in kl], padding=4)
    layers = range(1, depth + 1)
    axes.set_yticks(layers, [layer_name(i, depth) for i in layers])
    axes.grid(visible=False, axis="y")
    # Leave room for the labels of the bars. The axis starts at 0 even if all KLs are 0.
    axes.set_xlim(min(0.0, *kl), 1.1 * max(0.1, *kl))
    write_figure(path, figure)


def draw_bound(
    path: Path,
    samples: Sequence[int],
    negative_bound: Sequence[float],
    standard_error: Sequence[float],
) -> None:
    """Draw the mean negative bound in nats against the number of importance samples.

    The band shows one standard error to each side.
    """
    figure, axes = new_chart(
        "Importance-weighted bound", "importance samples K", "negative bound, nats per image"
    )
    mean, error = np.asarray(negative_bound), np.asarray(standard_error)
    axes.fill_between(
        samples, mean - error, mean + error, color=BLUE, alpha=0.2, label="± 1 standard error"
    )
    axes.plot(samples, mean, color=BLUE, marker="o", markersize=4, label="mean over images")
    axes.set_xscale("log")
    ticks = _spaced(samples)
    axes.set_xticks(ticks, [f"{k:,}" for k in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    write_figure(path, figure)


def _spaced(samples: Sequence[int]) -> list[int]:
    """Those of the ascending `samples` whose labels do not overlap on a logarithmic axis."""
    least = (samples[-1] / samples[0]) ** (1 / 12)
    kept: list[int] = []
    for k in samples:
        if not kept or k >= least * kept[-1]:
            kept.append(k)
    return kept


def draw_pareto_k(path: Path, pareto_k: "ArrayLike", *, threshold: float) -> None:
    """Draw a histogram of k-hat (N,) over images; its title gives the share above `threshold`.

    Images without a k-hat (nan) are not counted.
    """
    values = np.asarray(pareto_k)
    values = values[~np.isnan(values)]
    share = (values > threshold).mean() if len(values) else 0.0
    title = f"Pareto k-hat: above {threshold:.2g} for {share:.1%} of {len(values):,} images"
    figure, axes = new_chart(title, "Pareto k-hat of the importance weights", "images")
    axes.hist(values[np.isfinite(values)], _BINS, color=BLUE)
    axes.locator_params(axis="y", integer=True)
    axes.axvline(
        threshold, color=ORANGE, linestyle="--", label=f"{threshold:.2g}: unreliable above"
    )
    axes.legend(frameon=False)
    write_figure(path, figure)


def draw_sandwich(path: Path, rows: Sequence[Mapping[str, float]]) -> None:
    """Draw the bounds of generated images from both sides against the number of temperatures.

    `rows` are those of `evaluation.sandwich.sandwich_metrics`.
    """
    figure, axes = new_chart(
        "Bounds from both sides, on generated images",
        "temperatures",
        "negative log-likelihood, nats per image",
    )
    temperatures = [int(row["temperatures"]) for row in rows]
    above = [row["negative_lower_bound"] for row in rows]
    below = [row["negative_upper_bound"] for row in rows]
    axes.fill_between(temperatures, below, above, color=BLUE, alpha=0.15)
    axes.plot(temperatures, above, color=BLUE, marker="o", label="forward chains: at most")
    axes.plot(temperatures, below, color=ORANGE, marker="o", label="reverse chains: at least")
    axes.set_xscale("log")
    axes.set_xticks(temperatures, [f"{t:,}" for t in temperatures])
    axes.minorticks_off()
    axes.legend(frameon=False)
    write_figure(path, figure)


def draw_roc(
    path: Path, curves: Mapping[str, tuple["ArrayLike", "ArrayLike", float]], *, title: str
) -> None:
    """Draw the ROC curves of several scores, by name.

    A curve consists of its false positive rates, its true positive rates (both ascending from 0 to
    1) and the area under it, the AUROC.
    """
    figure, axes = new_chart(title, "false positive rate", "true positive rate", height=6.0)
    for name, (false_positive_rate, true_positive_rate, area) in curves.items():
        label = f"{name}: AUROC {area:.3f}"
        axes.plot(
            false_positive_rate, true_positive_rate, linewidth=1.8, label=label, clip_on=False
        )
    axes.plot([0, 1], [0, 1], color=INK, linestyle=":", label="chance: AUROC 0.500")
    axes.set_aspect("equal")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    write_figure(path, figure)
