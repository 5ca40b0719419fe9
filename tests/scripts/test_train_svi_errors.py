"""Mistakes in train_svi.py's command line and files: one line, exit code 2, nothing written."""

import errno
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

import datasets
import evaluate
import train_svi
from datasets import static_mnist
from ladder_vae.runs.checkpoint import FORMAT
from tests.commands import Result, content, is_one_line_error, refusal, run, script
from tests.made_data import contents
from tests.tiny_runs import LADDER, train

pytestmark = pytest.mark.usefixtures("own_folder")


# --- Options ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--preset mnist-99", ["'mnist-99'", "mnist-12"]),
        ("--dataset mnits", ["'mnits'", *datasets.NAMES]),
        ("--dataste digits", ["--dataste"]),
        ("--step 3", ["--step"]),  # no abbreviations
        ("something", ["something"]),
        ("--zdims 2 2 2", ["--zdims", "3 layers", "--downsample 2"]),
        ("--downsample 1", ["--zdims", "2 layers", "--downsample 1"]),
        ("--downsample 0 2", ["--downsample", "2 halvings", "--blocks-per-layer is 1"]),
        ("--zdims", ["--zdims"]),
        ("--zdims 2 0", ["--zdims", "at least 1"]),
        ("--downsample 0 -1", ["--downsample", "not negative"]),
        ("--batch-size 0", ["--batch-size", "at least 1"]),
        ("--batch-size 1501", ["1501", "1500"]),
        ("--steps -5", ["--steps", "not negative"]),
        ("--lr -0.1", ["--lr", "positive"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--lr inf", ["--lr", "inf"]),
        ("--freebits nan", ["--freebits", "nan"]),
        ("--max-minutes inf", ["--max-minutes", "inf"]),
        ("--dropout 1", ["--dropout", "below 1"]),
        ("--ema -0.5", ["--ema", "at least 0"]),
        ("--seed -1", ["--seed is -1"]),
        ("--seed 99999999999999999999999", ["--seed"]),
        ("--lr fast", ["--lr", "'fast'"]),
        ("--steps 1.5", ["--steps", "'1.5'"]),
        ("--nfilters many", ["--nfilters", "'many'"]),
        ("--nonlin gelu", ["--nonlin", "'gelu'", "elu"]),
        ("--likelihood poisson", ["--likelihood", "'poisson'", "discr_log_mix"]),
        ("--likelihood discr_log_mix", ["discr_log_mix", "3"]),
        ("--zdims 2 2 2 --downsample 1 1 1 --batch-size 1", ["--batch-size is 1", "--bn"]),
        ("--lr-decay cosine --steps 0", ["--lr-decay", "--steps", "--epochs", "--max-minutes"]),
        ("--device tpu", ["'tpu'", "cpu"]),
        ("--device nonsense", ["'nonsense'", "cpu"]),
        ("--sync-bn", ["--sync-bn", "only one"]),
        ("--sync-bn --no-bn", ["--sync-bn"]),
    ],
)
def test_wrong_options_are_refused(options: str, named: list[str], tmp_path: Path) -> None:
    line = refusal(train_svi.main, *LADDER, "--steps", 1, *options.split(), "--out", "run")
    for name in named:
        assert name in line
    assert content(tmp_path) == {}


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_missing_gpu_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(train_svi.main, *LADDER, "--device", name, "--out", "run")
    assert f"'{name}'" in line
    assert "--device cpu" in line
    assert content(tmp_path) == {}


# --- The folder of a new run ---


def refusal_after_progress(*arguments: object) -> str:
    """The one-line error of a run that may have printed progress before it."""
    result = run(train_svi.main, *arguments)
    *progress, line = result.err.splitlines(keepends=True)
    assert is_one_line_error(Result(result.code, result.out, line)), result
    assert all(re.match(r"step \d+: ", said) for said in progress), result
    return line


def test_another_run_is_left_alone(trained_copy: Path) -> None:
    before = content(trained_copy)
    line = refusal(train_svi.main, *LADDER, "--steps", 1, "--out", trained_copy)
    assert f"{trained_copy} holds another run" in line
    assert f"--resume {trained_copy}" in line
    assert content(trained_copy) == before


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    before = content(tmp_path)
    for name in ("mine", "file", "file/run"):
        line = refusal_after_progress(*LADDER, "--steps", 1, "--out", name)
        assert name in line
        assert "folder" in line
    assert content(tmp_path) == before


def failing(number: int) -> Callable[..., NoReturn]:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_full_disk_is_reported_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", failing(errno.ENOSPC))
    line = refusal_after_progress(*LADDER, "--steps", 1, "--out", "run")
    assert "config.json" in line
    assert "No space left on device" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_missing_write_access_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", failing(errno.EACCES))
    line = refusal_after_progress(*LADDER, "--steps", 1, "--out", "run")
    assert "Permission denied" in line
    assert content(tmp_path) == {}


# --- Damaged run folders, which evaluate.py refuses alike ---


class Malicious:
    """Unpickling this would call `function`, which creates `executed`."""

    def __init__(self, function: Callable[..., Any], *arguments: str) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.fixture(params=["train_svi", "evaluate"])
def open_run(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """Each script's error for a run folder, which it must leave unchanged."""

    def refused(folder: Path) -> str:
        before = content(folder)
        if request.param == "train_svi":
            line = refusal(train_svi.main, "--resume", folder, "--steps", 31, "--device", "cpu")
        else:
            line = refusal(evaluate.main, folder, "--device", "cpu", "--samples", 1)
        assert content(folder) == before
        return line

    return refused


def test_a_folder_that_is_no_run_is_refused(
    open_run: Callable[[Path], str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    line = open_run(tmp_path / "empty")
    assert f"{tmp_path / 'empty'} is not a run folder: it has no config.json" in line
    for name in ("file", "nowhere"):
        assert f"{tmp_path / name}" in open_run(tmp_path / name)
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def only_checkpoint(trained_copy: Path) -> Path:
    """The checkpoint of a run that has no other."""
    path = trained_copy / "checkpoints" / "30.pt"
    for other in path.parent.glob("*.pt"):
        if other != path:
            other.unlink()
    return path


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "foreign"])
def test_a_damaged_checkpoint_is_refused(
    kind: str, open_run: Callable[[Path], str], trained_copy: Path, only_checkpoint: Path
) -> None:
    whole = only_checkpoint.read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}
    if kind == "foreign":
        torch.save({"weight": torch.zeros(2)}, only_checkpoint)
    else:
        only_checkpoint.write_bytes(broken[kind])
    line = open_run(trained_copy)
    assert f"{only_checkpoint} is damaged or not a checkpoint" in line


@pytest.mark.parametrize(
    "trap", [Malicious(os.mkdir, "executed"), Malicious(open, "executed", "w")]
)
def test_a_checkpoint_never_runs_code(
    trap: Malicious, open_run: Callable[[Path], str], trained_copy: Path, only_checkpoint: Path
) -> None:
    """The message does not advise how to run it, either."""
    with only_checkpoint.open("wb") as file:
        torch.save({"format": FORMAT, "step": 30, "weights": trap}, file)
    line = open_run(trained_copy)
    assert f"{only_checkpoint} is damaged or not a checkpoint" in line
    assert not Path("executed").exists()
    assert "weights_only" not in line
    assert "can still be loaded" not in line


def test_the_trap_of_these_tests_works(tmp_path: Path) -> None:
    torch.save(Malicious(os.mkdir, "executed"), tmp_path / "trap.pt")
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert (tmp_path / "executed").is_dir()


def test_the_checkpoint_of_another_network_is_refused(
    open_run: Callable[[Path], str], trained_copy: Path
) -> None:
    options = "--zdims 2 3 --steps 1 --ts-log-interv 0 --out other".split()
    assert train(*LADDER, *options) == 0
    shutil.copy("other/checkpoints/1.pt", trained_copy / "checkpoints" / "30.pt")
    assert "do not fit the network in config.json" in open_run(trained_copy)


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """Changes options in config.json."""

    def change(content: dict[str, Any]) -> Any:
        config = content["config"]
        ladder = {n: changes.get(n, value) for n, value in config["ladder"].items()}
        others = {n: value for n, value in changes.items() if n not in ladder}
        return content | {"config": config | others | {"ladder": ladder}}

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed(colour="red"), "'colour'"),
        (changed(lr="fast"), "`lr` is 'fast'; it must be a number"),
        (changed(steps=2.5), "`steps` is 2.5; it must be a whole number"),
        (changed(steps=True), "`steps` is True; it must be a whole number"),
        (changed(gated=1), "`gated` is 1; it must be true or false"),
        (changed(z_dims=[]), "`z_dims` is []; it must be a list of whole numbers"),
        (changed(z_dims=[2, "2"]), "`z_dims` is [2, '2']"),
        (changed(dataset=3), "`dataset` is 3; it must be text"),
        (changed(dataset="nothing"), "`dataset` is 'nothing'"),
        (changed(lr=math.nan), "`lr` is nan"),
        (changed(z_dims=[2]), "`z_dims` lists 1 layers but `downsample` 2"),
        (lambda content: content | {"config": None}, "does not describe a run"),
        (lambda content: content | {"format": 99}, "format 99"),
        (lambda content: content | {"image_shape": [1, 8]}, "does not describe a run"),
        (lambda content: {"format": FORMAT}, "it has no 'image_shape'"),
        (lambda content: [content], "does not describe a run"),
    ],
)
def test_a_changed_configuration_is_refused(
    change: Callable[[dict[str, Any]], Any],
    named: str,
    open_run: Callable[[Path], str],
    trained_copy: Path,
) -> None:
    path = trained_copy / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    line = open_run(trained_copy)
    assert str(path) in line
    assert named in line


@pytest.mark.parametrize("text", [b"", b'{"format": 1, "conf', b"\xff\xfe\x00"])
def test_a_damaged_configuration_is_refused(
    text: bytes, open_run: Callable[[Path], str], trained_copy: Path
) -> None:
    path = trained_copy / "config.json"
    path.write_bytes(text)
    assert f"{path} is damaged" in open_run(trained_copy)


# --- Data ---


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_without_a_network_the_message_says_which_files_to_put_where(tmp_path: Path) -> None:
    data = tmp_path / "data"
    proxy = f"http://127.0.0.1:{closed_port()}"
    result = script(
        *("train_svi.py", "--preset", "mnist-3", "--device", "cpu"),
        *("--out", tmp_path / "run", "--data-dir", data),
        **{"http_proxy": proxy, "HTTP_PROXY": proxy, "no_proxy": "", "NO_PROXY": ""},
    )
    assert is_one_line_error(result), result
    assert str(data / "static_mnist.npz") in result.err
    assert "Connection refused" in result.err
    for name in static_mnist.MD5:
        assert name in result.err
    assert f"into {data}" in result.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_truncated_data_set_is_refused(
    kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {name: np.zeros((4, 98), np.uint8) for name in ("train", "valid", "test")}
    monkeypatch.setattr(static_mnist, "CONTENTS", contents(arrays))
    path = tmp_path / "static_mnist.npz"
    np.savez_compressed(path, allow_pickle=False, **arrays)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    before = content(tmp_path)
    options = "-d static_mnist --device cpu --out run --data-dir".split()
    assert f"{path} is damaged" in refusal(train_svi.main, *options, tmp_path)
    assert content(tmp_path) == before
