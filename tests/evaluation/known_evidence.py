"""Ladders with a known log p(x), small enough to integrate over their latents.

A linear ladder with Gaussian pixels has a Gaussian p(x) in closed form. A ladder with two scalar
latents is integrated on a grid, whatever its networks and its likelihood.
"""

import copy
import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

from datasets import ImageSet
from guide import LadderGuide, build_ladder
from ladder_vae.evaluation.importance import Bounds, importance_weighted_bounds
from ladder_vae.evaluation.interfaces import Images
from ladder_vae.networks import LadderConfig
from model import LadderModel


class GivenImages(ImageSet):
    """Images with pixels of any value."""

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self._stored[index]


class Solved(NamedTuple):
    """A ladder in evaluation mode, images, and their log p(x)."""

    model: LadderModel
    guide: LadderGuide
    images: Images
    evidence: Tensor  # (N,), nats, float64

    def bounds(self, samples: list[int], batch_size: int = 4096) -> Bounds:
        index = torch.arange(len(self.images))
        return importance_weighted_bounds(
            self.model, self.guide, self.images, index, samples, batch_size=batch_size, seed=1
        )


def made(
    z_dims: list[int], image_shape: tuple[int, int, int], likelihood: str, gain: float
) -> tuple[Any, Any]:
    """A ladder with skip connections whose guide is close to its priors.

    `gain` scales the effect of its latents.
    """
    config = LadderConfig(
        z_dims=z_dims,
        downsample=[0] * len(z_dims),
        n_filters=3,
        blocks_per_layer=1,
        initial_downscaling=False,
        skip=True,
        likelihood=likelihood,
    )
    model: Any
    guide: Any
    model, guide = build_ladder(config, image_shape)
    with torch.no_grad():
        model.top_prior.mean_log_variance.normal_(0, 0.3)
        for conv in (*(layer.expand for layer in model.layers), model.likelihood.conv):
            conv.weight.mul_(gain)
        for posterior in (guide.top_posterior, *guide.posteriors):
            posterior.conv.weight.mul_(0.3)
            # Wider than the exact posterior, so that the weights' variance is finite.
            posterior.conv.bias.chunk(2)[1].add_(0.5)
    return model.eval(), guide.eval()


# --- Linear ladders with Gaussian pixels ---


def linearise(model: Any) -> None:
    """Make all means linear in the latents, and all variances constant."""
    for layer in model.layers:
        layer.blocks = nn.Identity()
        if layer.skip is not None:
            layer.skip.residual = nn.Identity()
    model.decoder.blocks = nn.Identity()
    with torch.no_grad():
        for conv in (*(prior.conv for prior in model.priors), model.likelihood.conv):
            conv.weight.chunk(2)[1].zero_()  # the log-variances


class Noise(Messenger):
    """Draws the variables called `names` from the given noise (n, number of all elements)."""

    def __init__(self, names: list[str], noise: Tensor) -> None:
        super().__init__()
        self.names = names
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.names:
            normal = msg["fn"].base_dist
            count = normal.loc[0].numel()
            eps, self.noise = self.noise[:, :count], self.noise[:, count:]
            msg["value"] = normal.loc + normal.scale * eps.view_as(normal.loc)
            msg["done"] = True


def joint_normal(model: LadderModel) -> MultivariateNormal:
    """The joint distribution of all latents from the top, followed by the pixels.

    Every variable is mean(variables above) + scale * noise. With linear means, all variables are
    linear in the noise, so the images of zero noise and of the unit vectors determine them.
    """
    double = copy.deepcopy(model).double()
    names = [*(f"z_{i}" for i in range(len(model.layers), 0, -1)), "x"]

    def variables(noise: Tensor) -> Tensor:
        """(n, variables) from the noise of each."""
        with torch.no_grad(), Noise(names, noise):
            trace = poutine.trace(double).get_trace(n=len(noise))
        return torch.cat([trace.nodes[name]["value"].flatten(1) for name in names], 1)

    nodes = poutine.trace(double).get_trace(n=1).nodes
    count = sum(nodes[name]["value"].numel() for name in names)
    mean = variables(torch.zeros(1, count).double())
    columns = variables(torch.eye(count).double()) - mean  # row i: the image of unit vector i
    some = torch.randn(5, count).double()
    assert_close(variables(some), mean + some @ columns)  # it is linear
    return MultivariateNormal(mean[0], columns.T @ columns)


def marginal(joint: MultivariateNormal, last: int) -> MultivariateNormal:
    """The marginal distribution of the last variables."""
    return MultivariateNormal(joint.loc[-last:], joint.covariance_matrix[-last:, -last:])


def linear_ladder(
    z_dims: list[int], image_shape: tuple[int, int, int], n: int, gain: float
) -> Solved:
    """A linear ladder, with images drawn from the model."""
    model, guide = made(z_dims, image_shape, "gaussian", gain)
    linearise(model)
    with torch.no_grad():
        x = model(n=n)
    pixels = marginal(joint_normal(model), x[0].numel())
    images = GivenImages("made", "test", image_shape, x)
    return Solved(model, guide, images, pixels.log_prob(x.flatten(1).double()))


# --- Ladders with two scalar latents ---


def integrated_evidence(model: LadderModel, x: Tensor) -> Tensor:
    """log p(x) (N,), by the trapezoidal rule on a grid of both latents, in double precision."""
    double = copy.deepcopy(model).double()
    points = torch.linspace(-14, 14, 201, dtype=torch.float64)
    grid = torch.cartesian_prod(points, points).view(-1, 2, 1, 1, 1)  # (G, 2, 1, 1, 1)
    z = {"z_2": grid[:, 0], "z_1": grid[:, 1]}
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(double, z)).get_trace(n=len(grid))
    trace.compute_log_prob()
    prior = trace.nodes["z_2"]["log_prob"] + trace.nodes["z_1"]["log_prob"]  # (G,)
    cell = 2 * math.log(points[1] - points[0])
    likelihood = trace.nodes["x"]["fn"]
    sums = [(prior + likelihood.log_prob(image)).logsumexp(0) for image in x.double()]
    return torch.stack(sums) + cell


def bernoulli_ladder() -> Solved:
    """A ladder with all eight images of three binary pixels, each fifty times."""
    model, guide = made([1, 1], (3, 1, 1), "bernoulli", gain=5)
    with torch.no_grad():  # without a shift, three pixels would leave almost no gap
        for posterior in (guide.top_posterior, *guide.posteriors):
            posterior.conv.bias[0].add_(0.7)
    x = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3))).view(8, 3, 1, 1)
    evidence = integrated_evidence(model, x)
    assert evidence.exp().sum().item() == pytest.approx(1, abs=1e-9)
    images = GivenImages("made", "test", (3, 1, 1), x.repeat(50, 1, 1, 1))
    return Solved(model, guide, images, evidence.repeat(50))


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean, and its standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()
