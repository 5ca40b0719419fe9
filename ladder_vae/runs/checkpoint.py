"""Checkpoint files: the state of training, with a checksum.

A checkpoint is a zip archive that `torch.save` wrote, whose comment holds its SHA-256. `torch.load`
reads it like any other archive, and `read_checkpoint` detects damage. Reading a checkpoint runs no
code from it.
"""

import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.files import reading, write_atomically

FORMAT = 3
# A zip archive ends with the length of its comment in two bytes, and the comment.
_COMMENT = b"sha256:"
_COMMENT_LENGTH = len(_COMMENT) + 64


class Damaged(UserError):  # noqa: N818 (describes the file)
    """A checkpoint file has changed since it was written."""


def weights_only(weights: dict[str, Tensor]) -> dict[str, Any]:
    """The state of a checkpoint that holds only weights, from which training cannot resume."""
    absent = ("average", "svi", "minutes", "cpu_random_state", "cuda_random_state")
    return {"weights": weights} | dict.fromkeys(absent)


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and its checksum, atomically."""
    buffer = io.BytesIO()
    torch.save(content | {"format": FORMAT}, buffer)
    archive = _with_checksum(buffer.getvalue())
    write_atomically(path, lambda file: file.write(archive))


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The content of a checkpoint.

    Raises `Damaged` if it has changed since it was written, and `UserError` if it cannot be read.
    """
    with reading(path):
        archive = path.read_bytes()
    if _with_checksum(archive[: -_COMMENT_LENGTH - 2] + bytes(2)) != archive:
        raise Damaged(f"{path} is damaged or not a checkpoint: its checksum does not match")
    content = load_tensors(io.BytesIO(archive), path, device)
    if content["format"] != FORMAT:
        raise UserError(
            f"{path} was written by another version of this project (format {content['format']}; "
            f"this version reads format {FORMAT})"
        )
    return content


def _with_checksum(archive: bytes) -> bytes:
    """Add to a zip archive without a comment its SHA-256 as the comment."""
    comment = _COMMENT + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + _COMMENT_LENGTH.to_bytes(2, "little") + comment


def load_tensors(file: Path | io.BytesIO, path: Path, device: torch.device) -> Any:
    """Read tensors and plain values that `torch.save` wrote into `file`.

    Raises `Damaged`, naming `path`, for anything else. Runs no code from the file.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # they are for developers
            return torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception as error:  # the unpickler raises many types
        raise Damaged(
            f"{path} is damaged or not a checkpoint: it must hold tensors, saved by torch.save"
        ) from error


def load_weights(module: nn.Module, weights: Any) -> None:
    """Load a state dict; raises `UserError` if it does not fit `module`."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"the weights do not fit the network in config.json: {reason}") from error
