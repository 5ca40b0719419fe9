"""Run folders: a run's configuration and checkpoints.

    RUN/config.json             the configuration
    RUN/checkpoints/STEP.pt     the newest checkpoints, and the best one
    RUN/checkpoints/best.json   which checkpoint is best, by the ELBO of the held-out images
    RUN/eval/STEP/              evaluate.py's results for that step

A file appears under its final name only when it is complete.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ladder_vae.runs.checkpoint import FORMAT, Damaged, write_checkpoint
from ladder_vae.runs.checkpoint_folder import CheckpointFolder
from ladder_vae.runs.description import Description, describing
from ladder_vae.runs.options import RunConfig
from runtime.errors import UserError
from runtime.files import read_json, write_json


@dataclass(frozen=True)
class Run(CheckpointFolder):
    """A run folder and the configuration in it."""

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
                f"{path} holds another run; choose another folder for --out, "
                f"or continue that run with --resume {path}"
            )
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} is not an empty folder; choose a new folder for --out")
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
        """The run whose `description` was read from `file`; raises `UserError` if it is invalid."""
        described = Description.of(content, file)
        with describing(file):
            config = RunConfig.from_dict(content["config"])
            return cls(path, config, described.image_shape, dict(content["provenance"]))

    def write_config(self) -> None:
        """Write config.json."""
        write_json(self.path / "config.json", self.description())

    def description(self) -> dict[str, Any]:
        """The content of config.json."""
        return {
            "format": FORMAT,
            "image_shape": list(self.image_shape),
            "config": self.config.to_dict(),
            "provenance": self.provenance,
        }

    def save_checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint, and remove all but the newest ones and the best."""
        write_checkpoint(self.checkpoint_path(step), state | {"step": step})
        self._prune(step)

    def _prune(self, step: int) -> None:
        # Later checkpoints exist if the run resumed from an older one; it will overwrite them.
        passed = [old for old in self.checkpoint_steps() if old <= step]
        best = self.best_step()
        for old in passed[: -self.config.keep_checkpoints]:
            if old != best:
                with suppress(OSError):  # an extra checkpoint does no harm
                    self.checkpoint_path(old).unlink()

    def is_better(self, step: int, negative_elbo: float) -> bool:
        """Whether `negative_elbo`, of the held-out images after `step`, is the lowest so far."""
        best = self.best()
        better = best is None or best[0] == step or negative_elbo < best[1]
        return better and math.isfinite(negative_elbo)

    def mark_best(self, step: int, negative_elbo: float) -> None:
        """Record in best.json that the checkpoint of `step` is the best one."""
        write_json(self._best_path, {"step": step, "negative_elbo": negative_elbo})
        self._prune(step)

    def newest_whole(self, device: torch.device) -> tuple[dict[str, Any] | None, list[Damaged]]:
        """The state of the newest undamaged checkpoint, and the errors of the newer ones.

        The state is None if there is no checkpoint. Raises `Damaged` if all are damaged.
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
