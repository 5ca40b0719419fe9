"""The convolutions of a step alone: the floor under its time.

Whatever runs inside `recorded` is watched as PyTorch runs it, forward and backward. Of each
convolution shapes, strides (which are the memory layout), precision and wanted gradients are noted,
so that `Convolutions` can run the same ones again, in their order, on random numbers: with no
autograd, no activation and no sum in between. A step that does the same convolutions takes longer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_FORWARD = torch.ops.aten.convolution.default
_BACKWARD = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Like:
    """What a tensor of a recorded call was like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    role: int  # its place among the arguments, so that input and weight are never the same tensor

    def random(self, device: torch.device) -> Tensor:
        """One with small random numbers in it."""
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return empty.normal_(std=0.1)


@dataclass(frozen=True)
class Call:
    """A convolution, forward or backward, with `Like`s in the place of its tensors."""

    op: Any
    arguments: tuple[Any, ...]

    @property
    def is_backward(self) -> bool:
        """Whether it gives the gradients of a convolution."""
        return self.op is _BACKWARD


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (_FORWARD, _BACKWARD):
            arguments = tuple(
                Like(tuple(a.shape), a.stride(), a.dtype, i) if isinstance(a, Tensor) else a
                for i, a in enumerate(args)
            )
            self.calls.append(Call(func, arguments))
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """The convolutions that run inside, in their order; compiled blocks cannot be seen into."""
    with _Recorder() as recorder:
        yield recorder.calls


class Convolutions:
    """Recorded convolutions, to be run again on random numbers.

    Calls share the tensors that are alike in them, so that memory stays small.
    """

    def __init__(self, calls: list[Call], device: torch.device) -> None:
        tensors: dict[Like, Tensor] = {}
        self._calls = []
        for call in calls:
            for like in call.arguments:
                if isinstance(like, Like) and like not in tensors:
                    tensors[like] = like.random(device)
            arguments = [tensors[a] if isinstance(a, Like) else a for a in call.arguments]
            self._calls.append((call.op, arguments))

    @torch.no_grad()
    def run(self) -> None:
        """All of them, once."""
        for op, arguments in self._calls:
            op(*arguments)
