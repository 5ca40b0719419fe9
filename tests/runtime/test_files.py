"""Files are complete or unchanged after an interruption, and errors are one line."""

import errno
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import UserError
from runtime.files import (
    AppendedFile,
    read_json,
    remove_partial_files,
    to_json,
    write_atomically,
    write_json,
)


def test_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/.6.pt.0a1b2c3d.part", ".config.json.01234567.part", "mine.part"):
        (tmp_path / name).write_bytes(b"half")
    remove_partial_files(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.part"]


def test_a_file_is_synced_before_it_is_renamed_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_an_appended_record_is_complete_or_absent(tmp_path: Path) -> None:
    """When the disk accepts only a part of a record, that part is removed."""
    file = AppendedFile(tmp_path / "log")
    file.append(b"one\n")
    original = file._file

    class NearlyFull(io.RawIOBase):
        room = 2

        def write(self, record: Any) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            part = record[: self.room]
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


def test_json_has_null_for_numbers_that_are_not_finite(tmp_path: Path) -> None:
    value = {"a": [1.5, math.nan, {"b": math.inf}], "c": "text", "d": None}
    assert json.loads(to_json(value)) == {"a": [1.5, None, {"b": None}], "c": "text", "d": None}
    write_json(tmp_path / "new" / "file.json", value)
    assert read_json(tmp_path / "new" / "file.json") == json.loads(to_json(value))


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "[" * 100_000])
def test_a_damaged_json_file_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"file\.json is damaged"):
        read_json(path)


def test_a_missing_or_unreadable_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(UserError, match=r"cannot read .*Is a directory"):
        read_json(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fill(file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"cannot write .*file \(No space left on device\)"):
        write_atomically(path, fill)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]
