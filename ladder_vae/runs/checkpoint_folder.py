"""Reading the checkpoints in a run folder."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ladder_vae.runs.checkpoint import read_checkpoint
from runtime.errors import UserError
from runtime.files import exists, names_in, read_json


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of the run folder `path`."""

    path: Path

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step}.pt"

    def checkpoint_steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = names_in(self.path / "checkpoints")
        return sorted(int(name[:-3]) for name in names if re.fullmatch(r"[0-9]+\.pt", name))

    @property
    def _best_path(self) -> Path:
        return self.path / "checkpoints" / "best.json"

    def best(self) -> tuple[int, float] | None:
        """Step and held-out negative ELBO (nats) of the best checkpoint; None if there is none."""
        if not exists(self._best_path):
            return None
        content = read_json(self._best_path)
        try:
            step, value = int(content["step"]), float(content["negative_elbo"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self._best_path} is damaged; delete it, and training will write it again"
            ) from None
        return (step, value) if exists(self.checkpoint_path(step)) else None

    def best_step(self) -> int | None:
        """The step of the best checkpoint; None if there is none."""
        best = self.best()
        return None if best is None else best[0]

    def step_called(self, name: str) -> int | None:
        """The step that a value of `--checkpoint` selects; None for "last".

        `name` is a step, "best" or "last". Raises `UserError` for anything else.
        """
        if name == "last":
            return None
        if name == "best":
            best = self.best_step()
            if best is None:
                raise UserError(f"{self.path} has no best checkpoint; use --checkpoint STEP")
            return best
        if not re.fullmatch("[0-9]{1,18}", name):
            raise UserError(f"--checkpoint is {name!r}; it must be a step, best or last")
        return int(name)

    def load_checkpoint(self, step: int | None, device: torch.device) -> dict[str, Any]:
        """The state after `step`, or the newest state if None.

        Raises `UserError` if there is no such checkpoint, and `Damaged` if it is damaged.
        """
        steps = self.checkpoint_steps()
        if not steps:
            raise UserError(f"{self.path} has no checkpoint yet; train the run first")
        if step is not None and step not in steps:
            raise UserError(
                f"{self.path} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
            )
        return read_checkpoint(self.checkpoint_path(steps[-1] if step is None else step), device)
