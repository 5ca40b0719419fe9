"""What the file system denies is said in one line, with its reason; ~ is the home folder."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import evaluate
import train_svi
from ladder_vae.runs.run import Run
from tests.commands import content, is_one_line_error, refusal, run
from tests.permissions import as_other_users
from tests.tiny_runs import LADDER
from tools import compare, export_weights, import_reference, report, reproduce

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def denied() -> Iterator[Callable[..., Path]]:
    """Takes a path's permissions away until the end of the test."""
    modes: list[tuple[Path, int]] = []

    def deny(path: Path, mode: int = 0) -> Path:
        modes.append((path, path.stat().st_mode))
        path.chmod(mode)
        return path

    with as_other_users():
        yield deny
    for path, mode in reversed(modes):
        path.chmod(mode)


COMMANDS: dict[str, tuple[Callable[..., int], Callable[[Path], list[object]]]] = {
    "train": (train_svi.main, lambda path: [*LADDER, "--steps", 1, "--out", path]),
    "resume": (train_svi.main, lambda path: ["--resume", path]),
    "evaluate": (evaluate.main, lambda path: [path]),
    "compare": (compare.main, lambda path: [path]),
    "report": (report.main, lambda path: [path]),
    "export": (export_weights.main, lambda path: [path, "--out", "file.safetensors"]),
    "reproduce": (
        reproduce.main,
        lambda path: ["mnist-3", "--steps", 1, "--dataset", "digits", "--out", path],
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_without_permission(command: str, denied: Callable[..., Path]) -> None:
    Path("closed").mkdir()
    denied(Path("closed"))
    main, arguments = COMMANDS[command]
    said = refusal(main, *arguments(Path("closed/run")))
    assert "Permission denied" in said
    assert "closed/run" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_is_too_long(command: str) -> None:
    main, arguments = COMMANDS[command]
    assert "File name too long" in refusal(main, *arguments(Path("x" * 300)))


@pytest.mark.parametrize("command", ["train", "reproduce"])
def test_a_folder_below_a_file(command: str) -> None:
    Path("file").write_text("")
    main, arguments = COMMANDS[command]
    assert "Not a directory" in refusal(main, *arguments(Path("file/run")))


@pytest.mark.parametrize(
    ("part", "commands"),
    [
        (".", ["resume", "evaluate", "compare", "report", "export", "train", "reproduce"]),
        ("config.json", ["resume", "evaluate", "report", "export"]),
        ("checkpoints", ["resume", "evaluate", "export"]),
        ("checkpoints/30.pt", ["resume", "evaluate", "export"]),
        ("metrics.jsonl", ["report"]),
        ("eval", ["compare", "report"]),
        ("eval/30", ["compare", "report"]),
        ("eval/30/metrics.json", ["compare", "report"]),
        ("images", ["report"]),
        ("images/samples-30.png", ["report"]),
    ],
)
def test_parts_of_a_run_without_permission(
    part: str, commands: list[str], evaluated_copy: Path, denied: Callable[..., Path]
) -> None:
    """Nothing is called damaged, absent or not a run, and nothing is written."""
    before = content(evaluated_copy)
    denied(evaluated_copy / part)
    for command in commands:
        main, arguments = COMMANDS[command]
        said = refusal(main, *arguments(evaluated_copy))
        assert "Permission denied" in said, command
        assert str(evaluated_copy / part) in said, command
    (evaluated_copy / part).chmod(0o755)
    after = content(evaluated_copy)
    after.pop(".lock", None)
    before.pop(".lock", None)
    assert after == before


def test_reference_weights_without_permission(denied: Callable[..., Path]) -> None:
    Path("weights.pt").write_bytes(b"")
    denied(Path("weights.pt"))
    said = refusal(import_reference.main, "weights.pt", "--out", "run", "--dataset", "digits")
    assert said == "error: cannot read weights.pt (Permission denied)\n"


def test_a_run_folder_that_cannot_be_written(
    trained_copy: Path, denied: Callable[..., Path]
) -> None:
    (trained_copy / ".lock").unlink(missing_ok=True)
    denied(trained_copy, 0o555)
    said = refusal(train_svi.main, "--resume", trained_copy, "--steps", 31, "--device", "cpu")
    assert f"cannot write {trained_copy / '.lock'} (Permission denied)" in said


def test_the_home_folder(evaluated_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every path of a command: the shell does not expand --out=~/x."""
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    Path("home").mkdir()
    os.symlink(evaluated_run, "home/run")
    assert run(compare.main, "~/run", "--out=~/a").code == 0
    assert run(export_weights.main, "~/run", "--out=~/b").code == 0
    options = ["--samples", 1, "--limit", 5, "--device", "cpu"]
    assert run(evaluate.main, "~/run", "--out=~/c", *options).code == 0
    assert run(train_svi.main, *LADDER, "--steps", 0, "--out=~/d", "--max-minutes", 1e-9).code == 0
    assert {"a", "b", "c", "d"} < set(os.listdir("home"))
    assert Run.open(Path("~/d")).path == Path("home/d").absolute()
    assert os.listdir() == ["home"]


def test_names_that_are_not_utf_8(evaluated_run: Path) -> None:
    """Of run folders, in every file that mentions them."""
    name = os.fsdecode(b"caf\xe9")
    os.symlink(evaluated_run, name)
    result = run(compare.main, name, "--out", os.fsdecode(b"out\xe9"))
    assert result.code == 0
    assert "caf\\udce9" in Path(os.fsdecode(b"out\xe9"), "comparison.md").read_text("utf-8")
    assert "caf\\udce9" in Path(os.fsdecode(b"out\xe9"), "comparison.csv").read_text("utf-8")
    line = refusal(compare.main, os.fsdecode(b"no\xe9"))
    assert line.startswith("error: no\\udce9 is neither")
    assert not is_one_line_error(result)
