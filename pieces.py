"""Large files in pieces, and folders packed for a transfer that takes few and small files.

    python pieces.py split data/cifar10.npz --out kept
    python pieces.py join results/mnist-12/weights.safetensors --out mnist-12.safetensors
    python pieces.py pack runs/mnist-12 --out kept --part 1
    python pieces.py unpack kept --out runs/mnist-12

FILE in pieces is FILE.000-CHECKSUM, FILE.001-CHECKSUM ... and FILE.pieces.json, which names them
with their sizes and SHA-256 and is written last. As no piece takes the place of another one, the
file is at any moment either what it was or complete. A packed folder is the same pieces, and one
plain tar archive of all that is small.
"""

import argparse
import hashlib
import io
import json
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ladder_vae.runs.command_line import OneLineParser
from runtime.errors import UserError, run_command
from runtime.files import write_atomically

# What is larger goes into pieces of this size, in bytes.
LARGEST = 15 * 2**20
_MANIFEST = ".pieces.json"
_PIECE = re.compile(r"\.\d{3}-[0-9a-f]{8}$")
_FORMAT = 1
# Of a packed folder: its small files, and how many files a transfer takes together.
_BUNDLE = "small.tar"
_CHECKSUMS = ".sha256.json"
_FILES_OF_A_PART = 4


class DamagedPieces(UserError):  # noqa: N818 (says what the file is)
    """The pieces of a file are not what was written."""


# --- Of a file ---


def manifest_path(path: Path) -> Path:
    """The file that says which pieces `path` is in."""
    return path.with_name(path.name + _MANIFEST)


def is_there(path: Path) -> bool:
    """Whether there is such a file, whole or in pieces."""
    return path.exists() or manifest_path(path).exists()


def write(path: Path, content: bytes) -> None:
    """Write a file: as it is, or in pieces where it is larger than `LARGEST`.

    Raises `UserError` where it cannot be written; what there was before is still there then.
    """
    stale = {path, manifest_path(path), *_pieces_of(path)}
    files = in_pieces(path.name, content)
    for name, part in files.items():
        _write_bytes(path.with_name(name), part)
    # A whole file counts before pieces do, and goes first where pieces take its place.
    _unlink(*sorted(stale - {path.with_name(name) for name in files}))


def in_pieces(name: str, content: bytes) -> dict[str, bytes]:
    """The files that a file called `name` becomes, in the order to write them."""
    if len(content) <= LARGEST:
        return {name: content}
    parts = [content[start : start + LARGEST] for start in range(0, len(content), LARGEST)]
    files = {_piece_name(name, i, _sha256(part)): part for i, part in enumerate(parts)}
    manifest = _described(content) | {
        "format": _FORMAT,
        "pieces": [{"name": piece} | _described(part) for piece, part in files.items()],
    }
    return files | {name + _MANIFEST: f"{json.dumps(manifest, indent=2)}\n".encode()}


def _piece_name(name: str, number: int, checksum: str) -> str:
    return f"{name}.{number:03d}-{checksum[:8]}"


def _described(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": _sha256(content)}


def split(path: Path) -> None:
    """Put a file that is larger than `LARGEST` into pieces, in its place."""
    if path.stat().st_size > LARGEST:
        write(path, path.read_bytes())


def read(path: Path) -> bytes:
    """The content of a file, whole or in pieces.

    Raises `DamagedPieces` where pieces are missing, cut short or others than were written, and
    `UserError` where there is no such file.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    manifest = _read_manifest(path)
    content = b"".join(_read_piece(path.parent, piece) for piece in manifest["pieces"])
    if len(content) != manifest["bytes"] or _sha256(content) != manifest["sha256"]:
        raise DamagedPieces(f"{path} is damaged: its pieces together are not what was written")
    return content


def _unlink(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _pieces_of(path: Path) -> Iterator[Path]:
    """All pieces there are beside `path`, those of a manifest or not."""
    for found in path.parent.glob(f"{path.name}.*"):
        if _PIECE.sub("", found.name) == path.name != found.name:
            yield found


def _read_manifest(path: Path) -> dict[str, Any]:
    file = manifest_path(path)
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"there is no {path}, nor {file.name} of one in pieces") from None
    except (OSError, ValueError, RecursionError):
        manifest = None
    if not _is_manifest(manifest, path.name):
        raise DamagedPieces(f"{file} is damaged or not of this version of the project")
    return manifest


def _is_manifest(manifest: Any, name: str) -> bool:
    """Whether it is what `write` wrote for a file called `name`: no other file is ever read."""
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        return False
    pieces = manifest.get("pieces")
    return (
        _is_described(manifest)
        and isinstance(pieces, list)
        and len(pieces) > 0
        and all(
            isinstance(piece, dict)
            and _is_described(piece)
            and piece.get("name") == _piece_name(name, number, piece["sha256"])
            for number, piece in enumerate(pieces)
        )
    )


def _is_described(entry: dict[str, Any]) -> bool:
    return type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)


def _read_piece(folder: Path, piece: dict[str, Any]) -> bytes:
    path = folder / piece["name"]
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DamagedPieces(f"{path} is missing: fetch it again, or begin anew") from None
    except OSError as error:
        raise DamagedPieces(f"cannot read {path}: {error.strerror or error}") from None
    if len(content) != piece["bytes"]:
        raise DamagedPieces(
            f"{path} is damaged: it has {len(content):,} bytes, and had {piece['bytes']:,}"
        )
    if _sha256(content) != piece["sha256"]:
        raise DamagedPieces(f"{path} is damaged: its checksum is that of another content")
    return content


def _write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda file: file.write(content))


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def split_to(path: Path, folder: Path) -> list[Path]:
    """Write a file's pieces into a folder; returns them. Raises `UserError` where it is no file."""
    try:
        files = in_pieces(path.name, path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    for name, part in files.items():
        _write_bytes(folder / name, part)
    return [folder / name for name in files]


def join(path: Path, out: Path) -> None:
    """Write a file that is in pieces to `out`, whole; raises as `read` does."""
    content = read(path)
    if out.exists():
        raise UserError(f"{out} exists already; give another file to --out")
    _write_bytes(out, content)


# --- Of a folder ---


def pack(folder: Path, out: Path, part: int | None = None) -> tuple[list[Path], int]:
    """Copy a folder into few files, each as large as a piece at most; the same bytes each time.

    Files that are pieces stay as they are, named after their place in the folder; all others go
    into one tar archive, which is put into pieces where it is large. Several transfers may share
    the work: with a `part`, from 1 on, only that one is written, of four files at most.

    Returns the files written, and how many parts there are in all. Raises `UserError` where there
    is no such part, or no room.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give one that reproduce.py has written")
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".part")  # left by a writer that was killed
    )
    large = [path for path in files if _PIECE.search(path.name)]
    # What is small comes first: it can be read before the rest is there.
    packed = in_pieces(_BUNDLE, _tar(folder, [path for path in files if path not in large]))
    names = [*packed, *(_packed_name(path.relative_to(folder)) for path in large)]
    parts = math.ceil(len(names) / _FILES_OF_A_PART)
    if part is not None and not 1 <= part <= parts:
        raise UserError(f"--part is {part}; it must be from 1 to {parts}")
    first = 0 if part is None else (part - 1) * _FILES_OF_A_PART
    chosen = names[first:] if part is None else names[first : first + _FILES_OF_A_PART]
    sources = dict(zip(names[len(packed) :], large, strict=True))
    for name in chosen:
        _write_bytes(out / name, packed[name] if name in packed else sources[name].read_bytes())
    return [out / name for name in chosen], parts


def _packed_name(path: Path) -> str:
    """A piece's place in its folder as one name: folders end with `--` there."""
    return "--".join(path.parts)


def _tar(folder: Path, files: Sequence[Path]) -> bytes:
    """The files as an archive, with the checksums of all of them as its first member."""
    content = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    checksums = {name: _sha256(body) for name, body in content.items()}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, body in {_CHECKSUMS: json.dumps(checksums).encode(), **content}.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return buffer.getvalue()


def unpack(packed: Path, out: Path) -> None:
    """Make a folder of what `pack` wrote, once all its parts are there.

    Nothing is run, and nothing written outside `out`. Raises `UserError` where files are missing or
    damaged; there is no `out` then.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not an empty folder; give a new folder to --out")
    content = _bundled(packed / _BUNDLE)
    pieces = {
        _packed_name(Path(name).parent / piece["name"]): Path(name).parent / piece["name"]
        for name in content
        if name.endswith(_MANIFEST)
        for piece in _pieces_named(packed, name, content[name])
    }
    for packed_name, place in pieces.items():
        try:
            content[place.as_posix()] = (packed / packed_name).read_bytes()
        except OSError:
            raise DamagedPieces(
                f"{packed / packed_name} is missing: fetch all parts before unpacking"
            ) from None
    _check_checksums(packed, content)
    for name, body in content.items():
        _write_bytes(out / name, body)


def _bundled(path: Path) -> dict[str, bytes]:
    """The files of a tar archive by name, as data."""
    content = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(read(path)), mode="r:") as archive:
            for member in archive:
                # Refuses what leads elsewhere: absolute names, "..", links out, devices.
                member = tarfile.data_filter(member, "/nowhere")
                if not member.isfile():
                    raise UserError(f"{path} is not one of ours: {member.name} is not a plain file")
                file = archive.extractfile(member)
                assert file is not None
                content[member.name] = file.read()
    except (OSError, tarfile.TarError) as error:
        reason = " ".join(str(error).split())
        raise DamagedPieces(f"{path} is damaged or not a tar archive: {reason}") from None
    try:
        checksums = json.loads(content.pop(_CHECKSUMS))
    except (KeyError, ValueError, RecursionError):
        raise DamagedPieces(f"{path} is damaged, or pieces.py pack did not write it") from None
    found = {name: _sha256(body) for name, body in content.items()}
    if found != checksums:
        raise DamagedPieces(f"{path} is damaged: its files are not those that were packed")
    return content


def _pieces_named(packed: Path, name: str, body: bytes) -> list[dict[str, Any]]:
    """The pieces that a manifest in the archive names."""
    try:
        manifest = json.loads(body)
    except (ValueError, RecursionError):
        manifest = None
    if not _is_manifest(manifest, Path(name).name.removesuffix(_MANIFEST)):
        raise DamagedPieces(f"{packed / _BUNDLE} is damaged: {name} is no manifest of pieces")
    return manifest["pieces"]


def _check_checksums(packed: Path, content: dict[str, bytes]) -> None:
    for name, body in content.items():
        if not name.endswith(_MANIFEST):
            continue
        for piece in _pieces_named(packed, name, body):
            place = Path(name).parent / piece["name"]
            found = content[place.as_posix()]
            if len(found) != piece["bytes"] or _sha256(found) != piece["sha256"]:
                raise DamagedPieces(
                    f"{packed / _packed_name(place)} is damaged: it is not what was written; "
                    "fetch it again"
                )


# --- Command ---


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="pieces.py", description="Large files in pieces, and packed folders."
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="split|join|pack|unpack")
    splitting = actions.add_parser("split", help="copy a file into pieces of at most 15 MiB")
    splitting.add_argument("file", type=Path, metavar="FILE", help="which stays as it is")
    splitting.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for them")
    joining = actions.add_parser("join", help="make one file of its pieces")
    joining.add_argument(
        "file", type=Path, metavar="FILE", help="its name, without that of a piece"
    )
    joining.add_argument("--out", type=Path, required=True, metavar="FILE", help="file to write")
    packing = actions.add_parser("pack", help="copy a folder into few files of at most 15 MiB")
    packing.add_argument("folder", type=Path, metavar="FOLDER", help="that of reproduce.py")
    packing.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write")
    packing.add_argument(
        "--part",
        type=int,
        metavar="N",
        help=f"write only {_FILES_OF_A_PART} files, the Nth of them",
    )
    unpacking = actions.add_parser("unpack", help="make the folder again of these files")
    unpacking.add_argument("packed", type=Path, metavar="FOLDER", help="what pack wrote, all parts")
    unpacking.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.action == "split":
        written = split_to(arguments.file, arguments.out)
        print(f"split     {' '.join(map(str, written))}")
    elif arguments.action == "join":
        join(arguments.file, arguments.out)
        print(f"joined    {arguments.out}")
    elif arguments.action == "pack":
        written, parts = pack(arguments.folder, arguments.out, arguments.part)
        shown = f"part {arguments.part} of {parts}" if arguments.part else f"all {parts} parts"
        print(f"packed    {shown}: {' '.join(map(str, written))}")
    else:
        unpack(arguments.packed, arguments.out)
        print(f"unpacked  {arguments.out}")
    return 0


if __name__ == "__main__":
    run_command(main)
