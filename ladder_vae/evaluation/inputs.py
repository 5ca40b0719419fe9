"""Images as a user has them, converted to what a ladder reads."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError

# A level of 8-bit images, of which half precision is a tenth off.
_LEVELS, _NEAR = 255, 0.25


def as_images(
    x: Any, shape: tuple[int, int, int], device: torch.device, *, binary: bool, name: str = "x"
) -> Tensor:
    """Images as float32 (N, C, H, W) in [0, 1] on a device.

    Args:
        x: an array or tensor of bool, uint8 (levels 0 to 255) or floats in [0, 1], of the shape
            (N, C, H, W), (C, H, W), or for grey images (N, H, W) or (H, W).
        shape: (C, H, W) of the ladder's images.
        binary: whether pixels must be black or white. They are never thresholded.
        name: what messages call `x`.

    Raises:
        UserError: `x` does not fit. The message says what would.
    """
    tensor = _as_tensor(x, name)
    found = tuple(tensor.shape)
    with_channels = len(found) in (3, 4) and found[-3:] == shape
    if not with_channels and not (
        shape[0] == 1 and len(found) in (2, 3) and found[-2:] == shape[1:]
    ):
        raise UserError(_wrong_shape(found, shape, name))
    if not tensor.numel():
        raise UserError(f"{name} holds no image")
    pixels = tensor.float()
    if tensor.dtype == torch.uint8:
        # CUDA divides by a Python number through its reciprocal, which would change the last bit.
        pixels = pixels / torch.full((), float(_LEVELS), device=pixels.device)
    if not pixels.isfinite().all():
        raise UserError(f"{name} has pixels that are not finite; they must be from 0 to 1")
    low, high = pixels.min().item(), pixels.max().item()
    if low < 0 or high > 1:
        raise UserError(
            f"{name} has floating-point pixels from {low:g} to {high:g}; they must be from 0 to 1: "
            "divide levels by 255, or pass them as uint8"
        )
    if binary and len(between := pixels[(pixels > 0) & (pixels < 1)]):
        raise UserError(
            f"{name} has grey pixels, such as {between[0].item():.3g}, but the ladder is for "
            "binary images, of 0 and 1 (as uint8: of 0 and 255): binarize them first"
        )
    return pixels.reshape(-1, *shape).to(device)


def _as_tensor(x: Any, name: str) -> Tensor:
    """`x` as a tensor, without its gradient."""
    try:
        tensor = x.detach() if isinstance(x, Tensor) else torch.from_numpy(_native(x))
    except (TypeError, ValueError, RuntimeError):
        raise UserError(
            f"{name} is {type(x).__name__}; it must be a NumPy array or a tensor of numbers"
        ) from None
    if not (tensor.is_floating_point() or tensor.dtype in (torch.uint8, torch.bool)):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} has pixels of type {kind}; they must be uint8 from 0 to 255, or floats from 0 "
            "to 1"
        )
    return tensor


def _native(x: Any) -> np.ndarray:
    """`x` as an array that PyTorch takes: contiguous, in this machine's byte order."""
    array = np.asarray(x)
    if array.dtype.kind not in "buif":
        raise TypeError
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _wrong_shape(found: tuple[int, ...], shape: tuple[int, int, int], name: str) -> str:
    channels, height, width = shape
    right = f"(N, {channels}, {height}, {width}) or ({channels}, {height}, {width})"
    if channels == 1:
        right = f"(N, 1, {height}, {width}), (N, {height}, {width}) or ({height}, {width})"
    message = f"{name} has the shape {found}; it must be {right}"
    if found[-3:] == (height, width, channels):
        message += ": move the channels before the height"
    return message


def as_levels(images: Tensor, name: str = "x") -> Tensor:
    """Images in [0, 1] rounded to the nearest of 256 levels, from which they must not be far.

    The likelihoods of 8-bit images are defined at these levels. Raises `UserError` for others.
    """
    levels = (images * _LEVELS).round()
    far = (images * _LEVELS - levels).abs() > _NEAR
    if far.any():
        raise UserError(
            f"{name} has pixels between the levels k / 255, such as {images[far][0].item():.4g}, "
            "but the ladder's likelihood is that of 8-bit images: round them first"
        )
    return levels / torch.full((), float(_LEVELS), device=levels.device)


class GivenImages:
    """Images (N, C, H, W) in memory, as evaluation reads them."""

    name, split = "given", "images"

    def __init__(self, images: Tensor) -> None:
        self._images = images
        self.device = self.index_device = images.device
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self._images[index]
