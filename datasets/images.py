"""Images, stored compactly on a device and read as batches of floats."""

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
        is_noisy: whether pixels are drawn again each time an image is read.
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
        """The device of the images that `batch` returns."""
        return self._stored.device

    @property
    def index_device(self) -> torch.device:
        """The device that an index should be on, so that `batch` need not copy it."""
        return self._stored.device

    def to(self, device: torch.device | str) -> Self:
        """The same images on another device."""
        moved = copy.copy(self)
        moved._stored = self._stored.to(device)
        return moved

    @abstractmethod
    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images at `index` (B,) int64: float32 (B, C, H, W) in [0, 1], on `device`.

        `index` is on `device` or on `index_device`. Noisy images draw from `generator`, which is
        on `device`; the others ignore it.
        """


class PackedImages(ImageSet):
    """Fixed binary images, eight pixels per byte.

    `stored` is uint8 (N, ceil(C*H*W / 8)), each row `numpy.packbits` of an image in row-major
    order: the first pixel is the highest bit.
    """

    @classmethod
    def pack(cls, name: str, split: str, images: np.ndarray) -> Self:
        """Pack `images` (N, C, H, W), in which nonzero pixels are on."""
        count, channels, height, width = images.shape
        packed = np.packbits(images.reshape(count, -1), axis=1)
        return cls(name, split, (channels, height, width), torch.from_numpy(packed))

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        # Create the shifts on the device: copying a constant to a GPU would wait for it.
        shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=self.device)
        bits = (self._stored[index].unsqueeze(-1) >> shifts) & 1  # (B, bytes, 8)
        channels, height, width = self.shape
        pixels = bits.flatten(1)[:, : channels * height * width]  # without the padding bits
        return pixels.reshape(-1, channels, height, width).float()


class DynamicallyBinarizedImages(ImageSet):
    """Grey images whose pixels are drawn from Bernoulli(grey / 255) each time they are read.

    Salakhutdinov and Murray, "On the quantitative analysis of deep belief networks", ICML 2008.
    Burda et al., "Importance weighted autoencoders", ICLR 2016, draw them again at each step, too.
    `stored` is uint8 (N, C, H, W).
    """

    is_noisy = True

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(self._stored[index].float() / 255, generator=generator)


class ColourImages(ImageSet):
    """Fixed images of 256 levels per channel, read as level / 255.

    `stored` is uint8 (N, H, W, C), the layout of image files.
    """

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return _unit_levels(self._stored[index])


class MappedImages(ColourImages):
    """Colour images in a memory-mapped file, which may be larger than the memory.

    `stored` is as for `ColourImages` and shares the file's memory. It stays on the host: `to`
    changes the device of the batches, and `batch` reads rows on the host and copies them there.
    """

    def __init__(self, name: str, split: str, shape: Shape, stored: Tensor) -> None:
        super().__init__(name, split, shape, stored)
        self._device = stored.device

    @property
    def device(self) -> torch.device:
        return self._device

    def to(self, device: torch.device | str) -> Self:
        moved = copy.copy(self)
        # A tensor's device always has an index ("cuda:0"), like the device of other image sets.
        moved._device = torch.empty(0, device=device).device
        return moved

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor:
        rows = self._stored[index.to(self.index_device)]
        if self.device.type == "cuda":
            rows = rows.pin_memory()  # else the copy waits for the GPU
        return _unit_levels(rows.to(self.device, non_blocking=True))


def _unit_levels(rows: Tensor) -> Tensor:
    """uint8 (B, H, W, C) as float32 (B, C, H, W), level / 255."""
    levels = rows.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    # CUDA divides by a Python number through its reciprocal, which would change the last bit.
    return levels.div_(torch.full((), 255.0, device=levels.device))
