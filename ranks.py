"""The processes that torchrun starts to share one piece of work, each with its rank."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

T = TypeVar("T")

# Ranks wait for the slowest of them; torchrun ends them all where one dies.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that share the work; a process on its own is the first."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on the same machine, which each take a GPU of their own

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The first rank's `value`, on all of them."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def collect(self, value: T) -> list[T]:
        """Every rank's `value` by rank, on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), size, int(os.environ["LOCAL_RANK"]))
    finally:
        distributed.destroy_process_group()
