"""Time of a training step against depth, width, resolution and batch size.

    python -m benchmarks.scaling [--repeats 5] [--device cpu]

Varies one size of a small ladder at a time: the number of layers (the same number of halvings is
spread over them), the channels of feature maps, the height and width of images, or the images in a
batch. The step and its convolutions alone take turns, both eager, in float32 with channels last.
Prints a table, writes results/benchmarks/scaling.json and draws scaling.png beside it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import pyro
import torch

from benchmarks.harness.arguments import add_device, add_repeats, benchmark_parser
from benchmarks.harness.charts import draw_scaling
from benchmarks.harness.lines import Steps
from benchmarks.harness.records import RESULTS
from benchmarks.harness.roofline import counted, totals
from benchmarks.harness.timing import medians, runs_per_turn, seconds
from ladder_vae.networks.precision import Execution
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.provenance import provenance
from runtime.device import choose_device, keep_freed_memory
from runtime.errors import run_command
from runtime.files import write_json

RESULT = RESULTS / "scaling.json"
PICTURE = RESULT.with_suffix(".png")
EXECUTION = Execution(precision="float32", channels_last=True, compile=False)


@dataclass(frozen=True)
class Size:
    """The size of a ladder and of its batches."""

    layers: int = 6
    filters: int = 32
    side: int = 32  # of the square images, in pixels
    batch: int = 16

    @property
    def config(self) -> RunConfig:
        """Two residual blocks per layer, three halvings in total, the first at the bottom layer."""
        halved = [round(i * self.layers / 3) for i in range(3)]
        return RunConfig.of(
            z_dims=[8] * self.layers,
            downsample=[int(i in halved) for i in range(self.layers)],
            blocks_per_layer=2,
            n_filters=self.filters,
            gated=True,
            skip=True,
            learn_top_prior=True,
            free_bits=0.5,
        )


# The sizes of each series, by its name in table and chart.
SERIES: dict[str, list[Size]] = {
    "layers": [Size(layers=n) for n in (3, 6, 12, 24, 48)],
    "channels": [Size(filters=n) for n in (8, 16, 32, 64, 128)],
    "pixels a side": [Size(side=n) for n in (16, 32, 64, 128)],
    "images a batch": [Size(batch=n) for n in (4, 16, 64, 256)],
}
_FIELDS = {
    "layers": "layers",
    "channels": "filters",
    "pixels a side": "side",
    "images a batch": "batch",
}


def point(size: Size, repeats: int, device: torch.device) -> dict[str, Any]:
    """Time and operations of a step of this size."""
    shape = (1, size.side, size.side)
    steps = Steps(size.config, shape, size.batch, device, EXECUTION)
    with counted() as counts:
        steps.gradient()
    ways: dict[str, Callable[[], object]] = {
        "ours": steps.ours,
        "convolutions": steps.convolutions().run,
    }
    for way in ways.values():
        seconds(way, device)  # warm-up
    turns = {
        name: partial(seconds, way, device, runs_per_turn(seconds(way, device)))
        for name, way in ways.items()
    }
    taken = medians(turns, repeats)
    return {
        **{f"{name}_ms": 1000 * value for name, value in taken.items()},
        "operations": totals(counts)["convolution_operations"],
    }


def with_slopes(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points, each with the milliseconds per additional GFLOP since the point before it.

    This is constant if the cost is linear in the operations, apart from a fixed cost.
    """
    slopes: list[float | None] = [None]
    for before, after in pairwise(points):
        more = (after["operations"] - before["operations"]) / 1e9
        slopes.append((after["ours_ms"] - before["ours_ms"]) / more)
    return [p | {"ms_per_gflop_more": s} for p, s in zip(points, slopes, strict=True)]


def table(series: dict[str, list[dict[str, Any]]]) -> str:
    lines = [f"{'':16}{'':>6}{'GFLOP':>9}{'ours':>11}{'convolutions':>14}{'ratio':>7}{'more':>7}"]
    for name, points in series.items():
        for found in points:
            slope = found["ms_per_gflop_more"]
            lines.append(
                f"{name:16}{found['value']:>6}{found['operations'] / 1e9:>9.3g}"
                f"{found['ours_ms']:>8.3g} ms{found['convolutions_ms']:>11.3g} ms"
                f"{found['ours_ms'] / found['convolutions_ms']:>7.2f}"
                f"{'' if slope is None else f'{slope:.3g}':>7}"
            )
    return "\n".join([*lines, "more: ms per additional GFLOP since the line above"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = benchmark_parser("scaling", "Time training steps of ladders of several sizes.")
    add_repeats(parser, 5)
    add_device(parser)
    arguments = parser.parse_args(argv)
    device = choose_device(arguments.device)
    keep_freed_memory()
    points: dict[Size, dict[str, Any]] = {}
    with pyro.validation_enabled(False):
        for size in dict.fromkeys(size for sizes in SERIES.values() for size in sizes):
            points[size] = point(size, arguments.repeats, device)
    series = {
        name: with_slopes(
            [{"value": getattr(size, _FIELDS[name])} | points[size] for size in sizes]
        )
        for name, sizes in SERIES.items()
    }
    print(table(series))
    base = Size()
    result = {
        "base": {name: getattr(base, field) for name, field in _FIELDS.items()},
        "options": {"precision": "float32", "channels_last": True, "compile": False},
        "repeats": arguments.repeats,
        "series": series,
        "provenance": provenance(device),
    }
    write_json(RESULT, result)
    draw_scaling(PICTURE, series)
    return 0


if __name__ == "__main__":
    run_command(main)
