"""The mixture of discretized logistics: closed forms, loops, sums, samples and gradients."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ladder_vae.networks.discretized_logistic_mixture import DiscretizedLogisticMixture
from tests.networks.logistic_definitions import (
    FAR_LOCS,
    FAR_LOG_SCALES,
    LEVELS,
    LOCS,
    LOG_SCALES,
    colour_mass,
    finite,
    images,
    indices,
    looped_log_prob,
    mixture,
    mixture_mass,
    one_component,
    p_value,
    some_levels,
)


def test_mixture_by_hand() -> None:
    """Each kind of bin: at the centre, its neighbour, far away, the first and the last."""

    def centre(k: int) -> float:
        return 2 * k / 255 - 1

    d = one_component((centre(100), centre(0), centre(255)))
    in_centre = math.tanh(0.5)  # sigmoid(1) - sigmoid(-1)
    in_next = 1 / (1 + math.exp(-3)) - 1 / (1 + math.exp(-1))
    far = 2 * math.exp(-16) / (1 + math.exp(-16)) ** 2  # width 2 times the density 16 scales away
    open_ended = 1 / (1 + math.exp(-1))
    for k, mass in {100: in_centre, 101: in_next, 99: in_next, 108: far, 92: far}.items():
        value = LEVELS[[k, 0, 255]].view(3, 1, 1)
        expected = math.log(mass) + 2 * math.log(open_ended)
        assert d.log_prob(value).item() == pytest.approx(expected, rel=1e-5), k


def test_each_coefficient_weighs_its_colour() -> None:
    """coefficients[0] is red in green, [1] red in blue, [2] green in blue."""
    red, green = 250, 60
    x_red = 2 * red / 255 - 1
    coefficients = (0.5, -0.75, 0.25)
    d = one_component((0.0, 0.0, 0.0), (-7.0, -7.0, -7.0), coefficients)
    best = DiscretizedLogisticMixture(
        d.logits, d.loc + torch.tensor([x_red, 0, 0]).view(3, 1, 1, 1), d.log_scale, d.coefficients
    )
    expected_green = round((0.5 * x_red + 1) * 127.5)
    for k, at in {expected_green: "the peak", green: "elsewhere"}.items():
        x = 2 * k / 255 - 1
        expected_blue = round((-0.75 * x_red + 0.25 * x + 1) * 127.5)
        blues = torch.stack([LEVELS[[red, k, b]] for b in range(256)]).view(256, 3, 1, 1)
        assert best.log_prob(blues).argmax().item() == expected_blue, at
    greens = torch.stack([LEVELS[[red, k, 100]] for k in range(256)]).view(256, 3, 1, 1)
    flat_blue = one_component((x_red, 0.0, 0.0), (-7.0, -7.0, 20.0), coefficients)
    assert flat_blue.log_prob(greens).argmax().item() == expected_green


def test_channels_are_laid_out_as_in_pixelcnn() -> None:
    """Logits; then for each colour locations, log-scales and coefficients."""
    channels = torch.linspace(9, -9, 100).view(100, 1, 1).expand(2, 100, 3, 4)
    d = DiscretizedLogisticMixture.from_channels(channels)
    assert (channels[:, 80:90] < -7).any()
    assert_close(d.logits, channels[:, :10])
    for colour in range(3):
        start = 10 + 30 * colour
        assert_close(d.loc[:, colour], channels[:, start : start + 10])
        log_scale = channels[:, start + 10 : start + 20]
        assert_close(d.log_scale[:, colour], log_scale.maximum(torch.tensor(-7.0)))
        assert_close(d.coefficients[:, colour], channels[:, start + 20 : start + 30].tanh())
    assert d.batch_shape == (2,)
    assert d.event_shape == (3, 3, 4)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_mixture_agrees_with_loops(dtype: torch.dtype, rtol: float) -> None:
    """Random images, with 0 and 1 among their levels."""
    d = mixture((3,), components=4, size=(3, 4), dtype=torch.float64)
    value = images(3, 3, 3, 4).double()
    value[0, :, 0] = 0
    value[1, :, 1] = 1
    expected = torch.stack(
        [
            looped_log_prob(DiscretizedLogisticMixture(*parameters), image)
            for *parameters, image in zip(
                d.logits, d.loc, d.log_scale, d.coefficients, value, strict=True
            )
        ]
    )
    typed = (p.to(dtype) for p in (d.logits, d.loc, d.log_scale, d.coefficients))
    ours = DiscretizedLogisticMixture(*typed).log_prob(value.to(dtype))
    assert_close(ours.double(), expected, rtol=rtol, atol=0)


def test_mixture_mass_sums_to_one() -> None:
    """Over all colours of a pixel whose red is nearly certain within each of two components."""
    channels = torch.randn(20, 1, 1)
    reds = (40, 200)
    channels[2:4, 0, 0] = 2 * LEVELS[list(reds)] - 1
    channels[4:6] = -7
    d = DiscretizedLogisticMixture.from_channels(channels, validate_args=False)
    green, blue = torch.meshgrid(LEVELS, LEVELS, indexing="ij")
    total = torch.zeros(()).double()
    for red in (LEVELS[red + i] for red in reds for i in range(-5, 6)):
        values = torch.stack([red.expand_as(green), green, blue], dim=-1)
        total += d.log_prob(values.view(-1, 3, 1, 1)).double().exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


def marginal_log_prob(d: DiscretizedLogisticMixture, colours: Tensor) -> Tensor:
    """log p of the first colours (..., C) of a pixel, computed with the others certain to be 1."""
    certain = colours.shape[-1]
    loc, log_scale = d.loc.clone(), d.log_scale.clone()
    loc[certain:], log_scale[certain:] = 1e3, -7
    values = torch.cat([colours, torch.ones(*colours.shape[:-1], 3 - certain)], dim=-1)
    marginal = DiscretizedLogisticMixture(d.logits, loc, log_scale, d.coefficients)
    return marginal.log_prob(values[..., None, None]).double()


@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("loc", [-1e3, -1.0, 0.3, 1e3])
def test_mixture_mass_sums_to_one_colour_by_colour(loc: float, log_scale: float) -> None:
    """At extreme parameters: over blue given red and green, over green given red, over red.

    The density that replaces small masses changes the sum by 2e-5 at most, for narrow scales only.
    """
    d = DiscretizedLogisticMixture(
        torch.tensor([0.5, -0.5]).view(2, 1, 1),
        torch.tensor([[loc, 0.1], [0.2, loc], [-0.4, 0.9]]).view(3, 2, 1, 1),
        torch.full((3, 2, 1, 1), log_scale),
        torch.tensor([[0.5, -1], [-0.3, 0.2], [1, -0.8]]).view(3, 2, 1, 1),
    )
    bound = 1e-5 if log_scale >= -5 else 2e-5
    assert marginal_log_prob(d, LEVELS[:, None]).exp().sum().item() == pytest.approx(1, abs=bound)
    for pixel in d.sample((5,)).view(5, 3):
        for known in (1, 2):
            before = pixel[:known]
            values = torch.cat([before.expand(256, known), LEVELS[:, None]], dim=-1)
            given = marginal_log_prob(d, values) - marginal_log_prob(d, before)
            assert given.exp().sum().item() == pytest.approx(1, abs=bound)


def test_mixture_samples_have_the_mass() -> None:
    """Each colour by itself, and red with green and with blue."""
    pixel = DiscretizedLogisticMixture(
        torch.tensor([0.3, -0.5]).view(2, 1, 1),
        torch.tensor([[-0.8, 0.4], [0.1, -0.2], [0.3, 0.9]]).view(3, 2, 1, 1),
        torch.tensor([[-2.5, -4.0], [-3.0, -4.5], [-3.5, -2.0]]).view(3, 2, 1, 1),
        torch.tensor([[0.9, -0.8], [-0.7, 0.5], [0.6, -0.9]]).view(3, 2, 1, 1),
    )
    red, green, blue = indices(pixel.sample((300_000,))).view(-1, 3).unbind(1)

    k = torch.arange(256).double()
    with_green = torch.zeros(256, 256).double()
    with_blue = torch.zeros(256, 256).double()
    for component, weight in enumerate(pixel.logits.double().softmax(0).flatten()):
        first, second, third = (colour_mass(pixel, component, c) for c in range(3))
        of_two = weight * first(k)[:, None] * second(k[:, None], k)
        with_green += of_two
        for r in range(256):
            with_blue[r] += of_two[r] @ third(k[r], k[:, None], k)

    assert p_value(red.bincount(minlength=256), with_green.sum(1)) > 1e-3
    assert p_value(green.bincount(minlength=256), with_green.sum(0)) > 1e-3
    assert p_value(blue.bincount(minlength=256), with_blue.sum(0)) > 1e-3
    for other, mass in ((green, with_green), (blue, with_blue)):
        counts = (256 * red + other).bincount(minlength=256 * 256)
        assert p_value(counts, mass) > 1e-3


@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_mixture_mean_of_red(log_scale: float) -> None:
    """Exact up to rounding to levels, at most half a level."""
    k = torch.arange(256).double()
    for loc in (-1e3, -1.2, -1.0, -0.3, 0.0, 0.77, 1.0, 1e3):
        d = one_component((loc, 0.0, 0.0), (log_scale, 0.0, 0.0))
        mean = (mixture_mass(k, loc, log_scale) * k / 255).sum()
        # For scales much larger than a level, the sum is nearly the integral.
        bound = {-7.0: 0.5 / 255 + 1e-5, -5.0: 1e-4}.get(log_scale, 1e-5)
        assert d.mean[0].item() == pytest.approx(mean.item(), abs=bound), loc


def test_mixture_mean_of_samples() -> None:
    """If the first and last level have little mass, it is the mean of many draws."""
    channels = 0.4 * torch.randn(30, 2, 3)
    d = DiscretizedLogisticMixture.from_channels(channels)
    d = DiscretizedLogisticMixture(d.logits, d.loc / 2, d.log_scale - 4, d.coefficients)
    samples = d.sample((40_000,))
    error = samples.std(0) / 200
    assert ((d.mean - samples.mean(0)).abs() < 4.5 * error).all()
    # Without the coefficients the mean is wrong in green and blue.
    without = DiscretizedLogisticMixture(
        d.logits, d.loc, d.log_scale, torch.zeros_like(d.coefficients)
    )
    assert ((without.mean - samples.mean(0)).abs() > 4.5 * error)[1:].any(-1).any(-1).all()


@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_mixture_variance_of_red(log_scale: float) -> None:
    """The sum over the levels, with the variance between the components."""
    k = torch.arange(256).double()
    locs = (-1.2, -1.0, -0.3, 0.0, 0.77, 1.0)
    for pair in itertools.pairwise(locs):
        loc = torch.zeros(3, 2, 1, 1)
        loc[0] = torch.tensor(pair).view(2, 1, 1)
        d = DiscretizedLogisticMixture(
            torch.tensor([0.0, 1.0]).view(2, 1, 1),
            loc,
            torch.full((3, 2, 1, 1), log_scale),
            torch.zeros(3, 2, 1, 1),
        )
        weights = d.logits.double().softmax(0).flatten()
        masses = torch.stack([mixture_mass(k, value, log_scale) for value in pair])
        mass = (weights[:, None] * masses).sum(0)
        mean = (mass * k / 255).sum()
        variance = (mass * (k / 255 - mean) ** 2).sum().item()
        # `mean` neglects rounding to levels, up to half a level.
        bound = {-7.0: (0.5 / 255) ** 2 + 4e-4}.get(log_scale, 1e-4)
        assert d.variance[0].item() == pytest.approx(variance, abs=bound), pair


def test_mixture_variance_of_samples() -> None:
    """If the first and last level have little mass, it is the variance of many draws."""
    channels = 0.4 * torch.randn(30, 2, 3)
    d = DiscretizedLogisticMixture.from_channels(channels)
    d = DiscretizedLogisticMixture(d.logits, d.loc / 2, d.log_scale - 3, d.coefficients)
    samples = d.sample((40_000,))
    squares = (samples - samples.mean(0)) ** 2
    error = squares.std(0) / 200
    assert ((d.variance - squares.mean(0)).abs() < 4.5 * error).all()
    assert_close(d.stddev, d.variance.sqrt())
    # Without the coefficients it is wrong in green and blue.
    without = DiscretizedLogisticMixture(
        d.logits, d.loc, d.log_scale, torch.zeros_like(d.coefficients)
    )
    wrong = (without.variance - squares.mean(0)).abs() > 4.5 * error
    assert wrong[1:].any(-1).any(-1).all()


def test_mixture_mode() -> None:
    """The centre of the heavier component, each colour given the previous levels, in [0, 1]."""
    d = DiscretizedLogisticMixture(
        torch.tensor([[[0.0, 3.0]], [[1.0, -1.0]]]),
        torch.tensor([[0.5, -0.5], [0.1, 0.2], [0.0, 3.0]]).view(3, 2, 1, 1).expand(3, 2, 1, 2),
        torch.full((3, 2, 1, 2), -7.0),
        torch.tensor([0.5, 0.25, -0.5]).view(3, 1, 1, 1).expand(3, 2, 1, 2),
    )
    mode = indices(d.mode)
    red = round((0.5 + 1) * 127.5)
    x_red = 2 * red / 255 - 1
    green = round((0.1 + 0.5 * x_red + 1) * 127.5)
    blue = round((0.25 * x_red - 0.5 * (2 * green / 255 - 1) + 1) * 127.5)
    assert mode[:, 0, 1].tolist() == [red, green, blue]
    red = round((-0.5 + 1) * 127.5)
    green = round((0.2 + 0.5 * (2 * red / 255 - 1) + 1) * 127.5)
    assert mode[:, 0, 0].tolist() == [red, green, 255]
    # If the heaviest component is narrow, nothing is more probable.
    assert (d.log_prob(d.mode) >= d.log_prob(d.sample((200,)))).all()


def test_layout_in_memory_changes_nothing() -> None:
    """Channels-last inputs give the same values."""
    channels, value = torch.randn(2, 20, 4, 5), images(2, 3, 4, 5)
    last = channels.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    of_both = (
        DiscretizedLogisticMixture.from_channels(c).log_prob(value) for c in (channels, last)
    )
    assert torch.equal(*of_both)


@pytest.mark.parametrize("shift", [0.0, -5.0, 8.0], ids=["mass", "narrow", "wide"])
def test_mixture_gradients(shift: float) -> None:
    """Against finite differences; `wide` uses the density in all bins but the first and last."""
    value = some_levels(2, 3, 1, 2)
    channels = torch.randn(2, 20, 1, 2).double()
    with torch.no_grad():
        scales = channels[:, 2:].unflatten(1, (3, 3, 2))[:, :, 1]
        scales.copy_(scales.clamp(-1.5, 1.5) + shift)
    channels.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c: DiscretizedLogisticMixture.from_channels(c).log_prob(value), (channels,)
    )


@pytest.mark.parametrize("logit", [-1e3, 0.0, 1e3])
def test_mixture_is_finite_at_extremes(logit: float) -> None:
    """Value, gradient, mean, mode and samples in single precision, for all levels of a colour."""
    grid = torch.tensor(list(itertools.product(LOCS, (*LOG_SCALES, 60.0, 100.0), (-1e3, 0, 1e3))))
    loc, log_scale, coefficient = grid.T
    by_colour = torch.stack([loc, log_scale, coefficient], dim=-1)  # (M, 3)
    by_colour = torch.stack([by_colour, by_colour.flip(0)], dim=-1)  # (M, 3, K = 2)
    channels = torch.cat(
        [torch.tensor([logit, 0.0]).expand(len(grid), 2), by_colour.repeat(1, 3, 1).flatten(1)], 1
    )
    channels = channels.view(len(grid), 20, 1, 1).requires_grad_()
    d = DiscretizedLogisticMixture.from_channels(channels)
    values = torch.cat(
        [LEVELS.view(256, 1).expand(256, 3), torch.tensor([[0.0, 1, 0.5019608], [1, 0, 1]])]
    )
    log_prob = d.log_prob(values.view(-1, 1, 3, 1, 1))
    assert log_prob.shape == (258, len(grid))
    assert finite(log_prob)
    log_prob.sum().backward()
    assert finite(channels.grad)
    for picture in (d.mean, d.mode, d.sample()):
        assert ((picture >= 0) & (picture <= 1)).all()


def extreme_mixture(dtype: torch.dtype) -> tuple[DiscretizedLogisticMixture, list[Tensor]]:
    """Two components of every combination of extreme parameters, and the parameters."""
    locs, log_scales = (*LOCS, *FAR_LOCS), (*LOG_SCALES, *FAR_LOG_SCALES)
    loc, log_scale, coefficient = torch.tensor(
        list(itertools.product(locs, log_scales, (-1.0, 0.0, 1.0))), dtype=dtype
    ).T
    parameters = [
        torch.stack([p, p.flip(0)], dim=-1).view(-1, 1, 2, 1, 1).expand(-1, 3, 2, 1, 1).clone()
        for p in (loc, log_scale, coefficient)
    ]
    logits = torch.tensor([1e30, -1e30], dtype=dtype).view(2, 1, 1).expand(len(loc), 2, 1, 1)
    leaves = [p.requires_grad_() for p in (logits.clone(), *parameters)]
    return DiscretizedLogisticMixture(*leaves), leaves


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("what", ["log_prob", "mean", "variance"])
def test_mixture_is_finite_for_every_parameter(what: str, dtype: torch.dtype) -> None:
    """Value and gradient, for some levels of each colour."""
    d, leaves = extreme_mixture(dtype)
    levels = LEVELS[[0, 1, 128, 254, 255]].to(dtype).view(-1, 1, 1, 1, 1)
    found = getattr(d, what)
    value = found(levels.expand(-1, 1, 3, 1, 1)) if callable(found) else found
    assert finite(value)
    value.sum().backward()
    assert all(finite(leaf.grad) for leaf in leaves)
    if what == "mean":
        for picture in (d.mean, d.mode, d.sample((9,))):
            assert ((picture >= 0) & (picture <= 1)).all()
    if what == "variance":
        assert (value >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("log_scale", [-60.0, -1e3, -1e30])
def test_mixture_of_vanishing_scale(log_scale: float, dtype: torch.dtype) -> None:
    """All mass is on the location's levels; far locations are on the first or last level."""
    loc = torch.tensor([2 * 100 / 255 - 1, -1e30, 1e30], dtype=dtype).view(3, 1, 1, 1)
    d = DiscretizedLogisticMixture(
        torch.zeros(1, 1, 1, dtype=dtype),
        loc,
        torch.full_like(loc, log_scale),
        torch.zeros_like(loc),
    )
    index = torch.tensor([[100, 0, 255], [101, 0, 255], [100, 1, 255]])
    levels = LEVELS[index].to(dtype).view(3, 3, 1, 1)
    own, *others = d.log_prob(levels).tolist()
    assert own == 0
    assert all(other < -1e9 for other in others)
    assert_close(d.mean.flatten(), torch.tensor([100 / 255, 0, 1], dtype=dtype))
    assert_close(d.variance, torch.zeros_like(d.variance))
