"""The roofline of a step: the least time that a GPU needs for its operations and memory traffic.

Every operation of an eager step is counted, forward and backward: the multiplications and
additions of convolutions (by PyTorch's own formulas), and the bytes that each operation reads and
writes once. An operation takes at least the time of its arithmetic at the GPU's peak rate, and at
least the time of its bytes at the memory's. Passes other than convolutions can be fused with one
another, so there are two sums: the convolutions alone, and all passes.
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
    """Peak rates from a GPU's data sheet, for dense arithmetic."""

    operations: dict[str, float]  # multiplications and additions per second, by precision
    bytes: float  # per second, to and from its memory


# NVIDIA's data sheets for the SXM modules, without sparsity.
_HOPPER = {"bf16": 989e12, "tf32": 494e12, "float32": 67e12}
PEAKS = {
    "NVIDIA H100 80GB HBM3": Peak(_HOPPER, 3.35e12),
    "NVIDIA H200": Peak(_HOPPER, 4.8e12),
}


@dataclass
class Counts:
    """The arithmetic and memory traffic of one operation."""

    name: str
    dtype: torch.dtype
    operations: int  # of a convolution or matrix product; 0 for other passes
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
        # Views and empty tensors move no bytes.
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
    """Bytes in memory: an expanded tensor counts as the tensor that it repeats."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


@contextmanager
def counted() -> Iterator[list[Counts]]:
    """The operations that run inside; those in compiled blocks are not seen."""
    with _Counter() as counter:
        yield counter.counts


def totals(counts: list[Counts]) -> dict[str, int]:
    """Sums over a step: operations and bytes of convolutions, number and bytes of other passes."""
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
    """The roofline for networks in this precision: convolutions alone, and all passes."""
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
