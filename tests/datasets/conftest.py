"""Fixtures with small synthetic data sets in the published formats."""

from collections.abc import Callable, Iterator

import pytest

from tests.made_data import (
    Made,
    Server,
    forbid_network,
    make_cifar10,
    make_fashion_mnist,
    make_kmnist,
    make_mnist,
    make_omniglot,
    make_static_mnist,
    make_svhn,
    serving,
)

MAKERS: dict[str, Callable[[Server, pytest.MonkeyPatch], Made]] = {
    "static_mnist": make_static_mnist,
    "mnist": make_mnist,
    "fashion_mnist": make_fashion_mnist,
    "kmnist": make_kmnist,
    "omniglot": make_omniglot,
    "cifar10": make_cifar10,
    "svhn": make_svhn,
}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(params=MAKERS)
def made(
    request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Made]:
    """The name of each downloaded data set, and its small stand-in."""
    return request.param, MAKERS[request.param](server, monkeypatch)


@pytest.fixture
def made_static_mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_static_mnist(server, monkeypatch)


@pytest.fixture
def made_mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_mnist(server, monkeypatch)


@pytest.fixture
def made_cifar10(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_cifar10(server, monkeypatch)


@pytest.fixture
def made_svhn(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_svhn(server, monkeypatch)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)
