"""Processes that share work, forked from the test's process and connected as torchrun does it."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch

from benchmarks.durability import finish, import_once, rank_environments, start_ranks
from runtime.distributed import Ranks, joined_ranks


def in_processes(count: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """The results of `work` in each of `count` processes, by rank; uses the current folder."""
    processes = []
    for rank, environment in enumerate(rank_environments(count)):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.environ.update(environment)
                pyro.enable_validation(False)  # as in training
                with joined_ranks() as ranks:
                    torch.save(work(ranks), f"result-{rank}")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        processes.append(process)
    assert [finish(process) for process in processes] == [0] * count
    return [torch.load(f"result-{rank}", weights_only=False) for rank in range(count)]


def train_in(count: int, *arguments: object) -> list[int]:
    """Train in `count` processes, with their output in `log`; returns their exit codes."""
    import_once()  # for all of them
    return [finish(process) for process in start_ranks(count, arguments, Path("log"))]
