"""Metrics of known bounds: exact means and errors, metrics.json and per_image.npz."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ladder_vae.evaluation.importance import Bounds
from ladder_vae.evaluation.metrics import (
    Metrics,
    bits_per_dim,
    curve_samples,
    metrics,
    standard_error,
    warning,
    write_per_image,
)
from runtime.files import to_json, write_json
from tests.made_data import refusal

SHAPE = (1, 2, 2)


def doubles(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def made_bounds(**changes: Any) -> Bounds:
    """Bounds of three images and two layers, at K = 1, 2, 4,000."""
    content: dict[str, Any] = {
        "elbo": doubles(-4, -6, -8),
        "importance_weighted": {
            1: doubles(-4, -5, -9),
            2: doubles(-3.5, -5, -8),
            4000: doubles(-3, -5, -7),
        },
        "log_likelihood": doubles(-1, -2, -3),
        "kl": torch.tensor([[2.0, 1.0], [3.0, 1.0], [4.0, 1.0]], dtype=torch.float64),
        "effective_samples": doubles(1, 3.5, 3),
        "pareto_k": doubles(0.1, 0.75, 0.3),
        "pareto_smoothed": doubles(-2.5, -4.5, -6.5),
    }
    return Bounds(**(content | changes))


def test_metrics_are_exact() -> None:
    found = metrics(made_bounds(), [1, 4000], SHAPE, "discr_log")
    assert found["elbo"] == 6
    assert found["iw"] == {"1": 6, "4000": 5}
    assert found["reconstruction"] == 2
    assert found["kl_per_layer"] == [3, 1]
    assert found["n_images"] == 3
    assert found["standard_error"] == pytest.approx(
        {"elbo": 2 / 3**0.5, "1": 7**0.5 / 3**0.5, "4000": 2 / 3**0.5}, rel=1e-14
    )
    bits = 4 * math.log(2)
    expected = {"elbo": 6 / bits, "1": 6 / bits, "4000": 5 / bits}
    assert found["bits_per_dim"] == pytest.approx(expected, rel=1e-14)
    assert found["effective_samples"] == {"mean": 2.5, "median": 3, "min": 1}
    assert found["pareto_k"] == {"median": 0.3, "threshold": 0.7, "share_above": 1 / 3}
    assert found["pareto_smoothed"] == {
        "nats": pytest.approx(4.5),
        "standard_error": pytest.approx(2 / 3**0.5),
    }
    assert found["curve"]["samples"] == [1, 2, 4000]
    assert found["curve"]["nats"] == [6, 5.5, 5]
    curve = found["curve"]["standard_error"]
    assert curve[0] == found["standard_error"]["1"]
    assert curve[2] == found["standard_error"]["4000"]


@pytest.mark.parametrize(
    ("likelihood", "kind"),
    [
        ("bernoulli", "probability of 2 levels"),
        ("discr_log", "probability of 256 levels"),
        ("discr_log_mix", "probability of 256 levels"),
        ("gaussian", "density"),
    ],
)
def test_metrics_name_the_likelihood(likelihood: str, kind: str) -> None:
    """Only a probability has bits per dimension."""
    found = metrics(made_bounds(), [1, 4000], SHAPE, likelihood)
    assert (found["likelihood"], found["likelihood_kind"]) == (likelihood, kind)
    assert bool(found["bits_per_dim"]) == (kind != "density")
    assert found["elbo"] == 6
    read = Metrics.from_dict(found | {"dataset": "digits", "split": "test", "step": 7})
    assert read.is_density == (kind == "density")


def test_metrics_have_these_names() -> None:
    assert list(metrics(made_bounds(), [1, 4000], SHAPE, "discr_log")) == [
        "likelihood",
        "likelihood_kind",
        "elbo",
        "iw",
        "standard_error",
        "bits_per_dim",
        "reconstruction",
        "kl_per_layer",
        "n_images",
        "effective_samples",
        "pareto_k",
        "pareto_smoothed",
        "warning",
        "curve",
    ]


def test_bits_per_dim_counts_pixels_times_channels() -> None:
    assert bits_per_dim(3072 * math.log(2), (3, 32, 32)) == pytest.approx(1, rel=1e-15)


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([1], [1]),
        ([1, 100], [1, 2, 4, 8, 16, 32, 64, 100]),
        ([64], [1, 2, 4, 8, 16, 32, 64]),
        ([3, 5, 6], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_curve_includes_all_powers_of_two(samples: list[int], expected: list[int]) -> None:
    assert curve_samples(samples) == expected


def test_one_image_has_no_standard_error() -> None:
    assert standard_error(doubles(3)) is None
    assert standard_error(doubles(3, 5)) == pytest.approx(1, rel=1e-15)


# --- The warning ---


@pytest.mark.parametrize(("above", "of"), [(0, 3), (1, 20), (5, 100)])
def test_a_few_unreliable_images_cause_no_warning(above: int, of: int) -> None:
    k_hat = torch.full((of,), 0.7, dtype=torch.float64)
    k_hat[:above] = 0.8
    assert warning(made_bounds(pareto_k=k_hat), 4000) is None


@pytest.mark.parametrize(("above", "of", "share"), [(2, 20, "10%"), (6, 100, "6%"), (3, 3, "100%")])
def test_more_unreliable_images_cause_a_warning(above: int, of: int, share: str) -> None:
    k_hat = torch.full((of,), -math.inf, dtype=torch.float64)
    k_hat[:above] = 0.71
    bounds = made_bounds(importance_weighted={1000: doubles(-3, -5, -7)}, pareto_k=k_hat)
    found = warning(bounds, 1000)
    assert found is not None
    for part in (
        "1,000 samples",
        "does not approximate",
        f"for {share} of the images",
        "k-hat above 0.67",
    ):
        assert part in found
    assert "\n" not in found
    assert metrics(made_bounds(pareto_k=k_hat), [4000], SHAPE, "bernoulli")["warning"] is not None


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_bound_that_is_not_finite_causes_a_warning(value: float) -> None:
    """Such an image has no k-hat."""
    bounds = made_bounds(
        importance_weighted={4000: doubles(-3, value, -5)}, pareto_k=doubles(0.1, math.nan, 0.1)
    )
    assert warning(bounds, 4000) == (
        "the bound with 4,000 samples is not finite for 1 of 3 images: the training may have "
        "diverged, so use an earlier checkpoint"
    )


def test_too_few_samples_cause_no_warning() -> None:
    unknown = torch.full((3,), torch.nan)
    bounds = made_bounds(pareto_k=unknown, pareto_smoothed=unknown)
    assert warning(bounds, 4000) is None
    found = metrics(bounds, [1, 4000], SHAPE, "discr_log")
    assert found["pareto_k"] is None
    assert found["pareto_smoothed"] is None


# --- Files ---


def test_metrics_that_are_not_finite_become_null(tmp_path: Path) -> None:
    bounds = made_bounds(
        elbo=doubles(-math.inf, -1, -2),
        pareto_k=torch.full((3,), -math.inf, dtype=torch.float64),
    )
    found = metrics(bounds, [1, 4000], SHAPE, "discr_log")
    write_json(tmp_path / "metrics.json", found)
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    read = json.loads(text)
    assert read["elbo"] is None
    assert read["standard_error"]["elbo"] is None
    assert read["pareto_k"] == {"median": None, "threshold": 0.7, "share_above": 0}
    assert read["iw"] == {"1": 6, "4000": 5}
    assert json.loads(to_json([math.nan, math.inf, -math.inf, 1.5])) == [None, None, None, 1.5]


def test_per_image_metrics_are_read_back(tmp_path: Path) -> None:
    """To the last digit, in the order of the index, and without pickle."""
    bounds = made_bounds(pareto_k=doubles(0.1, math.nan, -math.inf))
    index = torch.tensor([7, 0, 3])
    write_per_image(tmp_path / "per_image.npz", bounds, index)
    with np.load(tmp_path / "per_image.npz", allow_pickle=False) as file:
        found = dict(file)
    expected = {
        "image": [7, 0, 3],
        "samples": [1, 2, 4000],
        "elbo": [-4, -6, -8],
        "bound": [[-4, -3.5, -3], [-5, -5, -5], [-9, -8, -7]],
        "log_likelihood": [-1, -2, -3],
        "kl": [[2, 1], [3, 1], [4, 1]],
        "effective_samples": [1, 3.5, 3],
        "pareto_k": [0.1, math.nan, -math.inf],
        "pareto_smoothed": [-2.5, -4.5, -6.5],
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert np.array_equal(found[name], np.array(values), equal_nan=True), name
        whole = name in ("image", "samples")
        assert found[name].dtype == (np.int64 if whole else np.float64)


def test_metrics_are_read_from_their_file(tmp_path: Path) -> None:
    """With None for what is not finite or missing."""
    found = metrics(made_bounds(elbo=doubles(-math.inf, -1, -2)), [1, 4000], SHAPE, "discr_log")
    more = {"dataset": "digits", "split": "test", "step": 7, "limit": None}
    write_json(tmp_path / "metrics.json", found | more)
    read = Metrics.read(tmp_path / "metrics.json")
    assert read.bound("elbo") is None
    assert read.bound("4000") == 5
    assert read.bound("3") is None
    assert read.kl == 4
    assert (read.n_images, read.step, read.limit, read.seed) == (3, 7, None, None)
    assert read.pareto_k == found["pareto_k"]
    write_json(tmp_path / "metrics.json", found)
    refused = refusal(lambda: Metrics.read(tmp_path / "metrics.json"))
    assert "metrics.json is damaged or does not hold the metrics of an evaluation" in refused
