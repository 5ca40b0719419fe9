"""Score a trained ladder VAE by importance sampling, and draw what it has learned.

    python evaluate.py runs/digits
    python evaluate.py runs/mnist-12 --samples 1 100 1000 --limit 1000

Prints a table of negative bounds on the log-likelihood (lower is better) and writes
RUN/eval/STEP/metrics.json, samples.png and reconstructions.png.
"""

import argparse
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import datasets
from checkpoint import Run, load_weights, write_json
from config import OneLineParser
from datasets import ImageSet
from devices import choose_device
from elbo import FreeBitsELBO
from errors import UserError, run_command
from guide import LadderGuide, build_ladder
from importance import Blocks, Bounds, ImportanceSampler, random_index
from memory import automatic_batch_size
from metrics import curve_samples, metrics, table, write_per_image
from model import LadderModel
from networks import count_parameters
from pictures import prior_samples, reconstruction_grid, reconstructions, sample_grid, write_png
from provenance import commit, provenance
from ranks import Ranks, joined_ranks
from scoring import Ledger, fingerprint, score


@dataclass(frozen=True)
class Trained:
    """A model and guide in evaluation mode, with the weights of a checkpoint."""

    model: LadderModel
    guide: LadderGuide
    step: int
    weights: str  # "average" or "last"

    @classmethod
    def load(cls, run: Run, step: int | None, device: torch.device, *, average: bool) -> "Trained":
        """From the checkpoint of `step`, or the newest; its moving average where there is one."""
        state = run.load_checkpoint(step, device)
        model, guide = build_ladder(run.config, run.image_shape)
        module: Any = FreeBitsELBO()(model, guide).to(device).eval()
        use_average = average and state["average"] is not None
        load_weights(module, state["average"]["weights"] if use_average else state["weights"])
        return cls(model, guide, state["step"], "average" if use_average else "last")


def draw_pictures(trained: Trained, x: Tensor, folder: Path, seed: int) -> None:
    """Write prior samples, and reconstructions of the images x (N, C, H, W)."""
    torch.manual_seed(seed)
    write_png(folder / "samples.png", sample_grid(prior_samples(trained.model, 64), 8))
    reconstructed = reconstructions(trained.guide, x)
    write_png(folder / "reconstructions.png", reconstruction_grid(x, reconstructed, 8))


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="evaluate.py",
        description="Score a trained ladder VAE by importance sampling.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train_svi.py")
    parser.add_argument(
        "--checkpoint", default="last", metavar="STEP", help="step, or last (default: last)"
    )
    parser.add_argument(
        "--samples",
        type=int,
        nargs="+",
        default=[1, 100],
        metavar="K",
        help="numbers of importance samples, rising (default: 1 100)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="score N random images (default: the whole split)"
    )
    parser.add_argument(
        "--split", default="test", choices=datasets.SPLITS, help="images to score (default: test)"
    )
    parser.add_argument(
        "--average",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the moving average of the weights where the run has one (default: yes)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images times samples per pass (default: by the network and the memory)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the noise and of --limit's choice (default: 0)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default: RUN/eval/STEP)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("LVAE_DATA", "data")),
        help="where the data sets are kept (default: LVAE_DATA in the environment, or data/)",
    )
    arguments = parser.parse_args(argv)
    check_arguments(arguments)
    return arguments


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise `UserError` for values that make no sense."""
    samples = arguments.samples
    if samples[0] < 1 or any(a >= b for a, b in itertools.pairwise(samples)):
        raise UserError(
            f"--samples is {' '.join(map(str, samples))}; it must be positive numbers that rise"
        )
    for name in ("limit", "batch_size"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")
    if not 0 <= arguments.seed < 2**63:
        raise UserError(f"--seed is {arguments.seed}; it must be at least 0 and below 2**63")
    checkpoint = arguments.checkpoint
    if checkpoint != "last" and not checkpoint.isdecimal():
        raise UserError(f"--checkpoint is {checkpoint!r}; it must be a step, or last")


class Evaluation:
    """The checkpoint that the command line names, and how it is to be evaluated."""

    def __init__(self, arguments: argparse.Namespace, ranks: Ranks) -> None:
        self.arguments = arguments
        self.ranks = ranks
        self.device = choose_device(arguments.device, ranks.local_rank)
        self.run = Run.open(arguments.run)
        step = None if arguments.checkpoint == "last" else int(arguments.checkpoint)
        self.trained = Trained.load(self.run, step, self.device, average=arguments.average)
        self.folder = arguments.out or self.run.path / "eval" / str(self.trained.step)
        # How many image-sample pairs go through the network at a time, on every rank.
        self.batch_size = arguments.batch_size or ranks.share(
            automatic_batch_size(
                self.run.config,
                self.trained.guide,
                torch.zeros(1, *self.run.image_shape, device=self.device),
            )
        )

    def load(self, name: str) -> ImageSet:
        """The split of a data set that is asked for; raises `UserError` for images that differ."""
        images = datasets.load(name, self.arguments.split, self.arguments.data_dir).to(self.device)
        if images.shape != self.run.image_shape:
            raise UserError(
                f"{self.run.path} is of images {self.run.image_shape}, "
                f"{images.name} has {images.shape}"
            )
        return images

    def index(self, images: ImageSet) -> Tensor:
        """The images that are asked for: all, or a random few."""
        limit = self.arguments.limit or len(images)
        if limit > len(images):
            raise UserError(f"--limit is {limit} but {images.split} has {len(images)} images")
        return random_index(len(images), limit, self.arguments.seed)

    def score(
        self, images: ImageSet, index: Tensor, samples: Sequence[int]
    ) -> tuple[Bounds, Ledger]:
        """The bounds of the images at `index`, and the ledger to remove once they are written."""
        sampler = ImportanceSampler(
            self.trained.model,
            self.trained.guide,
            images,
            index,
            samples,
            batch_size=self.batch_size,
            seed=self.arguments.seed,
        )
        modules = nn.ModuleList([self.trained.model, self.trained.guide])
        origin = {
            "config": self.run.config.to_dict(),
            "code": commit(),
            "torch": torch.__version__,
            "device": self.device.type,
        }
        ledger = Ledger(self.folder / ".progress", fingerprint(modules, sampler, origin), sampler)
        return score(sampler, ledger, self.ranks), ledger


def evaluate(evaluation: Evaluation) -> None:
    """Score the images, draw the pictures, and print what was found."""
    arguments, run, trained = evaluation.arguments, evaluation.run, evaluation.trained
    images = evaluation.load(run.config.dataset)
    index = evaluation.index(images)
    bounds, ledger = evaluation.score(images, index, curve_samples(arguments.samples))
    if not evaluation.ranks.is_first:
        return
    blocks = Blocks.of(evaluation.batch_size, arguments.samples[-1])
    results = metrics(bounds, arguments.samples, images.shape) | {
        "dataset": images.name,
        "split": arguments.split,
        "step": trained.step,
        "weights": trained.weights,
        "seed": arguments.seed,
        "batch_size": evaluation.batch_size,
        "blocks": {"images": blocks.images, "samples": blocks.samples},
        "layers": len(run.config.z_dims),
        "parameters": count_parameters(trained.model, trained.guide),
        "trained": run.provenance,
        "provenance": provenance(evaluation.device),
    }
    folder = evaluation.folder
    some = random_index(len(images), 32, arguments.seed)[:32].to(images.index_device)
    draw_pictures(trained, images.batch(some), folder, arguments.seed)
    write_per_image(folder / "per_image.npz", bounds, index)
    write_json(folder / "metrics.json", results)
    ledger.remove()
    report(results, folder)
    seen = set(arguments.split.split("+")) & set(run.config.train_split.split("+"))
    if seen:
        print(f"note      the run was trained on {' and '.join(sorted(seen))} images")


def report(results: dict[str, Any], folder: Path) -> None:
    """Print the table and where the files lie."""
    weights = "moving average of the weights" if results["weights"] == "average" else "last weights"
    print(
        f"{results['dataset']}, {results['n_images']:,} {results['split']} images, "
        f"step {results['step']:,}, {weights}"
    )
    print(table(results))
    if results["warning"] is not None:
        print(f"warning   {results['warning']}")
    print(f"figures   {folder / 'metrics.json'}, {folder / 'per_image.npz'}")
    print(f"pictures  {folder / 'samples.png'}, {folder / 'reconstructions.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with pyro.validation_enabled(False), joined_ranks() as ranks:
        evaluate(Evaluation(arguments, ranks))
    return 0


if __name__ == "__main__":
    run_command(main)
