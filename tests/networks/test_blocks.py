"""Blocks by their definitions, layer by layer, and the sizes of feature maps."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from ladder_vae.networks.blocks import (
    ACTIVATIONS,
    RESIDUAL_TYPES,
    Gate,
    Merge,
    ResidualBlock,
    count_parameters,
    crop_to,
    pad_to,
    residual_blocks,
)
from tests.networks.blocks_definitions import (
    feature_map,
    settled,
    style,
)

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
    """One layer for each letter, in order; disabled layers are skipped; the gate is last."""
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
    """`residual` adds a residual block, which is gated in every style."""
    merge = settled(Merge("residual", style(gated=gated)))
    a, b = feature_map(), feature_map()
    y = F.conv2d(torch.cat((a, b), dim=1), merge.conv.weight, merge.conv.bias)
    assert_close(merge(a, b), y + merge.residual.block(y))
    assert isinstance(merge.residual, ResidualBlock)
    assert [isinstance(m, Gate) for m in merge.residual.block] == [False] * 8 + [True]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("direction", ["down", "up"])
def test_resampling_comes_first(direction: Any, count: int) -> None:
    """Only the first `resampled` blocks have a resampling layer before them."""
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
