"""When checkpoints are written, which are kept, and what a full disk does to a run."""

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.durability import differences
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.run import Run
from runtime.errors import UserError
from runtime.files import AppendedFile
from tests.tiny_runs import LADDER, RESUME, after_step, shown_by_tensorboard, train

pytestmark = pytest.mark.usefixtures("own_folder")


# --- When, and which ---


def test_checkpoints_follow_the_clock_too() -> None:
    """With a tiny interval each step is due; with 0 only the last one."""
    options = "--steps 4 --ts-log-interv 0 --ckpt-interv 0 --keep-checkpoints 9".split()
    assert train(*LADDER, *options, "--checkpoint-minutes", 1e-9, "--out", "often") == 0
    assert Run.open(Path("often")).checkpoint_steps() == [1, 2, 3, 4]
    assert train(*LADDER, *options, "--checkpoint-minutes", 0, "--out", "never") == 0
    assert Run.open(Path("never")).checkpoint_steps() == [4]


def test_the_best_checkpoint_is_kept() -> None:
    """The one with the lowest held-out negative ELBO in the log, although none was due."""
    options = "--steps 12 --lr 0.05 --ema 0 --ts-log-interv 3 --ckpt-interv 0".split()
    assert train(*LADDER, *options, "--keep-checkpoints", 1, "--out", "run") == 0
    bounds = {
        entry["step"]: entry["test/negative_elbo"]
        for entry in read_entries(Path("run/metrics.jsonl"))
        if "test/negative_elbo" in entry
    }
    run = Run.open(Path("run"))
    assert run.best_step() == min(bounds, key=lambda step: bounds[step])
    assert set(run.checkpoint_steps()) == {run.best_step(), 12}


def test_only_the_newest_checkpoints_are_kept() -> None:
    """As many as the options say; a resumed run may change how many."""
    options = "--ckpt-interv 1 --keep-checkpoints 2 --steps 4 --ts-log-interv 0".split()
    assert train(*LADDER, *options, "--out", "run") == 0
    assert Run.open(Path("run")).checkpoint_steps() == [3, 4]
    assert train(*RESUME, "--steps", 5, "--keep-checkpoints", 1) == 0
    run = Run.open(Path("run"))
    assert set(run.checkpoint_steps()) == {run.best_step(), 5}
    assert run.config.steps == 5


# --- Full disks ---


class FullDisk:
    """A disk that is sometimes full.

    While `is_full`, files whose names match cannot be created, or with the pattern "appended"
    nothing can be appended to files.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
        self.is_full = False
        original: Any = Path.open
        append: Any = AppendedFile.append

        def open_on_full_disk(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if self.is_full and mode == "xb" and re.search(pattern, path.name):
                return original(Path("/dev/full"), "wb", *args, **kwargs)
            return original(path, mode, *args, **kwargs)

        def append_on_full_disk(file: Any, record: bytes) -> None:
            if self.is_full and pattern == "appended":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            append(file, record)

        monkeypatch.setattr(Path, "open", open_on_full_disk)
        monkeypatch.setattr(AppendedFile, "append", append_on_full_disk)

    def between(self, monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
        """Fill the disk after step `first`, and clear it after step `last`."""

        def fill(step: int) -> None:
            self.is_full = first <= step <= last

        after_step(monkeypatch, fill)


OFTEN = "--steps 6 --ckpt-interv 1 --tr-log-interv 1 --ts-log-interv 2 --keep-checkpoints 9".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a disk with enough room."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(*LADDER, *OFTEN, "--out", folder) == 0
    return folder


def files_of(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if "tfevents" not in path.name)
    return {str(path.relative_to(folder)) for path in paths}


@pytest.mark.parametrize(
    ("pattern", "lost"),
    [
        (r"\.\d\.pt\.", {"checkpoints/3.pt", "checkpoints/4.pt"}),
        (r"best\.json\.", set()),
        (r"png", {"images/samples-4.png", "images/reconstructions-4.png"}),
        ("appended", set()),
    ],
    ids=["checkpoints", "best", "pictures", "metrics"],
)
def test_training_continues_while_the_disk_is_full(
    pattern: str,
    lost: set[str],
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It warns, and writes log entries, TensorBoard's included, once there is room."""
    FullDisk(monkeypatch, pattern).between(monkeypatch, 3, 4)
    assert train(*LADDER, *OFTEN, "--out", "run") == 0
    err = capsys.readouterr().err
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert warnings
    assert all("No space left on device" in line for line in warnings)
    assert "Traceback" not in err
    files = files_of(Path("run"))
    assert files_of(whole) - files == lost
    assert files <= files_of(whole)  # no partial ones
    assert differences(whole, Path("run")) == []
    assert shown_by_tensorboard("run") == shown_by_tensorboard(str(whole))


def test_the_last_checkpoint_must_have_room(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with an error, and resumes from the checkpoint before."""
    with monkeypatch.context() as patch:
        FullDisk(patch, r"\.\d\.pt\.").between(patch, 5, 6)
        with pytest.raises(UserError, match=r"cannot write .*6\.pt \(No space left on device\)"):
            train(*LADDER, *OFTEN, "--out", "run")
    assert Run.open(Path("run")).checkpoint_steps() == [1, 2, 3, 4]
    assert train(*RESUME) == 0
    assert differences(whole, Path("run")) == []
