"""Predictive and importance sampling: draws from p and q, and their weights."""

import math
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Importance, Predictive, RenyiELBO, Trace_ELBO, WeighedPredictive
from pyro.infer.importance import psis_diagnostic, vectorized_importance_weights
from torch import Tensor
from torch.testing import assert_close

from elbo import FreeBitsELBO
from ladder_vae.evaluation.pareto import pareto_k, tail_length
from tests.story.by_hand import (
    LATENTS,
    DrawnLogits,
    MakePair,
    decode,
    double_pair,
    latents,
    log_joint,
    log_mean_exp,
    log_posterior,
    particles,
    prior_draw,
    row,
)

# Predictive


@row("`Predictive(model)`")
def test_predictive_samples_the_prior(make_pair: MakePair) -> None:
    """Predictive on the model returns every site, each image decoded from its own latents."""
    model, _ = make_pair(skip=True)
    model.eval()
    samples = Predictive(model, num_samples=3)(n=4)
    assert {name: tuple(value.shape) for name, value in samples.items()} == {
        "z_3": (3, 4, 2, 1, 2),
        "h_3": (3, 4, 4, 2, 4),
        "z_2": (3, 4, 3, 2, 4),
        "h_2": (3, 4, 4, 4, 8),
        "z_1": (3, 4, 2, 4, 8),
        "x": (3, 4, 1, 8, 10),
    }
    assert samples["x"].unique().tolist() == [0.0, 1.0]
    for k in range(3):
        h_3 = model.layers[2](samples["z_3"][k], None)
        assert_close(samples["h_3"][k], h_3)
        assert_close(samples["h_2"][k], model.layers[1](samples["z_2"][k], h_3))
    # Each draw is new noise.
    assert len(samples["z_3"].flatten().unique()) == samples["z_3"].numel()


def test_predictive_returns_the_sites_asked_for(make_pair: MakePair) -> None:
    """`return_sites` picks sites, and `_RETURN` is x."""
    model, _ = make_pair()
    model.eval()
    samples = Predictive(model, num_samples=2, return_sites=["z_1", "x", "_RETURN"])(n=3)
    assert samples.keys() == {"z_1", "x", "_RETURN"}
    assert torch.equal(samples["_RETURN"], samples["x"])


@row("`Predictive(model, posterior_samples)`")
def test_predictive_frequencies(make_pair: MakePair) -> None:
    """Pixels drawn for given latents are on as often as the decoded probabilities say."""
    model, _ = make_pair(skip=True)
    model.eval()
    draws, n = 4, 250
    z = {name: value.expand(n, -1, -1, -1) for name, value in prior_draw(model, 1).items()}
    posterior_samples = {name: torch.stack([value] * draws) for name, value in z.items()}
    predictive = Predictive(model, posterior_samples, return_sites=["x", *LATENTS])
    samples = predictive(n=n)
    for name in LATENTS:
        assert torch.equal(samples[name], posterior_samples[name])
    frequencies = samples["x"].mean((0, 1))
    probabilities = decode(model, z)["x"][0].sigmoid()
    errors = (probabilities * (1 - probabilities) / (draws * n)).sqrt()
    assert ((frequencies - probabilities).abs() < 4.5 * errors).all()
    # The pixels' probabilities are apart by more than that.
    assert probabilities.max() - probabilities.min() > 9 * errors.max()


@row("`Predictive(model, guide=guide)`")
def test_predictive_with_the_guide(make_pair: MakePair, x: Tensor) -> None:
    """The posterior predictive's latents are those the guide drew, and x is decoded from them."""
    model, guide = make_pair(skip=True)
    model.eval()
    guide.eval()
    drawn: list[dict[str, Tensor]] = []

    def watched_guide(x: Tensor) -> dict[str, Tensor]:
        drawn.append(guide(x))
        return drawn[-1]

    with DrawnLogits() as watch:
        samples = Predictive(model, guide=watched_guide, num_samples=3)(x)
    for name in LATENTS:
        # Predictive probes the shapes first: its draws are the last three.
        assert torch.equal(samples[name], torch.stack([d[name] for d in drawn[-3:]]))
    for k in range(3):
        z = {name: samples[name][k] for name in LATENTS}
        assert_close(watch.logits[-3 + k], decode(model, z)["x"])
        assert torch.equal(samples["x"][k], x)


def test_reconstruction(make_pair: MakePair, x: Tensor) -> None:
    """Latents of the guide, given to Predictive on the model, draw new images x."""
    model, guide = make_pair()
    model.eval()
    guide.eval()
    with torch.no_grad():
        draws = [guide(x) for _ in range(2)]
    z = {name: torch.stack([d[name] for d in draws]) for name in LATENTS}
    with DrawnLogits() as watch:
        samples = Predictive(model, z)(n=len(x))
    assert samples.keys() == {"h_3", "h_2", "x"}
    assert samples["x"].shape == (2, *x.shape)
    assert samples["x"].unique().tolist() == [0.0, 1.0]
    for k in range(2):
        expected = decode(model, {name: z[name][k] for name in LATENTS})["x"]
        assert_close(watch.logits[-2 + k], expected)


@row("`Predictive(poutine.uncondition(model), guide=guide)`")
def test_posterior_predictive(make_pair: MakePair, x: Tensor) -> None:
    """New images are drawn from p(x | z) at latents drawn from q(z | x)."""
    model, guide = (module.eval() for module in make_pair(skip=True))
    torch.manual_seed(1)
    latents_only = Predictive(model, guide=guide, num_samples=2)(x)
    torch.manual_seed(1)
    with DrawnLogits() as watch:
        samples = Predictive(poutine.uncondition(model), guide=guide, num_samples=2)(x)
    # The first draw of latents is the same; the image then takes noise, too.
    for name in LATENTS:
        assert torch.equal(samples[name], latents_only[name])
    assert samples["x"].unique().tolist() == [0.0, 1.0]
    assert not torch.equal(samples["x"][0], x)
    assert not torch.equal(samples["x"][0], samples["x"][1])
    for k in range(2):
        assert_close(watch.logits[-2 + k], decode(model, latents(samples, k))["x"])


@row("`Predictive(..., parallel=True)`")
def test_parallel_predictive(make_pair: MakePair, x: Tensor) -> None:
    """All draws in one pass: each decoded from its own latents, and the densities are right."""
    model, guide = double_pair(make_pair, skip=True)
    x = x.double()
    with DrawnLogits() as watch:
        samples = Predictive(model, guide=guide, num_samples=3, parallel=True)(x)
    assert watch.logits[-1].shape == (3, *x.shape)
    for k in range(3):
        assert_close(watch.logits[-1][k], decode(model, latents(samples, k))["x"])
        assert torch.equal(samples["x"][k], x)
    assert len(samples["z_1"].unique()) == samples["z_1"].numel()
    with DrawnLogits() as watch:
        samples = Predictive(model, num_samples=3, parallel=True)(n=4)
    assert samples["x"].shape == (3, 4, *x.shape[1:])
    for k in range(3):
        assert_close(watch.logits[-1][k], decode(model, latents(samples, k))["x"])


@row("`WeighedPredictive`")
@pytest.mark.parametrize("parallel", [False, True])
def test_weighed_predictive(make_pair: MakePair, x: Tensor, parallel: bool) -> None:
    """Replicates, with the importance weights of their latents given the image."""
    model, guide = double_pair(make_pair, skip=True)
    x = x.double()
    predictive = WeighedPredictive(
        poutine.uncondition(model), guide=guide, num_samples=3, parallel=parallel
    )
    with torch.no_grad():
        result = predictive(x, model_guide=model)
    assert not torch.equal(result.samples["x"][0], x)
    for k in range(3):
        z = latents(result.samples, k)
        p, q = log_joint(model, z, x).sum(), log_posterior(model, guide, z, x).sum()
        assert_close(result.model_log_prob[k], p)
        assert_close(result.guide_log_prob[k], q)
        assert_close(result.log_weights[k], p - q)


# Importance sampling


@row("`Importance`")
def test_importance(make_pair: MakePair, x: Tensor) -> None:
    """Pyro's importance sampling of one image weighs each z by p(x, z) / q(z | x)."""
    model, guide = double_pair(make_pair, skip=True)
    image = x[:1].double()
    expected = particles(model, guide, image, k=5, seed=6)[:, 0]
    torch.manual_seed(6)
    with torch.no_grad():
        sampler = Importance(model, guide, num_samples=5).run(image)
    log_weights = torch.stack(sampler.log_weights)
    assert_close(log_weights, expected)
    evidence = expected.logsumexp(0) - math.log(5)
    assert_close(sampler.get_log_normalizer(), evidence, check_dtype=False)
    # And by hand, from the traces that Importance kept.
    for trace, log_weight in zip(sampler.exec_traces, sampler.log_weights, strict=True):
        z = {name: trace.nodes[name]["value"] for name in LATENTS}
        by_hand = log_joint(model, z, image) - log_posterior(model, guide, z, image)
        assert_close(log_weight, by_hand[0])


def log_weights_by_hand(model: Any, guide: Any, z: dict[str, Tensor], x: Tensor) -> Tensor:
    """Log weights (K,) of latents (K, 1, Z, h, w), joint over the images x (1, C, H, W)."""
    draws = [latents(z, k) for k in range(len(z["z_1"]))]
    return torch.stack(
        [(log_joint(model, d, x) - log_posterior(model, guide, d, x)).sum() for d in draws]
    )


@row("`vectorized_importance_weights`")
def test_vectorized_importance_weights(make_pair: MakePair, x: Tensor) -> None:
    """One weight p(x, z) / q(z | x) per sample."""
    model, guide = double_pair(make_pair, skip=True)
    image = x[:1].double()
    with torch.no_grad():
        log_weights, model_trace, guide_trace = vectorized_importance_weights(
            model, guide, image, num_samples=6, max_plate_nesting=1
        )
        z = {name: guide_trace.nodes[name]["value"] for name in LATENTS}
        assert_close(log_weights, log_weights_by_hand(model, guide, z, image))
    assert "x" in model_trace.nodes
    assert "x" not in guide_trace.nodes


@row("`psis_diagnostic`")
def test_psis_diagnostic(make_pair: MakePair, x: Tensor) -> None:
    """The k-hat of evaluate.py, from the same weights."""
    model, guide = double_pair(make_pair)
    image, k = x[:1].double(), 400
    torch.manual_seed(2)
    diagnostic = psis_diagnostic(model, guide, image, num_particles=k, max_plate_nesting=1)
    torch.manual_seed(2)
    with torch.no_grad(), pyro.plate("particles", k, dim=-2):
        terms = FreeBitsELBO(max_plate_nesting=2).compute_terms(model, guide, image)
    largest = terms.elbo[:, 0].topk(tail_length(k) + 1).values
    assert diagnostic == pytest.approx(pareto_k(largest[None]).item(), rel=1e-6)


def test_renyi_elbo_is_the_importance_bound(make_pair: MakePair, x: Tensor) -> None:
    """With alpha 0, K particles give log (1/K) sum_k w_k, image by image."""
    model, guide = double_pair(make_pair)
    x = x.double()
    log_weights = particles(model, guide, x, k=6, seed=3)
    bound = log_mean_exp(log_weights).sum()
    torch.manual_seed(3)
    loss = RenyiELBO(alpha=0, num_particles=6).loss(model, guide, x)
    assert loss == pytest.approx(-bound.item(), rel=1e-12)
    # The bound is neither the mean nor that of the batch as one observation.
    assert bound > log_weights.sum(1).mean() + 0.1
    assert bound > log_mean_exp(log_weights.sum(1)) + 0.1


def test_renyi_elbo_between_the_bounds(make_pair: MakePair, x: Tensor) -> None:
    """One particle gives the ELBO at every alpha; many give it as alpha goes to 1."""
    model, guide = double_pair(make_pair)
    image = x[:1].double()
    single = particles(model, guide, image, k=1, seed=4).item()
    for alpha in (0.0, 0.5, 2.0):
        torch.manual_seed(4)
        loss = RenyiELBO(alpha=alpha, num_particles=1).loss(model, guide, image)
        assert loss == pytest.approx(-single, rel=1e-12)
    log_weights = particles(model, guide, image, k=4, seed=5)[:, 0]
    step = 1e-4
    torch.manual_seed(5)
    loss = RenyiELBO(alpha=1 - step, num_particles=4).loss(model, guide, image)
    # The next term of the cumulant expansion is half the variance times 1 - alpha.
    expected = log_weights.mean() + 0.5 * step * log_weights.var(correction=0)
    assert loss == pytest.approx(-expected.item(), abs=1e-5)
    torch.manual_seed(5)
    mean = Trace_ELBO(num_particles=4).loss(model, guide, image)
    assert mean == pytest.approx(-log_weights.mean().item(), rel=1e-12)
