"""A run's length, and what changes with the steps: learning rate and KL weight."""

import math
from dataclasses import dataclass

from ladder_vae.runs.options import RunConfig


@dataclass(frozen=True)
class Length:
    """A run's length in steps and in minutes; None means no limit."""

    steps: int | None
    minutes: float | None

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int) -> "Length":
        """The length that `config` asks for; the smaller limit on steps counts."""
        limits = [config.steps, config.epochs * steps_per_epoch]
        steps = min((limit for limit in limits if limit), default=None)
        return cls(steps, config.max_minutes or None)

    def progress(self, step: int, minutes: float) -> float:
        """The fraction of the run that has passed, from 0 to 1; always 0 without a limit."""
        parts = [0.0]
        if self.steps is not None:
            parts.append(step / self.steps)
        if self.minutes is not None:
            parts.append(minutes / self.minutes)
        return min(max(parts), 1.0)


def learning_rate(config: RunConfig, step: int, progress: float) -> float:
    """The learning rate: linear warm-up over `lr_warmup` steps, times decay over the run."""
    warmup = min(1.0, (step + 1) / (config.lr_warmup + 1))
    decay = (1 + math.cos(math.pi * progress)) / 2 if config.lr_decay == "cosine" else 1.0
    return config.lr * warmup * decay


def kl_weight(config: RunConfig, step: int) -> float:
    """The KL weight, which increases linearly from 0 to 1 over the first `beta_anneal` steps."""
    return min(1.0, step / config.beta_anneal) if config.beta_anneal else 1.0


def is_due(step: int, interval: int) -> bool:
    """Whether something done every `interval` steps (0: never) is due after `step`."""
    return interval > 0 and step % interval == 0
