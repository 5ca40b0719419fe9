"""Which way of training gets furthest within a short budget, in a small setting.

    python -m benchmarks.recipes run reference cosine-3e-3 [--seed 1] [--data-dir data]
    python -m benchmarks.recipes table

Each trains the small ladder of README's "The same network learns the same" on the training images
of static MNIST alone, for as many images as 2,000 steps of 64 are, and is judged on the validation
images: the test set is not looked at. `run` writes one file for each recipe and seed to
results/recipes/, `table` makes results/recipes.md of them.
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from torch import Tensor

import evaluate
import guide
import model
import train_svi
from ladder_vae.networks.blocks import ResidualBlock
from ladder_vae.runs.command_line import OneLineParser
from ladder_vae.runs.metrics_log import finite_entries, newest
from ladder_vae.runs.provenance import provenance
from runtime.errors import UserError, run_command
from runtime.files import write_atomically, write_json

RESULTS = Path(__file__).parent.parent / "results"
IMAGES = 128_000
# The setting, without what the recipes change.
SETTING = (
    "--dataset static_mnist --train-split train --zdims 8 8 8 --downsample 1 1 1 "
    "--blocks-per-layer 1 --nfilters 16 --skip --gated --learn-top-prior --data-dep-init "
    "--freebits 0.5 --ll-interv 0 --device cpu"
).split()
# A deep ladder as the twelve-layer rows have it, of few channels, for as many images as it can have
# in a few minutes: does it learn, or fly apart? Judged by its training alone.
DEEP_IMAGES = 3_200
DEEP = (
    "--zdims 8 8 8 8 8 8 8 8 8 8 8 8 --downsample 0 0 1 0 0 1 0 0 0 1 0 0 --blocks-per-layer 4 "
    "--freebits 1 --batch-size 16 --tr-log-interv 50"
)
# The bound with 100 samples is of a random 1,000 of the validation images, the same for all.
BOUND = "--samples 1 100 --limit 1000".split()


@contextmanager
def unchanged() -> Iterator[None]:
    """The network as it is."""
    yield


def _soft_clamped(parameters: Tensor) -> dist.TorchDistribution:
    """As `model.normal_from`, with mean and log-scale bent towards +-5."""
    mean, log_variance = parameters.chunk(2, dim=1)
    bent = (5 * torch.tanh(value / 5) for value in (mean, log_variance / 2))
    mean, log_scale = bent
    return dist.Normal(mean, log_scale.exp()).to_event(3)


def _softplus(parameters: Tensor) -> dist.TorchDistribution:
    """As `model.normal_from`, with the softplus of half the log-variance as scale, 1 at 0."""
    mean, log_variance = parameters.chunk(2, dim=1)
    return dist.Normal(mean, F.softplus(log_variance / 2, beta=math.log(2))).to_event(3)


@contextmanager
def soft_clamp() -> Iterator[None]:
    """Posteriors whose mean and log-scale are softly clamped to +-5."""
    with mock.patch.object(guide, "normal_from", _soft_clamped):
        yield


@contextmanager
def softplus_scales() -> Iterator[None]:
    """Priors and posteriors with softplus scales."""
    with (
        mock.patch.object(model, "normal_from", _softplus),
        mock.patch.object(guide, "normal_from", _softplus),
    ):
        yield


@contextmanager
def scaled_branches() -> Iterator[None]:
    """The last convolution of each residual branch begins 1/sqrt(number of blocks) as large."""
    initialise = train_svi.Training.initialise

    def scaled(training: train_svi.Training) -> None:
        initialise(training)
        blocks = [m for m in training.loss_fn.modules() if isinstance(m, ResidualBlock)]
        with torch.no_grad():
            for block in blocks:
                convolutions = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
                for parameter in convolutions[-1].parameters():
                    parameter.div_(math.sqrt(len(blocks)))

    with mock.patch.object(train_svi.Training, "initialise", scaled):
        yield


@dataclass(frozen=True)
class Recipe:
    """A way of training: options of train_svi.py, and a change of the network if there is one."""

    options: str
    says: str
    change: Callable[[], Any] = unchanged

    @property
    def is_deep(self) -> bool:
        return self.options.startswith(DEEP)

    @property
    def batch_size(self) -> int:
        words = self.options.split()
        return int(words[words.index("--batch-size") + 1]) if "--batch-size" in words else 64

    @property
    def steps(self) -> int:
        return (DEEP_IMAGES if self.is_deep else IMAGES) // self.batch_size


def deep(lr: str) -> str:
    return f"{DEEP} --lr {lr} --lr-warmup 50"


def cosine(lr: str, warmup: int = 100, ema: float = 0.99) -> str:
    return f"--lr {lr} --lr-warmup {warmup} --lr-decay cosine --ema {ema}"


RECIPES: dict[str, Recipe] = {
    "reference": Recipe("", "the original's: Adamax at 3e-4, constant, no average"),
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
    "soft-clamp": Recipe(cosine("1e-2"), "1e-2 ... posteriors softly clamped to +-5", soft_clamp),
    "softplus": Recipe(cosine("1e-2"), "1e-2 ... softplus scales", softplus_scales),
    "scaled-branches": Recipe(
        cosine("1e-2"), "1e-2 ... branches begin 1/sqrt(blocks) as large", scaled_branches
    ),
    "deep-3e-4": Recipe(deep("3e-4"), "the original's 3e-4, warm-up of 50 steps"),
    "deep-3e-3": Recipe(deep("3e-3"), "3e-3, warm-up of 50 steps"),
    "deep-1e-2": Recipe(deep("1e-2"), "1e-2, warm-up of 50 steps"),
}


def run(name: str, seed: int, data_dir: Path) -> Path:
    """Train and score one recipe; returns the file of its figures."""
    recipe = RECIPES[name]
    with tempfile.TemporaryDirectory() as temporary, recipe.change():
        folder = Path(temporary) / "run"
        where = ["--data-dir", str(data_dir)]
        length = f"--steps {recipe.steps} --seed {seed} --ts-log-interv 0 --ckpt-interv 0".split()
        arguments = [*SETTING, *recipe.options.split(), *length, "--out", str(folder), *where]
        began = time.monotonic()
        if train_svi.main(arguments):
            raise UserError(f"{name} did not come to its end")
        minutes = (time.monotonic() - began) / 60
        last = newest(finite_entries(folder / "metrics.jsonl"), "train/negative_elbo") or {}
        figures = {} if recipe.is_deep else _scores(folder, recipe, where)
    path = RESULTS / "recipes" / f"{name}-seed-{seed}.json"
    content = {
        "recipe": name,
        "says": recipe.says,
        "options": [*SETTING, *recipe.options.split()],
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "seed": seed,
        "minutes": minutes,
        **figures,
        "training_elbo": last.get("train/negative_elbo"),
        "skipped_updates": last.get("train/skipped_updates"),
        "gradient_norm": last.get("train/gradient_norm"),
        "provenance": provenance(torch.device("cpu")),
    }
    write_json(path, content)
    return path


def _scores(folder: Path, recipe: Recipe, where: Sequence[str]) -> dict[str, Any]:
    """The figures of the validation images."""
    average, bound = _elbo(folder, where), _scored(folder, [*BOUND, *where])
    averages = "--ema" in recipe.options
    return {
        "elbo": average["elbo"],
        "elbo_standard_error": average["standard_error"]["elbo"],
        "elbo_of_last_weights": (
            _elbo(folder, [*where, "--no-average"])["elbo"] if averages else None
        ),
        "iw": bound["iw"],
        "iw_standard_error": bound["standard_error"],
        "iw_images": bound["n_images"],
        "kl_per_layer": average["kl_per_layer"],
    }


def _elbo(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """The ELBO of all validation images."""
    return _scored(folder, ["--samples", "1", *options])


def _scored(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    evaluate.main([str(folder), "--split", "valid", "--device", "cpu", *options])
    (metrics,) = folder.glob("eval/*/metrics.json")
    return json.loads(metrics.read_text())


def table() -> str:
    """All figures in results/recipes/, best bound first."""
    found = [json.loads(path.read_text()) for path in (RESULTS / "recipes").glob("*.json")]
    small = sorted((f for f in found if "iw" in f), key=lambda f: f["iw"]["100"])
    deep = sorted((f for f in found if "iw" not in f), key=lambda f: f["recipe"])
    places = sorted({_place(figures["provenance"]) for figures in found})
    parts = [
        "# Recipes for a short budget",
        _INTRODUCTION,
        _markdown(_HEADER, [_row(figures) for figures in small]),
        _legend(small),
        *([_OF_DEEP, _markdown(_HEADER_OF_DEEP, map(_deep_row, deep)), _legend(deep)] * bool(deep)),
        f"Obtained on {'; '.join(places)}.",
        _CHOSEN,
    ]
    return "\n\n".join(parts) + "\n"


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rows])


def _legend(found: Sequence[Mapping[str, Any]]) -> str:
    there = {figures["recipe"] for figures in found}
    return "\n".join(f"- `{name}`: {RECIPES[name].says}" for name in RECIPES if name in there)


_HEADER = [
    "recipe",
    "seed",
    "steps x batch",
    "ELBO",
    "of the last weights",
    "100 samples",
    "skipped",
]
_HEADER_OF_DEEP = ["recipe", "steps x batch", "training ELBO", "gradient norm", "skipped"]
_INTRODUCTION = f"""\
Written by `python -m benchmarks.recipes table` from [recipes/](recipes). A small ladder, trained
on the training images of static MNIST by each recipe, for as many images: {IMAGES:,}. Negative
bounds in nats, on the validation images: the ELBO on all 10,000, of the moving average where there
is one; the bound with 100 samples on a random 1,000, the same for all, so that differences between
rows are more certain than the figures themselves (standard errors of 0.3 and 0.8). The test set was
not looked at.

    {" ".join(SETTING[2:-2])}"""
_OF_DEEP = f"""\
A ladder as deep as the twelve-layer rows, of few channels, on {DEEP_IMAGES:,} images: whether a
learning rate is too high for it. Training ELBO and gradient norm are means of the last 50 steps.

    {DEEP}"""
_CHOSEN = """\
## What was chosen

- **Learning rate.** The presets `*-fast` take 5e-3 with a warm-up of 500 steps and cosine decay:
  half of the best one here, because their ladders are four times as wide as these. A deep ladder
  learns at 1e-2 too, for the 200 steps that it was watched.
- **Moving average.** Once the learning rate has decayed to zero it is worth little: the last
  weights are as good to 0.1 nats. It stays, at 0.999, as it costs next to nothing.
- **Batch.** 256 is not chosen by these runs, in which it means a quarter of the steps and is far
  behind: it is what keeps a GPU busy, which in twenty minutes makes tens of thousands of steps.
- **Skipping and clipping.** No update was skipped by the default `--grad-spike 100`, so that
  nothing had to be clipped.
- **Dropout** stays that of the rows: two and a half epochs say nothing of the hundred and more that
  a row sees.

What these runs cannot tell, a learning rate of a full-size ladder above all, is for short
runs there: `reproduce.py ROW --minutes 3 --train-split train --split valid --limit 2000
--samples 1 100`."""


def _row(figures: Mapping[str, Any]) -> list[str]:
    last = figures["elbo_of_last_weights"]
    return [
        *(f"`{figures['recipe']}`", str(figures["seed"]), _length(figures)),
        f"{figures['elbo']:.2f}",
        "" if last is None else f"{last:.2f}",
        f"{figures['iw']['100']:.2f}",
        f"{figures['skipped_updates']:.0f}",
    ]


def _deep_row(figures: Mapping[str, Any]) -> list[str]:
    return [
        *(f"`{figures['recipe']}`", _length(figures)),
        f"{figures['training_elbo']:.1f}",
        f"{figures['gradient_norm']:.0f}",
        f"{figures['skipped_updates']:.0f}",
    ]


def _length(figures: Mapping[str, Any]) -> str:
    return f"{figures['steps']:,} x {figures['batch_size']}"


def _place(origin: Mapping[str, Any]) -> str:
    return f"{origin['machine']}, commit {origin['commit']}"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="benchmarks.recipes", description="Compare ways of training.")
    actions = parser.add_subparsers(dest="action", required=True, metavar="run|table")
    running = actions.add_parser("run", help="train and score recipes")
    running.add_argument("names", nargs="+", choices=tuple(RECIPES), metavar="RECIPE")
    running.add_argument("--seed", type=int, default=42, help="of the training (default: 42)")
    running.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("LVAE_DATA", "data")),
        help="where the data sets are kept (default: LVAE_DATA in the environment, or data/)",
    )
    actions.add_parser("table", help="write results/recipes.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.action == "run":
        for name in arguments.names:
            print(f"figures   {run(name, arguments.seed, arguments.data_dir)}", flush=True)
    else:
        path, text = RESULTS / "recipes.md", table()
        write_atomically(path, lambda file: file.write(text.encode()))
        print(f"table     {path}")
    return 0


if __name__ == "__main__":
    run_command(main)
