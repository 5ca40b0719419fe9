"""pyro.infer.SVI trains the pair with each of Pyro's ELBOs as a plain torch loop does."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    EnergyDistance,
    JitTrace_ELBO,
    JitTraceMeanField_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor
from torch.testing import assert_close

from elbo import FreeBitsELBO
from tests.story.by_hand import (
    LATENTS,
    SHAPES,
    FixedNoise,
    MakePair,
    double_pair,
    gradients,
    latents,
    log_joint,
    log_mean_exp,
    log_posterior,
    parameters,
    particles,
    row,
)

Loss = Callable[[Any, Any, Tensor], Tensor]


# The loss of a torch loop


def log_weights(model: Any, guide: Any, x: Tensor, k: int, *, vectorized: bool) -> Tensor:
    """Log weights (k, N) of k particles, with gradients."""
    elbo = FreeBitsELBO(num_particles=k, vectorize_particles=vectorized)
    return elbo.compute_terms(model, guide, x).elbo.reshape(k, -1)


def negative_elbo(model: Any, guide: Any, x: Tensor) -> Tensor:
    return -log_weights(model, guide, x, 1, vectorized=False).sum()


def negative_iw_bound(*, vectorized: bool) -> Loss:
    """That of two particles, image by image."""
    return lambda model, guide, x: (
        -log_mean_exp(log_weights(model, guide, x, 2, vectorized=vectorized)).sum()
    )


def tail_adaptive(model: Any, guide: Any, x: Tensor) -> Tensor:
    """The larger of two weights of a batch counts half as much as the smaller."""
    log_w = log_weights(model, guide, x, 2, vectorized=True).sum(1)
    rank = log_w.argsort() + 1
    # Pyro divides by the number of particles, too.
    return -(log_w / rank).sum() / (1 / rank).sum() / 2


FREE_BITS = FreeBitsELBO(0.01)  # more would leave layers without a gradient
MEAN_FIELD = FreeBitsELBO(analytic_kl=True)
TWO = {"num_particles": 2, "max_plate_nesting": 1}
TOGETHER: dict[str, Any] = {**TWO, "vectorize_particles": True}

# An ELBO of Pyro, and the loss of the torch loop that takes the same steps.
LOOPS: dict[str, tuple[Any, Loss]] = {
    "Trace_ELBO": (Trace_ELBO(), negative_elbo),
    "Trace_ELBO, vectorized": (
        Trace_ELBO(**TOGETHER),
        lambda model, guide, x: -log_weights(model, guide, x, 2, vectorized=True).mean(0).sum(),
    ),
    "TraceMeanField_ELBO": (TraceMeanField_ELBO(), MEAN_FIELD.differentiable_loss),
    "TraceGraph_ELBO": (TraceGraph_ELBO(), negative_elbo),
    "RenyiELBO": (RenyiELBO(**TWO), negative_iw_bound(vectorized=False)),
    "RenyiELBO, vectorized": (RenyiELBO(**TOGETHER), negative_iw_bound(vectorized=True)),
    "TraceTailAdaptive_ELBO": (TraceTailAdaptive_ELBO(**TOGETHER), tail_adaptive),
    "FreeBitsELBO": (FREE_BITS, FREE_BITS.differentiable_loss),
}


@row(
    "`Trace_ELBO`",
    "`TraceMeanField_ELBO`",
    "`TraceGraph_ELBO`",
    "`RenyiELBO`",
    "`TraceTailAdaptive_ELBO`",
    "`FreeBitsELBO`",
)
@pytest.mark.parametrize("name", LOOPS)
def test_svi_takes_the_steps_of_a_torch_loop(make_pair: MakePair, x: Tensor, name: str) -> None:
    """The same losses and the same parameters after each of three steps, with dropout."""
    elbo, loss_fn = LOOPS[name]
    # Before batch norm a bias has no gradient but rounding, which Adam would blow up.
    model, guide = make_pair(learn_top_prior=True, skip=True, gated=True, batchnorm=False)
    model, guide, x = model.double(), guide.double(), x.double()
    plain = copy.deepcopy((model, guide))
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2}  # a small eps would blow up rounding
    optimizer = torch.optim.Adam([p for m in plain for p in m.parameters()], **options)
    svi = SVI(model, guide, pyro.optim.Adam(options), elbo)
    for step in range(3):
        before = parameters(model, guide)
        torch.manual_seed(step)
        loss = svi.step(x)
        torch.manual_seed(step)
        optimizer.zero_grad()
        expected = loss_fn(*plain, x)
        expected.backward()
        optimizer.step()
        if name != "TraceTailAdaptive_ELBO":  # whose loss is not computed
            assert loss == pytest.approx(expected.item(), rel=1e-10)
        after = parameters(model, guide)
        assert_close(after, parameters(*plain))
        assert not any(torch.equal(after[key], before[key]) for key in before)
    assert len(pyro.get_param_store()) == len(before)


OPTIMIZERS: dict[str, tuple[Any, Callable[..., torch.optim.Optimizer]]] = {
    "Adam": (pyro.optim.Adam({"lr": 1e-2}), torch.optim.Adam),
    "Adamax": (pyro.optim.PyroOptim(torch.optim.Adamax, {"lr": 1e-2}), torch.optim.Adamax),
    "SGD": (pyro.optim.SGD({"lr": 1e-5}), torch.optim.SGD),
}


@row("`pyro.optim`, `PyroOptim`")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_svi_takes_any_optimizer(make_pair: MakePair, x: Tensor, name: str) -> None:
    """Of Pyro, or of torch in a `PyroOptim`; with batch norm, in training mode."""
    optim, make_optimizer = OPTIMIZERS[name]
    model, guide = make_pair(learn_top_prior=True)
    plain: Any = Trace_ELBO()(*copy.deepcopy((model, guide)))
    optimizer = make_optimizer(plain.parameters(), lr=1e-5 if name == "SGD" else 1e-2)
    svi = SVI(model, guide, optim, Trace_ELBO())
    before = parameters(model, guide)
    for step in range(2):
        torch.manual_seed(step)
        loss = svi.step(x)
        torch.manual_seed(step)
        optimizer.zero_grad()
        expected = plain(x)
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-6)
    after = parameters(model, guide)
    assert_close(after, parameters(plain.model, plain.guide), rtol=1e-5, atol=1e-6)
    assert not any(torch.equal(after[key], before[key]) for key in before)
    # Batch norm saw the same batches.
    for module, twin in ((model, plain.model), (guide, plain.guide)):
        assert_close(dict(module.named_buffers()), dict(twin.named_buffers()))


def test_the_five_lines_of_the_pages(make_pair: MakePair, x: Tensor) -> None:
    """The loop lowers the loss, and a parameter that is not to be trained stays."""
    model, guide = make_pair()  # with a fixed prior of the top layer
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    losses = [svi.step(x) for _ in range(15)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 50
    fixed = model.top_prior.mean_log_variance
    assert all(value is not fixed for value in pyro.get_param_store().values())


@pytest.mark.parametrize("elbo", [Trace_ELBO(), FreeBitsELBO()], ids=["Trace_ELBO", "FreeBitsELBO"])
def test_svi_trains_each_of_two_pairs(make_pair: MakePair, x: Tensor, elbo: Any) -> None:
    """Two ladders in one process: a step of one moves all of its tensors and none of the other."""
    pairs = [make_pair(learn_top_prior=True) for _ in range(2)]
    svis = [SVI(*pair, pyro.optim.Adamax({"lr": 1e-2}), elbo) for pair in pairs]
    for _ in range(2):
        for i, svi in enumerate(svis):
            before = [parameters(*pair) for pair in pairs]
            svi.step(x)
            after = [parameters(*pair) for pair in pairs]
            for j in range(2):
                moved = {not torch.equal(after[j][name], before[j][name]) for name in before[j]}
                assert moved == {i == j}


def test_svi_evaluates_the_true_loss(make_pair: MakePair, x: Tensor) -> None:
    """`evaluate_loss` is the negative ELBO without free bits, and leaves no gradient."""
    model, guide = double_pair(make_pair)
    svi = SVI(model, guide, pyro.optim.Adamax({"lr": 1e-2}), FreeBitsELBO(50.0))
    expected = particles(model, guide, x.double(), k=1, seed=11).sum()
    torch.manual_seed(11)
    assert svi.evaluate_loss(x.double()) == pytest.approx(-expected.item(), rel=1e-12)
    assert gradients(model, guide) == {}


# Where Pyro needs help


@row("`JitTrace_ELBO`", "`JitTraceMeanField_ELBO`")
@pytest.mark.parametrize(
    ("compiled", "eager", "passes"),
    # JitTraceMeanField_ELBO compiles again at each call, for which it runs the pair twice.
    [(JitTrace_ELBO, Trace_ELBO, 1), (JitTraceMeanField_ELBO, TraceMeanField_ELBO, 3)],
    ids=["JitTrace_ELBO", "JitTraceMeanField_ELBO"],
)
def test_jit(make_pair: MakePair, x: Tensor, compiled: Any, eager: Any, passes: int) -> None:
    """Once compiled, losses and gradients are the eager ones, on other images too."""
    model, guide = make_pair(learn_top_prior=True, batchnorm=False)
    model, guide, x = model.double(), guide.double(), x.double()
    elbo = compiled(ignore_jit_warnings=True)
    before = parameters(model, guide)
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), elbo).step(x)
    after = parameters(model, guide)
    assert not any(torch.equal(after[key], before[key]) for key in before)
    gradients(model, guide)
    for images in (x, 1 - x):
        torch.manual_seed(1)
        with poutine.trace(param_only=True):
            loss = elbo.loss_and_grads(model, guide, images)
        found = gradients(model, guide)
        torch.manual_seed(1)
        for _ in range(passes):
            expected = eager().differentiable_loss(model, guide, images)
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-10)
        assert_close(found, gradients(model, guide))


@row("`TraceEnum_ELBO`")
def test_trace_enum(make_pair: MakePair, x: Tensor) -> None:
    """With the guide in a function, loss and gradients are those of Trace_ELBO."""
    model, guide = (module.eval() for module in make_pair(learn_top_prior=True))
    with pytest.raises(NotImplementedError, match="does not support GuideMessenger"):
        TraceEnum_ELBO(max_plate_nesting=1).loss(model, guide, x)
    with poutine.trace(param_only=True):
        torch.manual_seed(2)
        elbo = TraceEnum_ELBO(max_plate_nesting=1)
        loss = elbo.loss_and_grads(model, lambda x: guide(x), x)
    found = gradients(model, guide)
    torch.manual_seed(2)
    expected = negative_elbo(model, guide, x)
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert_close(found, gradients(model, guide), rtol=1e-4, atol=1e-4)


class Detach(poutine.messenger.Messenger):
    """Cuts latents off their distributions, as wake-sleep has them."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"].startswith("z_"):
            msg["value"] = msg["value"].detach()


@row("`ReweightedWakeSleep`")
def test_reweighted_wake_sleep(make_pair: MakePair, x: Tensor) -> None:
    """The losses of Bornschein and Bengio (2015), and their gradients with the draws held fixed."""
    model, guide = double_pair(make_pair, learn_top_prior=True, skip=True)
    x = x.double()
    elbo = ReweightedWakeSleep(num_particles=3, max_plate_nesting=1)
    with pytest.raises(NotImplementedError, match="GuideMessenger does not support detach"):
        elbo.loss(model, guide, x)

    def detached_guide(x: Tensor) -> dict[str, Tensor]:
        with Detach():
            return guide(x)

    with poutine.trace(param_only=True):
        torch.manual_seed(3)
        wake_theta, wake_phi = elbo.loss_and_grads(model, detached_guide, x)
    found = gradients(model, guide)

    torch.manual_seed(3)
    with torch.no_grad(), pyro.plate("particles", 3, dim=-2):
        drawn = guide(x)
    draws = [latents(drawn, k) for k in range(3)]
    log_p = torch.stack([log_joint(model, z, x).sum() for z in draws])
    log_q = torch.stack([log_posterior(model, guide, z, x).sum() for z in draws])
    log_w = log_p - log_q.detach()
    expected = (-log_mean_exp(log_w), -(log_w.detach().softmax(0) * log_q).sum())
    assert wake_theta == pytest.approx(expected[0].item(), rel=1e-10)
    assert wake_phi == pytest.approx(expected[1].item(), rel=1e-10)
    sum(expected).backward()  # type: ignore[union-attr]
    assert_close(found, gradients(model, guide))


@row("`EnergyDistance`")
def test_energy_distance(make_pair: MakePair, x: Tensor) -> None:
    """Mean distance of replicates from the image, minus half that of one from another."""
    model, guide = double_pair(make_pair, likelihood="gaussian", learn_top_prior=True)
    x = x.double() + 0.1
    observing = poutine.block(model, hide_fn=lambda site: site["name"].startswith("h_"))
    energy = EnergyDistance(num_particles=2, max_plate_nesting=2, prior_scale=0.1)
    torch.manual_seed(4)
    loss = energy(observing, guide, x)

    torch.manual_seed(4)
    with torch.no_grad(), pyro.plate("particles", 2, dim=-2):
        z = latents(guide(x))
        replicates = poutine.condition(poutine.uncondition(model), z)(x)
        prior = poutine.trace(poutine.condition(model, z)).get_trace(x)
    error = (replicates - x).flatten(1).norm(dim=-1).mean()  # the batch is one observation
    spread = (replicates[0] - replicates[1]).norm()
    prior.compute_log_prob()
    log_prior = sum(prior.nodes[name]["log_prob"].sum() for name in z)
    assert_close(loss.detach(), error - spread / 2 - 0.1 * log_prior)
    before = parameters(model, guide)
    SVI(observing, guide, pyro.optim.Adam({"lr": 1e-2}), energy).step(x)
    after = parameters(model, guide)
    assert not any(torch.equal(after[key], before[key]) for key in before)


# Particles


def noise_for(k: int, n: int) -> dict[str, Tensor]:
    """Noise of k particles and n images by site, (k, n, Z, h, w)."""
    return {name: torch.randn(k, n, *shape).double() for name, shape in SHAPES.items()}


def site_log_probs(trace: poutine.Trace) -> dict[str, Tensor]:
    trace.compute_log_prob()
    return {
        name: site["log_prob"]
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and name in (*SHAPES, "x")
    }


@row("`vectorize_particles=True`")
def test_vectorized_and_sequential_particles(make_pair: MakePair, x: Tensor) -> None:
    """On the same noise, each site has the same log-probability, particle by particle."""
    _, guide = double_pair(make_pair, skip=True)
    x = x.double()
    noise = noise_for(3, len(x))
    with FixedNoise(noise), pyro.plate("particles", 3, dim=-2):
        guide(x)
    together = [site_log_probs(trace) for trace in guide.get_traces()]
    assert [list(found) for found in together] == [[*LATENTS[::-1], "x"], [*LATENTS[::-1]]]
    for k in range(3):
        with FixedNoise({name: value[k] for name, value in noise.items()}):
            guide(x)
        for found, trace in zip(together, guide.get_traces(), strict=True):
            assert_close({name: v[k] for name, v in found.items()}, site_log_probs(trace))


@row("a plate to the left of `images`")
def test_a_plate_to_the_left_of_the_images(make_pair: MakePair, x: Tensor) -> None:
    """Sets of images (S, N, C, H, W): each set has the log-probabilities it has alone."""
    model, guide = double_pair(make_pair, skip=True)
    sets = torch.stack([x, 1 - x]).double()
    noise = noise_for(2, len(x))

    def in_sets(program: Any) -> Any:
        def run(x: Tensor) -> Any:
            with pyro.plate("sets", 2, dim=-2):
                return program(x)

        return run

    with FixedNoise(noise):
        together = FreeBitsELBO(max_plate_nesting=2).compute_terms(
            in_sets(model), in_sets(guide), sets
        )
    for s in range(2):
        with FixedNoise({name: value[s] for name, value in noise.items()}):
            alone = FreeBitsELBO().compute_terms(model, guide, sets[s])
        assert_close(together.log_likelihood[s], alone.log_likelihood)
        assert_close(together.kl[s], alone.kl)
