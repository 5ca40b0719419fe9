"""Run folders: a run's configuration and its checkpoints.

    RUN/config.json             the configuration
    RUN/checkpoints/STEP.pt     the newest states of training, and the best
    RUN/checkpoints/best.json   names the best one by the ELBO of the held-out images
    RUN/eval/STEP/              an evaluation by evaluate.py at that step

A file appears under its final name only when it is complete.
"""

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ladder_vae.runs.checkpoint import FORMAT, Damaged, read_checkpoint, write_checkpoint
from ladder_vae.runs.options import RunConfig
from runtime.errors import UserError
from runtime.files import read_json, write_json


@dataclass(frozen=True)
class Run:
    """A run folder and the configuration in it."""

    path: Path
    config: RunConfig
    image_shape: tuple[int, int, int]
    provenance: dict[str, Any]  # code and machine at the start of the run

    @classmethod
    def create(
        cls,
        path: Path,
        config: RunConfig,
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
        """The run in a folder; raises `UserError` if there is none."""
        file = path / "config.json"
        if not file.exists():
            raise UserError(f"{path} is not a run folder: it has no config.json")
        return cls.from_description(path, read_json(file), file)

    @classmethod
    def from_description(cls, path: Path, content: Any, file: Path) -> Self:
        """The run of a `description` read from `file`; raises `UserError` if it is invalid."""
        try:
            if content["format"] != FORMAT:
                raise UserError(
                    f"{file} is of another version of this project (format {content['format']}; "
                    f"this version reads format {FORMAT})"
                )
            channels, height, width = content["image_shape"]
            if not all(type(size) is int and size > 0 for size in (channels, height, width)):
                raise ValueError(f"`image_shape` is {content['image_shape']}")
            config = RunConfig.from_dict(content["config"])
            return cls(path, config, (channels, height, width), dict(content["provenance"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} does not describe a run: {error!r}") from None

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
        """The steps that have a checkpoint, ascending."""
        files = (self.path / "checkpoints").glob("*.pt")
        return sorted(int(file.stem) for file in files if re.fullmatch("[0-9]+", file.stem))

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write the state of training after `step`, and remove all but the newest and the best."""
        write_checkpoint(self.checkpoint_path(step), state | {"step": step})
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
        """Step and held-out negative ELBO (nats) of the best checkpoint; None without one."""
        if not self._best_path.exists():
            return None
        content = read_json(self._best_path)
        try:
            step, value = int(content["step"]), float(content["negative_elbo"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self._best_path} is damaged; remove it, and training finds the best again"
            ) from None
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
