"""Publish the weights of a run, in the layout of the Hugging Face hub.

    python -m tools.export_weights runs/mnist-12 --out mnist-12

Writes model.safetensors with the weights that evaluation uses (the moving average if there is one),
config.json with the run's configuration and provenance, and a model card README.md. The folder is
what Ladder.load, evaluate.py, sample.py and --init-from read, and what the hub shows.
"""

import argparse
from collections.abc import Sequence

from guide import build_ladder
from ladder_vae.evaluation.folders import check_absent
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.reports.model_card import model_card
from ladder_vae.runs.command_line import OneLineParser
from ladder_vae.runs.published import CONFIG, WEIGHTS, published_weights, write_folder
from ladder_vae.runs.run import Run
from runtime.errors import run_command
from runtime.files import path_argument, write_atomically

CARD = "README.md"


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="python -m tools.export_weights",
        description="Publish the weights of a run as a folder, in the layout of the Hugging Face "
        "hub.",
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="run folder")
    parser.add_argument(
        "--checkpoint", default="last", metavar="STEP", help="step, best or last (default: last)"
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="FOLDER", required=True, help="where to write"
    )
    parser.add_argument(
        "--license",
        default="apache-2.0",
        metavar="ID",
        help="the hub's name of the licence of the weights (default: apache-2.0)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a ladder that is already there"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    run, folder = Run.open(arguments.run), arguments.out
    if not arguments.overwrite:
        check_absent(*(folder / name for name in (WEIGHTS, CONFIG, CARD)))
    description, weights = published_weights(run, run.step_called(arguments.checkpoint))
    parameters = count_parameters(*build_ladder(run.config.ladder, run.image_shape))
    card = model_card(run, description, parameters, arguments.license)
    write_folder(folder, description, weights)
    write_atomically(folder / CARD, lambda file: file.write(card.encode()))
    print(f"weights of step {description['step']:,} in {folder}")
    return 0


if __name__ == "__main__":
    run_command(main)
