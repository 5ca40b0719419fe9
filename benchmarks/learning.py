"""Whether learning is unharmed by how fast a step is taken.

    python -m benchmarks.learning --data-dir DATA [--only OPTIONS SEED]

A small ladder on static MNIST is trained for the same number of steps by each set of options, from
the same seeds, with train_svi.py as it stands, in a process of its own and on one thread. Kept are
the curve of the training and the ELBO of all test images at the end: of the same weights and with
the same noise in float32 and in bf16, so that what precision does to the figure is told apart from
what it did to the learning. Runs are put into results/benchmarks/learning.json one by one, each in
the place of an earlier one of its options and seed, and drawn in learning.png beside it.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyro
import torch
from torch import Tensor

import datasets
from benchmarks.charts import draw_learning
from benchmarks.lines import execution_named
from datasets import ImageSet
from evaluate import Trained
from ladder_vae.evaluation.importance import Bounds, ImportanceSampler
from ladder_vae.runs.command_line import OneLineParser
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.provenance import provenance
from ladder_vae.runs.run import Run
from runtime.device import keep_freed_memory
from runtime.errors import UserError, run_command
from runtime.files import write_json

MODULE = "benchmarks.learning"
ROOT = Path(__file__).parent.parent
RESULT = ROOT / "results" / "benchmarks" / "learning.json"
PICTURE = RESULT.with_suffix(".png")
CPU = torch.device("cpu")

SETTING = (
    "--zdims 8 8 8 --downsample 1 1 1 --blocks-per-layer 1 --nfilters 16 --skip --gated "
    "--learn-top-prior --data-dep-init --freebits 0.5 --dataset static_mnist --batch-size 64"
).split()
LOGGING = "--tr-log-interv 50 --ts-log-interv 0 --ll-interv 0 --ckpt-interv 0".split()
PLAIN = "float32"  # what the others are compared with
OPTIONS = (PLAIN, "float32+compile", "bf16", "bf16+compile")
SEEDS = (1, 2, 3)
DATASET = "static_mnist"
EVALUATION_BATCH = 100
PRECISIONS = ("float32", "bf16")  # of the evaluation
LAST_STEPS = 500  # that the mean at the end of a curve is over


def flags(options: str) -> list[str]:
    """The options of train_svi.py for a name such as `bf16+compile`; the layout is its own."""
    execution = execution_named(options)
    compile = "yes" if execution.compile else "no"
    return ["--precision", execution.precision, "--compile", compile]


def trained(folder: Path, options: str, seed: int, steps: int, data_dir: Path) -> float:
    """Train into `folder`; returns the seconds that it took."""
    command = [sys.executable, str(ROOT / "train_svi.py"), *SETTING, *LOGGING, *flags(options)]
    command += ["--steps", str(steps), "--seed", str(seed), "--device", "cpu"]
    command += ["--data-dir", str(data_dir.resolve()), "--out", str(folder)]
    began = time.monotonic()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise UserError(f"the training with {options} from seed {seed} failed: {last}")
    return time.monotonic() - began


def curve(folder: Path) -> dict[str, list[float]]:
    """The training's negative ELBO in nats, means over the steps up to each log entry."""
    entries = [e for e in read_entries(folder / "metrics.jsonl") if "train/negative_elbo" in e]
    return {
        "step": [entry["step"] for entry in entries],
        "negative_elbo": [entry["train/negative_elbo"] for entry in entries],
    }


def scored(run: Run, images: ImageSet, precision: str) -> Bounds:
    """The ELBO of every image, one sample each, with the network in `precision`."""
    execution = execution_named(f"{precision}+channels_last")
    newest = Trained.load(run, None, CPU, average=False, execution=execution)
    sampler = ImportanceSampler(
        newest.model,
        newest.guide,
        images,
        torch.arange(len(images)),
        [1],
        batch_size=EVALUATION_BATCH,
        seed=0,
        execution=execution,
    )
    return sampler.in_order(sampler.group(i).table() for i in range(len(sampler)))


def mean_with_error(values: Tensor) -> dict[str, float]:
    """Of one number for each image."""
    error = values.std().item() / math.sqrt(len(values))
    return {"mean": values.mean().item(), "standard_error": error}


def figures_of_test(run: Run, images: ImageSet) -> dict[str, Any]:
    """Of the test images, by precision of the evaluation, and of bf16 less float32 by image."""
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


def figures(options: str, seed: int, steps: int, data_dir: Path) -> dict[str, Any]:
    """One run, trained and scored."""
    images = datasets.load(DATASET, "test", data_dir)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        taken = trained(folder, options, seed, steps, data_dir)
        return {
            "steps": steps,
            "training_seconds": taken,
            "curve": curve(folder),
            "test": figures_of_test(Run.open(folder), images),
            "provenance": provenance(CPU),
        }


def known_runs() -> dict[str, dict[str, Any]]:
    """The runs of learning.json, by options and seed, in the order of `OPTIONS` and `SEEDS`."""
    if not RESULT.exists():
        return {}
    try:
        runs: dict[str, dict[str, Any]] = json.loads(RESULT.read_text())["runs"]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{RESULT} holds no figures of this benchmark: move it away") from None
    return runs


def merged(runs: dict[str, dict[str, Any]], options: str, seed: int, found: Any) -> dict[str, Any]:
    """`runs` with one more, or with one in another's place."""
    of_options = runs.get(options, {}) | {str(seed): found}
    together = runs | {options: dict(sorted(of_options.items(), key=lambda item: int(item[0])))}
    return {name: together[name] for name in OPTIONS if name in together}


def at_the_end(run: dict[str, Any]) -> float:
    """The training's negative ELBO, mean over the last steps."""
    points = zip(run["curve"]["step"], run["curve"]["negative_elbo"], strict=True)
    return statistics.fmean(value for step, value in points if step > run["steps"] - LAST_STEPS)


def final_elbo(run: dict[str, Any]) -> float:
    """The negative ELBO of the test images in nats."""
    value: float = run["test"]["by_precision"]["float32"]["negative_elbo"]["mean"]
    return value


def summary(runs: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """For each set of options means over its seeds, and differences to `PLAIN` from the same seeds.

    `spread` is the standard deviation over the seeds, None for a single one.
    """
    rows = []
    for options, by_seed in runs.items():
        row: dict[str, Any] = {"options": options, "seeds": list(by_seed)}
        for name, figure in (("training", at_the_end), ("test", final_elbo)):
            row[name] = mean_and_spread([figure(run) for run in by_seed.values()])
            common = [seed for seed in by_seed if seed in runs.get(PLAIN, {})]
            if options != PLAIN and common:
                row[f"{name}_difference"] = mean_and_spread(
                    [figure(by_seed[seed]) - figure(runs[PLAIN][seed]) for seed in common]
                )
        rows.append(row)
    return rows


def mean_and_spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation, None for a single value."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "spread": spread}


def shown(value: dict[str, float | None] | None, sign: str = "") -> str:
    """A mean and its spread, for reading."""
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
    parser = OneLineParser(prog=f"python -m {MODULE}", description="Compare fast paths' learning.")
    parser.add_argument(
        "--only", nargs=2, metavar=("OPTIONS", "SEED"), help="one run (default: all of them)"
    )
    parser.add_argument("--steps", type=int, default=2000, help="of each run (default: 2000)")
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("LVAE_DATA", "data")),
        help="where the data sets are kept (default: LVAE_DATA in the environment, or data/)",
    )
    arguments = parser.parse_args(argv)
    if arguments.steps < LAST_STEPS:
        raise UserError(f"--steps is {arguments.steps}; it must be at least {LAST_STEPS}")
    arguments.runs = list(product(OPTIONS, SEEDS))
    if arguments.only:
        options, seed = arguments.only
        if options not in OPTIONS or not seed.isdecimal():
            raise UserError(
                f"--only is {options} {seed}; it must be one of {', '.join(OPTIONS)}, and a seed"
            )
        arguments.runs = [(options, int(seed))]
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    keep_freed_memory()  # as the scripts do
    known_runs()  # refused now, rather than after a training
    for options, seed in arguments.runs:
        with pyro.validation_enabled(False):
            found = figures(options, seed, arguments.steps, arguments.data_dir)
        runs = merged(known_runs(), options, seed, found)  # others may have been added meanwhile
        write_json(RESULT, {"setting": " ".join(SETTING), "runs": runs})
        draw_learning(PICTURE, runs)
        print(f"{options}, seed {seed}: {found['training_seconds']:.0f} s", flush=True)
    print(table(known_runs()))
    return 0


if __name__ == "__main__":
    run_command(main)
