"""Export the weights of a run as one safetensors file, to publish them.

    python -m tools.export_weights runs/mnist-12 --out mnist-12.safetensors

The file holds the weights that evaluation uses (the moving average if there is one), the run's
configuration and provenance, and a checksum.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from ladder_vae.runs.command_line import OneLineParser
from ladder_vae.runs.published import export_weights
from ladder_vae.runs.run import Run
from runtime.errors import run_command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m tools.export_weights",
        description="Export the weights of a run as one safetensors file.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--checkpoint", default="last", metavar="STEP", help="step, best or last (default: last)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", required=True, help="file to write, .safetensors"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    run = Run.open(arguments.run)
    step = export_weights(run, run.step_called(arguments.checkpoint), arguments.out)
    print(f"weights of step {step:,} in {arguments.out}")
    return 0


if __name__ == "__main__":
    run_command(main)
