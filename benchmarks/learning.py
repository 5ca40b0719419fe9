"""Compares what a small ladder learns with each set of options for speed.

    python -m benchmarks.learning --data-dir DATA [--only OPTIONS SEED] [--steps 2000]

Trains a small ladder on static MNIST for the same number of steps with each set of options, from
the same seeds, each in its own process and on one thread. Records the training curve and the final
ELBO of all test images. The ELBO is computed from the same weights with the same noise in float32
and in bf16, to separate the effect of precision on the evaluation from its effect on training.

Each run is added to results/benchmarks/learning.json, where it replaces an earlier one of the same
options and seed; learning.png shows all of them.
"""

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch
from torch import Tensor

import datasets
import train_svi
from benchmarks.harness.arguments import add_data_dir, benchmark_parser, config_of_text
from benchmarks.harness.charts import draw_learning
from benchmarks.harness.lines import execution_named
from benchmarks.harness.processes import in_fresh_processes
from benchmarks.harness.records import RESULTS, read_entries
from datasets import ImageSet
from ladder import Ladder
from ladder_vae.evaluation.importance import Bounds, ImportanceSampler
from ladder_vae.runs import metrics_log
from ladder_vae.runs.command_line import at_least
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.provenance import provenance
from ladder_vae.runs.run import Run
from ladder_vae.training.trainer import train
from runtime.device import keep_freed_memory
from runtime.errors import UserError, run_command
from runtime.files import write_json
from runtime.signals import Interruption

RESULT = RESULTS / "learning.json"
PICTURE = RESULT.with_suffix(".png")
CPU = torch.device("cpu")

SETTING = (
    "--zdims 8 8 8 --downsample 1 1 1 --blocks-per-layer 1 --nfilters 16 --skip --gated "
    "--learn-top-prior --data-dep-init --freebits 0.5 --dataset static_mnist "
    "--train-split train+valid --batch-size 64"
)
LOG_INTERVAL = 50
PLAIN = "float32"  # the others are compared with it
OPTIONS = (PLAIN, "float32+compile", "bf16", "bf16+compile")
SEEDS = (1, 2, 3)
EVALUATION_BATCH = 100
PRECISIONS = ("float32", "bf16")  # of the evaluation
LAST_STEPS = 500  # the end of a curve is the mean over these


def config_of(options: str, seed: int, steps: int) -> RunConfig:
    """The configuration of a run with options such as `bf16+compile`."""
    execution = execution_named(options)
    return replace(
        config_of_text(SETTING),
        precision=execution.precision,
        compile="yes" if execution.compile else "no",
        seed=seed,
        steps=steps,
        tr_log_interv=LOG_INTERVAL,
        ts_log_interv=0,
        ll_interv=0,
        ckpt_interv=0,
    )


def train_run(config: RunConfig, folder: Path, data_dir: Path) -> float:
    """Train into `folder`, on one thread; returns the seconds it took."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as in our scripts
    began = time.monotonic()
    with pyro.validation_enabled(False), Interruption() as signals:
        trainer, run = train_svi.begin(config, folder, device=CPU, data_dir=data_dir)
        train(trainer, run, signals)
        signals.check()
    return time.monotonic() - began


def curve(folder: Path) -> dict[str, list[float]]:
    """The training's negative ELBO in nats, means over the steps before each log entry."""
    entries = metrics_log.read_entries(folder / "metrics.jsonl")
    entries = [entry for entry in entries if "train/negative_elbo" in entry]
    return {
        "step": [entry["step"] for entry in entries],
        "negative_elbo": [entry["train/negative_elbo"] for entry in entries],
    }


def scored(run: Run, images: ImageSet, precision: str) -> Bounds:
    """The ELBO of every image with one sample each, with the networks in `precision`."""
    execution = execution_named(f"{precision}+channels_last")
    ladder = Ladder.load(run.path, device=CPU, average=False, execution=execution)
    sampler = ImportanceSampler(
        ladder.model,
        ladder.guide,
        images,
        torch.arange(len(images)),
        [1],
        batch_size=EVALUATION_BATCH,
        seed=0,
        execution=execution,
    )
    return sampler.in_order(sampler.group(i).table() for i in range(len(sampler)))


def mean_with_error(values: Tensor) -> dict[str, float]:
    """The mean over images, and its standard error."""
    error = values.std().item() / math.sqrt(len(values))
    return {"mean": values.mean().item(), "standard_error": error}


def test_results(run: Run, images: ImageSet) -> dict[str, Any]:
    """The ELBO of the test images by precision of the evaluation, and the difference per image."""
    by_precision = {precision: scored(run, images, precision) for precision in PRECISIONS}
    plain, reduced = by_precision["float32"], by_precision["bf16"]
    return {
        "images": len(images),
        "by_precision": {
            name: {
                "negative_elbo": mean_with_error(-bounds.elbo),
                "kl": bounds.kl.sum(1).mean().item(),
            }
            for name, bounds in by_precision.items()
        },
        "bf16_less_float32": {
            "negative_elbo": mean_with_error(plain.elbo - reduced.elbo),
            "kl": mean_with_error((reduced.kl - plain.kl).sum(1)),
        },
    }


def results(options: str, seed: int, steps: int, data_dir: Path) -> dict[str, Any]:
    """Train and evaluate one run."""
    config = config_of(options, seed, steps)
    images = datasets.load(config.dataset, "test", data_dir)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        (taken,) = in_fresh_processes(1, train_run, config, folder, data_dir)
        with pyro.validation_enabled(False):
            return {
                "steps": steps,
                "training_seconds": taken,
                "curve": curve(folder),
                "test": test_results(Run.open(folder), images),
                "provenance": provenance(CPU),
            }


def known_runs() -> dict[str, dict[str, Any]]:
    """The runs of learning.json, by options and seed."""
    return read_entries(RESULT, "runs", {})


def merged(runs: dict[str, dict[str, Any]], options: str, seed: int, found: Any) -> dict[str, Any]:
    """`runs` and one more, which replaces an earlier one of its options and seed."""
    of_options = runs.get(options, {}) | {str(seed): found}
    together = runs | {options: dict(sorted(of_options.items(), key=lambda item: int(item[0])))}
    return {name: together[name] for name in OPTIONS if name in together}


def at_the_end(run: dict[str, Any]) -> float:
    """The training's negative ELBO, the mean over the last steps."""
    points = zip(run["curve"]["step"], run["curve"]["negative_elbo"], strict=True)
    return statistics.fmean(value for step, value in points if step > run["steps"] - LAST_STEPS)


def final_elbo(run: dict[str, Any]) -> float:
    """The negative ELBO of the test images in nats."""
    value: float = run["test"]["by_precision"]["float32"]["negative_elbo"]["mean"]
    return value


def summary(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds of each set of options, and differences from `PLAIN` by seed.

    `spread` is the standard deviation over the seeds, None for a single one.
    """
    rows = []
    for options, by_seed in runs.items():
        row: dict[str, Any] = {"options": options, "seeds": list(by_seed)}
        for name, metric in (("training", at_the_end), ("test", final_elbo)):
            row[name] = mean_and_spread([metric(run) for run in by_seed.values()])
            common = [seed for seed in by_seed if seed in runs.get(PLAIN, {})]
            if options != PLAIN and common:
                row[f"{name}_difference"] = mean_and_spread(
                    [metric(by_seed[seed]) - metric(runs[PLAIN][seed]) for seed in common]
                )
        rows.append(row)
    return rows


def mean_and_spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation; the latter is None for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread}


def shown(value: dict[str, float | None] | None, sign: str = "") -> str:
    """A mean and its spread, formatted."""
    if value is None:
        return ""
    mean = f"{value['mean']:{sign}.2f}"
    return mean if value["spread"] is None else f"{mean} ± {value['spread']:.2f}"


def table(runs: dict[str, dict[str, Any]]) -> str:
    header = ("options", "seeds", "training", "difference", "test", "difference", "bf16 - float32")
    widths = (31, 6, 16, 15, 16, 15, 16)
    lines = ["".join(f"{word:{width}}" for word, width in zip(header, widths, strict=True))]
    for row in summary(runs):
        by_image = [
            run["test"]["bf16_less_float32"]["negative_elbo"]["mean"]
            for run in runs[row["options"]].values()
        ]
        cells = (
            row["options"],
            str(len(row["seeds"])),
            shown(row["training"]),
            shown(row.get("training_difference"), "+"),
            shown(row["test"]),
            shown(row.get("test_difference"), "+"),
            shown(mean_and_spread(by_image), "+"),
        )
        lines.append("".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)))
    return "\n".join([*lines, "negative ELBO in nats, ± standard deviation over seeds"])


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser("learning", "Compare what fast paths learn.")
    parser.add_argument(
        "--only", nargs=2, metavar=("OPTIONS", "SEED"), help="a single run (default: all)"
    )
    parser.add_argument(
        "--steps",
        type=at_least(LAST_STEPS),
        default=2000,
        metavar="N",
        help="steps of each run (default: 2000)",
    )
    add_data_dir(parser)
    arguments = parser.parse_args(argv)
    arguments.runs = list(product(OPTIONS, SEEDS))
    if arguments.only:
        options, seed = arguments.only
        if options not in OPTIONS or not seed.isdecimal():
            raise UserError(
                f"--only is {options} {seed}; give one of {', '.join(OPTIONS)}, and a seed"
            )
        arguments.runs = [(options, int(seed))]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    keep_freed_memory()
    known_runs()  # fails now rather than after a training
    for options, seed in arguments.runs:
        found = results(options, seed, arguments.steps, arguments.data_dir)
        runs = merged(known_runs(), options, seed, found)  # read again: another process may add
        write_json(RESULT, {"setting": SETTING, "runs": runs})
        draw_learning(PICTURE, runs)
        print(f"{options}, seed {seed}: {found['training_seconds']:.0f} s", flush=True)
    print(table(known_runs()))
    return 0


if __name__ == "__main__":
    run_command(main)
