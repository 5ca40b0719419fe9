"""Import weights that `tools.export_weights` wrote, as a run folder.

    python -m tools.import_weights mnist-12.safetensors --out runs/mnist-12-published

evaluate.py computes the same metrics for it as for the original run. Training cannot be resumed.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.runs.checkpoint import load_weights, weights_only
from ladder_vae.runs.command_line import OneLineParser
from ladder_vae.runs.published import read_published
from ladder_vae.runs.run import Run
from runtime.errors import run_command


def import_weights(path: Path, folder: Path) -> Run:
    """Make a run folder from an exported file; raises `UserError` if the file is invalid."""
    description, weights = read_published(path)
    described = Run.from_description(folder, description, path)
    ladder = FreeBitsELBO()(*build_ladder(described.config.ladder, described.image_shape))
    load_weights(ladder, weights)
    run = Run.create(folder, described.config, described.image_shape, described.provenance)
    run.save_checkpoint(description["step"], weights_only(weights))
    return run


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m tools.import_weights",
        description="Make a run folder from exported weights.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="exported weights")
    parser.add_argument("--out", type=Path, metavar="RUN", required=True, help="run folder to make")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    run = import_weights(arguments.file, arguments.out)
    print(f"run folder {run.path}; to evaluate it: python evaluate.py {run.path}")
    return 0


if __name__ == "__main__":
    run_command(main)
