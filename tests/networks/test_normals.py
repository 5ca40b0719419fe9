"""Priors and posteriors from the outputs of a convolution."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ladder_vae.networks.normals import SCALES, bounded, exponential, softplus


@pytest.mark.parametrize("scales", SCALES)
def test_shapes_and_the_standard_normal(scales: str) -> None:
    """The first half of the channels is the mean; outputs of zero give the standard Normal."""
    normal: Any = SCALES[scales](torch.zeros(5, 2, 6, 3, 4))
    assert (normal.batch_shape, normal.event_shape) == ((5, 2), (3, 3, 4))
    assert torch.equal(normal.base_dist.loc, torch.zeros(5, 2, 3, 3, 4))
    assert_close(normal.base_dist.scale, torch.ones(5, 2, 3, 3, 4))


def test_exponential() -> None:
    """The second half is the log-variance."""
    parameters = torch.randn(2, 6, 3, 4)
    normal: Any = exponential(parameters)
    assert torch.equal(normal.base_dist.loc, parameters[:, :3])
    assert_close(normal.base_dist.variance, parameters[:, 3:].exp())


def test_softplus() -> None:
    """log2(1 + 2^(v / 2)): v / 2 for large v, and 2^(v / 2) / log(2) for small v."""
    parameters = torch.tensor([7.0, 7.0, 7.0, 2.0, 200.0, -40.0]).view(6, 1, 1)
    normal: Any = softplus(parameters)
    assert torch.equal(normal.base_dist.loc.flatten(), torch.full((3,), 7.0))
    small = 2.0**-20 / torch.tensor(2.0).log()
    expected = torch.stack([torch.tensor(3.0).log2(), torch.tensor(100.0), small])
    assert_close(normal.base_dist.scale.flatten(), expected, rtol=1e-4, atol=0)


def test_bounded() -> None:
    """Mean and log-scale stay within +-5, and small outputs pass unchanged."""
    parameters = torch.tensor([0.01, 1e4, -1e4, -0.02, 1e4, -1e4]).view(6, 1, 1)
    normal: Any = bounded(parameters)
    assert_close(normal.base_dist.loc.flatten(), torch.tensor([0.01, 5.0, -5.0]))
    assert_close(normal.base_dist.scale.log().flatten(), torch.tensor([-0.01, 5.0, -5.0]))


@pytest.mark.parametrize("scales", SCALES)
def test_priors_and_posteriors_of_a_ladder(
    make_pair: Callable[..., tuple[Any, Any]], scales: str
) -> None:
    """All layers of a ladder follow the option, priors and posteriors alike."""
    model, guide = make_pair(scales=scales)
    with torch.no_grad():
        model.top_prior.mean_log_variance.fill_(3.0)
        for module in (*model.priors, *guide.posteriors, guide.top_posterior):
            module.conv.weight.zero_()
            module.conv.bias.fill_(3.0)
        guide(torch.ones(2, *model.image_shape))
    expected: Any = SCALES[scales](torch.full((2, 1, 1), 3.0))
    for trace in guide.get_traces():
        for name in ("z_1", "z_2", "z_3"):
            normal = trace.nodes[name]["fn"].base_dist
            assert_close(normal.loc, expected.base_dist.loc.expand_as(normal.loc))
            assert_close(normal.scale, expected.base_dist.scale.expand_as(normal.scale))
