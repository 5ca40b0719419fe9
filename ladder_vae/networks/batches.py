"""Networks on feature maps with any number of batch dimensions."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Output = TypeVar("Output", Tensor, list[Tensor])


def on_batches(network: Callable[..., Output], *maps: Tensor) -> Output:
    """`network` of feature maps (*batch, C, h, w): fold the batch dimensions into one, and unfold.

    Convolutions take one batch dimension. Vectorized particles, and plates to the left of `images`,
    add more on the left: (particles, images, C, h, w). The batch shapes of several maps broadcast.
    With one batch dimension this is a plain call.

    Args:
        network: returns a feature map, or a list of them.
        *maps: its arguments.
    """
    if all(m.ndim == 4 for m in maps):
        return network(*maps)
    batch = torch.broadcast_shapes(*(m.shape[:-3] for m in maps))
    folded = (m.expand(*batch, *m.shape[-3:]).reshape(-1, *m.shape[-3:]) for m in maps)
    result = network(*folded)
    if isinstance(result, list):
        return [m.unflatten(0, batch) for m in result]
    return result.unflatten(0, batch)
