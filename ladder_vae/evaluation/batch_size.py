"""The automatic batch size of evaluations."""

import torch
from torch import Tensor

from ladder_vae.evaluation.interfaces import Guide
from ladder_vae.networks import LadderConfig

# On a CPU, passes are fastest if a feature map of the whole batch fits into its caches.
_CACHE = 16 * 2**20
# As many images as keep a GPU busy; more would only need more memory.
_LARGEST = 1024


def automatic_batch_size(
    config: LadderConfig, guide: Guide, x: Tensor, *, gradients: bool = False
) -> int:
    """A power of two that suits images like x (1, C, H, W) on their device.

    With `gradients`, it suits passes that keep all feature maps for the backward pass.

    The noise depends on the batch size, so the batch size must not depend on what else is in
    memory: on a CPU it depends on the network alone, and on a GPU also on the GPU's total memory.
    """
    if x.device.type == "cuda":
        total = torch.cuda.get_device_properties(x.device).total_memory
        fitting = total // 2 // _bytes_per_image(guide, x, gradients=gradients)
    else:
        height, width = config.padded_size((x.shape[-2], x.shape[-1]))
        fitting = _CACHE // (4 * config.n_filters * height * width)
    return max(8, min(_LARGEST, 2 ** (fitting.bit_length() - 1) if fitting else 0))


def _bytes_per_image(guide: Guide, x: Tensor, *, gradients: bool) -> int:
    """The peak memory of a pass through the network on a GPU, per image."""
    peaks = []
    with torch.random.fork_rng([x.device]), torch.set_grad_enabled(gradients):
        for n in (8, 24):
            torch.cuda.reset_peak_memory_stats(x.device)
            guide(x.expand(n, -1, -1, -1))
            peaks.append(torch.cuda.max_memory_allocated(x.device))
    return max(1, (peaks[1] - peaks[0]) // 16)
