"""The processes that torchrun starts to share one piece of work, each with its rank."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from runtime.errors import UserError

T = TypeVar("T")

# Ranks wait for the slowest of them, which may be downloading; torchrun ends them all where one
# dies, and a connection that is closed is noticed at once.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that share the work; a process on its own is the first.

    All methods but `speaks` are to be called on all ranks, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those on the same machine, which each take a GPU of their own
    store: Any = field(default=None, compare=False, repr=False)

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

    def largest(self, *values: float) -> list[float]:
        """The largest of each of the values over the ranks, on all of them.

        On the host: no GPU is waited for.
        """
        if self.size == 1:
            return list(values)
        row = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(row, distributed.ReduceOp.MAX)
        return row.tolist()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Where one rank has a `UserError` inside, all have it afterwards."""
        own: UserError | None = None
        try:
            yield
        except UserError as error:
            if self.size == 1:
                raise
            own = error
        found = self.collect(None if own is None else str(own))
        messages = [message for message in found if message is not None]
        if messages:
            raise UserError(messages[0]) from own

    def in_turns(self, make: Callable[[], T]) -> T:
        """What `make` returns, on each rank: on the first one first, then once on each machine.

        So a file that it makes where there is none is made once, and found by the others, whether
        or not the machines share a file system. Raises `UserError` on all ranks if it does on one.
        """
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        made: list[T] = []
        for number in range(3 if self.size > 1 else 1):
            with self.together():
                if number == turn:
                    made.append(make())
        return made[0]

    def speaks(self) -> bool:
        """Whether this rank is to tell of the end that has come to several: the first to ask."""
        try:
            return self.store is None or self.store.add("told", 1) == 1
        except RuntimeError:  # the store went with the first rank
            return True


@contextmanager
def joined_ranks(advice: str = "") -> Iterator[Ranks]:
    """Join the processes that torchrun started, if it did.

    What ends all ranks is told by one of them. Where another rank is gone, this one exits at once
    with code 1, and one of those that are left tells of it and of what to do, which is `advice`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    shared, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    # torchrun keeps its store over all attempts, with the addresses of those that have died.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", shared)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE
    )
    ranks = Ranks(rank, size, int(os.environ["LOCAL_RANK"]), store)
    try:
        yield ranks
    except (UserError, KeyboardInterrupt) as error:
        if ranks.speaks():
            raise
        sys.exit(2 if isinstance(error, UserError) else 128 + signal.SIGINT)
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        if ranks.speaks():
            print(f"error: one of {size} processes has died{advice}", file=sys.stderr, flush=True)
        # At once: leaving in order would wait for the one that is gone.
        os._exit(1)
    finally:
        distributed.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    """Whether an error says that another rank cannot be reached any more."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError)
    return isinstance(error, kinds) or "gloo" in str(error)


@dataclass(frozen=True)
class Launch:
    """One command of torchrun, which starts its processes anew when one of them has died."""

    name: str | None  # the same in all its attempts, another one in another command
    attempt: int = 0
    attempts: int = 1

    @classmethod
    def of_environment(cls) -> Self:
        """As torchrun tells its processes; without torchrun one attempt without a name."""
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        return cls(_name(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), 1 + restarts)

    def provenance(self) -> dict[str, str]:
        """What a run folder says of it, for a later attempt to know the run as its own."""
        return {} if self.attempts == 1 or self.name is None else {"launch": self.name}


def _name() -> str | None:
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if name == "none" and error_file is not None:
        # Machines that are listed by hand have no --rdzv-id unless told; but the first of them
        # keeps a folder, .../FOLDER/attempt_0/0/error.json.
        return Path(error_file).parts[-4]
    return name
