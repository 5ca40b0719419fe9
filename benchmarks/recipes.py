"""Recipes for short training budgets, compared on a small ladder.

    python -m benchmarks.recipes reference cosine-3e-3 [--seed 1] [--data-dir data]

Each recipe trains a small ladder on the training images of static MNIST, for 2,000 steps of 64
images or as many images in other batches, and is evaluated on the validation images. The test
images are not used. Writes a file per recipe and random seed to results/recipes/.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyro
import torch

import evaluate
import train_svi
from benchmarks.harness.arguments import add_data_dir, benchmark_parser, config_of_text
from benchmarks.harness.records import ROOT
from ladder_vae.runs.metrics_log import finite_entries, newest
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.provenance import provenance
from ladder_vae.runs.run import Run
from ladder_vae.training.trainer import train
from runtime.errors import run_command
from runtime.files import write_json
from runtime.signals import Interruption

RESULTS = ROOT / "results" / "recipes"
CPU = torch.device("cpu")
IMAGES = 128_000
# The options that are the same for all recipes.
SETTING = (
    "--dataset static_mnist --train-split train --zdims 8 8 8 --downsample 1 1 1 "
    "--blocks-per-layer 1 --nfilters 16 --skip --gated --learn-top-prior --data-dep-init "
    "--freebits 0.5 --ll-interv 0"
)
# A ladder as deep as the twelve-layer rows, with few channels, on as many images as it can see in a
# few minutes, to show whether training is stable. It is evaluated by its training ELBO alone.
DEEP_IMAGES = 3_200
DEEP = (
    "--zdims 8 8 8 8 8 8 8 8 8 8 8 8 --downsample 0 0 1 0 0 1 0 0 0 1 0 0 --blocks-per-layer 4 "
    "--freebits 1 --batch-size 16 --tr-log-interv 50"
)
BOUND_IMAGES = 1_000  # random validation images for the bound with 100 samples, the same for all


@dataclass(frozen=True)
class Recipe:
    """A way of training: options of train_svi.py."""

    options: str
    says: str

    @property
    def is_deep(self) -> bool:
        return self.options.startswith(DEEP)

    def config(self, seed: int) -> RunConfig:
        """The configuration of a run; all recipes of a kind see the same number of images."""
        config = config_of_text(f"{SETTING} {self.options} --steps 1")
        steps = (DEEP_IMAGES if self.is_deep else IMAGES) // config.batch_size
        return replace(config, steps=steps, seed=seed, ts_log_interv=0, ckpt_interv=0)


def deep(lr: str) -> str:
    return f"{DEEP} --lr {lr} --lr-warmup 50"


def cosine(lr: str, warmup: int = 100, ema: float = 0.99) -> str:
    return f"--lr {lr} --lr-warmup {warmup} --lr-decay cosine --ema {ema}"


RECIPES: dict[str, Recipe] = {
    "reference": Recipe("", "the reference's: Adamax at a constant 3e-4, no average"),
    "cosine-1e-3": Recipe(cosine("1e-3"), "1e-3, warm-up of 100 steps, cosine, average of 0.99"),
    "cosine-3e-3": Recipe(cosine("3e-3"), "3e-3, warm-up of 100 steps, cosine, average of 0.99"),
    "cosine-1e-2": Recipe(cosine("1e-2"), "1e-2, warm-up of 100 steps, cosine, average of 0.99"),
    "cosine-2e-2": Recipe(cosine("2e-2"), "2e-2, warm-up of 100 steps, cosine, average of 0.99"),
    "average-alone": Recipe(
        "--lr 3e-3 --lr-warmup 100 --ema 0.998", "3e-3 without decay, average of 0.998"
    ),
    "no-warm-up": Recipe(cosine("1e-2", warmup=0), "1e-2, cosine, average, without warm-up"),
    "no-dropout": Recipe(cosine("1e-2") + " --dropout 0", "1e-2 ... without dropout"),
    "batch-256": Recipe(
        cosine("1e-2", 25, 0.96) + " --batch-size 256", "1e-2 ... batch of 256, a quarter the steps"
    ),
    "batch-256-2e-2": Recipe(
        cosine("2e-2", 25, 0.96) + " --batch-size 256", "2e-2 ... batch of 256, a quarter the steps"
    ),
    "clip": Recipe(cosine("1e-2") + " --grad-clip 20", "1e-2 ... gradient clipped to norm 20"),
    "bounded": Recipe(cosine("1e-2") + " --scales bounded", "1e-2 ... scales softly clamped"),
    "softplus": Recipe(cosine("1e-2") + " --scales softplus", "1e-2 ... softplus scales"),
    "scaled-branches": Recipe(
        cosine("1e-2") + " --scale-branches", "1e-2 ... branches initially scaled by 1/sqrt(blocks)"
    ),
    "deep-3e-4": Recipe(deep("3e-4"), "the reference's 3e-4, warm-up of 50 steps"),
    "deep-3e-3": Recipe(deep("3e-3"), "3e-3, warm-up of 50 steps"),
    "deep-1e-2": Recipe(deep("1e-2"), "1e-2, warm-up of 50 steps"),
}


def run(name: str, seed: int, data_dir: Path) -> Path:
    """Train and evaluate one recipe; returns the file of its results."""
    recipe = RECIPES[name]
    config = recipe.config(seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        began = time.monotonic()
        with Interruption() as signals:
            trainer, _ = train_svi.begin(config, folder, device=CPU, data_dir=data_dir)
            train(trainer, Run.open(folder), signals)
            signals.check()
        minutes = (time.monotonic() - began) / 60
        last = newest(finite_entries(folder / "metrics.jsonl"), "train/negative_elbo") or {}
        bounds = {} if recipe.is_deep else _bounds(folder, config, data_dir)
    path = RESULTS / f"{name}-seed-{seed}.json"
    content = {
        "recipe": name,
        "says": recipe.says,
        "options": f"{SETTING} {recipe.options}".split(),
        "steps": config.steps,
        "batch_size": config.batch_size,
        "seed": seed,
        "minutes": minutes,
        **bounds,
        "training_elbo": last.get("train/negative_elbo"),
        "skipped_updates": last.get("train/skipped_updates"),
        "gradient_norm": last.get("train/gradient_norm"),
        "provenance": provenance(CPU),
    }
    write_json(path, content)
    return path


def _bounds(folder: Path, config: RunConfig, data_dir: Path) -> dict[str, Any]:
    """The ELBO of all validation images, and the bound with 100 samples of some of them."""

    def evaluated(*, average: bool = True, **options: Any) -> dict[str, Any]:
        ladder = evaluate.EvaluatedLadder.load(folder, device=CPU, average=average)
        images = ladder.images("valid", data_dir)
        with tempfile.TemporaryDirectory() as out:
            return evaluate.evaluate(ladder, images, Path(out), **options)

    elbo = evaluated(samples=[1])
    bound = evaluated(samples=[1, 100], limit=BOUND_IMAGES)
    last = evaluated(samples=[1], average=False)["elbo"] if config.ema else None
    return {
        "elbo": elbo["elbo"],
        "elbo_standard_error": elbo["standard_error"]["elbo"],
        "elbo_of_last_weights": last,
        "iw": bound["iw"],
        "iw_standard_error": bound["standard_error"],
        "iw_images": bound["n_images"],
        "kl_per_layer": elbo["kl_per_layer"],
    }


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = benchmark_parser("recipes", "Compare recipes for short training budgets.")
    parser.add_argument("names", nargs="+", choices=tuple(RECIPES), metavar="RECIPE")
    parser.add_argument("--seed", type=int, default=42, help="of the training (default: 42)")
    add_data_dir(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with pyro.validation_enabled(False):
        for name in arguments.names:
            print(f"results   {run(name, arguments.seed, arguments.data_dir)}", flush=True)
    return 0


if __name__ == "__main__":
    run_command(main)
