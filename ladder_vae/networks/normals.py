"""Priors and posteriors: Normals over feature maps, from the outputs of a convolution.

The first half of the channels gives the mean m, the second half the log-variance v. Outputs of zero
give the standard Normal under each of `SCALES`.
"""

import math
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn import functional as F

NormalFrom = Callable[[Tensor], dist.TorchDistribution]

_BOUND = 5.0


def exponential(parameters: Tensor) -> dist.TorchDistribution:
    """Normal(m, exp(v / 2)) over (*batch, Z, h, w), from parameters (*batch, 2 Z, h, w)."""
    mean, log_variance = parameters.chunk(2, dim=-3)
    return _normal(mean, (log_variance / 2).exp())


def softplus(parameters: Tensor) -> dist.TorchDistribution:
    """Normal(m, log2(1 + 2^(v / 2))): the scale grows linearly, so it cannot explode."""
    mean, log_variance = parameters.chunk(2, dim=-3)
    return _normal(mean, F.softplus(log_variance / 2, beta=math.log(2)))


def bounded(parameters: Tensor) -> dist.TorchDistribution:
    """Mean and log-scale softly clamped to +-5, by 5 tanh(m / 5) and 5 tanh(v / 10).

    Vahdat and Kautz (2020), "NVAE: A deep hierarchical variational autoencoder", whose official
    code clamps both.
    """
    mean, log_variance = parameters.chunk(2, dim=-3)
    mean, log_scale = (_BOUND * torch.tanh(u / _BOUND) for u in (mean, log_variance / 2))
    return _normal(mean, log_scale.exp())


def _normal(mean: Tensor, scale: Tensor) -> dist.TorchDistribution:
    return dist.Normal(mean, scale).to_event(3)


SCALES: dict[str, NormalFrom] = {
    "exp": exponential,
    "softplus": softplus,
    "bounded": bounded,
}
