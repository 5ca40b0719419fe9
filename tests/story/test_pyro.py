"""The ladder is a plain Pyro model and guide: Pyro's handlers and algorithms work on the pair."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.inspect import get_model_relations, render_model
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from elbo import FreeBitsELBO
from guide import LadderGuide
from ladder_vae.runs.options import RunConfig

MakePair = Callable[..., tuple[Any, Any]]
MakeConfig = Callable[..., RunConfig]

LATENTS = ("z_1", "z_2", "z_3")


def normal_log_prob(value: Tensor, mean_log_variance: Tensor) -> Tensor:
    """Log-density of a diagonal Normal per image, written out."""
    mean, log_variance = mean_log_variance.chunk(2, dim=1)
    squares = (value - mean) ** 2 / log_variance.exp()
    return -0.5 * (squares + log_variance + math.log(2 * math.pi)).flatten(1).sum(1)


def decode(model: Any, z: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the networks of p on z: the priors' parameters by layer, and the logits of x."""
    depth = len(model.layers)
    top = model.top_prior.mean_log_variance.expand(len(z["z_1"]), -1, -1, -1)
    parameters = {f"z_{depth}": top}
    h = model.layers[-1](z[f"z_{depth}"], None)
    for i in range(depth - 1, 0, -1):
        parameters[f"z_{i}"] = model.priors[i - 1].conv(h)
        h = model.layers[i - 1](z[f"z_{i}"], h)
    return parameters | {"x": model.likelihood.conv(model.decoder(h))}


def log_probs(model: Any, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Log-probability of every site per image, from the networks' outputs."""
    parameters = decode(model, z)
    logits = parameters.pop("x")
    found = {name: normal_log_prob(z[name], value) for name, value in parameters.items()}
    loss = F.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return found | {"x": -loss.flatten(1).sum(1)}


def prior_draw(model: Any, n: int) -> dict[str, Tensor]:
    """Latents for n images, drawn from the prior."""
    with torch.no_grad():
        trace = poutine.trace(model).get_trace(n=n)
    return {name: trace.nodes[name]["value"] for name in LATENTS}


def gradients(*modules: nn.Module) -> dict[str, Tensor]:
    """The gradients of all parameters that have one, which are then cleared."""
    found = {}
    for i, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                found[f"{i}.{name}"] = parameter.grad.clone()
                parameter.grad = None
    return found


class DrawnLogits(Messenger):
    """Writes down the logits of x each time the model comes to it."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: list[Tensor] = []

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] == "x":
            fn = msg["fn"]
            while hasattr(fn, "base_dist"):
                fn = fn.base_dist
            self.logits.append(fn.logits)


# Predictive


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


# Handlers


@pytest.mark.parametrize("skip", [False, True])
def test_conditioned_model(make_pair: MakePair, x: Tensor, skip: bool) -> None:
    """With all latents and x given, the model's log-probabilities are those of its networks."""
    model, _ = make_pair(skip=skip)
    model.double().eval()
    x = x.double()
    z = prior_draw(model, len(x))
    trace = poutine.trace(poutine.condition(model, z | {"x": x})).get_trace(n=len(x))
    expected = log_probs(model, z, x)
    for name, log_prob in expected.items():
        assert torch.equal(trace.nodes[name]["value"], z.get(name, x))
        assert_close(trace.nodes[name]["fn"].log_prob(z.get(name, x)), log_prob)
    assert_close(trace.log_prob_sum(), sum(value.sum() for value in expected.values()))
    # The same with x as the model's own argument.
    again = poutine.trace(poutine.condition(model, z)).get_trace(x)
    assert_close(again.log_prob_sum(), trace.log_prob_sum())


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


@pytest.mark.parametrize(
    ("skip", "parents"),
    [
        (False, {"z_3": [], "z_2": ["z_3"], "z_1": ["z_2"], "x": ["z_1"]}),
        (
            True,
            {
                "z_3": [],
                "z_2": ["z_3"],
                "z_1": ["z_3", "z_2"],
                "x": ["z_3", "z_2", "z_1"],
            },
        ),
    ],
)
def test_rendered_model(
    make_pair: MakePair, x: Tensor, skip: bool, parents: dict[str, list[str]]
) -> None:
    """The model's graph: a chain from the top to x, with skip edges from all layers above."""
    model, _ = make_pair(skip=skip)
    model.eval()
    relations = get_model_relations(model, (x,))
    assert {name: relations["sample_sample"][name] for name in parents} == parents
    assert relations["plate_sample"] == {"images": ["z_3", "h_3", "z_2", "h_2", "z_1", "x"]}
    assert relations["observed"] == ["h_3", "h_2", "x"]
    kinds = dict.fromkeys(LATENTS, "Normal") | dict.fromkeys(("h_3", "h_2"), "Deterministic")
    assert relations["sample_dist"] == kinds | {"x": "Bernoulli"}

    source = render_model(model, model_args=(x,)).source
    lines = [line.strip() for line in source.splitlines()]
    assert "subgraph cluster_images {" in lines
    edges = {tuple(line.split(" -> ")) for line in lines if " -> " in line}
    random = {(a, b) for a, b in edges if not b.startswith("h_")}
    assert random == {(above, name) for name, all_above in parents.items() for above in all_above}
    for name in parents:
        color = "gray" if name == "x" else "white"
        assert f"{name} [label={name} fillcolor={color} shape=ellipse style=filled]" in lines


def test_format_shapes(make_pair: MakePair, x: Tensor) -> None:
    """Every site has the images as its batch and one log-probability per image."""
    model, _ = make_pair()
    trace = poutine.trace(model.eval()).get_trace(x)
    trace.compute_log_prob()
    rows = [" ".join(line.split()) for line in trace.format_shapes().splitlines()]
    assert rows == [
        "Trace Shapes:",
        "Param Sites:",
        "Sample Sites:",
        "images dist |",
        "value 5 |",
        "log_prob |",
        "z_3 dist 5 | 2 1 2",
        "value 5 | 2 1 2",
        "log_prob 5 |",
        "h_3 dist 5 | 4 2 4",
        "value 5 | 4 2 4",
        "log_prob 5 |",
        "z_2 dist 5 | 3 2 4",
        "value 5 | 3 2 4",
        "log_prob 5 |",
        "h_2 dist 5 | 4 4 8",
        "value 5 | 4 4 8",
        "log_prob 5 |",
        "z_1 dist 5 | 2 4 8",
        "value 5 | 2 4 8",
        "log_prob 5 |",
        "x dist 5 | 1 8 10",
        "value 5 | 1 8 10",
        "log_prob 5 |",
    ]


# Bounds


def particles(model: Any, guide: Any, x: Tensor, k: int, seed: int) -> Tensor:
    """Log weights log p(x, z) - log q(z | x) of k draws, (k, N)."""
    torch.manual_seed(seed)
    with torch.no_grad():
        draws = [FreeBitsELBO().compute_terms(model, guide, x).elbo for _ in range(k)]
    return torch.stack(draws)


def double_pair(make_pair: MakePair, **options: Any) -> tuple[Any, Any]:
    """A pair in float64 and evaluation mode."""
    model, guide = make_pair(**options)
    return model.double().eval(), guide.double().eval()


def test_renyi_elbo_is_the_importance_bound(make_pair: MakePair, x: Tensor) -> None:
    """With alpha 0, K particles give log (1/K) sum_k w_k of the image."""
    model, guide = double_pair(make_pair)
    image = x[:1].double()
    log_weights = particles(model, guide, image, k=6, seed=3)[:, 0]
    bound = log_weights.logsumexp(0) - math.log(6)
    torch.manual_seed(3)
    loss = RenyiELBO(alpha=0, num_particles=6).loss(model, guide, image)
    assert loss == pytest.approx(-bound.item(), rel=1e-12)
    assert log_weights.std() > 0.1  # the bound is not the mean
    assert bound > log_weights.mean() + 0.01


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


def test_importance(make_pair: MakePair, x: Tensor) -> None:
    """Pyro's importance sampling of one image weighs each z by p(x, z) / q(z | x)."""
    model, guide = double_pair(make_pair, skip=True)
    image = x[:1].double()
    expected = particles(model, guide, image, k=5, seed=6)[:, 0]
    proposal = poutine.block(guide, hide_types=["observe"])
    torch.manual_seed(6)
    with torch.no_grad():
        sampler = Importance(model, proposal, num_samples=5).run(image)
    log_weights = torch.stack(sampler.log_weights)
    assert_close(log_weights, expected)
    evidence = expected.logsumexp(0) - math.log(5)
    assert_close(sampler.get_log_normalizer(), evidence, check_dtype=False)
    # And by hand, from the traces that Importance kept.
    for trace, log_weight in zip(sampler.exec_traces, sampler.log_weights, strict=True):
        z = {name: trace.nodes[name]["value"] for name in LATENTS}
        p = sum(value.sum() for value in log_probs(model, z, image).values())
        q = p - log_weight
        assert_close(q, posterior_log_prob(model, guide, z, image))


def posterior_log_prob(model: Any, guide: Any, z: dict[str, Tensor], x: Tensor) -> Tensor:
    """log q(z | x) summed over the images, from the networks of guide and model."""
    d = guide.bottom_up(x)
    total = normal_log_prob(z["z_3"], guide.top_posterior.conv(d[2])).sum()
    h = model.layers[2](z["z_3"], None)
    for i in (2, 1):
        posterior = guide.posteriors[i - 1]
        parameters = posterior.conv(posterior.merge(d[i - 1], h))
        total = total + normal_log_prob(z[f"z_{i}"], parameters).sum()
        h = model.layers[i - 1](z[f"z_{i}"], h)
    return total


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


# Training


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


def test_svi_trains_each_of_two_pairs(make_pair: MakePair, x: Tensor) -> None:
    """A second pair in the same process is trained, and the first one still."""
    pairs = [make_pair(learn_top_prior=True) for _ in range(2)]
    svis = [SVI(*pair, pyro.optim.Adamax({"lr": 1e-2}), FreeBitsELBO()) for pair in pairs]
    for _ in range(2):
        for pair, svi in zip(pairs, svis, strict=True):
            before = [p.clone() for module in pair for p in module.parameters()]
            svi.step(x)
            after = [p for module in pair for p in module.parameters()]
            assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_svi_evaluates_the_true_loss(make_pair: MakePair, x: Tensor) -> None:
    """`evaluate_loss` is the negative ELBO without free bits, and leaves no gradient."""
    model, guide = double_pair(make_pair)
    svi = SVI(model, guide, pyro.optim.Adamax({"lr": 1e-2}), FreeBitsELBO(50.0))
    expected = particles(model, guide, x.double(), k=1, seed=11).sum()
    torch.manual_seed(11)
    assert svi.evaluate_loss(x.double()) == pytest.approx(-expected.item(), rel=1e-12)
    assert gradients(model, guide) == {}


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
