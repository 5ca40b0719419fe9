"""The networks: blocks spelled out, sizes, initialisation, and how images and latents may mix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from elbo import FreeBitsELBO
from guide import BottomUp, LadderGuide
from ladder_vae.networks.blocks import (
    ACTIVATIONS,
    RESIDUAL_TYPES,
    BlockStyle,
    Gate,
    Merge,
    ResidualBlock,
    count_parameters,
    crop_to,
    pad_to,
    residual_blocks,
)
from ladder_vae.networks.initialization import data_dependent_init
from ladder_vae.runs.options import RunConfig
from model import Decoder, LadderModel, TopDownLayer, TopPrior, normal_from

MakePair = Callable[..., tuple[Any, Any]]
MakeConfig = Callable[..., RunConfig]


def style(**options: Any) -> BlockStyle:
    """A block style with everything on but the gate."""
    defaults: dict[str, Any] = {
        "channels": 4,
        "residual_type": "bacdbacd",
        "activation": "elu",
        "batchnorm": True,
        "dropout": 0.2,
        "gated": False,
    }
    return BlockStyle(**(defaults | options))


def feature_map(n: int = 2, channels: int = 4, size: tuple[int, int] = (6, 5)) -> Tensor:
    return torch.randn(n, channels, *size)


def settled(module: nn.Module) -> Any:
    """The module in evaluation mode, with all parameters and running statistics made uneven."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2.0)
    return module.eval()


# Blocks

SPELLED = {
    "a": nn.ELU,
    "b": nn.BatchNorm2d,
    "c": nn.Conv2d,
    "d": nn.Dropout2d,
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("residual_type", RESIDUAL_TYPES)
def test_residual_type_spells_the_layers(
    residual_type: str, batchnorm: bool, dropout: float, gated: bool
) -> None:
    """One layer for each letter, in order; letters switched off are left out; the gate is last."""
    block = ResidualBlock(
        style(residual_type=residual_type, batchnorm=batchnorm, dropout=dropout, gated=gated)
    )
    letters = residual_type
    if not batchnorm:
        letters = letters.replace("b", "")
    if not dropout:
        letters = letters.replace("d", "")
    kinds = [SPELLED[letter] for letter in letters] + [Gate] * gated
    assert [type(layer) for layer in block.block] == kinds
    for layer in block.block:
        if isinstance(layer, nn.Conv2d):
            assert (layer.in_channels, layer.out_channels) == (4, 4)
            assert (layer.kernel_size, layer.stride, layer.padding) == ((3, 3), (1, 1), (1, 1))
            assert layer.bias is not None
            assert layer.padding_mode == "zeros"
        if isinstance(layer, nn.Dropout2d):
            assert layer.p == dropout


def test_residual_types_are_the_references() -> None:
    assert RESIDUAL_TYPES == ("cabdcabd", "bacdbac", "bacdbacd")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("residual_type", RESIDUAL_TYPES)
def test_residual_block_by_hand(residual_type: str, gated: bool) -> None:
    """y = x + f(x), with f computed letter by letter."""
    block = settled(ResidualBlock(style(residual_type=residual_type, gated=gated)))
    x = feature_map()
    convs = [m for m in block.block if isinstance(m, nn.Conv2d)]
    norms: list[Any] = [m for m in block.block if isinstance(m, nn.BatchNorm2d)]
    f = x
    for letter in residual_type:
        if letter == "a":
            f = torch.where(f > 0, f, f.exp() - 1)
        elif letter == "b":
            norm = norms.pop(0)
            view = (1, -1, 1, 1)
            f = (f - norm.running_mean.view(view)) / (norm.running_var.view(view) + 1e-5).sqrt()
            f = f * norm.weight.view(view) + norm.bias.view(view)
        elif letter == "c":
            conv = convs.pop(0)
            f = F.conv2d(F.pad(f, (1, 1, 1, 1)), conv.weight, conv.bias)
    if gated:
        f = block.block[-1](f)
    assert convs == norms == []
    assert_close(block(x), x + f, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["relu", "leakyrelu", "elu", "selu"])
def test_gate(name: str) -> None:
    """activation(u) * sigmoid(g), u the first half of the channels and g the second."""
    gate = settled(Gate(4, name))
    x = feature_map()
    both = F.conv2d(x, gate.conv.weight, gate.conv.bias)
    u, g = both[:, :4], both[:, 4:]
    assert gate.conv.weight.shape == (8, 4, 1, 1)
    assert_close(gate(x), ACTIVATIONS[name]()(u) / (1 + (-g).exp()))


def test_activations_by_name() -> None:
    """relu, leakyrelu with slope 0.01, elu and selu, at values on both sides of zero."""
    x = torch.tensor([-2.0, -0.5, 0.0, 1.5])
    negative = x.exp() - 1
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    expected = {
        "relu": torch.tensor([0.0, 0.0, 0.0, 1.5]),
        "leakyrelu": torch.tensor([-0.02, -0.005, 0.0, 1.5]),
        "elu": torch.where(x > 0, x, negative),
        "selu": scale * torch.where(x > 0, x, alpha * negative),
    }
    assert ACTIVATIONS.keys() == expected.keys()
    for name, activation in ACTIVATIONS.items():
        assert_close(activation()(x), expected[name])


def test_the_configured_activation_is_everywhere(tiny_config: MakeConfig) -> None:
    """`nonlin` sets the activation of every block, of the gates and of the stem."""
    config = tiny_config(nonlin="selu", gated=True, skip=True)
    model = LadderModel(config.ladder, (1, 8, 8))
    guide = LadderGuide(model, config.ladder, (1, 8, 8))
    kinds = {type(activation()) for activation in ACTIVATIONS.values()}
    found = {type(m) for part in (model, guide) for m in part.modules()} & kinds
    assert found == {nn.SELU}


def test_linear_merge() -> None:
    """A 1x1 convolution of (a, b) concatenated in that order, and nothing after it."""
    merge = settled(Merge("linear", style(gated=True)))
    a, b = feature_map(), feature_map()
    weight = merge.conv.weight
    assert weight.shape == (4, 8, 1, 1)
    expected = F.conv2d(a, weight[:, :4], merge.conv.bias) + F.conv2d(b, weight[:, 4:])
    assert_close(merge(a, b), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, ResidualBlock) for m in merge.modules())
    assert count_parameters(merge) == 4 * 8 + 4


@pytest.mark.parametrize("gated", [False, True])
def test_residual_merge_is_always_gated(gated: bool) -> None:
    """`residual` adds a residual block of the style, gated whatever the style says."""
    merge = settled(Merge("residual", style(gated=gated)))
    a, b = feature_map(), feature_map()
    y = F.conv2d(torch.cat((a, b), dim=1), merge.conv.weight, merge.conv.bias)
    assert_close(merge(a, b), y + merge.residual.block(y))
    assert isinstance(merge.residual, ResidualBlock)
    assert [isinstance(m, Gate) for m in merge.residual.block] == [False] * 8 + [True]


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
    """`gated` gates every residual block but the stem's, which never is."""
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
    """A 5x5 convolution, halving the image where `initial_downscaling` says so."""
    for initial, stride in ((True, (2, 2)), (False, (1, 1))):
        config = tiny_config(initial_downscaling=initial)
        conv = BottomUp(config.ladder.block_style(), config.ladder, (3, 8, 8)).stem[0]
        assert isinstance(conv, nn.Conv2d)
        assert conv.weight.shape == (4, 3, 5, 5)
        assert (conv.stride, conv.padding) == (stride, (2, 2))


# Sizes


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("direction", ["down", "up"])
def test_resampling_comes_first(direction: Any, count: int) -> None:
    """The first `resampled` blocks, and no others, have a resampling before them."""
    kind: type[nn.Module] = nn.Conv2d if direction == "down" else nn.ConvTranspose2d
    for resampled in range(count + 1):
        blocks: Any = residual_blocks(style(), count, resampled, direction)
        kinds = [kind, ResidualBlock] * resampled + [ResidualBlock] * (count - resampled)
        assert [type(m) for m in blocks] == kinds
        for m in blocks:
            if type(m) is kind:
                assert (m.kernel_size, m.stride, m.padding) == ((3, 3), (2, 2), (1, 1))
        factor = 2**resampled
        x = feature_map(size=(8, 16)) if direction == "down" else feature_map(size=(1, 2))
        height, width = x.shape[2:]
        size = (
            (height // factor, width // factor)
            if direction == "down"
            else (height * factor, width * factor)
        )
        assert blocks(x).shape == (2, 4, *size)


def test_resampling_alignment() -> None:
    """Down: the output at i is centred on the input at 2i; up: the input at i lands on 2i."""
    down, up = (residual_blocks(style(), 1, 1, direction)[0] for direction in ("down", "up"))
    centre = torch.zeros(4, 4, 3, 3)
    centre[range(4), range(4), 1, 1] = 1.0
    x = feature_map(size=(4, 6))
    for module in (down, up):
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        assert module.bias is not None
        with torch.no_grad():
            module.weight.copy_(centre)
            module.bias.zero_()
    assert_close(down(x), x[..., ::2, ::2])
    y = up(x)
    assert y.shape == (2, 4, 8, 12)
    assert_close(y[..., ::2, ::2], x)
    assert_close(y.sum(), x.sum())


@pytest.mark.parametrize(
    ("size", "padded", "top", "left"),
    [
        ((28, 28), (32, 32), 2, 2),
        ((7, 9), (8, 16), 0, 3),
        ((5, 5), (8, 8), 1, 1),
        ((1, 4), (4, 4), 1, 0),
        ((3, 2), (3, 5), 0, 1),
        ((4, 4), (4, 4), 0, 0),
    ],
)
def test_padding_and_cropping(
    size: tuple[int, int], padded: tuple[int, int], top: int, left: int
) -> None:
    """Zeros around the image, the smaller half on the top and left; cropping undoes it."""
    x = torch.rand(2, 3, *size) + 1
    y = pad_to(x, padded)
    expected = torch.zeros(2, 3, *padded)
    expected[..., top : top + size[0], left : left + size[1]] = x
    assert torch.equal(y, expected)
    assert torch.equal(crop_to(y, size), x)


def test_padded_image_enters_and_cropped_map_leaves(tiny_config: MakeConfig) -> None:
    """The guide pads its image, the decoder crops its feature map, to the same positions."""
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
    """Undoing the initial halving: bilinear, corners not aligned, then the blocks."""
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


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("downsample", [[0, 0, 0], [1, 1, 1], [0, 2, 1], [2, 0, 0]])
@pytest.mark.parametrize("image_shape", [(1, 1, 1), (3, 7, 9), (1, 28, 28), (2, 13, 5)])
def test_any_image_size(
    tiny_config: MakeConfig,
    image_shape: tuple[int, int, int],
    downsample: list[int],
    initial: bool,
) -> None:
    """Images of any size go in and come out, with latents of the sizes that RunConfig tells."""
    config = tiny_config(
        downsample=downsample, initial_downscaling=initial, blocks_per_layer=2, skip=True
    )
    model = LadderModel(config.ladder, image_shape).eval()
    guide: Any = LadderGuide(model, config.ladder, image_shape).eval()
    sizes = config.latent_sizes(image_shape[1:])
    # From the definition: halved so often in all, rounded up at the top.
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


# Data-dependent initialisation


class Noise(Messenger):
    """Draws each latent as mean + scale * eps, with eps given by name."""

    def __init__(self, noise: dict[str, Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] in self.noise:
            normal = msg["fn"].base_dist
            msg["value"] = normal.loc + normal.scale * self.noise[msg["name"]]
            msg["done"] = True


def noise_for(model: Any, n: int) -> dict[str, Tensor]:
    """Standard normal noise for the latents of n images."""
    sites = poutine.trace(model).get_trace(n=n).nodes
    return {
        name: torch.randn_like(site["value"]) for name, site in sites.items() if name[:2] == "z_"
    }


def watch_convolutions(*modules: nn.Module) -> dict[nn.Module, Tensor]:
    """The output of every convolution of the modules, as they run."""
    outputs: dict[nn.Module, Tensor] = {}
    for module in modules:
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
                conv.register_forward_hook(lambda m, _, y: outputs.update({m: y.detach()}))
    return outputs


@pytest.mark.parametrize("batchnorm", [False, True])
def test_data_dependent_init(make_pair: MakePair, x: Tensor, batchnorm: bool) -> None:
    """On the batch that ran inside, every convolution's output has mean 0 and deviation 0.1."""
    options = {"batchnorm": batchnorm, "dropout": 0.0, "gated": True, "skip": True}
    model, guide = make_pair(**options, blocks_per_layer=2)
    noise = noise_for(model, len(x))
    raw = watch_convolutions(model, guide)  # before it is normalised
    with Noise(noise), data_dependent_init(model, guide):
        outputs = watch_convolutions(model, guide)  # and as it is passed on
        sites = guide(x)
    convs = {
        m
        for part in (model, guide)
        for m in part.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    }
    assert outputs.keys() == convs
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in convs) == 2
    variances = {conv: y.var((0, 2, 3), correction=0) for conv, y in raw.items()}
    assert sum(bool((v > 1e-3).all()) for v in variances.values()) > 0.8 * len(convs)
    first = dict(outputs)
    with Noise(noise), torch.no_grad():
        again = guide(x)
    for conv, y in outputs.items():
        mean = y.mean((0, 2, 3))
        std = y.std((0, 2, 3), correction=0)
        expected = 0.1 * (variances[conv] / (variances[conv] + 1e-5)).sqrt()
        assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
        assert_close(std, expected, rtol=0, atol=1e-4)
        assert_close(first[conv], y, rtol=1e-3, atol=1e-4)
    for name, value in sites.items():
        assert_close(again[name], value, rtol=1e-3, atol=1e-4)
    assert all(torch.isfinite(p).all() for m in (model, guide) for p in m.parameters())


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_data_dependent_init_of_one_convolution(kind: Any) -> None:
    """The weight is rescaled per output channel, the bias shifted, by the batch's moments."""
    conv = kind(3, 5, 3, padding=1)
    x = 2 * feature_map(n=4, channels=3) + 1
    with data_dependent_init(conv, std=0.25):
        weight = conv.weight.clone()
        assert torch.equal(conv.bias, torch.zeros(5))
        y = conv(x)
    function = F.conv2d if kind is nn.Conv2d else F.conv_transpose2d
    before = function(x, weight, padding=1)
    mean = before.mean((0, 2, 3))
    scale = 0.25 / (((before - mean.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3)) + 1e-5).sqrt()
    view = (-1, 1, 1, 1) if kind is nn.Conv2d else (1, -1, 1, 1)
    assert_close(conv.weight, weight * scale.view(view), check_stride=False)
    assert_close(conv.bias, -mean * scale)
    assert_close(y, conv(x).detach(), rtol=1e-4, atol=1e-5)
    assert conv.weight.requires_grad
    assert not y.requires_grad


def test_data_dependent_init_of_dead_channels() -> None:
    """A channel that does not vary over the batch ends at zero, and everything stays finite."""
    conv: Any = nn.Conv2d(2, 3, 3, padding=1)
    with data_dependent_init(conv):
        y = conv(torch.zeros(4, 2, 5, 5))
    assert torch.equal(y, torch.zeros(4, 3, 5, 5))
    assert torch.isfinite(conv.weight).all()
    assert torch.equal(conv.bias, torch.zeros(3))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_initial_weights_are_kaiming_normal(kind: Any) -> None:
    """Weights start at standard deviation sqrt(2 / fan-in), biases at zero."""
    conv = kind(32, 32, 3)
    with data_dependent_init(conv):
        weight = conv.weight.clone()
    n = weight.numel()
    std = (2 / (32 * 9)) ** 0.5
    assert abs(weight.mean()) < 4 * std / n**0.5
    assert abs(weight.std() - std) < 4 * std / (2 * n) ** 0.5
    # Normal, not uniform: a tenth of a percent and more lies beyond three deviations.
    assert (weight.abs() > 3 * std).any()


def test_data_dependent_init_leaves_no_hooks(make_pair: MakePair, x: Tensor) -> None:
    """Once it is over, also by an error, convolutions no longer change as data runs through."""
    model, guide = make_pair(dropout=0.0)
    with data_dependent_init(model, guide):
        guide(x)
    with pytest.raises(RuntimeError, match="channels"), data_dependent_init(model, guide):
        guide(x[:, :0])
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks for part in (model, guide) for m in part.modules())
    before = [p.detach().clone() for part in (model, guide) for p in part.parameters()]
    guide(1 - x)
    for old, p in zip(before, [*model.parameters(), *guide.parameters()], strict=True):
        assert torch.equal(old, p)


def test_data_dependent_init_starts_afresh(make_pair: MakePair, x: Tensor) -> None:
    """What the convolutions held before does not matter; other parameters are left alone."""
    model, guide = make_pair(dropout=0.0)
    convs = [
        m
        for part in (model, guide)
        for m in part.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]
    set_here = {id(p) for conv in convs for p in conv.parameters()}
    parameters = [*model.parameters(), *guide.parameters()]
    others = [p for p in parameters if id(p) not in set_here]
    assert any(p is model.top_prior.mean_log_variance for p in others)
    kept = [p.detach().clone() for p in others]
    results = []
    for spoil in (0.0, 100.0):
        with torch.no_grad():
            for conv in convs:
                for p in conv.parameters():
                    p.add_(spoil)
        torch.manual_seed(1)
        with data_dependent_init(model, guide):
            guide(x)
        results.append([p.detach().clone() for p in parameters])
    assert_close(results[0], results[1])
    for old, p in zip(kept, others, strict=True):
        assert torch.equal(old, p)


# The top prior


@pytest.mark.parametrize("learned", [False, True])
def test_top_prior(make_pair: MakePair, x: Tensor, learned: bool) -> None:
    """Standard normal at the start; learned or fixed as told."""
    prior = TopPrior(3, (2, 4), learned=learned)
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


def test_parameters_of_a_normal() -> None:
    """The first half of the channels is the mean, the second the log-variance."""
    parameters = torch.randn(2, 6, 3, 4)
    normal: Any = normal_from(parameters)
    assert (normal.batch_shape, normal.event_shape) == ((2,), (3, 3, 4))
    assert torch.equal(normal.base_dist.loc, parameters[:, :3])
    assert_close(normal.base_dist.variance, parameters[:, 3:].exp())


# What depends on what


@pytest.mark.parametrize("skip", [False, True])
def test_skip_connections(make_pair: MakePair, skip: bool) -> None:
    """With z_2 fixed, z_3 reaches p(z_1) through the skip connections alone; z_2, with z_1, x."""
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
    """In evaluation mode the terms of a batch are those of each image alone."""
    model, guide = make_pair(skip=True, gated=True)
    guide(x)  # running statistics are no longer those of the start
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
    """Without batch norm and dropout, training mode too treats each image alone."""
    for batchnorm in (False, True):
        model, guide = make_pair(batchnorm=batchnorm, dropout=0.0)
        noise = noise_for(model, len(x))
        kls = []
        for last in (x[-1:], 1 - x[-1:]):
            with Noise(noise), torch.no_grad():
                terms = FreeBitsELBO().compute_terms(model, guide, torch.cat((x[:-1], last)))
            kls.append(terms.kl[:-1])
        assert torch.equal(kls[0], kls[1]) != batchnorm
