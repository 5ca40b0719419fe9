"""One step of stochastic variational inference, behind the interface of `pyro.infer.SVI`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from ladder_vae.networks.precision import Execution
from ladder_vae.training.moving_average import MovingAverage
from ladder_vae.training.step_means import StepSums
from ladder_vae.training.update_guard import Snapshot, UpdateGuard


class SVI:
    """Gradient steps on a free-bits ELBO module. Losses are in nats per image.

    `loss_fn` is Pyro's ELBOModule, `FreeBitsELBO(...)(model, guide)`. A step whose loss or gradient
    norm is not finite is skipped: weights, optimizer state, batch-norm statistics and average stay
    unchanged, and `guard` counts it. `skip_norm` and `spike` make it skip more (`UpdateGuard`).

    This is the plain step, which branches on the host: the fastest way on the CPU.
    `device_step.DeviceSVI` takes the same steps without ever waiting for a GPU.

    Args:
        clip_norm: clip the gradient to this global norm; 0 for never.
        skip_norm: skip updates whose gradient norm is above this; 0 for never.
        spike: skip updates whose gradient norm is above this many times the running median; 0 for
            never.
        average: a moving average of the weights to update after each step.
        execution: precision of the forward pass; prepare the networks with it first.
    """

    def __init__(
        self,
        loss_fn: Any,
        optimizer: Optimizer,
        *,
        clip_norm: float = 0.0,
        skip_norm: float = 0.0,
        spike: float = 0.0,
        average: MovingAverage | None = None,
        execution: Execution = Execution(),  # noqa: B008 (immutable)
    ) -> None:
        self.loss_fn = loss_fn
        self.elbo = loss_fn.elbo
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.average = average
        self.execution = execution
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.guard = UpdateGuard(self.device, skip_norm=skip_norm, spike=spike)
        self.sums = StepSums()
        self.learning_rate = float(optimizer.param_groups[0]["lr"])
        self.kl_weight = float(self.elbo.kl_weight)
        # Processes that share each batch replace these two (`data_parallel.Replicas.attach`).
        self.forward: Callable[[Tensor], Tensor] = loss_fn
        self.reduce: Callable[[Tensor], Tensor] = lambda summary: summary
        self._buffers = list(loss_fn.buffers())

    def step(self, x: Tensor) -> Tensor:
        """Take a gradient step on images x (N, C, H, W); return the negative objective."""
        self.optimizer.zero_grad(set_to_none=True)
        statistics = Snapshot(self._buffers)  # even a pass whose loss is nan changes them
        with self.execution.autocast(self.device):
            loss = self.forward(x) / len(x)
        loss.backward()
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        summary = self.reduce(self._summary(loss.detach()))
        good = self.guard.judge(summary[0], norm)
        self._update_if(good, norm, statistics)
        self.sums.add(good, summary, norm)
        return summary[0]

    def _summary(self, loss: Tensor) -> Tensor:
        """Loss, log-likelihood and KL by layer, averaged over the batch: (2 + L,)."""
        terms = self.elbo.terms
        return torch.cat([torch.stack([loss, terms.log_likelihood.mean()]), terms.kl.mean(0)])

    def _update_if(self, good: Tensor, norm: Tensor, statistics: Snapshot) -> None:
        if not good:
            statistics.restore_unless(good)
            return
        self._apply_gradient(norm)
        if self.average is not None:
            self.average.update()

    def _apply_gradient(self, norm: Tensor) -> None:
        if self.clip_norm:
            clip_grads_with_norm_(self.parameters, self.clip_norm, norm)
        self.optimizer.step()

    @torch.no_grad()
    def evaluate_loss(self, x: Tensor) -> float:
        """The true negative ELBO of images x (N, C, H, W), in nats per image."""
        return self.elbo.loss(self.loss_fn.model, self.loss_fn.guide, x) / len(x)

    def maximise(self, elbo: Any) -> None:
        """Take the following steps on the objective `elbo`."""
        self.loss_fn.elbo = self.elbo = elbo

    def schedule(self, learning_rate: float, kl_weight: float) -> None:
        """Set learning rate and KL weight of the following steps."""
        self.learning_rate, self.kl_weight = learning_rate, kl_weight
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.elbo.kl_weight = kl_weight

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides weights and average, on any kind of device."""
        optimizer = self.optimizer.state_dict()
        groups = [group | {"lr": self.learning_rate} for group in optimizer["param_groups"]]
        return {
            "optimizer": optimizer | {"param_groups": groups},
            "totals": self.sums.totals,
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], *, capturable: bool = False) -> None:
        """Continue from another SVI's `state_dict`, of any kind of device.

        `capturable` keeps the optimizer's state on the device, for optimizers that know the option.
        """
        optimizer = state["optimizer"]
        groups = [
            group | ({"capturable": capturable} if "capturable" in group else {})
            for group in optimizer["param_groups"]
        ]
        self.optimizer.load_state_dict(optimizer | {"param_groups": groups})
        totals = state["totals"]
        self.sums.totals = None if totals is None else totals.to(self.device, copy=True)
        self.guard.load_state_dict(state["guard"])
