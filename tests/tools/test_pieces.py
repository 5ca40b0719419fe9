"""Files in pieces, and packed folders: whole again to the byte, or refused in one line."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import pieces
from runtime import files as atomic
from runtime.errors import UserError
from tests.commands import content, refusal, run

BODY = bytes(range(256)) * 4  # 1,024 bytes


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LARGEST", 300)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file in four pieces."""
    path = tmp_path / "folder" / "weights.bin"
    pieces.write(path, BODY)
    return path


def piece(path: Path, number: int) -> Path:
    """One of a file's pieces."""
    (found,) = path.parent.glob(f"{path.name}.{number:03d}-*")
    return found


def test_the_published_size() -> None:
    """What a transfer of files of 16 MiB takes, with room to spare."""
    source = Path(pieces.__file__).read_text()
    assert "LARGEST = 15 * 2**20\n" in source


def test_a_large_file_is_in_pieces(file: Path) -> None:
    numbered = [piece(file, number) for number in range(4)]
    assert sorted(file.parent.iterdir()) == [*numbered, pieces.manifest_path(file)]
    assert [path.stat().st_size for path in numbered] == [300, 300, 300, 124]
    assert b"".join(path.read_bytes() for path in numbered) == BODY
    assert pieces.read(file) == BODY
    assert pieces.is_there(file)


@pytest.mark.parametrize("size", [0, 1, 300])
def test_a_small_file_stays_whole(file: Path, size: int) -> None:
    """Also in the place of a large one, of which nothing is left."""
    pieces.write(file, BODY[:size])
    assert content(file.parent) == {"weights.bin": BODY[:size]}
    assert pieces.read(file) == BODY[:size]


def test_a_shorter_file_leaves_no_piece_of_the_longer_one(file: Path) -> None:
    pieces.write(file, BODY[:400])
    kept = [piece(file, 0), piece(file, 1), pieces.manifest_path(file)]
    assert sorted(file.parent.iterdir()) == kept
    assert pieces.read(file) == BODY[:400]


def test_a_disk_that_is_full_leaves_the_old_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever piece it happens: the manifest still names what is all there."""
    original = atomic.write_atomically
    for room in range(5):
        left = iter(range(room))

        def write(path: Path, write: Callable[[BinaryIO], object], left: Any = left) -> None:
            if next(left, None) is None:
                raise UserError("no room")
            original(path, write)

        with monkeypatch.context() as patch:
            patch.setattr(pieces, "write_atomically", write)
            with pytest.raises(UserError, match="no room"):
                pieces.write(file, BODY[::-1])
        assert pieces.read(file) == BODY
    pieces.write(file, BODY[::-1])
    assert pieces.read(file) == BODY[::-1]
    assert len(content(file.parent)) == 5  # nothing is left of the old one


def test_splitting_in_place(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(BODY)
    (tmp_path / "a.txt").write_text("another file")
    pieces.split(path)
    assert not path.exists()
    assert pieces.read(path) == BODY
    assert (tmp_path / "a.txt").read_text() == "another file"
    before = content(tmp_path)
    pieces.split(tmp_path / "a.txt")  # small enough
    assert content(tmp_path) == before


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 1
    path.write_bytes(body)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (Path.unlink, "is missing: fetch it again, or begin anew"),
        (shorten, "bytes, and had"),
        (flip_a_bit, "is damaged: its checksum is that of another content"),
    ],
)
def test_a_damaged_piece_is_refused(
    file: Path, number: int, damage: Callable[[Path], None], told: str
) -> None:
    damaged = piece(file, number)
    damage(damaged)
    line = refusal(pieces.main, "join", file, "--out", file.parent / "whole")
    assert f"{damaged} " in line
    assert told in line
    assert not (file.parent / "whole").exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"format": 1', '"format": 2'),
        ("weights.bin.001-", "../weights.bin.001-"),  # no other file is read
        ("weights.bin.001-", "weights.bin.003-"),
        ('"sha256"', '"sha512"'),
        ("{", ""),
    ],
)
def test_a_damaged_manifest_is_refused(file: Path, old: str, new: str) -> None:
    manifest = pieces.manifest_path(file)
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    line = refusal(pieces.main, "join", file, "--out", file.parent / "whole")
    assert line == f"error: {manifest} is damaged or not of this version of the project\n"


def test_pieces_together_must_be_the_file(file: Path) -> None:
    """A manifest whose pieces are right one by one, but not all of them."""
    manifest = pieces.manifest_path(file)
    described = json.loads(manifest.read_text())
    del described["pieces"][-1]
    manifest.write_text(json.dumps(described))
    line = refusal(pieces.main, "join", file, "--out", file.parent / "whole")
    assert "its pieces together are not what was written" in line


def test_without_manifest_there_is_no_file(file: Path) -> None:
    pieces.manifest_path(file).unlink()
    assert not pieces.is_there(file)
    line = refusal(pieces.main, "join", file, "--out", file.parent / "whole")
    assert f"there is no {file}" in line


def test_splitting_and_joining_by_command(tmp_path: Path) -> None:
    source = tmp_path / "data.npz"
    source.write_bytes(BODY)
    assert run(pieces.main, "split", source, "--out", tmp_path / "kept").code == 0
    assert source.read_bytes() == BODY
    whole = tmp_path / "there" / "data.npz"
    result = run(pieces.main, "join", tmp_path / "kept" / "data.npz", "--out", whole)
    assert (result.code, result.out) == (0, f"joined    {whole}\n")
    assert whole.read_bytes() == BODY
    line = refusal(pieces.main, "join", tmp_path / "kept" / "data.npz", "--out", whole)
    assert "exists already" in line
    assert "cannot read" in refusal(pieces.main, "split", tmp_path / "no", "--out", tmp_path)


# --- Folders ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small files, a large one in pieces, and another below with the same name."""
    folder = tmp_path / "row"
    pieces.write(folder / "state" / "1.pt", BODY)
    pieces.write(folder / "1.pt", BODY[::-1])
    (folder / "metrics.json").write_text("{}")
    (folder / ".progress").mkdir()
    (folder / ".progress" / "ledger").write_bytes(b"\0\1")
    (folder / ".metrics.json.0123abcd.part").write_text("half")
    return folder


def plain(folder: Path) -> dict[str, bytes]:
    found = {name: body for name, body in content(folder).items() if body is not None}
    return {name: body for name, body in found.items() if not name.endswith(".part")}


def test_a_packed_folder_comes_out_the_same(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    result = run(pieces.main, "pack", folder, "--out", packed)
    assert result.code == 0, result.err
    files = list(packed.iterdir())
    # Manifests alone are larger than these tiny pieces.
    assert {path.suffix for path in files if path.stat().st_size > 300} <= {".json"}
    assert all(path.is_file() for path in files)
    assert run(pieces.main, "unpack", packed, "--out", tmp_path / "again").code == 0
    assert plain(tmp_path / "again") == plain(folder)


def test_parts_together_are_the_whole(folder: Path, tmp_path: Path) -> None:
    """Each of four files at most, and all of them needed."""
    run(pieces.main, "pack", folder, "--out", tmp_path / "whole")
    count = len(list((tmp_path / "whole").iterdir()))
    seen: list[str] = []
    for part in range(1, -(-count // 4) + 1):
        own = tmp_path / f"part-{part}"
        result = run(pieces.main, "pack", folder, "--out", own, "--part", part)
        assert result.out.startswith(f"packed    part {part} of {-(-count // 4)}: ")
        names = [path.name for path in own.iterdir()]
        assert 1 <= len(names) <= 4
        assert not set(names) & set(seen)
        if seen:
            line = refusal(pieces.main, "unpack", tmp_path / "all", "--out", tmp_path / "again")
            assert "missing" in line or "there is no" in line
            assert not (tmp_path / "again").exists()
        seen += names
        shutil.copytree(own, tmp_path / "all", dirs_exist_ok=True)
    assert content(tmp_path / "all") == content(tmp_path / "whole")
    for wrong in (0, part + 1):
        line = refusal(pieces.main, "pack", folder, "--out", tmp_path / "no", "--part", wrong)
        assert line == f"error: --part is {wrong}; it must be from 1 to {part}\n"


def test_a_damaged_packed_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    """Every file of it, damaged in the middle."""
    packed, damaged = tmp_path / "packed", tmp_path / "damaged"
    run(pieces.main, "pack", folder, "--out", packed)
    for path in sorted(packed.iterdir()):
        shutil.copytree(packed, damaged)
        flip_a_bit(damaged / path.name)
        line = refusal(pieces.main, "unpack", damaged, "--out", tmp_path / "again")
        assert "damaged" in line
        assert not (tmp_path / "again").exists()
        shutil.rmtree(damaged)


def archive(members: dict[str, tarfile.TarInfo]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for member in members.values():
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return file.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = 1 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../evil"),
        member("a/../../evil"),
        member("evil", tarfile.SYMTYPE, "/etc/passwd"),
        member("evil", tarfile.LNKTYPE, "../other"),
        member("evil", tarfile.FIFOTYPE),
        member("evil", tarfile.CHRTYPE),
        member("plain"),  # not packed by us: without checksums
    ],
    ids=lambda info: f"{info.name} {info.type!r}",
)
def test_an_archive_of_others_is_refused(
    evil: tarfile.TarInfo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "small.tar").write_bytes(archive({"evil": evil}))
    before = content(tmp_path)
    refusal(pieces.main, "unpack", packed, "--out", tmp_path / "again")
    assert content(tmp_path) == before


def test_a_folder_with_files_is_left_alone(folder: Path, tmp_path: Path) -> None:
    run(pieces.main, "pack", folder, "--out", tmp_path / "packed")
    line = refusal(pieces.main, "unpack", tmp_path / "packed", "--out", folder)
    assert line == f"error: {folder} is not an empty folder; give a new folder to --out\n"
    assert "is not a folder" in refusal(pieces.main, "pack", folder / "no", "--out", tmp_path)
