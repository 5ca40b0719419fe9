"""The convolutional blocks of the ladder.

Feature maps are (N, C, h, w) with the same C everywhere; every convolution is zero-padded to keep
its input's size (or to halve or double it) and has a bias.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,  # slope 0.01
    "elu": nn.ELU,
    "selu": nn.SELU,
}
RESIDUAL_TYPES = ("cabdcabd", "bacdbac", "bacdbacd")
MERGE_TYPES = ("linear", "residual")


@dataclass(frozen=True)
class BlockStyle:
    """What all residual blocks of a ladder have in common.

    `residual_type` spells a block's layers in order: a = activation, b = batch norm,
    c = 3x3 convolution, d = channel dropout; without batch norm or dropout its letter is left out.
    """

    channels: int
    residual_type: str
    activation: str
    batchnorm: bool
    dropout: float
    gated: bool


class Gate(nn.Module):
    """Gated linear unit with an activation, activation(u) * sigmoid(g), (u, g) by 1x1 conv."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 1)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.conv(x).chunk(2, dim=1)
        return self.activation(u) * torch.sigmoid(g)


class ResidualBlock(nn.Module):
    """x + f(x), where f is spelled by `style.residual_type` and may end in a gate."""

    def __init__(self, style: BlockStyle, *, gated: bool | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for letter in style.residual_type:
            if letter == "a":
                layers.append(ACTIVATIONS[style.activation]())
            elif letter == "b" and style.batchnorm:
                layers.append(nn.BatchNorm2d(style.channels))
            elif letter == "c":
                layers.append(nn.Conv2d(style.channels, style.channels, 3, padding=1))
            elif letter == "d" and style.dropout > 0:
                layers.append(nn.Dropout2d(style.dropout))
        if style.gated if gated is None else gated:
            layers.append(Gate(style.channels, style.activation))
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Merge(nn.Module):
    """Merge two feature maps into one: a 1x1 convolution of both, `residual` adds a gated block."""

    def __init__(self, merge_type: str, style: BlockStyle) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * style.channels, style.channels, 1)
        self.residual = (
            ResidualBlock(style, gated=True) if merge_type == "residual" else nn.Identity()
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.residual(self.conv(torch.cat((a, b), dim=1)))


def residual_blocks(
    style: BlockStyle,
    count: int,
    resampled: int = 0,
    direction: Literal["down", "up"] | None = None,
) -> nn.Sequential:
    """`count` residual blocks, the first `resampled` of which halve or double the size first."""
    layers: list[nn.Module] = []
    for i in range(count):
        if i < resampled:
            layers.append(_resample(style.channels, direction))
        layers.append(ResidualBlock(style))
    return nn.Sequential(*layers)


def _resample(channels: int, direction: Literal["down", "up"] | None) -> nn.Module:
    if direction == "down":
        return nn.Conv2d(channels, channels, 3, stride=2, padding=1)
    return nn.ConvTranspose2d(channels, channels, 3, stride=2, padding=1, output_padding=1)


class ParameterConv(nn.Conv2d):
    """A 3x3 convolution to the parameters of a distribution, always in single precision at least.

    Whatever precision the networks run in: in bfloat16 the KL, a small difference of large numbers,
    comes out wrong.
    """

    def __init__(self, channels: int, parameter_channels: int) -> None:
        super().__init__(channels, parameter_channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """From h (N, C, H, W) to parameters (N, `parameter_channels`, H, W)."""
        if not is_autocast_available(h.device.type):
            return super().forward(h)
        with torch.autocast(h.device.type, enabled=False):
            return super().forward(h.to(self.weight.dtype))


def pad_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Zero-pad images (N, C, H, W) to `size` (H', W'), the smaller half on the top and left."""
    dh, dw = size[0] - x.shape[-2], size[1] - x.shape[-1]
    if dh == 0 and dw == 0:
        return x
    return F.pad(x, (dw // 2, dw - dw // 2, dh // 2, dh - dh // 2))


def crop_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Undo `pad_to`: crop feature maps (N, C, H', W') to `size` (H, W)."""
    dh, dw = x.shape[-2] - size[0], x.shape[-1] - size[1]
    if dh == 0 and dw == 0:
        return x
    # Not by slices, whose gradient would come in another memory layout than x, and leave all before
    # it with a mixture of the two.
    return F.pad(x, (-(dw // 2), dw // 2 - dw, -(dh // 2), dh // 2 - dh))


def count_parameters(*modules: nn.Module) -> int:
    """Number of parameters, those of a fixed top prior included, as the reference counts them."""
    return sum(p.numel() for m in modules for p in m.parameters())
