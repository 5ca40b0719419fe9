"""Command-line options that the benchmarks share."""

import argparse
import os
from collections.abc import Sequence

from ladder_vae.runs.command_line import OneLineParser, add_options, at_least
from ladder_vae.runs.config_file import config_from
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from runtime.files import path_argument


def benchmark_parser(module: str, description: str) -> OneLineParser:
    """A parser for `python -m benchmarks.MODULE`."""
    return OneLineParser(prog=f"python -m benchmarks.{module}", description=description)


def config_of_text(options: str) -> RunConfig:
    """The configuration given by options as on the command line of train_svi.py."""
    parser = OneLineParser()
    add_options(parser)
    return config_from(parser.parse_args(options.split()))


def add_presets(parser: argparse.ArgumentParser, default: Sequence[str]) -> None:
    """Add `--presets`."""
    parser.add_argument(
        "--presets",
        nargs="+",
        choices=tuple(PRESETS),
        default=default,
        metavar="NAME",
        help=f"presets to measure (default: {' '.join(default)})",
    )


def add_repeats(parser: argparse.ArgumentParser, default: int) -> None:
    """Add `--repeats`."""
    parser.add_argument(
        "--repeats",
        type=at_least(1),
        default=default,
        metavar="N",
        help=f"number of turns; results are medians over them (default: {default})",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")


def add_data_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--data-dir`."""
    parser.add_argument(
        "--data-dir",
        type=path_argument,
        default=os.environ.get("LVAE_DATA", "data"),
        help="folder of the data sets (default: $LVAE_DATA, or data/)",
    )
