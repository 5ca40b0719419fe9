"""The generative ladder p(x, z) as a Pyro model.

A hierarchy of L layers of spatial latent variables above the image x (Sønderby et al., 2016), each
conditioned on all layers above it through skip connections (Maaløe et al., 2019):

    p(x, z) = p(x | z_1, ..., z_L) p(z_L) prod_{i=1}^{L-1} p(z_i | z_{>i})

where every p(z_i | z_{>i}) is a Normal with diagonal covariance. Layer 1 is the bottom, with the
largest feature map. Without skip connections, x depends on z_1 alone, and z_i on z_{i+1} alone. The
ladder differs from that of Sønderby et al. in its skip connections and convolutional latents, and
in using free bits, with or without an annealed KL (see `elbo.py`).
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ladder_vae.networks import LadderConfig
from ladder_vae.networks.blocks import BlockStyle, Merge, ParameterConv, crop_to, residual_blocks
from ladder_vae.networks.likelihoods import LIKELIHOODS


def normal_from(parameters: Tensor) -> dist.TorchDistribution:
    """Normal over feature maps (N, Z, h, w) from its mean and log-variance, (N, 2 Z, h, w)."""
    mean, log_variance = parameters.chunk(2, dim=1)
    return dist.Normal(mean, (log_variance / 2).exp()).to_event(3)


class TopPrior(nn.Module):
    """p(z_L): one mean and log-variance for all images, initially zero, learned or fixed."""

    def __init__(self, z_channels: int, size: tuple[int, int], *, learned: bool) -> None:
        super().__init__()
        self.mean_log_variance = nn.Parameter(
            torch.zeros(1, 2 * z_channels, *size), requires_grad=learned
        )

    def forward(self, n: int) -> dist.TorchDistribution:
        return normal_from(self.mean_log_variance.expand(n, -1, -1, -1))


class ConditionalPrior(nn.Module):
    """p(z_i | z_{>i}), computed from the feature map h_{i+1} of the layer above."""

    def __init__(self, channels: int, z_channels: int) -> None:
        super().__init__()
        self.conv = ParameterConv(channels, 2 * z_channels)

    def forward(self, h_above: Tensor) -> dist.TorchDistribution:
        return normal_from(self.conv(h_above))


class TopDownLayer(nn.Module):
    """Computes the feature map h_i from z_i and, with skip connections, h_{i+1}."""

    def __init__(
        self, style: BlockStyle, z_channels: int, blocks: int, upsample: int, *, skip: bool
    ) -> None:
        super().__init__()
        self.expand = nn.Conv2d(z_channels, style.channels, 3, padding=1)
        self.skip = Merge("residual", style) if skip else None
        self.blocks = residual_blocks(style, blocks, upsample, "up")

    def forward(self, z: Tensor, h_above: Tensor | None) -> Tensor:
        h = self.expand(z)
        if self.skip is not None:
            h = self.skip(h, h_above)
        return self.blocks(h)


class Decoder(nn.Module):
    """Computes the last feature map, which has the size of the image, from h_1."""

    def __init__(
        self, style: BlockStyle, config: LadderConfig, image_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.upsample = (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            if config.initial_downscaling
            else nn.Identity()
        )
        self.blocks = residual_blocks(style, config.blocks_per_layer)

    def forward(self, h: Tensor) -> Tensor:
        return crop_to(self.blocks(self.upsample(h)), self.image_size)


class LadderModel(nn.Module):
    """p(x, z) for images of shape `image_shape` (channels, height, width).

    Pyro sites, for n images in the plate `images`: `z_L` ... `z_1`, each a spatial feature map
    (n, z_dims[i-1], height, width), and `x` (n, channels, height, width). The deterministic sites
    `h_L` ... `h_2` hold feature maps: the prior of z_i is computed from h_{i+1}, and the guide
    computes its posterior from the same map.
    """

    def __init__(self, config: LadderConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        image_channels, *image_size = image_shape
        sizes = config.latent_sizes((image_size[0], image_size[1]))
        style = config.block_style()
        depth = len(config.z_dims)

        self.top_prior = TopPrior(config.z_dims[-1], sizes[-1], learned=config.learn_top_prior)
        self.priors = nn.ModuleList(
            ConditionalPrior(config.n_filters, z) for z in config.z_dims[:-1]
        )
        self.layers = nn.ModuleList(
            TopDownLayer(
                style,
                config.z_dims[i],
                config.blocks_per_layer,
                config.downsample[i],
                skip=config.skip and i < depth - 1,
            )
            for i in range(depth)
        )
        self.decoder = Decoder(style, config, (image_size[0], image_size[1]))
        self.likelihood = LIKELIHOODS[config.likelihood](config.n_filters, image_channels)

    def forward(self, x: Tensor | None = None, n: int = 1) -> Tensor:
        """The generative program: observe `x` (N, C, H, W) in [0, 1], or draw `n` new images.

        Returns x.
        """
        depth = len(self.layers)
        with pyro.plate("images", n if x is None else len(x), dim=-1) as images:
            # p(z_L)
            z = pyro.sample(f"z_{depth}", self.top_prior(len(images)))
            h = self.layers[-1](z, None)
            for i in range(depth - 1, 0, -1):
                # p(z_i | z_{>i}), from the feature map h_{i+1} of the layer above
                h_above = pyro.deterministic(f"h_{i + 1}", h, event_dim=3)
                z = pyro.sample(f"z_{i}", self.priors[i - 1](h_above))
                h = self.layers[i - 1](z, h_above)
            # p(x | z_1, ..., z_L)
            return pyro.sample("x", self.likelihood(self.decoder(h)), obs=x)
