"""The importance-weighted objective and its doubly reparameterised gradient."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro.infer import RenyiELBO
from torch import Tensor
from torch.func import functional_call
from torch.testing import assert_close

from elbo import FreeBitsELBO, ImportanceWeightedELBO

MakePair = Callable[..., tuple[Any, Any]]


@pytest.fixture
def pair(make_pair: MakePair) -> tuple[Any, Any]:
    model, guide = make_pair(skip=True, gated=True, learn_top_prior=True, dropout=0.0)
    return model.eval(), guide.eval()


def flat(gradients: list[Tensor | None], parameters: list[Tensor]) -> Tensor:
    parts = [
        torch.zeros_like(p) if g is None else g for g, p in zip(gradients, parameters, strict=True)
    ]
    return torch.cat([part.flatten() for part in parts])


def test_the_value_is_the_importance_weighted_bound(pair: tuple[Any, Any], x: Tensor) -> None:
    """log (1/K) sum_k w_k, summed over the images, from the terms of as many particles."""
    for seed in range(3):
        torch.manual_seed(seed)
        terms = FreeBitsELBO(num_particles=5, vectorize_particles=True).compute_terms(*pair, x)
        expected = -(terms.elbo.logsumexp(0) - math.log(5)).sum()
        elbo = ImportanceWeightedELBO(5)
        torch.manual_seed(seed)
        assert_close(elbo.differentiable_loss(*pair, x), expected, rtol=1e-5, atol=1e-4)
        torch.manual_seed(seed)
        assert elbo.loss(*pair, x) == pytest.approx(expected.item(), rel=1e-5)
        assert elbo.terms is not None
        assert_close(elbo.terms.log_likelihood, terms.log_likelihood.mean(0))
        assert_close(elbo.terms.kl, terms.kl.mean(0))


def test_of_one_image_it_is_renyis_bound(pair: tuple[Any, Any], x: Tensor) -> None:
    """Pyro's weights are joint over a batch, ours are by image."""
    renyi = RenyiELBO(alpha=0, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(0)
    expected = renyi.loss(*pair, x[:1])
    torch.manual_seed(0)
    assert ImportanceWeightedELBO(5).loss(*pair, x[:1]) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_by_its_definition(pair: tuple[Any, Any], x: Tensor) -> None:
    """Both sums of Tucker et al. (2019), equation 8, term by term, for one draw of the noise.

    Two copies of the parameters tell the densities' own from those of the draws: `functional_call`
    runs the pair once to draw z, and the terms are differentiated through one role at a time.
    """
    model, guide = pair
    particles = 3
    loss_fn: Any = FreeBitsELBO(num_particles=particles, vectorize_particles=True)(model, guide)
    names, parameters = zip(*loss_fn.named_parameters(), strict=True)

    torch.manual_seed(1)
    loss = ImportanceWeightedELBO(particles).differentiable_loss(model, guide, x)
    found = flat(list(torch.autograd.grad(loss, parameters, allow_unused=True)), list(parameters))

    def terms(values: dict[str, Tensor], given: dict[str, Tensor] | None) -> tuple[Any, Any]:
        """Latents, log p and log w with these parameters, drawn or given."""
        with pyro_values(guide, given):
            torch.manual_seed(1)
            functional_call(loss_fn, values, (x,))
        sites = guide.trace.nodes
        latents = [n for n in sites if n.startswith("z_")]
        z = {n: sites[n]["value"] for n in latents}
        log_p = sites["x"]["fn"].log_prob(x) + sum(
            sites[n]["infer"]["prior"].log_prob(z[n]) for n in latents
        )
        log_q = sum(sites[n]["fn"].log_prob(z[n]) for n in latents)
        return z, (log_p, log_p - log_q)

    own = dict(zip(names, parameters, strict=True))
    held = {name: value.detach() for name, value in own.items()}
    drawn, _ = terms(own, None)
    leaves = {name: z.detach().requires_grad_() for name, z in drawn.items()}
    _, (_, log_w) = terms(held, leaves)
    v = log_w.detach().softmax(0)
    by_z = torch.autograd.grad(log_w.sum(), list(leaves.values()))
    _, (log_p, _) = terms(own, {name: z.detach() for name, z in drawn.items()})
    densities = torch.autograd.grad((v * log_p).sum(), parameters, allow_unused=True)
    weighted = [v[..., None, None, None] ** 2 * gradient for gradient in by_z]
    draws = torch.autograd.grad(list(drawn.values()), parameters, weighted, allow_unused=True)
    expected = -flat(list(densities), list(parameters)) - flat(list(draws), list(parameters))
    assert expected.norm() > 1
    assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


class pyro_values:  # noqa: N801 (used like a function)
    """Puts given values in the place of the guide's draws, still as drawn sites."""

    def __init__(self, guide: Any, values: dict[str, Tensor] | None) -> None:
        self.guide, self.values = guide, values

    def __enter__(self) -> None:
        self.original = self.guide._pyro_post_sample

        def replace(msg: Any) -> None:
            if self.values is not None and msg["name"] in self.values:
                msg["value"] = self.values[msg["name"]]
            self.original(msg)

        self.guide._pyro_post_sample = replace

    def __exit__(self, *_: Any) -> None:
        del self.guide._pyro_post_sample


def test_the_gradient_is_unbiased(pair: tuple[Any, Any], x: Tensor) -> None:
    """Its mean over noise is that of the plain gradient of the bound, and it varies less."""
    model, guide = pair
    parameters = [p for module in (model, guide) for p in module.parameters()]
    plain = FreeBitsELBO(num_particles=4, vectorize_particles=True)
    ours = ImportanceWeightedELBO(4)

    def plain_loss() -> Tensor:
        return ours.objective(plain.compute_terms(model, guide, x[:1]))

    def gradients(loss: Callable[[], Tensor]) -> Tensor:
        found = []
        for seed in range(100):
            torch.manual_seed(seed)
            gradient = torch.autograd.grad(loss(), parameters, allow_unused=True)
            found.append(flat(list(gradient), parameters))
        return torch.stack(found)

    doubly = gradients(lambda: ours.differentiable_loss(model, guide, x[:1]))
    once = gradients(plain_loss)
    difference = doubly - once
    error = difference.std(0) / math.sqrt(len(difference))
    scores = (difference.mean(0) / error)[error > 1e-9]
    assert len(scores) > 1000
    assert scores.square().mean().sqrt().item() == pytest.approx(1, abs=0.3)
    assert doubly.var(0).sum() < once.var(0).sum()


def test_finite_differences_of_the_bound(pair: tuple[Any, Any], x: Tensor) -> None:
    """Along the guide's gradient the bound, averaged over noise, rises as the gradient says."""
    model, guide = pair
    elbo = ImportanceWeightedELBO(3)
    weight = guide.top_posterior.conv.weight
    seeds = range(100)

    def noise(seed: int) -> None:
        torch.manual_seed(seed)

    found = []
    for seed in seeds:
        noise(seed)
        loss = elbo.differentiable_loss(model, guide, x)
        found.append(torch.autograd.grad(loss, weight)[0])
    gradients = torch.stack(found)
    direction = gradients.mean(0) / gradients.mean(0).norm()
    slopes = (gradients * direction).flatten(1).sum(1).double()

    step, quotients = 1e-2, []
    for seed in seeds:
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * step * direction
            noise(seed)
            ends.append(elbo.loss(model, guide, x))
            with torch.no_grad():
                weight -= sign * step * direction
        quotients.append((ends[0] - ends[1]) / (2 * step))
    difference = slopes - torch.tensor(quotients, dtype=torch.float64)
    error = difference.std() / math.sqrt(len(difference))
    assert slopes.mean() > 5 * error
    assert abs(difference.mean()) < 4 * error


def test_one_particle_is_refused() -> None:
    with pytest.raises(ValueError, match="`particles` is 1; iwae needs at least 2"):
        ImportanceWeightedELBO(1)
