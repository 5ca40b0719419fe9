"""One step of stochastic variational inference, and the moving average of the weights."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from elbo import FreeBitsELBO


@dataclass(frozen=True)
class StepMeans:
    """Means over the training steps since they were last read, in nats per image."""

    steps: int
    loss: float
    log_likelihood: float
    kl: list[float]  # layers bottom to top
    grad_norm: float

    @property
    def negative_elbo(self) -> float:
        """In training mode: with batch statistics and dropout."""
        return sum(self.kl) - self.log_likelihood


class MovingAverage:
    """Exponential moving average of a module's parameters and floating-point buffers.

    `module` is the averaged copy. The decay rises to `decay` over the first updates, as
    (1 + n) / (10 + n), so that the average does not remember the initial weights.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(source).requires_grad_(False).eval()
        self.decay = decay
        self.updates = 0
        pairs = list(zip(_tensors(self.module), _tensors(source), strict=True))
        self._floats = [(a, s) for a, s in pairs if a.is_floating_point()]
        self._counters = [(a, s) for a, s in pairs if not a.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the source's present weights."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, sources = zip(*self._floats, strict=True)
        torch._foreach_lerp_(averages, sources, 1 - decay)
        for counter, source in self._counters:
            counter.copy_(source)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and how many updates they have seen."""
        return {"weights": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over another average's state."""
        self.module.load_state_dict(state["weights"])
        self.updates = state["updates"]


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]


class SVI:
    """Steps of a free-bits ELBO module, behind the interface of `pyro.infer.SVI`.

    `loss_fn` is `FreeBitsELBO(...)(model, guide)`, Pyro's ELBOModule. Losses are in nats per image
    and stay on the device; `read` fetches the means of what a log shows, once for many steps.

    Args:
        clip_norm: the gradient is clipped to this global norm; 0 for never.
        skip_norm: a step whose gradient norm is above this, or not finite, is undone (weights and
            batch-norm statistics stay as they were) and counted in `skipped`; 0 for never. The
            decision is the host's, so that each step waits for the device.
        average: is updated after each step, where there is one.
    """

    def __init__(
        self,
        loss_fn: Any,
        optimizer: Optimizer,
        *,
        clip_norm: float = 0.0,
        skip_norm: float = 0.0,
        average: MovingAverage | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        self.elbo: FreeBitsELBO = loss_fn.elbo
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.skip_norm = skip_norm
        self.average = average
        self.skipped = 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._buffers = list(loss_fn.buffers())
        self._totals: Tensor | None = None
        self._steps = 0

    def step(self, x: Tensor) -> Tensor:
        """Take a gradient step on images x (N, C, H, W); returns the loss, free bits included."""
        # A forward pass that is not finite would stay in the batch-norm statistics.
        statistics = [buffer.clone() for buffer in self._buffers] if self.skip_norm else []
        loss = self.loss_fn(x) / len(x)
        loss.backward()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = get_total_norm(gradients)
        if self.skip_norm and not norm <= self.skip_norm:  # written so that nan is skipped
            self.skipped += 1
            for buffer, before in zip(self._buffers, statistics, strict=True):
                buffer.copy_(before)
        else:
            if self.clip_norm:
                clip_grads_with_norm_(self._parameters, self.clip_norm, norm)
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
            self._add(loss.detach(), norm)
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def evaluate_loss(self, x: Tensor) -> float:
        """The true negative ELBO of images x, in nats per image."""
        return self.elbo.loss(self.loss_fn.model, self.loss_fn.guide, x) / len(x)

    def _add(self, loss: Tensor, norm: Tensor) -> None:
        assert self.elbo.terms is not None
        terms = self.elbo.terms
        row = torch.cat([torch.stack([loss, terms.log_likelihood.mean(), norm]), terms.kl.mean(0)])
        self._totals = row if self._totals is None else self._totals + row
        self._steps += 1

    def peek(self) -> StepMeans | None:
        """Means over the steps since `read`; None where there were none, or all were skipped."""
        if self._totals is None:
            return None
        loss, log_likelihood, norm, *kl = (self._totals / self._steps).tolist()
        return StepMeans(self._steps, loss, log_likelihood, kl, norm)

    def read(self) -> StepMeans | None:
        """Like `peek`, and begins anew."""
        means = self.peek()
        self._totals, self._steps = None, 0
        return means
