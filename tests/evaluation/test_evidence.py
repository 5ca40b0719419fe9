"""The bound against a known log p(x)."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.testing import assert_close

from guide import LadderGuide
from ladder_vae.evaluation.importance import Bounds
from ladder_vae.evaluation.pareto import reliable_below
from ladder_vae.networks import LadderConfig
from ladder_vae.networks.normals import exponential
from model import LadderModel
from tests.evaluation.known_evidence import (
    Solved,
    bernoulli_ladder,
    integrated_evidence,
    joint_normal,
    linear_ladder,
    mean_and_error,
)

SAMPLES = [1, 4, 16, 64, 256]


def test_both_ways_to_the_evidence_agree() -> None:
    """The grid and the closed form, on a linear ladder with two scalar latents."""
    solved = linear_ladder([1, 1], (3, 1, 1), 4, gain=5)
    found = integrated_evidence(solved.model, solved.images.batch(torch.arange(4)))
    assert_close(found, solved.evidence, rtol=0, atol=1e-6)


# --- Any guide: the bound increases to the evidence ---


@pytest.fixture(
    scope="module",
    params=[lambda: linear_ladder([1, 2, 1], (1, 2, 2), 200, gain=1.5), bernoulli_ladder],
    ids=["linear", "bernoulli"],
)
def scored(request: pytest.FixtureRequest) -> tuple[Tensor, Bounds]:
    """log p(x) (N,) and its bounds, with an untrained guide."""
    torch.manual_seed(3)
    make: Callable[[], Solved] = request.param
    solved = make()
    return solved.evidence, solved.bounds(SAMPLES)


def test_the_bound_increases_with_the_number_of_samples(scored: tuple[Tensor, Bounds]) -> None:
    """The ELBO is clearly below it, and a large enough increase of K raises it significantly."""
    evidence, bounds = scored
    found = bounds.importance_weighted
    gap, error = mean_and_error(evidence - bounds.elbo)
    assert gap > 0.5
    assert error < 0.02
    difference, error = mean_and_error(bounds.elbo - found[1])  # which is the ELBO of one sample
    assert abs(difference) < 4 * error
    for fewer, more in itertools.pairwise(SAMPLES):
        assert found[more].mean() > found[fewer].mean()
    for fewer, more in ((1, 4), (4, 256)):
        increase, error = mean_and_error(found[more] - found[fewer])
        assert increase > 4 * error


def test_the_bound_comes_to_the_evidence_from_below(scored: tuple[Tensor, Bounds]) -> None:
    """It is not above the evidence at any K, and at most 0.02 nats below at the largest K.

    Both hold within four standard errors.
    """
    evidence, bounds = scored
    for k in SAMPLES:
        mean, error = mean_and_error(bounds.importance_weighted[k] - evidence)
        assert mean < 4 * error
    assert error < 0.02
    assert mean > -0.02 - 4 * error


def test_the_weights_are_unbiased(scored: tuple[Tensor, Bounds]) -> None:
    """The mean of w / p(x) is 1, at any number of samples."""
    evidence, bounds = scored
    for k in SAMPLES:
        mean, error = mean_and_error((bounds.importance_weighted[k] - evidence).exp())
        assert abs(mean - 1) < 4 * error
    assert error < 0.03


def test_the_elbo_misses_the_evidence_by_its_kl(scored: tuple[Tensor, Bounds]) -> None:
    """The gap is the divergence from the exact posterior, which cannot be negative."""
    evidence, bounds = scored
    assert_close(bounds.elbo, bounds.log_likelihood - bounds.kl.sum(1), rtol=0, atol=1e-12)
    gap = evidence - bounds.elbo  # the mean over 256 samples
    assert gap.min() > 0


# --- The exact posterior: no gap at all ---


class Features(nn.Module):
    """The image itself, for each of two layers."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, x]


class ExactGuide(LadderGuide):
    """q(z_2 | x) q(z_1 | z_2, x), exact for a joint Normal of (z_2, z_1, x)."""

    def __init__(self, model: LadderModel, config: LadderConfig, joint: MultivariateNormal) -> None:
        super().__init__(model, config, (3, 1, 1))
        self.bottom_up = Features()  # type: ignore[assignment]
        self.joint = joint

    def conditional(self, site: int, given: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (N, 1) of a variable given the last ones (N, last)."""
        mean, covariance = self.joint.loc, self.joint.covariance_matrix
        others = [*range(site), *range(2, 5)]
        weights = torch.linalg.solve(covariance[others][:, others], covariance[others, site])
        variance = covariance[site, site] - weights @ covariance[others, site]
        found = mean[site] + (given.double() - mean[others]) @ weights
        return found[:, None], variance.log().expand(len(given), 1)

    def get_posterior(self, name: str, prior: Any) -> Any:
        x = self._features[0].flatten(1)
        if name == "z_2":
            found = self.conditional(0, x)
        else:
            found = self.conditional(1, torch.cat([self.upstream_value("z_2").flatten(1), x], 1))
        return exponential(torch.cat(found, 1).float()[:, :, None, None])


@pytest.fixture
def exact() -> Solved:
    torch.manual_seed(4)
    solved = linear_ladder([1, 1], (3, 1, 1), 150, gain=5)
    config = LadderConfig(
        z_dims=[1, 1], downsample=[0, 0], n_filters=3, blocks_per_layer=1, likelihood="gaussian"
    )
    guide = ExactGuide(solved.model, config, joint_normal(solved.model)).eval()
    return solved._replace(guide=guide)


def test_the_exact_posterior_leaves_no_gap(exact: Solved) -> None:
    """Each weight is p(x), so every bound is the evidence, to single precision."""
    samples = [1, 2, 7, 100]
    bounds = exact.bounds(samples)
    for k in samples:
        assert_close(bounds.importance_weighted[k], exact.evidence, rtol=0, atol=1e-5)
    assert_close(bounds.elbo, exact.evidence, rtol=0, atol=1e-5)
    all_samples = torch.full_like(exact.evidence, 100)
    assert_close(bounds.effective_samples, all_samples, rtol=1e-8, atol=0)
    assert (bounds.pareto_k < reliable_below(100)).all()
    assert bounds.kl.mean(0).min() > 0.01  # but the posterior is not the prior


def test_kl_by_layer_averages_to_its_closed_form(exact: Solved) -> None:
    """Samples of both layers' KL average to it within four standard errors, bottom first."""
    assert isinstance(exact.guide, ExactGuide)
    x = exact.images.batch(torch.arange(len(exact.images))).flatten(1)
    prior = Normal(*prior_of(exact, None))
    mean, log_variance = exact.guide.conditional(0, x)
    top = Normal(mean, (log_variance / 2).exp())
    expected_top = kl_divergence(top, prior).squeeze(1)
    # The KL of the bottom layer is quadratic in z_2: three Gauss-Hermite points are exact.
    expected_bottom = torch.zeros_like(expected_top)
    for point, weight in ((-math.sqrt(3), 1 / 6), (0.0, 2 / 3), (math.sqrt(3), 1 / 6)):
        z = top.mean + point * top.stddev  # (N, 1)
        mean, log_variance = exact.guide.conditional(1, torch.cat([z, x], 1))
        posterior = Normal(mean, (log_variance / 2).exp())
        expected_bottom += weight * kl_divergence(posterior, Normal(*prior_of(exact, z))).squeeze(1)
    bounds = exact.bounds([100])
    for layer, expected in enumerate((expected_bottom, expected_top)):
        mean_difference, error = mean_and_error(bounds.kl[:, layer] - expected)
        assert abs(mean_difference) < 4 * error
        assert error < 0.1 * expected.mean()


def prior_of(solved: Solved, z_2: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and scale of p(z_2), or (N, 1) of p(z_1 | z_2), from the model in float64."""
    double = copy.deepcopy(solved.model).double()
    with torch.no_grad():
        if z_2 is None:
            prior = double.top_prior(1)
        else:
            prior = double.priors[0](double.layers[1](z_2[:, :, None, None], None))
    normal = prior.base_dist
    return normal.loc.flatten(1), normal.scale.flatten(1)
