"""Pareto k-hat, a measure of how heavy the tail of importance weights is, and smoothed weights.

Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", JMLR 2024: a
generalized Pareto distribution is fitted to the largest weights. Its shape k-hat estimates how
many moments the weights have (1 / k-hat), and its quantiles can replace these weights. The fit
follows Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto
distribution", Technometrics 2009.

`pyro.ops.stats.fit_generalized_pareto` gives the same shape but takes one image at a time, which is
nine times slower for 10,000 images of 1,000 samples, and divides by zero if the largest weights are
equal.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Above this, the bias of a mean of the weights falls too slowly with the number of samples.
_LARGEST_RELIABLE = 0.7
# The fewest weights that a tail can be fitted to.
_SHORTEST_TAIL = 5
# A weak prior pulls the shape of short tails towards 0.5. It counts as much as this many weights.
_PRIOR_WEIGHTS, _PRIOR_SHAPE = 10, 0.5
# Log-weights whose difference is below this, in nats, may differ by rounding alone.
_ROUNDING = 0.01


def reliable_below(samples: int) -> float:
    """The k-hat above which the mean of so many weights is unreliable: min(1 - 1/log10(K), 0.7).

    Vehtari et al. (2024), section 3.2.4: 0.5 for 100 samples, 0.67 for 1,000, and 0.7 from 2,155
    on. `samples` must be large enough for a tail.
    """
    return min(1 - 1 / math.log10(samples), _LARGEST_RELIABLE)


def tail_length(samples: int) -> int:
    """The number of weights in the tail of `samples` weights; 0 if there are too few for a tail."""
    length = math.ceil(min(samples / 5, 3 * math.sqrt(samples)))
    return length if length >= _SHORTEST_TAIL else 0


def pareto_k(largest: Tensor) -> Tensor:
    """k-hat (N,) from the M + 1 largest log-weights of each image, (N, M + 1), in any order.

    M is the `tail_length` of the number of samples; the tail starts at the smallest of the M + 1.
    Weights that are equal, up to rounding, have no tail: -inf.
    """
    ascending, weights = _scaled(largest)
    shape = generalized_pareto(weights[:, 1:] - weights[:, :1]).shape
    return shape.where(~_equal(ascending), -torch.inf)


def smoothed_log_mean(log_sum: Tensor, largest: Tensor, samples: int) -> Tensor:
    """The Pareto-smoothed log mean (N,) of weights, from their log sum (N,) and `largest`.

    The M weights of the tail are replaced by the fitted distribution's quantiles at (i - 1/2) / M,
    at most the largest weight (section 2.2). This estimate of log p(x) has less variance than the
    log mean of the weights, and often less bias, but is no bound. `largest` is as for `pareto_k`;
    weights that are equal up to rounding stay as they are.
    """
    ascending, weights = _scaled(largest)
    top = ascending[:, -1]
    tail = weights[:, 1:]  # (N, M)
    m = tail.shape[1]
    shape, scale = (value[:, None] for value in generalized_pareto(tail - weights[:, :1]))
    above = 1 - (torch.arange(m, dtype=tail.dtype) + 0.5) / m
    # (above^-k - 1) / k, also for k near 0.
    quantiles = weights[:, :1] + scale * torch.expm1(-shape * above.log()) / shape
    smoothed = quantiles.clamp(max=1).where(~_equal(ascending)[:, None], tail)
    # Rounding can make the difference negative if the tail holds almost the whole sum.
    others = ((log_sum - top).exp() - tail.sum(1)).clamp(min=0)
    return top + (others + smoothed.sum(1)).log() - math.log(samples)


def _scaled(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending log-weights, and the weights scaled so that the largest is 1: ratios matter."""
    ascending = largest.double().sort(-1).values
    return ascending, (ascending - ascending[:, -1:]).exp()


def _equal(ascending: Tensor) -> Tensor:
    """Whether log-weights are equal up to rounding, as those of an exact posterior are: (N,).

    Ties from rounding would look like a heavy tail.
    """
    return ascending[:, -1] - ascending[:, 0] < _ROUNDING


class GeneralizedPareto(NamedTuple):
    """The parameters (N,) of generalized Pareto distributions."""

    shape: Tensor  # positive for a heavy tail
    scale: Tensor


def generalized_pareto(excess: Tensor) -> GeneralizedPareto:
    """Generalized Pareto distributions (N,), fitted to M ascending numbers each.

    As in Zhang and Stephens (2009), with the weak prior of Vehtari et al. (2024), appendix C.
    `excess` is (N, M), float64 and not negative.
    """
    m = excess.shape[-1]
    x = excess.clamp(min=torch.finfo(excess.dtype).tiny)
    quartile = x[:, int(m / 4 + 0.5) - 1, None]
    # Trial values of b = -shape / scale, weighted by their profile likelihood: (N, T).
    trials = 30 + int(math.sqrt(m))
    steps = torch.arange(1, trials + 1, dtype=x.dtype) - 0.5
    b = 1 / x[:, -1:] + (1 - (trials / steps).sqrt()) / (3 * quartile)
    shapes = torch.log1p(-b[:, :, None] * x[:, None, :]).mean(-1)
    # If the numbers are almost equal, a trial value can be 0, for which the shape is not defined.
    likelihood = (m * ((-b / shapes).log() - shapes - 1)).nan_to_num(-torch.inf)
    best = (likelihood.softmax(-1) * b).sum(-1, keepdim=True)  # (N, 1)
    shape = torch.log1p(-best * x).mean(-1)
    scale = -shape / best.squeeze(-1)
    shape = (m * shape + _PRIOR_WEIGHTS * _PRIOR_SHAPE) / (m + _PRIOR_WEIGHTS)
    return GeneralizedPareto(shape, scale)
