"""Evaluate a trained ladder VAE: bounds on the log-likelihood, and pictures.

    python evaluate.py runs/mnist-12 --samples 1 100 1000
    torchrun --nproc-per-node 8 evaluate.py runs/mnist-12 --samples 1 100 1000

Prints a table of negative bounds (lower is better) and writes metrics, pictures and a report into
RUN/eval/STEP/. The same command resumes an interrupted evaluation.
"""

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
from torch import Tensor

import datasets
from datasets import ImageSet
from ladder import Ladder
from ladder_vae.evaluation.importance import Blocks, random_index
from ladder_vae.evaluation.metrics import Metrics, curve_samples, metrics, write_per_image
from ladder_vae.evaluation.sampling import check_temperature
from ladder_vae.networks.precision import COMPILE, PRECISIONS, Execution
from ladder_vae.reports.comparison import evaluation_folder
from ladder_vae.reports.figures import draw_album, draw_charts
from ladder_vae.reports.html import weights_in_words, write_evaluation_report
from ladder_vae.reports.tables import summary
from ladder_vae.runs.command_line import OneLineParser, as_user_errors
from runtime.device import choose_device, keep_freed_memory
from runtime.distributed import Ranks, joined_ranks
from runtime.errors import UserError, run_command
from runtime.files import write_json


def evaluate(
    ladder: Ladder,
    images: ImageSet,
    folder: Path,
    *,
    samples: Sequence[int] = (1, 100),
    batch_size: int | None = None,
    seed: int = 0,
    temperature: float | Sequence[float] = 1.0,
    limit: int | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    check: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Compute bounds, and write metrics.json, per_image.npz, pictures and report.html.

    Args:
        ladder: the ladder to evaluate.
        images: a split of a data set.
        folder: where to write.
        samples: the numbers K of importance samples, ascending.
        batch_size: images times samples per pass; None to choose it by network and device.
        seed: random seed of all noise, and of the images that `limit` chooses.
        temperature: factor on the prior's standard deviations in samples.png, for all layers or
            for each from the bottom.
        limit: number of random images to evaluate; None for all.
        ranks: the processes that share the work; the first one writes.
        check: called before each group of images; may raise to interrupt the evaluation, which
            the same call resumes.

    Returns the content of metrics.json, in every process.
    """
    check_temperature(temperature, ladder.depth)
    index = choose_images(images, limit, seed)
    size: int = batch_size or ranks.share(ladder.batch_size())
    curve = curve_samples(samples)
    bounds, progress = ladder.score(
        images, index, curve, folder, batch_size=size, seed=seed, ranks=ranks, check=check
    )
    blocks = Blocks.of(size, samples[-1])
    results = metrics(bounds, samples, images.shape) | {
        "dataset": images.name,
        "split": images.split,
        "seed": seed,
        "limit": limit,
        "batch_size": size,
        "blocks": {"images": blocks.images, "samples": blocks.samples},
        **ladder.origin(),
    }
    if ranks.is_first:
        draw_charts(folder, bounds, results)
        draw_pictures(ladder, images, folder, temperature, size, seed)
        write_per_image(folder / "per_image.npz", bounds, index)
        write_json(folder / "metrics.json", results)
        write_evaluation_report(folder, ladder.run, results)
        progress.remove()
    return results


def draw_pictures(
    ladder: Ladder,
    images: ImageSet,
    folder: Path,
    temperature: float | Sequence[float],
    batch_size: int,
    seed: int,
) -> None:
    """Draw samples, reconstructions and what each layer encodes; see `evaluate`."""
    draw_album(
        folder,
        ladder.model,
        ladder.guide,
        ladder.run.config.ladder,
        images,
        temperature=temperature,
        batch_size=batch_size,
        seed=seed,
    )


def choose_images(images: ImageSet, limit: int | None, seed: int) -> Tensor:
    """The indices of `limit` random images, or of all if None; `UserError` if there are fewer."""
    if limit is not None and limit > len(images):
        raise UserError(f"--limit is {limit} but {images.split} has only {len(images)} images")
    return random_index(len(images), limit or len(images), seed)


# --- The command line; the tools reuse parts of it ---


def at_least(least: int) -> Callable[[str], int]:
    """The argparse type of a whole number of at least `least`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; it must be at least {least}")
        return value

    return integer


def random_seed(text: str) -> int:
    """The argparse type of a random seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0 and below 2**63")
    return value


def add_ladder_options(parser: argparse.ArgumentParser) -> None:
    """Add RUN and the options that choose checkpoint, images, device and output folder."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train_svi.py")
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="STEP",
        help="checkpoint to evaluate: a step, best or last (default: last)",
    )
    parser.add_argument(
        "--average",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the moving average of the weights if the run has one (default: yes)",
    )
    parser.add_argument(
        "--split",
        choices=datasets.SPLITS,
        default="test",
        help="split of the data set (default: test)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where to write (default: RUN/eval/STEP, or RUN/eval/STEP-SPLIT if the split is not "
        "test)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="images times samples per pass (default: chosen by network and device)",
    )
    parser.add_argument(
        "--seed",
        type=random_seed,
        default=0,
        metavar="N",
        help="random seed of the noise and of the images that --limit chooses (default: 0)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--compile",
        choices=COMPILE,
        default="auto",
        help="compile the residual blocks, which takes a minute at the start; auto: on a GPU "
        "(default: auto)",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("LVAE_DATA", "data")),
        help="folder of the data sets (default: $LVAE_DATA, or data/)",
    )


def add_bound_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of importance-weighted bounds."""
    parser.add_argument(
        "--samples",
        type=at_least(1),
        nargs="+",
        default=[1, 100],
        metavar="K",
        help="numbers of importance samples, ascending (default: 1 100)",
    )
    parser.add_argument(
        "--limit",
        type=at_least(1),
        metavar="N",
        help="evaluate N random images (default: all)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="precision of the networks; tf32 (on a GPU) and bf16 are faster, but bf16 changes "
        "bounds of digits by up to a tenth of a nat (default: float32)",
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; raises `UserError` unless --samples ascends."""
    arguments = parser.parse_args(argv)
    if any(a >= b for a, b in itertools.pairwise(arguments.samples)):
        raise UserError(
            f"--samples is {' '.join(map(str, arguments.samples))}; give ascending numbers"
        )
    return arguments


def load_ladder(arguments: argparse.Namespace, local_rank: int = 0) -> Ladder:
    """The ladder that the options of `add_ladder_options` choose."""
    device = choose_device(arguments.device, local_rank)
    precision = getattr(arguments, "precision", "float32")
    with as_user_errors():
        execution = Execution.choose(precision, arguments.compile, device)
    return Ladder.load(
        arguments.run,
        checkpoint=arguments.checkpoint,
        device=device,
        average=arguments.average,
        execution=execution,
    )


def output_folder(arguments: argparse.Namespace, ladder: Ladder) -> Path:
    """--out, or the ladder's own folder for the split."""
    return arguments.out or evaluation_folder(ladder.run.path, ladder.step, arguments.split)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="evaluate.py",
        description="Compute bounds on the log-likelihood of a trained ladder VAE, and draw "
        "pictures of what it has learned.",
    )
    add_ladder_options(parser)
    add_bound_options(parser)
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="T",
        help="factor on the prior's standard deviations in samples.png, one for all layers or one "
        "for each layer, bottom to top (default: 1)",
    )
    return parse(parser, argv)


def print_results(ladder: Ladder, results: dict[str, Any], folder: Path) -> None:
    """Print the table of bounds and the paths of the files."""
    split = results["split"]
    print(
        f"{results['dataset']}, {results['n_images']:,} {split} images, step {ladder.step:,}, "
        f"{weights_in_words(ladder.weights)}"
    )
    print(summary(Metrics.from_dict(results)))
    if results["warning"] is not None:
        print(f"warning   {results['warning']}")
    print(f"metrics   {folder / 'metrics.json'}, {folder / 'per_image.npz'}")
    print(f"report    {folder / 'report.html'}")
    if seen := set(split.split("+")) & set(ladder.run.config.train_split.split("+")):
        print(f"note      the run was trained on {' and '.join(sorted(seen))} images")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    keep_freed_memory()
    advice = "; the same command resumes the evaluation"
    with pyro.validation_enabled(False), joined_ranks(advice) as ranks:
        ladder = load_ladder(arguments, ranks.local_rank)
        folder = output_folder(arguments, ladder)
        given = arguments.temperature
        temperature = given if len(given) > 1 else given[0]
        check_temperature(temperature, ladder.depth)  # before a possible download
        results = evaluate(
            ladder,
            ladder.images(arguments.split, arguments.data_dir),
            folder,
            samples=arguments.samples,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            temperature=temperature,
            limit=arguments.limit,
            ranks=ranks,
        )
        if ranks.is_first:
            print_results(ladder, results, folder)
    return 0


if __name__ == "__main__":
    run_command(main)
