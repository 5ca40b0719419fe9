"""Particles of the free-bits ELBO, scales and masks."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.testing import assert_close

from elbo import FreeBitsELBO
from ladder_vae.networks.batches import on_batches

MakePair = Callable[..., tuple[Any, Any]]


@pytest.fixture
def pair(make_pair: MakePair) -> tuple[Any, Any]:
    model, guide = make_pair(skip=True, gated=True, learn_top_prior=True)
    return model.eval(), guide.eval()


class Noise(poutine.messenger.Messenger):
    """Draws latents with given noise: (K, N, Z, h, w), or one of its K particles at a time."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.noise:
            normal = msg["fn"].base_dist
            msg["value"] = normal.loc + normal.scale * self.noise[msg["name"]]


def noise_for(guide: Any, x: Tensor, particles: int) -> dict[str, Tensor]:
    latents = {name: value for name, value in guide(x).items() if name.startswith("z_")}
    return {name: torch.randn(particles, *value.shape) for name, value in latents.items()}


def test_vectorized_particles_are_sequential_ones(pair: tuple[Any, Any], x: Tensor) -> None:
    """The same per-image terms on the same noise."""
    noise = noise_for(pair[1], x, 3)
    with Noise(noise):
        together = FreeBitsELBO(num_particles=3, vectorize_particles=True).compute_terms(*pair, x)
    assert together.log_likelihood.shape == (3, 5)
    assert together.kl.shape == (3, 5, 3)
    for k in range(3):
        with Noise({name: value[k] for name, value in noise.items()}):
            alone = FreeBitsELBO().compute_terms(*pair, x)
        assert_close(together.log_likelihood[k], alone.log_likelihood, rtol=1e-5, atol=1e-4)
        assert_close(together.kl[k], alone.kl, rtol=1e-4, atol=1e-4)


def test_a_plate_to_the_left_of_the_images(pair: tuple[Any, Any], x: Tensor) -> None:
    """Two groups of images at once, x (2, N, C, H, W) with them, are the groups one by one."""
    groups = torch.stack([x, 1 - x])
    noise = noise_for(pair[1], x, 2)
    with Noise(noise), pyro.plate("groups", 2, dim=-2):
        terms = FreeBitsELBO().compute_terms(*pair, groups)
    for k in range(2):
        with Noise({name: value[k] for name, value in noise.items()}):
            alone = FreeBitsELBO().compute_terms(*pair, groups[k])
        assert_close(terms.elbo[k], alone.elbo, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("vectorized", [False, True])
@pytest.mark.parametrize("analytic", [False, True])
def test_losses_and_gradients_are_pyros(
    pair: tuple[Any, Any], x: Tensor, vectorized: bool, analytic: bool
) -> None:
    options = {"num_particles": 3, "vectorize_particles": vectorized, "max_plate_nesting": 1}
    theirs = (TraceMeanField_ELBO if analytic else Trace_ELBO)(**options)
    ours = FreeBitsELBO(analytic_kl=analytic, **options)
    parameters = [p for module in pair for p in module.parameters()]
    results = []
    for elbo in (theirs, ours):
        torch.manual_seed(0)
        loss = elbo(*pair)(x)
        gradients = torch.autograd.grad(loss, parameters)
        torch.manual_seed(0)
        results.append((loss, gradients, elbo.loss(*pair, x)))
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-3)


def test_terms_are_kept_averaged_over_particles(pair: tuple[Any, Any], x: Tensor) -> None:
    for vectorized in (False, True):
        elbo = FreeBitsELBO(0.5, num_particles=4, vectorize_particles=vectorized)
        terms = elbo.compute_terms(*pair, x)
        assert elbo.terms is not None
        assert_close(elbo.terms.log_likelihood, terms.log_likelihood.mean(0))
        assert_close(elbo.terms.kl, terms.kl.mean(0))
        expected = (terms.kl.clamp(min=0.5).sum() - terms.log_likelihood.sum()) / 4
        assert_close(elbo.objective(terms), expected)


@pytest.mark.parametrize("analytic", [False, True])
def test_a_scale_multiplies_the_objective(pair: tuple[Any, Any], x: Tensor, analytic: bool) -> None:
    """Free bits included, as with Pyro's ELBO."""
    model, guide = pair
    elbo = FreeBitsELBO(2.0, analytic_kl=analytic)
    torch.manual_seed(0)
    plain = elbo.differentiable_loss(model, guide, x)
    torch.manual_seed(0)
    scaled = elbo.differentiable_loss(
        poutine.scale(model, scale=0.25), poutine.scale(guide, scale=0.25), x
    )
    assert_close(scaled, 0.25 * plain)
    torch.manual_seed(0)
    theirs = Trace_ELBO().loss(
        poutine.scale(model, scale=0.25), poutine.scale(guide, scale=0.25), x
    )
    torch.manual_seed(0)
    unclamped = FreeBitsELBO().loss(model, guide, x)
    assert theirs == pytest.approx(0.25 * unclamped, rel=1e-5)


def test_masked_images_contribute_nothing(pair: tuple[Any, Any], x: Tensor) -> None:
    model, guide = pair
    kept = torch.tensor([True, False, True, True, False])
    elbo = FreeBitsELBO(2.0)
    torch.manual_seed(0)
    masked = elbo.differentiable_loss(
        poutine.mask(model, mask=kept), poutine.mask(guide, mask=kept), x
    )
    torch.manual_seed(0)
    terms = elbo.compute_terms(model, guide, x)
    by_image = terms.kl.clamp(min=2.0).sum(1) - terms.log_likelihood
    assert_close(masked, by_image[kept].sum())


def test_batch_dimensions_broadcast() -> None:
    """Feature maps of different batch shapes meet in a network of two."""
    a, b = torch.randn(3, 1, 2, 4, 4), torch.randn(5, 2, 4, 4)
    result = on_batches(lambda a, b: torch.cat([a, b], 1), a, b)
    assert result.shape == (3, 5, 4, 4, 4)
    assert_close(result[2, 4], torch.cat([a[2, 0], b[4]]))
    halves = on_batches(lambda a: list(a.split(1, 1)), a)
    assert_close(torch.cat(halves, -3), a)
