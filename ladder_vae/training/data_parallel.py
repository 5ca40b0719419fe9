"""Training on several ranks at once: gradients, statistics, noise and time that they share.

Each rank computes the gradient of its part of the batch, and `DistributedDataParallel` averages
them while they are computed: with parts of equal size that is the gradient of the whole batch's
mean, and every rank takes the same step from the same weights.

Batch normalisation is the one thing that a part does differently. In training each rank normalises
by the mean and variance of its own part of the batch, N / R images instead of N, so that loss and
gradient are those of R smaller batches, averaged: close to, but not those of one process. The
running statistics that evaluation uses are averaged over the ranks at each step. They are means of
the parts' statistics, so that of the mean is the whole batch's own, and that of the variance lacks
how the parts' means differ. With `synchronised` batch normalisation nothing differs.
"""

import time
import warnings
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ladder_vae.training.update_guard import Snapshot
from runtime.distributed import Ranks
from runtime.errors import UserError
from runtime.random import torch_seed

# What a draw is for, the second part of its key: data sets and evaluations have theirs.
_NOISE = 3


def check_batch(batch_size: int, ranks: Ranks) -> None:
    """Raise `UserError` unless the ranks can share batches of this size evenly."""
    if left := batch_size % ranks.size:
        fitting = [batch_size - left] * (batch_size > left) + [batch_size - left + ranks.size]
        raise UserError(
            f"--batch-size is {batch_size}, which {ranks.size} processes cannot share evenly; "
            f"give {' or '.join(map(str, fitting))}"
        )


def synchronised(module: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The module with batch normalisation over the whole batch of all ranks, on GPUs.

    A process on its own has the whole batch, and nothing to change. Raises `UserError` on the CPU.
    """
    if ranks.size == 1:
        return module
    if device.type == "cpu":
        raise UserError(
            "--sync-bn needs GPUs: PyTorch cannot synchronise batch normalisation on the CPU; "
            "leave it out (--no-sync-bn)"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


class Replicas:
    """The copies of an ELBO module on all ranks, which stay the same; each sees a part of a batch.

    Its weights become the first rank's. Gradients of `module`'s output are averages over the ranks.
    """

    def __init__(self, source: nn.Module, ranks: Ranks, device: torch.device) -> None:
        self._size = ranks.size
        self._source = source
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of another name
            self.module = DistributedDataParallel(
                source,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,  # they are averaged, see `average`
                gradient_as_bucket_view=True,
            )
        self._statistics = [
            buffer
            for module in source.modules()
            if isinstance(module, nn.BatchNorm2d)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    def warm_up(self, x: Tensor) -> None:
        """A first pass, of which nothing stays.

        After its first pass DDP lays out its messages anew, in the order in which gradients are
        ready. Sums over three ranks or more depend on the layout, in their last bit; a resumed run
        is to have the same one from its first step on.
        """
        before = Snapshot(self._source.buffers())
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            self.module(x).backward()
        before.restore_unless(torch.zeros((), dtype=torch.bool, device=x.device))
        self.module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def average(self, row: Tensor) -> Tensor:
        """The mean of `row` over the ranks; of batch normalisation's running statistics too.

        Those are averaged in place, in the same message: they are small beside the gradients.
        """
        parts = [row, *self._statistics]
        message = torch.cat([part.flatten() for part in parts])
        distributed.all_reduce(message)
        message /= self._size
        means = message.split([part.numel() for part in parts])
        if self._statistics:
            torch._foreach_copy_(self._statistics, list(means[1:]))
        return means[0]


class Clock:
    """Time and signals that all ranks agree on: time is the first rank's, and stands still between.

    A process on its own has its clock.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._now = ranks.share(time.monotonic())

    @property
    def now(self) -> float:
        """Seconds, from some moment on."""
        return time.monotonic() if self._ranks.size == 1 else self._now

    def agree(self, signal: int) -> int:
        """Ask the first rank for the time, and all for a signal that has come to them.

        Takes and returns the number of a signal, 0 for none; waits for no GPU.
        """
        now = time.monotonic() if self._ranks.is_first else 0.0
        self._now, number = self._ranks.largest(now, signal)
        return int(number)


def random_states(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """What a checkpoint holds of random generators: the first rank's and, as `ranks`, those of all.

    A process on its own has no entry `ranks`.
    """
    own = {
        "cpu_random_state": torch.get_rng_state(),
        "cuda_random_state": (torch.cuda.get_rng_state(device) if device.type == "cuda" else None),
    }
    if ranks.size == 1:
        return own
    states = ranks.collect(own)
    return states[0] | {"ranks": states}


def restore_random_state(
    state: dict[str, Any], ranks: Ranks, device: torch.device, seed: int
) -> None:
    """Continue with the noise of a checkpoint's state, on as many ranks.

    On more or fewer, it is drawn anew.
    """
    states = state.get("ranks", [state])
    if len(states) != ranks.size:
        seed_noise(ranks, seed, state["step"])
        return
    own = states[ranks.rank]
    torch.set_rng_state(own["cpu_random_state"].cpu())
    if device.type == "cuda" and own["cuda_random_state"] is not None:
        torch.cuda.set_rng_state(own["cuda_random_state"].cpu(), device)


def seed_noise(ranks: Ranks, seed: int, step: int) -> None:
    """Have latents and dropout from `step` on depend on the seed, the step and the rank."""
    torch.manual_seed(torch_seed(seed, _NOISE, step, ranks.rank))
