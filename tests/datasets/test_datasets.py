"""Data sets on small made files in the official formats, served from this machine."""

import errno
import io
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np
import pytest
import torch

import datasets
from datasets import ImageSet, TrainingBatches, cifar10, mnist, static_mnist, svhn
from datasets.images import DynamicallyBinarizedImages, PackedImages
from runtime import random as draws
from runtime.errors import UserError
from tests.made_data import (
    Made,
    Server,
    contents,
    everything,
    forbid_network,
    make_cifar10,
    make_mnist,
    make_static_mnist,
    make_svhn,
    packed_sha256,
    refusal,
    serving,
)

DOWNLOADED = {"static_mnist": static_mnist, "mnist": mnist, "cifar10": cifar10, "svhn": svhn}

# The fixed draws: a change of any of these is a change of the data sets.
PINNED_PERMUTATION = [3, 2, 1, 6, 0, 7, 4, 5]
PINNED_TORCH_SEED = 9247832928889101276
PINNED_DIGITS = {
    "train": "f1b6f435920ecd50e2e7e3ca2e1dd0777d09dba59c01a82039f8ce267a2ad0c7",
    "valid": "ceec05772ce404a1376c8beeec979bc879b3de97d9185ed6657aec7b6db72df1",
    "test": "09c9d5b27072853f1ede67161b2d19733097f09de9316addeb860e1e54124585",
    "train+valid": "c0b21d075104f7cfe5a570e1019106d705a2505dec63fb2b425877e877f050a5",
}
# Of the made images below.
PINNED_MNIST = {
    "valid": "9fea28ee6c98cf66467833238be43a5140a3f099570aa5326409df2638dc31a5",
    "test": "fe979a35fbcdc81c8d74a3413ae349cfc1bd4cc880ef49711abbc001fb847448",
}


# --- Small data sets in the official formats ---

MAKERS = {
    "static_mnist": make_static_mnist,
    "mnist": make_mnist,
    "cifar10": make_cifar10,
    "svhn": make_svhn,
}


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def made_static_mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_static_mnist(server, monkeypatch)


@pytest.fixture
def made_mnist(server: Server, monkeypatch: pytest.MonkeyPatch) -> Made:
    return make_mnist(server, monkeypatch)


@pytest.fixture(params=MAKERS)
def made(
    request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Made]:
    """The name of each downloaded data set, and its small stand-in."""
    return request.param, MAKERS[request.param](server, monkeypatch)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)


# --- The registry ---


def test_names_splits_and_shapes() -> None:
    assert {name: datasets.image_shape(name) for name in datasets.NAMES} == {
        "celeba": (3, 64, 64),
        "cifar10": (3, 32, 32),
        "digits": (1, 8, 8),
        "mnist": (1, 28, 28),
        "multi_dsprites": (3, 64, 64),
        "static_mnist": (1, 28, 28),
        "svhn": (3, 32, 32),
    }
    assert datasets.SPLITS == ("train", "valid", "test", "train+valid")


def test_binary_sets_are_known() -> None:
    binary = [name for name in datasets.NAMES if datasets.is_binary(name)]
    assert binary == ["digits", "mnist", "multi_dsprites", "static_mnist"]


def test_an_unknown_name_or_split_lists_what_there_is(tmp_path: Path) -> None:
    for call in (
        lambda: datasets.load("minst", "train", tmp_path),
        lambda: datasets.image_shape("minst"),
        lambda: datasets.is_binary("minst"),
    ):
        line = refusal(call)
        assert "'minst'" in line
        assert ", ".join(datasets.NAMES) in line
    line = refusal(lambda: datasets.load("digits", "validation", tmp_path))
    assert "'validation'" in line
    assert "train, valid, test, train+valid" in line


def test_importing_the_package_does_not_import_the_heavy_libraries() -> None:
    heavy = "{'PIL', 'scipy', 'sklearn', 'torchvision', 'tqdm'}"
    command = (
        "import torch, sys; before = set(sys.modules); import datasets; "
        f"print(sorted({heavy} & (set(sys.modules) - before)))"
    )
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-c", command], cwd=root, capture_output=True, check=True)
    assert out.stdout.decode().strip() == "[]"


# --- Image sets ---


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 3), (1, 8, 8), (3, 5, 7), (2, 2, 4)])
def test_packed_images_come_back_as_they_were(shape: tuple[int, int, int]) -> None:
    pixels = np.random.default_rng(2).integers(0, 2, (11, *shape), np.uint8)
    images = PackedImages.pack("made", "train", pixels)
    assert images.shape == shape
    assert len(images) == 11
    index = torch.tensor([3, 10, 0, 3])
    batch = images.batch(index)
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), pixels[index.numpy()])


def test_the_first_pixel_is_the_highest_bit() -> None:
    images = PackedImages(
        "made", "test", (1, 3, 3), torch.tensor([[0b10000110, 0b10000000]]).byte()
    )
    assert images.batch(torch.tensor([0])).tolist() == [[[[1, 0, 0], [0, 0, 1], [1, 0, 1]]]]


@pytest.mark.parametrize("kind", [PackedImages, DynamicallyBinarizedImages])
def test_moving_images_leaves_the_original_where_it_was(kind: type[ImageSet]) -> None:
    images = kind("made", "valid", (1, 2, 4), torch.zeros((5, 1, 2, 4), dtype=torch.uint8))
    moved = images.to("meta")
    assert type(moved) is kind
    assert (moved.device.type, images.device.type) == ("meta", "cpu")
    assert (moved.name, moved.split, moved.shape, len(moved)) == ("made", "valid", (1, 2, 4), 5)


def test_dynamic_binarization_draws_each_pixel_with_its_grey_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    images = DynamicallyBinarizedImages("made", "train", (1, 16, 16), levels)
    n = 5000
    batch = images.batch(torch.zeros(n, dtype=torch.int64), torch.Generator().manual_seed(3))
    assert batch.dtype == torch.float32
    assert batch.unique().tolist() == [0.0, 1.0]
    counts = batch.sum(0).flatten().double()
    p = torch.arange(256).double() / 255
    assert counts[0] == 0  # black is never on,
    assert counts[255] == n  # white always
    chi_square = ((counts - n * p) ** 2 / (n * p * (1 - p)))[1:255].sum().item()
    assert abs(chi_square - 254) < 4 * (2 * 254) ** 0.5


def test_dynamic_binarization_is_fresh_at_each_reading_and_follows_its_generator() -> None:
    grey = torch.full((2, 1, 16, 16), 128, dtype=torch.uint8)
    images = DynamicallyBinarizedImages("made", "train", (1, 16, 16), grey)
    index = torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(4)
    first, second = images.batch(index, generator), images.batch(index, generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, images.batch(index, generator.manual_seed(4)))
    assert not torch.equal(images.batch(index), images.batch(index))


# --- Draws ---


def test_draws_are_numpys_and_never_change() -> None:
    sequence = np.random.SeedSequence(5, spawn_key=(1, 2))
    reference = np.random.Generator(np.random.PCG64(sequence)).random(1000)
    np.testing.assert_array_equal(draws.uniform(1000, 5, 1, 2), reference)
    assert draws.permutation(8, 0).tolist() == PINNED_PERMUTATION
    assert draws.torch_seed(0, 1, 2) == PINNED_TORCH_SEED


def test_each_part_of_a_key_changes_the_draw() -> None:
    keys = [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 2**32), (2**32,)]
    assert len({draws.torch_seed(*key) for key in keys}) == len(keys)
    assert len({draws.uniform(1, *key).item() for key in keys}) == len(keys)


def test_whole_numbers_are_drawn_equally_often() -> None:
    drawn = draws.integers(7, 70_000, 3, 1)
    assert drawn.dtype == np.int64
    counts = np.bincount(drawn)
    assert len(counts) == 7
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 6 + 4 * 12**0.5


def test_bernoulli_draws_have_their_probabilities() -> None:
    p = np.repeat([0.0, 0.1, 0.5, 0.9, 1.0], 10_000).reshape(5, -1)
    drawn = draws.bernoulli(p, 6)
    assert drawn.shape == p.shape
    counts = drawn.sum(1)
    assert (counts[0], counts[4]) == (0, 10_000)
    deviations = (counts - p.sum(1))[1:4] / np.sqrt((p * (1 - p)).sum(1))[1:4]
    assert np.abs(deviations).max() < 4


# --- Training batches ---


def numbered(count: int) -> PackedImages:
    """Images that spell their own number in binary."""
    bits = np.unpackbits(np.arange(count, dtype=np.uint8)[:, np.newaxis], axis=1)
    return PackedImages.pack("made", "train", bits.reshape(-1, 1, 2, 4))


def numbers(batch: torch.Tensor) -> list[int]:
    return np.packbits(batch.numpy().astype(np.uint8).reshape(-1, 8), axis=1)[:, 0].tolist()


def test_every_epoch_is_a_permutation_of_its_own() -> None:
    batches = TrainingBatches(numbered(12), 4, seed=0)
    assert batches.steps_per_epoch == 3
    seen = [number for step in range(12) for number in numbers(batches(step))]
    epochs = [seen[start : start + 12] for start in range(0, 48, 12)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_incomplete_batch_is_dropped_and_never_the_same_images() -> None:
    batches = TrainingBatches(numbered(14), 4, seed=0)
    assert batches.steps_per_epoch == 3
    left_out = set()
    for epoch in range(100):
        seen = [number for i in range(3) for number in numbers(batches(3 * epoch + i))]
        assert len(set(seen)) == 12
        left_out |= set(range(14)) - set(seen)
    assert left_out == set(range(14))


def test_shuffles_put_every_image_everywhere_equally_often() -> None:
    batches = TrainingBatches(numbered(8), 8, seed=1)
    n = 800
    counts = np.zeros((8, 8))
    for step in range(n):
        counts[np.arange(8), numbers(batches(step))] += 1
    chi_square = ((counts - n / 8) ** 2 / (n / 8)).sum()
    degrees = 7 * 7
    assert abs(chi_square - degrees) < 4 * (2 * degrees) ** 0.5


def test_batches_are_a_function_of_seed_and_step_alone() -> None:
    grey = torch.from_numpy(np.random.default_rng(7).integers(0, 256, (10, 1, 6, 6), np.uint8))
    images = DynamicallyBinarizedImages("made", "train", (1, 6, 6), grey)
    unbroken = TrainingBatches(images, 4, seed=8)
    run = [unbroken(step) for step in range(9)]
    resumed = TrainingBatches(images, 4, seed=8)
    for step in (5, 6, 0, 8, 5):  # also backwards, and one twice
        assert torch.equal(resumed(step), run[step])
    other = TrainingBatches(images, 4, seed=9)
    assert not any(torch.equal(other(step), run[step]) for step in range(9))


def test_binarization_noise_is_fresh_in_each_step_and_epoch() -> None:
    grey = torch.full((2, 1, 16, 16), 128, dtype=torch.uint8)
    images = DynamicallyBinarizedImages("made", "train", (1, 16, 16), grey)
    batches = TrainingBatches(images, 1, seed=0)
    drawn = {tuple(batches(step).flatten().tolist()) for step in range(50)}
    assert len(drawn) == 50


def test_unsuitable_batch_sizes_and_seeds_are_refused() -> None:
    assert TrainingBatches(numbered(12), 12, seed=0).steps_per_epoch == 1
    for size in (13, 0, -1):
        line = refusal(partial(TrainingBatches, numbered(12), size, seed=0))
        assert f"batch size {size}" in line
        assert "from 1 to 12" in line
    assert "seed -1" in refusal(lambda: TrainingBatches(numbered(12), 4, seed=-1))


# --- digits ---


def test_digits_are_these(tmp_path: Path, no_network: None) -> None:
    nowhere = tmp_path / "nowhere"
    splits = {split: datasets.load("digits", split, nowhere) for split in datasets.SPLITS}
    assert [len(splits[s]) for s in datasets.SPLITS] == [1200, 300, 297, 1500]
    assert {images.shape for images in splits.values()} == {(1, 8, 8)}
    assert {s: packed_sha256(splits[s]) for s in datasets.SPLITS} == PINNED_DIGITS
    together = np.concatenate([everything(splits["train"]), everything(splits["valid"])])
    np.testing.assert_array_equal(together, everything(splits["train+valid"]))
    assert not nowhere.exists()


def test_digits_are_drawn_with_their_grey_levels(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    p = load_digits().images / 16
    splits = (datasets.load("digits", split, tmp_path) for split in ("train", "valid", "test"))
    per_pixel = np.concatenate([everything(images) for images in splits]).sum((0, 1))
    deviation = np.sqrt((p * (1 - p)).sum(0))
    assert (np.abs(per_pixel - p.sum(0)) <= 4 * deviation).all()
    assert per_pixel.sum() > 0


# --- static_mnist and mnist: what they hold ---


def test_static_mnist_is_what_was_published(
    tmp_path: Path, made_static_mnist: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    a = made_static_mnist.arrays
    a["train+valid"] = np.concatenate([a["train"], a["valid"]])
    for split in datasets.SPLITS:
        images = datasets.load("static_mnist", split, str(tmp_path))
        assert (images.name, images.split) == ("static_mnist", split)
        bits = np.unpackbits(a[split], axis=1).reshape(-1, 1, 28, 28)
        np.testing.assert_array_equal(everything(images), bits)
    shown = capfd.readouterr()
    assert "binarized_mnist_train.amat: 100%" in shown.err
    assert shown.out == ""


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


def test_mnist_trains_on_fresh_draws(tmp_path: Path, made_mnist: Made) -> None:
    grey = made_mnist.arrays["train"]
    for split, expected in (("train", grey[:8]), ("train+valid", grey)):
        images = datasets.load("mnist", split, tmp_path)
        assert (len(images), images.shape) == (len(expected), (1, 28, 28))
        generator = torch.Generator().manual_seed(0)
        drawn = [images.batch(torch.arange(len(images)), generator) for _ in range(300)]
        assert not torch.equal(drawn[0], drawn[1])
        mean = torch.stack(drawn).mean(0)[:, 0].double().numpy()
        p = expected / 255
        deviation = np.abs(mean - p) / np.sqrt(np.maximum(p * (1 - p), 1e-12) / 300)
        assert deviation.max() < 6


def test_mnist_is_scored_on_fixed_draws(tmp_path: Path, made_mnist: Made) -> None:
    sources = {"valid": made_mnist.arrays["train"][8:], "test": made_mnist.arrays["test"]}
    for split, grey in sources.items():
        images = datasets.load("mnist", split, tmp_path)
        drawn = everything(images)
        assert drawn.shape == (len(grey), 1, 28, 28)
        np.testing.assert_array_equal(drawn, everything(images))
        np.testing.assert_array_equal(drawn, everything(datasets.load("mnist", split, tmp_path)))
        p = grey / 255
        assert abs(drawn.sum() - p.sum()) < 4 * np.sqrt((p * (1 - p)).sum())
        assert np.corrcoef(drawn.flat, p.flat)[0, 1] > 0.5
        assert packed_sha256(images) == PINNED_MNIST[split]


# --- The cache ---


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
    """Files that are not the cache of the data set ``name``, by what is wrong with them."""
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
        "no npz file": b"<html>not found</html>",
        "no npz": b"",
        "or a part of one": whole[:-30],
        "cannot be read": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "no array 'test'": npz(others),
        "SHA-256": npz(others | {"test": flipped}),
        "'test' is uint8 (2,": npz(others | {"test": arrays["test"][:2]}),
        "'test' is int64": npz(others | {"test": arrays["test"].astype(np.int64)}),
    }
    if name == "svhn":  # whose values were never published
        del foreign["SHA-256"]
    return foreign


def test_a_damaged_or_foreign_file_is_named_and_left_alone(
    tmp_path: Path, made: tuple[str, Made], no_network: None
) -> None:
    name, data = made
    path = tmp_path / f"{name}.npz"
    for wrong, body in foreign_files(name, data.arrays).items():
        path.write_bytes(body)
        # The flipped byte lies in one array or another: all are read between the two splits.
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


# --- Downloads that fail ---


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
def test_a_download_that_fails_leaves_nothing(
    tmp_path: Path, made: tuple[str, Made], failure: str
) -> None:
    name, data = made
    last = list(data.files)[-1]
    if failure == "cut":
        data.server.cut.add(last)
    elif failure == "wrong":
        data.files[last] = data.files[last][::-1]
    else:
        del data.files[last]
    line = refusal(lambda: datasets.load(name, "train", tmp_path))
    assert last in line
    assert data.server.url in line
    if name != "mnist":
        assert {"cut": "cut after", "wrong": "its MD5 is", "absent": "Not Found"}[failure] in line
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_can_be_tried_again(tmp_path: Path, made: tuple[str, Made]) -> None:
    name, data = made
    data.server.cut.add(list(data.files)[-1])
    refusal(lambda: datasets.load(name, "test", tmp_path))
    data.server.cut.clear()
    assert len(datasets.load(name, "test", tmp_path)) == len(data.arrays["test"])


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


# --- Files put there by hand ---


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
    (tmp_path / last).write_bytes(bytes([*start, byte ^ 1, end]))  # also a digit is one then
    line = refusal(lambda: datasets.load(name, "test", tmp_path))
    assert str(tmp_path / last) in line
    assert "MD5" in line
    assert {p.name for p in tmp_path.iterdir()} == set(data.files)


ROW = b" ".join([b"0", b"1"] * 392) + b"\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "cut off"),
        (ROW + ROW[:-1], "cut off"),
        (ROW + ROW[2:] + ROW, "row 2 has 1565 characters where 1567 are expected"),
        (ROW + ROW + b"1 " + ROW, "row 3 has 1569 characters"),
        (ROW + b"\n", "row 2 has 0 characters"),
        (ROW.replace(b"\n", b"\r\n"), "row 1 has 1568 characters"),
        (ROW + b"2" + ROW[1:], "row 2 has '2' as character 1 where 0 or 1 is expected"),
        (ROW[:5] + b"," + ROW[6:], "row 1 has ',' as character 6 where a space is expected"),
        (ROW[:1566] + b"\xe9\n", "row 1 has 'é' as character 1567 where 0 or 1"),
    ],
)
def test_a_text_file_of_another_form_is_refused_by_row(
    tmp_path: Path, made_static_mnist: Made, no_network: None, text: bytes, expected: str
) -> None:
    path = tmp_path / "binarized_mnist_train.amat"
    path.write_bytes(text)
    line = refusal(lambda: datasets.load("static_mnist", "train", tmp_path))
    assert str(path) in line
    assert expected in line
    assert path.read_bytes() == text


def test_text_rows_are_packed_in_order(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(ROW + ROW[::-1][1:] + b"\n")
    assert static_mnist.pack_amat(tmp_path / "rows").tolist() == [
        [0b01010101] * 98,
        [0b10101010] * 98,
    ]


# --- Folders that do not serve ---


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
    assert f"{path} is a folder" in refusal(lambda: datasets.load(made[0], "test", tmp_path))
    assert list(path.iterdir()) == []


def test_a_read_only_data_folder_is_refused(
    tmp_path: Path, made: tuple[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Permissions do not bind the superuser, as whom tests often run: refuse what they would.
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
