"""Run folders: a run's configuration and its checkpoints.

    RUN/config.json             the configuration
    RUN/checkpoints/STEP.pt     the newest few states of training, and the best
    RUN/checkpoints/best.json   which one is the best, by the held-out images
    RUN/eval/STEP/              what evaluate.py found at that step

Files appear under their final name only when they are whole. Nothing read from them runs code.

A checkpoint is what `torch.save` writes, a zip archive, with the SHA-256 of that as the archive's
comment: `torch.load` reads it as any other, and damage is noticed here.
"""

import hashlib
import io
import json
import math
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

import pieces
from atomic import write_atomically
from config import Config
from errors import UserError

FORMAT = 2
# Format 1 had no checksum, and of what a log shows only the skipped updates.
READABLE = (1, FORMAT)
# What a checkpoint holds besides its format. `average` is None without a moving average; weights
# alone, which cannot be trained further, have None for all that comes after it.
STATE = {
    "step",
    "weights",
    "average",
    "optimizer",
    "minutes",
    "log",
    "cpu_random_state",
    "cuda_random_state",
}


def to_json(value: Any, indent: int | None = None) -> str:
    """`value` as JSON; figures that are not finite, which JSON cannot hold, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, lambda file: file.write(f"{to_json(value, indent=2)}\n".encode()))


class Damaged(UserError):  # noqa: N818 (says what the file is)
    """A checkpoint is not what was written."""


@dataclass(frozen=True)
class Run:
    """A run folder and what it was made with."""

    path: Path
    config: Config
    image_shape: tuple[int, int, int]
    provenance: dict[str, Any]  # code and machine that the run began with

    @classmethod
    def create(
        cls,
        path: Path,
        config: Config,
        image_shape: tuple[int, int, int],
        provenance: dict[str, Any],
    ) -> Self:
        """Begin a run in a new or empty folder; raises `UserError` for any other."""
        if (path / "config.json").exists():
            raise UserError(
                f"{path} holds another run; give another folder to --out, "
                f"or continue that run with --resume {path}"
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is not an empty folder; give a new folder to --out")
        run = cls(path, config, image_shape, provenance)
        run.write_config()
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """The run in a folder; raises `UserError` where there is none."""
        file = path / "config.json"
        try:
            content = json.loads(file.read_text())
        except OSError:
            raise UserError(f"{path} is not a run folder: it has no config.json") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is damaged: {error}") from None
        return cls.from_description(path, content, file)

    @classmethod
    def from_description(cls, path: Path, content: Any, file: Path) -> Self:
        """The run of a `description` read from `file`; raises `UserError` where it is not one."""
        version = content.get("format") if isinstance(content, dict) else None
        if type(version) is not int or version not in READABLE:
            raise UserError(f"{file} is not of this version of the project (format {FORMAT})")
        shape = content.get("image_shape")
        if not (
            isinstance(shape, list)
            and len(shape) == 3
            and all(type(size) is int and size > 0 for size in shape)
        ):
            raise UserError(f"{file}: image_shape must be three positive whole numbers")
        try:
            config = Config.from_dict(content.get("config"))
        except UserError as error:
            raise UserError(f"{file}: {error}") from None
        provenance = content.get("provenance")
        if not isinstance(provenance, dict):
            raise UserError(f"{file}: provenance must be an object")
        return cls(path, config, (shape[0], shape[1], shape[2]), provenance)

    def write_config(self) -> None:
        """Write config.json, as it is now."""
        write_json(self.path / "config.json", self.description())

    def description(self) -> dict[str, Any]:
        """What config.json holds."""
        return {
            "format": FORMAT,
            "image_shape": list(self.image_shape),
            "config": self.config.to_dict(),
            "provenance": self.provenance,
        }

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step}.pt"

    def checkpoint_steps(self) -> list[int]:
        """The steps of the checkpoints there are, whole or in pieces, rising."""
        names = {file.name for file in (self.path / "checkpoints").glob("*.pt*")}
        steps = (int(m[1]) for name in names if (m := re.match(r"(\d+)\.pt", name)))
        return sorted({step for step in steps if pieces.is_there(self.checkpoint_path(step))})

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write the state of training after `step`, and remove all but the newest and the best."""
        write_checkpoint(self.checkpoint_path(step), state | {"format": FORMAT, "step": step})
        self._prune(step)

    def _prune(self, step: int) -> None:
        # Later ones, if any, are of a course that the run has turned back from and comes to again.
        passed = [old for old in self.checkpoint_steps() if old <= step]
        best = self.best_step()
        for old in passed[: -self.config.keep_checkpoints]:
            if old != best:
                with suppress(OSError):  # one too many does no harm
                    self.checkpoint_path(old).unlink()

    @property
    def _best_path(self) -> Path:
        return self.path / "checkpoints" / "best.json"

    def best(self) -> tuple[int, float] | None:
        """The step of the best checkpoint and its held-out negative ELBO in nats; None without one.

        Raises `UserError` where the file that says so is damaged.
        """
        try:
            content = json.loads(self._best_path.read_text())
            step, value = content["step"], content["negative_elbo"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            step = value = None
        if type(step) is not int or not isinstance(value, float) or not math.isfinite(value):
            raise UserError(f"{self._best_path} is damaged; remove it, and the best is found anew")
        return (step, value) if self.checkpoint_path(step).exists() else None

    def best_step(self) -> int | None:
        """The step of the best checkpoint by the held-out images' ELBO; None without one."""
        best = self.best()
        return None if best is None else best[0]

    def step_called(self, name: str) -> int | None:
        """The step of the checkpoint that the command line calls `name`; None for the newest.

        `name` is a step, best or last. Raises `UserError` for any other, and without a best one.
        """
        if name == "last":
            return None
        if name == "best":
            best = self.best_step()
            if best is None:
                raise UserError(f"{self.path} has no best checkpoint; give a step to --checkpoint")
            return best
        if not re.fullmatch("[0-9]{1,18}", name):
            raise UserError(f"--checkpoint is {name!r}; it must be a step, best or last")
        return int(name)

    def is_better(self, step: int, negative_elbo: float) -> bool:
        """Whether the weights after `step` are the best so far, by the held-out negative ELBO."""
        best = self.best()
        better = best is None or best[0] == step or negative_elbo < best[1]
        return better and math.isfinite(negative_elbo)

    def mark_best(self, step: int, negative_elbo: float) -> None:
        """Keep the checkpoint of `step` as the best one, in the place of the one before."""
        write_json(self._best_path, {"step": step, "negative_elbo": negative_elbo})
        self._prune(step)

    def load_checkpoint(self, step: int | None, device: torch.device) -> dict[str, Any]:
        """The state after `step`, or the newest for None; raises `UserError` without one.

        Raises `Damaged` where it is not what was written.
        """
        steps = self.checkpoint_steps()
        if not steps:
            raise UserError(f"{self.path} has no checkpoint yet; train it first")
        if step is not None and step not in steps:
            raise UserError(
                f"{self.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
            )
        return read_checkpoint(self.checkpoint_path(steps[-1] if step is None else step), device)

    def newest_whole(self, device: torch.device) -> tuple[dict[str, Any] | None, list[Damaged]]:
        """The newest state that is not damaged, and what is wrong with those after it.

        None where the run was ended before its first checkpoint. Raises `Damaged` where all are.
        """
        found: list[Damaged] = []
        for step in reversed(self.checkpoint_steps()):
            try:
                return self.load_checkpoint(step, device), found
            except Damaged as damaged:
                found.append(damaged)
        if found:
            raise found[0]
        return None, []


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint and its checksum, atomically."""
    archive = checkpoint_bytes(content)
    write_atomically(path, lambda file: file.write(archive))


def checkpoint_bytes(content: dict[str, Any]) -> bytes:
    """What a checkpoint's file holds: its content and the checksum of that."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return _with_checksum(buffer.getvalue())


def read_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint's content; raises `Damaged`, or `UserError` for a file of another kind.

    The file may be in pieces. One of format 1 is taken as one of format 2, without what it does not
    hold.
    """
    try:
        archive = pieces.read(path)
    except pieces.DamagedPieces as damaged:
        raise Damaged(str(damaged)) from None
    checked = _has_checksum(path, archive)
    content = _loaded(path, io.BytesIO(archive), device)
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is not int or version not in READABLE:
        raise UserError(
            f"{path} is not a checkpoint of this project (format {FORMAT}; "
            f"format {READABLE[0]} is read too)"
        )
    if version == FORMAT and not checked:
        raise Damaged(f"{path} is damaged or not a checkpoint: its checksum is missing")
    if version != FORMAT:
        content = _migrated(content)
    if missing := STATE - content.keys():
        raise UserError(f"{path} is not a checkpoint: it lacks {', '.join(sorted(missing))}")
    if type(content["step"]) is not int or content["step"] < 0:
        raise UserError(f"{path} is not a checkpoint: its step is {content['step']!r}")
    for name in ("average", "optimizer", "log"):
        if content[name] is not None and not isinstance(content[name], dict):
            raise UserError(f"{path} is not a checkpoint: its {name} is no dictionary")
    if content["average"] is not None and "weights" not in content["average"]:
        raise UserError(f"{path} is not a checkpoint: its average holds no weights")
    return content


def _migrated(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint of format 1 as one of format 2."""
    guard = {"norms": None, "taken": 0, "skipped": content.get("skipped"), "spikes": 0}
    return content | {"log": {"totals": None, "guard": guard}}


# A zip archive ends with the length of its comment in two bytes, and the comment.
_COMMENT = b"sha256:"
_COMMENT_LENGTH = len(_COMMENT) + 64


def _with_checksum(archive: bytes) -> bytes:
    """A zip archive without comment, with its SHA-256 as its comment."""
    comment = _COMMENT + hashlib.sha256(archive).hexdigest().encode()
    return archive[:-2] + _COMMENT_LENGTH.to_bytes(2, "little") + comment


def _has_checksum(path: Path, content: bytes) -> bool:
    """Whether a file carries its checksum; raises `Damaged` where it is that of another content."""
    archive, comment = content[:-_COMMENT_LENGTH], content[-_COMMENT_LENGTH:]
    if not comment.startswith(_COMMENT):
        return False
    if _with_checksum(archive[:-2] + bytes(2)) != content:
        raise Damaged(f"{path} is damaged or not a checkpoint: its checksum is that of another")
    return True


def read_tensors(path: Path, device: torch.device) -> Any:
    """What `torch.save` wrote: tensors and plain values; raises `Damaged` for anything else.

    No code in the file is run.
    """
    return _loaded(path, path, device)


def _loaded(path: Path, file: Path | io.BytesIO, device: torch.device) -> Any:
    """As `read_tensors`, from `file`, which messages call `path`."""
    try:
        with warnings.catch_warnings(action="ignore"):  # they, too, speak to programmers
            return torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception:  # the unpickler's errors are of many kinds, and speak to programmers
        raise Damaged(
            f"{path} is damaged or not a checkpoint: it must hold tensors, saved by torch.save"
        ) from None


def load_weights(module: nn.Module, weights: Any) -> None:
    """Load a state dict; raises `UserError` where it is not one of `module`'s."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError, LookupError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"the checkpoint does not fit the network in config.json: {reason}"
        ) from None
