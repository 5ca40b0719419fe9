"""Damaged files and wrong command lines are errors of one line, and run no code.

These are samples of each kind; tests/stress/test_fuzz.py generates many more.
"""

import copy
import io
import json
import os
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
import train_svi
from ladder_vae.runs.checkpoint import FORMAT
from runtime.errors import UserError
from tests.commands import is_one_line_error, refusal, run
from tests.file_kinds import CHECKED, READERS, make_run, whole_files
from tools import import_reference

LADDER = "--preset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --device cpu --dry-run".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    return whole_files(tmp_path_factory.mktemp("whole"))


def _with(whole: bytes, piece: bytes, *, replaced: int) -> bytes:
    """`whole` with some bytes replaced by a piece."""
    place = len(whole) // 3
    return whole[:place] + piece + whole[place + replaced :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "cut at the end": lambda whole: whole[:-1],
    "one bit": lambda whole: _with(whole, bytes([whole[len(whole) // 3] ^ 1]), replaced=1),
    "inserted": lambda whole: _with(whole, b"\0\xff\n", replaced=0),
    "another file": lambda whole: b"<html>\xe9not found</html>\n",
    "deep JSON": lambda whole: b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", READERS)
def test_damaged_files(
    whole: dict[str, list[bytes]], tmp_path: Path, kind: str, damage: str
) -> None:
    """A damaged file is an error of one line, or is read; checked files are read unchanged."""
    found: list[Any] = []
    for content in whole[kind]:
        found.clear()
        expected = READERS[kind](tmp_path, content)

        def command(_: Any, content: bytes = DAMAGES[damage](content)) -> int:
            found.append(READERS[kind](tmp_path, content))
            return 0

        result = run(command)
        assert result.code == 0 or is_one_line_error(result)
        if kind in CHECKED:
            assert found in ([], [expected])


CONFIG_VALUES: list[tuple[tuple[str, ...], Any]] = [
    (("format",), 99),
    (("format",), None),
    (("image_shape",), [1, 8]),
    (("image_shape",), [1, "a", 8]),
    (("image_shape",), [1, -8, 8]),
    (("image_shape",), 7),
    (("config",), []),
    (("config",), None),
    (("config", "lr"), "fast"),
    (("config", "lr"), -1),
    (("config", "lr"), float("nan")),
    (("config", "seed"), 2**70),
    (("config", "steps"), 1.5),
    (("config", "dataset"), "minst"),
    (("config", "dataset"), ["digits"]),
    (("config", "colour"), "red"),
    (("config", "a\nb"), 1),
    (("config", "descr"), "two\nlines"),
    (("config", "ladder"), None),
    (("config", "ladder", "z_dims"), []),
    (("config", "ladder", "z_dims"), [2, "2"]),
    (("config", "ladder", "z_dims"), [2, 10**400]),
    (("config", "ladder", "nonlin"), {"name": "elu"}),
    (("config", "ladder", "gated"), "yes"),
    (("provenance",), 1),
]


@pytest.mark.parametrize(("place", "value"), CONFIG_VALUES, ids=lambda value: str(value)[:40])
def test_invalid_configurations(tmp_path: Path, place: tuple[str, ...], value: Any) -> None:
    """An invalid value in config.json is an error of one line."""
    made = make_run(tmp_path / "run")
    content = copy.deepcopy(made.description())
    holder = content
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    (made.path / "config.json").write_text(json.dumps(content))
    refusal(evaluate.main, made.path, "--device", "cpu")


@pytest.mark.parametrize(
    "words",
    [
        "--lr nan",
        "--lr 1e400",
        "--seed -1",
        f"--seed {2**63}",
        f"--steps {'9' * 5000}",
        "--steps 0.5",
        "--zdims",
        "--zdims x",
        "--nonlin \x1b[31m",
        "--nfilters ١.٠",
        "--batch-size 0",
        "--descr a\tb",
        "--colour red",
        "--pre digits",
        "--resume nothing",
        "positional",
    ],
)
def test_wrong_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    given = words.split(" ")
    refusal(train_svi.main, *LADDER, *given)
    refusal(evaluate.main, "run", *given)
    refusal(import_reference.main, "weights.pt", "--out", "run", *given)
    assert list(tmp_path.iterdir()) == []


class Payload:
    """Unpickling this makes the folder `executed`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def payloads() -> list[bytes]:
    """Files that would run code if they were unpickled."""
    checkpoint, arrays = io.BytesIO(), io.BytesIO()
    torch.save({"format": FORMAT, "step": 1, "weights": Payload()}, checkpoint)
    np.savez(arrays, train=np.array([Payload()], dtype=object))
    return [checkpoint.getvalue(), pickle.dumps(Payload()), arrays.getvalue()]


@pytest.mark.parametrize("kind", READERS)
def test_payloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """No reader runs code from a file."""
    monkeypatch.chdir(tmp_path)
    for content in payloads():
        with suppress(UserError):
            READERS[kind](tmp_path, content)
        assert not (tmp_path / "executed").exists()
