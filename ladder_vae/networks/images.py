"""Checks of the images that a model or guide is given."""

from typing import Any

import torch
from pyro.infer.util import is_validation_enabled
from torch import Tensor


def check_images(
    x: Any, image_shape: tuple[int, int, int], device: torch.device, *, likelihood: str
) -> None:
    """Raise one clear error unless x suits a ladder for images of `image_shape` (C, H, W).

    x must be a floating-point tensor (*batch, C, H, W) on `device`. Its values are only read while
    Pyro validates, because reading them makes the host wait for a GPU: they must be in [0, 1], and
    0 or 1 for a Bernoulli likelihood. A Gaussian likelihood takes any value.

    Raises:
        TypeError: x is no tensor, or its numbers are integers.
        ValueError: its shape, device or values do not suit.
    """
    wanted = f"floats of shape (N, {', '.join(map(str, image_shape))})"
    if not isinstance(x, Tensor):
        raise TypeError(f"images must be a torch.Tensor of {wanted}, not a {type(x).__name__}")
    found = f"{tuple(x.shape)}"
    if not x.is_floating_point():
        raise TypeError(
            f"images must be {wanted} in [0, 1], not {x.dtype}: divide 8-bit levels by 255"
        )
    if x.ndim < 4:
        raise ValueError(f"images must be {wanted}; this tensor has shape {found}")
    if tuple(x.shape[-3:]) != image_shape:
        channels_last = tuple(x.shape[-3:]) == (*image_shape[1:], image_shape[0])
        hint = ", channels last: permute it by (0, 3, 1, 2)" if channels_last else ""
        raise ValueError(f"images must be {wanted}; this tensor has shape {found}{hint}")
    if x.device != device:
        raise ValueError(f"images are on {x.device}, but the ladder is on {device}")
    if is_validation_enabled() and likelihood != "gaussian":
        _check_values(x, binary=likelihood == "bernoulli")


def _check_values(x: Tensor, *, binary: bool) -> None:
    least, greatest = x.min().item(), x.max().item()
    if not (least >= 0 and greatest <= 1):
        hint = ": divide 8-bit levels by 255" if greatest > 1 else ""
        raise ValueError(
            f"images must be in [0, 1]; these reach from {least:g} to {greatest:g}{hint}"
        )
    if binary and not ((x == 0) | (x == 1)).all():
        raise ValueError(
            "images must be 0 or 1 for a Bernoulli likelihood; these have values in between: "
            "binarize them, or use a likelihood of 256 levels"
        )
