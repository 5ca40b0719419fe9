"""A step's convolutions alone: the lower limit of its time.

The context `recorded` records every convolution that PyTorch runs in it, forward and backward: its
shapes, strides (the memory layout), precision, and which gradients it computes. `Convolutions` runs
them again in the same order on random numbers, without autograd, activations or sums between them.
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
    """The properties of a tensor in a recorded call."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    role: int  # position among the arguments: input and weight never share a tensor

    def random(self, device: torch.device) -> Tensor:
        """A tensor of these properties, with small random values."""
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return empty.normal_(std=0.1)


@dataclass(frozen=True)
class Call:
    """A convolution, forward or backward, with a `Like` for each of its tensors."""

    op: Any
    arguments: tuple[Any, ...]

    @property
    def is_backward(self) -> bool:
        """Whether it computes the gradients of a convolution."""
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
    """The convolutions that run inside, in order; those in compiled blocks are not seen."""
    with _Recorder() as recorder:
        yield recorder.calls


class Convolutions:
    """Recorded convolutions, run again on random numbers.

    Calls share tensors with the same properties, which keeps memory small.
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
        """Run all of them once."""
        for op, arguments in self._calls:
            op(*arguments)
