"""Small synthetic data sets in the published formats, and a server for them."""

import gzip
import hashlib
import io
import pickle
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from scipy.io import savemat  # type: ignore[import-untyped]
from torchvision.datasets import CIFAR10, KMNIST, MNIST, SVHN, FashionMNIST

from datasets import (
    ImageSet,
    cifar10,
    fashion_mnist,
    kmnist,
    mnist,
    omniglot,
    static_mnist,
    svhn,
)
from datasets.cache import Contents
from datasets.download import PublishedFile
from runtime import random as draws
from runtime.errors import UserError


class Server:
    """Serves `files` on the loopback interface; those `cut` or `stalled` only up to the middle."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.stalled: set[str] = set()
        self._stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self._head()

            def do_GET(self) -> None:
                name = self.path.lstrip("/")
                body = self._head()
                partial = name in owner.cut | owner.stalled
                self.wfile.write(body[: len(body) // 2] if partial else body)
                if name in owner.stalled:
                    owner._stopped.wait(10)

            def _head(self) -> bytes:
                name = self.path.lstrip("/")
                body = owner.files.get(name, b"")
                self.send_response(200 if name in owner.files else 404)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                return body

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler


@contextmanager
def serving() -> Iterator[Server]:
    server = Server()
    try:
        yield server
    finally:
        server.stop()


class Made:
    """A small data set in place of a downloaded one."""

    def __init__(self, server: Server, arrays: dict[str, np.ndarray]) -> None:
        self.server = server
        self.arrays = arrays  # the npz file's contents
        self.files = server.files  # the published files

    def put_by_hand(self, folder: Path) -> None:
        for name, body in self.files.items():
            (folder / name).write_bytes(body)


def make_static_mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    rng = np.random.default_rng(0)
    arrays, md5 = {}, {}
    for split, count in (("train", 7), ("valid", 3), ("test", 5)):
        bits = rng.integers(0, 2, (count, 784), np.uint8)
        arrays[split] = np.packbits(bits, axis=1)
        text = "".join(" ".join(map(str, row)) + "\n" for row in bits.tolist()).encode()
        server.files[f"binarized_mnist_{split}.amat"] = text
        md5[f"binarized_mnist_{split}.amat"] = hashlib.md5(text).hexdigest()
    monkeypatch.setattr(static_mnist, "URL", server.url)
    monkeypatch.setattr(static_mnist, "MD5", md5)
    monkeypatch.setattr(static_mnist, "CONTENTS", contents(arrays))
    return Made(server, arrays)


def make_mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_idx(server, monkeypatch, mnist, MNIST)


def make_fashion_mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_idx(server, monkeypatch, fashion_mnist, FashionMNIST)


def make_kmnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_idx(server, monkeypatch, kmnist, KMNIST)


def make_idx(server: Server, monkeypatch: pytest.MonkeyPatch, module: Any, listed: Any) -> Made:
    """Twelve training and six test images in MNIST's format."""
    arrays: dict[str, np.ndarray] = {}
    resources = []
    for split, prefix, count in (("train", "train", 12), ("test", "t10k", 6)):
        images = levels(count, 28, 28)
        labels = np.arange(count, dtype=np.uint8) % 10
        arrays |= {split: images, f"{split}_labels": labels}
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            body = gzip.compress(header + values.tobytes(), mtime=0)
            name = f"{prefix}-{kind}-ubyte.gz"
            server.files[name] = body
            resources.append((name, hashlib.md5(body).hexdigest()))
    monkeypatch.setattr(listed, "mirrors", [server.url])
    monkeypatch.setattr(listed, "resources", resources)
    monkeypatch.setattr(module, "CONTENTS", contents(arrays))
    monkeypatch.setattr(module, "VALID_IMAGES", 4)
    return Made(server, arrays)


def make_omniglot(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Nine training and six test images in the published .mat file: an image is a column."""
    arrays = {"train": levels(9, 28, 28), "test": levels(6, 28, 28)}
    columns = {name: a.transpose(2, 1, 0).reshape(784, -1) / 255 for name, a in arrays.items()}
    file = io.BytesIO()
    savemat(file, {"data": columns["train"], "testdata": columns["test"]})
    server.files["chardata.mat"] = file.getvalue()
    md5 = hashlib.md5(file.getvalue()).hexdigest()
    monkeypatch.setattr(omniglot, "FILE", PublishedFile([server.url + "chardata.mat"], md5))
    monkeypatch.setattr(omniglot, "CONTENTS", contents(arrays))
    monkeypatch.setattr(omniglot, "VALID_IMAGES", 4)
    return Made(server, arrays)


def make_cifar10(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    """Fifteen training images in five batches, and six test images."""
    train, test = levels(15, 32, 32, 3), levels(6, 32, 32, 3)
    labels = {"train": np.arange(15, dtype=np.uint8) % 10, "test": np.arange(6, dtype=np.uint8)}
    batches = {
        f"data_batch_{i + 1}": cifar10_batch(train[3 * i : 3 * i + 3], labels["train"][3 * i :][:3])
        for i in range(5)
    }
    batches["test_batch"] = cifar10_batch(test, labels["test"])
    batches["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    *train_list, test_entry, meta = (
        [name, hashlib.md5(body).hexdigest()] for name, body in batches.items()
    )
    archive = tar_gz({f"cifar-10-batches-py/{name}": body for name, body in batches.items()})
    server.files[CIFAR10.filename] = archive
    monkeypatch.setattr(CIFAR10, "url", server.url + CIFAR10.filename)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", train_list)
    monkeypatch.setattr(CIFAR10, "test_list", [test_entry])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta[1]})
    made = {"train": train, "test": test}
    expected = {
        **{
            name: Contents(a.shape, cifar10_digest(a), cifar10.CONTENTS[name].digest)
            for name, a in made.items()
        },
        **contents({f"{name}_labels": a for name, a in labels.items()}),
    }
    monkeypatch.setattr(cifar10, "CONTENTS", expected)
    monkeypatch.setattr(cifar10, "VALID_IMAGES", 4)
    return Made(server, made | {f"{name}_labels": a for name, a in labels.items()})


def make_svhn(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    arrays: dict[str, np.ndarray] = {}
    split_list = {}
    for split, count in (("train", 13), ("test", 6)):
        images, labels = levels(count, 32, 32, 3), np.arange(count, dtype=np.uint8) % 10
        arrays |= {split: images, f"{split}_labels": labels}
        name = f"{split}_32x32.mat"
        body = svhn_file(images, np.where(labels == 0, 10, labels))
        server.files[name] = body
        split_list[split] = [server.url + name, name, hashlib.md5(body).hexdigest()]
    monkeypatch.setattr(SVHN, "split_list", split_list)
    shapes = {name: Contents(array.shape, None) for name, array in arrays.items()}
    monkeypatch.setattr(svhn, "CONTENTS", shapes)
    monkeypatch.setattr(svhn, "VALID_IMAGES", 5)
    return Made(server, arrays)


def levels(*shape: int) -> np.ndarray:
    """Random uint8 levels, which depend on the number of images."""
    count = int(np.prod(shape))
    return (256 * draws.uniform(count, shape[0])).astype(np.uint8).reshape(shape)


def cifar10_batch(images: np.ndarray, labels: np.ndarray) -> bytes:
    """A batch as published: the red values of an image by row, then green, then blue."""
    data = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return pickle.dumps({"data": data, "labels": labels.tolist()}, protocol=2)


def cifar10_digest(images: np.ndarray) -> str:
    """SHA-256 of the sorted hashes, by Python's integers."""
    factors = [int(word) | 1 for word in np.random.PCG64(np.random.SeedSequence(0)).random_raw(768)]
    hashes = []
    for image in images:
        words = struct.unpack("<768I", image.tobytes())
        hashes.append(sum(a * b for a, b in zip(words, factors, strict=True)) % 2**64)
    return hashlib.sha256(struct.pack(f"<{len(hashes)}Q", *sorted(hashes))).hexdigest()


def svhn_file(images: np.ndarray, labels: np.ndarray) -> bytes:
    """A MATLAB file as published: images (H, W, C, N), labels (N, 1)."""
    file = io.BytesIO()
    savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": labels[:, np.newaxis]})
    return file.getvalue()


def tar_gz(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, body in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return file.getvalue()


def contents(arrays: dict[str, np.ndarray]) -> dict[str, Contents]:
    return {
        name: Contents(array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        for name, array in arrays.items()
    }


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)


def refusal(call: Callable[[], object]) -> str:
    """The one-line error of `call`."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    return line


def everything(images: ImageSet) -> np.ndarray:
    return images.batch(torch.arange(len(images), device=images.device)).numpy()


def packed_sha256(images: ImageSet) -> str:
    rows = everything(images).astype(np.uint8).reshape(len(images), -1)
    return hashlib.sha256(np.packbits(rows, axis=1).tobytes()).hexdigest()
