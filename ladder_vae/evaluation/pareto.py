"""Pareto k-hat: a measure of how heavy the upper tail of importance weights is.

Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", JMLR 2024: a
generalized Pareto distribution is fitted to the largest weights. Its shape k-hat estimates how
many moments the weights have (1 / k-hat). Above 0.7, a mean of the weights is unreliable. The fit
follows Zhang and Stephens, "A new and efficient estimation method for the generalized Pareto
distribution", Technometrics 2009.

`pyro.ops.stats.fit_generalized_pareto` gives the same shape but takes one image at a time, which is
nine times slower for 10,000 images of 1,000 samples, and divides by zero if the largest weights are
equal.
"""

import math

import torch
from torch import Tensor

# Above this, means of the weights are unreliable at any practical number of samples.
UNRELIABLE = 0.7
# The fewest weights that a tail can be fitted to.
_SHORTEST_TAIL = 5
# A weak prior pulls the shape of short tails towards 0.5. It counts as much as this many weights.
_PRIOR_WEIGHTS, _PRIOR_SHAPE = 10, 0.5
# Log-weights whose difference is below this, in nats, may differ by rounding alone.
_ROUNDING = 0.01


def tail_length(samples: int) -> int:
    """The number of weights in the tail of `samples` weights; 0 if there are too few for a tail."""
    length = math.ceil(min(samples / 5, 3 * math.sqrt(samples)))
    return length if length >= _SHORTEST_TAIL else 0


def pareto_k(largest: Tensor) -> Tensor:
    """k-hat (N,) from the M + 1 largest log-weights of each image, (N, M + 1), in any order.

    M is the `tail_length` of the number of samples; the tail starts at the smallest of the M + 1.
    Weights that are equal, up to rounding, have no tail: -inf.
    """
    ascending = largest.double().sort(-1).values
    # Only ratios of weights matter, so the largest is scaled to 1.
    weights = (ascending - ascending[:, -1:]).exp()
    excess = weights[:, 1:] - weights[:, :1]  # (N, M), ascending
    shape = generalized_pareto_shape(excess)
    # Weights of an exact posterior are equal. Ties from rounding would look like a heavy tail.
    same = ascending[:, -1] - ascending[:, 0] < _ROUNDING
    return shape.where(~same, -torch.inf)


def generalized_pareto_shape(excess: Tensor) -> Tensor:
    """The shape (N,) of generalized Pareto distributions, fitted to M ascending numbers each.

    As in Zhang and Stephens (2009), with the weak prior of Vehtari et al. (2024), appendix C.
    `excess` is (N, M), float64 and not negative. Positive shapes are heavy tails.
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
    return (m * shape + _PRIOR_WEIGHTS * _PRIOR_SHAPE) / (m + _PRIOR_WEIGHTS)
