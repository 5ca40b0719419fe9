"""Pareto k-hat: how heavy the upper tail of importance weights is.

Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", JMLR 2024: a
generalized Pareto distribution is fitted to the largest weights; its shape k-hat tells how many
moments the weights seem to have (1 / k-hat). Above 0.7 a mean of such weights is not to be trusted.
The fit is that of Zhang and Stephens, "A new and efficient estimation method for the generalized
Pareto distribution", Technometrics 2009.
"""

import math

import torch
from torch import Tensor

# Above it, means of the weights are unreliable at any practical number of samples.
UNRELIABLE = 0.7
# The fewest weights that say anything of a tail.
_SHORTEST_TAIL = 5
# A weak prior pulls the shape of short tails to 0.5, as this many further weights would.
_PRIOR_WEIGHTS, _PRIOR_SHAPE = 10, 0.5
# Log-weights that are nearer to each other than this, in nats, may differ by rounding alone.
_ROUNDING = 0.01


def tail_length(samples: int) -> int:
    """How many of `samples` weights make up the tail; 0 where they are too few for one."""
    length = math.ceil(min(samples / 5, 3 * math.sqrt(samples)))
    return length if length >= _SHORTEST_TAIL else 0


def pareto_k(largest: Tensor) -> Tensor:
    """k-hat (N,) from the M + 1 largest log-weights of each image, (N, M + 1), in any order.

    M is `tail_length` of the number of samples; the smallest of the M + 1 is where the tail starts.
    Weights that are all the same, or all but for rounding, have no tail: -inf.
    """
    ascending = largest.double().sort(-1).values
    # Only ratios of weights matter; the largest becomes 1.
    weights = (ascending - ascending[:, -1:]).exp()
    excess = weights[:, 1:] - weights[:, :1]  # (N, M), ascending
    shape = generalized_pareto_shape(excess)
    # As a posterior that is exact leaves them. Ties among them would be taken for a heavy tail.
    same = ascending[:, -1] - ascending[:, 0] < _ROUNDING
    return shape.where(~same, -torch.inf)


def generalized_pareto_shape(excess: Tensor) -> Tensor:
    """The shape (N,) of the generalized Pareto distributions that M ascending numbers came from.

    Zhang and Stephens (2009), with the weak prior of Vehtari et al. (2024), appendix C. `excess` is
    (N, M), float64, not negative; positive shapes are heavy tails.
    """
    m = excess.shape[-1]
    x = excess.clamp(min=torch.finfo(excess.dtype).tiny)
    quartile = x[:, int(m / 4 + 0.5) - 1, None]
    # Trial values of b = -shape / scale, weighed by their profile likelihood: (N, T).
    trials = 30 + int(math.sqrt(m))
    steps = torch.arange(1, trials + 1, dtype=x.dtype) - 0.5
    b = 1 / x[:, -1:] + (1 - (trials / steps).sqrt()) / (3 * quartile)
    shapes = torch.log1p(-b[:, :, None] * x[:, None, :]).mean(-1)
    # Numbers that are almost all the same can have a trial at 0, which has no shape: left out.
    likelihood = (m * ((-b / shapes).log() - shapes - 1)).nan_to_num(-torch.inf)
    best = (likelihood.softmax(-1) * b).sum(-1, keepdim=True)  # (N, 1)
    shape = torch.log1p(-best * x).mean(-1)
    return (m * shape + _PRIOR_WEIGHTS * _PRIOR_SHAPE) / (m + _PRIOR_WEIGHTS)
