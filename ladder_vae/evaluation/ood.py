"""Telling images unlike the training data by their bounds, and how well the bounds tell them.

L is a bound on log p(x) and L^{>k} the looser one whose lowest k layers are drawn from their
priors (see `LadderGuide`). An image that the model knows is explained by its upper layers nearly as
well; one that only looks alike in detail needs the lower ones. Hence the log-likelihood ratio

    LLR^{>k} = L - L^{>k}

of Havtorn, Frellsen, Hauberg and Maaløe (2021), "Hierarchical VAEs know what they don't know". It
finds outliers whose likelihood is as high as that of the training data, or higher.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ladder_vae.evaluation.importance import Bounds
from runtime.errors import UserError
from runtime.files import write_atomically

_RATIO = "llr_above_"


def bound_columns(bounds: Bounds, above: Mapping[int, Bounds]) -> dict[str, np.ndarray]:
    """Bounds and ratios of N images by name: float64 (N,), in nats.

    `elbo` and, by number K of samples, `bound_K` are bounds L on log p(x). For each k and its
    bounds in `above`, which must be of the same K, `bound_K_above_k` is L^{>k} and `llr_above_k`
    is LLR^{>k}, of the bounds at the largest K.
    """
    columns = {"elbo": bounds.elbo.numpy()}
    columns |= {f"bound_{n}": bound.numpy() for n, bound in bounds.importance_weighted.items()}
    largest = max(bounds.importance_weighted)
    for k, looser in above.items():
        for n, bound in looser.importance_weighted.items():
            columns[f"bound_{n}_above_{k}"] = bound.numpy()
        difference = bounds.importance_weighted[largest] - looser.importance_weighted[largest]
        columns[f"{_RATIO}{k}"] = difference.numpy()
    return columns


def outlier_scores(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores by the names of `bound_columns`; the higher, the more unlike the training data.

    The ratios as they are, and the bounds with their sign changed.
    """
    return {name: values if is_ratio(name) else -values for name, values in columns.items()}


def is_ratio(name: str) -> bool:
    """Whether the column `name` holds log-likelihood ratios, and no bounds."""
    return name.startswith(_RATIO)


@dataclass(frozen=True)
class Roc:
    """How well a score tells outliers: the receiver operating characteristic."""

    false_positive_rate: np.ndarray  # (T,), rising from 0 to 1 as the threshold falls
    true_positive_rate: np.ndarray  # (T,), the share of outliers found at that price
    auroc: float  # the area under the curve: how often an outlier scores above an inlier
    standard_error: float | None  # of the area; None where a set has a single image


def roc(inliers: np.ndarray, outliers: np.ndarray) -> Roc:
    """The curve for the scores of two sets of images, (N,) and (M,), by scikit-learn.

    A tie of an inlier and an outlier counts half. The standard error is that of DeLong, DeLong and
    Clarke-Pearson (1988), "Comparing the areas under two or more correlated receiver operating
    characteristic curves"; it is zero where the scores part the sets completely.

    Raises:
        UserError: a score is not a finite number.
    """
    from sklearn.metrics import auc, roc_curve  # takes seconds to import

    scores = np.concatenate([inliers, outliers])
    if infinite := np.count_nonzero(~np.isfinite(scores)):
        raise UserError(
            f"{infinite} of {len(scores)} scores are not finite, which cannot be ranked: the "
            "model's weights may have diverged, use an earlier checkpoint"
        )
    labels = np.repeat([0, 1], [len(inliers), len(outliers)])
    false_positive_rate, true_positive_rate, _ = roc_curve(labels, scores)
    return Roc(
        false_positive_rate,
        true_positive_rate,
        float(auc(false_positive_rate, true_positive_rate)),
        _standard_error(inliers, outliers),
    )


def _standard_error(inliers: np.ndarray, outliers: np.ndarray) -> float | None:
    """Of the area: from the variance of each score's rank among those of the other set."""
    if min(len(inliers), len(outliers)) < 2:
        return None
    of_outliers = _share_below(inliers, outliers)
    of_inliers = _share_below(outliers, inliers)
    variance = of_outliers.var(ddof=1) / len(outliers) + of_inliers.var(ddof=1) / len(inliers)
    return float(np.sqrt(variance))


def _share_below(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """For each score, the share of the reference scores below it, ties counted half."""
    ranked = np.sort(reference)
    below, up_to = (np.searchsorted(ranked, scores, side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(reference))


def write_scores(
    path: Path, images: Sequence[str] | Sequence[int], columns: Mapping[str, np.ndarray]
) -> None:
    """Write a CSV file with one row for each image: `image`, its name or number, and `columns`.

    The figures are written with all their digits. Raises `UserError` where that cannot be done.
    """
    rows = zip(images, *(values.tolist() for values in columns.values()), strict=True)

    def write(file: BinaryIO) -> None:
        # File names that are no text keep their bytes.
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text)
        writer.writerow(["image", *columns])
        writer.writerows(rows)
        text.detach()  # flushed, and the file left open for its owner

    write_atomically(path, write)
