"""The 256 levels of 8-bit images, and the mass of a logistic distribution in their bins.

Images are floats k/255, k = 0 ... 255, in [0, 1].
"""

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

LEVELS = 256
LAST = LEVELS - 1
HALF_LEVEL = 0.5 / LAST
# Tolerance for single-precision rounding, as a fraction of the distance between levels.
_ROUNDING = 1e-3


class _Levels(constraints.Constraint):
    """The levels k/255, k = 0 ... 255, up to rounding."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        return (value >= 0) & (value <= 1) & self.near_level(value)

    def near_level(self, value: Tensor) -> Tensor:
        return (value * LAST - (value * LAST).round()).abs() <= _ROUNDING


levels = _Levels()


def check_levels(value: Tensor) -> None:
    """Raise `ValueError` unless all values are levels."""
    if not ((value >= 0) & (value <= 1)).all():
        raise ValueError(
            f"values must be in [0, 1]; the least is {value.min():g}, the greatest {value.max():g}"
        )
    off = value[~levels.near_level(value)]
    if len(off):
        raise ValueError(
            f"values must be levels k/255 of 8-bit images; {len(off)} are between two levels, "
            f"such as {off[0]:g}"
        )


def nearest_level(value: Tensor) -> Tensor:
    """The level k/255 nearest to each real number."""
    return (value.clamp(0, 1) * LAST).round() / LAST


def standard_logistic(like: Tensor) -> Tensor:
    """Draws from the standard logistic; in single precision, one in 2^24 draws is -inf."""
    return torch.rand_like(like).logit()


# With s the sigmoid, the mass between a and b is s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)). Unlike
# the difference, the product is accurate however small the mass is. Its first two factors are the
# masses below b and above a, which are those of the open-ended first and last bin.


def bin_mass(centre: Tensor, half: Tensor, value: Tensor) -> Tensor:
    """The standard logistic's mass in `centre` ± `half`, the bin of the level `value`.

    The bin of the first level extends to minus infinity, that of the last level to infinity.
    """
    below_upper = (half + centre).sigmoid()
    above_lower = (half - centre).sigmoid()
    inner = below_upper * above_lower * -torch.expm1(-2 * half)
    return _open_ended(inner, below_upper, above_lower, value)


def log_bin_mass(centre: Tensor, half: Tensor, value: Tensor) -> Tensor:
    """The logarithm of `bin_mass`, also if `bin_mass` underflows."""
    below_upper = F.logsigmoid(half + centre)
    above_lower = F.logsigmoid(half - centre)
    # For extremely large scales the width underflows to 0; its logarithm must stay finite.
    width = (2 * half).clamp(min=torch.finfo(half.dtype).tiny)
    inner = below_upper + above_lower + (-torch.expm1(-width)).log()
    return _open_ended(inner, below_upper, above_lower, value)


def _open_ended(inner: Tensor, first: Tensor, last: Tensor, value: Tensor) -> Tensor:
    """`inner`, replaced by `first` and `last` at the first and last level."""
    inner = torch.where(value < HALF_LEVEL, first, inner)
    return torch.where(value > 1 - HALF_LEVEL, last, inner)
