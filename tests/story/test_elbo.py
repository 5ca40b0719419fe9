"""The free-bits ELBO: closed forms on small Pyro programs, and one pass per step on the ladder."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn
from torch.testing import assert_close

from elbo import FreeBitsELBO, Terms

MakePair = Callable[..., tuple[Any, Any]]
Program = Callable[[Tensor], Any]


# A pair whose KLs are mu^2 / 2: priors N(0, 1), posteriors N(mu_i, 1), and x drawn from N(0, 1),
# so that all that depends on mu is the KL.

MU_1 = [0.5, 3.0, -0.2]
MU_2 = [2.0, -0.6, 0.1]
DATA = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def shifted_pair() -> tuple[Program, Program, Tensor, Tensor]:
    """The pair and its parameters mu_1, mu_2, one number per image."""
    mu_1, mu_2 = (torch.tensor(mu, dtype=torch.float64, requires_grad=True) for mu in (MU_1, MU_2))
    zero = torch.zeros((), dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z_2", dist.Normal(zero, 1.0))
            pyro.sample("z_1", dist.Normal(zero, 1.0))
            pyro.sample("x", dist.Normal(zero, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("images", len(x)):
            pyro.sample("z_2", dist.Normal(mu_2, 1.0))
            pyro.sample("z_1", dist.Normal(mu_1, 1.0))

    return model, guide, mu_1, mu_2


def expected_kl() -> Tensor:
    """mu^2 / 2, layer 1 first."""
    return torch.tensor([MU_1, MU_2], dtype=torch.float64).T ** 2 / 2


def test_terms_in_closed_form() -> None:
    """Log-likelihood and analytic KL per image, the layers bottom to top."""
    model, guide, _, _ = shifted_pair()
    terms = FreeBitsELBO(analytic_kl=True).compute_terms(model, guide, DATA)
    log_likelihood = -0.5 * (DATA**2 + math.log(2 * math.pi))
    assert_close(terms.log_likelihood, log_likelihood)
    assert_close(terms.kl, expected_kl())
    assert_close(terms.elbo, log_likelihood - expected_kl()[:, 0] - expected_kl()[:, 1])


def test_one_sample_kl() -> None:
    """Without `analytic_kl`, KL is log q(z) - log p(z) at the z that was drawn."""
    model, guide, _, _ = shifted_pair()
    drawn = poutine.trace(guide)
    terms = FreeBitsELBO().compute_terms(model, drawn, DATA)
    z = torch.stack([drawn.trace.nodes[name]["value"] for name in ("z_1", "z_2")], dim=-1)
    mu = torch.tensor([MU_1, MU_2], dtype=torch.float64).T
    assert_close(terms.kl, z**2 / 2 - (z - mu) ** 2 / 2)
    # An estimate, not the closed form.
    assert ((terms.kl - expected_kl()).abs() > 1e-3).all()


def test_terms_carry_gradients_and_their_record_does_not() -> None:
    """What `compute_terms` returns is differentiable; what `terms` keeps is detached."""
    model, guide, mu_1, _ = shifted_pair()
    elbo = FreeBitsELBO(analytic_kl=True)
    assert elbo.terms is None
    terms = elbo.compute_terms(model, guide, DATA)
    terms.kl.sum().backward()
    assert_close(mu_1.grad, mu_1.detach())
    assert isinstance(elbo.terms, Terms)
    for kept, returned in zip(elbo.terms, terms, strict=True):
        assert not kept.requires_grad
        assert torch.equal(kept, returned)


def test_terms_are_of_the_last_pass() -> None:
    """Each way to run the pair leaves the terms of that run."""
    model, guide, _, _ = shifted_pair()
    elbo = FreeBitsELBO(3.0)
    runs: list[Callable[[Tensor], Any]] = [
        elbo(model, guide),
        lambda x: elbo.loss(model, guide, x),
        lambda x: elbo.loss_and_grads(model, guide, x),
        lambda x: elbo.differentiable_loss(model, guide, x),
        lambda x: elbo.compute_terms(model, guide, x),
    ]
    seen: list[Terms] = []
    for i, run in enumerate(runs):
        run(DATA + i)
        assert elbo.terms is not None
        assert_close(elbo.terms.log_likelihood, -0.5 * ((DATA + i) ** 2 + math.log(2 * math.pi)))
        seen.append(elbo.terms)
    kls = torch.stack([terms.kl for terms in seen])
    assert len(kls[:, 0, 0].unique()) == len(runs)


@pytest.mark.parametrize("kl_weight", [1.0, 0.3, 0.0])
def test_free_bits(kl_weight: float) -> None:
    """Each layer's KL is clamped image by image, then weighed; below the floor no gradient."""
    model, guide, mu_1, mu_2 = shifted_pair()
    elbo = FreeBitsELBO(0.5, analytic_kl=True, kl_weight=kl_weight)
    loss = elbo(model, guide)(DATA)
    # KL of layer 1: 0.125, 4.5, 0.02; of layer 2: 2, 0.18, 0.005.
    clamped = (0.5 + 4.5 + 0.5) + (2.0 + 0.5 + 0.5)
    log_likelihood = -0.5 * (DATA**2 + math.log(2 * math.pi)).sum()
    assert_close(loss.detach(), kl_weight * clamped - log_likelihood)
    loss.backward()
    assert_close(mu_1.grad, kl_weight * torch.tensor([0.0, 3.0, 0.0], dtype=torch.float64))
    assert_close(mu_2.grad, kl_weight * torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))
    # What is reported is neither clamped nor weighed.
    assert elbo.terms is not None
    assert_close(elbo.terms.kl, expected_kl())
    assert_close(elbo.terms.elbo.sum(), log_likelihood - expected_kl().sum())


def test_free_bits_of_one_sample_kl() -> None:
    """One-sample KLs, which can be negative, are clamped too; without free bits they are not."""
    model, guide, _, _ = shifted_pair()
    floor = 0.7
    objectives = []
    for free_bits in (floor, 0.0):
        elbo = FreeBitsELBO(free_bits)
        torch.manual_seed(2)
        objectives.append(elbo(model, guide)(DATA).item())
        assert elbo.terms is not None
    terms = elbo.terms
    assert terms is not None
    kls = terms.kl.flatten().tolist()
    assert min(kls) < 0 < floor < max(kls)
    log_likelihood = terms.log_likelihood.sum().item()
    clamped = sum(kl if kl > floor else floor for kl in kls)
    assert objectives == pytest.approx([clamped - log_likelihood, sum(kls) - log_likelihood])


def test_loss_is_the_true_negative_elbo() -> None:
    """`loss` ignores free bits and KL weight, and builds no graph."""
    model, guide, mu_1, _ = shifted_pair()
    elbo = FreeBitsELBO(50.0, analytic_kl=True, kl_weight=0.1)
    log_likelihood = -0.5 * (DATA**2 + math.log(2 * math.pi)).sum()
    expected = (expected_kl().sum() - log_likelihood).item()
    assert elbo.loss(model, guide, DATA) == pytest.approx(expected, rel=1e-12)
    assert mu_1.grad is None


def test_loss_and_grads_is_the_objective() -> None:
    """`loss_and_grads` returns the objective as a float and adds its gradients."""
    model, guide, mu_1, mu_2 = shifted_pair()
    elbo = FreeBitsELBO(0.5, analytic_kl=True, kl_weight=0.5)
    log_likelihood = -0.5 * (DATA**2 + math.log(2 * math.pi)).sum()
    loss = elbo.loss_and_grads(model, guide, DATA)
    assert loss == pytest.approx((0.5 * 8.5 - log_likelihood).item(), rel=1e-12)
    assert_close(mu_1.grad, torch.tensor([0.0, 1.5, 0.0], dtype=torch.float64))
    elbo.loss_and_grads(model, guide, DATA)
    assert_close(mu_2.grad, torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64))


# A ladder of two layers in which everything is linear and Gaussian, so that the exact posterior
# and the evidence are known:
#     z_2 ~ N(0, 1);  z_1 | z_2 ~ N(A z_2, S1^2);  x | z_1, z_2 ~ N(B z_1 + C z_2, SX^2)

A, B, C, S1, SX = 0.8, 1.5, -0.4, 0.7, 0.5
VAR_1 = S1**2
VAR_X_GIVEN_2 = B**2 * VAR_1 + SX**2
SLOPE_X_2 = A * B + C
VAR_X = SLOPE_X_2**2 + VAR_X_GIVEN_2


def linear_model(x: Tensor) -> None:
    """p(x, z)."""
    with pyro.plate("images", len(x)):
        z_2 = pyro.sample("z_2", dist.Normal(x.new_zeros(()), 1.0))
        z_1 = pyro.sample("z_1", dist.Normal(A * z_2, S1))
        pyro.sample("x", dist.Normal(B * z_1 + C * z_2, SX), obs=x)


def exact_z_2(x: Tensor) -> dist.TorchDistribution:
    """p(z_2 | x)."""
    return dist.Normal(SLOPE_X_2 / VAR_X * x, math.sqrt(1 - SLOPE_X_2**2 / VAR_X))


def exact_z_1(x: Tensor, z_2: Tensor) -> dist.TorchDistribution:
    """p(z_1 | z_2, x)."""
    gain = B * VAR_1 / VAR_X_GIVEN_2
    mean = A * z_2 + gain * (x - SLOPE_X_2 * z_2)
    return dist.Normal(mean, math.sqrt(VAR_1 * (1 - gain * B)))


def exact_guide(x: Tensor) -> None:
    """The exact posterior, as a plain function."""
    with pyro.plate("images", len(x)):
        z_2 = pyro.sample("z_2", exact_z_2(x))
        pyro.sample("z_1", exact_z_1(x, z_2))


class ExactGuide(GuideMessenger):
    """The exact posterior, as a guide that runs the model under itself."""

    def get_posterior(self, name: str, prior: Any) -> dist.TorchDistribution:
        (x,), _ = self.args_kwargs
        return exact_z_2(x) if name == "z_2" else exact_z_1(x, self.upstream_value("z_2"))


def loose_guide(x: Tensor) -> None:
    """Some other posterior."""
    with pyro.plate("images", len(x)):
        z_2 = pyro.sample("z_2", dist.Normal(0.3 * x, 0.9))
        pyro.sample("z_1", dist.Normal(0.2 * x + 0.5 * z_2, 0.4))


def log_evidence(x: Tensor) -> Tensor:
    """log p(x) of each image."""
    return -0.5 * (x**2 / VAR_X + math.log(2 * math.pi * VAR_X))


GUIDES: dict[str, Program] = {
    "function": exact_guide,
    "messenger": ExactGuide(linear_model),
}


@pytest.mark.parametrize("guide", GUIDES.values(), ids=GUIDES.keys())
def test_exact_posterior_gives_the_evidence(guide: Program) -> None:
    """With q the exact posterior the ELBO is log p(x), image by image, whatever z is drawn."""
    elbo = FreeBitsELBO()
    kls = []
    for _ in range(3):
        terms = elbo.compute_terms(linear_model, guide, DATA)
        assert_close(terms.elbo, log_evidence(DATA), rtol=1e-12, atol=1e-12)
        kls.append(terms.kl)
    assert (kls[0] - kls[1]).abs().min() > 1e-6  # the terms themselves do vary
    loss = elbo.loss(linear_model, guide, DATA)
    assert loss == pytest.approx(-log_evidence(DATA).sum().item(), rel=1e-12)


def test_analytic_kl_given_the_layers_above() -> None:
    """KL in closed form: at the top that of two Normals, below it given the z_2 drawn."""
    guide = ExactGuide(linear_model)
    terms = FreeBitsELBO(analytic_kl=True).compute_terms(linear_model, guide, DATA)
    z_2 = guide.trace.nodes["z_2"]["value"]

    def kl(q: Any, mean: Tensor | float, std: float) -> Tensor:
        squares = (q.scale**2 + (q.loc - mean) ** 2) / std**2
        return 0.5 * (squares - 1) - (q.scale / std).log()

    assert_close(terms.kl[:, 0], kl(exact_z_1(DATA, z_2), A * z_2, S1))
    assert_close(terms.kl[:, 1], kl(exact_z_2(DATA), 0.0, 1.0))


def test_another_posterior_stays_below_the_evidence() -> None:
    """The mean ELBO of another q is below log p(x) by KL(q || p(z | x)), in closed form."""
    n = 20_000
    x = torch.full((n,), 0.7, dtype=torch.float64)
    terms = FreeBitsELBO(analytic_kl=True).compute_terms(linear_model, loose_guide, x)
    # KL of the joint: at the top in closed form, below it averaged over q(z_2).
    q_2, p_2 = dist.Normal(0.3 * x[0], 0.9), exact_z_2(x[0])
    p_1 = exact_z_1(x[0], torch.tensor(0.0, dtype=torch.float64))
    slope = exact_z_1(x[0], torch.tensor(1.0, dtype=torch.float64)).mean - p_1.mean
    gap = 0.2 * x[0] + 0.5 * q_2.mean - (p_1.mean + slope * q_2.mean)
    spread = gap**2 + (0.5 - slope) ** 2 * q_2.variance
    kl_1 = 0.5 * ((0.4**2 + spread) / p_1.variance - 1) - (0.4 / p_1.stddev).log()
    kl_2 = torch.distributions.kl_divergence(q_2, p_2)
    expected = log_evidence(x[:1]).squeeze() - kl_1 - kl_2
    error = terms.elbo.std() / math.sqrt(n)
    assert abs(terms.elbo.mean() - expected) < 4 * error
    assert kl_1 + kl_2 > 20 * error


# Handlers, as Pyro's own ELBOs treat them. A plain guide needs a handler of its own; a messenger
# runs the model, and with it the model's.


def handled_pairs(handler: Callable[[Any], Any]) -> dict[str, tuple[Any, Any]]:
    """The linear model under `handler`, and a guide of each kind under it too."""
    model = handler(linear_model)
    return {"function": (model, handler(loose_guide)), "messenger": (model, ExactGuide(model))}


def terms_and_pyros_loss(
    model: Any, guide: Any, *, analytic: bool
) -> tuple[FreeBitsELBO, float, float]:
    """Our ELBO after a pass, its loss, and the loss of Pyro's own on the same draws."""
    elbo = FreeBitsELBO(analytic_kl=analytic)
    torch.manual_seed(5)
    loss = elbo.loss(model, guide, DATA)
    torch.manual_seed(5)
    pyros = TraceMeanField_ELBO() if analytic else Trace_ELBO()
    return elbo, loss, pyros.loss(model, guide, DATA)


MASK = torch.tensor([True, False, True])
HANDLERS: dict[str, tuple[Callable[[Any], Any], Tensor]] = {
    "scale": (lambda program: poutine.scale(program, scale=2.5), torch.full((3,), 2.5)),
    "mask": (lambda program: poutine.mask(program, mask=MASK), MASK),
}


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("kind", ["function", "messenger"])
@pytest.mark.parametrize("name", HANDLERS)
def test_scaled_or_masked_pair(name: str, kind: str, analytic: bool) -> None:
    """Scaling and masking act on every term, image by image."""
    handler, factor = HANDLERS[name]
    plain, *_ = terms_and_pyros_loss(
        *handled_pairs(lambda program: program)[kind], analytic=analytic
    )
    elbo, loss, pyros_loss = terms_and_pyros_loss(*handled_pairs(handler)[kind], analytic=analytic)
    assert loss == pytest.approx(pyros_loss, rel=1e-12)
    assert plain.terms is not None
    assert elbo.terms is not None
    factor = factor.double()
    assert_close(elbo.terms.log_likelihood, factor * plain.terms.log_likelihood)
    assert_close(elbo.terms.kl, factor.unsqueeze(-1) * plain.terms.kl)


@pytest.mark.parametrize("analytic", [False, True])
def test_model_scaled_alone(analytic: bool) -> None:
    """A scale on the model alone scales log p, and leaves log q and the analytic KL."""
    model = poutine.scale(linear_model, scale=2.5)
    drawn = poutine.trace(loose_guide)
    elbo, loss, pyros_loss = terms_and_pyros_loss(model, drawn, analytic=analytic)
    assert loss == pytest.approx(pyros_loss, rel=1e-12)
    assert elbo.terms is not None
    plain, *_ = terms_and_pyros_loss(linear_model, loose_guide, analytic=analytic)
    assert plain.terms is not None
    assert_close(elbo.terms.log_likelihood, 2.5 * plain.terms.log_likelihood)
    kl = plain.terms.kl
    if not analytic:
        z_1, z_2 = (drawn.trace.nodes[name]["value"] for name in ("z_1", "z_2"))
        log_p = [dist.Normal(A * z_2, S1).log_prob(z_1), dist.Normal(0.0, 1.0).log_prob(z_2)]
        kl = kl - 1.5 * torch.stack(log_p, dim=-1)
    assert_close(elbo.terms.kl, kl)


@pytest.mark.parametrize("analytic", [False, True])
def test_subsampling_plate(analytic: bool) -> None:
    """Three images out of a plate of twelve count four times each, as in Pyro's own ELBOs."""

    def subsampled(program: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
        def run(x: Tensor) -> None:
            with pyro.plate("batches", 4, subsample=torch.tensor([2]), dim=-2):
                program(x)

        return run

    model, guide = subsampled(linear_model), subsampled(loose_guide)
    elbo, loss, pyros_loss = terms_and_pyros_loss(model, guide, analytic=analytic)
    plain, plain_loss, _ = terms_and_pyros_loss(linear_model, loose_guide, analytic=analytic)
    assert loss == pytest.approx(pyros_loss, rel=1e-12)
    assert loss == pytest.approx(4 * plain_loss, rel=1e-12)
    assert elbo.terms is not None
    assert plain.terms is not None
    assert_close(elbo.terms.kl.squeeze(0), 4 * plain.terms.kl)


def test_scaled_ladder(make_pair: MakePair, x: Tensor) -> None:
    """A scale around model and guide scales loss and terms of a ladder."""
    model, guide = make_pair()
    model.eval()
    guide.eval()
    losses, terms = [], []
    for scale in (1.0, 3.0):
        elbo = FreeBitsELBO()
        torch.manual_seed(1)
        with poutine.scale(scale=scale):
            losses.append(elbo.loss(model, guide, x))
        assert elbo.terms is not None
        terms.append(elbo.terms)
        torch.manual_seed(1)
        with poutine.scale(scale=scale):
            assert losses[-1] == pytest.approx(Trace_ELBO().loss(model, guide, x), rel=1e-6)
    assert losses[1] == pytest.approx(3 * losses[0], rel=1e-6)
    assert_close(terms[1].kl, 3 * terms[0].kl)


# One pass per step


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("way", ["module", "loss_and_grads", "svi"])
def test_one_pass_per_step(make_pair: MakePair, x: Tensor, way: str, analytic: bool) -> None:
    """A training step runs every module that owns parameters, and every dropout, exactly once."""
    model, guide = make_pair(skip=True, gated=True, learn_top_prior=True, blocks_per_layer=2)
    elbo = FreeBitsELBO(0.5, analytic_kl=analytic)
    pair = elbo(model, guide)
    calls: Counter[str] = Counter()
    watched = {
        name: module
        for name, module in pair.named_modules()
        if module._parameters or isinstance(module, nn.Dropout2d)
    }
    for name, module in watched.items():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    norms: list[Any] = [module for module in watched.values() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) > 20

    if way == "module":
        pair(x).backward()
    elif way == "loss_and_grads":
        elbo.loss_and_grads(model, guide, x)
    else:
        SVI(model, guide, pyro.optim.Adamax({"lr": 1e-3}), elbo).step(x)
    assert calls == dict.fromkeys(watched, 1)
    assert [int(norm.num_batches_tracked) for norm in norms] == [1] * len(norms)
    assert all(parameter.grad is not None for parameter in pair.parameters())


def test_ladder_layers_are_listed_bottom_to_top(make_pair: MakePair, x: Tensor) -> None:
    """Column i of the KLs is that of z_{i+1}, for every layer."""
    model, guide = make_pair(z_dims=[1, 2, 3, 4], downsample=[0, 0, 1, 0])
    model.eval()
    guide.eval()
    terms = FreeBitsELBO(analytic_kl=True).compute_terms(model, guide, x)
    model_trace, guide_trace = guide.get_traces()
    assert terms.kl.shape == (5, 4)
    for i in range(4):
        q, p = (trace.nodes[f"z_{i + 1}"]["fn"].base_dist for trace in (guide_trace, model_trace))
        assert q.loc.shape[1] == i + 1
        ratio = (q.scale / p.scale) ** 2
        kl = 0.5 * (ratio + ((q.loc - p.loc) / p.scale) ** 2 - 1 - ratio.log())
        assert_close(terms.kl[:, i], kl.flatten(1).sum(1), rtol=1e-4, atol=1e-4)
    assert_close(terms.log_likelihood, model_trace.nodes["x"]["fn"].log_prob(x))
