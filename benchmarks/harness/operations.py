"""The time of a step by kind of operation, measured by torch.profiler.

Some operations, such as convolutions, are classified by name. Others, such as products, may belong
to a gate or to dropout and are classified by the module that ran them. A derivative is classified
like its operation.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

KINDS = (
    "convolution forward",
    "convolution backward",
    "batch norm",
    "activation",
    "gates and sums",
    "dropout",
    "merge",
    "upsample and padding",
    "sampling and log-probabilities",
    "casts",
    "compiled passes",
    "optimizer",
    "Python and rest",
)

# Prefixes of the names of operations, and of their derivatives in the autograd engine.
_OPERATIONS = {
    "convolution backward": ("aten::convolution_backward", "ConvolutionBackward"),
    "convolution forward": ("aten::conv", "aten::_conv", "aten::mkldnn_conv", "aten::cudnn_conv"),
    "batch norm": (
        *("aten::batch_norm", "aten::_batch_norm", "aten::native_batch_norm", "aten::cudnn_batch"),
        *("NativeBatchNorm", "CudnnBatchNorm", "BatchNorm"),
    ),
    "activation": (
        *("aten::elu", "aten::selu", "aten::relu", "aten::leaky_relu"),
        *("Elu", "Selu", "Relu", "LeakyRelu"),
    ),
    "dropout": ("aten::feature_dropout", "aten::dropout", "aten::native_dropout"),
    "upsample and padding": ("aten::upsample", "Upsample"),
    "casts": ("aten::to", "aten::_to_copy", "ToCopyBackward"),
    "compiled passes": ("## Call CompiledFxGraph", "CompiledFunctionBackward"),
    "optimizer": ("Optimizer.",),
}
# The kind of all other operations in a module, by the class of the innermost of these modules.
_MODULES = {
    "gates and sums": ("Gate", "ResidualBlock"),
    "dropout": ("Dropout2d",),
    "merge": ("Merge",),
    "batch norm": ("BatchNorm2d",),
    "upsample and padding": ("Upsample", "BottomUp", "Decoder"),
    "sampling and log-probabilities": (
        *("TopPrior", "ConditionalPrior", "TopPosterior", "ConditionalPosterior"),
        *("Bernoulli", "Gaussian", "DiscretizedLogisticHead", "DiscretizedLogisticMixtureHead"),
    ),
}
_KIND_OF_MODULE = {name: kind for kind, names in _MODULES.items() for name in names}

_ENGINE = "autograd::engine::evaluate_function: "
_MODULE = "module: "
_REST = "Python and rest"
_SAMPLING = "sampling and log-probabilities"
_STEP = "step"  # operations in no listed module are sampling and log-probabilities


@contextmanager
def _named_modules(module: nn.Module) -> Iterator[None]:
    """Record for the profiler in which module an operation runs."""
    handles = []
    open_ranges: list[record_function] = []

    def enter(kind: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            open_ranges.append(record_function(_MODULE + kind))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for part in module.modules():
        kind = _KIND_OF_MODULE.get(type(part).__name__)
        if kind is not None:
            handles.append(part.register_forward_pre_hook(enter(kind)))
            handles.append(part.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named_kind(name: str) -> str | None:
    name = name.removeprefix(_ENGINE)
    return next((kind for kind, starts in _OPERATIONS.items() if name.startswith(starts)), None)


def _path(event: Any) -> list[Any]:
    """The events around `event`, outermost first, and itself."""
    path = [event]
    while path[-1].cpu_parent is not None:
        path.append(path[-1].cpu_parent)
    return path[::-1]


def _forward_kind(path: list[Any]) -> str:
    for event in path:
        if (kind := _named_kind(event.name)) is not None:
            return kind
    for event in reversed(path):
        if event.name.startswith(_MODULE):
            return event.name.removeprefix(_MODULE)
    return _SAMPLING


def _kind(path: list[Any], of_forward: dict[int, str]) -> str:
    """The kind of the last event of a path."""
    name = path[-1].name
    if name == _STEP or name.startswith((_MODULE, "Torch-Compiled Region")):
        return _REST  # time spent in Python
    engine = next((i for i, event in enumerate(path) if event.name.startswith(_ENGINE)), None)
    if engine is None:
        return _forward_kind(path)
    node = path[engine].name.removeprefix(_ENGINE)
    inside = [event.name for event in path[engine + 1 :]]
    if inside and inside[0].startswith("aten::add"):
        return "gates and sums"  # gradients of a feature map that was used twice
    if node.startswith("torch::autograd::AccumulateGrad"):
        return _REST
    if node.startswith("CompiledFunctionBackward"):
        named = [kind for kind in map(_named_kind, inside) if kind is not None]
        return named[-1] if named else _REST
    return _named_kind(node) or of_forward.get(path[engine].sequence_nr, _REST)


def times_by_kind(
    step: Callable[[], object], module: nn.Module, *, compiled: bool, steps: int = 3
) -> dict[str, float]:
    """Milliseconds of one `step` by kind of operation, the mean over `steps`.

    On a GPU this is the time of its kernels. `module` is the network that the step runs; it
    gets no hooks if its blocks are compiled.
    """
    device = next(module.parameters()).device
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with _silenced(), profile(activities=activities, acc_events=True) as profiler:
        with nullcontext() if compiled else _named_modules(module):
            for _ in range(steps):
                with record_function(_STEP):
                    step()
        if on_gpu:
            torch.cuda.synchronize(device)
    sums = _sums(list(profiler.events()), on_gpu=on_gpu)
    return {kind: total / steps for kind, total in sums.items()}


@contextmanager
def _silenced() -> Iterator[None]:
    """Discard the messages that the profiler's library writes to standard error."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _sums(events: list[Any], *, on_gpu: bool) -> dict[str, float]:
    paths = [_path(event) for event in events]
    of_forward: dict[int, str] = {}
    for path in paths:
        # Several operations share a number; the last of them is the one that is differentiated.
        if path[-1].sequence_nr >= 0 and not any(e.name.startswith(_ENGINE) for e in path):
            of_forward[path[-1].sequence_nr] = _forward_kind(path)
    sums: dict[str, float] = defaultdict(float)
    for event, path in zip(events, paths, strict=True):
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        sums[_kind(path, of_forward)] += taken / 1000
    return {kind: sums[kind] for kind in KINDS if sums[kind] > 0}
