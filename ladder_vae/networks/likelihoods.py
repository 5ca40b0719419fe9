"""Likelihood heads: from the last feature map to the distribution of the image given z."""

import pyro.distributions as dist
from torch import Tensor, nn

from ladder_vae.networks.blocks import ParameterConv
from ladder_vae.networks.discretized_logistic import (
    MIN_LOG_SCALE,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
)


class _Head(nn.Module):
    """One 3x3 convolution to the parameters of p(x | z)."""

    def __init__(self, channels: int, parameter_channels: int) -> None:
        super().__init__()
        self.conv = ParameterConv(channels, parameter_channels)


class Bernoulli(_Head):
    """Independent Bernoulli pixels; one logit per pixel and channel."""

    def __init__(self, channels: int, image_channels: int) -> None:
        super().__init__(channels, image_channels)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """From h (N, C, H, W) to p(x | z) with batch shape (N,), event shape of one image."""
        return dist.Bernoulli(logits=self.conv(h)).to_event(3)


class Gaussian(_Head):
    """Independent Normal pixels; mean and log-variance per pixel and channel.

    A density: bounds on it are no bounds on the likelihood of 8-bit images.
    """

    def __init__(self, channels: int, image_channels: int) -> None:
        super().__init__(channels, 2 * image_channels)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """From h (N, C, H, W) to p(x | z) with batch shape (N,), event shape of one image."""
        mean, log_variance = self.conv(h).chunk(2, dim=1)
        return dist.Normal(mean, (log_variance / 2).exp()).to_event(3)


class DiscretizedLogisticHead(_Head):
    """Independent 8-bit pixels; location and log-scale of a discretized logistic for each channel.

    The network's zero is grey (0.5) with a log-scale of -1.
    """

    def __init__(self, channels: int, image_channels: int) -> None:
        super().__init__(channels, 2 * image_channels)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """From h (N, C, H, W) to p(x | z) with batch shape (N,), event shape of one image."""
        loc, log_scale = self.conv(h).chunk(2, dim=1)
        log_scale = (log_scale - 1).clamp(min=MIN_LOG_SCALE)
        return DiscretizedLogistic(loc + 0.5, log_scale).to_event(3)


class DiscretizedLogisticMixtureHead(_Head):
    """8-bit RGB pixels; 10 components of PixelCNN++'s mixture of discretized logistics."""

    def __init__(self, channels: int, image_channels: int) -> None:
        if image_channels != 3:
            raise ValueError(
                "`likelihood` discr_log_mix is for images of 3 channels, red, green and blue; "
                f"for {image_channels} there is discr_log"
            )
        super().__init__(channels, 10 * 10)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        """From h (N, C, H, W) to p(x | z) with batch shape (N,), event shape (3, H, W)."""
        return DiscretizedLogisticMixture.from_channels(self.conv(h))


LIKELIHOODS: dict[str, type[nn.Module]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discr_log": DiscretizedLogisticHead,
    "discr_log_mix": DiscretizedLogisticMixtureHead,
}
