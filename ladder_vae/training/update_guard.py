"""Skips bad updates on the device, without synchronising with the host.

A step whose loss or gradient norm is not finite, or whose gradient explodes, must not change the
weights. The decision of `UpdateGuard` is a 0-dimensional tensor. On a GPU the update is always made
and, if it does not count, undone by `Snapshot`, without a branch on the host.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ladder_vae.training.cuda_graph import Readback

# Spikes are measured against the median of this many norms, infinite until half of them are known.
WINDOW = 100


class UpdateGuard:
    """Decides from loss and gradient norm whether a step counts, and counts the skipped steps.

    Only the properties wait for the device.

    Args:
        skip_norm: skip steps with a gradient norm above this; 0 for never.
        spike: skip steps with a norm above this many times the median norm of the last 100 steps
            that counted, once 50 have counted; 0 for never.
    """

    def __init__(self, device: torch.device, *, skip_norm: float = 0.0, spike: float = 0.0) -> None:
        self.skip_norm = skip_norm
        self.spike = spike
        self._norms = torch.full((WINDOW,), torch.inf, device=device)
        self._slots = torch.arange(WINDOW, device=device)
        # Changed in place only: a replayed CUDA graph finds them at the same address.
        counts = torch.zeros(5, dtype=torch.int64, device=device)
        self._taken, self._skipped, self._spikes, self._row, self._longest_row = counts
        self._readback = Readback()

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether a step counts, as a 0-dimensional boolean tensor.

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
        """Number of skipped steps."""
        return int(self._skipped)

    @property
    def spikes(self) -> int:
        """Number of steps skipped because their norm was far above the median."""
        return int(self._spikes)

    @property
    def longest_row(self) -> int:
        """The most steps skipped in a row since the run started or resumed."""
        return int(self._longest_row)

    def longest_row_seen(self) -> int:
        """Like `longest_row`, but never waits: on a GPU the result is a few steps old."""
        seen = self._readback.latest(self._longest_row)
        return 0 if seen is None else int(seen)

    def state_dict(self) -> dict[str, Any]:
        """The norms and counts on which later decisions depend."""
        return {
            "norms": self._norms.clone(),
            "taken": int(self._taken),
            "skipped": self.skipped,
            "spikes": self.spikes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; the count of steps skipped in a row restarts at zero."""
        self._norms.copy_(state["norms"])
        self._taken.fill_(state["taken"])
        self._skipped.fill_(state["skipped"])
        self._spikes.fill_(state["spikes"])
        self._row.zero_()
        self._longest_row.zero_()


class Snapshot:
    """A copy of tensors that a decision on the device can restore, without a branch on the host.

    The restored value is tensor * good + copy * (1 - good), computed on the bits of the numbers
    read as integers, because nan times 0 is nan. A few kernels restore all tensors together.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._bits = _bits(tensors)
        self._kept = [torch._foreach_mul(bits, 1) for bits in self._bits]

    def restore_unless(self, good: Tensor) -> None:
        """Restore all tensors if `good`, a 0-dimensional boolean tensor, is false."""
        for bits, kept in zip(self._bits, self._kept, strict=True):
            mask = good.to(bits[0].dtype)
            torch._foreach_mul_(bits, mask)
            torch._foreach_add_(bits, torch._foreach_mul(kept, 1 - mask))


def zero_unless(tensors: Iterable[Tensor], good: Tensor) -> None:
    """Set all tensors to zero if `good`, a 0-dimensional boolean tensor, is false."""
    for bits in _bits(tensors):
        torch._foreach_mul_(bits, good.to(bits[0].dtype))


# Integer types by their number of bytes.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Views of the tensors as integers, grouped by type."""
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        integer = _INTEGERS[tensor.element_size()]
        groups.setdefault(integer, []).append(tensor.detach().view(integer))
    return list(groups.values())
