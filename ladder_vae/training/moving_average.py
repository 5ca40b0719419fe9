"""An exponential moving average of the weights, which evaluations use."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage:
    """Exponential moving average of a module's parameters and floating-point buffers.

    `module` is the averaged copy, in evaluation mode. After n updates the decay is the smaller of
    `decay` and (1 + n) / (10 + n), so that the average soon forgets the initial weights.
    """

    def __init__(self, source: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(source).requires_grad_(False).eval()
        self.decay = decay
        pairs = list(zip(_tensors(self.module), _tensors(source), strict=True))
        self._floats = [(a, s) for a, s in pairs if a.is_floating_point()]
        self._counters = [(a, s) for a, s in pairs if not a.is_floating_point()]
        # On the device, because only the device knows whether an update counts.
        self.updates = torch.zeros((), dtype=torch.int64, device=pairs[0][0].device)

    @torch.no_grad()
    def update(self, good: Tensor | None = None) -> None:
        """Move the average towards the current weights.

        If `good`, a 0-dimensional boolean tensor, is false, the average stays unchanged; the
        weights must be finite even then.
        """
        n = self.updates.double()
        share = 1 - ((1 + n) / (10 + n)).clamp(max=self.decay)
        if good is not None:
            share = share * good
        averages, sources = zip(*self._floats, strict=True)
        steps = torch._foreach_sub(sources, averages)
        torch._foreach_mul_(steps, share.float())
        torch._foreach_add_(averages, steps)
        for counter, source in self._counters:
            counter.copy_(source)
        self.updates += 1 if good is None else good

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and the number of updates."""
        return {"weights": self.module.state_dict(), "updates": int(self.updates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        self.module.load_state_dict(state["weights"])
        self.updates.fill_(state["updates"])


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
