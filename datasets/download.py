"""Published files, downloaded or provided by the user, and checked by MD5."""

import hashlib
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from runtime.errors import UserError
from runtime.files import reading, writing

_TIMEOUT = 30.0  # seconds without a byte


class PublishedFile(NamedTuple):
    """A published file: its URLs, all of the same content, and its MD5."""

    urls: Sequence[str]
    md5: str

    @property
    def name(self) -> str:
        return self.urls[0].rpartition("/")[2]


@contextmanager
def published(path: Path, files: Sequence[PublishedFile]) -> Iterator[dict[str, Path]]:
    """The files from which `path` is made, by name.

    Files that the user has put into the folder of `path` are used and kept. The others are
    downloaded and removed at the end.

    Raises:
        UserError: a download fails, a file is not the published one, or the folder cannot be
            written.
    """
    folder = path.parent
    with writing(path), TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
        found = {}
        for file in files:
            found[file.name] = folder / file.name
            if not found[file.name].exists():
                found[file.name] = Path(temporary, file.name)
                try:
                    _download(file, temporary)
                except RuntimeError as error:
                    names = ", ".join(each.name for each in files)
                    raise UserError(
                        f"{path} is missing and cannot be made, because a download failed "
                        f"({error}): put {names} into {folder} by hand"
                    ) from error
            require_md5(found[file.name], file.md5)
        yield found


def _download(file: PublishedFile, folder: str) -> None:
    """Download a file from the first URL that works; raises `RuntimeError` if none does."""
    from torchvision.datasets.utils import download_url

    failures = []
    for url in file.urls:
        before = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_TIMEOUT)  # torchvision sets none and would wait forever
        try:
            return download_url(url, folder, file.name, file.md5)
        except Exception as error:  # torchvision's, urllib's and http's
            failures.append(f"{url}: {one_reason(error)}")
        finally:
            socket.setdefaulttimeout(before)
    raise RuntimeError("; ".join(failures))


def one_reason(error: Exception) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def require_md5(path: Path, md5: str) -> None:
    """Raise `UserError` if the file cannot be read or its MD5 is not `md5`."""
    with reading(path), path.open("rb") as file:
        # Hosts in FIPS mode refuse MD5 for security; here it only detects damage.
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise UserError(
            f"{path} is not the published file (its MD5 is {found}, not {md5}): "
            "delete it to download it again, or put the published file there"
        )
