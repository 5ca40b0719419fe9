"""The discretized logistic and its mixture: closed forms, loops, counts and Pyro's rules."""

import itertools
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

from ladder_vae.networks.discretized_logistic import DiscretizedLogistic
from ladder_vae.networks.discretized_logistic_mixture import DiscretizedLogisticMixture

LEVELS = torch.arange(256) / 255
FLOOR = 1e-7  # what the discretized logistic adds to each mass

Shape = Sequence[int]
HALF_LEVEL = -math.log(255)  # of a scale that is half the distance of two levels in [-1, 1]


# The definitions, in double precision


def bin_mass(k: Tensor, centre: Tensor, half: float, loc: Any, log_scale: Any) -> Tensor:
    """The mass of a logistic in `centre` -+ `half`, for levels k, open-ended at 0 and 255."""
    scale = torch.as_tensor(log_scale).double().exp()
    upper, lower = (centre + half - loc) / scale, (centre - half - loc) / scale
    # In the upper tail both sigmoids are nearly 1: take what is left of 1 instead.
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
    """On [-1, 1], the levels 2/255 apart, with the density's stand-in for little mass."""
    centre = 2 * k / 255 - 1
    mass = bin_mass(k, centre, 1 / 255, loc, log_scale)
    z = (centre - loc) / torch.as_tensor(log_scale).double().exp()
    stand_in = (-z.abs() - 2 * torch.log1p((-z.abs()).exp()) - log_scale).exp() * 2 / 255
    return torch.where((k > 0) & (k < 255) & (mass <= 1e-5), stand_in, mass)


def colour_mass(pixel: DiscretizedLogisticMixture, component: int, colour: int) -> Any:
    """The mass of a colour in one component, by the indices of the colours before and its own."""
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


# Makers of distributions


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


MAKERS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "logistic": (logistic, ()),
    "images of logistics": (lambda shape=(): logistic((*shape, 3, 2, 3)).to_event(3), (3, 2, 3)),
    "mixture": (mixture, (3, 2, 3)),
}
each_maker = pytest.mark.parametrize(("make", "event_shape"), MAKERS.values(), ids=MAKERS.keys())
each_batch = pytest.mark.parametrize("batch_shape", [(), (4,), (2, 4), (2, 1, 4)], ids=str)

LOCS = (-1e3, -1.0, -0.1, 0.0, 0.5, 0.503, 1.0, 1.2, 1e3)
LOG_SCALES = (-7.0, -5.0, -3.0, -1.0, 0.0, 4.0, 20.0)


# Values


def test_logistic_by_hand() -> None:
    """Bins of width 1/256; scale and location chosen so that their edges are whole scales away."""

    def sigmoid(t: float) -> float:
        return 1 / (1 + math.exp(-t))

    d = DiscretizedLogistic(torch.tensor(100 / 256), torch.tensor(1 / 256).log())
    expected = {
        0: sigmoid(1 - 100),
        50: sigmoid(51 - 100) - sigmoid(50 - 100),
        99: 0.5 - sigmoid(-1),
        100: sigmoid(1) - 0.5,
        101: sigmoid(2) - sigmoid(1),
        255: sigmoid(100 - 255),
    }
    for k, mass in expected.items():
        assert d.log_prob(LEVELS[k]).item() == pytest.approx(math.log(mass + 1e-7), rel=1e-5), k
    narrow = DiscretizedLogistic(torch.tensor(-3.0), torch.tensor(-7.0))
    assert narrow.log_prob(LEVELS[0]).item() == pytest.approx(1e-7, abs=1.3e-7)
    assert narrow.log_prob(LEVELS[1]).item() == pytest.approx(math.log(1e-7), rel=1e-6)


def one_component(
    loc: Sequence[float],
    log_scale: Sequence[float] = (HALF_LEVEL, HALF_LEVEL, HALF_LEVEL),
    coefficients: Sequence[float] = (0, 0, 0),
) -> DiscretizedLogisticMixture:
    """One pixel, one component, whose levels are two scales apart unless told."""
    parameters = (torch.tensor(p).float().view(3, 1, 1, 1) for p in (loc, log_scale, coefficients))
    return DiscretizedLogisticMixture(torch.zeros(1, 1, 1), *parameters)


def test_mixture_by_hand() -> None:
    """Each kind of bin: the centre's, its neighbour's, a far one's, the open-ended ones."""

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
    """Red's weighs red in green, green's red in blue, blue's green in blue."""
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


def test_logistic_agrees_with_its_definition() -> None:
    """All levels, at parameters from everywhere: to rounding in double precision."""
    k = torch.arange(256).double()
    for loc, log_scale in itertools.product(LOCS, LOG_SCALES):
        single = torch.tensor([loc, log_scale])
        expected = (logistic_mass(k, *single.double()) + FLOOR).log()
        d = DiscretizedLogistic(*single.double())
        assert_close(d.log_prob(k / 255), expected, rtol=1e-6, atol=1e-9)
        # What the locations of bins lose in single precision counts in units of the scale.
        rounding = 1e-6 * (1 + math.exp(-log_scale))
        ours = DiscretizedLogistic(*single).log_prob(LEVELS)
        assert_close(ours.double(), expected, rtol=1e-5, atol=rounding)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
def test_mixture_agrees_with_loops(dtype: torch.dtype, rtol: float) -> None:
    """Random images with all extremes among their colours."""
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


# Mass


def test_logistic_mass_sums_to_one() -> None:
    """... and 256 times what is added to each."""
    loc = torch.cat([torch.tensor(LOCS), torch.randn(30)]).unsqueeze(1)
    log_scale = torch.cat([torch.tensor(LOG_SCALES), 2 * torch.randn(30)]).unsqueeze(0)
    d = DiscretizedLogistic(loc, log_scale)
    total = d.log_prob(LEVELS.view(256, 1, 1)).double().exp().sum(0)
    assert_close(total, torch.full_like(total, 1 + 256 * FLOOR), rtol=0, atol=1e-5)


def test_mixture_mass_sums_to_one() -> None:
    """Over all 256^3 colours of a pixel."""
    d = DiscretizedLogisticMixture.from_channels(torch.randn(20, 1, 1), validate_args=False)
    green, blue = torch.meshgrid(LEVELS, LEVELS, indexing="ij")
    total = torch.zeros(()).double()
    for red in LEVELS:
        values = torch.stack([red.expand_as(green), green, blue], dim=-1)
        total += d.log_prob(values.view(-1, 3, 1, 1)).double().exp().sum()
    assert total.item() == pytest.approx(1, abs=1e-5)


def marginal_log_prob(d: DiscretizedLogisticMixture, colours: Tensor) -> Tensor:
    """log p of the first colours (..., C) of a pixel, by making the others certainly 1."""
    certain = colours.shape[-1]
    loc, log_scale = d.loc.clone(), d.log_scale.clone()
    loc[certain:], log_scale[certain:] = 1e3, -7
    values = torch.cat([colours, torch.ones(*colours.shape[:-1], 3 - certain)], dim=-1)
    marginal = DiscretizedLogisticMixture(d.logits, loc, log_scale, d.coefficients)
    return marginal.log_prob(values[..., None, None]).double()


@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("loc", [-1e3, -1.0, 0.3, 1e3])
def test_mixture_mass_sums_to_one_colour_by_colour(loc: float, log_scale: float) -> None:
    """At extremes: over blue given the others, over green given red, over red.

    Up to what the stand-in leaves out: as documented, and only where levels are scales apart.
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


# Samples


def p_value(counts: Tensor, mass: Tensor) -> float:
    """Of Pearson's chi-square test; cells that expect less than 10 are counted as one."""
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
    """The k of levels k/255, which must be those very numbers."""
    k = (samples * 255).round().long()
    assert torch.equal(samples, LEVELS[k])
    return k


@pytest.mark.parametrize(("loc", "log_scale"), [(0.4, -4), (0.02, -3), (0.97, -1), (0.5, 3)])
def test_logistic_samples_have_the_mass(loc: float, log_scale: float) -> None:
    d = DiscretizedLogistic(torch.tensor(loc), torch.tensor(float(log_scale)))
    counts = indices(d.sample((200_000,))).bincount(minlength=256)
    mass = logistic_mass(torch.arange(256).double(), loc, log_scale)
    assert p_value(counts, mass) > 1e-3


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


@each_maker
def test_samples_vary(make: Callable[..., Any], event_shape: Shape) -> None:
    """Draws of expanded distributions are draws of their own."""
    samples = make().expand((6,)).sample((5,)).flatten(0, 1)
    assert len(samples.unique(dim=0)) >= (25 if event_shape else 3)


@pytest.mark.parametrize("loc", [-1e3, 1e3])
def test_samples_at_extremes(loc: float) -> None:
    """All mass on one level, and then on the two extreme levels."""
    level = float(loc > 0)
    assert (DiscretizedLogistic(torch.tensor(loc), torch.tensor(-7.0)).sample((99,)) == level).all()
    d = one_component((loc, loc, loc), (-7, -7, -7))
    assert (d.sample((99,)) == level).all()
    wide = one_component((0, 0, 0), (20, 20, 20)).sample((1000,))
    assert ((wide == 0) | (wide == 1)).all()
    assert 0.45 < wide.mean().item() < 0.55


# Moments and modes


def test_logistic_moments() -> None:
    """Sums over the levels, by the definition."""
    k = torch.arange(256).double()
    parameters = torch.tensor(list(itertools.product(LOCS, LOG_SCALES)))
    d = DiscretizedLogistic(*parameters.T)
    mass = torch.stack([logistic_mass(k, *pair) for pair in parameters.double()])
    mean = (mass * k / 255).sum(1, keepdim=True)
    variance = (mass * (k / 255 - mean) ** 2).sum(1)
    assert_close(d.mean.double(), mean.squeeze(1), rtol=1e-5, atol=1e-6)
    assert_close(d.variance.double(), variance, rtol=1e-4, atol=1e-8)
    assert_close(d.stddev, d.variance.sqrt())


def test_logistic_mode() -> None:
    """The level with most mass."""
    for loc, log_scale in itertools.product(LOCS, LOG_SCALES):
        mode = DiscretizedLogistic(torch.tensor(loc), torch.tensor(log_scale)).mode
        (k,) = indices(mode.view(1))
        mass = logistic_mass(torch.arange(256).double(), loc, log_scale)
        # Wide ones have levels so close in mass that single precision does not tell them apart.
        assert mass[k] >= mass.max() * (1 - 1e-6), (loc, log_scale)


@pytest.mark.parametrize("log_scale", LOG_SCALES)
def test_mixture_mean_of_red(log_scale: float) -> None:
    """Exact but for the rounding to levels, which moves it by half a level at most."""
    k = torch.arange(256).double()
    for loc in (-1e3, -1.2, -1.0, -0.3, 0.0, 0.77, 1.0, 1e3):
        d = one_component((loc, 0.0, 0.0), (log_scale, 0.0, 0.0))
        mean = (mixture_mass(k, loc, log_scale) * k / 255).sum()
        # Where levels are close in units of the scale, their sum is nearly the integral.
        bound = {-7.0: 0.5 / 255 + 1e-5, -5.0: 1e-4}.get(log_scale, 1e-5)
        assert d.mean[0].item() == pytest.approx(mean.item(), abs=bound), loc


def test_mixture_mean_of_samples() -> None:
    """Where little is moved to the extreme levels: the mean of many draws, for all colours."""
    channels = 0.4 * torch.randn(30, 2, 3)
    d = DiscretizedLogisticMixture.from_channels(channels)
    d = DiscretizedLogisticMixture(d.logits, d.loc / 2, d.log_scale - 4, d.coefficients)
    samples = d.sample((40_000,))
    error = samples.std(0) / 200
    assert ((d.mean - samples.mean(0)).abs() < 4.5 * error).all()
    # It takes each colour's coefficients: without them it is far off.
    without = DiscretizedLogisticMixture(
        d.logits, d.loc, d.log_scale, torch.zeros_like(d.coefficients)
    )
    assert ((without.mean - samples.mean(0)).abs() > 4.5 * error)[1:].any(-1).any(-1).all()


def test_mixture_mode() -> None:
    """The centre of the heavier component, each colour given the levels before; clamped."""
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
    # With a narrow heaviest component nothing is more probable.
    assert (d.log_prob(d.mode) >= d.log_prob(d.sample((200,)))).all()


def test_layout_in_memory_changes_nothing() -> None:
    """Channels last, as convolutions may leave them."""
    channels, value = torch.randn(2, 20, 4, 5), images(2, 3, 4, 5)
    last = channels.to(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    of_both = (
        DiscretizedLogisticMixture.from_channels(c).log_prob(value) for c in (channels, last)
    )
    assert torch.equal(*of_both)


# Gradients


def some_levels(*shape: int) -> Tensor:
    """Levels in double precision, the extreme ones among them."""
    value = images(*shape).double()
    value.view(-1)[:2] = torch.tensor([0.0, 1.0]).double()
    return value


def test_logistic_gradients() -> None:
    """Against finite differences, and at the very centre and edges of a bin."""
    value = torch.tensor([0, 1, 37, 128, 254, 255]).double() / 255
    loc = torch.tensor([0.1, 0.02, 0.15, 128.5 / 256, 255 / 256, 0.9]).double().requires_grad_()
    log_scale = torch.tensor([-2, -5, -4, -4, -3, -1]).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda loc, log_scale: DiscretizedLogistic(loc, log_scale).log_prob(value),
        (loc, log_scale),
    )
    assert torch.autograd.gradgradcheck(
        lambda loc, log_scale: DiscretizedLogistic(loc, log_scale).log_prob(value),
        (loc, log_scale),
    )


@pytest.mark.parametrize("shift", [0.0, -5.0, 8.0], ids=["mass", "narrow", "wide"])
def test_mixture_gradients(shift: float) -> None:
    """Against finite differences; `wide` ones have the stand-in in all bins but the extreme."""
    value = some_levels(2, 3, 1, 2)
    channels = torch.randn(2, 20, 1, 2).double()
    with torch.no_grad():
        scales = channels[:, 2:].unflatten(1, (3, 3, 2))[:, :, 1]
        scales.copy_(scales.clamp(-1.5, 1.5) + shift)
    channels.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda c: DiscretizedLogisticMixture.from_channels(c).log_prob(value), (channels,)
    )


def finite(tensor: Tensor | None) -> bool:
    return tensor is not None and bool(tensor.isfinite().all())


def test_logistic_is_finite_at_extremes() -> None:
    """Value and gradient in single precision."""
    loc = torch.tensor([*LOCS, -30.0, 30.0]).view(-1, 1, 1).requires_grad_()
    log_scale = torch.tensor([*LOG_SCALES, 60.0, 100.0]).view(-1, 1).requires_grad_()
    log_prob = DiscretizedLogistic(loc, log_scale).log_prob(LEVELS)
    assert finite(log_prob)
    log_prob.sum().backward()
    assert finite(loc.grad)
    assert finite(log_scale.grad)


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


def test_no_more_than_certain() -> None:
    """A mass is never above 1, but for what rounding adds."""
    values = LEVELS.view(256, 1, 1, 1).expand(256, 3, 1, 1)
    for loc, log_scale in itertools.product(LOCS, LOG_SCALES):
        d = one_component((loc,) * 3, (log_scale,) * 3)
        assert d.log_prob(values).max().item() <= 1e-6
        single = DiscretizedLogistic(torch.tensor(loc), torch.tensor(log_scale))
        assert single.log_prob(LEVELS).max().item() <= 1e-6


# What Pyro asks of a distribution


@each_batch
@each_maker
def test_shapes(make: Callable[..., Any], event_shape: Shape, batch_shape: Shape) -> None:
    d = make(batch_shape)
    assert d.batch_shape == batch_shape
    assert d.event_shape == event_shape
    assert d.event_dim == len(event_shape) == d.support.event_dim
    for sample_shape in ((), (1,), (5,), (5, 2)):
        value = d.sample(torch.Size(sample_shape))
        assert value.shape == d.shape(sample_shape) == (*sample_shape, *batch_shape, *event_shape)
        assert value.dtype == torch.float32
        assert d.log_prob(value).shape == (*sample_shape, *batch_shape)
        assert d.support.check(value).all()
        assert d.support.check(value).shape == (*sample_shape, *batch_shape)
    assert d().shape == d.shape()
    assert d.mean.shape == d.mode.shape == d.shape()
    assert d.support.check(d.mode).all()


@each_maker
def test_no_gradient_through_samples(make: Callable[..., Any], event_shape: Shape) -> None:
    """Samples are discrete; the score function is what there is."""
    d = make((4,))
    assert d.support.is_discrete
    assert not d.has_rsample
    assert not d.has_enumerate_support
    with pytest.raises(NotImplementedError):
        d.enumerate_support()
    value = d.sample()
    parts = d.score_parts(value)
    assert_close(parts.log_prob, d.log_prob(value))
    assert_close(parts.score_function, d.log_prob(value))
    assert parts.entropy_term == 0


def test_samples_carry_no_graph() -> None:
    loc = torch.zeros(3, 2, 1, 1, requires_grad=True)
    d = DiscretizedLogisticMixture(torch.zeros(2, 1, 1), loc, loc - 2, loc.tanh())
    assert not d.sample().requires_grad
    assert not DiscretizedLogistic(loc, loc).sample().requires_grad
    assert d.log_prob(d.sample()).requires_grad


@pytest.mark.parametrize("new_shape", [(4,), (2, 4), (3, 2, 4), (5, 1, 4)], ids=str)
@each_maker
def test_expand(make: Callable[..., Any], event_shape: Shape, new_shape: Shape) -> None:
    """New dimensions on the left; values as before."""
    d = make((4,))
    large = d.expand(torch.Size(new_shape))
    assert type(large) is type(d)
    assert large.batch_shape == new_shape
    assert large.event_shape == event_shape
    value = d.sample()
    assert_close(large.log_prob(value), d.log_prob(value).expand(new_shape))
    assert large.sample((7,)).shape == (7, *new_shape, *event_shape)
    assert_close(large.mean, d.mean.expand(*new_shape, *event_shape))
    by = d.expand_by((3, 2))
    assert by.batch_shape == (3, 2, 4)


@each_maker
def test_expand_existing_dimension(make: Callable[..., Any], event_shape: Shape) -> None:
    d = make((2, 1))
    large = d.expand((2, 5))
    value = large.sample()
    assert value.shape == (2, 5, *event_shape)
    expected = torch.stack([d.log_prob(v.unsqueeze(1)).squeeze(1) for v in value.unbind(1)], 1)
    assert_close(large.log_prob(value), expected)
    with pytest.raises(RuntimeError):
        large.expand((2, 4))


@each_maker
def test_batches_are_their_elements(make: Callable[..., Any], event_shape: Shape) -> None:
    """log_prob, mean and mode of a batch are those of its elements one by one."""
    d = make((3,))
    value = d.sample((2,))
    base = d.base_dist if len(event_shape) and isinstance(d, pyro.distributions.Independent) else d
    for i in range(3):
        parameters = {name: getattr(base, name)[i] for name in base.arg_constraints}
        one = type(base)(**parameters)
        one = one.to_event(3) if base is not d else one
        assert_close(d.log_prob(value)[:, i], one.log_prob(value[:, i]))
        assert_close(d.mean[i], one.mean)
        assert_close(d.mode[i], one.mode)


def test_parameters_broadcast() -> None:
    """Parameters may differ in batch shape; infer_shapes knows the outcome."""
    assert DiscretizedLogistic(torch.zeros(3, 1), torch.zeros(4)).batch_shape == (3, 4)
    assert DiscretizedLogistic.infer_shapes(loc=(3, 1), log_scale=(4,)) == ((3, 4), ())
    shapes: dict[str, Shape] = {
        "logits": (10, 5, 6),
        "loc": (2, 1, 3, 10, 5, 6),
        "log_scale": (7, 3, 10, 5, 6),
        "coefficients": (3, 10, 5, 6),
    }
    parameters: dict[str, Any] = {name: torch.zeros(shape) for name, shape in shapes.items()}
    d = DiscretizedLogisticMixture(**parameters)
    inferred = DiscretizedLogisticMixture.infer_shapes(**shapes)
    assert inferred == (d.batch_shape, d.event_shape) == ((2, 7), (3, 5, 6))
    value = d.sample()
    assert value.shape == (2, 7, 3, 5, 6)
    assert_close(d.log_prob(value)[1, 3], d.expand(torch.Size((3, 2, 7))).log_prob(value)[0, 1, 3])


@each_maker
def test_in_a_plate(make: Callable[..., Any], event_shape: Shape) -> None:
    """Traced, replayed, observed, subsampled and masked as any site."""
    d = make((4,))
    data = d.sample()
    mask = torch.tensor([True, False, True, True])

    def model(x: Tensor | None = None) -> Tensor:
        with pyro.plate("images", 8, subsample_size=4):
            return pyro.sample("x", d.mask(mask), obs=x)

    trace = poutine.trace(model).get_trace()
    assert trace.nodes["x"]["value"].shape == (4, *event_shape)
    again = poutine.trace(poutine.replay(model, trace)).get_trace()
    assert torch.equal(again.nodes["x"]["value"], trace.nodes["x"]["value"])
    observed = poutine.trace(model).get_trace(data)
    observed.compute_log_prob()
    assert_close(observed.nodes["x"]["log_prob"], 2 * d.log_prob(data) * mask)
    assert_close(observed.log_prob_sum(), observed.nodes["x"]["log_prob"].sum())


def test_pixels_can_be_masked() -> None:
    """Of independent pixels, some may be left out, as in-painting does."""
    d = logistic((3, 2, 3))
    mask = torch.rand(3, 2, 3) < 0.5
    value = d.sample()
    masked = d.mask(mask).to_event(3)
    assert_close(masked.log_prob(value), d.log_prob(value)[mask].sum())


def test_to_event() -> None:
    d = logistic((4, 3, 2, 3))
    value = d.sample()
    assert_close(d.to_event(3).log_prob(value), d.log_prob(value).sum((1, 2, 3)))
    batch = mixture((5, 4))
    value = batch.sample()
    assert batch.to_event(1).event_shape == (4, 3, 2, 3)
    assert_close(batch.to_event(1).log_prob(value), batch.log_prob(value).sum(1))


@each_maker
def test_pickles(make: Callable[..., Any], event_shape: Shape) -> None:
    d = make((4,))
    value = d.sample()
    assert_close(pickle.loads(pickle.dumps(d)).log_prob(value), d.log_prob(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_that_of_the_parameters(dtype: torch.dtype) -> None:
    for d in (logistic((2,), dtype), mixture((2,), dtype=dtype)):
        value = d.sample()
        assert value.dtype == d.log_prob(value).dtype == d.mean.dtype == d.mode.dtype == dtype


# Validation


def test_values_are_checked() -> None:
    """By name of what is wrong."""
    for d in (logistic((3, 2, 3)).to_event(3), mixture()):
        value = images(3, 2, 3)
        for wrong, message in {
            -0.5: r"values must be in \[0, 1\]; the least is -0.5, the greatest ",
            1.5: r"values must be in \[0, 1\]; the least is .*, the greatest 1.5",
            math.nan: r"values must be in \[0, 1\]",
            0.3001: r"must be levels k/255 of 8-bit images; 1 are between two, such as 0.3001",
        }.items():
            damaged = value.clone()
            damaged[1, 1, 2] = wrong
            with pytest.raises(ValueError, match=message):
                d.log_prob(damaged)
        # Pictures of other ranges
        with pytest.raises(ValueError, match=r"the greatest 255"):
            d.log_prob(torch.full((3, 2, 3), 255.0))


@pytest.mark.parametrize("shape", [(1, 2, 3), (4, 2, 3), (3, 3, 2), (2, 3), (5, 1, 2, 3)], ids=str)
def test_mixture_takes_images_of_its_shape(shape: Shape) -> None:
    """A grey image is not broadcast to three colours."""
    with pytest.raises(ValueError, match=r"images of shape \(3, 2, 3\) are expected"):
        mixture((5,)).log_prob(images(*shape))


@each_maker
def test_values_have_the_batch_shape(make: Callable[..., Any], event_shape: Shape) -> None:
    with pytest.raises(ValueError, match="broadcast"):
        make((4,)).log_prob(images(3, *event_shape))


def test_parameters_are_checked() -> None:
    with pytest.raises(ValueError, match="parameter loc"):
        DiscretizedLogistic(torch.tensor(math.nan), torch.tensor(0.0))
    with pytest.raises(ValueError, match="parameter log_scale"):
        DiscretizedLogistic(torch.tensor(0.0), torch.tensor(math.nan))
    good = mixture((2,))
    parameters = {name: getattr(good, name) for name in good.arg_constraints}
    for name, wrong in {
        "logits": math.nan,
        "loc": math.nan,
        "log_scale": math.nan,
        "coefficients": 1.01,
    }.items():
        damaged = parameters[name].clone()
        damaged.view(-1)[0] = wrong
        with pytest.raises(ValueError, match=f"parameter {name}"):
            DiscretizedLogisticMixture(**(parameters | {name: damaged}))


@pytest.mark.parametrize("channels", [99, 101, 3, 0])
def test_channels_are_counted(channels: int) -> None:
    with pytest.raises(ValueError, match=f"10 channels per component; {channels} "):
        DiscretizedLogisticMixture.from_channels(torch.zeros(2, channels, 4, 4))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("logits", (10,)),
        ("loc", (10, 4, 5)),
        ("loc", (1, 10, 4, 5)),
        ("log_scale", (3, 9, 4, 5)),
        ("coefficients", (3, 10, 5, 4)),
    ],
    ids=str,
)
def test_shapes_of_parameters_are_checked(name: str, shape: Shape) -> None:
    """Before anything is broadcast, whether validation is on or off."""
    shapes: dict[str, Shape] = {"logits": (10, 4, 5)}
    shapes |= dict.fromkeys(("loc", "log_scale", "coefficients"), (3, 10, 4, 5))
    parameters = {n: torch.zeros(s) for n, s in (shapes | {name: shape}).items()}
    with pytest.raises(ValueError, match=f"{name} has shape"):
        DiscretizedLogisticMixture(**parameters, validate_args=False)


def test_validation_off() -> None:
    """Nothing is checked, and an expanded distribution is as strict as the one it came from."""
    value = torch.full((3, 2, 3), 0.3001)
    relaxed: list[Any] = [
        DiscretizedLogistic(*torch.zeros(2, 3, 2, 3), validate_args=False),
        DiscretizedLogisticMixture.from_channels(torch.zeros(20, 2, 3), validate_args=False),
    ]
    for d in relaxed:
        assert finite(d.log_prob(value))
        larger = d.expand((2, *d.batch_shape))
        assert finite(larger.log_prob(value))
        strict = type(d)(**{n: getattr(d, n) for n in d.arg_constraints}, validate_args=True)
        with pytest.raises(ValueError, match="levels"):
            strict.expand((2, *d.batch_shape)).log_prob(value)
