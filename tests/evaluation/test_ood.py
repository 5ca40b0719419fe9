"""Outlier scores, their ROC curves, and the file of scores."""

import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from ladder_vae.evaluation.importance import Bounds
from ladder_vae.evaluation.ood import bound_columns, outlier_scores, roc, write_scores
from tests.made_data import refusal


def made_bounds(seed: int) -> Bounds:
    """Of four images, for 1 and 10 samples."""
    generator = torch.Generator().manual_seed(seed)
    elbo, one, ten, log_likelihood = torch.randn(4, 4, dtype=torch.float64, generator=generator)
    none = torch.full((4,), torch.nan)
    return Bounds(elbo, {1: one, 10: ten}, log_likelihood, torch.zeros(4, 3), none, none, none)


def share_of_pairs(inliers: np.ndarray, outliers: np.ndarray) -> float:
    """The share of pairs in which the outlier scores higher; ties count half."""
    pairs = list(itertools.product(inliers.tolist(), outliers.tolist()))
    return sum((b > a) + (b == a) / 2 for a, b in pairs) / len(pairs)


# --- Scores ---


def test_columns_and_scores() -> None:
    """The ratio is of the bounds at the largest K; scores rise as bounds fall."""
    bounds, above = made_bounds(0), {1: made_bounds(1), 2: made_bounds(2)}
    columns = bound_columns(bounds, above)
    expected = {
        "elbo": bounds.elbo,
        "bound_1": bounds.importance_weighted[1],
        "bound_10": bounds.importance_weighted[10],
    }
    for k, looser in above.items():
        expected[f"bound_1_above_{k}"] = looser.importance_weighted[1]
        expected[f"bound_10_above_{k}"] = looser.importance_weighted[10]
        expected[f"llr_above_{k}"] = expected["bound_10"] - looser.importance_weighted[10]
    assert list(columns) == list(expected)
    for name, values in expected.items():
        np.testing.assert_array_equal(columns[name], values.numpy())
        sign = 1 if name.startswith("llr") else -1
        np.testing.assert_array_equal(outlier_scores(columns)[name], sign * values.numpy())


# --- ROC ---


@pytest.mark.parametrize("levels", [3, 8, 1000])
def test_auroc_counts_pairs(levels: int) -> None:
    """With many ties, some and hardly any."""
    generator = np.random.default_rng(levels)
    inliers = generator.integers(0, levels, 23) / 7
    outliers = generator.integers(0, levels, 31) / 7 + 0.2
    curve = roc(inliers, outliers)
    assert curve.auroc == pytest.approx(share_of_pairs(inliers, outliers), rel=1e-12)
    # Sets the other way round, and scores with their sign changed, leave 1 - AUROC.
    assert roc(outliers, inliers).auroc == pytest.approx(1 - curve.auroc, rel=1e-12)
    assert roc(-inliers, -outliers).auroc == pytest.approx(1 - curve.auroc, rel=1e-12)


def test_curve_by_hand() -> None:
    """Thresholds 4, 3, 2, 1 from above: one outlier, an inlier, a tie, an inlier."""
    curve = roc(np.array([3.0, 2.0, 1.0]), np.array([4.0, 2.0]))
    assert curve.false_positive_rate == pytest.approx([0, 0, 1 / 3, 2 / 3, 1], rel=1e-12)
    assert curve.true_positive_rate.tolist() == [0, 0.5, 0.5, 1, 1]
    assert curve.auroc == pytest.approx(4.5 / 6, rel=1e-12)


def test_standard_error_by_hand() -> None:
    """DeLong's: the outliers' placements are 1 and 1/2, the inliers' 1/2, 3/4 and 1."""
    curve = roc(np.array([3.0, 2.0, 1.0]), np.array([4.0, 2.0]))
    # Variances 1/8 and 1/16, divided by 2 outliers and 3 inliers.
    assert curve.standard_error == pytest.approx((1 / 16 + 1 / 48) ** 0.5, rel=1e-12)


def test_standard_error_is_that_of_repeated_draws() -> None:
    """It equals the standard deviation of the areas of many pairs of samples, within a tenth."""
    generator = np.random.default_rng(0)
    curves = [roc(generator.normal(0, 1, 60), generator.normal(0.8, 1.5, 40)) for _ in range(400)]
    errors = [curve.standard_error for curve in curves]
    assert None not in errors
    mean_square = np.mean(np.square(np.array(errors, float)))
    scatter = np.std([curve.auroc for curve in curves], ddof=1)
    # The scatter of 400 is itself known to 4 %.
    assert scatter == pytest.approx(np.sqrt(mean_square), rel=0.1)


def test_sets_apart() -> None:
    curve = roc(np.arange(5.0), np.arange(5.0, 9.0))
    assert (curve.auroc, curve.standard_error) == (1.0, 0.0)


def test_one_image_has_no_standard_error() -> None:
    curve = roc(np.array([1.0, 3.0]), np.array([2.0]))
    assert (curve.auroc, curve.standard_error) == (0.5, None)


def test_scores_that_are_no_numbers_are_refused() -> None:
    line = refusal(lambda: roc(np.array([1.0, np.nan]), np.array([2.0, np.inf, 3.0])))
    assert line.startswith("2 of 5 scores are not finite")


# --- The file ---


def test_scores_read_back(tmp_path: Path) -> None:
    """To the last digit, whatever the names hold; numbers serve as names too."""
    columns = {"elbo": np.array([-81.2, 0.1 + 0.2, -1e-300]), "llr_above_1": np.arange(3.0)}
    names = ["a.png", 'b, "2".png', "ü\udcff.png"]
    path = tmp_path / "eval" / "scores.csv"
    write_scores(path, names, columns)
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *rows = csv.reader(file)
    assert header == ["image", "elbo", "llr_above_1"]
    assert [row[0] for row in rows] == names
    for i, name in enumerate(columns, start=1):
        assert [float(row[i]) for row in rows] == columns[name].tolist()
    write_scores(path, range(3), columns)
    assert path.read_text().splitlines()[1] == "0,-81.2,0.0"
    assert [p.name for p in path.parent.iterdir()] == ["scores.csv"]


def test_a_file_of_scores_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "scores.csv"
    path.write_text("as it was")
    with pytest.raises(ValueError, match="zip"):
        write_scores(path, ["a", "b"], {"elbo": np.zeros(3)})
    assert path.read_text() == "as it was"
    assert list(tmp_path.iterdir()) == [path]


def test_scores_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refusal(lambda: write_scores(tmp_path / "file" / "scores.csv", [], {}))
    assert "cannot write" in line
