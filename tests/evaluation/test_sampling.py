"""Images of what each layer encodes: which latents are shared, drawn or at their mode; KL maps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.testing import assert_close

from datasets.images import PackedImages
from elbo import FreeBitsELBO
from guide import TopPosterior
from ladder_vae.evaluation.kl import by_position, mean_kl
from ladder_vae.evaluation.sampling import (
    Temperature,
    interpolations,
    layer_samples,
    prior_samples,
    reconstructions,
)
from runtime.errors import UserError

MakePair = Callable[..., tuple[Any, Any]]
DEEP = {
    "z_dims": [2] * 12,
    "downsample": [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0],
    "initial_downscaling": False,
}
SHAPES = [{}, {"skip": True, "learn_top_prior": True}, DEEP]


class Recorder(Messenger):
    """Keeps each pass of a three-layer ladder: latents, and their means given those above."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[dict[str, tuple[Tensor, Tensor]]] = []

    def _pyro_post_sample(self, site: dict[str, Any]) -> None:
        if site["name"] == "z_3":
            self.passes.append({})
        if site["name"].startswith("z_"):
            self.passes[-1][site["name"]] = (site["value"], site["fn"].mean)


def equal(a: Tensor, b: Tensor) -> None:
    assert_close(a, b, rtol=0, atol=0)


def traced(program: Any, **arguments: Any) -> Any:
    with torch.no_grad():
        return poutine.trace(program).get_trace(**arguments)


@pytest.fixture(params=SHAPES, ids=["plain", "skip", "deep"])
def pair(request: pytest.FixtureRequest, make_pair: MakePair) -> tuple[Any, Any]:
    """A model and guide in evaluation mode."""
    model, guide = make_pair(**request.param)
    return model.eval(), guide.eval()


# --- Temperature ---


def test_temperature_one_is_plain_sampling(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    torch.manual_seed(1)
    plain = traced(model, n=3).nodes["x"]["fn"].mean
    torch.manual_seed(1)
    equal(prior_samples(model, 3), plain)
    torch.manual_seed(1)
    equal(prior_samples(model, 3, [1.0] * len(model.layers)), plain)


def test_temperature_zero_is_the_mode(pair: tuple[Any, Any]) -> None:
    """Every latent is its prior's mean, and all images are the same one."""
    model, _ = pair
    trace = traced(Temperature(0.0)(model), n=2)
    plain = traced(poutine.condition(model, data=values(trace)), n=2)
    for i in range(1, len(model.layers) + 1):
        equal(trace.nodes[f"z_{i}"]["value"], plain.nodes[f"z_{i}"]["fn"].mean)
    images = prior_samples(model, 2, 0.0)
    assert_close(images[0], images[1])
    equal(images, trace.nodes["x"]["fn"].mean)


def values(trace: Any) -> dict[str, Tensor]:
    """The latents of a trace by name."""
    return {name: trace.nodes[name]["value"] for name in trace.nodes if name.startswith("z_")}


def test_temperature_scales_each_layers_standard_deviation(make_pair: MakePair) -> None:
    model = make_pair()[0].eval()
    temperatures = [0.5, 2.0, 0.25]  # powers of two, so that products are exact
    trace = traced(Temperature(temperatures)(model), n=2)
    plain = traced(poutine.condition(model, data=values(trace)), n=2)
    for i, temperature in enumerate(temperatures, start=1):
        scaled, prior = (t.nodes[f"z_{i}"]["fn"].base_dist for t in (trace, plain))
        equal(scaled.stddev, prior.stddev * temperature)
        equal(scaled.mean, prior.mean)


def test_temperature_around_the_guide_scales_the_posterior(make_pair: MakePair, x: Tensor) -> None:
    _, guide = make_pair()
    guide.eval()
    with torch.no_grad(), Temperature(0.0):
        guide(x)
    means = values(guide.get_traces()[1])
    with torch.no_grad(), poutine.condition(data=means):
        guide(x)
    for name, site in guide.get_traces()[1].nodes.items():
        if name in means:
            equal(means[name], site["fn"].mean)


@pytest.mark.parametrize(
    ("temperature", "message"),
    [
        ([1.0, 0.5], "--temperature has 2 values but the ladder has 3 layers"),
        (-1.0, "--temperature is -1.0; it must be finite and not negative"),
        ([1.0, float("nan"), 1.0], "--temperature is nan; it must be finite"),
    ],
)
def test_temperatures_that_make_no_sense(
    temperature: Any, message: str, make_pair: MakePair
) -> None:
    with pytest.raises(UserError, match=message):
        prior_samples(make_pair()[0].eval(), 2, temperature)


# --- Layers ---


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_a_row_shares_what_is_above_and_differs_at_its_layer(
    layer: int, make_pair: MakePair
) -> None:
    model = make_pair(skip=True)[0].eval()
    with Recorder() as recorder:
        images = layer_samples(model, layer, rows=2, columns=4)
    assert images.shape == (2, 4, 1, 8, 10)
    for i in (1, 2, 3):
        value, mean = (t.unflatten(0, (2, 4)) for t in recorder.passes[-1][f"z_{i}"])
        if i > layer:
            equal(value, value[:, :1].expand_as(value))
            assert (value[0, 0] != value[1, 0]).all()
        elif i == layer:
            # Both rows' columns are eight different draws.
            assert len(value.flatten(0, 1).flatten(1)[:, 0].unique()) == 8
            assert (value != mean).all()
        else:
            equal(value, mean)


def test_the_latents_above_are_samples_of_the_prior(make_pair: MakePair) -> None:
    """They are those that plain sampling draws from the same seed."""
    model = make_pair(skip=True)[0].eval()
    torch.manual_seed(2)
    plain = traced(model, n=2)
    torch.manual_seed(2)
    with Recorder() as recorder:
        layer_samples(model, 1, rows=2, columns=3)
    for name in ("z_3", "z_2"):
        equal(recorder.passes[-1][name][0][::3], plain.nodes[name]["value"])


def test_images_are_the_means_of_their_latents(make_pair: MakePair) -> None:
    model = make_pair()[0].eval()
    with Recorder() as recorder:
        images = layer_samples(model, 2, rows=2, columns=3)
    latents = {name: value for name, (value, _) in recorder.passes[-1].items()}
    again = traced(poutine.condition(model, data=latents), n=6)
    equal(images.flatten(0, 1), again.nodes["x"]["fn"].mean)


def test_a_layer_that_is_not_heard_changes_nothing(make_pair: MakePair) -> None:
    """Without the latents of the lowest layer in its features, a row of that layer is one image."""
    model = make_pair(skip=True)[0].eval()
    nn.init.zeros_(model.layers[0].expand.weight)
    images = layer_samples(model, 1, rows=2, columns=3)
    assert_close(images, images[:, :1].expand_as(images))
    assert (images[0] - images[1]).abs().max() > 1e-4
    above = layer_samples(model, 2, rows=2, columns=3)
    assert (above[:, 0] - above[:, 1]).abs().max() > 1e-4


def test_layers_of_a_deep_ladder(make_pair: MakePair) -> None:
    model = make_pair(**DEEP)[0].eval()
    for layer in (1, 7, 12):
        assert layer_samples(model, layer, 1, 2).shape == (1, 2, 1, 8, 10)


@pytest.mark.parametrize("layer", [0, 4])
def test_a_layer_that_does_not_exist(layer: int, make_pair: MakePair) -> None:
    with pytest.raises(UserError, match=f"no layer {layer}; layers go from 1, the bottom, to 3"):
        layer_samples(make_pair()[0].eval(), layer, 2, 2)


# --- Interpolation ---


def mean_reconstructions(guide: Any, x: Tensor) -> Tensor:
    with Temperature(0.0):
        return reconstructions(guide, x)


def test_the_last_level_goes_from_reconstruction_to_reconstruction(
    pair: tuple[Any, Any], x: Tensor
) -> None:
    images = interpolations(*pair, x[:2], steps=4)
    assert images.shape == (len(pair[0].layers), 4, 1, 8, 10)
    assert_close(images[-1, [0, -1]], mean_reconstructions(pair[1], x[:2]))


def test_levels_interpolate_their_layers_and_leave_the_others_at_the_mode(
    make_pair: MakePair, x: Tensor
) -> None:
    model, guide = (module.eval() for module in make_pair(skip=True))
    with torch.no_grad(), Temperature(0.0):
        encoded = guide(x[:2])
    with Recorder() as recorder:
        interpolations(model, guide, x[:2], steps=3)
    _, *levels = recorder.passes
    assert len(levels) == 3
    for level, latents in zip((3, 2, 1), levels, strict=True):
        for i in (3, 2, 1):
            value, mean = latents[f"z_{i}"]
            if i >= level:
                first, second = encoded[f"z_{i}"]
                expected = torch.stack([first, (first + second) / 2, second])
                assert_close(value, expected)
            else:
                equal(value, mean)


def test_the_first_level_has_the_top_latents_of_its_ends(make_pair: MakePair, x: Tensor) -> None:
    model, guide = (module.eval() for module in make_pair())
    images = interpolations(model, guide, x[:2], steps=5)
    with torch.no_grad():
        top = guide.top_posterior(guide.bottom_up(x[:2])[-1]).mean
    expected = traced(Temperature(0.0)(poutine.condition(model, data={"z_3": top})), n=2)
    assert_close(images[0, [0, -1]], expected.nodes["x"]["fn"].mean)


def test_from_an_image_to_itself_nothing_moves(make_pair: MakePair, x: Tensor) -> None:
    model, guide = (module.eval() for module in make_pair())
    images = interpolations(model, guide, x[[0, 0]], steps=3)
    assert_close(images, images[:, :1].expand_as(images))


# --- KL maps ---


def test_kl_maps_sum_to_the_kl_of_each_layer(pair: tuple[Any, Any]) -> None:
    """In batches of four and one, from the same noise."""
    model, guide = pair
    pixels = np.random.default_rng(1).integers(0, 2, (7, 1, 8, 10), np.uint8)
    images, index = PackedImages.pack("made", "test", pixels), torch.tensor([5, 0, 3, 2, 6])
    torch.manual_seed(3)
    maps = by_position(mean_kl(guide, images, index, batch_size=4))
    torch.manual_seed(3)
    elbo = FreeBitsELBO(analytic_kl=True)
    with torch.no_grad():
        parts = [elbo.compute_terms(model, guide, images.batch(i)) for i in index.split(4)]
    kl = torch.cat([part.kl for part in parts]).mean(0)
    assert_close(torch.stack([m.sum() for m in maps]), kl)
    site = guide.get_traces()[0].nodes
    assert [m.shape for m in maps] == [
        site[f"z_{i}"]["value"].shape[-2:] for i in range(1, len(maps) + 1)
    ]


def test_a_kl_map_shows_where_the_posterior_differs(
    make_pair: MakePair, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A top posterior that is the prior but for one position, where its KL is known."""
    model, guide = (module.eval() for module in make_pair())
    model.top_prior.mean_log_variance.data.zero_()
    mean = torch.zeros(5, 2, 1, 2)
    mean[:, :, 0, 1] = torch.tensor([3.0, 1.0])
    posterior = dist.Normal(mean, torch.ones_like(mean)).to_event(3)
    monkeypatch.setattr(TopPosterior, "forward", lambda self, d: posterior)
    images = PackedImages.pack("made", "test", x.numpy().astype(np.uint8))
    top = by_position(mean_kl(guide, images, torch.arange(5), 5))[-1]
    equal(top, torch.tensor([[0.0, (3.0**2 + 1.0**2) / 2]]))
