"""MCMC and autoguides on a latent given the rest, against its posterior on a grid."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import HMC, MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoLowRankMultivariateNormal,
    AutoNormal,
)
from pyro.infer.mcmc.util import initialize_model
from torch import Tensor
from torch.testing import assert_close

from tests.story.by_hand import MakePair, row


class Given(NamedTuple):
    """A ladder with z_1 and x given, whose only latent z_2 is one number per image.

    The images and their z_1 are equal, so the posterior of z_2 is the same for each.
    """

    program: Callable[..., Any]
    x: Tensor  # (N, 1, 2, 2)
    log_joint: Callable[[Tensor], Tensor]  # log p(x, z_1, z_2) of numbers z_2 (M,), for one image
    mean: float  # of the posterior
    variance: float
    mode: float
    log_evidence: float  # log p(x, z_1), per image
    model: Any


@pytest.fixture
def make_given(make_pair: MakePair) -> Callable[[int], Given]:
    def make(n: int) -> Given:
        options: dict[str, Any] = {"z_dims": [1, 1], "downsample": [0, 1], "batchnorm": False}
        model, _ = make_pair((1, 2, 2), initial_downscaling=False, skip=True, **options)
        model.double().eval()
        with torch.no_grad():  # so that z_1 tells much of z_2
            model.priors[0].conv.weight.mul_(12)
        # SVI would train the model with the autoguide.
        model.requires_grad_(False)
        x = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double().expand(n, 1, 2, 2)
        z_1 = torch.tensor([[0.7, -0.4], [0.1, 1.2]]).double().expand(n, 1, 2, 2)

        def log_joint(z_2: Tensor) -> Tensor:
            m = len(z_2)
            values = {"z_1": z_1[:1].expand(m, 1, 2, 2), "z_2": z_2.view(m, 1, 1, 1)}
            trace = poutine.trace(poutine.condition(model, values)).get_trace(
                x[:1].expand(m, 1, 2, 2)
            )
            trace.compute_log_prob()
            return sum(trace.nodes[name]["log_prob"] for name in ("z_1", "z_2", "x"))

        grid = torch.linspace(-8, 8, 4001).double()
        with torch.no_grad():
            log_p = log_joint(grid)
        weight = log_p.softmax(0)
        mean = (weight * grid).sum()
        return Given(
            program=poutine.condition(model, {"z_1": z_1}),
            x=x,
            log_joint=log_joint,
            mean=mean.item(),
            variance=(weight * (grid - mean) ** 2).sum().item(),
            mode=grid[log_p.argmax()].item(),
            log_evidence=(log_p.logsumexp(0) + (grid[1] - grid[0]).log()).item(),
            model=model,
        )

    return make


MakeGiven = Callable[[int], Given]


def test_the_posterior_is_not_the_prior(make_given: MakeGiven) -> None:
    given = make_given(1)
    assert given.variance < 0.8
    assert abs(given.mean) > 0.1


def test_potential_energy(make_given: MakeGiven) -> None:
    """It is -log p(x, z), summed over the images, with the right gradient."""
    given = make_given(3)
    _, potential, _, _ = initialize_model(given.program, model_args=(given.x,))
    z_2 = torch.tensor([-0.5, 0.2, 1.5]).double().requires_grad_()
    found = potential({"z_2": z_2.view(3, 1, 1, 1)})
    expected = -given.log_joint(z_2).sum()
    assert_close(found, expected)
    assert_close(*(torch.autograd.grad(energy, z_2)[0] for energy in (found, expected)))


def assert_posterior(given: Given, draws: Tensor) -> None:
    """Draws (samples, chains) have the posterior's mean and variance; chains are independent."""
    for values, expected in ((draws, given.mean), ((draws - given.mean) ** 2, given.variance)):
        by_chain = values.mean(0)
        error = by_chain.std() / len(by_chain) ** 0.5
        assert abs(by_chain.mean() - expected) < 4 * error
        assert error < 0.1


@row("`HMC`", "`NUTS`", "`MCMC`")
@pytest.mark.parametrize("kernel", ["HMC", "NUTS"])
def test_mcmc(make_given: MakeGiven, kernel: str) -> None:
    """The draws follow the posterior. Each of 64 equal images is a chain of its own."""
    given = make_given(64)
    options: dict[str, Any] = {"step_size": 0.3, "adapt_step_size": False}
    if kernel == "HMC":
        sampler: Any = HMC(given.program, num_steps=4, **options)
    else:
        sampler = NUTS(given.program, max_tree_depth=3, **options)
    mcmc = MCMC(sampler, num_samples=20, warmup_steps=5, disable_progbar=True)
    mcmc.run(given.x)
    draws = mcmc.get_samples()["z_2"]
    assert draws.shape == (20, 64, 1, 1, 1)
    assert_posterior(given, draws.flatten(1))


@row("`MCMC(num_chains=2)`")
def test_several_chains(make_given: MakeGiven) -> None:
    """Chains start apart and find the same posterior."""
    given = make_given(32)
    kernel = HMC(given.program, step_size=0.3, num_steps=4, adapt_step_size=False)
    mcmc = MCMC(kernel, num_samples=15, warmup_steps=5, num_chains=2, disable_progbar=True)
    mcmc.run(given.x)
    draws = mcmc.get_samples(group_by_chain=True)["z_2"]
    assert draws.shape == (2, 15, 32, 1, 1, 1)
    assert not torch.equal(draws[0], draws[1])
    assert_posterior(given, draws.movedim(0, 1).flatten(1))


AUTOGUIDES: dict[str, Callable[[Any], Any]] = {
    "AutoNormal": AutoNormal,
    "AutoDiagonalNormal": AutoDiagonalNormal,
    "AutoLowRankMultivariateNormal": lambda program: AutoLowRankMultivariateNormal(
        program, init_scale=0.5, rank=1
    ),
}


@row("`AutoNormal`", "`AutoDiagonalNormal`", "`AutoLowRankMultivariateNormal`")
@pytest.mark.parametrize("name", AUTOGUIDES)
def test_autoguides(make_given: MakeGiven, name: str) -> None:
    """After training their bound is close below the evidence, and never above."""
    given = make_given(2)
    guide = AUTOGUIDES[name](given.program)
    optim = pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97})
    svi = SVI(given.program, guide, optim, Trace_ELBO(num_particles=4, vectorize_particles=True))
    for _ in range(80):
        svi.step(given.x)
    many = Trace_ELBO(num_particles=4000, vectorize_particles=True)
    gap = many.loss(given.program, guide, given.x) / 2 + given.log_evidence
    assert -0.01 < gap < 0.05


def test_the_model_trains_with_an_autoguide_unless_it_is_frozen(make_given: MakeGiven) -> None:
    given = make_given(2)
    guide = AutoNormal(given.program)
    for trainable in (False, True):
        given.model.requires_grad_(trainable)
        before = [p.detach().clone() for p in given.model.parameters()]
        SVI(given.program, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step(given.x)
        moved = [
            not torch.equal(p, b) for p, b in zip(given.model.parameters(), before, strict=True)
        ]
        assert any(moved) == trainable


@row("`AutoDelta`")
def test_auto_delta(make_given: MakeGiven) -> None:
    """It finds the mode of the posterior."""
    given = make_given(2)
    guide = AutoDelta(given.program)
    svi = SVI(given.program, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.97}), Trace_ELBO())
    for _ in range(100):
        svi.step(given.x)
    mode = guide.median()["z_2"].flatten()
    assert_close(mode.detach(), torch.full((2,), given.mode).double(), rtol=0, atol=0.02)
