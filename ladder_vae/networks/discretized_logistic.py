"""A logistic distribution discretized to the 256 levels of 8-bit images.

Kingma et al. (2016), "Improved Variational Inference with Inverse Autoregressive Flow", use it as
the likelihood of independent pixels.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from ladder_vae.networks.levels import (
    LAST,
    LEVELS,
    bin_mass,
    check_levels,
    levels,
    standard_logistic,
)

MIN_LOG_SCALE = -7.0


class DiscretizedLogistic(TorchDistribution):
    """A logistic distribution, discretized to the 256 levels k/255 of [0, 1].

    Level k has the mass of the logistic in the bin [k/256, (k + 1)/256]; the first bin extends to
    minus infinity and the last to infinity:

        mass(k) = sigmoid(((k + 1)/256 - loc) / scale) - sigmoid((k/256 - loc) / scale)
        log_prob(k/255) = log(mass(k) + 1e-7), in nats

    The constant keeps `log_prob` above -16.12; because of it, the probabilities of all levels
    sum to 1 + 256e-7. Samples and moments are those of the mass without the constant.

    Args:
        loc: location of the logistic, a real tensor.
        log_scale: logarithm of its scale, a real tensor; `MIN_LOG_SCALE` = -7 is the usual minimum.
            The two broadcast to the batch shape; the event shape is ().

    Raises:
        ValueError: with `validate_args`, if a parameter is NaN or a value is not a level.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "loc": constraints.real,
        "log_scale": constraints.real,
    }
    support = levels

    def __init__(
        self, loc: Tensor, log_scale: Tensor, *, validate_args: bool | None = None
    ) -> None:
        self.loc, self.log_scale = broadcast_all(loc, log_scale)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: torch.Size, _instance: Any = None) -> "DiscretizedLogistic":
        new = self._get_checked_instance(DiscretizedLogistic, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape)
        new.log_scale = self.log_scale.expand(batch_shape)
        super(DiscretizedLogistic, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _validate_sample(self, value: Tensor) -> None:
        check_levels(value)
        super()._validate_sample(value)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (self._mass(value) + 1e-7).log()

    def _mass(self, value: Tensor) -> Tensor:
        inverse_scale = (-self.log_scale).exp()
        centre = value * (LAST / LEVELS) + 0.5 / LEVELS
        return bin_mass((centre - self.loc) * inverse_scale, 0.5 / LEVELS * inverse_scale, value)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        loc = self.loc.expand(self._extended_shape(sample_shape))
        x = loc + self.log_scale.exp() * standard_logistic(loc)
        return (x * LEVELS).floor().clamp(0, LAST) / LAST

    @property
    def mean(self) -> Tensor:
        """The exact mean, a sum over the levels."""
        return self._expectation(lambda value: value)

    @property
    def variance(self) -> Tensor:
        """The exact variance, a sum over the levels."""
        mean = self.mean
        return self._expectation(lambda value: (value - mean) ** 2)

    def _expectation(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        # One level at a time: all at once would take 256 times the memory of an image.
        total = torch.zeros_like(self.loc)
        for level in torch.arange(LEVELS, dtype=self.loc.dtype, device=self.loc.device) / LAST:
            total = total + self._mass(level) * function(level)
        return total

    @property
    def mode(self) -> Tensor:
        """The most probable level: the level at `loc`, or the first or last one."""
        inner = (self.loc * LEVELS).floor().clamp(1, LAST - 1) / LAST
        candidates = torch.stack([torch.zeros_like(inner), inner, torch.ones_like(inner)])
        best = self._mass(candidates).argmax(0, keepdim=True)
        return candidates.gather(0, best).squeeze(0)
