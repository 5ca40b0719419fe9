"""The command-line options that evaluate.py and the tools share."""

import argparse
import itertools
import os
from collections.abc import Sequence

from torch import Tensor

import datasets
from datasets import ImageSet
from ladder_vae.evaluation.annealed import Annealing
from ladder_vae.evaluation.folders import SAMPLES, SPLIT
from ladder_vae.evaluation.importance import random_index
from ladder_vae.networks.precision import COMPILE, PRECISIONS
from ladder_vae.runs.command_line import at_least
from runtime.errors import UserError
from runtime.files import path_argument


def random_seed(text: str) -> int:
    """The argparse type of a random seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{value} must be at least 0 and below 2**63")
    return value


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Add RUN, and what says which of its weights are used, where, and with which noise."""
    parser.add_argument(
        "run",
        type=path_argument,
        metavar="RUN",
        help="run folder of train_svi.py, or a folder or file of tools.export_weights",
    )
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="STEP",
        help="checkpoint to use: a step, best or last (default: last)",
    )
    parser.add_argument(
        "--average",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="use the moving average of the weights if the run has one (default: yes)",
    )
    parser.add_argument(
        "--seed",
        type=random_seed,
        default=0,
        metavar="N",
        help="random seed of all random numbers (default: 0)",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace results that are already there (default: refuse to)",
    )


def add_ladder_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `add_weights_options`, and which images are evaluated, and how."""
    add_weights_options(parser)
    parser.add_argument(
        "--split",
        choices=datasets.SPLITS,
        default=SPLIT,
        help=f"split of the data set (default: {SPLIT})",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FOLDER",
        help="where to write (default: RUN/eval/STEP, followed by the settings that are not the "
        "default, such as -valid-limit-10)",
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help="images times samples per pass (default: chosen by network and device)",
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
        type=path_argument,
        default=os.environ.get("LVAE_DATA", "data"),
        help="folder of the data sets (default: $LVAE_DATA, or data/)",
    )


def add_temperature_option(parser: argparse.ArgumentParser, where: str) -> None:
    """Add --temperature; `where` it applies."""
    parser.add_argument(
        "--temperature",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="T",
        help=f"factor on the prior's standard deviations{where}, one for all layers or one for "
        "each layer, bottom to top (default: 1)",
    )


def add_bound_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of importance-weighted bounds."""
    parser.add_argument(
        "--samples",
        type=at_least(1),
        nargs="+",
        default=list(SAMPLES),
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


def add_annealing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of annealed bounds."""
    parser.add_argument(
        "--ais",
        type=at_least(2),
        metavar="T",
        help="also compute annealed bounds with T temperatures (default: none)",
    )
    parser.add_argument(
        "--chains",
        type=at_least(1),
        metavar="C",
        help=f"chains for each image, for --ais (default: {Annealing.chains})",
    )
    parser.add_argument(
        "--sandwich",
        type=at_least(2),
        metavar="N",
        help="also bound the log-likelihood of N generated images from both sides, for --ais "
        "(default: none)",
    )


def annealing_of(arguments: argparse.Namespace) -> Annealing | None:
    """What --ais and --chains ask for; `UserError` for an option that needs --ais."""
    if arguments.ais is None:
        for name in ("chains", "sandwich"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name} needs a number of temperatures: add --ais T")
        return None
    return Annealing(
        arguments.ais, arguments.chains or Annealing.chains, generated=arguments.sandwich
    )


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a command line; raises `UserError` unless --samples ascends."""
    arguments = parser.parse_args(argv)
    if any(a >= b for a, b in itertools.pairwise(arguments.samples)):
        raise UserError(
            f"--samples is {' '.join(map(str, arguments.samples))}; give ascending numbers"
        )
    return arguments


def choose_images(images: ImageSet, limit: int | None, seed: int) -> Tensor:
    """The indices of `limit` random images, or of all if None; `UserError` if there are fewer."""
    if limit is not None and limit > len(images):
        raise UserError(f"--limit is {limit} but {images.split} has only {len(images)} images")
    return random_index(len(images), limit or len(images), seed)
