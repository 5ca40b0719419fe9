"""Images from a ladder: samples from its prior, and images that show what each layer encodes.

All are means of p(x | z): a draw of x would only add independent noise to each pixel.
Latents are drawn with the global random generator, which the caller seeds. Put model and guide in
evaluation mode first.
"""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ladder_vae.evaluation.interfaces import Guide, Model
from runtime.errors import UserError


class Temperature(Messenger):
    """A Pyro handler that multiplies the standard deviation of each layer's latents.

    Around a `LadderModel` it applies to the priors p(z_i | z_{>i}), around a `LadderGuide` to the
    posteriors q(z_i | z_{>i}, x). It does not change conditioned latents. At temperature 0 a
    layer's latents are at the mean of their distribution, which is also its mode.

    Args:
        temperature: one for all layers, or one for each, bottom to top; finite and not negative.
    """

    def __init__(self, temperature: float | Sequence[float]) -> None:
        super().__init__()
        self.temperature = temperature

    def _pyro_sample(self, site: dict[str, Any]) -> None:
        if not site["name"].startswith("z_") or site["is_observed"]:
            return
        normal = site["fn"].base_dist  # over feature maps (N, Z, h, w)
        temperature = self._of(int(site["name"].removeprefix("z_")))
        site["fn"] = (
            dist.Normal(normal.loc, normal.scale * temperature).to_event(3)
            if temperature > 0
            else dist.Delta(normal.loc, event_dim=3)
        )

    def _of(self, layer: int) -> float:
        temperature = self.temperature
        return temperature[layer - 1] if isinstance(temperature, Sequence) else temperature


def check_temperature(temperature: float | Sequence[float], depth: int) -> None:
    """Raise `UserError` unless `temperature` is one for all of `depth` layers, or one for each."""
    values = temperature if isinstance(temperature, Sequence) else [temperature] * depth
    if len(values) != depth:
        raise UserError(
            f"--temperature has {len(values)} values but the ladder has {depth} layers; give one "
            "value for all layers, or one for each from the bottom"
        )
    for value in values:
        if not 0 <= value < float("inf"):
            raise UserError(f"--temperature is {value}; it must be finite and not negative")


@torch.no_grad()
def prior_samples(model: Model, n: int, temperature: float | Sequence[float] = 1.0) -> Tensor:
    """The means of p(x | z) for n draws of z from the prior, (n, C, H, W) in [0, 1].

    `temperature` multiplies the standard deviation of the priors of all layers, or of each from the
    bottom. Raises `UserError` if it does not fit the ladder.
    """
    check_temperature(temperature, len(model.layers))
    with Temperature(temperature):
        return _image_means(model, n, {})


@torch.no_grad()
def reconstructions(guide: Guide, x: Tensor) -> Tensor:
    """The means of p(x | z) for one draw of z from q(z | x) for each image x (N, C, H, W)."""
    guide(x)
    model_trace, _ = guide.get_traces()
    return model_trace.nodes["x"]["fn"].mean


@torch.no_grad()
def layer_samples(model: Model, layer: int, rows: int, columns: int) -> Tensor:
    """Means of p(x | z) that show what one layer encodes, (rows, columns, C, H, W).

    For each row, the layers above `layer` (1 at the bottom) are drawn once. For each image in it,
    `layer` is drawn, and the layers below are at the mode of their prior:

        z_i ~ p(z_i | z_{>i})  for i > layer, once for each row
        z_layer ~ p(z_layer | z_{>layer})  for each image
        z_i = mode of p(z_i | z_{>i})  for i < layer

    At the top layer, all images are independent. Raises `UserError` if there is no such layer.
    """
    depth = len(model.layers)
    if not 1 <= layer <= depth:
        raise UserError(f"there is no layer {layer}; layers go from 1, the bottom, to {depth}")
    above = poutine.trace(model).get_trace(n=rows)
    shared = {
        f"z_{i}": above.nodes[f"z_{i}"]["value"].repeat_interleave(columns, 0)
        for i in range(layer + 1, depth + 1)
    }
    with Temperature([0.0] * (layer - 1) + [1.0] * (depth - layer + 1)):
        means = _image_means(model, rows * columns, shared)
    return means.unflatten(0, (rows, columns))


@torch.no_grad()
def interpolations(model: Model, guide: Guide, ends: Tensor, steps: int) -> Tensor:
    """Interpolations between two images at each level of the ladder: (L, steps, C, H, W).

    `ends` (2, C, H, W) are encoded from the top down, each z_i as the mean of q(z_i | z_{>i}, x)
    given the means above it. At level i, the latents of layers i ... L are interpolated linearly,
    and the layers below are at the mode of their prior. Levels are listed from the top: the first
    interpolates the top layer alone. The last interpolates all layers, so it starts and ends with
    the reconstructions of `ends`. Images are means of p(x | z).
    """
    depth = len(model.layers)
    with Temperature(0.0):
        encoded = guide(ends)
    way = torch.linspace(0, 1, steps, device=ends.device).view(-1, 1, 1, 1)
    latents: dict[str, Tensor] = {}
    levels = []
    for i in range(depth, 0, -1):
        first, second = encoded[f"z_{i}"]  # each (Z, h, w)
        latents[f"z_{i}"] = torch.lerp(first, second, way)
        with Temperature(0.0):
            levels.append(_image_means(model, steps, latents))
    return torch.stack(levels)


def _image_means(model: Model, n: int, latents: dict[str, Tensor]) -> Tensor:
    """The means of p(x | z) for n images, (n, C, H, W), given some of the latents."""
    trace = poutine.trace(poutine.condition(model, data=latents)).get_trace(n=n)
    return trace.nodes["x"]["fn"].mean
