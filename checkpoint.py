"""Run folders: a run's configuration and its checkpoints.

    RUN/config.json             the configuration
    RUN/checkpoints/STEP.pt     the newest few states of training
    RUN/eval/STEP/              what evaluate.py found at that step

Files appear under their final name only when they are whole. Nothing read from them runs code.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atomic import write_atomically
from config import Config
from errors import UserError

FORMAT = 1
# What a checkpoint holds besides its format. `average` is None without a moving average, and
# `optimizer` where there are weights alone.
STATE = {
    "step",
    "weights",
    "average",
    "optimizer",
    "minutes",
    "skipped",
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
    ) -> "Run":
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
    def open(cls, path: Path) -> "Run":
        """The run in a folder; raises `UserError` where there is none."""
        file = path / "config.json"
        try:
            content = json.loads(file.read_text())
        except OSError:
            raise UserError(f"{path} is not a run folder: it has no config.json") from None
        except ValueError as error:
            raise UserError(f"{file} is damaged: {error}") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
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
        content = {
            "format": FORMAT,
            "image_shape": list(self.image_shape),
            "config": self.config.to_dict(),
            "provenance": self.provenance,
        }
        write_json(self.path / "config.json", content)

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step}.pt"

    def checkpoint_steps(self) -> list[int]:
        """The steps of the checkpoints there are, rising."""
        names = (file.name for file in (self.path / "checkpoints").glob("*.pt"))
        return sorted(int(m[1]) for name in names if (m := re.fullmatch(r"(\d+)\.pt", name)))

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write the state of training after `step`, and remove all but the newest few."""
        content = state | {"format": FORMAT, "step": step}
        write_atomically(self.checkpoint_path(step), lambda file: torch.save(content, file))
        for old in self.checkpoint_steps()[: -self.config.keep_checkpoints]:
            self.checkpoint_path(old).unlink(missing_ok=True)

    def load_checkpoint(self, step: int | None, device: torch.device) -> dict[str, Any]:
        """The state after `step`, or the newest for None; raises `UserError` without one."""
        steps = self.checkpoint_steps()
        if not steps:
            raise UserError(f"{self.path} has no checkpoint yet; train it first")
        if step is not None and step not in steps:
            raise UserError(
                f"{self.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
            )
        path = self.checkpoint_path(steps[-1] if step is None else step)
        content = read_tensors(path, device)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path} is not a checkpoint of this project (format {FORMAT})")
        if missing := STATE - content.keys():
            raise UserError(f"{path} is not a checkpoint: it lacks {', '.join(sorted(missing))}")
        if type(content["step"]) is not int:
            raise UserError(f"{path} is not a checkpoint: its step is {content['step']!r}")
        average = content["average"]
        if average is not None and not (isinstance(average, dict) and "weights" in average):
            raise UserError(f"{path} is not a checkpoint: its average holds no weights")
        return content


def read_tensors(path: Path, device: torch.device) -> Any:
    """What `torch.save` wrote: tensors and plain values; raises `UserError` for anything else.

    No code in the file is run.
    """
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except Exception:  # the unpickler's errors are of many kinds, and speak to programmers
        raise UserError(
            f"{path} is damaged or not a checkpoint: it must hold tensors, saved by torch.save"
        ) from None


def load_weights(module: nn.Module, weights: Any) -> None:
    """Load a state dict; raises `UserError` where it is not one of `module`'s."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"the checkpoint does not fit the network in config.json: {reason}"
        ) from None
