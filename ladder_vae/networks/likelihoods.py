"""Likelihood heads, from the last feature map (N, C, h, w) to p(x | z).

Each returns a distribution with batch shape (N,) and event shape (image channels, H, W), over
images in [0, 1]; log-probabilities are in nats per image. Bounds compare only within a `kind`.
A head's `convolution` is a function from a number of parameters per pixel to the convolution that
computes them: a `ParameterConv`, or a `SubPixelConv` for a feature map of half the image's size.
"""

from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
from torch import Tensor, nn

from ladder_vae.networks.blocks import ParameterConv, SubPixelConv
from ladder_vae.networks.discretized_logistic import MIN_LOG_SCALE, DiscretizedLogistic
from ladder_vae.networks.discretized_logistic_mixture import DiscretizedLogisticMixture

DENSITY = "density"
Convolution = Callable[[int], ParameterConv | SubPixelConv]


class _Head(nn.Module):
    """A convolution to the parameters of p(x | z), a probability or a density by its `kind`."""

    kind: ClassVar[str]

    def __init__(self, convolution: Convolution, parameter_channels: int) -> None:
        super().__init__()
        self.conv = convolution(parameter_channels)


class Bernoulli(_Head):
    """Independent Bernoulli pixels, with one logit per pixel and channel."""

    kind = "probability of 2 levels"

    def __init__(self, convolution: Convolution, image_channels: int) -> None:
        super().__init__(convolution, image_channels)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.conv(h)).to_event(3)


class Gaussian(_Head):
    """Independent Normal pixels, with mean and log-variance per pixel and channel.

    Its log-probability is a density, so bounds cannot be compared with those of the others.
    """

    kind = DENSITY

    def __init__(self, convolution: Convolution, image_channels: int) -> None:
        super().__init__(convolution, 2 * image_channels)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        mean, log_variance = self.conv(h).chunk(2, dim=-3)
        return dist.Normal(mean, (log_variance / 2).exp()).to_event(3)


class DiscretizedLogisticHead(_Head):
    """Independent 8-bit pixels, discretized logistic with location and log-scale per channel.

    Convolution outputs u and v give the location 0.5 + u and the log-scale max(v - 1, -7), so that
    an output of zero is mid-grey.
    """

    kind = "probability of 256 levels"

    def __init__(self, convolution: Convolution, image_channels: int) -> None:
        super().__init__(convolution, 2 * image_channels)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self.conv(h).chunk(2, dim=-3)
        log_scale = (log_scale - 1).clamp(min=MIN_LOG_SCALE)
        return DiscretizedLogistic(loc + 0.5, log_scale).to_event(3)


class DiscretizedLogisticMixtureHead(_Head):
    """8-bit RGB pixels, PixelCNN++'s mixture of 10 discretized logistics."""

    kind = "probability of 256 levels"

    def __init__(self, convolution: Convolution, image_channels: int) -> None:
        if image_channels != 3:
            raise ValueError(
                "`likelihood` discr_log_mix needs images of 3 channels (red, green and blue); "
                f"for {image_channels} use discr_log"
            )
        super().__init__(convolution, 10 * 10)

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return DiscretizedLogisticMixture.from_channels(self.conv(h))


LIKELIHOODS: dict[str, type[_Head]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "discr_log": DiscretizedLogisticHead,
    "discr_log_mix": DiscretizedLogisticMixtureHead,
}
