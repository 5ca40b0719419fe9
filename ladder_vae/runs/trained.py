"""The weights of a trained ladder: of a run folder, a published folder or a published file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ladder_vae.runs.checkpoint_folder import CheckpointFolder
from ladder_vae.runs.description import Description, describing
from ladder_vae.runs.published import CONFIG, is_published, read_published
from runtime.errors import UserError
from runtime.files import exists, read_json


@dataclass(frozen=True)
class Source:
    """Where weights come from."""

    path: Path  # a run folder, a published folder or a published file
    description: Description
    step: int
    weights: str  # "average" or "last"
    minutes: float | None  # of training; None for imported weights


def load_trained(
    path: Path, checkpoint: str = "last", *, average: bool = True
) -> tuple[Source, dict[str, Tensor]]:
    """Where the weights at a path come from, and the weights, on the CPU.

    Args:
        path: a run folder, a published folder or a published file.
        checkpoint: a step, "best" or "last"; published weights are of a single step.
        average: the moving average of the weights, if there is one; false for the last weights.

    Raises:
        UserError: there are no such weights, or a file is damaged.
    """
    if is_published(path):
        return _published(path, checkpoint, average)
    if not exists(path):
        raise UserError(f"there is no run folder and no published ladder {path}")
    file = path / CONFIG
    if not exists(file):
        raise UserError(f"{path} is not a run folder: it has no {CONFIG}")
    content = read_json(file)
    description = Description.of(content, file)
    if "sha256" in content:
        raise UserError(
            f"{path} is a published ladder without its weights: it has no model.safetensors"
        )
    folder = CheckpointFolder(path)
    state = folder.load_checkpoint(folder.step_called(checkpoint), torch.device("cpu"))
    if average and state["average"] is not None:
        weights, kind = state["average"]["weights"], "average"
    else:
        weights, kind = state["weights"], "last"
    return Source(path, description, state["step"], kind, state["minutes"]), weights


def _published(path: Path, checkpoint: str, average: bool) -> tuple[Source, dict[str, Tensor]]:
    content, weights = read_published(path)
    file = path / CONFIG if path.is_dir() else path
    description = Description.of(content, file)
    with describing(file):
        step, kind, minutes = int(content["step"]), str(content["weights"]), content["minutes"]
    if checkpoint not in ("last", str(step)):
        raise UserError(
            f"--checkpoint is {checkpoint} but {path} has the weights of step {step} alone"
        )
    if kind == "average" and not average:
        raise UserError(f"{path} has the moving average of the weights alone, not the last weights")
    return Source(path, description, step, kind, minutes), weights
