"""The ladder inference network q(z | x) as a Pyro guide.

    q(z | x) = q(z_L | x) prod_{i=1}^{L-1} q(z_i | z_{>i}, x)

A deterministic bottom-up pass turns the image into one feature map d_i per layer. Inference then
runs the generative ladder itself from the top down: each posterior is computed from d_i merged with
the model's own feature map h_{i+1} (Sønderby et al., 2016, section 2.2). Model and guide thus share
one top-down pass: as a `pyro.poutine.guide.GuideMessenger`, the guide runs the model, and when the
model samples z_i, the guide replaces its prior by the posterior. That one pass yields both traces,
with one set of dropout masks and batch-norm statistics.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn

from ladder_vae.networks import LadderConfig
from ladder_vae.networks.batches import on_batches
from ladder_vae.networks.blocks import (
    ACTIVATIONS,
    BlockStyle,
    Merge,
    ParameterConv,
    ResidualBlock,
    pad_to,
    residual_blocks,
)
from ladder_vae.networks.handlers import HideObserved, register
from ladder_vae.networks.images import check_images
from ladder_vae.networks.normals import SCALES, NormalFrom
from model import LadderModel


class BottomUp(nn.Module):
    """The deterministic pass from the image to one feature map per layer."""

    def __init__(self, style: BlockStyle, config: LadderConfig, image_shape: tuple[int, int, int]):
        super().__init__()
        image_channels, height, width = image_shape
        self.padded_size = config.padded_size((height, width))
        self.stem = nn.Sequential(
            nn.Conv2d(
                image_channels,
                style.channels,
                5,
                stride=2 if config.initial_downscaling else 1,
                padding=2,
            ),
            ACTIVATIONS[style.activation](),
            ResidualBlock(style, gated=False),
        )
        self.layers = nn.ModuleList(
            residual_blocks(style, config.blocks_per_layer, downsample, "down")
            for downsample in config.downsample
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """From x (N, C, H, W) to the feature maps [d_1, ..., d_L], bottom to top."""
        d = self.stem(pad_to(x, self.padded_size))
        features = []
        for layer in self.layers:
            d = layer(d)
            features.append(d)
        return features


class TopPosterior(nn.Module):
    """q(z_L | x), computed from d_L."""

    def __init__(self, channels: int, z_channels: int, normal_from: NormalFrom) -> None:
        super().__init__()
        self.normal_from = normal_from
        self.conv = ParameterConv(channels, 2 * z_channels)

    def forward(self, d: Tensor) -> dist.TorchDistribution:
        return self.normal_from(self.conv(d))


class ConditionalPosterior(nn.Module):
    """q(z_i | z_{>i}, x), computed from d_i merged with h_{i+1}."""

    def __init__(
        self, style: BlockStyle, merge_type: str, z_channels: int, normal_from: NormalFrom
    ) -> None:
        super().__init__()
        self.normal_from = normal_from
        self.merge = Merge(merge_type, style)
        self.conv = ParameterConv(style.channels, 2 * z_channels)

    def forward(self, d: Tensor, h_above: Tensor) -> dist.TorchDistribution:
        return self.normal_from(self.conv(on_batches(self.merge, d, h_above)))


class LadderGuide(GuideMessenger, nn.Module):
    """q(z | x) for a `LadderModel`, or for the same model under Pyro handlers.

    Calling the guide with images x (N, C, H, W) in [0, 1] draws z_L ... z_1 from q and runs the
    model on them; `get_traces()` then gives the traces of the model and of the guide.
    """

    if TYPE_CHECKING:  # inherited from GuideMessenger, whose types mypy does not follow
        model: Callable[..., Tensor]
        upstream_value: Callable[[str], Tensor]
        trace: Trace

    def __init__(
        self,
        model: Callable[..., Tensor],
        config: LadderConfig,
        image_shape: tuple[int, int, int],
    ) -> None:
        nn.Module.__init__(self)
        GuideMessenger.__init__(self, model)
        self.image_shape = image_shape
        self.likelihood_name = config.likelihood
        style = config.block_style()
        self.bottom_up = BottomUp(style, config, image_shape)
        normal_from = SCALES[config.scales]
        self.top_posterior = TopPosterior(config.n_filters, config.z_dims[-1], normal_from)
        self.posteriors = nn.ModuleList(
            ConditionalPosterior(style, config.merge_layers, z, normal_from)
            for z in config.z_dims[:-1]
        )
        self._features: Sequence[Tensor] = ()
        self._from_prior = 0

    def __call__(
        self, x: Tensor, features: Sequence[Tensor] | None = None, *, from_prior: int = 0
    ) -> dict[str, Tensor]:
        """Draw z from q(z | x) and run the model on it; returns the values of all sites by name.

        Args:
            x: images (N, C, H, W) in [0, 1].
            features: the result of `bottom_up(x)`, if already computed. Importance sampling
                computes it once per image and draws from it many times.
            from_prior: the number k of lowest layers, 0 to L, to draw from their priors instead.
                The ELBO is then the bound L^{>k} of Havtorn et al. (2021), "Hierarchical VAEs know
                what they don't know", in which the KL of these layers is zero.

        Raises:
            TypeError, ValueError: x does not suit the ladder, or `from_prior` is negative or above
                the number of layers.
        """
        device = self.top_posterior.conv.weight.device
        check_images(x, self.image_shape, device, likelihood=self.likelihood_name)
        depth = len(self.posteriors) + 1
        if not 0 <= from_prior <= depth:
            raise ValueError(f"from_prior is {from_prior}; it must be from 0 to {depth} layers")
        self._features = on_batches(self.bottom_up, x) if features is None else features
        self._from_prior = from_prior
        register("guide", self)
        try:
            with HideObserved():
                return super().__call__(x)
        finally:
            self._features = ()

    def get_traces(self) -> tuple[Trace, Trace]:
        """The traces of the model and of the guide in the last call.

        A latent that a handler around the guide has conditioned is observed: p(z_i | z_{>i}) scores
        it in the model's trace, and the guide's trace does not hold it.
        """
        model_trace, guide_trace = super().get_traces()
        for name, site in model_trace.nodes.items():
            if site["type"] == "sample" and "prior" in site["infer"]:
                model_trace.nodes[name] = site | {"fn": site["infer"]["prior"]}
        return model_trace, guide_trace

    def train(self, mode: bool = True) -> "LadderGuide":
        """Set training mode of the guide and of its model, whose top-down pass they share."""
        if isinstance(unwrapped := poutine.unwrap(self.model), nn.Module):
            unwrapped.train(mode)
        return super().train(mode)

    def __getstate__(self) -> dict[str, object]:
        """The attributes without the last trace: a copy or a pickle starts without one."""
        return {name: value for name, value in self.__dict__.items() if name != "trace"}

    def get_posterior(self, name: str, prior: dist.TorchDistribution) -> dist.TorchDistribution:
        """q(z_i | z_{>i}, x) for the site `name` = "z_i", which the model samples next."""
        i = int(name.removeprefix("z_"))
        if i <= self._from_prior:
            # p(z_i | z_{>i})
            return prior
        d = self._features[i - 1]
        if i == len(self._features):
            # q(z_L | x)
            return self.top_posterior(d)
        # q(z_i | z_{>i}, x)
        return self.posteriors[i - 1](d, self.upstream_value(f"h_{i + 1}"))


def build_ladder(
    config: LadderConfig, image_shape: tuple[int, int, int]
) -> tuple[LadderModel, LadderGuide]:
    """A model and its guide for images of shape `image_shape` (channels, height, width)."""
    model = LadderModel(config, image_shape)
    return model, LadderGuide(model, config, image_shape)
