"""Runs of a tiny ladder that the tests of training start, stop and compare."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train_svi
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.training.trainer import Trainer

# A ladder with everything that has a state: dropout, batch normalisation, a moving average, and
# changing KL weight and learning rate.
LADDER = (
    "--preset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --batch-size 32 --dropout 0.2 "
    "--test-batch-size 297 --beta-anneal 5 --lr-warmup 3 --lr-decay none --ema 0.9 --device cpu "
    "--tr-log-interv 3 --ts-log-interv 4 --ll-interv 5 --ll-samples 2 --ll-images 20"
).split()
# The run of the fixture `trained_run`: everything that a run folder can hold.
TRAINED_RUN = (
    "--preset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --batch-size 32 --ema 0.9 "
    "--test-batch-size 297 --beta-anneal 10 --device cpu --steps 30 --tr-log-interv 10 "
    "--ts-log-interv 15 --ll-interv 15 --ll-samples 2 --ckpt-interv 10 --keep-checkpoints 2"
).split()
RESUME = ["--resume", "run", "--device", "cpu"]


def train(*arguments: object) -> int:
    """Train in this process; returns the exit code."""
    return train_svi.main([str(argument) for argument in arguments])


def training_entries(folder: str | Path) -> list[dict[str, Any]]:
    """The log entries of training steps, without those of evaluations."""
    return [entry for entry in read_entries(Path(folder, "metrics.jsonl")) if "train/loss" in entry]


def after_step(monkeypatch: pytest.MonkeyPatch, do: Callable[[int], None]) -> None:
    """Call `do` with the number of steps after each training step."""
    original = Trainer.take_step

    def take_step(self: Trainer) -> None:
        original(self)
        do(self.step)

    monkeypatch.setattr(Trainer, "take_step", take_step)


def stopping(monkeypatch: pytest.MonkeyPatch, is_time: Callable[[int], bool]) -> None:
    """Send this process SIGTERM after some steps."""

    def stop(step: int) -> None:
        if is_time(step):
            os.kill(os.getpid(), signal.SIGTERM)

    after_step(monkeypatch, stop)


def shown_by_tensorboard(folder: str) -> dict[str, Any]:
    """What TensorBoard shows of a run: scalars, and the steps of pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guidance = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(folder, size_guidance=guidance).Reload()
    tags = events.Tags()
    shown = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    shown |= {tag: [e.step for e in events.Images(tag)] for tag in tags["images"]}
    del shown["train/images_per_second"]
    return shown
