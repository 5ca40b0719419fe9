"""The discretized logistic and its mixture by their definitions, and makers of examples."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ladder_vae.networks.discretized_logistic import DiscretizedLogistic
from ladder_vae.networks.discretized_logistic_mixture import DiscretizedLogisticMixture

LEVELS = torch.arange(256) / 255
FLOOR = 1e-7  # added to each mass of the discretized logistic
Shape = Sequence[int]
HALF_LEVEL = -math.log(255)  # log of the scale that is half the distance of two levels in [-1, 1]
LOCS = (-1e3, -1.0, -0.1, 0.0, 0.5, 0.503, 1.0, 1.2, 1e3)
LOG_SCALES = (-7.0, -5.0, -3.0, -1.0, 0.0, 4.0, 20.0)
FAR_LOCS = (-1e30, -30.0, 30.0, 1e30)
# The first ones are too narrow, the last ones too wide for single precision.
FAR_LOG_SCALES = (-1e30, -1e3, -100.0, -60.0, 60.0, 100.0, 1e3, 1e30)


def bin_mass(k: Tensor, centre: Tensor, half: float, loc: Any, log_scale: Any) -> Tensor:
    """The mass of a logistic in `centre` ± `half`, for levels k; bins 0 and 255 are unbounded."""
    scale = torch.as_tensor(log_scale).double().exp()
    upper, lower = (centre + half - loc) / scale, (centre - half - loc) / scale
    # In the upper tail both sigmoids are nearly 1, so subtract their complements instead.
    inner = torch.where(
        centre > torch.as_tensor(loc),
        (-lower).sigmoid() - (-upper).sigmoid(),
        upper.sigmoid() - lower.sigmoid(),
    )
    inner = torch.where(k == 0, upper.sigmoid(), inner)
    return torch.where(k == 255, (-lower).sigmoid(), inner)


def logistic_mass(k: Tensor, loc: Any, log_scale: Any) -> Tensor:
    """On [0, 1], cut into 256 equal bins."""
    return bin_mass(k, (k + 0.5) / 256, 0.5 / 256, loc, log_scale)


def mixture_mass(k: Tensor, loc: Any, log_scale: Any) -> Tensor:
    """On [-1, 1], with levels 2/255 apart; the density replaces masses of at most 1e-5."""
    centre = 2 * k / 255 - 1
    mass = bin_mass(k, centre, 1 / 255, loc, log_scale)
    z = (centre - loc) / torch.as_tensor(log_scale).double().exp()
    stand_in = (-z.abs() - 2 * torch.log1p((-z.abs()).exp()) - log_scale).exp() * 2 / 255
    return torch.where((k > 0) & (k < 255) & (mass <= 1e-5), stand_in, mass)


def colour_mass(pixel: DiscretizedLogisticMixture, component: int, colour: int) -> Any:
    """The mass of a colour in one component; arguments are the previous levels and its own."""
    loc, log_scale, coefficients = (
        p.double()[:, component, 0, 0].tolist()
        for p in (pixel.loc, pixel.log_scale, pixel.coefficients)
    )

    def mass(*k: Tensor) -> Tensor:
        x = [2 * index / 255 - 1 for index in k]
        shift = [
            torch.zeros(()).double(),
            coefficients[0] * x[0],
            coefficients[1] * x[0] + (coefficients[2] * x[1] if colour == 2 else 0),
        ]
        return mixture_mass(k[-1], loc[colour] + shift[colour], log_scale[colour])

    return mass


def looped_log_prob(d: DiscretizedLogisticMixture, value: Tensor) -> Tensor:
    """log p of one image (3, H, W) under one mixture, pixel by pixel and term by term."""
    total = torch.zeros(()).double()
    for y, x in itertools.product(range(value.shape[-2]), range(value.shape[-1])):
        where = slice(y, y + 1), slice(x, x + 1)
        pixel = DiscretizedLogisticMixture(
            *(p[..., *where] for p in (d.logits, d.loc, d.log_scale, d.coefficients))
        )
        red, green, blue = (value[:, y, x].double() * 255).round()
        terms = []
        for component, weight in enumerate(pixel.logits[:, 0, 0].double().softmax(0)):
            first, second, third = (colour_mass(pixel, component, c) for c in range(3))
            terms.append(weight * first(red) * second(red, green) * third(red, green, blue))
        total += torch.stack(terms).sum().log()
    return total


def logistic(batch_shape: Shape = (), dtype: torch.dtype = torch.float32) -> DiscretizedLogistic:
    loc, log_scale = torch.randn(2, *batch_shape, dtype=dtype)
    return DiscretizedLogistic(0.5 + 0.4 * loc, log_scale - 2)


def mixture(
    batch_shape: Shape = (),
    components: int = 3,
    size: tuple[int, int] = (2, 3),
    dtype: torch.dtype = torch.float32,
) -> DiscretizedLogisticMixture:
    channels = torch.randn(*batch_shape, 10 * components, *size, dtype=dtype)
    channels[..., components:, :, :] -= 0.5  # locations and scales that differ between colours
    return DiscretizedLogisticMixture.from_channels(channels)


def images(*shape: int) -> Tensor:
    return LEVELS[torch.randint(256, shape)]


def one_component(
    loc: Sequence[float],
    log_scale: Sequence[float] = (HALF_LEVEL, HALF_LEVEL, HALF_LEVEL),
    coefficients: Sequence[float] = (0, 0, 0),
) -> DiscretizedLogisticMixture:
    """One pixel and one component; by default its levels are two scales apart."""
    parameters = (torch.tensor(p).float().view(3, 1, 1, 1) for p in (loc, log_scale, coefficients))
    return DiscretizedLogisticMixture(torch.zeros(1, 1, 1), *parameters)


def p_value(counts: Tensor, mass: Tensor) -> float:
    """The p-value of Pearson's chi-square test; cells with less than 10 expected are pooled."""
    counts, expected = counts.double().flatten(), mass.double().flatten() * counts.sum()
    often = expected >= 10
    pooled = torch.stack([counts[~often].sum(), expected[~often].sum()])
    if pooled[1] > 0.5:
        counts = torch.cat([counts[often], pooled[:1]])
        expected = torch.cat([expected[often], pooled[1:]])
    else:
        assert pooled[0] <= 10
        counts, expected = counts[often], expected[often]
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor(len(counts) - 1).double()
    return torch.special.gammaincc(degrees / 2, statistic / 2).item()


def indices(samples: Tensor) -> Tensor:
    """The k of samples, which must be exactly k/255."""
    k = (samples * 255).round().long()
    assert torch.equal(samples, LEVELS[k])
    return k


def some_levels(*shape: int) -> Tensor:
    """Levels in double precision, including the first and the last."""
    value = images(*shape).double()
    value.view(-1)[:2] = torch.tensor([0.0, 1.0]).double()
    return value


def finite(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor.isfinite().all())
