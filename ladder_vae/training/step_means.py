"""Means over training steps, summed on the device and read when the log is written."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ladder_vae.training.cuda_graph import Readback


@dataclass(frozen=True)
class StepMeans:
    """Means over the training steps since the last log entry, in nats per image."""

    steps: int
    loss: float  # the negative objective, with free bits and KL weight
    log_likelihood: float
    kl: list[float]  # layers bottom to top
    grad_norm: float  # before clipping

    @property
    def negative_elbo(self) -> float:
        """The negative ELBO in training mode: with batch statistics and dropout."""
        return sum(self.kl) - self.log_likelihood


class StepSums:
    """Running sums from which `StepMeans` are computed; `add` never waits for the device."""

    def __init__(self) -> None:
        # Number of steps, loss, log-likelihood, gradient norm, KL by layer: (4 + L,).
        self.totals: Tensor | None = None
        self._readback = Readback()

    def add(self, good: Tensor, summary: Tensor, norm: Tensor) -> None:
        """Add one step if `good`.

        Args:
            good, norm: 0-dimensional.
            summary: loss, log-likelihood and KL by layer, (2 + L,).
        """
        row = torch.cat([torch.stack([torch.ones_like(norm), *summary[:2], norm]), summary[2:]])
        row = torch.where(good, row, 0)  # a skipped step may hold nan
        if self.totals is None:
            self.totals = torch.zeros_like(row)
        self.totals += row

    def peek(self) -> StepMeans | None:
        """Means over the steps since `read`; None if there were none or all were skipped."""
        return _means(self.totals)

    def peek_behind(self) -> StepMeans | None:
        """Like `peek`, but never waits for the device: on a GPU the result is a few steps old."""
        return _means(None if self.totals is None else self._readback.latest(self.totals))

    def read(self) -> StepMeans | None:
        """Like `peek`, and resets the sums."""
        means = self.peek()
        if self.totals is not None:
            self.totals.zero_()
        return means


def _means(totals: Tensor | None) -> StepMeans | None:
    steps, *sums = [0.0] if totals is None else totals.tolist()
    if not steps:
        return None
    loss, log_likelihood, norm, *kl = (total / steps for total in sums)
    return StepMeans(int(steps), loss, log_likelihood, kl, norm)
