"""Pareto k-hat: Pyro's fit, known shapes, and extreme weights."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor
from torch.testing import assert_close

from ladder_vae.evaluation.importance import LogWeights
from ladder_vae.evaluation.pareto import (
    generalized_pareto,
    pareto_k,
    reliable_below,
    smoothed_log_mean,
    tail_length,
)

EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-10}


def k_hat(log_weights: Tensor) -> Tensor:
    """(N,) from all log-weights (N, K)."""
    return pareto_k(log_weights.topk(tail_length(log_weights.shape[1]) + 1).values)


def pareto_numbers(shape: float, *size: int) -> Tensor:
    """Draws from the generalized Pareto distribution of scale 1, by its inverse."""
    u = torch.rand(*size, dtype=torch.float64)
    return -u.log() if shape == 0 else (u**-shape - 1) / shape


# --- Against Pyro, and known shapes ---


@pytest.mark.parametrize("samples", [25, 26, 100, 225, 1000, 5000])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_k_hat_is_pyro_s(samples: int, spread: float) -> None:
    """The tail of Vehtari et al. (2024), section 2.2, fitted by Pyro one image at a time."""
    log_weights = spread * torch.randn(3, samples, dtype=torch.float64)
    expected = []
    for row in log_weights:
        weights = (row - row.max()).exp().sort().values
        length = math.ceil(min(0.2 * samples, 3 * math.sqrt(samples)))
        cutoff = weights[-length - 1]
        expected.append(fit_generalized_pareto(weights[-length:] - cutoff)[0])
    assert_close(k_hat(log_weights), torch.tensor(expected, dtype=torch.float64), **EXACT)


def test_the_scale_does_not_change_the_shape() -> None:
    numbers = torch.tensor([[0.1, 0.2, 0.4, 0.5, 0.9, 1.7, 3.0, 8.0, 21.0, 90.0]]).double()
    assert_close(generalized_pareto(2 * numbers).shape, generalized_pareto(numbers).shape, **EXACT)


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.3, 0.7, 1.2, 3.0])
def test_the_shape_of_generalized_pareto_numbers_is_found(shape: float) -> None:
    """Twenty estimates from 4,000 numbers each: the mean within 0.03, each within 0.2."""
    numbers = pareto_numbers(shape, 20, 4000).sort(-1).values
    found = generalized_pareto(numbers).shape
    assert found.mean().item() == pytest.approx(shape, abs=0.03)
    assert (found - shape).abs().max() < 0.2


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0])
def test_the_tail_of_pareto_weights_is_found(shape: float) -> None:
    """Weights w = u^-shape have a tail of that shape above any cutoff."""
    log_weights = -shape * torch.rand(200, 10_000, dtype=torch.float64).log()
    assert k_hat(log_weights).mean().item() == pytest.approx(shape, abs=0.03)


# --- Tails ---


@pytest.mark.parametrize(
    ("samples", "length"), [(1, 0), (20, 0), (21, 5), (25, 5), (100, 20), (225, 45), (1000, 95)]
)
def test_the_length_of_the_tail(samples: int, length: int) -> None:
    """min(K / 5, 3 sqrt(K)), rounded up; none below five weights."""
    assert tail_length(samples) == length


def test_a_constant_factor_changes_nothing() -> None:
    """Shifts by powers of two, which are exact in floating point."""
    log_weights = torch.randn(4, 200).double()
    for constant in (4096.0, -131072.0):
        assert_close(k_hat(log_weights + constant), k_hat(log_weights), **EXACT)


def test_the_order_of_the_weights_changes_nothing() -> None:
    log_weights = torch.randn(4, 200, dtype=torch.float64)
    assert torch.equal(k_hat(log_weights.flip(1)), k_hat(log_weights))


def test_equal_weights_have_no_tail() -> None:
    log_weights = torch.full((3, 200), -1e5, dtype=torch.float64)
    log_weights[1, :100] -= 3  # all but the tail, which alone counts
    assert k_hat(log_weights).tolist() == [-math.inf] * 3


@pytest.mark.parametrize("nats", [5.0, 90.0, 7000.0])
def test_weights_that_are_equal_up_to_rounding_have_no_tail(nats: float) -> None:
    """In single precision, such weights take few values, and their tail is full of ties."""
    log_weights = -nats * (1 + 1e-7 * torch.randn(20, 300))
    assert log_weights.dtype == torch.float32
    assert 1 < len(log_weights.unique()) < 20
    assert k_hat(log_weights.double()).tolist() == [-math.inf] * 20


def test_a_tail_of_ties_is_not_nan() -> None:
    """One of the fit's trial values is 0, which has no shape."""
    log_weights = torch.full((1, 1200), -5.0, dtype=torch.float64)
    log_weights[0, :104] = 0.0
    assert tail_length(1200) == 104
    assert k_hat(log_weights).item() < 0  # bounded


def test_an_enormous_spread_is_a_heavy_tail() -> None:
    """The shape is finite although the tail's smallest weights underflow next to the largest."""
    found = k_hat(300 * torch.randn(5, 1000, dtype=torch.float64))
    assert found.isfinite().all()
    assert (found > 7).all()


def test_normal_log_weights_get_worse_with_their_spread() -> None:
    """Log-normal weights have all moments, but 1,000 of them show it only for a small spread."""
    log_weights = torch.randn(50, 1000, dtype=torch.float64)
    medians = [k_hat(spread * log_weights).median().item() for spread in (0.3, 1, 2, 4)]
    assert medians == sorted(medians)
    assert medians[0] < 0.3
    assert medians[-1] > 0.7


# --- Log-weights in chunks ---


def streamed(log_weights: Tensor, samples: Sequence[int], chunk: int) -> LogWeights:
    weights = LogWeights(len(log_weights), samples)
    for part in log_weights.split(chunk, 1):
        weights.add(part)
    return weights


@pytest.mark.parametrize("chunk", [1, 7, 20, 64, 299, 300])
def test_chunks_of_any_size_give_the_same(chunk: int) -> None:
    """The same as one sum: bounds and effective samples to 1e-12, k-hat to the last digit."""
    log_weights = 3 * torch.randn(6, 300, dtype=torch.float64) - 1e3
    samples = [1, 5, 64, 65, 300]
    weights = streamed(log_weights, samples, chunk)
    assert list(weights.bounds) == samples
    for k, bound in weights.bounds.items():
        assert_close(bound, log_weights[:, :k].logsumexp(1) - math.log(k), rtol=0, atol=1e-12 * 1e3)
    w = (log_weights - log_weights.amax(1, keepdim=True)).exp()
    expected = w.sum(1) ** 2 / (w**2).sum(1)
    assert_close(weights.effective_samples(), expected, rtol=1e-10, atol=0)
    assert torch.equal(weights.pareto_k(), k_hat(log_weights))


@pytest.mark.parametrize("chunk", [1, 33, 100])
def test_effective_samples_at_both_ends(chunk: int) -> None:
    """K for equal weights, and 1 for a dominant one, although the weights underflow."""
    log_weights = torch.full((2, 100), -1e5, dtype=torch.float64)
    log_weights[1, 42] += 1e3
    weights = streamed(log_weights, [100], chunk)
    assert weights.effective_samples()[0].item() == pytest.approx(100, rel=1e-9)
    assert weights.effective_samples()[1].item() == pytest.approx(1, rel=1e-9)
    assert weights.bounds[100][0].item() == pytest.approx(-1e5, abs=1e-9)
    assert weights.bounds[100][1].item() == pytest.approx(-99e3 - math.log(100), abs=1e-9)


def test_too_few_samples_have_no_k_hat() -> None:
    assert streamed(torch.randn(2, 20).double(), [20], 6).pareto_k().isnan().all()
    assert streamed(torch.randn(2, 21).double(), [21], 6).pareto_k().isfinite().all()


# --- Smoothed weights, and the threshold ---


def smoothed(log_weights: Tensor) -> Tensor:
    """(N,) from all log-weights (N, K)."""
    samples = log_weights.shape[1]
    largest = log_weights.topk(tail_length(samples) + 1).values
    return smoothed_log_mean(log_weights.logsumexp(1), largest, samples)


def test_the_tail_is_replaced_by_quantiles() -> None:
    """Against the definition, one image at a time, with Pyro's fit."""
    log_weights = 1.5 * torch.randn(4, 400, dtype=torch.float64) - 80
    for row, found in zip(log_weights, smoothed(log_weights), strict=True):
        weights = (row - row.max()).exp().sort().values
        m = tail_length(400)
        cutoff = weights[-m - 1]
        shape, scale = fit_generalized_pareto(weights[-m:] - cutoff)
        p = (torch.arange(1, m + 1, dtype=torch.float64) - 0.5) / m
        weights[-m:] = (cutoff + scale / shape * ((1 - p) ** -shape - 1)).clamp(max=weights[-1])
        assert_close(found, weights.mean().log() + row.max(), rtol=0, atol=1e-6)


def test_a_constant_shifts_the_estimate() -> None:
    log_weights = 2 * torch.randn(3, 1000, dtype=torch.float64)
    assert_close(smoothed(log_weights - 5000), smoothed(log_weights) - 5000, rtol=0, atol=1e-9)


def test_smoothing_reduces_the_error_of_heavy_tails() -> None:
    """Pareto weights with shape 0.6, whose mean is known but whose variance is infinite."""
    weights = 1 + pareto_numbers(0.6, 4000, 500)
    truth = math.log(1 + 1 / (1 - 0.6))
    raw = weights.log().logsumexp(1) - math.log(500)
    found = smoothed(weights.log())
    assert ((found - truth).square().mean() < 0.7 * (raw - truth).square().mean()).item()
    assert found.mean().item() == pytest.approx(truth, abs=0.05)


def test_equal_weights_stay_as_they_are() -> None:
    log_weights = torch.full((2, 100), -3.0, dtype=torch.float64)
    assert_close(smoothed(log_weights), torch.full((2,), -3.0).double(), **EXACT)


def test_a_single_dominant_weight_stays_finite() -> None:
    """The others vanish next to it in double precision."""
    log_weights = torch.full((1, 100), -900.0, dtype=torch.float64)
    log_weights[0, 7] = -80.0
    found = smoothed(log_weights).item()
    assert math.isfinite(found)
    assert found <= -80.0 + 1e-9


def test_samples_in_chunks_give_the_same_estimate() -> None:
    log_weights = 2 * torch.randn(5, 300, dtype=torch.float64)
    weights = LogWeights(5, [300])
    for chunk in log_weights.split(70, 1):
        weights.add(chunk)
    assert_close(weights.pareto_smoothed(), smoothed(log_weights), **EXACT)
    few = LogWeights(5, [20])
    few.add(log_weights[:, :20])
    assert few.pareto_smoothed().isnan().all()


def test_the_threshold_depends_on_the_number_of_samples() -> None:
    """Vehtari et al. (2024), section 3.2.4."""
    assert reliable_below(100) == pytest.approx(0.5)
    assert reliable_below(1000) == pytest.approx(2 / 3)
    assert reliable_below(2100) < 0.7 == reliable_below(2200) == reliable_below(10**6)
