"""Score a trained ladder VAE by importance sampling, and draw what it has learned.

    python evaluate.py runs/digits
    python evaluate.py runs/mnist-12 --samples 1 100 1000 --limit 1000

Prints a table of negative bounds on the log-likelihood (lower is better) and writes
RUN/eval/STEP/metrics.json, samples.png and reconstructions.png.
"""

import argparse
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor
from tqdm import tqdm

import datasets
from checkpoint import Run, load_weights, write_json
from config import OneLineParser
from devices import choose_device
from elbo import FreeBitsELBO
from errors import UserError, run_command
from guide import LadderGuide, build_ladder
from importance import Bounds, bits_per_dim, importance_weighted_bounds, random_index
from model import LadderModel
from networks import count_parameters
from pictures import prior_samples, reconstruction_grid, reconstructions, sample_grid, write_png
from provenance import provenance


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


def metrics(bounds: Bounds, image_shape: Sequence[int]) -> dict[str, Any]:
    """Negative bounds, positive as in the literature's tables, in nats; with their standard errors.

    `elbo` is the mean over all samples; `iw`, by number of samples, the importance-weighted bound.
    """
    per_image = {"elbo": -bounds.elbo}
    per_image |= {str(k): -bound for k, bound in bounds.importance_weighted.items()}
    means = {name: values.mean().item() for name, values in per_image.items()}
    return {
        "elbo": means["elbo"],
        "iw": {name: mean for name, mean in means.items() if name != "elbo"},
        "standard_error": {name: standard_error(values) for name, values in per_image.items()},
        "bits_per_dim": {name: bits_per_dim(mean, image_shape) for name, mean in means.items()},
        "reconstruction": -bounds.log_likelihood.mean().item(),
        "kl_per_layer": bounds.kl.mean(0).tolist(),
        "n_images": len(bounds.elbo),
    }


def standard_error(values: Tensor) -> float | None:
    """Of the mean of `values` (N,); None for a single one."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def table(results: dict[str, Any]) -> str:
    """The figures of `metrics`, for reading."""
    names = {"elbo": "ELBO"}
    names |= {k: f"{int(k):,} importance sample{'s' * (k != '1')}" for k in results["iw"]}
    values = {"elbo": results["elbo"]} | results["iw"]
    lines = [f"{'negative bound':<26}{'nats':>10}{'std. error':>12}{'bits/dim':>10}"]
    for key, name in names.items():
        error = results["standard_error"][key]
        shown = f"{error:.2f}" if error is not None else "-"
        lines.append(
            f"{name:<26}{values[key]:>10.2f}{shown:>12}{results['bits_per_dim'][key]:>10.3f}"
        )
    kl = "  ".join(f"{value:.2f}" for value in results["kl_per_layer"])
    lines.append(f"KL by layer, bottom to top: {kl} nats")
    return "\n".join(lines)


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
        help="images times samples per pass (default: the run's --test-batch-size)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the noise and of --limit's choice (default: 0)"
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
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


def evaluate(arguments: argparse.Namespace) -> None:
    device = choose_device(arguments.device)
    run = Run.open(arguments.run)
    step = None if arguments.checkpoint == "last" else int(arguments.checkpoint)
    trained = Trained.load(run, step, device, average=arguments.average)
    images = datasets.load(run.config.dataset, arguments.split, arguments.data_dir).to(device)
    if images.shape != run.image_shape:
        raise UserError(
            f"{run.path} is of images {run.image_shape}, {images.name} has {images.shape}"
        )
    limit = arguments.limit or len(images)
    if limit > len(images):
        raise UserError(f"--limit is {limit} but {arguments.split} has {len(images)} images")
    index = random_index(len(images), limit, arguments.seed)
    batch_size = arguments.batch_size or run.config.test_batch_size
    with tqdm(total=len(index), unit="image", disable=not sys.stderr.isatty()) as bar:
        bounds = importance_weighted_bounds(
            trained.model,
            trained.guide,
            images,
            index,
            arguments.samples,
            batch_size=batch_size,
            seed=arguments.seed,
            on_images=bar.update,
        )
    results = metrics(bounds, images.shape) | {
        "dataset": images.name,
        "split": arguments.split,
        "step": trained.step,
        "weights": trained.weights,
        "seed": arguments.seed,
        "batch_size": batch_size,
        "layers": len(run.config.z_dims),
        "parameters": count_parameters(trained.model, trained.guide),
        "trained": run.provenance,
        "provenance": provenance(device),
    }
    folder = run.path / "eval" / str(trained.step)
    some = random_index(len(images), 32, arguments.seed)[:32].to(images.index_device)
    draw_pictures(trained, images.batch(some), folder, arguments.seed)
    write_json(folder / "metrics.json", results)
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
    print(f"figures   {folder / 'metrics.json'}")
    print(f"pictures  {folder / 'samples.png'}, {folder / 'reconstructions.png'}")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with pyro.validation_enabled(False):
        evaluate(arguments)
    return 0


if __name__ == "__main__":
    run_command(main)
