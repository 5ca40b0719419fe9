"""The generative ladder p(x, z) as a Pyro model.

A hierarchy of L layers of spatial latent variables above the image x (Sønderby et al., 2016), each
conditioned on all layers above it through skip connections (Maaløe et al., 2019):

    p(x, z) = p(x | z_1, ..., z_L) p(z_L) prod_{i=1}^{L-1} p(z_i | z_{>i})

where every p(z_i | z_{>i}) is a Normal with diagonal covariance. Layer 1 is the bottom, with the
largest feature map. Without skip connections, x depends on z_1 alone, and z_i on z_{i+1} alone. The
ladder differs from that of Sønderby et al. in its skip connections and convolutional latents, and
in using free bits, with or without an annealed KL (see `elbo.py`).
"""

from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ladder_vae.networks import LadderConfig
from ladder_vae.networks.batches import on_batches
from ladder_vae.networks.blocks import (
    BlockStyle,
    Merge,
    ParameterConv,
    SubPixelConv,
    crop_to,
    residual_blocks,
)
from ladder_vae.networks.handlers import register
from ladder_vae.networks.images import check_images
from ladder_vae.networks.likelihoods import LIKELIHOODS, Convolution
from ladder_vae.networks.normals import SCALES, NormalFrom


class TopPrior(nn.Module):
    """p(z_L): one mean and log-variance for all images, initially zero, learned or fixed."""

    def __init__(
        self, z_channels: int, size: tuple[int, int], normal_from: NormalFrom, *, learned: bool
    ) -> None:
        super().__init__()
        self.normal_from = normal_from
        self.mean_log_variance = nn.Parameter(
            torch.zeros(1, 2 * z_channels, *size), requires_grad=learned
        )

    def forward(self, *batch: int) -> dist.TorchDistribution:
        return self.normal_from(self.mean_log_variance.expand(*batch, -1, -1, -1))


class ConditionalPrior(nn.Module):
    """p(z_i | z_{>i}), computed from the feature map h_{i+1} of the layer above."""

    def __init__(self, channels: int, z_channels: int, normal_from: NormalFrom) -> None:
        super().__init__()
        self.normal_from = normal_from
        self.conv = ParameterConv(channels, 2 * z_channels)

    def forward(self, h_above: Tensor) -> dist.TorchDistribution:
        return self.normal_from(self.conv(h_above))


class TopDownLayer(nn.Module):
    """Computes the feature map h_i from z_i and, with skip connections, h_{i+1}."""

    def __init__(
        self, style: BlockStyle, z_channels: int, blocks: int, upsample: int, *, skip: bool
    ) -> None:
        super().__init__()
        self.expand = nn.Conv2d(z_channels, style.channels, 3, padding=1)
        self.skip = Merge("residual", style) if skip else None
        self.blocks = residual_blocks(style, blocks, upsample, "up")

    def forward(self, z: Tensor, h_above: Tensor | None = None) -> Tensor:
        h = self.expand(z)
        if self.skip is not None:
            h = self.skip(h, h_above)
        return self.blocks(h)


class Decoder(nn.Module):
    """Computes the last feature map from h_1.

    It has the size of the image or, with `pixel_shuffle`, half the size of the padded image.
    """

    def __init__(
        self, style: BlockStyle, config: LadderConfig, image_size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.image_size = None if config.pixel_shuffle else image_size
        self.upsample = (
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)
            if config.initial_downscaling and not config.pixel_shuffle
            else nn.Identity()
        )
        self.blocks = residual_blocks(style, config.blocks_per_layer)

    def forward(self, h: Tensor) -> Tensor:
        h = self.blocks(self.upsample(h))
        return h if self.image_size is None else crop_to(h, self.image_size)


class LadderModel(nn.Module):
    """p(x, z) for images of shape `image_shape` (channels, height, width).

    Pyro sites, for n images in the plate `images`: `z_L` ... `z_1`, each a spatial feature map
    (n, z_dims[i-1], height, width), and `x` (n, channels, height, width). The deterministic sites
    `h_L` ... `h_2` hold feature maps: the prior of z_i is computed from h_{i+1}, and the guide
    computes its posterior from the same map.
    """

    def __init__(self, config: LadderConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = image_shape
        self.likelihood_name = config.likelihood
        image_channels, *image_size = image_shape
        sizes = config.latent_sizes((image_size[0], image_size[1]))
        style = config.block_style()
        depth = len(config.z_dims)

        normal_from = SCALES[config.scales]
        self.top_prior = TopPrior(
            config.z_dims[-1], sizes[-1], normal_from, learned=config.learn_top_prior
        )
        self.priors = nn.ModuleList(
            ConditionalPrior(config.n_filters, z, normal_from) for z in config.z_dims[:-1]
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
        convolution: Convolution = partial(ParameterConv, config.n_filters)
        if config.pixel_shuffle:
            convolution = partial(SubPixelConv, config.n_filters, size=image_size)
        self.likelihood = LIKELIHOODS[config.likelihood](convolution, image_channels)

    def forward(self, x: Tensor | None = None, n: int = 1) -> Tensor:
        """The generative program: observe `x` (N, C, H, W) in [0, 1], or draw `n` new images.

        Under vectorized particles, or plates to the left of `images`, every feature map has their
        dimensions on the left, and x may have them. Returns x.
        """
        if x is not None:
            device = self.top_prior.mean_log_variance.device
            check_images(x, self.image_shape, device, likelihood=self.likelihood_name)
        register("model", self)
        depth = len(self.layers)
        batch = (n,) if x is None else x.shape[:-3]
        with pyro.plate("images", batch[-1], dim=-1):
            # p(z_L)
            z = pyro.sample(f"z_{depth}", self.top_prior(*batch))
            h = on_batches(self.layers[-1], z)
            for i in range(depth - 1, 0, -1):
                # p(z_i | z_{>i}), from the feature map h_{i+1} of the layer above
                h_above = pyro.deterministic(f"h_{i + 1}", h, event_dim=3)
                z = pyro.sample(f"z_{i}", self.priors[i - 1](h_above))
                h = on_batches(self.layers[i - 1], z, h_above)
            # p(x | z_1, ..., z_L)
            return pyro.sample("x", self.likelihood(on_batches(self.decoder, h)), obs=x)
