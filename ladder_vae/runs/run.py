"""Run folders: a run's configuration and checkpoints.

    RUN/config.json             the configuration
    RUN/checkpoints/STEP.pt     the newest checkpoints, and the best one
    RUN/checkpoints/best.json   which checkpoint is best, by the ELBO of the held-out images
    RUN/.lock                   which process trains the run, while it does
    RUN/eval/STEP/              evaluate.py's results for that step

A file appears under its final name only when it is complete.
"""

import itertools
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from ladder_vae.runs.checkpoint import FORMAT, Damaged, write_checkpoint
from ladder_vae.runs.checkpoint_folder import CheckpointFolder
from ladder_vae.runs.description import Description, describing
from ladder_vae.runs.options import RunConfig
from runtime.errors import UserError
from runtime.files import exists, names_in, path_argument, read_json, write_json, writing
from runtime.locks import Lock

_LOCK = ".lock"


@dataclass(frozen=True)
class Run(CheckpointFolder):
    """A run folder and the configuration in it."""

    config: RunConfig
    image_shape: tuple[int, int, int]
    provenance: dict[str, Any]  # code and machine at the start of the run
    lock: Lock | None = field(default=None, compare=False, repr=False)  # of this process
    is_new: bool = field(default=False, compare=False, repr=False)  # made by this process

    @classmethod
    def create(
        cls,
        path: Path,
        config: RunConfig,
        image_shape: tuple[int, int, int],
        provenance: dict[str, Any],
        *,
        numbered: bool = False,
    ) -> Self:
        """Begin a run in a new or empty folder, and lock it; raises `UserError` for any other.

        With `numbered`, a number is appended to the folder's name if another process has taken it.
        """
        if numbered:
            path = _new_folder(path)
        _require_empty(path)
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        _require_empty(path)  # no other process can begin a run there any more
        run = cls(path, config, image_shape, provenance, lock, is_new=True)
        try:
            run.write_config()
        except UserError:
            run.discard()
            raise
        return run

    def locked(self) -> Self:
        """This run, for this process alone to write; raises `UserError` if another one has it."""
        return replace(self, lock=_locked(self.path))

    def release(self) -> None:
        """Let other processes write the run."""
        if self.lock is not None:
            self.lock.release()

    def discard(self) -> None:
        """Delete a run that this process began and that has not taken a step."""
        for name in names_in(self.path):
            if name in ("config.json", "metrics.jsonl", _LOCK) or name.startswith("events.out."):
                with suppress(OSError):
                    (self.path / name).unlink()
        with suppress(OSError):
            self.path.rmdir()

    @classmethod
    def open(cls, path: Path) -> Self:
        """The run in a folder; raises `UserError` if there is none."""
        path = path_argument(os.fspath(path))
        file = path / "config.json"
        if not exists(file):
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


def _require_empty(path: Path) -> None:
    """Raise `UserError` unless a run can begin in a folder."""
    if exists(path / "config.json"):
        raise UserError(
            f"{path} holds another run; choose another folder for --out, "
            f"or continue that run with --resume {path}"
        )
    if not is_empty(path):
        raise UserError(f"{path} is not an empty folder; choose a new folder for --out")


def is_empty(path: Path) -> bool:
    """Whether there is nothing, or a folder that holds nothing but the lock of an ended process."""
    return not exists(path) or (path.is_dir() and set(names_in(path)) <= {_LOCK})


def _locked(path: Path) -> Lock:
    return Lock(path / _LOCK, f"the run in {path} is being written")


def _new_folder(path: Path) -> Path:
    """Make the folder `path`, or `path`-2, `path`-3 ... if that exists, for this process alone."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
            with suppress(FileExistsError):
                folder.mkdir()
                return folder
    raise AssertionError
