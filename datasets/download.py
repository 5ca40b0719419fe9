"""Downloads that are either whole and right or leave nothing behind."""

import functools
import hashlib
import http.client
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import UserError
from runtime.files import temporary_file

# What the network can do to a download; a full disk is an OSError too, and not among them.
NETWORK_ERRORS = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_TIMEOUT = 30  # seconds without a byte
_CHUNK = 1 << 18  # bytes
# Hosts in FIPS mode refuse MD5 unless told that it only checks for damage.
_md5 = functools.partial(hashlib.md5, usedforsecurity=False)


class DownloadError(Exception):
    """A download failed; the message says from where, and why."""


@contextmanager
def downloaded(url: str, folder: Path, md5: str) -> Iterator[Path]:
    """The file at ``url``, under a temporary name in ``folder`` for as long as it is needed.

    Raises:
        DownloadError: it cannot be fetched whole, or its MD5 is not ``md5``.
        UserError: ``folder`` cannot be written in.
    """
    with temporary_file(folder / url.rpartition("/")[2]) as file:
        digest = _md5()
        for chunk in _chunks(url):
            file.write(chunk)
            digest.update(chunk)
        if digest.hexdigest() != md5:
            raise DownloadError(f"{url}: its MD5 is {digest.hexdigest()}, not {md5}")
        file.flush()
        yield Path(file.name)


@contextmanager
def published(url: str, folder: Path, md5: str) -> Iterator[Path]:
    """The file of that name that the user has put into ``folder``, or else `downloaded`.

    Raises:
        DownloadError: it cannot be fetched whole, or its MD5 is not ``md5``.
        UserError: the user's file is not the published one, or ``folder`` cannot be written in.
    """
    own = folder / url.rpartition("/")[2]
    if own.exists():
        require_md5(own, md5)
        yield own
    else:
        with downloaded(url, folder, md5) as file:
            yield file


def require_md5(path: Path, md5: str) -> None:
    """Checks a file that the user has put there.

    Raises:
        UserError: the file cannot be read, or its MD5 is not ``md5``.
    """
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, _md5).hexdigest()
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}): put the right one there"
        ) from error
    if found != md5:
        raise UserError(
            f"{path} is not the published file (its MD5 is {found}, not {md5}): "
            "delete it to have it downloaded, or put the right one there"
        )


def _chunks(url: str) -> Iterator[bytes]:
    """The bytes at ``url``, with a progress bar on standard error."""
    from tqdm import tqdm

    received = 0
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            length = response.length
            name = url.rpartition("/")[2]
            with tqdm(total=length, unit="B", unit_scale=True, desc=name) as bar:
                while chunk := response.read(_CHUNK):
                    received += len(chunk)
                    bar.update(len(chunk))
                    yield chunk
    except NETWORK_ERRORS as error:
        raise DownloadError(f"{url}: {getattr(error, 'reason', None) or error}") from error
    # A connection that is cut looks like the end of the file.
    if length is not None and received < length:
        raise DownloadError(f"{url}: the connection was cut after {received} of {length} bytes")
