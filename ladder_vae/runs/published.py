"""Published weights: a trained ladder for sharing, as a folder or as one safetensors file.

    FOLDER/model.safetensors    the weights, and in its metadata the same description
    FOLDER/config.json          the description: a run's config.json, step, kind and checksum

The weights are those that evaluation uses: the moving average if there is one. Evaluation gives the
same digits as for the original run; training cannot resume from them, but can start from them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.errors import UserError
from runtime.files import exists, read_json, reading, write_atomically, write_json

if TYPE_CHECKING:
    from ladder_vae.runs.run import Run

WEIGHTS, CONFIG = "model.safetensors", "config.json"
# The entry of the file's metadata that describes the weights.
ENTRY = "ladder_vae"


def published_weights(run: "Run", step: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the weights to publish after `step`, or the newest for None.

    The description is that of the run with `step`, `weights` ("average" or "last"), `minutes` of
    training and `sha256`. Raises `UserError` if there is no such checkpoint.
    """
    state = run.load_checkpoint(step, torch.device("cpu"))
    average = state["average"]
    weights = state["weights"] if average is None else average["weights"]
    tensors = {name: value.contiguous() for name, value in weights.items()}
    description = run.description() | {
        "step": state["step"],
        "weights": "last" if average is None else "average",
        "minutes": state["minutes"],
        "sha256": checksum(tensors),
    }
    return description, tensors


def write_weights(path: Path, description: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
    """Write `published_weights` to a safetensors file."""
    content = safetensors.torch.save(weights, {"format": "pt", ENTRY: json.dumps(description)})
    write_atomically(path, lambda file: file.write(content))


def write_folder(folder: Path, description: Mapping[str, Any], weights: dict[str, Tensor]) -> None:
    """Write `published_weights` to a folder."""
    write_weights(folder / WEIGHTS, description, weights)
    write_json(folder / CONFIG, description)


def is_published(path: Path) -> bool:
    """Whether a path is a published folder, or a file and thus published or nothing."""
    if exists(path) and path.is_file():
        return True
    return path.suffix == ".safetensors" or exists(path / WEIGHTS)


def read_published(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and weights in a published folder or file; `UserError` for any other.

    The weights are on the CPU, by their names in the state dict of the ELBO module.
    """
    if path.is_dir():
        if not exists(path / CONFIG):
            raise UserError(f"{path} has no {CONFIG}, which describes the weights in {WEIGHTS}")
        _, weights = _read_file(path / WEIGHTS)
        description = read_json(path / CONFIG)
        wrong = f"{path / WEIGHTS} is damaged, or not the file that {CONFIG} beside it describes"
    else:
        description, weights = _read_file(path)
        wrong = f"{path} is damaged"
    if not isinstance(description, dict) or "sha256" not in description:
        raise UserError(f"{path} was not written by tools.export_weights")
    if description["sha256"] != checksum(weights):
        raise UserError(f"{wrong}: its checksum does not match")
    return description, weights


def _read_file(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """The description in a safetensors file's metadata, None without one, and its weights."""
    try:
        # By its descriptor: safetensors cannot open a name that is not UTF-8.
        with (
            reading(path),
            path.open("rb") as opened,
            safe_open(f"/dev/fd/{opened.fileno()}", framework="pt") as file,
        ):
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged or not a safetensors file: {reason}") from None
    return json.loads(metadata.get(ENTRY, "null")), weights


def checksum(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of weights."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
