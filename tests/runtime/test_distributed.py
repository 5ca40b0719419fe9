"""What processes share: values, errors and files."""

import socket
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

import runtime.distributed
from runtime.distributed import ONE_PROCESS, Launch, Ranks, joined_ranks
from runtime.errors import UserError
from tests.processes import in_processes


def test_a_single_process_shares_with_itself() -> None:
    value = {"a": 1}
    assert ONE_PROCESS.is_first
    assert ONE_PROCESS.share(value) is value
    assert ONE_PROCESS.collect(value) == [value]
    assert ONE_PROCESS.largest(1.0, 2.0) == [1.0, 2.0]
    assert ONE_PROCESS.in_turns(lambda: value) is value
    assert ONE_PROCESS.reports()


def test_the_first_process_of_all_machines_is_the_first() -> None:
    assert Ranks(0, 4, 0).is_first
    assert not Ranks(2, 4, 0).is_first  # the first on another machine


@pytest.mark.parametrize("size", [None, "1"])
def test_without_torchrun_there_is_one_process(
    size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with joined_ranks() as ranks:
        assert ranks == Ranks(rank=0, size=1, local_rank=0)
    assert Launch.of_environment() == Launch(None, 0, 1)


def set_launch(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Set torchrun's variables to these, and unset the others."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
        if name in variables:
            monkeypatch.setenv(name, variables[name])


COMPLETE = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29871"}


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is empty and RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"} | COMPLETE | {"MASTER_ADDR": ""}, "and MASTER_ADDR not"),
        ({"WORLD_SIZE": "two", "RANK": "0"} | COMPLETE, "WORLD_SIZE is 'two', not a number"),
        ({"WORLD_SIZE": "2", "RANK": "-1"} | COMPLETE, "RANK is '-1', not a number"),
        ({"WORLD_SIZE": "2", "RANK": "2"} | COMPLETE, "RANK 2 and WORLD_SIZE 2 do not fit"),
        ({"WORLD_SIZE": "0", "RANK": "0"} | COMPLETE, "RANK 0 and WORLD_SIZE 0 do not fit"),
    ],
)
def test_incomplete_variables_of_torchrun_are_refused(
    variables: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler or an earlier command leaves them."""
    set_launch(monkeypatch, **variables)
    with pytest.raises(UserError, match=said) as error, joined_ranks():
        pass
    assert "start several processes by torchrun" in str(error.value)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_processes_that_do_not_start_are_named_and_not_waited_for(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    set_launch(monkeypatch, **COMPLETE | {"WORLD_SIZE": "2", "RANK": rank, "MASTER_PORT": port})
    monkeypatch.setattr(runtime.distributed, "_JOIN", timedelta(seconds=2))
    monkeypatch.setattr(runtime.distributed, "_SILENT_SECONDS", 0.1)
    what = f"for the other processes at 127.0.0.1:{port}"
    said = f"waited in vain {what}.*WORLD_SIZE 2 and RANK {rank}"
    with pytest.raises(UserError, match=said), joined_ranks():
        pass
    assert f"waits {what}" in capsys.readouterr().err


@pytest.mark.usefixtures("own_folder")
def test_processes_share_values() -> None:
    def work(ranks: Ranks) -> list[object]:
        own = [ranks.rank, 10 - ranks.rank]
        shared, collected = ranks.share(ranks.rank + 5), ranks.collect(ranks.rank)
        return [shared, collected, ranks.largest(*own)]

    assert in_processes(2, work) == [[5, [0, 1], [1.0, 10.0]]] * 2


@pytest.mark.usefixtures("own_folder")
def test_one_process_makes_a_file_and_the_others_find_it() -> None:
    """On two machines with a folder each: the last of three processes is on the second machine."""

    def work(ranks: Ranks) -> str:
        machine = Path("b" if ranks.rank == 2 else "a")
        ranks = replace(ranks, local_rank=0 if ranks.rank == 2 else ranks.rank)

        def make() -> str:
            if (machine / "data").exists():
                return "found"
            time.sleep(0.1)
            machine.mkdir()
            (machine / "data").touch()
            return "made"

        return ranks.in_turns(make)

    assert in_processes(3, work) == ["made", "found", "made"]


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("where", [0, 1])
def test_an_error_of_one_process_is_raised_by_all(where: int) -> None:
    def work(ranks: Ranks) -> str:
        def make() -> None:
            if ranks.rank == where:
                raise UserError(f"process {ranks.rank} has no data")

        with pytest.raises(UserError) as refused:
            ranks.in_turns(make)
        return str(refused.value)

    assert in_processes(2, work) == [f"process {where} has no data"] * 2
