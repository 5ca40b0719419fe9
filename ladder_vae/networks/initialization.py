"""Initial weights: data-dependent ones, and smaller residual branches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ladder_vae.networks.blocks import ResidualBlock


@contextmanager
def data_dependent_init(*modules: nn.Module, std: float = 0.1) -> Iterator[None]:
    """A context that initialises every convolution of `modules` from the batch that runs in it.

    Salimans and Kingma (2016), "Weight Normalization: A Simple Reparameterization to Accelerate
    Training of Deep Neural Networks", section 3, here for plain convolutions.

    On entry, weights are drawn Kaiming-normal and biases are set to zero. When a convolution runs,
    it is rescaled and shifted per output channel,

        w <- w std / s,  b <- (b - m) std / s,  with m and s^2 the batch's mean and variance + 1e-5,

    so that its output has mean 0 and standard deviation `std`. Later layers receive the rescaled
    output. The variance is that of a sample: with n values per channel, over images and positions,
    it divides by n - 1; for n = 1 it is 0. Run exactly one batch in the context, in training mode.
    No gradients are recorded.
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
        values = y.numel() // y.shape[1]  # per channel
        variance = y.var((0, 2, 3), correction=min(1, values - 1))
        scale = std / (variance + 1e-5).sqrt()
        # A convolution's weight has the output channel first, a transposed convolution's second.
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


def scale_branches(module: nn.Module) -> None:
    """Divide the last convolution of each residual branch by sqrt(n), for n residual blocks.

    The variance of the feature maps then does not grow with the depth of the network. Child (2021),
    "Very Deep VAEs Generalize Autoregressive Models and Can Outperform Them on Images", section 4.
    """
    blocks = [m for m in module.modules() if isinstance(m, ResidualBlock)]
    with torch.no_grad():
        for block in blocks:
            *_, last = (m for m in block.modules() if isinstance(m, nn.Conv2d))
            for parameter in last.parameters():
                parameter.div_(len(blocks) ** 0.5)
