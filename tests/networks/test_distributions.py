"""Both discretized distributions obey Pyro's rules for distributions."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.testing import assert_close

from ladder_vae.networks.discretized_logistic import DiscretizedLogistic
from ladder_vae.networks.discretized_logistic_mixture import DiscretizedLogisticMixture
from tests.networks.logistic_definitions import Shape, finite, images, logistic, mixture

MAKERS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "logistic": (logistic, ()),
    "images of logistics": (lambda shape=(): logistic((*shape, 3, 2, 3)).to_event(3), (3, 2, 3)),
    "mixture": (mixture, (3, 2, 3)),
}
each_maker = pytest.mark.parametrize(("make", "event_shape"), MAKERS.values(), ids=MAKERS.keys())
each_batch = pytest.mark.parametrize("batch_shape", [(), (4,), (2, 4), (2, 1, 4)], ids=str)


@each_maker
def test_samples_vary(make: Callable[..., Any], event_shape: Shape) -> None:
    """An expanded distribution draws each element independently."""
    samples = make().expand((6,)).sample((5,)).flatten(0, 1)
    assert len(samples.unique(dim=0)) >= (25 if event_shape else 3)


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
    """Samples are discrete: only the score function gives gradients."""
    d = make((4,))
    assert d.support.is_discrete
    assert not d.has_rsample
    if isinstance(d, DiscretizedLogistic):
        assert d.has_enumerate_support
    else:  # too many images
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
    """Expanding adds dimensions on the left and keeps values."""
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
    """log_prob, mean and mode of a batch equal those of its elements."""
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
    """Parameters of different batch shapes broadcast; infer_shapes predicts the result."""
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
    """As a Pyro site it can be traced, replayed, observed, subsampled and masked."""
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
    """Independent pixels can be masked one by one, as in-painting does."""
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


def test_values_are_checked() -> None:
    """The error says what is wrong."""
    for d in (logistic((3, 2, 3)).to_event(3), mixture()):
        value = images(3, 2, 3)
        for wrong, message in {
            -0.5: r"values must be in \[0, 1\]; the least is -0.5, the greatest ",
            1.5: r"values must be in \[0, 1\]; the least is .*, the greatest 1.5",
            math.nan: r"values must be in \[0, 1\]",
            0.3001: r"levels k/255 of 8-bit images; 1 are between two levels, such as 0.3001",
        }.items():
            damaged = value.clone()
            damaged[1, 1, 2] = wrong
            with pytest.raises(ValueError, match=message):
                d.log_prob(damaged)
        # Images in [0, 255]
        with pytest.raises(ValueError, match=r"the greatest 255"):
            d.log_prob(torch.full((3, 2, 3), 255.0))


@pytest.mark.parametrize("shape", [(1, 2, 3), (4, 2, 3), (3, 3, 2), (2, 3), (5, 1, 2, 3)], ids=str)
def test_mixture_takes_images_of_its_shape(shape: Shape) -> None:
    """A grey image is not broadcast to three colours."""
    with pytest.raises(ValueError, match=r"they must be images of shape \(3, 2, 3\)"):
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
    """Shapes are checked even without validation."""
    shapes: dict[str, Shape] = {"logits": (10, 4, 5)}
    shapes |= dict.fromkeys(("loc", "log_scale", "coefficients"), (3, 10, 4, 5))
    parameters = {n: torch.zeros(s) for n, s in (shapes | {name: shape}).items()}
    with pytest.raises(ValueError, match=f"{name} has shape"):
        DiscretizedLogisticMixture(**parameters, validate_args=False)


def test_validation_off() -> None:
    """Nothing is checked; an expanded distribution keeps the setting."""
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
