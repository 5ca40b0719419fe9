"""A mixture of discretized logistics over 8-bit RGB images.

Salimans, Karpathy, Chen and Kingma (2017), "PixelCNN++: Improving the PixelCNN with Discretized
Logistic Mixture Likelihood and Other Modifications", section 2.1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F

from ladder_vae.networks.discretized_logistic import MIN_LOG_SCALE
from ladder_vae.networks.levels import (
    HALF_LEVEL,
    LAST,
    check_levels,
    levels,
    log_bin_mass,
    nearest_level,
    standard_logistic,
)


def _mean_within(loc: Tensor, log_scale: Tensor) -> Tensor:
    """The mean of a logistic whose mass outside [-1, 1] is moved to the interval's ends.

    With s the scale, that is -1 + s (softplus((loc + 1) / s) - softplus((loc - 1) / s)). For large
    s the difference cancels; there it is computed as 1/s + 2 artanh(tanh(loc / 2s) tanh(1 / 2s)).
    """
    # Beyond e^40 the mean is 0, and the product below would be infinity times zero.
    narrow, wide = log_scale.clamp(max=0).exp(), log_scale.clamp(0, 40).exp()
    for_narrow = narrow * (F.softplus((loc + 1) / narrow) - F.softplus((loc - 1) / narrow)) - 1
    product = (loc / (2 * wide)).tanh() * (1 / (2 * wide)).tanh()
    return torch.where(log_scale < 0, for_narrow, 2 * wide * product.atanh()).clamp(-1, 1)


def _colours_in_turn(
    loc: Tensor, coefficients: Tensor, colour_of: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """Red, green and blue in [0, 1] (..., 3, K, H, W), each given the previous ones.

    `colour_of(loc, i)` returns the i-th colour for its location in [-1, 1], both (..., K, H, W).
    """
    red_loc, green_loc, blue_loc = loc.unbind(-4)
    red_in_green, red_in_blue, green_in_blue = coefficients.unbind(-4)
    red = colour_of(red_loc, 0)
    green = colour_of(green_loc + red_in_green * (2 * red - 1), 1)
    shift = red_in_blue * (2 * red - 1) + green_in_blue * (2 * green - 1)
    return torch.stack([red, green, colour_of(blue_loc + shift, 2)], dim=-4)


class DiscretizedLogisticMixture(TorchDistribution):
    """PixelCNN++'s mixture of discretized logistics over RGB images (3, H, W).

    The three colours of a pixel share one of K components. Given the component, each colour is a
    discretized logistic on [-1, 1]: level k is x = 2k/255 - 1 and has the mass between x - 1/255
    and x + 1/255, where the first bin extends to minus infinity and the last to infinity. Green's
    location depends on red, blue's on red and green (Salimans et al., 2017, equations 1 to 3):

        loc(red)   = loc[0]
        loc(green) = loc[1] + coefficients[0] red
        loc(blue)  = loc[2] + coefficients[1] red + coefficients[2] green

        log p(x) = sum_pixels log sum_k softmax(logits)_k prod_colours mass_k(colour)

    As in PixelCNN++, a mass of at most 1e-5 is replaced by the density at the bin's centre times
    the bin's width; a component's masses then sum to 1 within 2e-5 per colour.

    Values are levels k/255 in [0, 1], and `log_prob` is in nats per image.

    Args:
        logits: the mixture's unnormalised log-weights (*batch, K, H, W).
        loc: locations (*batch, 3, K, H, W), on the scale of [-1, 1].
        log_scale: logarithms of the scales (*batch, 3, K, H, W); `MIN_LOG_SCALE` = -7 is the usual
            minimum.
        coefficients: (*batch, 3, K, H, W), in [-1, 1]; see above.

    Raises:
        ValueError: if shapes do not fit together, and with `validate_args` if a parameter is
            outside its range, or a value is not a level or does not have the event shape.
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
        """From a network's output (*batch, 10 K, H, W), in the layout of PixelCNN++.

        The channels are K logits, then for each of red, green and blue K locations, K log-scales
        (clamped to at least -7) and K coefficients (before tanh). Raises `ValueError` if the number
        of channels is not a multiple of 10.
        """
        components, rest = divmod(channels.shape[-3], 10)
        if rest or not components:
            raise ValueError(
                f"the mixture has 10 channels per component; {channels.shape[-3]} is not a multiple"
            )
        # If the output is channels last, one copy is faster than computing with its strides.
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
                    f"{name} has shape {tuple(shape)}; it must end in that of the logits for each "
                    f"of 3 colours, {(3, *logits[-3:])}"
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
                f"values have shape {tuple(value.shape)}; they must be images of shape "
                f"{tuple(self.event_shape)}"
            )
        check_levels(value)
        super()._validate_sample(value)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        value = value.unsqueeze(-3)
        inverse_scale = (-self.log_scale).exp()
        centre = self._distance_from_loc(2 * value - 1) * inverse_scale
        log_mass = log_bin_mass(centre, inverse_scale / LAST, value)
        log_density = centre - 2 * F.softplus(centre) - self.log_scale
        extreme = (value < HALF_LEVEL) | (value > 1 - HALF_LEVEL)
        log_mass = torch.where(
            extreme | (log_mass > math.log(1e-5)), log_mass, log_density + math.log(2 / LAST)
        )
        by_component = self.logits.log_softmax(-3) + log_mass.sum(-4)
        return by_component.logsumexp(-3).sum((-2, -1))

    def _distance_from_loc(self, x: Tensor) -> Tensor:
        """Colours x (..., 3, 1, H, W) in [-1, 1], minus their locations: (..., 3, K, H, W)."""
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
        # The Gumbel-max trick: adding Gumbel noise makes the argmax a draw from the weights.
        component = (logits - torch.empty_like(logits).exponential_().log()).argmax(-3, True)
        loc, log_scale, coefficients = self._of_component(component)
        scales = log_scale.exp().unbind(-4)

        def draw(loc: Tensor, colour: int) -> Tensor:
            return nearest_level((loc + scales[colour] * standard_logistic(loc) + 1) / 2)

        return _colours_in_turn(loc, coefficients, draw).squeeze(-3)

    def _of_component(self, component: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The parameters (..., 3, 1, H, W) of each pixel's `component` (..., 1, H, W)."""
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
        """An approximate mean in closed form, (*batch, 3, H, W).

        It makes two approximations. Rounding to levels is neglected. And in each component, the
        mean of green and blue is that given the means of the previous colours, which neglects that
        the mass on the first and last level varies with those colours. The exact mean would be a
        sum over 256^3 colours.
        """
        log_scales = self.log_scale.unbind(-4)

        def mean(loc: Tensor, colour: int) -> Tensor:
            return (_mean_within(loc, log_scales[colour]) + 1) / 2

        means = _colours_in_turn(self.loc, self.coefficients, mean)
        return (self.logits.softmax(-3).unsqueeze(-4) * means).sum(-3)

    @property
    def mode(self) -> Tensor:
        """The centre of each pixel's most probable component, (*batch, 3, H, W).

        Each colour is the level nearest to its location, given the previous colours. This is only
        approximately the mode: if components overlap or are very wide, another colour may be more
        probable.
        """
        loc, _, coefficients = self._of_component(self.logits.argmax(-3, keepdim=True))
        centre = _colours_in_turn(loc, coefficients, lambda loc, _: nearest_level((loc + 1) / 2))
        return centre.squeeze(-3)
