"""What evaluation needs of a model and a guide."""

from collections.abc import Callable, Sequence
from typing import Protocol

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
