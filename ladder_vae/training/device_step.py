"""A training step that never waits for the device, and can be recorded as a CUDA graph.

The decision whether an update counts, the learning rate and the KL weight are tensors on the
device. They are changed in place, so a replayed graph reads their current values.
"""

from typing import Any

import torch
from torch import Tensor

from ladder_vae.training.cuda_graph import CudaRecorder, StepGraph
from ladder_vae.training.svi import SVI
from ladder_vae.training.update_guard import Snapshot, zero_unless


class DeviceSVI(SVI):
    """`SVI` on a GPU: the same steps, to the bit, without synchronising with the host.

    Args:
        recorder: records the step as a CUDA graph, to be replayed; None for no graph. With a graph,
            the next step overwrites the returned loss.
        **options: as for `SVI`.
    """

    def __init__(
        self,
        loss_fn: Any,
        optimizer: torch.optim.Optimizer,
        *,
        recorder: CudaRecorder | None = None,
        **options: Any,
    ) -> None:
        super().__init__(loss_fn, optimizer, **options)
        self._recorder = recorder
        self._keep_on_device()

    def _keep_on_device(self) -> None:
        for group in self.optimizer.param_groups:
            if "capturable" in group:
                group["capturable"] = True
                group["lr"] = torch.tensor(self.learning_rate, device=self.device)
        self.elbo.kl_weight = torch.tensor(self.kl_weight, device=self.device)
        # A graph works only on the tensors it was recorded with, so a new one is needed.
        recorder = self._recorder
        self._graph = None if recorder is None else StepGraph(super().step, recorder)

    def step(self, x: Tensor) -> Tensor:
        """Take a gradient step on images x (N, C, H, W); return the negative objective."""
        return super().step(x) if self._graph is None else self._graph(x)

    def _update_if(self, good: Tensor, norm: Tensor, statistics: Snapshot) -> None:
        # Always make the update, then undo it if it does not count.
        statistics.restore_unless(good)
        state = self._optimizer_state()
        before = Snapshot([*self.parameters, *state])
        self._apply_gradient(norm)
        before.restore_unless(good)
        if not state:  # the first step created it; it starts at zero
            zero_unless(self._optimizer_state(), good)
        if self.average is not None:
            self.average.update(good)

    def _optimizer_state(self) -> list[Tensor]:
        state = self.optimizer.state
        return [
            value
            for parameter in self.parameters
            if parameter in state
            for value in state[parameter].values()
            if isinstance(value, Tensor)
        ]

    def maximise(self, elbo: Any) -> None:
        """Take the following steps on the objective `elbo`."""
        super().maximise(elbo)
        self._keep_on_device()

    def schedule(self, learning_rate: float, kl_weight: float) -> None:
        """Set learning rate and KL weight of the following steps."""
        self.learning_rate, self.kl_weight = learning_rate, kl_weight
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        self.elbo.kl_weight.fill_(kl_weight)

    def load_state_dict(self, state: dict[str, Any], *, capturable: bool = True) -> None:
        """Continue from another SVI's `state_dict`, of any kind of device."""
        super().load_state_dict(state, capturable=capturable)
        self._keep_on_device()
