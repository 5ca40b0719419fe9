"""Images kept on a device as the few bytes they are, and read as batches of floats."""

import copy
from abc import ABC, abstractmethod
from typing import Self

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, int, int]


class ImageSet(ABC):
    """One split of a data set, on one device.

    Attributes:
        name: the data set's name.
        split: the split's name.
        shape: (C, H, W) of one image.
        is_noisy: whether images are drawn anew at each reading.
    """

    is_noisy = False

    def __init__(self, name: str, split: str, shape: Shape, stored: Tensor) -> None:
        self.name = name
        self.split = split
        self.shape = shape
        self._stored = stored

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def device(self) -> torch.device:
        """Where `batch` delivers images."""
        return self._stored.device

    @property
    def index_device(self) -> torch.device:
        """Where `batch` finds its index without waiting for a copy of it."""
        return self._stored.device

    def to(self, device: torch.device | str) -> Self:
        """The same images on another device."""
        moved = copy.copy(self)
        moved._stored = self._stored.to(device)
        return moved

    @abstractmethod
    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images at ``index`` (B,) int64: float32 (B, C, H, W) in [0, 1], on `device`.

        ``index`` may lie on `device` or on `index_device`.
        ``generator``, on the same device, is where images that are drawn anew at each reading
        take their noise from; fixed images do not use it.
        """


class PackedImages(ImageSet):
    """Fixed binary images, eight pixels to the byte.

    ``stored`` is uint8 (N, ceil(C*H*W / 8)), each row `numpy.packbits` of an image in row-major
    order: the first pixel is the highest bit.
    """

    @classmethod
    def pack(cls, name: str, split: str, images: np.ndarray) -> Self:
        """Pack ``images`` (N, C, H, W), true or nonzero where a pixel is on."""
        count, channels, height, width = images.shape
        packed = np.packbits(images.reshape(count, -1), axis=1)
        return cls(name, split, (channels, height, width), torch.from_numpy(packed))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        # The shifts are made on the device: a constant copied there would halt a GPU's queue.
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.device)
        bits = (self._stored[index].unsqueeze(-1) >> shifts) & 1  # (B, bytes, 8)
        channels, height, width = self.shape
        pixels = bits.flatten(1)[:, : channels * height * width]  # without the padding bits
        return pixels.reshape(-1, channels, height, width).float()


class DynamicallyBinarizedImages(ImageSet):
    """Grey images whose pixels are Bernoulli(grey / 255), drawn anew at each reading.

    Salakhutdinov and Murray, "On the quantitative analysis of deep belief networks", ICML 2008;
    drawing anew in training is Burda et al., "Importance weighted autoencoders", ICLR 2016.
    ``stored`` is uint8 (N, C, H, W).
    """

    is_noisy = True

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self._stored[index].float() / 255, generator=generator)


class ColourImages(ImageSet):
    """Images of 256 levels to the channel: level / 255, the same at each reading.

    ``stored`` is uint8 (N, H, W, C), as picture files and NumPy have them.
    """

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return _unit_levels(self._stored[index])


class MappedImages(ColourImages):
    """Colour images in a memory-mapped file, which may be larger than a GPU's or the main memory.

    ``stored`` is as for `ColourImages`, and its memory the file's. It stays where it is: `to`
    changes where batches are delivered, and `batch` reads its rows on the host and sends them.
    """

    def __init__(self, name: str, split: str, shape: Shape, stored: Tensor) -> None:
        super().__init__(name, split, shape, stored)
        self._device = stored.device

    @property
    def device(self) -> torch.device:
        return self._device

    def to(self, device: torch.device | str) -> Self:
        moved = copy.copy(self)
        # A tensor there tells "cuda" from "cuda:0", as it does for other image sets.
        moved._device = torch.empty(0, device=device).device
        return moved

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        rows = self._stored[index.to(self.index_device)]
        if self.device.type == "cuda":
            rows = rows.pin_memory()  # without which the copy would halt the GPU's queue
        return _unit_levels(rows.to(self.device, non_blocking=True))


def _unit_levels(rows: Tensor) -> Tensor:
    """uint8 (B, H, W, C) as float32 (B, C, H, W), level / 255."""
    levels = rows.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    # By a number, CUDA divides as multiplication with its reciprocal: the last bit would differ.
    return levels.div_(torch.full((), 255.0, device=levels.device))
