"""One step of stochastic variational inference, and the moving average of the weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from ladder_vae.networks.precision import Execution
from ladder_vae.training.cuda_graph import Readback, StepGraph
from ladder_vae.training.data_parallel import Replicas
from ladder_vae.training.moving_average import MovingAverage
from ladder_vae.training.update_guard import Snapshot, UpdateGuard, zero_unless


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


class SVI:
    """Steps of a free-bits ELBO module, behind the interface of `pyro.infer.SVI`.

    `loss_fn` is `FreeBitsELBO(...)(model, guide)`, Pyro's ELBOModule. Losses are in nats per image
    and stay on the device; `read` fetches the means of what a log shows, once for many steps.

    A step whose loss or gradient norm is not finite is left out: weights, the optimizer's state,
    batch-norm statistics and the average stay as they were, and `guard` counts it. So is one that
    `skip_norm` or `spike` refuses (see `UpdateGuard`). On a GPU no step waits for this.

    Args:
        clip_norm: the gradient is clipped to this global norm; 0 for never.
        skip_norm: gradient norms above this are refused; 0 for never.
        spike: gradient norms above this many times the running median are refused; 0 for never.
        average: is updated after each step that counts, where there is one.
        execution: how the networks are run; prepare them with it first.
        recorded: on a GPU, record the step as a CUDA graph and replay it (see `step_graph`).
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
        execution: Execution = Execution(),  # noqa: B008 (cannot change)
        recorded: bool = False,
    ) -> None:
        self.loss_fn = loss_fn
        self.execution = execution
        # Where several ranks share each batch; losses and log are then of the whole of it.
        self.replicas: Replicas | None = None
        self.elbo = loss_fn.elbo
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.average = average
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._buffers = list(loss_fn.buffers())
        self._device = self._parameters[0].device
        self.guard = UpdateGuard(self._device, skip_norm=skip_norm, spike=spike)
        # On the CPU it need not wait for the numbers.
        self.host_decides = self._device.type == "cpu"
        self.learning_rate = float(optimizer.param_groups[0]["lr"])
        self.kl_weight = float(self.elbo.kl_weight)
        if not self.host_decides:
            self.keep_on_device()
        # Sums over the steps since `read`: how many, loss, log-likelihood, gradient norm, KL by
        # layer from the bottom; (4 + L,).
        self._totals: Tensor | None = None
        self._readback = Readback()
        self._recorded = recorded
        self._begin()

    def _begin(self) -> None:
        """From here on steps are those of the present weights and optimizer."""
        self._take = StepGraph(self._take_step) if self._recorded else self._take_step

    def keep_on_device(self) -> None:
        """Keep what changes from step to step where the weights are, if the optimizer knows how to.

        No step waits for the host then, nor the host for a step.
        """
        self.host_decides = False
        for group in self.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
                group["lr"] = torch.tensor(self.learning_rate, device=self._device)
        self.elbo.kl_weight = torch.tensor(self.kl_weight, device=self._device)

    def schedule(self, learning_rate: float, kl_weight: float) -> None:
        """Set the learning rate and KL weight of the steps from here on."""
        self.learning_rate, self.kl_weight = learning_rate, kl_weight
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        if isinstance(self.elbo.kl_weight, Tensor):
            self.elbo.kl_weight.fill_(kl_weight)
        else:
            self.elbo.kl_weight = kl_weight

    def step(self, x: Tensor) -> Tensor:
        """Take a gradient step on images x (N, C, H, W); returns the loss, free bits included.

        With `replicas`, x is this rank's part of the batch. The loss of a recorded step is
        overwritten by the next one.
        """
        return self._take(x)

    def _take_step(self, x: Tensor) -> Tensor:
        try:
            return self._updated(x)
        finally:  # also where a recording is broken off: its gradients were never computed
            self.optimizer.zero_grad(set_to_none=True)

    def _updated(self, x: Tensor) -> Tensor:
        # A forward pass that is not finite would stay in the batch-norm statistics.
        statistics = Snapshot(self._buffers)
        loss_fn = self.loss_fn if self.replicas is None else self.replicas.module
        with self.execution.autocast(self._device):
            loss = loss_fn(x) / len(x)
        loss.backward()
        norm = get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        means = self._means(loss.detach())
        good = self.guard.judge(means[0], norm)
        if not self.host_decides:
            statistics.restore_unless(good)
            self._update_if(good, norm)
        elif good:
            self._update(norm)
        else:
            statistics.restore_unless(good)
        self._add(good, means, norm)
        return means[0]

    def _update(self, norm: Tensor) -> None:
        self._apply_gradient(norm)
        if self.average is not None:
            self.average.update()

    def _update_if(self, good: Tensor, norm: Tensor) -> None:
        """As `_update` where `good`, and nothing else; the host does not know which."""
        state = self._optimizer_state()
        before = Snapshot([*self._parameters, *state])
        self._apply_gradient(norm)
        before.restore_unless(good)
        if not state:  # it comes into being with the first step, and begins at zero
            zero_unless(self._optimizer_state(), good)
        if self.average is not None:
            self.average.update(good)

    def _apply_gradient(self, norm: Tensor) -> None:
        if self.clip_norm:
            clip_grads_with_norm_(self._parameters, self.clip_norm, norm)
        self.optimizer.step()

    def _optimizer_state(self) -> list[Tensor]:
        state = self.optimizer.state
        return [
            value
            for parameter in self._parameters
            if parameter in state
            for value in state[parameter].values()
            if isinstance(value, Tensor)
        ]

    @torch.no_grad()
    def evaluate_loss(self, x: Tensor) -> float:
        """The true negative ELBO of images x, in nats per image."""
        return self.elbo.loss(self.loss_fn.model, self.loss_fn.guide, x) / len(x)

    def _means(self, loss: Tensor) -> Tensor:
        """Loss, log-likelihood and KL by layer of the batch, (2 + L,)."""
        assert self.elbo.terms is not None
        terms = self.elbo.terms
        row = torch.cat([torch.stack([loss, terms.log_likelihood.mean()]), terms.kl.mean(0)])
        return row if self.replicas is None else self.replicas.average(row)

    def _add(self, good: Tensor, means: Tensor, norm: Tensor) -> None:
        row = torch.cat([torch.stack([torch.ones_like(norm), *means[:2], norm]), means[2:]])
        row = torch.where(good, row, 0)  # its numbers may not be finite
        if self._totals is None:
            self._totals = torch.zeros_like(row)
        self._totals += row

    def peek(self) -> StepMeans | None:
        """Means over the steps since `read`; None where there were none, or all were skipped."""
        return _means(self._totals)

    def peek_behind(self) -> StepMeans | None:
        """The same as far as it is known without waiting for the device."""
        return _means(None if self._totals is None else self._readback.latest(self._totals))

    def read(self) -> StepMeans | None:
        """Like `peek`, and begins anew."""
        means = self.peek()
        if self._totals is not None:
            self._totals.zero_()
        return means

    def state_dict(self) -> dict[str, Any]:
        """The sums of `peek` and the guard's state; optimizer and average have their own."""
        return {"totals": self._totals, "guard": self.guard.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of another one with as many layers."""
        totals = state["totals"]
        self._totals = None if totals is None else totals.to(self._device, copy=True)
        self.guard.load_state_dict(state["guard"])
        self._begin()

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, for any kind of device."""
        state = self.optimizer.state_dict()
        groups = [group | {"lr": self.learning_rate} for group in state["param_groups"]]
        return state | {"param_groups": groups}

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the optimizer's state, which may come from another kind of device."""
        groups = [dict(group) for group in state["param_groups"]]
        for group in groups:
            if "capturable" in group:
                group["capturable"] = not self.host_decides
        self.optimizer.load_state_dict(state | {"param_groups": groups})
        if not self.host_decides:
            self.keep_on_device()
        self._begin()


def _means(totals: Tensor | None) -> StepMeans | None:
    steps, *sums = [0.0] if totals is None else totals.tolist()
    if not steps:
        return None
    loss, log_likelihood, norm, *kl = (total / steps for total in sums)
    return StepMeans(int(steps), loss, log_likelihood, kl, norm)
