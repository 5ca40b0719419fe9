"""The files of downloaded data sets: cache, downloads, files put there by hand."""

import errno
import io
import os
import pathlib
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import pytest

import datasets
from datasets import (
    cifar10,
    download,
    fashion_mnist,
    kmnist,
    mnist,
    omniglot,
    static_mnist,
    svhn,
)
from runtime.errors import UserError
from tests.made_data import (
    Made,
    contents,
    everything,
    forbid_network,
    refusal,
)

DOWNLOADED = {
    "static_mnist": static_mnist,
    "mnist": mnist,
    "fashion_mnist": fashion_mnist,
    "kmnist": kmnist,
    "omniglot": omniglot,
    "cifar10": cifar10,
    "svhn": svhn,
}


def test_the_cache_is_one_file_in_the_promised_format(
    tmp_path: Path, made: tuple[str, Made]
) -> None:
    name, data = made
    datasets.load(name, "test", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [f"{name}.npz"]
    with np.load(tmp_path / f"{name}.npz") as archive:
        assert set(archive.files) == set(data.arrays)
        for array in data.arrays:
            assert archive[array].dtype == np.uint8
            np.testing.assert_array_equal(archive[array], data.arrays[array])


def test_a_cached_set_needs_no_network(
    tmp_path: Path, made: tuple[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _ = made
    first = datasets.load(name, "test", tmp_path)

    forbid_network(monkeypatch)
    before = (tmp_path / f"{name}.npz").read_bytes()
    np.testing.assert_array_equal(
        everything(datasets.load(name, "test", tmp_path)), everything(first)
    )
    assert (tmp_path / f"{name}.npz").read_bytes() == before


def test_arrays_stored_by_column_are_read_by_row(
    tmp_path: Path, made_static_mnist: Made, no_network: None
) -> None:
    arrays = {name: np.asfortranarray(a) for name, a in made_static_mnist.arrays.items()}
    np.savez(tmp_path / "static_mnist.npz", allow_pickle=False, **arrays)
    images = datasets.load("static_mnist", "test", tmp_path)
    bits = np.unpackbits(made_static_mnist.arrays["test"], axis=1)
    np.testing.assert_array_equal(everything(images).reshape(5, 784), bits)


def foreign_files(name: str, arrays: dict[str, np.ndarray]) -> dict[str, bytes]:
    """Files that are not the cache of the data set `name`, by the error that they cause."""
    save = np.savez if name in ("cifar10", "svhn") else np.savez_compressed

    def npz(changed: dict[str, np.ndarray]) -> bytes:
        file = io.BytesIO()
        save(file, allow_pickle=False, **changed)
        return file.getvalue()

    whole = npz(arrays)
    flipped = arrays["test"].copy()
    flipped.flat[0] ^= 1
    middle = len(whole) // 2
    others = {name: array for name, array in arrays.items() if name != "test"}
    foreign = {
        "pickled": b"<html>not found</html>",
        "No data left": b"",
        "not a zip file": whole[:-30],
        "": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "no array 'test'": npz(others),
        "SHA-256": npz(others | {"test": flipped}),
        "'test' is uint8 (2,": npz(others | {"test": arrays["test"][:2]}),
        "'test' is int64": npz(others | {"test": arrays["test"].astype(np.int64)}),
    }
    if name == "svhn":  # no SHA-256 of its values is known
        del foreign["SHA-256"]
    return foreign


def test_a_damaged_or_foreign_file_is_named_and_left_alone(
    tmp_path: Path, made: tuple[str, Made], no_network: None
) -> None:
    name, data = made
    path = tmp_path / f"{name}.npz"
    for wrong, body in foreign_files(name, data.arrays).items():
        path.write_bytes(body)
        # The flipped byte may be in any array; the two splits together read all of them.
        line = refusal(lambda: [datasets.load(name, s, tmp_path) for s in ("test", "train+valid")])
        assert wrong in line
        assert str(path) in line
        assert "delete it to have it made again" in line
        assert path.read_bytes() == body


def test_what_is_made_is_checked_before_it_is_kept(
    tmp_path: Path, made: tuple[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, data = made
    other = {key: np.bitwise_xor(array, 1) for key, array in data.arrays.items()}
    monkeypatch.setattr(DOWNLOADED[name], "CONTENTS", contents(other))
    assert "SHA-256" in refusal(lambda: datasets.load(name, "test", tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_one_line_says_what_to_put_where(
    tmp_path: Path, made: tuple[str, Made]
) -> None:
    name, data = made
    data.server.stop()
    line = refusal(lambda: datasets.load(name, "train", tmp_path))
    assert f"{tmp_path / name}.npz is missing" in line
    assert data.server.url in line
    assert "refused" in line
    assert f"into {tmp_path} by hand" in line
    for file in data.files:
        assert file in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", ["cut", "wrong", "absent"])
def test_a_download_that_fails_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, made: tuple[str, Made], failure: str
) -> None:
    name, data = made
    last = list(data.files)[-1]
    whole = data.files[last]
    if failure == "cut":
        data.server.cut.add(last)
    elif failure == "wrong":
        data.files[last] = data.files[last][::-1]
    else:
        del data.files[last]
    line = refusal(lambda: datasets.load(name, "train", tmp_path))
    assert last in line
    assert data.server.url in line
    assert ("Not Found" if failure == "absent" else "corrupted") in line
    assert list(tmp_path.iterdir()) == []
    data.server.cut.clear()
    data.files[last] = whole
    assert len(datasets.load(name, "test", tmp_path)) == len(data.arrays["test"])


def test_a_stalled_download_ends(
    tmp_path: Path, made_static_mnist: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    made_static_mnist.server.stalled.update(made_static_mnist.files)
    line = refusal(lambda: datasets.load("static_mnist", "train", tmp_path))
    assert "timed out" in line
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(
    tmp_path: Path, made: tuple[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        datasets.load(made[0], "train", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path,
    made: tuple[str, Made],
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
) -> None:
    names_seen: list[str] = []

    def half_written(file: IO[bytes], **arrays: Any) -> NoReturn:
        file.write(b"PK\x03\x04")
        file.flush()
        names_seen.extend(p.name for p in tmp_path.iterdir())
        raise failure

    monkeypatch.setattr(np, "savez", half_written)
    monkeypatch.setattr(np, "savez_compressed", half_written)
    expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else UserError
    with pytest.raises(expected) as caught:
        datasets.load(made[0], "train", tmp_path)
    if expected is UserError:
        assert f"cannot write {tmp_path / made[0]}.npz (No space left)" in str(caught.value)
    assert len(names_seen) == 1
    assert names_seen[0].endswith(".part")
    assert list(tmp_path.iterdir()) == []


def test_files_put_there_by_hand_are_used_and_kept(
    tmp_path: Path, made: tuple[str, Made], no_network: None
) -> None:
    name, data = made
    data.put_by_hand(tmp_path)
    assert len(datasets.load(name, "test", tmp_path)) == len(data.arrays["test"])
    assert {p.name for p in tmp_path.iterdir()} == {*data.files, f"{name}.npz"}
    assert all((tmp_path / file).read_bytes() == body for file, body in data.files.items())


def test_other_files_put_there_by_hand_are_refused(
    tmp_path: Path, made: tuple[str, Made], no_network: None
) -> None:
    name, data = made
    data.put_by_hand(tmp_path)
    last = list(data.files)[-1]
    *start, byte, end = data.files[last]
    (tmp_path / last).write_bytes(bytes([*start, byte ^ 1, end]))  # a digit stays a digit
    line = refusal(lambda: datasets.load(name, "test", tmp_path))
    assert str(tmp_path / last) in line
    assert "MD5" in line
    assert {p.name for p in tmp_path.iterdir()} == set(data.files)


def test_a_data_folder_that_is_none_is_refused(tmp_path: Path, made: tuple[str, Made]) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert str(file) in refusal(lambda: datasets.load(made[0], "test", file))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_missing_data_folder_is_made(tmp_path: Path, made: tuple[str, Made]) -> None:
    name, _ = made
    folder = tmp_path / "new" / "data"
    datasets.load(name, "test", folder)
    assert [p.name for p in folder.iterdir()] == [f"{name}.npz"]


def test_a_folder_in_the_place_of_the_file_is_refused(
    tmp_path: Path, made: tuple[str, Made]
) -> None:
    path = tmp_path / f"{made[0]}.npz"
    path.mkdir()
    line = refusal(lambda: datasets.load(made[0], "test", tmp_path))
    assert f"cannot read {path} (Is a directory)" in line
    assert list(path.iterdir()) == []


def test_a_read_only_data_folder_is_refused(
    tmp_path: Path, made: tuple[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tests often run as the superuser, whom permissions do not stop, so deny access here.
    def denied(path: Any, *args: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    real_open = pathlib.Path.open

    def read_only(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        return real_open(path, mode, *args, **kwargs) if mode.startswith("r") else denied(path)

    monkeypatch.setattr(os, "mkdir", denied)
    monkeypatch.setattr(pathlib.Path, "open", read_only)
    line = refusal(lambda: datasets.load(made[0], "test", tmp_path))
    assert "cannot write" in line
    assert "Permission denied" in line
    assert str(tmp_path) in line


def test_an_unreadable_file_is_not_called_damaged(
    tmp_path: Path, made: tuple[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, *args: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    datasets.load(made[0], "test", tmp_path)
    monkeypatch.setattr(pathlib.Path, "open", denied)
    line = refusal(lambda: datasets.load(made[0], "test", tmp_path))
    assert f"cannot read {tmp_path / made[0]}.npz (Permission denied)" in line
