"""Out-of-distribution scores of images, and how well they separate two sets of images.

L is a bound on log p(x), and L^{>k} the looser bound for which the lowest k layers are drawn from
their priors (see `LadderGuide`). If an image is like the training data, the upper layers explain it
almost as well as all layers do, and L^{>k} is close to L. An image that shares only its details
with the training data needs the lower layers. Hence the log-likelihood ratio

    LLR^{>k} = L - L^{>k}

of Havtorn, Frellsen, Hauberg and Maaløe (2021), "Hierarchical VAEs know what they don't know". It
detects outliers even if their likelihood is as high as that of the training data, or higher.
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

    `elbo` and, for each number K of samples, `bound_K` are bounds L on log p(x). `above` maps k to
    the bounds L^{>k} at the same K: `bound_K_above_k` are these, and `llr_above_k` is LLR^{>k} at
    the largest K.
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
    """Scores of images, by the names of `bound_columns`: higher means less like the training data.

    The scores are the log-likelihood ratios, and the negated bounds.
    """
    return {name: values if is_ratio(name) else -values for name, values in columns.items()}


def is_ratio(name: str) -> bool:
    """Whether the column `name` holds log-likelihood ratios, not bounds."""
    return name.startswith(_RATIO)


@dataclass(frozen=True)
class Roc:
    """The receiver operating characteristic of a score: how well it detects outliers."""

    false_positive_rate: np.ndarray  # (T,), ascending from 0 to 1 as the threshold falls
    true_positive_rate: np.ndarray  # (T,), the share of outliers detected
    auroc: float  # area under the curve: the probability that an outlier scores above an inlier
    standard_error: float | None  # of the area; None if a set has a single image


def roc(inliers: np.ndarray, outliers: np.ndarray) -> Roc:
    """The ROC of the scores of two sets of images, (N,) and (M,), by scikit-learn.

    A tie between an inlier and an outlier counts half. The standard error follows DeLong, DeLong
    and Clarke-Pearson (1988), "Comparing the areas under two or more correlated receiver operating
    characteristic curves"; it is zero if the scores separate the sets completely.

    Raises:
        UserError: a score is not a finite number.
    """
    from sklearn.metrics import auc, roc_curve  # takes seconds to import

    scores = np.concatenate([inliers, outliers])
    if infinite := np.count_nonzero(~np.isfinite(scores)):
        raise UserError(
            f"{infinite} of {len(scores)} scores are not finite and cannot be ranked: the "
            "training may have diverged, so use an earlier checkpoint"
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
    """The standard error of the area, from the variance of each set's ranks in the other set."""
    if min(len(inliers), len(outliers)) < 2:
        return None
    of_outliers = _share_below(inliers, outliers)
    of_inliers = _share_below(outliers, inliers)
    variance = of_outliers.var(ddof=1) / len(outliers) + of_inliers.var(ddof=1) / len(inliers)
    return float(np.sqrt(variance))


def _share_below(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """For each score, the share of reference scores below it; ties count half."""
    ranked = np.sort(reference)
    below, up_to = (np.searchsorted(ranked, scores, side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(reference))


def write_scores(
    path: Path, images: Sequence[str] | Sequence[int], columns: Mapping[str, np.ndarray]
) -> None:
    """Write a CSV file with a row for each image: its name or number, and `columns`, unrounded.

    Raises `UserError` if the file cannot be written.
    """
    rows = zip(images, *(values.tolist() for values in columns.values()), strict=True)

    def write(file: BinaryIO) -> None:
        # File names that are not valid UTF-8 keep their bytes.
        text = io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="")
        writer = csv.writer(text)
        writer.writerow(["image", *columns])
        writer.writerows(rows)
        text.detach()  # flushes, and leaves the file open

    write_atomically(path, write)
