"""A process on its own among ranks; several of them are in test_scoring.py."""

import pytest

from runtime.distributed import Ranks, joined_ranks


def test_a_process_on_its_own_shares_with_itself() -> None:
    ranks = Ranks()
    value = {"a": 1}
    assert ranks.is_first
    assert ranks.share(value) is value
    assert ranks.collect(value) == [value]


def test_the_first_rank_is_the_first() -> None:
    assert Ranks(0, 4, 0).is_first
    assert not Ranks(2, 4, 0).is_first  # the first of another machine


@pytest.mark.parametrize("size", [None, "1"])
def test_without_torchrun_there_is_one_rank(
    size: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with joined_ranks() as ranks:
        assert ranks == Ranks(rank=0, size=1, local_rank=0)
