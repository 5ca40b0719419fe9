"""Training by several processes that share each batch.

Each process computes the gradient of its part of the batch, and `DistributedDataParallel` averages
the gradients during the backward pass. Since all parts have the same size, the average is the
gradient of the whole batch's mean, and every process takes the same step from the same weights.

Batch normalisation is the one difference. In training, each of R processes normalises by the mean
and variance of its own part of the batch, N / R images instead of N. Loss and gradient are then
averages over R smaller batches, which are close to those of a single process but not equal. The
running statistics that evaluation uses are averaged over the processes at each step: their mean
equals that of the whole batch, but their variance lacks the variance between the parts' means.
With synchronised batch normalisation there is no difference.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ladder_vae.runs.options import RunConfig
from ladder_vae.training.svi import SVI
from ladder_vae.training.update_guard import Snapshot
from runtime.distributed import Ranks
from runtime.random import torch_seed

# The second part of a random key names the purpose; data sets and evaluations use other numbers.
_NOISE = 3


def check_batch_size(batch_size: int, ranks: Ranks) -> None:
    """Raise `ValueError` unless the processes can share batches of this size evenly."""
    if left := batch_size % ranks.size:
        fitting = [batch_size - left] * (batch_size > left) + [batch_size - left + ranks.size]
        raise ValueError(
            f"`batch_size` is {batch_size}, which {ranks.size} processes cannot share evenly; "
            f"use {' or '.join(map(str, fitting))}"
        )


def check_batch_statistics(
    config: RunConfig, image_shape: tuple[int, int, int], ranks: Ranks
) -> None:
    """Raise `ValueError` if batch normalisation would average over a single value."""
    top = math.prod(config.ladder.latent_sizes(image_shape[1:])[-1])
    parts = 1 if config.sync_bn else ranks.size
    if config.ladder.batchnorm and config.batch_size // parts * top == 1:
        among = f" for {parts} processes" if parts > 1 else ""
        raise ValueError(
            f"`batch_size` is {config.batch_size}{among} and the top feature map is 1x1, so batch "
            "normalisation has nothing to average over; increase it, or switch off `batchnorm`"
        )


def synchronised(module: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """The module with batch normalisation over the whole batch of all processes, on GPUs.

    For a single process the module is returned unchanged. Raises `ValueError` on the CPU.
    """
    if ranks.size == 1:
        return module
    if device.type == "cpu":
        raise ValueError(
            "`sync_bn` needs GPUs, because PyTorch cannot synchronise batch normalisation on the "
            "CPU; switch it off"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


class Replicas:
    """Identical copies of an ELBO module on all processes, each of which sees a part of the batch.

    All start with the first process's weights. Gradients of the output of `module` are averaged
    over the processes.
    """

    def __init__(self, source: nn.Module, ranks: Ranks, device: torch.device) -> None:
        self._size = ranks.size
        self._source = source
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about a new name
            self.module = DistributedDataParallel(
                source,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,  # `average` averages them
                gradient_as_bucket_view=True,
            )
        self._statistics = [
            buffer
            for module in source.modules()
            if isinstance(module, nn.BatchNorm2d)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    def attach(self, svi: SVI) -> None:
        """Let `svi` take its steps on all processes together; each sees its part of the batch."""
        svi.forward = self.module
        svi.reduce = self.average

    def warm_up(self, x: Tensor) -> None:
        """Run a first pass that changes nothing.

        After its first pass, DDP arranges its messages in the order in which gradients become
        ready. The last bit of sums over three or more processes depends on this arrangement, so a
        resumed run must have the same one from its first step on.
        """
        before = Snapshot(self._source.buffers())
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            self.module(x).backward()
        before.restore_unless(torch.zeros((), dtype=torch.bool, device=x.device))
        self.module.zero_grad(set_to_none=True)

    @torch.no_grad()
    def average(self, row: Tensor) -> Tensor:
        """The mean of `row` over the processes.

        The same message averages batch normalisation's running statistics, in place.
        """
        parts = [row, *self._statistics]
        message = torch.cat([part.flatten() for part in parts])
        distributed.all_reduce(message)
        message /= self._size
        means = message.split([part.numel() for part in parts])
        if self._statistics:
            torch._foreach_copy_(self._statistics, list(means[1:]))
        return means[0]


def random_states(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """The states of the random generators, for a checkpoint.

    With several processes, these are the first one's states, and `ranks` lists those of all.
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
    """Restore a checkpoint's random states if it was written by the same number of processes.

    Otherwise, all processes seed new noise.
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
    """Seed the noise of latents and dropout from `step` on, by seed, step and process."""
    torch.manual_seed(torch_seed(seed, _NOISE, step, ranks.rank))
