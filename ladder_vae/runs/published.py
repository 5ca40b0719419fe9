"""Publish the weights of a run, and make a run folder of published ones.

The file is in the safetensors format, with the configuration, the origin and a checksum in its
metadata. It holds the weights that evaluation uses, the moving average where there is one; they can
be scored to the same digits, and not be trained further.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ladder_vae.runs.run import Run
from runtime.errors import UserError
from runtime.files import write_atomically

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
