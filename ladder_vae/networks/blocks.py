"""The convolutional blocks of the ladder.

Feature maps are (N, C, h, w) with the same C everywhere. Every convolution has a bias and is
zero-padded so that it keeps, halves or doubles the size of its input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn import functional as F

from ladder_vae.networks.batches import on_batches

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
    """The settings that all residual blocks of a ladder share.

    `residual_type` lists a block's layers in order: a = activation, b = batch norm,
    c = 3x3 convolution, d = channel dropout. If `batchnorm` is false, b is skipped; if `dropout` is
    0, d is skipped.
    """

    channels: int
    residual_type: str
    activation: str
    batchnorm: bool
    dropout: float
    gated: bool


class Gate(nn.Module):
    """activation(u) * sigmoid(g), with u and g from a 1x1 convolution of x; (N, C, h, w)."""

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 1)
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        u, g = self.conv(x).chunk(2, dim=1)
        return self.activation(u) * torch.sigmoid(g)


class ResidualBlock(nn.Module):
    """x + f(x), with the layers of f from `style.residual_type` and an optional gate at the end.

    `gated` overrides `style.gated`. Input and output are (N, C, h, w).
    """

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
    """Merges two feature maps (N, C, h, w) into one by a 1x1 convolution of both.

    `merge_type` "residual" adds a gated residual block.
    """

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
    """`count` residual blocks, with a resampling layer before each of the first `resampled` ones.

    A resampling layer halves (`direction` "down") or doubles ("up") height and width.
    """
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
    """A 3x3 convolution to the parameters of a distribution, in single precision under autocast.

    The KL is a small difference of large numbers, which parameters in bfloat16 would make wrong.
    """

    def __init__(self, channels: int, parameter_channels: int) -> None:
        super().__init__(channels, parameter_channels, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        """From h (*batch, C, h, w) to parameters (*batch, `parameter_channels`, h, w)."""
        if not is_autocast_available(h.device.type):
            return on_batches(super().forward, h)
        with torch.autocast(h.device.type, enabled=False):
            return on_batches(super().forward, h.to(self.weight.dtype))


class SubPixelConv(nn.Module):
    """A `ParameterConv` and a shuffle that doubles the size of its output, cropped to `size`.

    It computes the parameters of 2x2 pixels as the channels of one position, and shuffles them
    (Shi et al., 2016, "Real-time single image and video super-resolution using an efficient
    sub-pixel convolutional neural network").
    """

    def __init__(self, channels: int, parameter_channels: int, size: Sequence[int]) -> None:
        super().__init__()
        self.conv = ParameterConv(channels, 4 * parameter_channels)
        self.size = size

    def forward(self, h: Tensor) -> Tensor:
        """From h (*batch, C, h, w) to parameters (*batch, `parameter_channels`, *size)."""
        return crop_to(F.pixel_shuffle(self.conv(h), 2), self.size)


def pad_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Zero-pad images (N, C, H, W) to `size` (H', W'), the smaller half on the top and left."""
    dh, dw = size[0] - x.shape[-2], size[1] - x.shape[-1]
    if dh == 0 and dw == 0:
        return x
    return F.pad(x, (dw // 2, dw - dw // 2, dh // 2, dh - dh // 2))


def crop_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """Undo `pad_to`: crop feature maps (*batch, C, H', W') to `size` (H, W)."""
    dh, dw = x.shape[-2] - size[0], x.shape[-1] - size[1]
    if dh == 0 and dw == 0:
        return x
    # The gradient of a slice has another memory layout than x, which would slow the backward pass.
    return F.pad(x, (-(dw // 2), dw // 2 - dw, -(dh // 2), dh // 2 - dh))


def count_parameters(*modules: nn.Module) -> int:
    """Number of parameters; as in the original implementation, a fixed top prior's count too."""
    return sum(p.numel() for m in modules for p in m.parameters())
