"""How long a run is, and what changes over it: learning rate and KL weight."""

import math
from dataclasses import dataclass

from ladder_vae.runs.options import RunConfig


@dataclass(frozen=True)
class Length:
    """A run's length, in steps and minutes; None where there is no such bound."""

    steps: int | None
    minutes: float | None

    @classmethod
    def of(cls, config: RunConfig, steps_per_epoch: int) -> "Length":
        """The length that `config` asks for; of several bounds on steps the first counts."""
        bounds = [config.steps, config.epochs * steps_per_epoch]
        return cls(min((b for b in bounds if b), default=None), config.max_minutes or None)

    def progress(self, step: int, minutes: float) -> float:
        """How much of the run has passed, from 0 to 1; 0 throughout for a run without bounds."""
        parts = [0.0]
        if self.steps is not None:
            parts.append(step / self.steps)
        if self.minutes is not None:
            parts.append(minutes / self.minutes)
        return min(max(parts), 1.0)


def learning_rate(config: RunConfig, step: int, progress: float) -> float:
    """Linear warm-up over `lr_warmup` steps, times the decay over the run's length."""
    warmup = min(1.0, (step + 1) / (config.lr_warmup + 1))
    decay = (1 + math.cos(math.pi * progress)) / 2 if config.lr_decay == "cosine" else 1.0
    return config.lr * warmup * decay


def kl_weight(config: RunConfig, step: int) -> float:
    """Rises linearly from 0 to 1 over the first `beta_anneal` steps."""
    return min(1.0, step / config.beta_anneal) if config.beta_anneal else 1.0
