"""In-painting compared with exact conditional distributions, and its masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from PIL import Image
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from guide import build_ladder
from ladder_vae.evaluation.inpainting import MASKS, Completions, inpaint, read_mask
from ladder_vae.networks import LadderConfig
from tests.made_data import refusal

MakePair = Callable[..., tuple[Any, Any]]

RIGHT = torch.tensor([[False, True], [False, True]])  # of 2x2 pixels


def complete(pair: tuple[Any, Any], x: Tensor, missing: Tensor, **options: Any) -> Completions:
    settings: dict[str, Any] = {"chains": 3, "sweeps": 6, "warmup": 2, "batch_size": 100, "seed": 0}
    return inpaint(*pair, x, missing, **(settings | options))


# --- A Bernoulli ladder, its conditionals by numerical integration ---


@pytest.fixture
def scalar_ladder() -> tuple[Any, Any]:
    """Two scalar latents, and logits of 2x2 pixels linear in the lower one.

    The guide's weights are random, so its posterior hardly depends on the image.
    """
    torch.manual_seed(1)
    config = LadderConfig(
        z_dims=[1, 1],
        downsample=[1, 0],
        blocks_per_layer=1,
        n_filters=4,
        batchnorm=False,
        dropout=0.0,
        initial_downscaling=False,
        likelihood="bernoulli",
    )
    model: Any
    model, guide = build_ladder(config, (1, 2, 2))
    model.layers[1].blocks = nn.Identity()
    model.layers[0].blocks = nn.Upsample(scale_factor=2)
    model.decoder = nn.Identity()
    for conv in (*(layer.expand for layer in model.layers), model.priors[0].conv):
        nn.init.normal_(conv.weight)
    nn.init.normal_(model.likelihood.conv.weight)
    return model.eval(), guide.eval()


class NoiseGrid(Messenger):
    """Makes the latent z_i the mean of its prior plus `noise[z_i]` (G,) standard deviations."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.noise:
            normal = msg["fn"].base_dist
            msg["value"] = normal.loc + normal.scale * self.noise[msg["name"]].view(-1, 1, 1, 1)
            msg["done"] = True


def image_probabilities(model: Any) -> Tensor:
    """p(x) of all 16 images, (2, 2, 2, 2) by pixel, by the trapezoidal rule over both latents."""
    z_1, z_2 = torch.cartesian_prod(*[torch.linspace(-6, 6, 121)] * 2).T
    weights = (-(z_1**2 + z_2**2) / 2).double().softmax(0)
    likelihoods: list[Any] = []
    handle = model.likelihood.register_forward_hook(lambda *call: likelihoods.append(call[-1]))
    with torch.no_grad(), NoiseGrid({"z_1": z_1, "z_2": z_2}):
        model(n=len(weights))
    handle.remove()
    on = likelihoods[0].mean.double().flatten(1)  # (G, 4)
    pixels = [torch.stack([1 - p, p], 1) for p in on.T]
    return torch.einsum("g,ga,gb,gc,gd->abcd", weights, *pixels)


def frequencies(images: Tensor) -> Tensor:
    """The frequencies of the right columns of images (M, 1, 2, 2): (2, 2) by pixel value."""
    upper, lower = images[:, 0, :, 1].long().unbind(1)
    counts = torch.bincount(2 * upper + lower, minlength=4).double()
    return counts.view(2, 2) / len(images)


def test_chains_draw_from_the_exact_conditional(scalar_ladder: tuple[Any, Any]) -> None:
    """The frequencies of the last images, and the mean, are those of p(x_mis | x_obs).

    Those of chains that accept almost all proposals are not: the guide is far from the posterior.
    """
    joint = image_probabilities(scalar_ladder[0])
    chains = 1000
    x = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    size = {"chains": chains, "batch_size": 2 * chains}
    found = complete(scalar_ladder, x, RIGHT, sweeps=60, warmup=5, **size)
    pseudo_gibbs = complete(scalar_ladder, x, RIGHT, sweeps=11, warmup=10, **size)
    assert ((found.acceptance > 0.1) & (found.acceptance < 0.5)).all()
    for i, least_error_without in enumerate([5, 15]):
        left = x[i, 0, :, 0].long()
        exact = joint[left[0], :, left[1], :]
        exact = exact / exact.sum()
        error = (exact * (1 - exact) / chains).sqrt()
        assert ((frequencies(found.images[i]) - exact).abs() < 4 * error).all()
        off = (frequencies(pseudo_gibbs.images[i]) - exact).abs() / error
        assert off.max() > least_error_without
        marginal = torch.stack([exact[1].sum(), exact[:, 1].sum()])
        # The mean over sweeps of p(x_mis | z) varies no more than a draw of x_mis does.
        error = (marginal * (1 - marginal) / chains).sqrt()
        assert ((found.mean[i, 0, :, 1] - marginal).abs() < 4 * error).all()


# --- A linear ladder, all of it in closed form ---

SLOPES = torch.tensor([[0.05, 0.1], [0.03, 0.08]], dtype=torch.float64)  # of 2x2 pixels
NOISE = 0.05


class LinearModel(nn.Module):
    """z_2 ~ N(0, 1), z_1 ~ N(z_2, 1) and pixels N(0.5 + slope z_1, noise^2)."""

    def forward(self, x: Tensor | None = None, n: int = 1) -> Tensor:
        with pyro.plate("images", n if x is None else len(x)) as images:
            zero = torch.zeros(len(images), 1, 1, 1, dtype=torch.float64)
            z_2 = pyro.sample("z_2", dist.Normal(zero, 1.0).to_event(3))
            z_1 = pyro.sample("z_1", dist.Normal(z_2, 1.0).to_event(3))
            return pyro.sample("x", dist.Normal(0.5 + SLOPES * z_1, NOISE).to_event(3), obs=x)


class ExactGuide(GuideMessenger):
    """q(z | x) = p(z | x), which depends on the image only by its projection on the slopes."""

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        return [(SLOPES * (x - 0.5)).sum((1, 2, 3), keepdim=True) / NOISE**2]

    def __call__(self, x: Tensor, features: list[Tensor]) -> dict[str, Tensor]:
        self.projection = features[0]
        return super().__call__(x)

    def get_posterior(self, name: str, prior: Any) -> dist.TorchDistribution:
        information = (SLOPES**2).sum() / NOISE**2  # of the image on z_1
        if name == "z_1":
            precision = information + 1
            mean = (self.projection + self.upstream_value("z_2")) / precision
        else:
            # Given z_2, the projection is N(information z_2, information^2 + information).
            precision = information / (information + 1) + 1
            mean = self.projection / (information + 1) / precision
        return dist.Normal(mean, precision**-0.5).to_event(3)


def test_an_exact_guide_has_every_proposal_accepted() -> None:
    """All proposals are accepted, and completions have the moments of the conditional Normal."""
    model = LinearModel()
    x = torch.tensor([[[[0.65, 0.0], [0.6, 0.0]]]], dtype=torch.float64)
    chains = 2000
    pair = (model, ExactGuide(model))
    found = complete(pair, x, RIGHT, chains=chains, sweeps=30, warmup=1, batch_size=chains)
    assert found.acceptance.tolist() == [1.0]
    # The pixels' covariance is 2 slopes slopes' + noise^2, that of z_1 being 2.
    slopes = SLOPES.T.flatten()  # the left column, then the right one
    covariance = 2 * slopes.outer(slopes) + NOISE**2 * torch.eye(4, dtype=torch.float64)
    gain = covariance[2:, :2] @ covariance[:2, :2].inverse()
    mean = 0.5 + gain @ (x[0, 0, :, 0] - 0.5)
    conditional = covariance[2:, 2:] - gain @ covariance[:2, 2:]
    right = found.images[0, :, 0, :, 1]  # (chains, 2)
    error = (conditional.diagonal() / chains).sqrt()
    assert ((right.mean(0) - mean).abs() < 4 * error).all()
    assert ((found.mean[0, 0, :, 1] - mean).abs() < 4 * error).all()
    # Var of a covariance's estimate: (c_ij^2 + c_ii c_jj) / M.
    variances = conditional.diagonal()
    error = ((conditional**2 + variances.outer(variances)) / chains).sqrt()
    assert ((right.T.cov() - conditional).abs() < 4 * error).all()


# --- Every likelihood ---

MISSING = torch.zeros(8, 10, dtype=torch.bool)
MISSING[2:7, 3:] = True


@pytest.mark.parametrize(
    ("likelihood", "channels"),
    [("bernoulli", 1), ("bernoulli", 3), ("gaussian", 1), ("discr_log", 1), ("discr_log_mix", 3)],
)
def test_completed_images(make_pair: MakePair, likelihood: str, channels: int) -> None:
    """Known pixels stay as they are, to the bit; the others are values that images have."""
    model, guide = make_pair((channels, 8, 10), likelihood=likelihood)
    pair = (model.eval(), guide.eval())
    levels = 1 if likelihood == "bernoulli" else 255
    x = torch.randint(0, levels + 1, (2, channels, 8, 10)) / levels
    found = complete(pair, x, MISSING)
    assert found.images.shape == (2, 3, channels, 8, 10)
    assert found.mean.shape == x.shape
    assert found.acceptance.shape == (2,)
    for image in found.images.unbind(1):
        assert torch.equal(image[..., ~MISSING], x[..., ~MISSING])
    assert torch.equal(found.mean[..., ~MISSING], x[..., ~MISSING])
    assert found.images.min() >= 0
    assert found.images.max() <= 1
    drawn = found.images[..., MISSING]
    if likelihood != "gaussian":
        assert torch.equal((drawn * levels).round() / levels, drawn)
    # Six chains, no two alike.
    assert len(torch.unique(drawn.flatten(0, 1), dim=0)) == 6
    assert ((found.acceptance >= 0) & (found.acceptance <= 1)).all()


def test_missing_pixels_are_not_read(make_pair: MakePair, x: Tensor) -> None:
    model, guide = make_pair()
    pair = (model.eval(), guide.eval())
    found = complete(pair, x, MISSING)
    other = torch.where(MISSING, torch.nan, x)
    for a, b in zip(
        vars(found).values(), vars(complete(pair, other, MISSING)).values(), strict=True
    ):
        assert torch.equal(a, b)


def test_the_seed_alone_decides(make_pair: MakePair, x: Tensor) -> None:
    """Two runs agree bit for bit, another seed differs, the global random state is unchanged."""
    model, guide = make_pair()
    pair = (model.eval(), guide.eval())
    first = complete(pair, x, MISSING, seed=4)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = complete(pair, x, MISSING, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.mean, again.mean)
    assert not torch.equal(first.images, complete(pair, x, MISSING, seed=5).images)


def test_chains_go_through_in_batches(make_pair: MakePair, x: Tensor) -> None:
    """Batches that divide an image's chains leave each chain its own image."""
    model, guide = make_pair()
    sizes: list[int] = []
    found = complete(
        (model.eval(), guide.eval()), x, MISSING, sweeps=3, batch_size=4, on_sweep=sizes.append
    )
    assert sizes == [4] * 9 + [3] * 3
    assert sum(sizes) == 5 * 3 * 3  # images, chains, sweeps
    known = found.images[..., ~MISSING]
    assert torch.equal(known, x[:, None][..., ~MISSING].expand_as(known))


def test_each_batch_has_noise_of_its_own(make_pair: MakePair, x: Tensor) -> None:
    """Chains that complete the same image one at a time end differently."""
    model, guide = make_pair()
    found = complete((model.eval(), guide.eval()), x[:1], MISSING, chains=4, batch_size=1)
    assert len(torch.unique(found.images[0], dim=0)) == 4


def test_the_warm_up_accepts_all(scalar_ladder: tuple[Any, Any]) -> None:
    """In a sweep of the warm-up only one pass of the guide is made: there is nothing to compare."""
    model, _ = scalar_ladder
    passes: list[int] = []
    model.decoder.register_forward_hook(lambda *call: passes.append(1))
    complete(scalar_ladder, torch.zeros(1, 1, 2, 2), RIGHT, sweeps=7, warmup=3)
    assert len(passes) == 1 + 3 + 2 * 4  # the first pixels, the warm-up, the rest


@pytest.mark.parametrize(
    "options", [{"chains": 0}, {"warmup": 0}, {"warmup": 6}, {"sweeps": 0}], ids=str
)
def test_chains_without_a_move_are_refused(
    scalar_ladder: tuple[Any, Any], options: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match="there must be a chain"):
        complete(scalar_ladder, torch.zeros(1, 1, 2, 2), RIGHT, **options)


# --- Masks ---


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("left", (0, 5), (0, 4)),
        ("right", (0, 5), (4, 8)),
        ("top", (0, 2), (0, 8)),
        ("bottom", (2, 5), (0, 8)),
        ("centre", (1, 4), (2, 6)),
    ],
)
def test_named_masks(name: str, rows: tuple[int, int], columns: tuple[int, int]) -> None:
    """Of images 5 high and 8 wide; from the first row and column to before the last."""
    expected = torch.zeros(5, 8, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(read_mask(name, (5, 8)), expected)


@pytest.mark.parametrize("size", [(28, 28), (7, 9), (2, 3)])
def test_halves_are_each_others_complement(size: tuple[int, int]) -> None:
    for one, other in (("left", "right"), ("top", "bottom")):
        assert torch.equal(read_mask(one, size), ~read_mask(other, size))
    centre = read_mask("centre", (28, 28))
    assert centre.sum() == 14 * 14
    assert torch.equal(centre, centre.flip(0, 1))


def test_mask_from_a_file(tmp_path: Path) -> None:
    """White from 128 on, in grey or colour."""
    levels = np.array([[0, 127, 128], [255, 10, 250]], np.uint8)
    grey = Image.fromarray(levels)
    for name, image in (("grey.png", grey), ("colour.bmp", grey.convert("RGB"))):
        image.save(tmp_path / name)
        mask = read_mask(str(tmp_path / name), (2, 3))
        assert mask.tolist() == [[False, False, True], [True, False, True]]


def test_masks_that_are_none(tmp_path: Path) -> None:
    def refused(name: str, levels: Any = None) -> str:
        if levels is not None:
            Image.fromarray(np.array(levels, np.uint8)).save(tmp_path / name)
        line = refusal(lambda: read_mask(str(tmp_path / name), (2, 3)))
        assert str(tmp_path / name) in line
        return line

    assert "there is no mask" in refused("lower.png")
    assert all(name in refused("lower") for name in MASKS)
    assert "there is no mask" in refused("l" * 300)
    assert "3 wide and 4 high; it must be 3 wide and 2 high" in refused("high.png", [[0] * 3] * 4)
    assert "masks no pixel" in refused("black.png", [[0] * 3] * 2)
    assert "masks every pixel" in refused("white.png", [[255] * 3] * 2)
    (tmp_path / "text.png").write_text("no image")
    assert "damaged or no image" in refused("text.png")
    assert "masks no pixel" in refusal(lambda: read_mask("left", (5, 1)))
    assert "masks every pixel" in refusal(lambda: read_mask("right", (5, 1)))
