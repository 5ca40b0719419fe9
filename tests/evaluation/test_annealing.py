"""Annealed importance sampling: against a known log p(x), and the parts it is made of."""

import copy
import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ladder_vae.evaluation.annealed import Annealed, AnnealedSampler, Annealing
from ladder_vae.evaluation.annealing import (
    TARGET_ACCEPTANCE,
    Chains,
    LogWeight,
    Path,
    anneal,
    schedule,
)
from ladder_vae.evaluation.kl import sampled_terms
from ladder_vae.evaluation.sandwich import generated, sandwich_temperatures
from tests.evaluation.known_evidence import (
    Solved,
    bernoulli_ladder,
    integrated_evidence,
    joint_normal,
    linear_ladder,
    marginal,
    mean_and_error,
)


def sampler_for(solved: Solved, temperatures: int, chains: int, **options: Any) -> AnnealedSampler:
    settings: dict[str, Any] = {"batch_size": 4096, "seed": 1}
    return AnnealedSampler(
        solved.guide,
        solved.images,
        torch.arange(len(solved.images)),
        Annealing(temperatures, chains),
        **(settings | options),
    )


def everything(sampler: AnnealedSampler) -> Annealed:
    return sampler.in_order(sampler.group(number).table() for number in range(len(sampler)))


# --- Against log p(x) ---


def generated_linear() -> tuple[Solved, dict[str, Tensor]]:
    """A linear ladder with 60 images of its own, their latents and their log p(x)."""
    solved = linear_ladder([1, 2, 1], (1, 2, 2), 2, gain=1.5)
    images, latents = generated(solved.model, 60, batch_size=40, seed=5)
    x = images.batch(torch.arange(60))
    pixels = marginal(joint_normal(solved.model), x[0].numel())
    evidence = pixels.log_prob(x.flatten(1).double())
    return solved._replace(images=images, evidence=evidence), latents


def generated_bernoulli() -> tuple[Solved, dict[str, Tensor]]:
    """A ladder with two scalar latents, with 60 images of its own, likewise."""
    solved = bernoulli_ladder()
    images, latents = generated(solved.model, 60, batch_size=40, seed=5)
    evidence = integrated_evidence(solved.model, images.batch(torch.arange(60)))
    return solved._replace(images=images, evidence=evidence), latents


@pytest.mark.parametrize("make", [generated_linear, generated_bernoulli])
def test_forward_and_reverse_chains_enclose_the_evidence(make: Any) -> None:
    """Below and above it in the mean, and closer with more temperatures on both sides."""
    torch.manual_seed(3)
    solved, latents = make()
    below: list[float] = []
    above: list[float] = []
    for temperatures in (2, 8, 32):
        found = everything(sampler_for(solved, temperatures, 4, latents=latents))
        single = found.log_weights.mean(1), found.reverse_log_weights.mean(1)
        for value, gaps, sign in zip(single, (below, above), (-1, 1), strict=True):
            gap, error = mean_and_error(sign * (value - solved.evidence))
            assert gap > -4 * error
            gaps.append(gap)
        # Several chains are closer than one.
        assert found.bound.mean() > single[0].mean()
        assert found.upper_bound.mean() < single[1].mean()
        assert (found.acceptance > 0.5).all()
    for gaps in (below, above):
        assert gaps[0] > 0.2
        assert gaps[2] < 0.2 * gaps[0]


def test_the_weights_are_unbiased() -> None:
    """E[W] = p(x): 100,000 chains of one image, within three standard errors."""
    torch.manual_seed(3)
    solved = bernoulli_ladder()
    sampler = AnnealedSampler(
        solved.guide, solved.images, torch.tensor([3]), Annealing(3, 100_000), batch_size=1, seed=2
    )
    found = everything(sampler)
    ratios = (found.log_weights[0] - solved.evidence[3]).exp()
    mean, error = mean_and_error(ratios)
    assert abs(mean - 1) < 3 * error
    assert error < 0.005
    assert ratios.std() > 0.1  # there is something to average


# --- Transitions ---


def stationary(gain: float, n: int) -> Chains:
    """Chains at exact samples of p(z | x), each with its own image."""
    torch.manual_seed(6)
    solved = linear_ladder([1, 2, 1], (1, 2, 2), 2, gain=gain)
    images, latents = generated(solved.model, n, batch_size=n, seed=7)
    x = images.batch(torch.arange(n))
    with torch.no_grad():
        log_weight = LogWeight(solved.guide, x, solved.guide.bottom_up(x))
    return Chains(log_weight, log_weight.noise(latents))


def test_detailed_balance() -> None:
    """In equilibrium, a transition and its reverse are equally likely.

    So E[a(eps) b(eps')] = E[b(eps) a(eps')] for any functions of the chain before and after.
    """
    chains = stationary(gain=4.0, n=8000)
    before = (chains.log_w.clone(), chains.eps.square().sum(1), chains.eps[:, 0].clone())
    with torch.no_grad():
        acceptance = chains.move(1.0, torch.full((8000,), 0.6))
    after = (chains.log_w, chains.eps.square().sum(1), chains.eps[:, 0])
    assert 0.3 < acceptance.mean() < 0.95  # the decision matters
    assert (chains.eps[:, 0] != before[2]).double().mean() > 0.3
    for a in range(3):
        change, error = mean_and_error(after[a].double() - before[a].double())
        assert abs(change) < 4 * error
        for b in range(a):
            flow = before[a] * after[b] - before[b] * after[a]
            mean, error = mean_and_error(flow.double())
            assert abs(mean) < 4 * error


def test_a_transition_at_zero_is_that_of_the_guide() -> None:
    """At beta = 0 the Hamiltonian is followed exactly, and the noise stays standard normal."""
    chains = stationary(gain=4.0, n=4000)
    with torch.no_grad():
        chains.eps = torch.randn_like(chains.eps)
        acceptance = chains.move(0.0, torch.full((4000,), 0.7))
    assert_close(acceptance, torch.ones_like(acceptance), rtol=0, atol=1e-5)
    assert_close(chains.eps.mean(0), torch.zeros_like(chains.eps[0]), rtol=0, atol=0.08)
    assert_close(chains.eps.std(0), torch.ones_like(chains.eps[0]), rtol=0, atol=0.08)


def test_the_pilot_run_finds_the_step_size() -> None:
    """On a narrow posterior the acceptance comes close to the target, for each image."""
    torch.manual_seed(6)
    solved = linear_ladder([1, 2, 1], (1, 2, 2), 2, gain=10.0)
    images, _ = generated(solved.model, 5, batch_size=5, seed=7)
    x = images.batch(torch.arange(5)).repeat_interleave(20, 0)
    with torch.no_grad():
        log_weight = LogWeight(solved.guide, x, solved.guide.bottom_up(x))
        noise = torch.randn(2, len(x), log_weight.dimensions)
        path = Path.tuned(log_weight, noise[0], 200, 20)
        _, acceptance = anneal(Chains(log_weight, noise[1]), path)
    assert len(path.betas) == 201
    by_image = acceptance.unflatten(0, (5, 20)).mean(1)
    assert_close(by_image, torch.full((5,), TARGET_ACCEPTANCE), rtol=0, atol=0.15)
    # Chains of an image share its step size, which differs between images.
    steps = path.steps.unflatten(1, (5, 20))
    assert (steps == steps[:, :, :1]).all()
    assert steps[-1, :, 0].unique().numel() == 5


def test_noise_and_latents() -> None:
    """The noise of given latents makes these latents, and log w is that of the guide's pass."""
    torch.manual_seed(8)
    solved = linear_ladder([2, 1], (1, 2, 2), 6, gain=2.0)
    x = solved.images.batch(torch.arange(6))
    guide: Any = solved.guide
    with torch.no_grad():
        drawn = guide(x)
        log_likelihood, kl = sampled_terms(guide)
        expected = log_likelihood - kl.sum(1)
        log_weight = LogWeight(guide, x, guide.bottom_up(x))
        eps = log_weight.noise({name: drawn[name] for name in ("z_1", "z_2")})
        found, gradient = log_weight(eps)
        assert_close(found, expected)
        # The gradient is that of finite differences, in double precision.
        double = copy.deepcopy(guide).double()
        double._model = (copy.deepcopy(solved.model).double(),)
        exact = LogWeight(double, x.double(), double.bottom_up(x.double()))
        direction = torch.randn_like(eps).double()
        step = 1e-5 * direction
        difference = (exact(eps.double() + step)[0] - exact(eps.double() - step)[0]) / 2e-5
    assert_close((gradient.double() * direction).sum(1), difference, rtol=1e-3, atol=1e-3)


def test_schedule() -> None:
    """From 0 to 1, in ascending and symmetric steps that are smallest at both ends."""
    for temperatures in (2, 3, 10, 101):
        betas = torch.tensor(schedule(temperatures), dtype=torch.float64)
        assert len(betas) == temperatures + 1
        assert (betas[0], betas[-1]) == (0, 1)
        steps = betas.diff()
        assert (steps > 0).all()
        assert_close(steps, steps.flip(0))
        assert steps[0] <= steps.min() + 1e-12


def test_temperatures_of_a_sandwich() -> None:
    assert sandwich_temperatures(800) == [100, 200, 400, 800]
    assert sandwich_temperatures(6) == [2, 3, 6]
    assert sandwich_temperatures(2) == [2]


# --- Groups ---


def test_results_do_not_depend_on_the_order_of_the_work() -> None:
    """The groups in any order, and images in any order, give the same digits, times apart."""
    torch.manual_seed(9)
    solved = linear_ladder([1, 1], (1, 2, 2), 7, gain=2.0)
    sampler = sampler_for(solved, 3, 2, batch_size=4)
    assert (len(sampler), sampler.pairs) == (4, 4)
    tables = {number: sampler.group(number).table() for number in (2, 0, 3, 1)}
    found = sampler.in_order(tables[number] for number in range(4))
    again = everything(sampler_for(solved, 3, 2, batch_size=4))
    assert torch.equal(found.log_weights, again.log_weights)
    other = AnnealedSampler(
        solved.guide, solved.images, torch.arange(7).flip(0), Annealing(3, 2), batch_size=4, seed=1
    )
    assert torch.equal(everything(other).log_weights, again.log_weights.flip(0))
    assert not torch.equal(
        everything(sampler_for(solved, 3, 2, batch_size=4, seed=2)).log_weights, again.log_weights
    )
    assert (found.seconds > 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((1, 4), "`temperatures` is 1; it must be at least 2"),
        ((5, 0), "`chains` is 0; it must be at least 1"),
    ],
)
def test_invalid_numbers(settings: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Annealing(*settings)


class WithoutGradient(nn.Module):
    """A likelihood of rounded logits."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.conv = head.conv

    def forward(self, h: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.conv(h).round()).to_event(3)


def test_a_likelihood_without_a_gradient_is_refused() -> None:
    solved = bernoulli_ladder()
    model: Any = solved.model
    model.likelihood = WithoutGradient(model.likelihood)
    with pytest.raises(ValueError, match="needs a likelihood with a gradient in the latents"):
        everything(sampler_for(solved, 3, 1))


def test_several_chains_are_averaged() -> None:
    """Both bounds, for numbers that are easy to check."""
    log_weights = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    one = torch.ones(1, dtype=torch.float64)
    found = Annealed(log_weights, log_weights, one, one)
    assert found.bound.exp().item() == pytest.approx(2)
    assert found.upper_bound.exp().item() == pytest.approx(1 / ((1 + 1 / 3) / 2))
    again = Annealed.from_table(found.table(), 2)
    assert_close(again.table(), found.table())
