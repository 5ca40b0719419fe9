"""Write RUN/report.html: metrics, learning curves and pictures of a training run.

    python -m tools.report runs/mnist-12

Can be called during training and after it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ladder_vae.reports.html import write_training_report
from ladder_vae.runs.command_line import OneLineParser
from ladder_vae.runs.run import Run
from runtime.errors import run_command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m tools.report",
        description="Write RUN/report.html: metrics, learning curves and pictures of a training "
        "run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train_svi.py")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    print(f"report    {write_training_report(Run.open(arguments.run))}")
    return 0


if __name__ == "__main__":
    run_command(main)
