"""Likelihood heads: from the last feature map to the distribution of the image given z."""

import pyro.distributions as dist
from torch import Tensor, nn


class Bernoulli(nn.Module):
    """Independent Bernoulli pixels; one logit per pixel and channel."""

    def __init__(self, channels: int, image_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, image_channels, 3, padding=1)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """From h (N, C, H, W) to p(x | z) with batch shape (N,), event shape of one image."""
        return dist.Bernoulli(logits=self.conv(h)).to_event(3)


LIKELIHOODS: dict[str, type[nn.Module]] = {"bernoulli": Bernoulli}
