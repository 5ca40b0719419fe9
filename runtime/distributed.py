"""Communication between the processes that torchrun starts to share one task."""

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

# How long a process waits for another, which may be downloading data. If one dies, the others
# notice the closed connection at once, and torchrun ends them all.
_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that share the work; a single process is the first.

    All processes must call each method together and in the same order, except `reports`.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes on this machine, each of which uses its own GPU
    store: Any = field(default=None, compare=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints for all."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """The first process's `value`, on all processes."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]

    def collect(self, value: T) -> list[T]:
        """The values of all processes by rank, on all processes."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def largest(self, *values: float) -> list[float]:
        """The maximum of each value over the processes, on all processes.

        Computed on the host, without waiting for a GPU.
        """
        if self.size == 1:
            return list(values)
        row = torch.tensor(values, dtype=torch.float64)
        distributed.all_reduce(row, distributed.ReduceOp.MAX)
        return row.tolist()

    @contextmanager
    def together(self) -> Iterator[None]:
        """If one process raises a `UserError` inside, all raise it at the end."""
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
        """Call `make` on the first process, then on one of each machine, then on all others.

        A file that `make` creates if it is missing is thus created once on each file system, and
        the other processes find it. If `make` raises a `UserError` on one process, all raise it.
        """
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        made: list[T] = []
        for number in range(3 if self.size > 1 else 1):
            with self.together():
                if number == turn:
                    made.append(make())
        return made[0]

    def reports(self) -> bool:
        """Whether this process reports a failure that all processes share: the first that asks."""
        try:
            return self.store is None or self.store.add("reported", 1) == 1
        except RuntimeError:  # the store ended with the first process
            return True


ONE_PROCESS = Ranks()


@contextmanager
def joined_ranks(advice: str = "") -> Iterator[Ranks]:
    """Connect the processes that torchrun started; does nothing for a single process.

    A failure that all processes share is reported by one of them. If a process dies, the others
    exit at once with code 1, and one of them reports the death, followed by `advice`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    shared, rank, size = next(rendezvous("env://", timeout=_TIMEOUT))
    # torchrun keeps one store for all attempts; it still holds the addresses of dead processes.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = PrefixStore(f"attempt-{attempt}", shared)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT
    )
    ranks = Ranks(rank, size, int(os.environ["LOCAL_RANK"]), store)
    try:
        yield ranks
    except (UserError, KeyboardInterrupt) as error:
        if ranks.reports():
            raise
        sys.exit(2 if isinstance(error, UserError) else 128 + signal.SIGINT)
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        if ranks.reports():
            print(f"error: one of {size} processes has died{advice}", file=sys.stderr, flush=True)
        # A clean exit would wait for the dead process.
        os._exit(1)
    finally:
        distributed.destroy_process_group()


def _is_loss(error: RuntimeError) -> bool:
    """Whether an error says that another process cannot be reached."""
    kinds = (distributed.DistBackendError, distributed.DistNetworkError)
    return isinstance(error, kinds) or "gloo" in str(error)


@dataclass(frozen=True)
class Launch:
    """One torchrun command, which starts its processes again if one of them dies."""

    name: str | None  # the same for all attempts of one command
    attempt: int = 0
    attempts: int = 1

    @classmethod
    def of_environment(cls) -> Self:
        """From torchrun's environment variables; without torchrun, one attempt without a name."""
        restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        return cls(_name(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")), 1 + restarts)

    def provenance(self) -> dict[str, str]:
        """The entry of a run's provenance by which later attempts recognise their own run."""
        return {} if self.attempts == 1 or self.name is None else {"launch": self.name}


def _name() -> str | None:
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if name == "none" and error_file is not None:
        # Without --rdzv-id all static rendezvous are called "none". The agent's log folder is
        # unique: .../FOLDER/attempt_0/0/error.json.
        return Path(error_file).parts[-4]
    return name
