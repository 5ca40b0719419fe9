"""The likelihood heads: their parameters, their shapes, and whole ladders with each of them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from elbo import FreeBitsELBO
from ladder_vae.evaluation.sampling import prior_samples, reconstructions
from ladder_vae.networks.blocks import ParameterConv
from ladder_vae.networks.discretized_logistic import DiscretizedLogistic
from ladder_vae.networks.discretized_logistic_mixture import DiscretizedLogisticMixture
from ladder_vae.networks.likelihoods import LIKELIHOODS
from ladder_vae.reports.image_grids import reconstruction_grid, sample_grid

MakePair = Callable[..., tuple[Any, Any]]

OUTPUTS = {"bernoulli": 3, "gaussian": 6, "discr_log": 6, "discr_log_mix": 100}


def head_and_features(name: str) -> tuple[Any, Tensor]:
    return LIKELIHOODS[name](partial(ParameterConv, 4), 3), torch.randn(5, 4, 6, 7)


def pixels(*shape: int) -> Tensor:
    """Images that every likelihood accepts: black and white, as Bernoulli needs."""
    return torch.rand(*shape).round()


def test_all_are_tested() -> None:
    assert OUTPUTS.keys() == LIKELIHOODS.keys()


@pytest.mark.parametrize("name", OUTPUTS)
def test_shapes(name: str) -> None:
    """One convolution; a batch of images, each image an event."""
    head, h = head_and_features(name)
    assert {key: tuple(p.shape) for key, p in head.named_parameters()} == {
        "conv.weight": (OUTPUTS[name], 4, 3, 3),
        "conv.bias": (OUTPUTS[name],),
    }
    d = head(h)
    assert d.batch_shape == (5,)
    assert d.event_shape == (3, 6, 7)
    assert d.log_prob(pixels(5, 3, 6, 7)).shape == (5,)
    assert d.sample().shape == d.mean.shape == (5, 3, 6, 7)


def test_parameters() -> None:
    """The parameters that each head computes from its convolution's output."""
    head, h = head_and_features("bernoulli")
    assert_close(head(h).base_dist.logits, head.conv(h))

    head, h = head_and_features("gaussian")
    out = head.conv(h)
    assert isinstance(head(h).base_dist, dist.Normal)
    assert_close(head(h).base_dist.loc, out[:, :3])
    assert_close(head(h).base_dist.scale ** 2, out[:, 3:].exp())

    head, h = head_and_features("discr_log")
    out = head.conv(30 * h)
    d = head(30 * h).base_dist
    assert isinstance(d, DiscretizedLogistic)
    assert_close(d.loc, out[:, :3] + 0.5)
    assert (out[:, 3:] < -6).any()
    assert_close(d.log_scale, (out[:, 3:] - 1).clamp(min=-7))

    head, h = head_and_features("discr_log_mix")
    ours, expected = head(h), DiscretizedLogisticMixture.from_channels(head.conv(h))
    for parameter in ("logits", "loc", "log_scale", "coefficients"):
        assert_close(getattr(ours, parameter), getattr(expected, parameter))


def test_gaussian_by_hand() -> None:
    """The log-density in nats, summed over the image."""
    head, h = head_and_features("gaussian")
    with torch.no_grad():
        head.conv.weight.zero_()
        head.conv.bias.copy_(torch.tensor([0.25] * 3 + [math.log(0.04)] * 3))
    x = torch.full((5, 3, 6, 7), 0.75)
    pixel = -0.5 * (0.5**2 / 0.04 + math.log(2 * math.pi * 0.04))
    assert_close(head(h).log_prob(x), torch.full((5,), 126 * pixel))


@pytest.mark.parametrize("name", OUTPUTS)
def test_single_precision_under_autocast(name: str) -> None:
    """Log-probabilities are in single precision even if the network computes in bfloat16."""
    head, h = head_and_features(name)
    x = pixels(5, 3, 6, 7)
    h = h.bfloat16()  # the output of a network in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.nn.functional.conv2d(h, head.conv.weight).dtype == torch.bfloat16
        d = head(h)
        log_prob = d.log_prob(x)
        for parameter in (d.mean, d.sample(), log_prob):
            assert parameter.dtype == torch.float32
    # Autocast rounds nothing else.
    assert_close(head(h.float()).log_prob(x), log_prob, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OUTPUTS)
def test_double_precision_is_kept(name: str) -> None:
    head, h = head_and_features(name)
    assert head.double()(h.double()).log_prob(pixels(5, 3, 6, 7).double()).dtype == torch.float64


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_the_mixture_is_for_colour(channels: int) -> None:
    with pytest.raises(ValueError, match="`likelihood` discr_log_mix needs images of 3 channels"):
        LIKELIHOODS["discr_log_mix"](partial(ParameterConv, 4), channels)


@pytest.mark.parametrize("pixel_shuffle", [False, True])
@pytest.mark.parametrize("name", OUTPUTS)
def test_ladder(name: str, pixel_shuffle: bool, make_pair: MakePair) -> None:
    """A ladder's gradients, samples, reconstructions and image grids."""
    model, guide = make_pair((3, 8, 10), likelihood=name, pixel_shuffle=pixel_shuffle)
    x = pixels(5, 3, 8, 10)
    FreeBitsELBO(0.5)(model, guide)(x).backward()
    for parameter in model.likelihood.parameters():
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().sum() > 0
    model.eval()
    samples = prior_samples(model, 4)
    assert samples.shape == (4, 3, 8, 10)
    reconstructed = reconstructions(guide, x)
    assert reconstructed.shape == x.shape
    for picture in (sample_grid(samples, 2), reconstruction_grid(x, reconstructed, 5)):
        assert len(picture) == 3
        assert ((picture >= 0) & (picture <= 1)).all()


@pytest.mark.parametrize("name", ["gaussian", "discr_log", "discr_log_mix"])
def test_learning_brings_the_mean_to_the_data(name: str) -> None:
    """A head whose biases alone are trained on one colour learns this colour as its mean."""
    x = torch.tensor([51 / 255, 204 / 255, 102 / 255]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    head, h = LIKELIHOODS[name](partial(ParameterConv, 2), 3), torch.zeros(1, 2, 4, 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    assert (head(h).mean - x).abs().max() > 0.2
    for _ in range(200):
        optimizer.zero_grad()
        (-head(h).log_prob(x).sum()).backward()
        optimizer.step()
    assert (head(h).mean - x).abs().max() < 0.02
