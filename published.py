"""Publish the weights of a run, and make a run folder of published ones.

    python published.py export runs/mnist-12 --out mnist-12.safetensors
    python published.py import mnist-12.safetensors --out runs/mnist-12-published

The file is in the safetensors format, with the configuration, the origin and a checksum in its
metadata. It holds the weights that evaluation uses, the moving average where there is one; they can
be scored to the same digits, and not be trained further.
"""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from atomic import write_atomically
from checkpoint import STATE, Run, load_weights
from config import OneLineParser
from elbo import FreeBitsELBO
from errors import UserError, run_command
from guide import build_ladder

# The entry of the file's metadata that says what the weights are.
ENTRY = "ladder_vae"


def export_weights(run: Run, step: int | None, path: Path) -> int:
    """Write the weights after `step`, or the newest for None, to a safetensors file.

    Returns the step. Raises `UserError` where there is no such checkpoint, or no room.
    """
    state = run.load_checkpoint(step, torch.device("cpu"))
    average = state["average"]
    weights = state["weights"] if average is None else average["weights"]
    try:
        tensors = {name: value.contiguous() for name, value in weights.items()}
        description = run.description() | {"step": state["step"], "sha256": checksum(tensors)}
        content = safetensors.torch.save(tensors, {"format": "pt", ENTRY: json.dumps(description)})
    except (AttributeError, RuntimeError, TypeError, ValueError, SafetensorError):
        raise UserError(f"the checkpoint of {run.path} does not hold weights") from None
    write_atomically(path, lambda file: file.write(content))
    return state["step"]


def import_weights(path: Path, folder: Path) -> Run:
    """Make a run folder of a file that `export_weights` wrote; raises `UserError` for any other."""
    description, weights = read_published(path)
    step, described = description.get("step"), Run.from_description(folder, description, path)
    if type(step) is not int or step < 0:
        raise UserError(f"{path}: its step is {step!r}; it must be a whole number")
    load_weights(FreeBitsELBO()(*build_ladder(described.config, described.image_shape)), weights)
    run = Run.create(folder, described.config, described.image_shape, described.provenance)
    run.save_checkpoint(step, dict.fromkeys(STATE) | {"weights": weights})
    return run


def read_published(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a published file says of its weights, and these; raises `UserError` for any other file.

    Weights are on the CPU, by their names in the state dict of the ELBO module.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or not a safetensors file: {reason}") from None
    try:
        description = json.loads(metadata[ENTRY])
    except (KeyError, ValueError, RecursionError):
        description = None
    if not isinstance(description, dict):
        raise UserError(f"{path} does not hold weights that published.py has exported")
    if description.get("sha256") != checksum(weights):
        raise UserError(f"{path} is damaged: its checksum is that of other weights")
    return description, weights


def checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights: names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="published.py",
        description="Publish the weights of a run, and make a run folder of published ones.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="export|import")
    export = actions.add_parser("export", help="write a run's weights to a file")
    export.add_argument("run", type=Path, metavar="RUN", help="run folder")
    export.add_argument(
        "--checkpoint", default="last", metavar="STEP", help="step, best or last (default: last)"
    )
    export.add_argument(
        "--out", type=Path, metavar="FILE", required=True, help="file to write, .safetensors"
    )
    importing = actions.add_parser("import", help="make a run folder of such a file")
    importing.add_argument("file", type=Path, metavar="FILE", help="published weights")
    importing.add_argument(
        "--out", type=Path, metavar="RUN", required=True, help="run folder to make"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.action == "export":
        run = Run.open(arguments.run)
        step = export_weights(run, run.step_called(arguments.checkpoint), arguments.out)
        print(f"weights of step {step:,} in {arguments.out}")
    else:
        run = import_weights(arguments.file, arguments.out)
        print(f"run folder {run.path}; score it with: python evaluate.py {run.path}")
    return 0


if __name__ == "__main__":
    run_command(main)
