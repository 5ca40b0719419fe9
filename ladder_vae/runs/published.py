"""Published weights: one safetensors file for sharing a trained ladder.

Its metadata holds the configuration, the provenance and a checksum. The weights are those that
evaluation uses: the moving average if there is one. An evaluation of them gives the same digits as
one of the original run; training cannot resume from them.
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
from runtime.files import reading, write_atomically

# The entry of the file's metadata that describes the weights.
ENTRY = "ladder_vae"


def export_weights(run: Run, step: int | None, path: Path) -> int:
    """Write the weights after `step`, or the newest weights if None, to a safetensors file.

    Returns the step. Raises `UserError` if there is no such checkpoint or the disk is full.
    """
    state = run.load_checkpoint(step, torch.device("cpu"))
    average = state["average"]
    weights = state["weights"] if average is None else average["weights"]
    tensors = {name: value.contiguous() for name, value in weights.items()}
    description = run.description() | {"step": state["step"], "sha256": checksum(tensors)}
    content = safetensors.torch.save(tensors, {"format": "pt", ENTRY: json.dumps(description)})
    write_atomically(path, lambda file: file.write(content))
    return state["step"]


def read_published(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published file's description and weights; raises `UserError` for any other file.

    The weights are on the CPU, by their names in the state dict of the ELBO module.
    """
    try:
        with reading(path), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or not a safetensors file: {reason}") from None
    description = json.loads(metadata.get(ENTRY, "null"))
    if description is None:
        raise UserError(f"{path} was not written by tools.export_weights")
    if description["sha256"] != checksum(weights):
        raise UserError(f"{path} is damaged: its checksum does not match")
    return description, weights


def checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
