"""Charts of figures, as PNG files 800 pixels wide.

Nothing here touches matplotlib's global state (no pyplot), and the same figures give the same file,
byte for byte. All functions raise `UserError` where the file cannot be written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from runtime.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

_WIDTH, _HEIGHT, _DPI = 8.0, 4.5, 100  # inches, and pixels per inch: text as large as a page's
_BLUE, _ORANGE, _GREY = "#2f6db3", "#d1701f", "#666666"
_COLOURS = [_BLUE, _ORANGE, "#3a8f5c", "#8a4fa3", "#b3323e", "#7a6a3a"]
_BINS = 40


def _new_figure(
    title: str, x_label: str, y_label: str, height: float = _HEIGHT
) -> tuple["Figure", "Axes"]:
    """An empty chart in the style of all of them."""
    from matplotlib.figure import Figure  # takes a while to import
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout=layout)
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=13)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e2e2e2", linewidth=0.8)
    axes.set_prop_cycle(color=_COLOURS)
    axes.set_axisbelow(True)
    return figure, axes


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as a PNG file."""
    # Without matplotlib's version in it.
    metadata = {"Software": None}
    write_atomically(path, lambda file: figure.savefig(file, format="png", metadata=metadata))


def draw_kl_by_layer(path: Path, kl: Sequence[float]) -> None:
    """Write a bar for each layer's KL in nats; `kl` from the bottom, which the chart has below."""
    depth = len(kl)
    title = f"KL by layer: {sum(kl):.2f} nats in all"
    figure, axes = _new_figure(title, "nats per image", "", height=1.4 + 0.3 * depth)
    bars = axes.barh(range(1, depth + 1), kl, color=_BLUE, height=0.7)
    axes.bar_label(bars, [f"{value:.3g}" for value in kl], padding=4)
    names = {1: "1 (bottom)", depth: f"{depth} (top)"}
    layers = range(1, depth + 1)
    axes.set_yticks(layers, [f"layer {names.get(i, i)}" for i in layers])
    axes.grid(visible=False, axis="y")
    # Room for the values; without any KL the axis begins at 0 all the same.
    axes.set_xlim(min(0.0, *kl), 1.1 * max(0.1, *kl))
    write_figure(path, figure)


def draw_bound(
    path: Path,
    samples: Sequence[int],
    negative_bound: Sequence[float],
    standard_error: Sequence[float],
    *,
    reference: tuple[str, float] | None = None,
) -> None:
    """Write the mean negative bound in nats against the number of importance samples.

    The band is one standard error to each side; `reference` a name and a level to compare with.
    """
    figure, axes = _new_figure(
        "Importance-weighted bound", "importance samples K", "negative bound, nats per image"
    )
    mean, error = np.asarray(negative_bound), np.asarray(standard_error)
    axes.fill_between(
        samples, mean - error, mean + error, color=_BLUE, alpha=0.2, label="± 1 standard error"
    )
    axes.plot(samples, mean, color=_BLUE, marker="o", markersize=4, label="mean over images")
    if reference is not None:
        name, level = reference
        axes.axhline(level, color=_ORANGE, linestyle="--", label=f"{name}: {level:.2f}")
    axes.set_xscale("log")
    ticks = _spaced(samples)
    axes.set_xticks(ticks, [f"{k:,}" for k in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False)
    write_figure(path, figure)


def _spaced(samples: Sequence[int]) -> list[int]:
    """Those of rising numbers that leave room for their labels on a logarithmic axis."""
    least = (samples[-1] / samples[0]) ** (1 / 12)
    kept: list[int] = []
    for k in samples:
        if not kept or k >= least * kept[-1]:
            kept.append(k)
    return kept


def draw_pareto_k(path: Path, pareto_k: "ArrayLike", *, threshold: float = 0.7) -> None:
    """Write a histogram of k-hat (N,) over images, with the share above `threshold`.

    Images without a k-hat (nan) are left out; the share is of the others.
    """
    values = np.asarray(pareto_k)
    values = values[~np.isnan(values)]
    share = (values > threshold).mean() if len(values) else 0.0
    title = f"Pareto k-hat: above {threshold:g} for {share:.1%} of {len(values):,} images"
    figure, axes = _new_figure(title, "Pareto k-hat of the importance weights", "images")
    axes.hist(values[np.isfinite(values)], _BINS, color=_BLUE)
    axes.locator_params(axis="y", integer=True)
    axes.axvline(threshold, color=_ORANGE, linestyle="--", label=f"{threshold:g}: unreliable above")
    axes.legend(frameon=False)
    write_figure(path, figure)


def draw_roc(
    path: Path, curves: Mapping[str, tuple["ArrayLike", "ArrayLike", float]], *, title: str
) -> None:
    """Write ROC curves, by the name of the score.

    Each is its false positive rates, its true positive rates (both rising from 0 to 1) and the area
    under it, AUROC.
    """
    figure, axes = _new_figure(title, "false positive rate", "true positive rate", height=6.0)
    for name, (false_positive_rate, true_positive_rate, area) in curves.items():
        label = f"{name}: AUROC {area:.3f}"
        axes.plot(
            false_positive_rate, true_positive_rate, linewidth=1.8, label=label, clip_on=False
        )
    axes.plot([0, 1], [0, 1], color=_GREY, linestyle=":", label="chance: AUROC 0.500")
    axes.set_aspect("equal")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="lower right")
    write_figure(path, figure)
