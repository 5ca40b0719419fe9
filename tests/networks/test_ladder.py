"""The parts of model and guide: layers, sizes, top prior, and what depends on what."""

from typing import Any

import pytest
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from elbo import FreeBitsELBO
from guide import BottomUp, LadderGuide
from ladder_vae.networks.blocks import (
    ACTIVATIONS,
    Gate,
    ResidualBlock,
    SubPixelConv,
)
from ladder_vae.networks.normals import exponential
from model import Decoder, LadderModel, TopDownLayer, TopPrior
from tests.networks.blocks_definitions import (
    MakeConfig,
    MakePair,
    Noise,
    feature_map,
    noise_for,
    settled,
    style,
)


def test_the_configured_activation_is_everywhere(tiny_config: MakeConfig) -> None:
    """`nonlin` sets the activation of every block, of the gates and of the stem."""
    config = tiny_config(nonlin="selu", gated=True, skip=True)
    model = LadderModel(config.ladder, (1, 8, 8))
    guide = LadderGuide(model, config.ladder, (1, 8, 8))
    kinds = {type(activation()) for activation in ACTIVATIONS.values()}
    found = {type(m) for part in (model, guide) for m in part.modules()} & kinds
    assert found == {nn.SELU}


@pytest.mark.parametrize("merge_layers", ["linear", "residual"])
def test_which_merges_follow_the_option(tiny_config: MakeConfig, merge_layers: str) -> None:
    """`merge_layers` is the guide's merge; that of the skip connections is always residual."""
    config = tiny_config(merge_layers=merge_layers, skip=True)
    model: Any = LadderModel(config.ladder, (1, 8, 8))
    guide: Any = LadderGuide(model, config.ladder, (1, 8, 8))
    kind = {"linear": nn.Identity, "residual": ResidualBlock}[merge_layers]
    assert [type(q.merge.residual) for q in guide.posteriors] == [kind, kind]
    skips = [layer.skip for layer in model.layers]
    assert [type(skip.residual) for skip in skips[:-1]] == [ResidualBlock] * 2
    assert skips[-1] is None  # nothing above the top


@pytest.mark.parametrize("skip", [False, True])
def test_top_down_layer(skip: bool) -> None:
    """z expanded by a convolution, merged with h from above in that order, then the blocks."""
    layer = settled(TopDownLayer(style(), 2, 2, 1, skip=skip))
    z, h_above = feature_map(channels=2), feature_map()
    h = F.conv2d(F.pad(z, (1, 1, 1, 1)), layer.expand.weight, layer.expand.bias)
    if skip:
        merged = F.conv2d(torch.cat((h, h_above), dim=1), layer.skip.conv.weight)
        h = layer.skip.residual(merged + layer.skip.conv.bias.view(1, -1, 1, 1))
    y = layer(z, h_above)
    assert y.shape == (2, 4, 12, 10)
    assert_close(y, layer.blocks(h), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_gates_of_the_ladder(tiny_config: MakeConfig, gated: bool) -> None:
    """`gated` gates every residual block except the stem's."""
    config = tiny_config(gated=gated, merge_layers="linear", blocks_per_layer=2)
    model = LadderModel(config.ladder, (1, 8, 8))
    guide = LadderGuide(model, config.ladder, (1, 8, 8))
    stem = list(guide.bottom_up.stem)
    assert [type(m) for m in stem] == [nn.Conv2d, nn.ELU, ResidualBlock]
    blocks = [m for part in (model, guide) for m in part.modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == 1 + 6 + 6 + 2  # stem, bottom-up, top-down, full resolution
    for block in blocks:
        assert any(isinstance(m, Gate) for m in block.block) == (gated and block is not stem[2])


def test_stem(tiny_config: MakeConfig) -> None:
    """A 5x5 convolution, which halves the image with `initial_downscaling`."""
    for initial, stride in ((True, (2, 2)), (False, (1, 1))):
        config = tiny_config(initial_downscaling=initial)
        conv = BottomUp(config.ladder.block_style(), config.ladder, (3, 8, 8)).stem[0]
        assert isinstance(conv, nn.Conv2d)
        assert conv.weight.shape == (4, 3, 5, 5)
        assert (conv.stride, conv.padding) == (stride, (2, 2))


def test_padded_image_enters_and_cropped_map_leaves(tiny_config: MakeConfig) -> None:
    """The guide's padding and the decoder's cropping use the same positions."""
    config = tiny_config(initial_downscaling=False, downsample=[1, 1, 1])
    bottom_up = BottomUp(config.ladder.block_style(), config.ladder, (1, 5, 7))
    seen: list[Tensor] = []
    bottom_up.stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.rand(2, 1, 5, 7)
    bottom_up(x)
    expected = torch.zeros(2, 1, 8, 8)
    expected[..., 1:6, 0:7] = x
    assert torch.equal(seen[0], expected)

    decoder = settled(Decoder(config.ladder.block_style(), config.ladder, (5, 7)))
    h = feature_map(size=(8, 8))
    assert_close(decoder(h), decoder.blocks(h)[..., 1:6, 0:7])


def test_decoder_upsamples_bilinearly(tiny_config: MakeConfig) -> None:
    """The decoder doubles the size bilinearly, without aligned corners, then applies its blocks."""
    config = tiny_config(blocks_per_layer=2)
    decoder = settled(Decoder(config.ladder.block_style(), config.ladder, (8, 6)))
    x = h = feature_map(size=(4, 3))
    # Along an axis, each value and its neighbour are weighed 3 to 1; the ends are repeated.
    for axis in (2, 3):
        ends = [h.narrow(axis, 0, 1), h, h.narrow(axis, -1, 1)]
        around = torch.cat(ends, dim=axis)
        n = h.shape[axis]
        before, after = around.narrow(axis, 0, n), around.narrow(axis, 2, n)
        pairs = torch.stack((0.75 * h + 0.25 * before, 0.75 * h + 0.25 * after), dim=axis + 1)
        h = pairs.flatten(axis, axis + 1)
    assert len(decoder.blocks) == 2
    assert_close(decoder(x), decoder.blocks(h), rtol=1e-4, atol=1e-5)


def test_decoder_at_half_the_size(tiny_config: MakeConfig) -> None:
    """With `pixel_shuffle` the decoder neither upsamples nor crops: the likelihood's head does."""
    config = tiny_config(pixel_shuffle=True)
    decoder = settled(Decoder(config.ladder.block_style(), config.ladder, (5, 7)))
    h = feature_map(size=(4, 4))
    assert torch.equal(decoder(h), decoder.blocks(h))


def test_sub_pixel_convolution() -> None:
    """Each position's outputs become 2x2 pixels, and the padding of the image is cropped."""
    conv = SubPixelConv(4, 3, (5, 7))
    h = torch.randn(2, 4, 4, 4)
    outputs = conv.conv(h)  # (2, 12, 4, 4)
    expected = torch.empty(2, 3, 8, 8)
    for p in range(3):
        for a in range(2):
            for b in range(2):
                expected[:, p, a::2, b::2] = outputs[:, 4 * p + 2 * a + b]
    assert_close(conv(h), expected[:, :, 1:6, 0:7])
    assert_close(conv(h.expand(3, 2, 4, 4, 4))[1], conv(h))


SHAPES = [(1, 1, 1), (3, 7, 9), (1, 28, 28), (2, 13, 5)]
DOWNSAMPLE = [[0, 0, 0], [1, 1, 1], [0, 2, 1], [2, 0, 0]]


@pytest.mark.parametrize(
    ("image_shape", "downsample", "initial"),
    [
        (shape, downsample, (i + j) % 2 == 1)
        for i, shape in enumerate(SHAPES)
        for j, downsample in enumerate(DOWNSAMPLE)
    ],
)
def test_any_image_size(
    tiny_config: MakeConfig,
    image_shape: tuple[int, int, int],
    downsample: list[int],
    initial: bool,
) -> None:
    """Images of any size go in and come out, with latents of the configuration's sizes."""
    config = tiny_config(
        downsample=downsample,
        initial_downscaling=initial,
        blocks_per_layer=2,
        skip=True,
        pixel_shuffle=initial and downsample != [1, 1, 1],
    ).ladder
    model = LadderModel(config, image_shape).eval()
    guide: Any = LadderGuide(model, config, image_shape).eval()
    sizes = config.latent_sizes(image_shape[1:])
    # By the definition: the top layer's size is rounded up, and doubled going down.
    halvings, expected = int(initial), []
    for count in downsample:
        halvings += count
        total = sum(downsample) + initial
        expected.append(tuple(-(-s // 2**total) * 2 ** (total - halvings) for s in image_shape[1:]))
    assert sizes == expected
    latents = {
        f"z_{i + 1}": (2, z, *size)
        for i, (z, size) in enumerate(zip(config.z_dims, sizes, strict=True))
    }
    with torch.no_grad():
        sampled = poutine.trace(model).get_trace(n=2)
        x = torch.bernoulli(torch.full((2, *image_shape), 0.5))
        guide(x)
    model_trace, guide_trace = guide.get_traces()
    for name, shape in latents.items():
        assert sampled.nodes[name]["value"].shape == shape
        assert guide_trace.nodes[name]["value"].shape == shape
        assert guide_trace.nodes[name]["fn"].batch_shape == (2,)
    assert sampled.nodes["x"]["value"].shape == (2, *image_shape)
    assert model_trace.nodes["x"]["fn"].base_dist.logits.shape == (2, *image_shape)
    assert list(guide_trace.nodes) == ["z_3", "z_2", "z_1"]


@pytest.mark.parametrize("learned", [False, True])
def test_top_prior(make_pair: MakePair, x: Tensor, learned: bool) -> None:
    """Standard normal initially; learned or fixed."""
    prior = TopPrior(3, (2, 4), exponential, learned=learned)
    normal: Any = prior(5)
    assert (normal.batch_shape, normal.event_shape) == ((5,), (3, 2, 4))
    assert torch.equal(normal.base_dist.loc, torch.zeros(5, 3, 2, 4))
    assert torch.equal(normal.base_dist.scale, torch.ones(5, 3, 2, 4))

    model, guide = make_pair(learn_top_prior=learned)
    FreeBitsELBO()(model, guide)(x).backward()
    gradient = model.top_prior.mean_log_variance.grad
    if not learned:
        assert gradient is None
        return
    # By hand: that of sum_n -log p(z_3).
    z = guide.trace.nodes["z_3"]["value"].detach()
    top = model.top_prior.mean_log_variance.detach().requires_grad_()
    mean, log_variance = top.chunk(2, dim=1)
    (((z - mean) ** 2 / log_variance.exp() + log_variance) / 2).sum().backward()
    # z_3 itself does not depend on its prior.
    assert top.grad is not None
    assert_close(gradient, top.grad, rtol=1e-4, atol=1e-4)


def test_top_prior_is_shared_by_all_images(make_pair: MakePair) -> None:
    """All images have the same p(z_L), with values by channel and position."""
    model, _ = make_pair(learn_top_prior=True)
    trace = poutine.trace(model.eval()).get_trace(n=4)
    normal = trace.nodes["z_3"]["fn"].base_dist
    mean, log_variance = model.top_prior.mean_log_variance[0].chunk(2)
    assert len(mean.unique()) == mean.numel() == 2 * 1 * 2
    for k in range(4):
        assert torch.equal(normal.loc[k], mean)
        assert_close(normal.scale[k], log_variance.exp().sqrt())


@pytest.mark.parametrize("skip", [False, True])
def test_skip_connections(make_pair: MakePair, skip: bool) -> None:
    """Only skip connections let z_3 affect p(z_1) given z_2, and z_2 affect p(x) given z_1."""
    model, _ = make_pair(skip=skip)
    model.eval()
    with torch.no_grad():
        draws = [poutine.trace(model).get_trace(n=2).nodes for _ in range(2)]
    z, others = ({name: d[name]["value"] for name in ("z_1", "z_2", "z_3")} for d in draws)

    def parameters(site: str, *changed: str) -> Tensor:
        latents = z | {name: others[name] for name in changed}
        with torch.no_grad():
            nodes = poutine.trace(poutine.condition(model, latents)).get_trace(n=2).nodes
        fn = nodes[site]["fn"].base_dist
        return fn.logits if site == "x" else torch.cat((fn.loc, fn.scale), dim=1)

    for site, through_skips in {"z_1": ["z_3"], "x": ["z_3", "z_2"]}.items():
        for name in through_skips:
            assert torch.equal(parameters(site, name), parameters(site)) != skip
    for site, name in {"z_2": "z_3", "z_1": "z_2", "x": "z_1"}.items():
        assert not torch.equal(parameters(site, name), parameters(site))


def test_images_do_not_mix_in_evaluation(make_pair: MakePair, x: Tensor) -> None:
    """In evaluation mode an image's terms do not depend on its batch."""
    model, guide = make_pair(skip=True, gated=True)
    guide(x)  # changes the running statistics
    model.eval()
    guide.eval()
    noise = noise_for(model, len(x))
    for analytic in (False, True):
        elbo = FreeBitsELBO(analytic_kl=analytic)
        with torch.no_grad():
            with Noise(noise):
                together = elbo.compute_terms(model, guide, x)
            for k in range(len(x)):
                with Noise({name: eps[k : k + 1] for name, eps in noise.items()}):
                    alone = elbo.compute_terms(model, guide, x[k : k + 1])
                assert_close(together.log_likelihood[k], alone.log_likelihood[0])
                assert_close(together.kl[k], alone.kl[0], rtol=1e-4, atol=1e-4)
        assert len(together.elbo.unique()) == len(x)


def test_images_mix_in_training_only_by_batch_norm(make_pair: MakePair, x: Tensor) -> None:
    """In training mode, too, images only mix through batch norm."""
    for batchnorm in (False, True):
        model, guide = make_pair(batchnorm=batchnorm, dropout=0.0)
        noise = noise_for(model, len(x))
        kls = []
        for last in (x[-1:], 1 - x[-1:]):
            with Noise(noise), torch.no_grad():
                terms = FreeBitsELBO().compute_terms(model, guide, torch.cat((x[:-1], last)))
            kls.append(terms.kl[:-1])
        assert torch.equal(kls[0], kls[1]) != batchnorm
