"""Checkpoints on their own: checksums, what is kept, old formats, published weights."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import evaluate
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.runs import published
from ladder_vae.runs.checkpoint import (
    FORMAT,
    STATE,
    Damaged,
    load_weights,
    read_checkpoint,
    write_checkpoint,
)
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from runtime.errors import UserError
from runtime.files import AppendedFile, remove_partial_files, write_atomically

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)
STEPS = (1, 2, 3, 4)


def state(**values: Any) -> dict[str, Any]:
    return dict.fromkeys(STATE) | {"step": 1, "weights": {"w": torch.arange(3.0)}} | values


@pytest.fixture
def run(tmp_path: Path) -> Run:
    config = RunConfig.of(
        dataset="digits",
        z_dims=[2, 2],
        downsample=[0, 1],
        n_filters=4,
        blocks_per_layer=1,
        keep_checkpoints=2,
    )
    return Run.create(tmp_path / "run", config, SHAPE, {"commit": "abc"})


# --- Checksums ---


def test_a_checkpoint_is_an_ordinary_torch_file(tmp_path: Path) -> None:
    """With a comment in its archive that changes nothing for other readers."""
    path = tmp_path / "1.pt"
    write_checkpoint(path, state(format=FORMAT))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"sha256:")
    by_torch = torch.load(path, weights_only=True)
    assert_close(by_torch["weights"], read_checkpoint(path, CPU)["weights"], rtol=0, atol=0)


def test_any_changed_bit_is_noticed(tmp_path: Path) -> None:
    """Wherever it is: one in each of 200 places all over the file, the checksum among them."""
    path = tmp_path / "1.pt"
    write_checkpoint(path, state(format=FORMAT))
    whole = path.read_bytes()
    for i in range(0, len(whole), max(1, len(whole) // 200)):
        changed = bytearray(whole)
        changed[i] ^= 1 << (i % 8)
        path.write_bytes(changed)
        with pytest.raises(Damaged, match=r"1\.pt is damaged"):
            read_checkpoint(path, CPU)
    path.write_bytes(whole)
    assert read_checkpoint(path, CPU)["step"] == 1


def test_a_checkpoint_without_its_checksum_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "1.pt"
    torch.save(state(format=FORMAT), path)
    with pytest.raises(Damaged, match="its checksum is missing"):
        read_checkpoint(path, CPU)


# --- Formats ---


def test_format_1_is_read(tmp_path: Path) -> None:
    """It has no checksum and no sums of the log, but the number of skipped updates."""
    path = tmp_path / "1.pt"
    old = state(format=1, skipped=7, average={"weights": {}, "updates": 3})
    del old["log"]
    torch.save(old, path)
    read = read_checkpoint(path, CPU)
    assert read["average"]["updates"] == 3
    assert read["log"]["totals"] is None
    assert read["log"]["guard"]["skipped"] == 7


@pytest.mark.parametrize("version", [None, 0, 3, "2", [2]])
def test_other_formats_are_refused_by_name(version: Any, tmp_path: Path) -> None:
    path = tmp_path / "1.pt"
    write_checkpoint(path, state(format=version))
    with pytest.raises(UserError, match=r"1\.pt is not a checkpoint of this project \(format 2"):
        read_checkpoint(path, CPU)


# --- What is kept ---


def test_the_newest_and_the_best_are_kept(run: Run) -> None:
    for step, bound in zip(STEPS, (90.0, 80.0, 85.0, float("nan")), strict=True):
        run.save_checkpoint(step, state())
        if run.is_better(step, bound):
            run.mark_best(step, bound)
    assert run.checkpoint_steps() == [2, 3, 4]
    assert Run.open(run.path).best_step() == 2
    run.save_checkpoint(5, state())
    run.mark_best(5, 70.0)
    assert run.checkpoint_steps() == [4, 5]
    assert run.best() == (5, 70.0)


def test_without_a_checkpoint_there_is_no_best(run: Run) -> None:
    assert run.best_step() is None
    run.save_checkpoint(1, state())
    assert run.best_step() is None
    run.mark_best(1, 50.0)
    run.checkpoint_path(1).unlink()
    assert run.best_step() is None  # the pointer leads nowhere
    assert run.is_better(2, 60.0)


def test_a_later_checkpoint_of_another_course_displaces_none(run: Run) -> None:
    """After a resumption from an older one, what is newest is what was written last."""
    for step in (8, 9):
        run.save_checkpoint(step, state())
    for step in STEPS:
        run.save_checkpoint(step, state())
    assert run.checkpoint_steps() == [3, 4, 8, 9]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"step": 1}', '{"step": "1", "negative_elbo": 2.0}', '{"step": 1, "negat']
)
def test_a_damaged_pointer_is_refused(text: str, run: Run) -> None:
    run.save_checkpoint(1, state())
    (run.path / "checkpoints" / "best.json").write_text(text)
    with pytest.raises(UserError, match=r"best\.json is damaged"):
        run.best_step()


def test_the_newest_whole_one_is_found(run: Run) -> None:
    """With what is wrong with those after it; where all are damaged the newest is named."""
    for step in STEPS[:2]:
        run.save_checkpoint(step, state())
    run.checkpoint_path(2).write_bytes(b"not a checkpoint")
    found, damaged = run.newest_whole(CPU)
    assert found is not None
    assert found["step"] == 1
    assert [str(run.checkpoint_path(2)) in str(d) for d in damaged] == [True]
    with pytest.raises(Damaged, match=r"2\.pt"):
        run.load_checkpoint(None, CPU)  # none other is scored in its place
    run.checkpoint_path(1).write_bytes(b"")
    with pytest.raises(Damaged, match=r"2\.pt"):
        run.newest_whole(CPU)
    shutil.rmtree(run.path / "checkpoints")
    assert run.newest_whole(CPU) == (None, [])


# --- Files ---


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/.6.pt.0a1b2c3d.part", ".config.json.01234567.part", "mine.part"):
        (tmp_path / name).write_bytes(b"half")
    remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.part"]


def test_a_file_and_its_folder_are_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    done: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        done.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        real_sync(descriptor)

    def replace(source: Any, target: Any) -> None:
        done.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "file", lambda file: file.write(b"content"))
    assert done == ["file", "rename", "folder"]


def test_an_appended_piece_is_whole_or_absent(tmp_path: Path) -> None:
    """A disk that takes a part of a piece does not keep it."""
    file = AppendedFile(tmp_path / "log")
    file.append(b"one\n")
    original = file._file

    class NearlyFull(io.RawIOBase):
        room = 2

        def write(self, piece: Any) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            part = piece[: self.room]
            self.room -= len(part)
            return original.write(part)

        def fileno(self) -> int:
            return original.fileno()

    file._file = NearlyFull()  # type: ignore[assignment]
    with pytest.raises(OSError, match="No space left"):
        file.append(b"two\n")
    assert (tmp_path / "log").read_bytes() == b"one\n"
    file._file = original
    file.append(b"three\n")
    file.close()
    assert (tmp_path / "log").read_bytes() == b"one\nthree\n"


# --- Published weights ---


@pytest.fixture
def trained(run: Run) -> Run:
    """A run with the weights of a real network, and other ones as their moving average."""
    weights, average = (
        FreeBitsELBO()(*build_ladder(run.config, SHAPE)).state_dict() for _ in range(2)
    )
    content = state(weights=weights, average={"weights": average, "updates": 5})
    for step in (1, 2):
        run.save_checkpoint(step, content)
    run.mark_best(1, 50.0)
    return run


def test_published_weights_score_the_same(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last digit; the imported run is the exported one's moving average."""
    file, copy = tmp_path / "digits.safetensors", tmp_path / "copy"
    assert published.main(["export", str(trained.path), "--out", str(file)]) == 0
    assert published.main(["import", str(file), "--out", str(copy)]) == 0
    assert f"python evaluate.py {copy}" in capsys.readouterr().out
    found = []
    for folder in (trained.path, copy):
        options = "--samples 1 2 --limit 20 --device cpu".split()
        assert evaluate.main([str(folder), *options]) == 0
        found.append(json.loads((folder / "eval" / "2" / "metrics.json").read_text()))
    for name in ("elbo", "iw", "kl_per_layer", "standard_error", "trained", "step"):
        assert found[1][name] == found[0][name], name
    assert Run.open(copy).config == trained.config


@pytest.mark.parametrize(
    ("checkpoint", "step"), [("last", 2), ("best", 1), ("1", 1)], ids=["last", "best", "step"]
)
def test_any_checkpoint_can_be_published(
    checkpoint: str, step: int, trained: Run, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    arguments = ["export", str(trained.path), "--checkpoint", checkpoint, "--out", str(file)]
    assert published.main(arguments) == 0
    description, weights = published.read_published(file)
    assert description["step"] == step
    module = FreeBitsELBO()(*build_ladder(trained.config, SHAPE))
    load_weights(module, weights)


@pytest.mark.parametrize("checkpoint", ["first", "9" * 5000, "-1", "3"])
def test_checkpoints_that_are_not_there_are_not_published(
    checkpoint: str, trained: Run, tmp_path: Path
) -> None:
    out = str(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="checkpoint"):
        published.main(["export", str(trained.path), f"--checkpoint={checkpoint}", "--out", out])
    assert list(tmp_path.iterdir()) == [trained.path]


def without_metadata(content: bytes) -> bytes:
    import safetensors.torch

    return safetensors.torch.save(safetensors.torch.load(content))


def with_other_weights(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda content: content[:-4], "is damaged or not a safetensors file"),
        (lambda content: b"weights", "is damaged or not a safetensors file"),
        (lambda content: b"", "is damaged or not a safetensors file"),
        (without_metadata, "does not hold weights that published.py has exported"),
        (with_other_weights, "its checksum is that of other weights"),
    ],
)
def test_other_files_are_not_imported(
    change: Callable[[bytes], bytes], complaint: str, trained: Run, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    published.export_weights(trained, None, file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError) as refusal:
        published.import_weights(file, tmp_path / "copy")
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "copy").exists()


def test_a_missing_file_is_not_imported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        published.import_weights(tmp_path / "nothing", tmp_path / "copy")
