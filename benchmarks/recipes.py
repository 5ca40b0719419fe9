"""Recipes for short training budgets, compared on the validation images of static MNIST.

    python -m benchmarks.recipes reference cosine-3e-3 [--seed 1] [--data-dir data]

The recipes of a family train a ladder on equally many training images or for equally many minutes.
The test images are not used. Writes a file per recipe and random seed to results/recipes/.
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
from ladder_vae.training.trainer import train
from runtime.errors import run_command
from runtime.files import write_json
from runtime.signals import Interruption

RESULTS = ROOT / "results" / "recipes"
CPU = torch.device("cpu")
TRAINING_IMAGES = 10_000  # random training images for an ELBO to compare with
BOUND_IMAGES = 1_000  # random validation images for the bound with 100 samples, the same for all


@dataclass(frozen=True)
class Family:
    """What a family's recipes share: options of train_svi.py, and how many images they see.

    `images` holds for all recipes that do not give a length of their own. A family that is not
    `evaluated` is judged by its training ELBO alone.
    """

    name: str
    setting: str
    images: int
    evaluated: bool = True


_FEW_FILTERS = (
    "--dataset static_mnist --train-split train --nfilters 16 --skip --gated --learn-top-prior "
    "--data-dep-init --ll-interv 0 "
)
SMALL = Family(
    "small",
    f"{_FEW_FILTERS}--zdims 8 8 8 --downsample 1 1 1 --blocks-per-layer 1 --freebits 0.5",
    images=128_000,
)
# A ladder as deep as the twelve-layer rows, with few channels, on as many images as it can see in a
# few minutes, to show whether training is stable.
DEEP = Family(
    "deep",
    f"{_FEW_FILTERS}--zdims 8 8 8 8 8 8 8 8 8 8 8 8 --downsample 0 0 1 0 0 1 0 0 0 1 0 0 "
    "--blocks-per-layer 4 --freebits 1 --batch-size 16 --tr-log-interv 50",
    images=3_200,
    evaluated=False,
)
LAPTOP = Family(
    "laptop", "--preset mnist-laptop --train-split train --no-analytical-kl", images=150_000
)


@dataclass(frozen=True)
class Recipe:
    """A way of training: options of train_svi.py beside its family's."""

    options: str
    says: str
    family: Family = SMALL

    def config(self, seed: int) -> RunConfig:
        """The configuration of its training."""
        timed = "--minutes" in self.options
        length = "" if timed else "--steps 1"
        config = config_of_text(f"{self.family.setting} {self.options} {length}")
        if not timed:
            config = replace(config, steps=self.family.images // config.batch_size)
        return replace(config, seed=seed, ts_log_interv=0, ckpt_interv=0)


def deep(lr: str, says: str) -> Recipe:
    return Recipe(f"--lr {lr} --lr-warmup 50", f"{says}, warm-up of 50 steps", DEEP)


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
    "deep-3e-4": deep("3e-4", "the reference's 3e-4"),
    "deep-3e-3": deep("3e-3", "3e-3"),
    "deep-1e-2": deep("1e-2", "1e-2"),
    "laptop": Recipe("", "the preset without analytical KL", LAPTOP),
    "laptop-adamax": Recipe("--optimizer adamax", "Adamax alone", LAPTOP),
    "laptop-free-bits-0": Recipe("--freebits 0", "without free bits", LAPTOP),
    "laptop-dropout-0.05": Recipe("--dropout 0.05", "dropout", LAPTOP),
    "laptop-32-latents": Recipe("--zdims 32 32 32 32", "32 channels a layer", LAPTOP),
    "laptop-6-layers": Recipe(
        "--zdims 16 16 16 16 16 16 --downsample 1 0 1 0 1 0", "six layers", LAPTOP
    ),
    "laptop-batch-32": Recipe("--batch-size 32", "batch of 32, twice the steps", LAPTOP),
    "laptop-hour": Recipe("--minutes 60", "an hour on one core", LAPTOP),
    "laptop-hour-96": Recipe(
        "--minutes 60 --nfilters 96 --dropout 0.1", "96 filters, dropout, an hour", LAPTOP
    ),
    "laptop-hour-kl": Recipe("--minutes 60 --analytical-kl", "an hour, analytical KL", LAPTOP),
    "laptop-hour-iwae": Recipe(
        "--minutes 60 --analytical-kl --objective iwae --particles 4 --elbo-share 0.6",
        "analytical KL, the last 24 minutes on the importance-weighted bound",
        LAPTOP,
    ),
}


def run(name: str, seed: int, data_dir: Path) -> Path:
    """Train and evaluate one recipe; returns the file of its results."""
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory() as temporary:
        began = time.monotonic()
        config, folder = recipe.config(seed), Path(temporary) / "run"
        steps = _trained(config, folder, data_dir)
        minutes = (time.monotonic() - began) / 60
        last = newest(finite_entries(folder / "metrics.jsonl"), "train/negative_elbo") or {}
        bounds = _bounds(folder, config, data_dir) if recipe.family.evaluated else {}
    path = RESULTS / f"{name}-seed-{seed}.json"
    content = {
        "recipe": name,
        "family": recipe.family.name,
        "says": recipe.says,
        "setting": recipe.family.setting.split(),
        "options": recipe.options.split(),
        "steps": steps,
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


def _trained(config: RunConfig, folder: Path, data_dir: Path) -> int:
    """Train a new run in `folder`; returns its number of steps."""
    with Interruption() as signals:
        trainer, run = train_svi.begin(config, folder, device=CPU, data_dir=data_dir)
        train(trainer, run, signals)
        signals.check()
    return trainer.step


def _bounds(folder: Path, config: RunConfig, data_dir: Path) -> dict[str, Any]:
    """The ELBO of all validation images, and the bound with 100 samples of some of them."""

    def evaluated(split: str = "valid", *, average: bool = True, **options: Any) -> dict[str, Any]:
        ladder = evaluate.EvaluatedLadder.load(folder, device=CPU, average=average)
        images = ladder.images(split, data_dir)
        with tempfile.TemporaryDirectory() as out:
            return evaluate.evaluate(ladder, images, Path(out), **options)

    elbo = evaluated(samples=[1])
    bound = evaluated(samples=[1, 100], limit=BOUND_IMAGES)
    trained = evaluated("train", samples=[1], limit=TRAINING_IMAGES)
    last = evaluated(samples=[1], average=False)["elbo"] if config.ema else None
    return {
        "elbo": elbo["elbo"],
        "elbo_standard_error": elbo["standard_error"]["elbo"],
        "elbo_of_last_weights": last,
        "elbo_of_training_images": trained["elbo"],
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
