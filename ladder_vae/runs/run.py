"""Run folders: a run's configuration and checkpoints.

    RUN/config.json             the configuration
    RUN/checkpoints/STEP.pt     the newest checkpoints, and the best one
    RUN/checkpoints/best.json   which checkpoint is best, by the ELBO of the held-out images
    RUN/eval/STEP/              evaluate.py's results for that step

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
        try:
            if content["format"] != FORMAT:
                raise UserError(
                    f"{file} was written by another version of this project (format "
                    f"{content['format']}; this version reads format {FORMAT})"
                )
            channels, height, width = content["image_shape"]
            if not all(type(size) is int and size > 0 for size in (channels, height, width)):
                raise ValueError(f"`image_shape` is {content['image_shape']}")
            config = RunConfig.from_dict(content["config"])
            return cls(path, config, (channels, height, width), dict(content["provenance"]))
        except KeyError as error:
            raise UserError(f"{file} does not describe a run: it has no {error}") from None
        except (TypeError, ValueError) as error:
            raise UserError(f"{file} does not describe a run: {error}") from None

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

    def checkpoint_path(self, step: int) -> Path:
        return self.path / "checkpoints" / f"{step}.pt"

    def checkpoint_steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        files = (self.path / "checkpoints").glob("*.pt")
        return sorted(int(file.stem) for file in files if re.fullmatch("[0-9]+", file.stem))

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

    @property
    def _best_path(self) -> Path:
        return self.path / "checkpoints" / "best.json"

    def best(self) -> tuple[int, float] | None:
        """Step and held-out negative ELBO (nats) of the best checkpoint; None if there is none."""
        if not self._best_path.exists():
            return None
        content = read_json(self._best_path)
        try:
            step, value = int(content["step"]), float(content["negative_elbo"])
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{self._best_path} is damaged; delete it, and training will write it again"
            ) from None
        return (step, value) if self.checkpoint_path(step).exists() else None

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

    def is_better(self, step: int, negative_elbo: float) -> bool:
        """Whether `negative_elbo`, of the held-out images after `step`, is the lowest so far."""
        best = self.best()
        better = best is None or best[0] == step or negative_elbo < best[1]
        return better and math.isfinite(negative_elbo)

    def mark_best(self, step: int, negative_elbo: float) -> None:
        """Record in best.json that the checkpoint of `step` is the best one."""
        write_json(self._best_path, {"step": step, "negative_elbo": negative_elbo})
        self._prune(step)

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
