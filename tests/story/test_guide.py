"""The guide: q(z | x) of a conditioned model, features and layers by hand, copies and state."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.testing import assert_close

from elbo import FreeBitsELBO
from guide import LadderGuide
from ladder_vae.runs.options import RunConfig
from tests.story.by_hand import LATENTS, MakePair, gradients, log_probs, prior_draw

MakeConfig = Callable[..., RunConfig]


@pytest.mark.parametrize("given", LATENTS)
def test_guide_of_a_conditioned_model(
    make_pair: MakePair, tiny_config: MakeConfig, x: Tensor, given: str
) -> None:
    """A latent given to the model is kept, and scored under p alone."""
    model, _ = make_pair(skip=True)
    value = prior_draw(model.eval(), len(x))[given]
    conditioned = poutine.condition(model, {given: value})
    guide: Any = LadderGuide(conditioned, tiny_config(skip=True).ladder, (1, 8, 10))
    guide.eval()
    terms = FreeBitsELBO().compute_terms(model, guide, x)
    model_trace, guide_trace = guide.get_traces()
    assert torch.equal(model_trace.nodes[given]["value"], value)
    assert model_trace.nodes[given]["is_observed"]
    free = [name for name in LATENTS if name != given]
    assert list(guide_trace.nodes) == free[::-1]
    # Both what is given and what is drawn feed the layers below.
    z = {name: model_trace.nodes[name]["value"] for name in LATENTS}
    p = log_probs(model, z, x)
    assert_close(terms.log_likelihood, p["x"] + p[given])
    for i, name in enumerate(free):
        q = guide_trace.nodes[name]["fn"].log_prob(z[name])
        assert_close(terms.kl[:, i], q - p[name], rtol=1e-5, atol=1e-4)


def test_conditioned_latents_inform_the_posteriors_below(
    make_pair: MakePair, tiny_config: MakeConfig, x: Tensor
) -> None:
    """q(z_1 | z_2, z_3, x) is read off the feature map of the latents given above."""
    model, _ = make_pair()
    z = prior_draw(model.eval(), len(x))
    above = {name: z[name] for name in ("z_3", "z_2")}
    guide: Any = LadderGuide(poutine.condition(model, above), tiny_config().ladder, (1, 8, 10))
    guide.eval()
    guide(x)
    h_2 = model.layers[1](z["z_2"], model.layers[2](z["z_3"], None))
    merged = guide.posteriors[0].merge(guide.bottom_up(x)[0], h_2)
    mean, log_variance = guide.posteriors[0].conv(merged).chunk(2, dim=1)
    q = guide.get_traces()[1].nodes["z_1"]["fn"].base_dist
    assert_close(q.loc, mean)
    assert_close(q.scale, (log_variance / 2).exp())


def test_features_given_to_the_guide(make_pair: MakePair, x: Tensor) -> None:
    """The guide draws the same z from bottom-up features computed beforehand."""
    model, guide = make_pair()
    model.eval()
    guide.eval()
    torch.manual_seed(1)
    expected = guide(x)
    features = guide.bottom_up(x)
    guide.bottom_up = None  # it must not be run again
    torch.manual_seed(1)
    again = guide(x, features)
    assert again.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(again[name], value)


def test_lower_layers_from_their_priors(make_pair: MakePair, x: Tensor) -> None:
    """Their KL is zero and their posteriors are not run; the layers above are as they were."""
    model, guide = make_pair(skip=True)
    model.eval()
    guide.eval()
    run: list[int] = []  # the layers whose posterior network is run
    for i, posterior in enumerate((*guide.posteriors, guide.top_posterior), start=1):
        posterior.register_forward_hook(lambda *call, layer=i: run.append(layer))
    for analytic in (False, True):
        elbo = FreeBitsELBO(analytic_kl=analytic)
        torch.manual_seed(5)
        plain = elbo.compute_terms(model, guide, x)
        z = {name: guide.get_traces()[0].nodes[name]["value"] for name in LATENTS}
        assert (plain.kl != 0).all()
        for k in range(4):
            run.clear()
            torch.manual_seed(5)
            terms = elbo.compute_terms(model, guide, x, from_prior=k)
            assert run == [3, 2, 1][: 3 - k]
            assert torch.equal(terms.kl[:, :k], torch.zeros(5, k))
            assert torch.equal(terms.kl[:, k:], plain.kl[:, k:])
            assert torch.equal(terms.log_likelihood, plain.log_likelihood) == (k == 0)
            drawn = {name: guide.get_traces()[0].nodes[name]["value"] for name in LATENTS}
            assert [torch.equal(drawn[f"z_{i}"], z[f"z_{i}"]) for i in (1, 2, 3)] == [
                i > k for i in (1, 2, 3)
            ]
            # What is drawn is what x is scored given.
            assert_close(terms.log_likelihood, log_probs(model, drawn, x)["x"])


def test_all_layers_from_their_priors_is_a_draw_of_the_model(
    make_pair: MakePair, x: Tensor
) -> None:
    model, guide = make_pair()
    model.eval()
    guide.eval()
    torch.manual_seed(6)
    expected = prior_draw(model, len(x))
    torch.manual_seed(6)
    drawn = guide(x, from_prior=3)
    for name in LATENTS:
        assert torch.equal(drawn[name], expected[name])
    assert not torch.equal(guide(x)["z_1"], drawn["z_1"])  # it holds for one call


@pytest.mark.parametrize("layers", [-1, 4])
def test_more_layers_from_priors_than_there_are(
    make_pair: MakePair, x: Tensor, layers: int
) -> None:
    _, guide = make_pair()
    with pytest.raises(ValueError, match="must be from 0 to 3 layers"):
        guide(x, from_prior=layers)


@pytest.mark.parametrize("analytic", [False, True])
def test_pyros_own_elbo(make_pair: MakePair, x: Tensor, analytic: bool) -> None:
    """Without free bits, loss and gradients of a training pass are those of Pyro's own ELBOs."""
    model, guide = make_pair(skip=True, gated=True, learn_top_prior=True)
    pyros = TraceMeanField_ELBO() if analytic else Trace_ELBO()
    losses, grads = [], []
    for elbo in (FreeBitsELBO(analytic_kl=analytic), pyros):
        torch.manual_seed(7)  # the same latents and the same dropout masks
        loss = elbo(model, guide)(x)
        loss.backward()
        losses.append(loss.detach())
        grads.append(gradients(model, guide))
    assert_close(losses[0], losses[1])
    assert len(grads[0]) == sum(1 for m in (model, guide) for _ in m.parameters())
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("analytic", [False, True])
def test_pyros_own_loss(make_pair: MakePair, x: Tensor, analytic: bool) -> None:
    """`loss` is the negative ELBO that Pyro computes, whatever the free bits and the KL weight."""
    model, guide = make_pair()
    pyros = TraceMeanField_ELBO() if analytic else Trace_ELBO()
    torch.manual_seed(8)
    expected = pyros.loss(model, guide, x)
    for elbo in (
        FreeBitsELBO(analytic_kl=analytic),
        FreeBitsELBO(100.0, analytic_kl=analytic, kl_weight=0.1),
    ):
        torch.manual_seed(8)
        assert elbo.loss(model, guide, x) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("analytic", [False, True])
def test_loss_and_grads(
    make_pair: MakePair, tiny_config: MakeConfig, x: Tensor, analytic: bool
) -> None:
    """`loss_and_grads` leaves the loss's gradients in the parameters, as Pyro's own do."""
    model, pairs_guide = make_pair(learn_top_prior=True)

    def program(x: Tensor) -> Tensor:
        # Pyro's own differentiate only where parameters are in the trace.
        pyro.module("model", model)
        return model(x)

    guide = LadderGuide(program, tiny_config(learn_top_prior=True).ladder, (1, 8, 10))
    guide.load_state_dict(pairs_guide.state_dict())
    losses, grads = [], []
    pyros = TraceMeanField_ELBO() if analytic else Trace_ELBO()
    for elbo in (FreeBitsELBO(analytic_kl=analytic), pyros):
        torch.manual_seed(9)
        losses.append(elbo.loss_and_grads(program, guide, x))
        grads.append(gradients(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert len(grads[0]) == sum(1 for m in (model, guide) for _ in m.parameters())
    assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("named", [True, False])
def test_svi_and_a_plain_loop(make_pair: MakePair, x: Tensor, named: bool) -> None:
    """Five steps of pyro.infer.SVI and of a torch loop: the same losses, the same parameters."""
    model, guide = make_pair(learn_top_prior=True)
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 1e-3}
    loss_fn: Any = FreeBitsELBO(2.0)(*copy.deepcopy((model, guide)))
    start = copy.deepcopy(loss_fn.state_dict())
    optimizer = torch.optim.Adamax(loss_fn.parameters(), **options)

    torch.manual_seed(10)
    expected = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_fn(x)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    optim = (
        pyro.optim.Adamax(options) if named else pyro.optim.PyroOptim(torch.optim.Adamax, options)
    )
    svi = SVI(model, guide, optim, FreeBitsELBO(2.0))
    torch.manual_seed(10)
    assert [svi.step(x) for _ in range(5)] == pytest.approx(expected, rel=1e-6)
    trained = {f"model.{k}": v for k, v in model.state_dict().items()}
    trained |= {f"guide.{k}": v for k, v in guide.state_dict().items()}
    assert_close(trained, dict(loss_fn.state_dict()), rtol=1e-5, atol=1e-6)
    # Both did train, all of it.
    assert all(not torch.equal(trained[name], start[name]) for name in start)


def test_state_dict_holds_everything_once(make_pair: MakePair) -> None:
    """The state of `elbo(model, guide)` is the model's and the guide's, nothing twice."""
    model, guide = make_pair()
    state = FreeBitsELBO()(model, guide).state_dict()
    names = [f"model.{name}" for name in model.state_dict()]
    names += [f"guide.{name}" for name in guide.state_dict()]
    assert list(state) == names
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    parameters = [*model.parameters(), *guide.parameters()]
    assert {id(p) for p in FreeBitsELBO()(model, guide).parameters()} == set(map(id, parameters))
    assert not any(name.startswith("model") for name in guide.state_dict())


def test_deep_copy_is_an_independent_pair(make_pair: MakePair, x: Tensor) -> None:
    """The copied guide runs the copied model; neither pair touches the other."""
    model, guide = make_pair()
    original: Any = FreeBitsELBO()(model, guide)
    original(x)  # what the pass leaves behind does not hinder the copy
    original.eval()
    twin = copy.deepcopy(original)
    assert twin.guide.model is twin.model
    assert original.guide.model is model
    shared = {p.data_ptr() for p in original.parameters()}
    assert shared.isdisjoint(p.data_ptr() for p in twin.parameters())

    def loss(pair: Any) -> Tensor:
        torch.manual_seed(12)
        return pair(x).detach()

    before = loss(original)
    assert_close(loss(twin), before)
    terms = original.elbo.terms
    with torch.no_grad():
        for parameter in twin.model.parameters():
            parameter.zero_()
    # All pixels at probability one half.
    assert_close(twin.guide(x)["x"], x)
    loss(twin)
    assert_close(twin.elbo.terms.log_likelihood, torch.full((5,), -80 * math.log(2)))
    assert original.elbo.terms is terms
    assert_close(loss(original), before)


def test_copy_of_a_copy(make_pair: MakePair, x: Tensor) -> None:
    """A copy that has not run yet can be copied again."""
    twin = copy.deepcopy(copy.deepcopy(FreeBitsELBO()(*make_pair())))
    assert twin.guide.model is twin.model
    assert torch.isfinite(twin(x))
