"""Multi-dSprites: its images, their distribution, and fixed checksums."""

import hashlib
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import datasets
from datasets import multi_dsprites
from datasets.multi_dsprites import Factors, draw_factors, render
from tests.made_data import contents, everything, forbid_network, refusal

# Checksums of the first 100 images, packed. If they change, the data set has changed.
PINNED = {
    "train": "1530080887c426284ce35e609979bb1f527bd7810bfb651f744671f21f0876c5",
    "valid": "6e8ec52564f50f93315e2847089c165ec9b3cb2799aa6559bda97f3b892babca",
    "test": "a3bafc636f0c694c3151d020825a1d80dde5644f7a218483c125950d84ab9c1d",
}
SQUARE, ELLIPSE, HEART = range(3)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Replace the data set by a few packed images, without a network."""
    arrays = {
        split: packed(render(draw_factors(split, count)))
        for split, count in (("train", 30), ("valid", 10), ("test", 20))
    }
    monkeypatch.setattr(multi_dsprites, "CONTENTS", contents(arrays))
    forbid_network(monkeypatch)
    return arrays


def packed(images: np.ndarray) -> np.ndarray:
    return np.packbits(images.reshape(len(images), -1), axis=1)


def scenes(sprites: list[tuple[int, int, int, int, int, int]], number: int = 1) -> Factors:
    """Images with the first `number` of two sprites, whose factors are `sprites`."""
    columns = np.array(sprites).reshape(-1, number, 6)
    columns = np.concatenate([columns, np.ones_like(columns)], axis=1)[:, :2]
    return Factors(np.full(len(columns), number), *columns.transpose(2, 0, 1))


# The data set


def test_images_are_these() -> None:
    found = {
        split: hashlib.sha256(packed(render(draw_factors(split, 100))).tobytes()).hexdigest()
        for split in PINNED
    }
    assert found == PINNED


def test_a_whole_split_has_its_checksum() -> None:
    arrays = packed(render(draw_factors("valid", 5000)))
    assert hashlib.sha256(arrays.tobytes()).hexdigest() == multi_dsprites.CONTENTS["valid"].sha256


def test_the_first_images_do_not_depend_on_how_many_are_drawn() -> None:
    few, many = draw_factors("test", 7), draw_factors("test", 20)
    np.testing.assert_array_equal(few.number, many.number[:7])
    np.testing.assert_array_equal(few.shape, many.shape[:7])


def test_splits_are_binary_disjoint_and_complete(
    tmp_path: Path, few: dict[str, np.ndarray]
) -> None:
    splits = {split: datasets.load("multi_dsprites", split, tmp_path) for split in datasets.SPLITS}
    assert {s: len(splits[s]) for s in splits} == {
        "train": 30,
        "valid": 10,
        "test": 20,
        "train+valid": 40,
    }
    for split, images in splits.items():
        assert (images.name, images.split, images.shape) == ("multi_dsprites", split, (3, 64, 64))
        pixels = everything(images)
        assert set(np.unique(pixels)) == {0, 1}
        bits = np.concatenate([few[name] for name in split.split("+")])
        np.testing.assert_array_equal(packed(pixels.astype(bool)), bits)
    shown = {s: {row.tobytes() for row in few[s] if row.any()} for s in few}
    assert not shown["train"] & shown["valid"]
    assert not shown["train"] & shown["test"]


def test_it_has_the_published_numbers_of_images() -> None:
    shapes = {split: c.shape for split, c in multi_dsprites.CONTENTS.items()}
    assert shapes == {"train": (50000, 1536), "valid": (5000, 1536), "test": (5000, 1536)}


def test_the_file_is_made_once_and_checked(tmp_path: Path, few: dict[str, np.ndarray]) -> None:
    path = tmp_path / "new" / "multi_dsprites.npz"
    datasets.load("multi_dsprites", "test", path.parent)
    assert [p.name for p in path.parent.iterdir()] == ["multi_dsprites.npz"]
    with np.load(path) as archive:
        assert {name: archive[name].tolist() for name in archive.files} == {
            name: array.tolist() for name, array in few.items()
        }
    np.savez(path, allow_pickle=False, **(few | {"test": few["test"] ^ 1}))
    line = refusal(lambda: datasets.load("multi_dsprites", "test", path.parent))
    assert f"{path} is damaged or another file" in line
    assert "SHA-256" in line
    assert len(datasets.load("multi_dsprites", "train", path.parent)) == 30


def test_what_is_generated_is_checked_before_it_is_kept(
    tmp_path: Path, few: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_dsprites, "CONTENTS", contents(few | {"test": few["test"] ^ 1}))
    line = refusal(lambda: datasets.load("multi_dsprites", "train", tmp_path))
    assert f"{tmp_path / 'multi_dsprites.npz'} was not made" in line
    assert list(tmp_path.iterdir()) == []


# Distribution


def test_every_factor_is_uniform_and_they_are_independent() -> None:
    n = 50_000
    factors = draw_factors("train", n)
    counts = np.bincount(factors.number, minlength=3)
    assert len(counts) == 3
    assert ((counts - n / 3) ** 2 / (n / 3)).sum() < 2 + 4 * 4**0.5
    levels = {"shape": 3, "scale": 6, "orientation": 40, "row": 32, "column": 32, "colour": 7}
    for name, size in levels.items():
        drawn = getattr(factors, name) - (name == "colour")
        for place in range(2):
            counts = np.bincount(drawn[:, place])
            assert len(counts) == size
            chi_square = ((counts - n / size) ** 2 / (n / size)).sum()
            assert abs(chi_square - (size - 1)) < 4 * (2 * (size - 1)) ** 0.5
    columns = np.column_stack(factors)
    correlations = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlations).max() < 5 / n**0.5


# Images


def test_images_show_their_sprites_and_nothing_else() -> None:
    factors = draw_factors("train", 3000)
    images = render(factors)
    assert images.dtype == bool
    assert images.shape == (3000, 3, 64, 64)
    colours = 4 * images[:, 0] + 2 * images[:, 1] + images[:, 2]
    seen = set()
    for number, sprites, image in zip(factors.number, factors.colour, colours, strict=True):
        shown = set(np.unique(image)) - {0}
        assert shown <= set(sprites[:number])
        if number:
            assert sprites[number - 1] in shown  # the last is never hidden
        seen |= shown
    assert seen == set(range(1, 8))
    two = colours[factors.number == 2]
    assert np.mean([len(np.unique(image)) == 3 for image in two]) > 0.8


def test_every_sprite_is_whole_in_every_corner() -> None:
    every = list(product(range(3), range(6), range(40)))
    middle = render(scenes([(*factors, 15, 15, 7) for factors in every]))[:, 0]
    areas = middle.sum((1, 2))
    assert areas.min() > 50
    for row, column in product((0, 31), (0, 31)):
        corner = render(scenes([(*factors, row, column, 7) for factors in every]))[:, 0]
        np.testing.assert_array_equal(np.roll(corner, (15 - row, 15 - column), (1, 2)), middle)
        assert not corner[:, 0].any()
        assert not corner[:, :, 0].any()
        assert not corner[:, -1].any()
        assert not corner[:, :, -1].any()


def test_the_second_sprite_hides_what_it_covers_of_the_first() -> None:
    lower, upper = (SQUARE, 5, 0, 15, 15, 4), (ELLIPSE, 2, 7, 12, 13, 3)
    below, above = render(scenes([lower, upper]))
    (both,) = render(scenes([lower, upper], number=2))
    covered = above.any(0)
    np.testing.assert_array_equal(both[:, covered], above[:, covered])
    np.testing.assert_array_equal(both[:, ~covered], below[:, ~covered])
    assert (covered & below.any(0)).any()


@pytest.mark.parametrize("colour", range(1, 8))
def test_colours_are_red_green_and_blue_on_or_off(colour: int) -> None:
    (image,) = render(scenes([(HEART, 5, 0, 15, 15, colour)]))
    pixels = image[:, image.any(0)]
    expected = [bool(colour & 4), bool(colour & 2), bool(colour & 1)]
    assert (pixels == np.array(expected)[:, None]).all()


def test_sizes_follow_the_scale() -> None:
    for shape in (SQUARE, ELLIPSE, HEART):
        sizes = (
            render(scenes([(shape, k, turn, 15, 15, 7) for k in range(6) for turn in range(40)]))[
                :, 0
            ]
            .reshape(6, 40, -1)
            .sum(2)
            .mean(1)
        )
        np.testing.assert_allclose(sizes / sizes[5], (np.arange(5, 11) / 10) ** 2, rtol=0.12)


def test_a_quarter_turn_turns_the_sprite() -> None:
    for shape in (SQUARE, ELLIPSE):
        images = render(scenes([(shape, 4, turn, 15, 15, 7) for turn in (3, 13)]))[:, 0]
        window = images[:, 31 - 13 : 31 + 13, 31 - 13 : 31 + 13]  # about the centre
        np.testing.assert_array_equal(np.rot90(window[0]), window[1])


def test_a_heart_has_two_lobes_above_and_one_point_below() -> None:
    (image,) = render(scenes([(HEART, 5, 0, 15, 15, 7)]))[:, 0]
    rows = image[image.any(1)]
    runs = [np.count_nonzero(np.diff(row.astype(int), prepend=0) == 1) for row in rows]
    assert runs[0] == 2
    assert runs[2:] == [1] * (len(runs) - 2)
    widths = rows.sum(1)
    assert widths[-1] <= 2
    lower = widths[len(widths) // 2 :]
    assert (np.diff(lower) < 0).all()
    np.testing.assert_array_equal(rows, np.roll(rows[:, ::-1], -2, axis=1))  # symmetric about 31
