"""The interfaces of a model, a guide and images as evaluation uses them."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn


class Model(Protocol):
    """p(x, z) as in `model.LadderModel`."""

    layers: nn.ModuleList  # one per stochastic layer

    def __call__(self, x: Tensor | None = None, n: int = 1) -> Tensor: ...


class Guide(Protocol):
    """q(z | x) as in `guide.LadderGuide`, which runs the model under itself."""

    def __call__(
        self, x: Tensor, features: Sequence[Tensor] | None = None, *, from_prior: int = 0
    ) -> dict[str, Tensor]: ...

    @property
    def bottom_up(self) -> Callable[[Tensor], list[Tensor]]: ...

    @property
    def get_traces(self) -> Callable[[], tuple[Trace, Trace]]: ...

    @property
    def trace(self) -> Trace: ...


class Images(Protocol):
    """Images as in `datasets.ImageSet`."""

    name: str
    split: str
    shape: tuple[int, int, int]

    @property
    def device(self) -> torch.device: ...

    @property
    def index_device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> Tensor: ...
