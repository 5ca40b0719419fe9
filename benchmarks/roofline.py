"""The least time that a GPU can take for a step, from its operations and bytes.

Every operation of a step is counted as PyTorch runs it eagerly, forward and backward: a
convolution's multiplications and additions (with PyTorch's own formulas), and the bytes that each
operation reads and writes once. An operation takes at least its operations at the GPU's peak rate
and its bytes at the memory's. Passes over feature maps besides the convolutions can be merged into
one another, so that both sums are given: of the convolutions alone, and with every other pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Peak:
    """What a GPU's data sheet promises, dense."""

    operations: dict[str, float]  # multiplications and additions per second, by precision
    bytes: float  # per second, from and to its memory


# NVIDIA's data sheets for the SXM modules, without sparsity.
_HOPPER = {"bf16": 989e12, "tf32": 494e12, "float32": 67e12}
PEAKS = {
    "NVIDIA H100 80GB HBM3": Peak(_HOPPER, 3.35e12),
    "NVIDIA H200": Peak(_HOPPER, 4.8e12),
}


@dataclass
class Counts:
    """Of one operation."""

    name: str
    dtype: torch.dtype
    operations: int  # of a convolution or matrix product; 0 for a pass over the numbers
    bytes: int


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: list[Counts] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = _tensors((args, kwargs))
        # A view moves nothing, and memory is given without being touched.
        if inputs and not func.is_view and "empty" not in str(func):
            formula = flop_registry.get(func.overloadpacket)
            operations = formula(*args, **(kwargs or {}), out_val=result) if formula else 0
            outputs = _tensors(result)
            self.counts.append(
                Counts(str(func), inputs[0].dtype, operations, _bytes([*inputs, *outputs]))
            )
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """As far as memory goes: an expanded tensor is no larger than what it repeats."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


@contextmanager
def counted() -> Iterator[list[Counts]]:
    """The operations that run inside; compiled blocks cannot be seen into."""
    with _Counter() as counter:
        yield counter.counts


def totals(counts: list[Counts]) -> dict[str, int]:
    """Sums over a step."""
    products = [c for c in counts if c.operations]
    passes = [c for c in counts if not c.operations]
    return {
        "convolution_operations": sum(c.operations for c in products),
        "convolution_bytes": sum(c.bytes for c in products),
        "other_passes": len(passes),
        "other_bytes": sum(c.bytes for c in passes),
    }


def least_milliseconds(
    counts: list[Counts], peak: Peak, precision: str = "float32"
) -> dict[str, float]:
    """The roofline of networks in this precision: the convolutions alone, and all passes."""
    single = "tf32" if precision == "tf32" else "float32"
    convolutions = sum(
        max(
            c.operations / peak.operations["bf16" if c.dtype is torch.bfloat16 else single],
            c.bytes / peak.bytes,
        )
        for c in counts
        if c.operations
    )
    others = sum(c.bytes for c in counts if not c.operations) / peak.bytes
    return {"convolutions": 1000 * convolutions, "all_passes": 1000 * (convolutions + others)}
