"""Compute bounds for given images, and measure how well they separate two sets of images.

    python -m tools.score_images RUN my/pictures
    python -m tools.score_images RUN static_mnist --against my/pictures
    torchrun --nproc-per-node 8 -m tools.score_images RUN static_mnist --against my/pictures

IMAGES is a data set or a folder of image files. Writes scores-NAME.csv and, with --against,
auroc-NAME-NAME.json and roc-NAME-NAME.png into RUN/eval/STEP/. NAME is the data set, or the
folder's name and a checksum of its path. The same command resumes an interrupted scoring.
"""

import argparse
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyro

import datasets
from datasets import ImageSet
from evaluate import EvaluatedLadder, load_ladder
from ladder_vae.evaluation.folders import check_absent, evaluation_folder
from ladder_vae.evaluation.ood import (
    Roc,
    bound_columns,
    is_ratio,
    outlier_scores,
    roc,
    write_scores,
)
from ladder_vae.evaluation.options import (
    add_bound_options,
    add_ladder_options,
    choose_images,
    parse,
)
from ladder_vae.evaluation.scoring import ProgressFile
from ladder_vae.reports.charts import draw_roc
from ladder_vae.reports.html import update_evaluation_report
from ladder_vae.runs.command_line import OneLineParser
from runtime.device import enough_memory, keep_freed_memory
from runtime.distributed import Ranks, joined_ranks
from runtime.errors import UserError, run_command
from runtime.files import write_json

# What to do after an interruption, or after one of several processes has died.
ADVICE = "; the same command continues the scoring"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m tools.score_images",
        description="Compute bounds on the log-likelihood of given images.",
    )
    add_ladder_options(parser)
    parser.add_argument("images", metavar="IMAGES", help="a data set, or a folder of images")
    add_bound_options(parser)
    parser.add_argument(
        "--against",
        metavar="IMAGES",
        help="also score these images, and report the AUROC of separating them from IMAGES",
    )
    parser.add_argument(
        "--prior-layers",
        type=int,
        nargs="+",
        metavar="K",
        help="also compute the bound with the lowest K layers drawn from their priors, and the "
        "log-likelihood ratio to it (default: half of the layers)",
    )
    return parse(parser, argv)


def choose_prior_layers(given: Sequence[int] | None, depth: int) -> list[int]:
    """The numbers of layers to draw from their priors: `given`, or half of the layers.

    Raises `UserError` for numbers that are not between 1 and `depth` - 1.
    """
    if given is None:
        return [depth // 2] if depth > 1 else []
    if depth == 1:
        raise UserError("--prior-layers needs two layers or more, and the ladder has one")
    if wrong := [k for k in given if not 1 <= k < depth]:
        raise UserError(f"--prior-layers is {wrong[0]}; it must be from 1 to {depth - 1}")
    return list(given)


class Given(NamedTuple):
    """A set of images, and what it is called."""

    images: ImageSet
    files: Sequence[str] | None  # names of a folder's files
    source: str  # on the command line
    label: str  # in names of files


def label_of(source: str) -> str:
    """The part of a file's name that stands for a data set or a folder; no two share one."""
    if source in datasets.NAMES:
        return source
    path = Path(source).expanduser().resolve()
    checksum = hashlib.sha256(os.fsencode(path)).hexdigest()[:8]
    return f"{path.name[:24]}-{checksum}"  # short enough for the name of a file with two of them


@dataclass(frozen=True)
class Scores:
    """The bounds of one set of images."""

    given: Given
    labels: Sequence[str] | Sequence[int]  # file names, or numbers in the split
    columns: Mapping[str, np.ndarray]  # from `bound_columns`
    progress: Sequence[ProgressFile]  # to remove when the scores are saved


def score_set(
    ladder: EvaluatedLadder,
    given: Given,
    folder: Path,
    *,
    samples: Sequence[int],
    layers: Sequence[int],
    batch_size: int,
    seed: int,
    limit: int | None,
    ranks: Ranks,
) -> Scores:
    """The bounds of a set: in full, and for each k in `layers` with k layers from their priors."""
    images, files = given.images, given.files
    index = choose_images(images, limit, seed)
    scored = {
        k: ladder.score(
            images,
            index,
            samples,
            folder,
            batch_size=batch_size,
            seed=seed,
            from_prior=k,
            ranks=ranks,
        )
        for k in (0, *layers)
    }
    bounds = {k: bounds for k, (bounds, _) in scored.items()}
    columns = bound_columns(bounds.pop(0), bounds)
    labels = index.tolist() if files is None else [files[i] for i in index.tolist()]
    return Scores(given, labels, columns, [progress for _, progress in scored.values()])


def print_scores(scores: Scores, path: Path) -> None:
    images = scores.given.images
    print(f"{images.name}, {len(scores.labels):,} {images.split} images: {path}")
    for name, values in scores.columns.items():
        print(f"  {name:<24}{values.mean():>12.2f} nats (mean)")


def separate(
    inliers: Scores, outliers: Scores, samples: int, path: Path
) -> tuple[str, dict[str, Roc]]:
    """Draw how well each score separates two sets; returns a title and the curves by score."""
    inlying, outlying = (outlier_scores(scores.columns) for scores in (inliers, outliers))
    curves = {name: roc(inlying[name], outlying[name]) for name in inlying}
    names = [scores.given.images.name for scores in (outliers, inliers)]
    if names[0] == names[1]:
        names = [scores.given.source for scores in (outliers, inliers)]
    title = f"Separating {names[0]} from {names[1]}"
    drawn = [f"bound_{samples}", *(name for name in curves if is_ratio(name))]
    points = {
        name: (curve.false_positive_rate, curve.true_positive_rate, curve.auroc)
        for name, curve in curves.items()
        if name in drawn
    }
    draw_roc(path, points, title=title)
    return title, curves


def print_curves(title: str, curves: Mapping[str, Roc], paths: Sequence[Path]) -> None:
    print(f"{title}: AUROC")
    for name, curve in curves.items():
        error = "" if curve.standard_error is None else f" ± {curve.standard_error:.4f}"
        print(f"  {name:<24}{curve.auroc:>12.4f}{error}")
    print(f"metrics   {', '.join(map(str, paths))}")


def load_sets(
    ladder: EvaluatedLadder, names: Sequence[str], split: str, data_dir: Path
) -> list[Given]:
    """The images of each data set or folder; raises `UserError` if both are the same."""
    labels = [label_of(name) for name in names]
    if len(set(labels)) < len(labels):
        raise UserError(f"both sets are {names[0]}; give another to --against")
    sets = []
    for name, label in zip(names, labels, strict=True):
        if name in datasets.NAMES:
            images, files = ladder.images(split, data_dir, name), None
        else:
            images, files = ladder.images_in(Path(name))
        sets.append(Given(images, files, name, label))
    return sets


def output_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """The files that hold the scores of the sets called `names`, and how well they separate."""
    scores = [folder / f"scores-{name}.csv" for name in names]
    if len(names) < 2:
        return scores
    pair = "-".join(names)
    return [*scores, folder / f"auroc-{pair}.json", folder / f"roc-{pair}.png"]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    keep_freed_memory()
    memory = enough_memory("give a smaller number to --batch-size")
    with pyro.validation_enabled(False), joined_ranks(ADVICE) as ranks, memory:
        ladder = load_ladder(arguments, ranks.local_rank)
        folder = arguments.out or evaluation_folder(
            ladder.source.path, ladder.step, arguments.split
        )
        layers = choose_prior_layers(arguments.prior_layers, ladder.depth)
        names = [name for name in (arguments.images, arguments.against) if name is not None]
        batch_size = arguments.batch_size or ranks.share(ladder.batch_size)
        sets = load_sets(ladder, names, arguments.split, arguments.data_dir)
        with ranks.together():
            if ranks.is_first and not arguments.overwrite:
                check_absent(*output_files(folder, [given.label for given in sets]))
        found = [
            score_set(
                ladder,
                given,
                folder,
                samples=arguments.samples,
                layers=layers,
                batch_size=batch_size,
                seed=arguments.seed,
                limit=arguments.limit,
                ranks=ranks,
            )
            for given in sets
        ]
        if ranks.is_first:
            save(ladder, found, folder, arguments, batch_size)
    return 0


def save(
    ladder: EvaluatedLadder,
    found: Sequence[Scores],
    folder: Path,
    arguments: argparse.Namespace,
    batch_size: int,
) -> None:
    """Write and print all scores, and remove the progress files."""
    for scores in found:
        path = folder / f"scores-{scores.given.label}.csv"
        write_scores(path, scores.labels, scores.columns)
        print_scores(scores, path)
    if len(found) == 2:
        paths = output_files(folder, [scores.given.label for scores in found])[2:]
        title, curves = separate(found[0], found[1], arguments.samples[-1], paths[1])
        results = {
            "inliers": found[0].given.source,
            "outliers": found[1].given.source,
            "split": arguments.split,
            "auroc": {name: curve.auroc for name, curve in curves.items()},
            "standard_error": {name: curve.standard_error for name, curve in curves.items()},
            "seed": arguments.seed,
            "limit": arguments.limit,
            "batch_size": batch_size,
            **ladder.origin(),
        }
        write_json(paths[0], results)
        update_evaluation_report(folder, ladder.run)
        print_curves(title, curves, paths)
    for progress in (progress for scores in found for progress in scores.progress):
        progress.remove()


if __name__ == "__main__":
    run_command(main, ADVICE)
