"""Discretized logistics over the 256 levels of 8-bit images, one by one and as an RGB mixture.

Images are floats k/255, k = 0 ... 255, in [0, 1]; log-probabilities are in nats. A level has the
mass that a logistic has in the bin around it; the first and the last bin are open-ended, so that
the masses sum to 1. Kingma et al. (2016), "Improved Variational Inference with Inverse
Autoregressive Flow", use it by itself; Salimans, Karpathy, Chen and Kingma (2017), "PixelCNN++:
Improving the PixelCNN with Discretized Logistic Mixture Likelihood and Other Modifications",
section 2.1, mix it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F

LEVELS = 256
MIN_LOG_SCALE = -7.0

_LAST = LEVELS - 1
_HALF_LEVEL = 0.5 / _LAST
# What arithmetic in single precision may move a level by, as a fraction of the levels' distance.
_ROUNDING = 1e-3


class _Levels(constraints.Constraint):
    """The levels k/255, k = 0 ... 255, up to rounding."""

    is_discrete = True

    def check(self, value: Tensor) -> Tensor:
        return (value >= 0) & (value <= 1) & self.near_level(value)

    def near_level(self, value: Tensor) -> Tensor:
        return (value * _LAST - (value * _LAST).round()).abs() <= _ROUNDING


levels = _Levels()


def _check_levels(value: Tensor) -> None:
    """Raise `ValueError` unless all values are levels."""
    if not ((value >= 0) & (value <= 1)).all():
        raise ValueError(
            f"values must be in [0, 1]; the least is {value.min():g}, the greatest {value.max():g}"
        )
    off = value[~levels.near_level(value)]
    if len(off):
        raise ValueError(
            f"values must be levels k/255 of 8-bit images; {len(off)} are between two, "
            f"such as {off[0]:g}"
        )


def _nearest_level(value: Tensor) -> Tensor:
    """The level nearest to any real number."""
    return (value.clamp(0, 1) * _LAST).round() / _LAST


def _standard_logistic(like: Tensor) -> Tensor:
    """Noise of the standard logistic distribution; -inf once in 2^24 draws in single precision."""
    return torch.rand_like(like).logit()


# With s the sigmoid, s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)): a product, so that nothing cancels
# however small the mass of a bin from a to b, and the first two factors are the masses of the
# open-ended bins below b and above a.


def _bin_mass(centre: Tensor, half: Tensor, value: Tensor) -> Tensor:
    """The standard logistic's mass in `centre` -+ `half`, the bin of the level `value`."""
    below_upper = (half + centre).sigmoid()
    above_lower = (half - centre).sigmoid()
    inner = below_upper * above_lower * -torch.expm1(-2 * half)
    return _open_ended(inner, below_upper, above_lower, value)


def _log_bin_mass(centre: Tensor, half: Tensor, value: Tensor) -> Tensor:
    """The logarithm of `_bin_mass`, where that itself would underflow."""
    below_upper = F.logsigmoid(half + centre)
    above_lower = F.logsigmoid(half - centre)
    # A scale beyond the exponent's range would make this the log of zero.
    width = (2 * half).clamp(min=torch.finfo(half.dtype).tiny)
    inner = below_upper + above_lower + (-torch.expm1(-width)).log()
    return _open_ended(inner, below_upper, above_lower, value)


def _open_ended(inner: Tensor, first: Tensor, last: Tensor, value: Tensor) -> Tensor:
    """`inner` but for the first and the last level."""
    inner = torch.where(value < _HALF_LEVEL, first, inner)
    return torch.where(value > 1 - _HALF_LEVEL, last, inner)


class DiscretizedLogistic(TorchDistribution):
    """A logistic discretized to the 256 levels k/255 of [0, 1].

    [0, 1] is cut into bins [k/256, (k + 1)/256] and level k gets the logistic's mass in the k-th,
    with everything below 1/256 for level 0 and everything above 255/256 for level 255
    (Kingma et al., 2016). `log_prob` is log(mass + 1e-7), in nats, so that no value costs more than
    16.1 nats; over all levels its exponentials sum to 1 + 256e-7. Samples and moments are those of
    the mass itself.

    `loc` and `log_scale` (the logarithm of the logistic's scale, of which `MIN_LOG_SCALE` = -7 is
    the customary least) are real tensors that broadcast to the batch shape; the event shape is ().
    Raises `ValueError` under `validate_args` for parameters that are not numbers and values that
    are not levels.
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
        _check_levels(value)
        super()._validate_sample(value)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return (self._mass(value) + 1e-7).log()

    def _mass(self, value: Tensor) -> Tensor:
        inverse_scale = (-self.log_scale).exp()
        centre = value * (_LAST / LEVELS) + 0.5 / LEVELS
        return _bin_mass((centre - self.loc) * inverse_scale, 0.5 / LEVELS * inverse_scale, value)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        loc = self.loc.expand(self._extended_shape(sample_shape))
        x = loc + self.log_scale.exp() * _standard_logistic(loc)
        return (x * LEVELS).floor().clamp(0, _LAST) / _LAST

    @property
    def mean(self) -> Tensor:
        """The exact expectation: a sum over the levels."""
        return self._expectation(lambda value: value)

    @property
    def variance(self) -> Tensor:
        """The exact variance: a sum over the levels."""
        mean = self.mean
        return self._expectation(lambda value: (value - mean) ** 2)

    def _expectation(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        # Level by level: all at once would take 256 times the memory of an image.
        total = torch.zeros_like(self.loc)
        for level in torch.arange(LEVELS, dtype=self.loc.dtype, device=self.loc.device) / _LAST:
            total = total + self._mass(level) * function(level)
        return total

    @property
    def mode(self) -> Tensor:
        """The most probable level: that of `loc`, or an open-ended one where that has more mass."""
        inner = (self.loc * LEVELS).floor().clamp(1, _LAST - 1) / _LAST
        candidates = torch.stack([torch.zeros_like(inner), inner, torch.ones_like(inner)])
        best = self._mass(candidates).argmax(0, keepdim=True)
        return candidates.gather(0, best).squeeze(0)


def _mean_within(loc: Tensor, log_scale: Tensor) -> Tensor:
    """The mean of a logistic whose mass outside [-1, 1] is moved to the ends of that interval.

    That is -1 + s (softplus((loc + 1) / s) - softplus((loc - 1) / s)), s the scale. For large s the
    difference is lost to rounding; it equals 1/s + 2 artanh(tanh(loc / 2s) tanh(1 / 2s)).
    """
    # Beyond e^40 the mean is 0 in any case, and the product below infinity times zero.
    narrow, wide = log_scale.clamp(max=0).exp(), log_scale.clamp(0, 40).exp()
    for_narrow = narrow * (F.softplus((loc + 1) / narrow) - F.softplus((loc - 1) / narrow)) - 1
    product = (loc / (2 * wide)).tanh() * (1 / (2 * wide)).tanh()
    return torch.where(log_scale < 0, for_narrow, 2 * wide * product.atanh()).clamp(-1, 1)


def _colours_in_turn(
    loc: Tensor, coefficients: Tensor, colour_of: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Red, green and blue in [0, 1] (..., 3, K, H, W), each given those before it.

    `colour_of(loc, i)` gives the i-th colour from its location in [-1, 1], both (..., K, H, W).
    """
    red_loc, green_loc, blue_loc = loc.unbind(-4)
    red_in_green, red_in_blue, green_in_blue = coefficients.unbind(-4)
    red = colour_of(red_loc, 0)
    green = colour_of(green_loc + red_in_green * (2 * red - 1), 1)
    shift = red_in_blue * (2 * red - 1) + green_in_blue * (2 * green - 1)
    return torch.stack([red, green, colour_of(blue_loc + shift, 2)], dim=-4)


class DiscretizedLogisticMixture(TorchDistribution):
    """The mixture of discretized logistics of PixelCNN++ over RGB images (3, H, W).

    Each pixel is drawn from one of K components, which its three colours share. Given the
    component, the colours are discretized logistics on [-1, 1], where level k is 2k/255 - 1 and has
    the mass within 1/255 of it, the extreme ones open-ended. Green's location moves with red,
    blue's with red and green (Salimans et al., 2017, equations 1 to 3):

        red   ~ loc_r
        green ~ loc_g + coefficients_r red
        blue  ~ loc_b + coefficients_g red + coefficients_b green

    (coefficients by the index of their colour, which is only where they are stored). As there,
    where a bin's mass is at most 1e-5 the density at its centre times its width stands in for it;
    a component's masses then sum to 1 within 2e-5 per colour.

    Values are levels k/255 in [0, 1], and `log_prob` is in nats per image. Shapes, with any batch
    shape before them:

    - `logits` (K, H, W): the mixture's unnormalised log-weights;
    - `loc` and `log_scale` (3, K, H, W), on the scale of [-1, 1]; `MIN_LOG_SCALE` = -7 is the
      customary least;
    - `coefficients` (3, K, H, W), in [-1, 1].

    Raises `ValueError` for shapes that do not fit together, and under `validate_args` for
    parameters outside their range and values that are not levels or not of the event shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "logits": constraints.independent(constraints.real, 3),
        "loc": constraints.independent(constraints.real, 4),
        "log_scale": constraints.independent(constraints.real, 4),
        "coefficients": constraints.independent(constraints.interval(-1, 1), 4),
    }
    support = constraints.independent(levels, 3)

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        coefficients: Tensor,
        *,
        validate_args: bool | None = None,
    ) -> None:
        batch_shape, event_shape = self.infer_shapes(
            logits=logits.shape,
            loc=loc.shape,
            log_scale=log_scale.shape,
            coefficients=coefficients.shape,
        )
        self.logits, self.loc = logits, loc
        self.log_scale, self.coefficients = log_scale, coefficients
        self._expand_parameters(self, batch_shape)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @classmethod
    def from_channels(
        cls, channels: Tensor, *, validate_args: bool | None = None
    ) -> "DiscretizedLogisticMixture":
        """From a network's output (*batch, 10 K, H, W), laid out as in PixelCNN++.

        That is K logits, then for red, green and blue in turn K locations, K log-scales (clamped
        below at -7) and K coefficients (before tanh). Raises `ValueError` unless the number of
        channels is a multiple of 10.
        """
        components, rest = divmod(channels.shape[-3], 10)
        if rest or not components:
            raise ValueError(
                f"the mixture takes 10 channels per component; {channels.shape[-3]} is no multiple"
            )
        # One copy, where the network's layout has channels last, is faster than strides throughout.
        logits, by_colour = channels.contiguous().split([components, 9 * components], dim=-3)
        loc, log_scale, coefficients = by_colour.unflatten(-3, (3, 3, components)).unbind(-4)
        return cls(
            logits,
            loc,
            log_scale.clamp(min=MIN_LOG_SCALE),
            coefficients.tanh(),
            validate_args=validate_args,
        )

    @classmethod
    def infer_shapes(cls, **arg_shapes: Any) -> tuple[torch.Size, torch.Size]:
        """Batch and event shape from the parameters' shapes."""
        logits = torch.Size(arg_shapes["logits"])
        if len(logits) < 3:
            raise ValueError(f"logits has shape {tuple(logits)}; it must end in (K, H, W)")
        batch_shapes = [logits[:-3]]
        for name in ("loc", "log_scale", "coefficients"):
            shape = torch.Size(arg_shapes[name])
            if shape[-4:] != (3, *logits[-3:]):
                raise ValueError(
                    f"{name} has shape {tuple(shape)}; after the batch shape it must be that of "
                    f"the logits for each of 3 colours, {(3, *logits[-3:])}"
                )
            batch_shapes.append(shape[:-4])
        return torch.broadcast_shapes(*batch_shapes), torch.Size((3, *logits[-2:]))

    def _expand_parameters(self, new: Any, batch_shape: torch.Size) -> None:
        new.logits = self.logits.expand(*batch_shape, *self.logits.shape[-3:])
        for name in ("loc", "log_scale", "coefficients"):
            parameter = getattr(self, name)
            setattr(new, name, parameter.expand(*batch_shape, *parameter.shape[-4:]))

    def expand(
        self, batch_shape: torch.Size, _instance: Any = None
    ) -> "DiscretizedLogisticMixture":
        new = self._get_checked_instance(DiscretizedLogisticMixture, _instance)
        batch_shape = torch.Size(batch_shape)
        self._expand_parameters(new, batch_shape)
        super(DiscretizedLogisticMixture, new).__init__(
            batch_shape, self.event_shape, validate_args=False
        )
        new._validate_args = self._validate_args
        return new

    def _validate_sample(self, value: Tensor) -> None:
        if value.shape[-3:] != self.event_shape:
            raise ValueError(
                f"images of shape {tuple(self.event_shape)} are expected, not values of shape "
                f"{tuple(value.shape)}"
            )
        _check_levels(value)
        super()._validate_sample(value)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = value.unsqueeze(-3)
        inverse_scale = (-self.log_scale).exp()
        centre = self._distance_from_loc(2 * value - 1) * inverse_scale
        log_mass = _log_bin_mass(centre, inverse_scale / _LAST, value)
        log_density = centre - 2 * F.softplus(centre) - self.log_scale
        extreme = (value < _HALF_LEVEL) | (value > 1 - _HALF_LEVEL)
        log_mass = torch.where(
            extreme | (log_mass > math.log(1e-5)), log_mass, log_density + math.log(2 / _LAST)
        )
        by_component = self.logits.log_softmax(-3) + log_mass.sum(-4)
        return by_component.logsumexp(-3).sum((-2, -1))

    def _distance_from_loc(self, x: Tensor) -> Tensor:
        """x (..., 3, 1, H, W) in [-1, 1] less each component's location given the colours before.

        (..., 3, K, H, W)
        """
        red, green, _ = x.split(1, dim=-4)
        shift = self.coefficients * torch.cat([red, red, green], dim=-4)
        red_in_green, red_in_blue, green_in_blue = shift.unbind(-4)
        to_red, to_green, to_blue = (x - self.loc).unbind(-4)
        return torch.stack(
            [to_red, to_green - red_in_green, to_blue - red_in_blue - green_in_blue], dim=-4
        )

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        logits = self.logits.expand(*sample_shape, *self.logits.shape)
        # The largest of log-weights with Gumbel noise is a draw by the weights.
        component = (logits - torch.empty_like(logits).exponential_().log()).argmax(-3, True)
        loc, log_scale, coefficients = self._of_component(component)
        scales = log_scale.exp().unbind(-4)

        def draw(loc: Tensor, colour: int) -> Tensor:
            return _nearest_level((loc + scales[colour] * _standard_logistic(loc) + 1) / 2)

        return _colours_in_turn(loc, coefficients, draw).squeeze(-3)

    def _of_component(self, component: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters (..., 3, 1, H, W) of one component (..., 1, H, W) for each pixel."""
        index = component.unsqueeze(-4)
        index = index.expand(*index.shape[:-4], 3, *index.shape[-3:])
        sample_shape = index.shape[: index.ndim - self.loc.ndim]
        loc, log_scale, coefficients = (
            parameter.expand(*sample_shape, *parameter.shape).gather(-3, index)
            for parameter in (self.loc, self.log_scale, self.coefficients)
        )
        return loc, log_scale, coefficients

    @property
    def mean(self) -> Tensor:
        """The mean in closed form, up to the rounding to levels; (*batch, 3, H, W).

        Within each component the mean of a colour is taken given the means of the colours before
        it. That is exact for red, and for green and blue where their locations, which move with
        those colours, do not reach so far that a varying share of the mass falls on the extreme
        levels. The exact mean would be a sum over 256^3 colours.
        """
        log_scales = self.log_scale.unbind(-4)

        def mean(loc: Tensor, colour: int) -> Tensor:
            return (_mean_within(loc, log_scales[colour]) + 1) / 2

        means = _colours_in_turn(self.loc, self.coefficients, mean)
        return (self.logits.softmax(-3).unsqueeze(-4) * means).sum(-3)

    @property
    def mode(self) -> Tensor:
        """The centre of each pixel's most probable component; (*batch, 3, H, W).

        Each colour is the level nearest to its location given the colours before it. Where
        components overlap, or are so wide that the extreme levels have most mass, another colour
        may be more probable.
        """
        loc, _, coefficients = self._of_component(self.logits.argmax(-3, keepdim=True))
        centre = _colours_in_turn(loc, coefficients, lambda loc, _: _nearest_level((loc + 1) / 2))
        return centre.squeeze(-3)
