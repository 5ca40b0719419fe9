"""What each layer of a ladder knows: images and KL maps, as Pyro programs on model and guide.

Images come as the means of p(x | z). A draw of x would add noise to each pixel by itself, which
says nothing of the latents and hides how alike two images are. Draws of latents come from the
global random generator, which the caller seeds; put model and guide in evaluation mode first.
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
    """Multiplies the standard deviation of each layer's latents as they are drawn.

    Of the priors p(z_i | z_{>i}) around a `LadderModel`, of the posteriors q(z_i | z_{>i}, x)
    around a `LadderGuide`; latents that are conditioned on stay as they are. At temperature 0 a
    layer is at the mean of its distribution, which is its mode too.

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
    """Raise `UserError` unless `temperature` is one for all of `depth` layers or one for each."""
    values = temperature if isinstance(temperature, Sequence) else [temperature] * depth
    if len(values) != depth:
        raise UserError(
            f"{len(values)} temperatures are given and the ladder has {depth} layers; give one "
            "for all, or one for each layer from the bottom"
        )
    for value in values:
        if not 0 <= value < float("inf"):
            raise UserError(f"a temperature is {value}; it must be finite and not negative")


@torch.no_grad()
def prior_samples(model: Model, n: int, temperature: float | Sequence[float] = 1.0) -> Tensor:
    """The means of p(x | z) for n draws of z from the prior, (n, C, H, W) in [0, 1].

    `temperature` multiplies the standard deviation of the priors, for all layers or, bottom to
    top, for each. Raises `UserError` for temperatures that do not fit the ladder.
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
    """What varies with one layer's latents: means of p(x | z), (rows, columns, C, H, W).

    In each row the layers above `layer` (1 at the bottom) are drawn once and shared, `layer` is
    drawn anew for each column, and the layers below are at the mode of their prior:

        z_i ~ p(z_i | z_{>i})  for i > layer, once for each row
        z_layer ~ p(z_layer | z_{>layer}),  for each column
        z_i = mode of p(z_i | z_{>i})  for i < layer

    At the top layer no row shares anything. Raises `UserError` where there is no such layer.
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
    """From one image to another through each level of the ladder: (L, steps, C, H, W).

    `ends` (2, C, H, W) are encoded from the top down, each z_i as the mean of q(z_i | z_{>i}, x)
    given the means above it. At level i the latents of layers L ... i go from the first image's to
    the second's along a straight line, and the layers below are at the mode of their prior. Levels
    are listed from the top, L, as a picture has its rows: the first moves in the most abstract
    layer alone, and the last, where all layers move, begins and ends with the reconstructions of
    `ends` from their posteriors' means. Images are means of p(x | z).
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
    """The means of p(x | z) for n images, (n, C, H, W), with some of the latents given."""
    trace = poutine.trace(poutine.condition(model, data=latents)).get_trace(n=n)
    return trace.nodes["x"]["fn"].mean
