"""One training step by hand: clipping, skipping, the moving average, means and schedules."""

import copy
import math
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from config import Config
from elbo import FreeBitsELBO
from guide import build_ladder
from schedule import Length, kl_weight, learning_rate
from svi import SVI, MovingAverage

SMALL: dict[str, Any] = {
    "z_dims": [2, 3],
    "downsample": [0, 1],
    "n_filters": 4,
    "blocks_per_layer": 1,
    "initial_downscaling": False,
    "dropout": 0.0,
    "skip": True,
    "learn_top_prior": True,
}


def make_loss(free_bits: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    config = Config(**(SMALL | {"batchnorm": False} | options))
    return FreeBitsELBO(free_bits)(*build_ladder(config, (1, 8, 8)))


def images(n: int = 4, seed: int = 1) -> Tensor:
    return torch.rand((n, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).round()


def gradients(loss_fn: Any, x: Tensor, seed: int) -> dict[str, Tensor]:
    """The gradient per image of a copy of `loss_fn`, which is left as it is."""
    twin = copy.deepcopy(loss_fn)
    torch.manual_seed(seed)
    (twin(x) / len(x)).backward()
    return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}


def global_norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors.values()))


def step_of_nan(svi: SVI) -> None:
    with pyro.validation_enabled(False):  # as in training; it would refuse them
        loss = svi.step(torch.full((4, 1, 8, 8), torch.nan))
    assert loss.isnan()


def frozen(state: Any) -> Any:
    """A copy of a nested state that later steps do not change."""
    return copy.deepcopy(state)


# --- The gradient: clipped, or left out ---


@pytest.mark.parametrize("share", [0.25, 4.0])
def test_clipping_scales_the_whole_gradient_to_the_global_norm(share: float) -> None:
    """An update is that of the gradient times min(1, bound / norm)."""
    loss_fn = make_loss()
    x = images()
    grads = gradients(loss_fn, x, seed=2)
    norm = global_norm(grads)
    assert norm > 0.1
    before = {name: p.detach().clone() for name, p in loss_fn.named_parameters()}
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=0.5)
    svi = SVI(loss_fn, optimizer, clip_norm=share * norm)
    torch.manual_seed(2)
    svi.step(x)
    moved = {name: before[name] - p.detach() for name, p in loss_fn.named_parameters()}
    for name, gradient in grads.items():
        expected = 0.5 * min(1.0, share) * gradient
        assert_close(moved[name], expected, rtol=1e-4, atol=1e-6 * norm)
    assert global_norm(moved) == pytest.approx(0.5 * min(1.0, share) * norm, rel=1e-4)
    means = svi.read()
    assert means is not None
    assert means.grad_norm == pytest.approx(norm, rel=1e-5)  # before clipping


@pytest.mark.parametrize("kind", ["exploding", "nan"])
def test_a_bad_gradient_is_left_out_and_counted(kind: str) -> None:
    """Weights, optimizer state and average stay as they were, and the next step goes on."""
    loss_fn = make_loss()
    optimizer = torch.optim.Adamax(loss_fn.parameters(), lr=1e-2)
    average = MovingAverage(loss_fn, 0.9)
    svi = SVI(loss_fn, optimizer, skip_norm=1e6, average=average)
    svi.step(images(seed=1))
    svi.read()

    parts = (loss_fn, optimizer, average)
    before = [frozen(part.state_dict()) for part in parts]
    if kind == "nan":
        step_of_nan(svi)
    else:
        svi.guard.skip_norm = 1e-3
        svi.step(images(seed=2))
        svi.guard.skip_norm = 1e6
    for part, state in zip(parts, before, strict=True):
        assert_close(part.state_dict(), state, rtol=0, atol=0)
    assert svi.guard.skipped == 1
    assert svi.read() is None  # no update, no mean
    assert all(p.grad is None for p in loss_fn.parameters())

    loss = svi.step(images(seed=3))
    assert loss.isfinite()
    assert svi.guard.skipped == 1
    assert average.updates == 2
    name = "guide.top_posterior.conv.weight"
    assert not torch.equal(loss_fn.state_dict()[name], before[0][name])


def test_a_bad_step_leaves_no_trace_in_the_batch_norm_statistics() -> None:
    """One batch that is not finite must not spoil all evaluations after it."""
    loss_fn = make_loss(batchnorm=True)
    svi = SVI(loss_fn, torch.optim.Adamax(loss_fn.parameters(), lr=1e-2), skip_norm=1e6)
    svi.step(images(seed=1))
    step_of_nan(svi)
    assert svi.guard.skipped == 1
    spoilt = [name for name, value in loss_fn.state_dict().items() if not value.isfinite().all()]
    assert spoilt == []


def test_nothing_is_skipped_without_a_bound() -> None:
    loss_fn = make_loss()
    svi = SVI(loss_fn, torch.optim.SGD(loss_fn.parameters(), lr=1e-3))
    before = frozen(loss_fn.state_dict())
    svi.step(images())
    assert svi.guard.skipped == 0
    assert any(not torch.equal(v, before[k]) for k, v in loss_fn.state_dict().items())


# --- The moving average ---


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))
        self.mean: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.tensor([10.0]))
        self.register_buffer("count", torch.tensor(0))

    def set(self, weight: float, mean: float, count: int) -> None:
        with torch.no_grad():
            self.weight.fill_(weight)
            self.mean.fill_(mean)
            self.count.fill_(count)


def test_moving_average_by_hand() -> None:
    """Decays 1/10, 2/11 and then the 0.2 asked for; integer buffers are copied."""
    source = Toy()
    average = MovingAverage(source, 0.2)
    averaged: Any = average.module
    assert not averaged.weight.requires_grad
    assert not averaged.training

    source.set(2.0, 20.0, 1)
    average.update()
    first = 0.1 * 1.0 + 0.9 * 2.0
    assert averaged.weight.item() == pytest.approx(first, rel=1e-6)
    assert averaged.mean.item() == pytest.approx(0.1 * 10.0 + 0.9 * 20.0, rel=1e-6)
    assert averaged.count.item() == 1

    source.set(3.0, 30.0, 2)
    average.update()
    second = 2 / 11 * first + 9 / 11 * 3.0
    assert averaged.weight.item() == pytest.approx(second, rel=1e-6)

    source.set(5.0, 50.0, 7)
    average.update()
    third = 0.2 * second + 0.8 * 5.0
    assert averaged.weight.item() == pytest.approx(third, rel=1e-6)
    assert averaged.count.item() == 7
    assert source.weight.item() == 5.0
    assert average.updates == 3


def test_a_loaded_moving_average_goes_on_as_the_saved_one() -> None:
    source = Toy()
    average = MovingAverage(source, 0.9)
    source.set(2.0, 20.0, 1)
    average.update()
    other = MovingAverage(Toy(), 0.9)
    other.load_state_dict(frozen(average.state_dict()))
    assert other.updates == 1
    other_source = Toy()
    continued = MovingAverage(other_source, 0.9)
    continued.load_state_dict(frozen(average.state_dict()))
    for module, moving in ((source, average), (other_source, continued)):
        module.set(4.0, 40.0, 2)
        moving.update()
    assert_close(continued.state_dict(), average.state_dict(), rtol=0, atol=0)


# --- What a step reports ---


def test_step_means_are_the_means_of_the_steps_terms() -> None:
    loss_fn = make_loss(free_bits=0.7)
    svi = SVI(loss_fn, torch.optim.Adamax(loss_fn.parameters(), lr=1e-2))
    assert svi.read() is None
    losses, log_likelihoods, kls, norms = [], [], [], []
    for step in range(3):
        x = images(seed=step)
        norms.append(global_norm(gradients(loss_fn, x, seed=step)))
        torch.manual_seed(step)
        losses.append(svi.step(x).item())
        terms = svi.elbo.terms
        assert terms is not None
        log_likelihoods.append(terms.log_likelihood.mean().item())
        kls.append(terms.kl.mean(0))
        clamped = terms.kl.clamp(min=0.7).sum(1) - terms.log_likelihood
        assert losses[-1] == pytest.approx(clamped.mean().item(), rel=1e-5)
    seen, means = svi.peek(), svi.read()
    assert means is not None
    assert seen == means  # peeking forgets nothing
    assert means.steps == 3
    assert means.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert means.log_likelihood == pytest.approx(sum(log_likelihoods) / 3, rel=1e-5)
    assert means.kl == pytest.approx(torch.stack(kls).mean(0).tolist(), rel=1e-5)
    assert means.grad_norm == pytest.approx(sum(norms) / 3, rel=1e-4)
    assert means.negative_elbo == pytest.approx(sum(means.kl) - means.log_likelihood)
    assert svi.peek() is None  # reading begins anew


def test_evaluate_loss_is_the_true_negative_elbo() -> None:
    """Neither free bits nor the KL weight enter it, and nothing is trained by it."""
    loss_fn = make_loss(free_bits=5.0)
    svi = SVI(loss_fn, torch.optim.SGD(loss_fn.parameters(), lr=0.1))
    svi.elbo.kl_weight = 0.25
    before = frozen(loss_fn.state_dict())
    x = images(6)
    torch.manual_seed(3)
    value = svi.evaluate_loss(x)
    torch.manual_seed(3)
    terms = FreeBitsELBO().compute_terms(loss_fn.model, loss_fn.guide, x)
    assert value == pytest.approx(-terms.elbo.mean().item(), rel=1e-6)
    torch.manual_seed(3)
    assert svi.step(x).item() != pytest.approx(value, rel=1e-3)
    svi.optimizer.zero_grad()
    loss_fn.load_state_dict(before)
    svi.evaluate_loss(x)
    assert_close(loss_fn.state_dict(), before, rtol=0, atol=0)


# --- Schedules and the length of a run ---


def test_learning_rate_warms_up_linearly() -> None:
    config = Config(lr=2.0, lr_warmup=3)
    rates = [learning_rate(config, step, 0.5) for step in (0, 1, 2, 3, 100)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert learning_rate(Config(lr=2.0), 0, 0.0) == 2.0


def test_learning_rate_decays_by_half_a_cosine() -> None:
    config = Config(lr=2.0, lr_decay="cosine", steps=100)
    rates = [learning_rate(config, 50, progress) for progress in (0, 0.25, 0.5, 1)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 0.0])
    both = Config(lr=2.0, lr_warmup=3, lr_decay="cosine", steps=100)
    assert learning_rate(both, 1, 0.5) == pytest.approx(0.5)


def test_kl_weight_rises_linearly() -> None:
    weights = [kl_weight(Config(beta_anneal=4), step) for step in (0, 1, 2, 3, 4, 5, 1000)]
    assert weights == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [kl_weight(Config(), step) for step in (0, 1)] == [1, 1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Length(None, None)),
        ({"steps": 10}, Length(10, None)),
        ({"epochs": 2}, Length(14, None)),
        ({"steps": 10, "epochs": 2}, Length(10, None)),
        ({"steps": 20, "epochs": 2}, Length(14, None)),
        ({"max_minutes": 1.5}, Length(None, 1.5)),
        ({"steps": 3, "max_minutes": 1.5}, Length(3, 1.5)),
    ],
)
def test_the_first_bound_counts(options: dict[str, Any], expected: Length) -> None:
    assert Length.of(Config(**options), steps_per_epoch=7) == expected


@pytest.mark.parametrize(
    ("length", "step", "minutes", "expected"),
    [
        (Length(None, None), 1000, 1000.0, 0.0),
        (Length(10, None), 4, 99.0, 0.4),
        (Length(None, 2.0), 1000, 0.5, 0.25),
        (Length(10, 2.0), 4, 0.5, 0.4),
        (Length(10, 2.0), 4, 1.5, 0.75),
        (Length(10, 2.0), 10, 0.0, 1.0),
        (Length(10, 2.0), 3, 5.0, 1.0),
    ],
)
def test_progress_is_that_of_the_bound_nearest_to_its_end(
    length: Length, step: int, minutes: float, expected: float
) -> None:
    assert length.progress(step, minutes) == pytest.approx(expected)
