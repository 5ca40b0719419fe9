"""The discretized logistic: closed forms, sums over levels, samples and gradients."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close

from ladder_vae.networks.discretized_logistic import DiscretizedLogistic
from tests.networks.logistic_definitions import (
    FAR_LOCS,
    FAR_LOG_SCALES,
    FLOOR,
    LEVELS,
    LOCS,
    LOG_SCALES,
    finite,
    indices,
    logistic_mass,
    one_component,
    p_value,
)


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


def test_logistic_agrees_with_its_definition() -> None:
    """All levels, at usual and extreme parameters, up to rounding."""
    k = torch.arange(256).double()
    for loc, log_scale in itertools.product(LOCS, LOG_SCALES):
        single = torch.tensor([loc, log_scale])
        expected = (logistic_mass(k, *single.double()) + FLOOR).log()
        d = DiscretizedLogistic(*single.double())
        assert_close(d.log_prob(k / 255), expected, rtol=1e-6, atol=1e-9)
        # Single precision rounds the bins' locations; the error is relative to the scale.
        rounding = 1e-6 * (1 + math.exp(-log_scale))
        ours = DiscretizedLogistic(*single).log_prob(LEVELS)
        assert_close(ours.double(), expected, rtol=1e-5, atol=rounding)


def test_logistic_mass_sums_to_one() -> None:
    """The constant 1e-7 is added 256 times."""
    loc = torch.cat([torch.tensor(LOCS), torch.randn(30)]).unsqueeze(1)
    log_scale = torch.cat([torch.tensor(LOG_SCALES), 2 * torch.randn(30)]).unsqueeze(0)
    d = DiscretizedLogistic(loc, log_scale)
    total = d.log_prob(LEVELS.view(256, 1, 1)).double().exp().sum(0)
    assert_close(total, torch.full_like(total, 1 + 256 * FLOOR), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("loc", "log_scale"), [(0.4, -4), (0.02, -3), (0.97, -1), (0.5, 3)])
def test_logistic_samples_have_the_mass(loc: float, log_scale: float) -> None:
    d = DiscretizedLogistic(torch.tensor(loc), torch.tensor(float(log_scale)))
    counts = indices(d.sample((200_000,))).bincount(minlength=256)
    mass = logistic_mass(torch.arange(256).double(), loc, log_scale)
    assert p_value(counts, mass) > 1e-3


def test_logistic_moments() -> None:
    """Mean and variance are the sums over the levels."""
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
    """The mode is the level with the largest mass."""
    for loc, log_scale in itertools.product(LOCS, LOG_SCALES):
        mode = DiscretizedLogistic(torch.tensor(loc), torch.tensor(log_scale)).mode
        (k,) = indices(mode.view(1))
        mass = logistic_mass(torch.arange(256).double(), loc, log_scale)
        # In wide distributions, single precision cannot distinguish the masses of levels.
        assert mass[k] >= mass.max() * (1 - 1e-6), (loc, log_scale)


def test_logistic_gradients() -> None:
    """Against finite differences, also at the centre and the edges of a bin."""
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("what", ["log_prob", "cdf", "mean", "variance"])
def test_logistic_is_finite_at_extremes(what: str, dtype: torch.dtype) -> None:
    """Value and gradient; the locations include edges of bins."""
    locs = torch.tensor([*LOCS, *FAR_LOCS, 1 / 256, 0.25], dtype=dtype)
    log_scales = torch.tensor([*LOG_SCALES, *FAR_LOG_SCALES], dtype=dtype)
    loc, log_scale = locs.view(-1, 1, 1).requires_grad_(), log_scales.view(-1, 1).requires_grad_()
    d = DiscretizedLogistic(loc, log_scale)
    found = getattr(d, what)
    value = found(LEVELS.to(dtype)) if callable(found) else found
    assert finite(value)
    value.sum().backward()
    assert finite(loc.grad)
    assert finite(log_scale.grad)
    for picture in (d.sample((50,)), d.mode, d.icdf(torch.tensor([0, 0.3, 0.5, 1], dtype=dtype))):
        assert d.support.check(picture).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("log_scale", [-30.0, -100.0, -1e30])
def test_logistic_of_vanishing_scale(log_scale: float, dtype: torch.dtype) -> None:
    """All mass is on the location's level."""
    loc = torch.tensor([-1e30, -0.1, 100.5 / 256, 1.1], dtype=dtype)
    mass = DiscretizedLogistic(loc, torch.tensor(log_scale, dtype=dtype)).log_prob(
        LEVELS.to(dtype).view(-1, 1)
    )
    expected = torch.zeros(256, 4, dtype=dtype)
    expected[[0, 0, 100, 255], [0, 1, 2, 3]] = 1
    assert_close(mass, (expected + FLOOR).log())


# --- Cumulative probabilities ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logistic_cdf_sums_the_masses(dtype: torch.dtype) -> None:
    k = torch.arange(256).double()
    for loc, log_scale in itertools.product(LOCS, LOG_SCALES):
        d = DiscretizedLogistic(
            torch.tensor(loc, dtype=dtype), torch.tensor(log_scale, dtype=dtype)
        )
        expected = logistic_mass(k, d.loc.double(), d.log_scale.double()).cumsum(0)
        # Single precision rounds the edges of the bins; the error is relative to the scale.
        rounding = 1e-9 if dtype == torch.float64 else 1e-7 * (1 + math.exp(-log_scale))
        cdf = d.cdf(d.enumerate_support())
        assert_close(cdf.double(), expected, rtol=0, atol=rounding)
        assert cdf[-1] == 1
    between = DiscretizedLogistic(d.loc, d.log_scale, validate_args=False)
    assert between.cdf(torch.tensor([-0.1, 1.5], dtype=dtype)).tolist() == [0, 1]
    assert between.cdf(LEVELS[7].to(dtype) + 0.003) == between.cdf(LEVELS[7].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logistic_icdf_inverts_cdf(dtype: torch.dtype) -> None:
    """The lowest level whose cumulative probability is at least the given one."""
    some = torch.cat([torch.tensor([0.0, 0.5, 1.0]), torch.rand(200)]).to(dtype)
    for loc, log_scale in itertools.product((-1.0, 0.0, 0.3, 0.5, 1.2), LOG_SCALES):
        d = DiscretizedLogistic(
            torch.tensor(loc, dtype=dtype), torch.tensor(log_scale, dtype=dtype)
        )
        cdf = d.cdf(d.enumerate_support())
        wanted = torch.cat([some, cdf])
        k = (d.icdf(wanted) * 255).round().long()
        # The last bit of a sigmoid depends on its place in a tensor.
        rounding = 4 * torch.finfo(dtype).eps
        assert (cdf[k] >= wanted - rounding).all()
        below = torch.where(k > 0, cdf[k - 1], -1)
        assert (below < wanted + rounding).all()
    samples = DiscretizedLogistic(torch.tensor(0.4), torch.tensor(-3.0)).icdf(torch.rand(200_000))
    counts = indices(samples).bincount(minlength=256)
    assert p_value(counts, logistic_mass(torch.arange(256).double(), 0.4, -3.0)) > 1e-3


def test_logistic_support_is_enumerated() -> None:
    d = DiscretizedLogistic(torch.zeros(2, 3), torch.zeros(3))
    assert d.enumerate_support(expand=False).shape == (256, 1, 1)
    assert torch.equal(d.enumerate_support(), LEVELS.view(256, 1, 1).expand(256, 2, 3))
    total = d.log_prob(d.enumerate_support()).exp().sum(0)
    assert_close(total, torch.full((2, 3), 1 + 256 * FLOOR))


def test_no_more_than_certain() -> None:
    """No mass exceeds 1 by more than rounding."""
    values = LEVELS.view(256, 1, 1, 1).expand(256, 3, 1, 1)
    for loc, log_scale in itertools.product(LOCS, LOG_SCALES):
        d = one_component((loc,) * 3, (log_scale,) * 3)
        assert d.log_prob(values).max().item() <= 1e-6
        single = DiscretizedLogistic(torch.tensor(loc), torch.tensor(log_scale))
        assert single.log_prob(LEVELS).max().item() <= 1e-6


@pytest.mark.parametrize("loc", [-1e3, 1e3])
def test_samples_at_extremes(loc: float) -> None:
    """All mass on one level, and all mass on the first and last level."""
    level = float(loc > 0)
    assert (DiscretizedLogistic(torch.tensor(loc), torch.tensor(-7.0)).sample((99,)) == level).all()
    d = one_component((loc, loc, loc), (-7, -7, -7))
    assert (d.sample((99,)) == level).all()
    wide = one_component((0, 0, 0), (20, 20, 20)).sample((1000,))
    assert ((wide == 0) | (wide == 1)).all()
    assert 0.45 < wide.mean().item() < 0.55
