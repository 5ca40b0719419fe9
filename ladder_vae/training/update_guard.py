"""Updates that are left out: which, decided where the numbers are, and how they are undone.

A step whose loss or gradient norm is not finite, or whose gradient explodes, must not reach the
weights. On a GPU the host would have to wait for the device to know; so the decision stays there as
a 0-dimensional tensor, and the update is made and, if need be, undone without a branch.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ladder_vae.training.cuda_graph import Readback

# A spike is told by the median of so many norms; while half of them are unknown it is infinite.
WINDOW = 100


class UpdateGuard:
    """Judges each step by its loss and gradient norm, and counts what it refuses.

    Nothing here waits for the device but the properties.

    Args:
        skip_norm: gradient norms above this are refused; 0 for never.
        spike: norms above this many times the median of the last 100 of the steps that counted
            are refused, from the 50th of these on; 0 for never.
    """

    def __init__(self, device: torch.device, *, skip_norm: float = 0.0, spike: float = 0.0) -> None:
        self.skip_norm = skip_norm
        self.spike = spike
        self._norms = torch.full((WINDOW,), torch.inf, device=device)
        self._slots = torch.arange(WINDOW, device=device)
        # Changed in place throughout: a step that is replayed finds them where they were.
        counts = torch.zeros(5, dtype=torch.int64, device=device)
        self._taken, self._skipped, self._spikes, self._row, self._longest_row = counts
        self._readback = Readback()

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step may count, as a 0-dimensional boolean tensor.

        Args:
            loss, norm: 0-dimensional, on the device.
        """
        good = loss.isfinite() & norm.isfinite()
        if self.skip_norm:
            good = good & (norm <= self.skip_norm)
        if self.spike:
            spiked = good & (norm > self.spike * self._norms.median())
            self._spikes += spiked
            good = good & ~spiked
            slot = self._slots == self._taken % WINDOW
            self._norms.copy_(torch.where(good & slot, norm, self._norms))
        self._taken += good
        self._skipped += ~good
        self._row.add_(1).mul_(~good)
        self._longest_row.copy_(torch.maximum(self._longest_row, self._row))
        return good

    @property
    def skipped(self) -> int:
        """How many steps did not count."""
        return int(self._skipped)

    @property
    def spikes(self) -> int:
        """How many of these were finite but far above the median."""
        return int(self._spikes)

    @property
    def longest_row(self) -> int:
        """The most steps in a row that did not count, since the run was begun or resumed."""
        return int(self._longest_row)

    def longest_row_seen(self) -> int:
        """The same as far as it is known without waiting for the device: a little behind it."""
        seen = self._readback.latest(self._longest_row)
        return 0 if seen is None else int(seen)

    def state_dict(self) -> dict[str, Any]:
        """What later judgements and counts depend on."""
        return {
            "norms": self._norms.clone(),
            "taken": int(self._taken),
            "skipped": self.skipped,
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over another guard's state; rows of skipped steps begin anew.

        Norms that are None are not known.
        """
        if not isinstance(state, dict):
            raise TypeError(f"a guard's state is no {type(state).__name__}")
        norms = state["norms"]
        if norms is not None:
            self._norms.copy_(norms.reshape(WINDOW))
        self._taken.fill_(state["taken"])
        self._skipped.fill_(state["skipped"])
        self._spikes.fill_(state["spikes"])
        self._row.zero_()
        self._longest_row.zero_()


class Snapshot:
    """Tensors as they are now, to be put back by a decision that only the device knows.

    The bits of a number, as a whole number, times 0 are 0, which nan times 0 is not. A few kernels
    do it for all tensors together.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._bits = _bits(tensors)
        self._kept = [torch._foreach_mul(bits, 1) for bits in self._bits]

    def restore_unless(self, good: Tensor) -> None:
        """Put all tensors back where `good`, a 0-dimensional boolean tensor, is false."""
        for bits, kept in zip(self._bits, self._kept, strict=True):
            mask = good.to(bits[0].dtype)
            torch._foreach_mul_(bits, mask)
            torch._foreach_add_(bits, torch._foreach_mul(kept, 1 - mask))


def zero_unless(tensors: Iterable[Tensor], good: Tensor) -> None:
    """Make all tensors zero where `good`, a 0-dimensional boolean tensor, is false."""
    for bits in _bits(tensors):
        torch._foreach_mul_(bits, good.to(bits[0].dtype))


# Whole numbers of as many bytes.
_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Views of the tensors as whole numbers, those of one type together."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        whole = _WHOLE[tensor.element_size()]
        groups.setdefault(whole, []).append(tensor.detach().view(whole))
    return list(groups.values())
