"""A training step recorded once as a CUDA graph, and replayed.

A step is thousands of kernels, each started by the host; for small feature maps the GPU waits for
it. A graph starts them all at once. What it is made of stays where it was when it was recorded: the
step may only change tensors in place, and must not ask what is in them.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

# Steps before the recording, in which memory, cuDNN's choices and compiled blocks come to be.
_WARM_UP = 5


class StepGraph:
    """A step as a function of a batch; from the sixth step on it is replayed from its graph.

    Where the step cannot be recorded one line says why, and it goes on as it is.

    Args:
        step: takes images x (N, C, H, W) and returns a tensor, the same one at each replay.
    """

    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        self._step = step
        self._calls = 0
        self._x: Tensor | None = None
        self._result: Tensor | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._own: torch.cuda.Stream | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Take a step; a batch of another shape than the recorded one's is stepped on as it is."""
        self._calls += 1
        if self._calls <= _WARM_UP:
            return self._beside(x)
        if self._calls == _WARM_UP + 1:
            self._record(x)
        if self._graph is None or self._x is None or self._x.shape != x.shape:
            return self._step(x)
        self._x.copy_(x)
        self._graph.replay()
        assert self._result is not None
        return self._result

    def _beside(self, x: Tensor) -> Tensor:
        """A step on a stream of its own, as recording has it."""
        if self._own is None:
            self._own = torch.cuda.Stream(x.device)
        current = torch.cuda.current_stream(x.device)
        self._own.wait_stream(current)
        with torch.cuda.stream(self._own):
            result = self._step(x)
        current.wait_stream(self._own)
        return result

    def _record(self, x: Tensor) -> None:
        self._x = x.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._result = self._step(self._x)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            print(
                f"warning: the step is not recorded as a CUDA graph ({reason}); goes on without",
                file=sys.stderr,
            )
            return
        self._graph = graph


class Readback:
    """A tensor's value as the host last came to know it: on a GPU that of some steps before.

    Reading a GPU's tensor would hold the host up until all steps that are queued are done. A copy
    into pinned memory is queued instead, and looked at once it has arrived.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def latest(self, source: Tensor) -> Tensor | None:
        """The newest value known of `source`, the same tensor at each call; None before any."""
        if source.device.type != "cuda":
            return source
        if self._arriving is None or self._arriving[1].query():
            if self._arriving is not None:
                self._value = self._arriving[0].clone()
            copy = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            copy.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(source.device))
            self._arriving = copy, event
        return self._value
