"""Resuming a run: which options may change, which checkpoint to use, and when it is finished."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ladder_vae.runs.checkpoint import Damaged
from ladder_vae.runs.command_line import as_user_errors, flag
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.published import is_published
from ladder_vae.runs.run import Run
from ladder_vae.training.logger import bound_tag, elbo_tag
from ladder_vae.training.schedule import is_due
from ladder_vae.training.trainer import Trainer
from runtime.errors import UserError

# Options that may change when a run is resumed: its length, its monitoring, how it runs on this
# machine, and remedies for divergence.
CHANGEABLE = {
    "steps",
    "epochs",
    "max_minutes",
    "lr",
    "precision",
    "compile",
    "grad_clip",
    "grad_skip",
    "grad_spike",
    "tr_log_interv",
    "ts_log_interv",
    "ll_interv",
    "ll_samples",
    "ll_images",
    "test_batch_size",
    "ckpt_interv",
    "checkpoint_minutes",
    "keep_checkpoints",
    "sync_bn",
}


@dataclass(frozen=True)
class StoredRun:
    """What a run folder holds when a run is resumed."""

    run: Run
    state: dict[str, Any] | None  # the newest undamaged checkpoint; None if there is none yet
    damaged: list[Damaged]  # the errors of newer checkpoints

    @classmethod
    def open(cls, path: Path, changes: Mapping[str, Any], device: torch.device) -> "StoredRun":
        """Read a run folder, with some options changed.

        Raises `UserError` if an option cannot be changed, or if the folder is damaged.
        """
        run = cls.require_run(path)
        run = replace(run, config=changed_config(run.config, changes))
        run.best()  # if best.json is damaged, fail now and not at the first evaluation
        stored = cls(run, *run.newest_whole(device))
        if stored.state is None and "initial_weights" in run.provenance:
            raise UserError(
                f"{path} was interrupted before its initial weights were saved: delete it, and "
                "start it again with --init-from"
            )
        return stored

    @staticmethod
    def require_run(path: Path) -> Run:
        """The run in a folder; raises `UserError` if there is none, or published weights alone."""
        if is_published(path):
            raise UserError(
                f"{path} holds published weights, from which training cannot resume: start a new "
                f"run with --init-from {path}"
            )
        return Run.open(path)

    def report(self) -> None:
        """Print what the user should know before training continues."""
        if self.state is None:
            print(f"{self.run.path} has no checkpoint yet; starting again", file=sys.stderr)
            return
        for problem in self.damaged:
            print(f"warning: {problem}; resuming from step {self.state['step']}", file=sys.stderr)


def changed_config(stored: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The stored configuration with changes; raises `UserError` for any not in `CHANGEABLE`."""
    before = stored.options()
    with as_user_errors():
        changed = RunConfig.of(**(before | dict(changes)), own=stored.own)
    after = changed.options()
    for name in changes:
        if name not in CHANGEABLE and after[name] != before[name]:
            raise UserError(
                f"{flag(name)} is {before[name]} in the run to resume and cannot be changed to "
                f"{after[name]}"
            )
    return changed


def is_finished(trainer: Trainer, run: Run) -> bool:
    """Whether a run has reached its length and logged all evaluations of its last step."""
    config, split = trainer.config, trainer.held_out.split
    tags = {elbo_tag(split)}
    if is_due(trainer.step, config.ll_interv):
        tags.add(bound_tag(split, config.ll_samples))
    entries = read_entries(run.path / "metrics.jsonl")
    logged = [entry.keys() for entry in entries if entry["step"] == trainer.step]
    return trainer.finished and tags <= set().union(*logged)
