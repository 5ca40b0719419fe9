"""The learning curves of a run's metrics.jsonl, as transparent SVG charts."""

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ladder_vae.reports.charts import COLOURS, INK, new_chart
from ladder_vae.runs.metrics_log import Entry, held_out_split

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Curves with more points than this are averaged over at most as many intervals.
_POINTS = 300
_NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


@dataclass(frozen=True)
class Curve:
    """A scalar over the steps of a run."""

    label: str
    steps: list[float]
    values: list[float]

    @classmethod
    def of(cls, entries: Sequence[Entry], tag: str, label: str) -> "Curve":
        """The scalar `tag`, averaged over intervals if there are many entries."""
        points = [(entry["step"], entry[tag]) for entry in entries if tag in entry]
        size = math.ceil(len(points) / _POINTS)
        intervals = [points[i : i + size] for i in range(0, len(points), size or 1)]
        means = [[sum(axis) / len(part) for axis in zip(*part, strict=True)] for part in intervals]
        return cls(label, [step for step, _ in means], [value for _, value in means])


@dataclass(frozen=True)
class Chart:
    """A chart as SVG."""

    title: str
    caption: str
    svg: bytes


def learning_curves(entries: Sequence[Entry]) -> list[Chart]:
    """The charts of a run: negative ELBO, KL by layer, gradient norm and images per second."""
    split = held_out_split(entries)
    charts = [_elbo_chart(entries, split), _kl_chart(entries, split)]
    norm = Curve.of(entries, "train/gradient_norm", "")
    if len(norm.steps) > 1:
        log = min(norm.values) > 0
        caption = "Global norm before clipping, averaged between log entries."
        charts.append(Chart("Gradient norm", caption, _drawn([norm], "norm", log=log)))
    rate = Curve.of(entries, "train/images_per_second", "")
    if len(rate.steps) > 1:
        caption = "Training images per second, not counting the time of evaluations."
        charts.append(Chart("Speed", caption, _drawn([rate], "images/s", from_zero=True)))
    return [chart for chart in charts if chart is not None]


def _elbo_chart(entries: Sequence[Entry], split: str | None) -> Chart | None:
    curves = [Curve.of(entries, "train/negative_elbo", "training")]
    if split is not None:
        curves.append(Curve.of(entries, f"{split}/negative_elbo", f"{split} images"))
        prefix = f"{split}/negative_bound_"
        tags = {tag for entry in entries for tag in entry if tag.startswith(prefix)}
        for tag in sorted(tag for tag in tags if tag.endswith("_samples")):
            samples = tag.removeprefix(prefix).removesuffix("_samples")
            curves.append(Curve.of(entries, tag, f"{split}, {samples} samples"))
    curves = [curve for curve in curves if len(curve.steps) > 0]
    if not any(len(curve.steps) > 1 for curve in curves):
        return None
    caption = "Nats per image, lower is better. Held-out images are evaluated without dropout."
    return Chart("Negative ELBO", caption, _drawn(curves, "nats", zoomed=True))


def _kl_chart(entries: Sequence[Entry], split: str | None) -> Chart | None:
    """KL by layer: of held-out images if they were evaluated at least twice, else of training."""
    chosen: list[Curve] = []
    source = ""
    for group, name in (("train_kl", "training images"), (f"{split}_kl", f"{split} images")):
        curves = _layer_curves(entries, group)
        if curves and len(curves[0].steps) > 1:
            chosen, source = curves, name
    if not chosen:
        return None
    caption = f"Nats per image, {source}; layer 1 is the bottom. A layer near 0 is not used."
    return Chart("KL by layer", caption, _drawn(chosen, "nats", layers=True))


def _layer_curves(entries: Sequence[Entry], group: str) -> list[Curve]:
    """The curves of a scalar that each layer has, bottom to top."""
    tags = {tag for entry in entries for tag in entry}
    matches = (re.fullmatch(rf"{re.escape(group)}/layer_([0-9]{{1,9}})", tag) for tag in tags)
    layers = {int(match[1]): match[0] for match in matches if match}
    return [Curve.of(entries, layers[i], str(i)) for i in sorted(layers)]


def _drawn(
    curves: Sequence[Curve],
    unit: str,
    *,
    log: bool = False,
    from_zero: bool = False,
    zoomed: bool = False,
    layers: bool = False,
) -> bytes:
    """An SVG of curves over steps; if the curves are `layers`, their colours are in order."""
    from matplotlib.ticker import EngFormatter  # takes a second to import

    figure, axes = new_chart("", "step", unit, width=5.2, height=3.1)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    colours = _shades(len(curves)) if layers else COLOURS
    for curve, colour in zip(curves, itertools.cycle(colours), strict=False):
        marker = "o" if len(curve.steps) < 20 else ""
        axes.plot(curve.steps, curve.values, marker=marker, ms=3.5, lw=1.6, color=colour)
    if log:
        axes.set_yscale("log")
    if from_zero:
        axes.set_ylim(bottom=0)
    if zoomed:
        axes.set_ylim(_without_the_beginning(curves))
    if len(curves) > 1:
        _add_legend(figure, [curve.label for curve in curves], layers=layers)
    return _svg(figure)


def _add_legend(figure: "Figure", labels: Sequence[str], *, layers: bool) -> None:
    """Add a legend: beside curves of layers, with the top layer first, or above other curves."""
    lines = figure.axes[0].lines
    plain: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": "small"}
    if not layers:
        figure.legend(lines, labels, loc="outside upper left", ncols=3, **plain)
        return
    columns = math.ceil(len(labels) / 10)
    legend = figure.legend(
        lines[::-1], labels[::-1], loc="outside right center", title="layer", ncols=columns, **plain
    )
    legend.get_title().set_color(INK)


def _svg(figure: "Figure") -> bytes:
    """The chart on a transparent background; the same chart gives the same bytes."""
    import matplotlib

    content = io.BytesIO()
    # Text stays text, which is smaller and sharper than outlines.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "learning curves"}):
        figure.savefig(content, format="svg", transparent=True, metadata=_NO_METADATA)
    return content.getvalue()


def _shades(count: int) -> list[Any]:
    """Ordered colours, without those that are hard to see on white or black."""
    import matplotlib

    return [
        matplotlib.colormaps["viridis"](0.25 + 0.6 * i / max(count - 1, 1)) for i in range(count)
    ]


def _without_the_beginning(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits of the vertical axis, without the high values in the first tenth of the steps."""
    end = max(curve.steps[-1] for curve in curves)
    later = [
        value
        for curve in curves
        for step, value in zip(curve.steps, curve.values, strict=True)
        if step >= end / 10
    ]
    margin = 0.05 * (max(later) - min(later)) or 1
    return min(later) - margin, max(later) + margin
