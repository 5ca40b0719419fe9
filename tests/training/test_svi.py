"""One training step checked by hand: clipping, skipping, moving average, means and schedules."""

import copy
import math
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.runs.options import RunConfig
from ladder_vae.training.device_step import DeviceSVI
from ladder_vae.training.moving_average import MovingAverage
from ladder_vae.training.muon import Muon, hidden_convolutions
from ladder_vae.training.schedule import Length, kl_weight, learning_rate
from ladder_vae.training.svi import SVI
from ladder_vae.training.update_guard import WINDOW, Snapshot, UpdateGuard, zero_unless

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
    config = RunConfig.of(**(SMALL | {"batchnorm": False} | options))
    return FreeBitsELBO(free_bits)(*build_ladder(config.ladder, (1, 8, 8)))


def images(n: int = 4, seed: int = 1) -> Tensor:
    return torch.rand((n, 1, 8, 8), generator=torch.Generator().manual_seed(seed)).round()


def gradients(loss_fn: Any, x: Tensor, seed: int) -> dict[str, Tensor]:
    """The gradient per image, computed on a copy of `loss_fn`."""
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


# --- The gradient: clipped or skipped ---


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
    means = svi.sums.read()
    assert means is not None
    assert means.grad_norm == pytest.approx(norm, rel=1e-5)  # before clipping


def test_a_step_ignores_gradients_left_by_a_broken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording that fails leaves gradients behind; the next step must not add to them."""
    x = images()
    steps = []
    for broken in (False, True):
        loss_fn = make_loss()
        svi = SVI(loss_fn, torch.optim.SGD(loss_fn.parameters(), lr=0.5))
        if broken:
            with monkeypatch.context() as patch:
                patch.setattr(svi.guard, "judge", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    svi.step(x)
        torch.manual_seed(3)
        svi.step(x)
        steps.append(loss_fn.state_dict())
    assert_close(steps[1], steps[0], rtol=0, atol=0)


KINDS = pytest.mark.parametrize("kind_of_svi", [SVI, DeviceSVI])


def muon(loss_fn: Any) -> Muon:
    matrices = hidden_convolutions(loss_fn.model, loss_fn.guide)
    kept = set(map(id, matrices))
    return Muon(matrices, [p for p in loss_fn.parameters() if id(p) not in kept], lr=1e-2)


def adamax(loss_fn: Any) -> torch.optim.Adamax:
    return torch.optim.Adamax(loss_fn.parameters(), lr=1e-2, weight_decay=0.1)


@pytest.mark.usefixtures("adamax_anywhere")
@KINDS
@pytest.mark.parametrize("first", [True, False], ids=["at first", "later"])
@pytest.mark.parametrize("kind", ["exploding", "spike", "nan"])
@pytest.mark.parametrize("make_optimizer", [adamax, muon])
def test_a_bad_step_is_skipped_and_counted(
    make_optimizer: Any, kind: str, first: bool, kind_of_svi: type[SVI]
) -> None:
    """Weights, optimizer state, statistics and average stay unchanged; the next step counts."""
    loss_fn = make_loss(batchnorm=True)
    optimizer = make_optimizer(loss_fn)
    average = MovingAverage(loss_fn, 0.9)
    svi = kind_of_svi(loss_fn, optimizer, spike=1e6, average=average)
    if not first:
        svi.step(images(seed=1))
        svi.sums.read()

    parts = (loss_fn, average, optimizer)
    before = [frozen(part.state_dict()) for part in parts]
    if kind == "nan":
        step_of_nan(svi)
    elif kind == "exploding":
        svi.guard.skip_norm = 1e-3
        svi.step(images(seed=2))
        svi.guard.skip_norm = 0
    else:
        svi.guard.load_state_dict(svi.guard.state_dict() | {"norms": torch.full((WINDOW,), 1e-9)})
        svi.step(images(seed=2))
        svi.guard.spike = 0
    after = [part.state_dict() for part in parts]
    assert_close(after[:2], before[:2], rtol=0, atol=0)
    if first:  # where there was no state, there may be one of zeros
        state = [v for values in after[2]["state"].values() for v in values.values()]
        assert all(not value.any() for value in state)
    else:
        assert_close(after[2], before[2], rtol=0, atol=0)
    assert svi.guard.skipped == 1
    assert svi.guard.spikes == (kind == "spike")
    assert svi.sums.read() is None  # no update, no mean

    loss = svi.step(images(seed=3))
    assert loss.isfinite()
    assert svi.guard.skipped == 1
    assert average.updates == 2 - first
    name = "guide.top_posterior.conv.weight"
    assert not torch.equal(loss_fn.state_dict()[name], before[0][name])


def test_host_and_device_decide_alike() -> None:
    """Bitwise the same weights, averages and means after good steps and bad ones."""
    results = []
    for kind in (SVI, DeviceSVI):
        loss_fn = make_loss(batchnorm=True)
        average = MovingAverage(loss_fn, 0.9)
        optimizer = torch.optim.SGD(loss_fn.parameters(), lr=1e-2, momentum=0.9)
        svi = kind(loss_fn, optimizer, clip_norm=1.0, spike=100.0, average=average)
        torch.manual_seed(5)
        for step in range(6):
            if step in (0, 3):
                step_of_nan(svi)
            else:
                svi.step(images(seed=step))
        parts: tuple[Any, ...] = (loss_fn, average, svi)
        results.append([part.state_dict() for part in parts])
    assert_close(results[1], results[0], rtol=0, atol=0)
    guard = results[0][2]["guard"]
    assert (guard["taken"], guard["skipped"], guard["spikes"]) == (4, 2, 0)


class Waiting(TorchDispatchMode):
    """Refuses to read a number from a tensor."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("adamax_anywhere")
def test_no_device_step_waits_for_the_device() -> None:
    """Loss, gradient norm, decision and sums stay there; only reading them waits."""
    loss_fn = make_loss(batchnorm=True, dropout=0.2)
    optimizer = torch.optim.Adamax(loss_fn.parameters(), lr=1e-2)
    average = MovingAverage(loss_fn, 0.9)
    svi = DeviceSVI(loss_fn, optimizer, clip_norm=1.0, skip_norm=9.0, spike=9.0, average=average)
    with pyro.validation_enabled(False), Waiting():
        for _ in range(3):
            svi.step(images())
        with pytest.raises(AssertionError, match="the host waits"):
            svi.guard.skipped  # noqa: B018 (reading it waits)
        with pytest.raises(AssertionError, match="the host waits"):
            SVI(make_loss(), optimizer).step(images())


def test_a_step_needs_no_number_at_all() -> None:
    """A step runs on the meta device, whose tensors have shapes but no values."""
    loss_fn = make_loss(batchnorm=True, dropout=0.2).to("meta")
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=1e-2, momentum=0.9)
    average = MovingAverage(loss_fn, 0.9)
    svi = DeviceSVI(loss_fn, optimizer, clip_norm=1.0, skip_norm=9.0, spike=9.0, average=average)
    with pyro.validation_enabled(False):
        for _ in range(2):
            assert svi.step(torch.empty(4, 1, 8, 8, device="meta")).shape == ()
        with pytest.raises(RuntimeError, match="meta"):
            svi.sums.read()


def test_finite_steps_are_taken_without_a_bound() -> None:
    loss_fn = make_loss()
    svi = SVI(loss_fn, torch.optim.SGD(loss_fn.parameters(), lr=1e-3))
    before = frozen(loss_fn.state_dict())
    svi.step(images())
    assert svi.guard.skipped == 0
    assert any(not torch.equal(v, before[k]) for k, v in loss_fn.state_dict().items())


# --- Which steps count ---


def judged(guard: UpdateGuard, *norms: float, loss: float = 1.0) -> list[bool]:
    return [bool(guard.judge(torch.tensor(loss), torch.tensor(norm))) for norm in norms]


def test_what_is_not_finite_never_counts() -> None:
    guard = UpdateGuard(torch.device("cpu"))
    assert judged(guard, 1.0, math.nan, math.inf, 1e30) == [True, False, False, True]
    assert judged(guard, 1.0, loss=math.nan) == judged(guard, 1.0, loss=-math.inf) == [False]
    assert (guard.skipped, guard.spikes) == (4, 0)


def test_rows_of_skipped_steps_are_remembered_until_a_resumption() -> None:
    guard = UpdateGuard(torch.device("cpu"))
    judged(guard, 1, math.nan, math.nan, math.nan, 1, math.nan, math.nan)
    assert (guard.skipped, guard.longest_row) == (5, 3)
    guard.load_state_dict(guard.state_dict())
    assert (guard.skipped, guard.longest_row) == (5, 0)


def test_a_spike_is_told_by_the_median_of_the_last_hundred_that_counted() -> None:
    guard = UpdateGuard(torch.device("cpu"), spike=10.0)
    assert judged(guard, *[1.0] * 49, 1e9) == [True] * 50
    # Now half of the window is known, and the lower median of 49 ones, a two and the rest is two.
    assert judged(guard, 2.0, 21.0, 20.0) == [True, False, True]
    assert judged(guard, *[3.0] * 97) == [True] * 97  # the ones have left the window
    assert judged(guard, 30.5, 29.5) == [False, True]
    other = UpdateGuard(torch.device("cpu"), spike=10.0)
    other.load_state_dict(frozen(guard.state_dict()))
    assert judged(other, 30.5) == judged(guard, 30.5) == [False]
    assert (other.skipped, other.spikes) == (guard.skipped, guard.spikes) == (3, 3)


def test_a_snapshot_is_put_back_to_the_bit() -> None:
    """For all types, including nan, infinity and negative zero; or everything stays unchanged."""
    kinds = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool]
    for good in (True, False):
        tensors = [torch.tensor([-0.0, 1.0, 0.0]).to(kind) for kind in kinds]
        tensors.append(torch.tensor(7))
        before = frozen(tensors)
        snapshot = Snapshot(tensors)
        for tensor in tensors:
            tensor.fill_(math.nan if tensor.is_floating_point() else 1)
        changed = frozen(tensors)
        snapshot.restore_unless(torch.tensor(good))
        expected = changed if good else before
        assert_close(tensors, expected, rtol=0, atol=0, equal_nan=True)
        if not good:
            assert [str(t) for t in tensors] == [str(t) for t in before]  # distinguishes -0 from 0
        zero_unless(tensors, torch.tensor(False))
        assert not any(tensor.any() for tensor in tensors)


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
    assert svi.sums.read() is None
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
    seen, means = svi.sums.peek(), svi.sums.read()
    assert means is not None
    assert seen == means  # peeking forgets nothing
    assert means.steps == 3
    assert means.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert means.log_likelihood == pytest.approx(sum(log_likelihoods) / 3, rel=1e-5)
    assert means.kl == pytest.approx(torch.stack(kls).mean(0).tolist(), rel=1e-5)
    assert means.grad_norm == pytest.approx(sum(norms) / 3, rel=1e-4)
    assert means.negative_elbo == pytest.approx(sum(means.kl) - means.log_likelihood)
    assert svi.sums.peek() is None  # reading resets the sums


def test_sums_go_on_in_another_process() -> None:
    """An interruption between two log entries does not change the second."""
    whole, first = (make_svi(), make_svi())
    for step in range(2):
        torch.manual_seed(step)
        whole.step(images(seed=step))
        torch.manual_seed(step)
        first.step(images(seed=step))
    second = make_svi()
    second.loss_fn.load_state_dict(frozen(first.loss_fn.state_dict()))
    second.load_state_dict(frozen(first.state_dict()))
    for svi in (whole, second):
        torch.manual_seed(2)
        svi.step(images(seed=2))
    assert whole.sums.read() == second.sums.read()


def make_svi() -> SVI:
    loss_fn = make_loss()
    return SVI(loss_fn, torch.optim.Adamax(loss_fn.parameters(), lr=1e-2), spike=10.0)


def test_evaluate_loss_is_the_true_negative_elbo() -> None:
    """It ignores free bits and KL weight, and trains nothing."""
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
    config = RunConfig.of(lr=2.0, lr_warmup=3)
    rates = [learning_rate(config, step, 0.5) for step in (0, 1, 2, 3, 100)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert learning_rate(RunConfig.of(lr=2.0), 0, 0.0) == 2.0


def test_learning_rate_decays_by_half_a_cosine() -> None:
    config = RunConfig.of(lr=2.0, lr_decay="cosine", steps=100)
    rates = [learning_rate(config, 50, progress) for progress in (0, 0.25, 0.5, 1)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 0.0])
    both = RunConfig.of(lr=2.0, lr_warmup=3, lr_decay="cosine", steps=100)
    assert learning_rate(both, 1, 0.5) == pytest.approx(0.5)


def test_kl_weight_rises_linearly() -> None:
    weights = [kl_weight(RunConfig.of(beta_anneal=4), step) for step in (0, 1, 2, 3, 4, 5, 1000)]
    assert weights == [0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert [kl_weight(RunConfig.of(), step) for step in (0, 1)] == [1, 1]


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
    assert Length.of(RunConfig.of(**options), steps_per_epoch=7) == expected


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
