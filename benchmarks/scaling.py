"""What a training step costs with depth, width, resolution and batch size.

    python -m benchmarks.training --scaling

A small ladder is changed in one respect at a time: its layers (as many residual blocks and latents
more, the halvings spread over them), the channels of its feature maps, the height and width of its
images, the images of a batch. Its step and the step's convolutions alone take turns; both run
eagerly, in float32 with channels last. Prints a table, and writes results/benchmarks/scaling.json
and scaling.png.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch

from benchmarks.charts import draw_scaling
from benchmarks.lines import Steps
from benchmarks.roofline import counted, totals
from benchmarks.turns import medians, runs_per_turn, seconds
from ladder_vae.networks.precision import Execution
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.provenance import provenance
from runtime.device import keep_freed_memory
from runtime.files import write_json

RESULT = Path(__file__).parent.parent / "results" / "benchmarks" / "scaling.json"
PICTURE = RESULT.with_suffix(".png")
EXECUTION = Execution(precision="float32", channels_last=True, compile=False)


@dataclass(frozen=True)
class Size:
    """Of a ladder and what it is trained on."""

    layers: int = 6
    filters: int = 32
    side: int = 32  # of the square images, in pixels
    batch: int = 16

    @property
    def config(self) -> RunConfig:
        """Two residual blocks to a layer, three halvings in all, the first at the bottom layer."""
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


# What is varied, by its name in table and plot.
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
    """What a step of this size costs."""
    shape = (1, size.side, size.side)
    steps = Steps(size.config, shape, size.batch, device, EXECUTION)
    with counted() as counts:
        steps.gradient()
    ways = {"ours": steps.ours, "convolutions": steps.convolutions().run}
    for way in ways.values():
        seconds(way, device)  # warms up
    runs = {name: runs_per_turn(seconds(way, device)) for name, way in ways.items()}
    taken = medians(
        {name: lambda n=name: seconds(ways[n], device, runs[n]) for name in ways},  # type: ignore[misc]
        repeats,
    )
    return {
        **{f"{name}_ms": 1000 * value for name, value in taken.items()},
        "operations": totals(counts)["convolution_operations"],
    }


def with_slopes(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each point with the milliseconds that a GFLOP more costs, from the point before to it.

    Where cost is linear in the operations, beside whatever it is without any, this is the same
    throughout.
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
    return "\n".join([*lines, "more: ms for a GFLOP more, from the line above"])


def measure(repeats: int, device: torch.device) -> int:
    """The command; returns its exit code."""
    keep_freed_memory()  # as the scripts do
    known: dict[Size, dict[str, Any]] = {}
    with pyro.validation_enabled(False):
        for size in dict.fromkeys(size for sizes in SERIES.values() for size in sizes):
            known[size] = point(size, repeats, device)
    series = {
        name: with_slopes([{"value": getattr(size, _FIELDS[name])} | known[size] for size in sizes])
        for name, sizes in SERIES.items()
    }
    base = Size()
    result = {
        "base": {name: getattr(base, field) for name, field in _FIELDS.items()},
        "options": {"precision": "float32", "channels_last": True, "compile": False},
        "repeats": repeats,
        "series": series,
        "provenance": provenance(device),
    }
    print(table(series))
    write_json(RESULT, result)
    draw_scaling(PICTURE, series)
    return 0
