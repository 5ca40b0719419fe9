"""Images in groups, each of which is evaluated with its own seeds."""

import math
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ladder_vae.evaluation.interfaces import Images
from runtime.random import torch_seed

# The second part of a random key names the purpose of the draw.
NOISE, SUBSET, READING, PILOT, FORWARD, REVERSE, GENERATED = range(7)


class Results(Protocol):
    """Results of n images."""

    def table(self) -> Tensor:
        """(n, columns), float64, on the CPU."""
        ...


Found = TypeVar("Found", bound=Results, covariant=True)


class Sampler(Protocol[Found]):
    """Computes results of images, group by group; see `scoring.score`.

    A group's results depend on nothing but the group and `settings`.
    """

    images: Images
    index: Tensor

    @property
    def columns(self) -> int:
        """The number of columns of a group's table."""
        ...

    @property
    def pairs(self) -> int:
        """The largest number of image-sample pairs in a pass through the network."""
        ...

    def __len__(self) -> int:
        """The number of groups."""
        ...

    def size(self, number: int) -> int:
        """The number of images in a group."""
        ...

    def group(self, number: int) -> Found:
        """The results of one group's images."""
        ...

    def in_order(self, groups: Iterable[Tensor]) -> Found:
        """All results, in the order of `index`, from the tables of groups 0, 1, ..."""
        ...

    def settings(self) -> dict[str, Any]:
        """What the results depend on besides weights and images."""
        ...

    def bound(self, table: Tensor) -> Tensor:
        """The bound (n,) on log p(x) that a progress bar shows, from a table (n, columns)."""
        ...

    def describe_bound(self) -> str:
        """What the bound is, in a word or two."""
        ...


class ImageGroups:
    """The images at `index` (N,), in groups of `count`.

    Groups are formed from the sorted `index`, so its order does not change an image's results.
    """

    def __init__(self, images: Images, index: Tensor, count: int, seed: int) -> None:
        self.images = images
        self.seed = seed
        self.index, self._order = index.sort(stable=True)
        self._count = count

    def __len__(self) -> int:
        """The number of groups."""
        return math.ceil(len(self.index) / self._count)

    def size(self, number: int) -> int:
        """The number of images in a group; the last group may be smaller."""
        return min(self._count, len(self.index) - number * self._count)

    def positions(self, number: int) -> Tensor:
        """The indices of a group's images."""
        return self.index[number * self._count : (number + 1) * self._count]

    def read(self, number: int) -> Tensor:
        """A group's images (n, C, H, W)."""
        # Images that are binarized each time they are read need noise, too.
        generator = torch.Generator(self.images.device)
        generator.manual_seed(torch_seed(self.seed, READING, number))
        return self.images.batch(self.positions(number).to(self.images.index_device), generator)

    def ordered(self, tables: Iterable[Tensor]) -> Tensor:
        """One table in the order of `index`, from the tables of groups 0, 1, ..."""
        table = torch.cat(list(tables))
        ordered = torch.empty_like(table)
        ordered[self._order] = table
        return ordered

    def random_devices(self) -> list[torch.device]:
        """The devices whose random state a group changes, besides the CPU."""
        return [self.images.device] if self.images.device.type == "cuda" else []
