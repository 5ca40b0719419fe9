"""Training steps as CUDA graphs, and reading numbers off a GPU without waiting for it.

A step is thousands of kernels. For small feature maps a GPU waits while the host launches them one
by one; a CUDA graph launches them all at once. A recorded step may only change tensors in place,
and may not read a number back to the host.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

# Steps before recording: they allocate memory, choose cuDNN kernels and compile blocks.
_WARM_UP = 5


class CudaRecorder:
    """Records steps as CUDA graphs, on the stream of their warm-up."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def warm_up(self, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Take a step on a separate stream, as PyTorch requires before recording."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        current = torch.cuda.current_stream(x.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = step(x)
        current.wait_stream(self._stream)
        return result

    def record(
        self, step: Callable[[Tensor], Tensor], x: Tensor
    ) -> tuple[Callable[[], object], Tensor]:
        """Record a step without taking it; returns its replay, and the result that this sets.

        Raises `RuntimeError` if the step cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            result = step(x)
        return graph.replay, result


class StepGraph:
    """A step as a function of a batch, which the sixth call records and replays from then on.

    If recording fails, it prints one warning and calls the step as usual.

    Args:
        step: takes images x (N, C, H, W) and returns a tensor, the same one at each replay.
        recorder: records the step.
    """

    def __init__(self, step: Callable[[Tensor], Tensor], recorder: CudaRecorder) -> None:
        self._step = step
        self._recorder = recorder
        self._calls = 0
        self._x: Tensor | None = None
        self._recorded: tuple[Callable[[], object], Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Take a step; for a batch of another shape than the recorded one, without the graph."""
        self._calls += 1
        if self._calls <= _WARM_UP:
            return self._recorder.warm_up(self._step, x)
        if self._calls == _WARM_UP + 1:
            self._record(x)
        if self._recorded is None or self._x is None or self._x.shape != x.shape:
            return self._step(x)
        self._x.copy_(x)
        replay, result = self._recorded
        replay()
        return result

    def _record(self, x: Tensor) -> None:
        self._x = x.clone()
        try:
            self._recorded = self._recorder.record(self._step, self._x)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            print(
                f"warning: cannot record the step as a CUDA graph ({reason}); training continues "
                "without",
                file=sys.stderr,
            )


class Readback:
    """Reads a device tensor without waiting: on a GPU, its value of a few steps ago.

    Reading a GPU tensor directly blocks the host until all queued steps are done. Instead, `latest`
    queues a copy into pinned memory and returns it once the copy is complete.
    """

    def __init__(self) -> None:
        self._value: Tensor | None = None
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None

    def latest(self, source: Tensor) -> Tensor | None:
        """The newest copied value of `source`, the same tensor at each call; None at first."""
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
