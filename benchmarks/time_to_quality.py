"""Minutes until the negative ELBO of the validation images passes 100, 95, 90 and 85 nats.

    python -m benchmarks.time_to_quality learn laptop [--data-dir data]
    python -m benchmarks.time_to_quality speed
    python -m benchmarks.time_to_quality minutes

The time to quality is the number of training images that it takes, times the time per image. Each
is measured on its own, because learning does not depend on what else the machine does, and because
the times of all ways are only comparable if they take turns:

- `learn` trains one of `WAYS` on the training images of static MNIST, in bf16 if the processor has
  instructions for it, and evaluates all validation images now and then. It writes
  results/time_to_quality/WAY.json.
- `speed` times the training steps of all ways in turns on an otherwise idle machine, and writes
  results/time_to_quality/speed.json.
- `minutes` computes the minutes from these files. It writes results/benchmarks/time_to_quality.json
  and time_to_quality.png beside it.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyro
import torch

import datasets
import train_svi
from benchmarks.harness.arguments import (
    add_data_dir,
    add_repeats,
    benchmark_parser,
    config_of_text,
)
from benchmarks.harness.charts import draw_time_to_quality
from benchmarks.harness.lines import Steps
from benchmarks.harness.processes import Timed, median_seconds, processes
from benchmarks.harness.records import RESULTS, ROOT
from ladder_vae.networks.precision import Execution
from ladder_vae.runs import metrics_log
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.provenance import provenance
from ladder_vae.runs.run import Run
from ladder_vae.training.trainer import train
from runtime.device import keep_freed_memory
from runtime.errors import UserError, run_command
from runtime.files import read_json, write_json
from runtime.signals import Interruption

CURVES = ROOT / "results" / "time_to_quality"
RESULT = RESULTS / "time_to_quality.json"
PICTURE = RESULT.with_suffix(".png")
MARKS = (100.0, 95.0, 90.0, 85.0)  # negative ELBO in nats
LIMIT = 150.0  # minutes; a mark that takes longer is not passed
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Way:
    """A network, a recipe, and a way to compute its training steps."""

    preset: str
    options: str  # of train_svi.py, with the length
    between: int  # images between evaluations
    says: str
    plain: bool = False  # timed in a loop with PyTorch's defaults, in float32

    def config(self, seed: int = 1) -> RunConfig:
        """The configuration of its run."""
        fixed = "--train-split train --precision auto"
        config = config_of_text(f"--preset {self.preset} {fixed} {self.options}")
        interval = self.between // config.batch_size
        return replace(config, seed=seed, ts_log_interv=interval, ll_interv=0, ckpt_interv=0)


_RECIPE = "--optimizer muon --lr 8e-3 --lr-warmup 50 --lr-decay cosine --ema 0.998 --freebits 1"
WAYS: dict[str, Way] = {
    "reference": Way(
        "mnist-3",
        "--epochs 6",
        25_600,
        "the reference's network and recipe in a plain PyTorch loop",
        plain=True,
    ),
    "recipe": Way(
        "mnist-3",
        f"{_RECIPE} --dropout 0 --epochs 8",
        25_600,
        "the reference's network with the recipe and precision of mnist-laptop",
    ),
    "laptop": Way("mnist-laptop", "--no-analytical-kl --epochs 8", 12_800, "mnist-laptop"),
}


def curve(folder: Path, batch_size: int) -> list[dict[str, float]]:
    """The negative ELBO of the validation images, by the number of training images."""
    entries = metrics_log.read_entries(folder / "metrics.jsonl")
    name = "valid/negative_elbo"
    return [
        {"images": entry["step"] * batch_size, "elbo": entry[name]}
        for entry in entries
        if name in entry
    ]


class TimedWay(Timed):
    """The training steps of a way, on random images."""

    def __init__(self, way: Way) -> None:
        super().__init__(CPU, keeps_memory=not way.plain)
        config = way.config()
        shape = datasets.image_shape(config.dataset)
        if way.plain:
            execution = Execution(channels_last=False)
        else:
            execution = Execution.choose(config.precision, config.compile, CPU)
        steps = Steps(config, shape, config.batch_size, CPU, execution)
        self.run = steps.plain if way.plain else steps.ours


def learn(name: str, data_dir: Path) -> Path:
    """Train one of the ways; returns the file of its curve."""
    config = WAYS[name].config()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        with pyro.validation_enabled(False), Interruption() as signals:
            trainer, run = train_svi.begin(config, folder, device=CPU, data_dir=data_dir)
            train(trainer, run, signals)
            signals.check()
        points = curve(folder, config.batch_size)
        options = Run.open(folder).config.to_dict()
    path = CURVES / f"{name}.json"
    content = {
        "says": WAYS[name].says,
        "curve": points,
        "config": options,
        "provenance": provenance(CPU),
    }
    write_json(path, content)
    return path


def images_to(mark: float, points: Sequence[dict[str, float]]) -> float | None:
    """The number of images at `mark`, interpolated between evaluations; None if all are above.

    A mark that the first evaluation has passed counts as passed then.
    """
    if points[0]["elbo"] <= mark:
        return points[0]["images"]
    for before, after in pairwise(points):
        if after["elbo"] <= mark:
            share = (before["elbo"] - mark) / (before["elbo"] - after["elbo"])
            return before["images"] + share * (after["images"] - before["images"])
    return None


def minutes_to(
    mark: float, points: Sequence[dict[str, float]], images_per_second: float
) -> float | None:
    """The minutes to `mark`; None if they are more than `LIMIT`.

    Raises `UserError` if the curve ends before `LIMIT` and above `mark`.
    """
    images = images_to(mark, points)
    minutes = (points[-1]["images"] if images is None else images) / images_per_second / 60
    if images is None and minutes < LIMIT:
        raise UserError(
            f"a curve ends after {minutes:.0f} minutes, above {mark:g} nats: train more"
        )
    return None if images is None or minutes > LIMIT else minutes


def measure_speeds(repeats: int) -> Path:
    """Measure the training images per second of each way, in turns; returns the file of them."""
    with processes({name: partial(TimedWay, way) for name, way in WAYS.items()}, CPU) as started:
        seconds = median_seconds(started, repeats)
    per_second = {name: way.config().batch_size / seconds[name] for name, way in WAYS.items()}
    path = CURVES / "speed.json"
    write_json(path, {"images_per_second": per_second, "provenance": provenance(CPU)})
    return path


def results() -> dict[str, Any]:
    """The minutes of each way to each mark, with the provenance of the speeds."""
    speed = read_json(CURVES / "speed.json")
    ways = {}
    for name, way in WAYS.items():
        learned = read_json(CURVES / f"{name}.json")
        per_second = speed["images_per_second"][name]
        ways[name] = {
            "says": way.says,
            "images_per_second": per_second,
            "minutes": [minutes_to(mark, learned["curve"], per_second) for mark in MARKS],
            "provenance": learned["provenance"],
        }
    return {"marks": MARKS, "limit": LIMIT, "ways": ways, "provenance": speed["provenance"]}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser("time_to_quality", "Measure the time to a validation ELBO.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="learn | speed | minutes"
    )
    learns = commands.add_parser("learn", help="train one of the ways")
    learns.add_argument("way", choices=tuple(WAYS), metavar="WAY", help=", ".join(WAYS))
    add_data_dir(learns)
    add_repeats(commands.add_parser("speed", help="time the steps of all ways"), 5)
    commands.add_parser("minutes", help="compute the minutes, and draw them")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.command == "learn":
        keep_freed_memory()  # as in train_svi.py
        print(f"results   {learn(arguments.way, arguments.data_dir)}")
        return 0
    if arguments.command == "speed":
        print(f"results   {measure_speeds(arguments.repeats)}")
        return 0
    found = results()
    write_json(RESULT, found)
    curves = {name: read_json(CURVES / f"{name}.json")["curve"] for name in WAYS}
    draw_time_to_quality(PICTURE, found, curves)
    for name, way in found["ways"].items():
        minutes = " ".join("over" if m is None else f"{m:.1f}" for m in way["minutes"])
        print(f"{name:12}{way['images_per_second']:>8.1f} images/s   {minutes}")
    return 0


if __name__ == "__main__":
    run_command(main)
