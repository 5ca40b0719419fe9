"""Compare the evaluations of several runs in one table.

    python -m tools.compare runs/mnist-3 runs/mnist-12

Each argument is a run folder (its newest evaluation), the folder of an evaluation, or a
metrics.json. Prints the table as Markdown, and writes comparison.md and comparison.csv.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ladder_vae.reports.comparison import compare
from ladder_vae.runs.command_line import OneLineParser
from runtime.errors import run_command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m tools.compare",
        description="Compare the evaluations of several runs in one table.",
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folder (its newest evaluation), folder of an evaluation, or metrics.json",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="where to write comparison.md and comparison.csv (default: the current folder)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    print(compare(arguments.runs, arguments.out), end="")
    return 0


if __name__ == "__main__":
    run_command(main)
