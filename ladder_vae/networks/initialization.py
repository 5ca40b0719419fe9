"""Data-dependent initialisation of the convolutions."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def data_dependent_init(*modules: nn.Module, std: float = 0.1) -> Iterator[None]:
    """Initialise every convolution of `modules` from the data that runs through it inside.

    On entering, convolution weights are drawn Kaiming-normal and biases set to zero. Then each
    convolution, at the moment it runs, is rescaled and shifted per output channel so that its
    output on this batch has mean 0 and standard deviation `std`; what follows it sees the new
    output. Run one batch inside, in training mode.
    """
    convolutions = [
        m
        for module in modules
        for m in module.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]
    for conv in convolutions:
        nn.init.kaiming_normal_(conv.weight)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)

    def normalise(conv: nn.Module, _: tuple[Tensor, ...], y: Tensor) -> Tensor:
        assert isinstance(conv, nn.Conv2d | nn.ConvTranspose2d)
        mean = y.mean((0, 2, 3))
        scale = std / (y.var((0, 2, 3), correction=0) + 1e-5).sqrt()
        # The output channel is the first dimension of a convolution's weight, but the second of
        # a transposed one's.
        shape = (-1, 1, 1, 1) if isinstance(conv, nn.Conv2d) else (1, -1, 1, 1)
        conv.weight.mul_(scale.view(shape))
        if conv.bias is not None:
            conv.bias.sub_(mean).mul_(scale)
        return (y - mean.view(1, -1, 1, 1)) * scale.view(1, -1, 1, 1)

    handles = [conv.register_forward_hook(normalise) for conv in convolutions]
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
