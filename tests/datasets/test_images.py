"""Image sets: what a batch holds, on which device, and with which noise."""

import numpy as np
import pytest
import torch

from datasets import ImageSet, TrainingBatches
from datasets.images import ColourImages, DynamicallyBinarizedImages, MappedImages, PackedImages
from tests.made_data import (
    everything,
    levels,
)

# Binary images


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


# Colour images


@pytest.mark.parametrize("kind", [ColourImages, MappedImages])
def test_a_batch_is_the_levels_over_255(kind: type[ImageSet]) -> None:
    stored = torch.from_numpy(levels(9, 5, 7, 3))
    images = kind("made", "train", (3, 5, 7), stored)
    assert (len(images), images.shape) == (9, (3, 5, 7))
    index = torch.tensor([8, 0, 3, 0])
    batch = images.batch(index)
    assert (batch.dtype, batch.shape) == (torch.float32, (4, 3, 5, 7))
    assert batch.is_contiguous()
    expected = stored.numpy()[index.numpy()].transpose(0, 3, 1, 2).astype(np.float32)
    np.testing.assert_array_equal(batch.numpy(), expected / np.float32(255))


def test_every_level_comes_back_as_it_was() -> None:
    stored = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    batch = ColourImages("made", "train", (3, 16, 16), stored).batch(torch.tensor([0]))
    assert (batch.min(), batch.max()) == (0, 1)
    for channel in batch[0]:
        assert (channel.flatten() * 255).round().int().tolist() == list(range(256))


def test_colour_images_move_whole() -> None:
    images = ColourImages("made", "valid", (3, 2, 4), torch.zeros((5, 2, 4, 3)).byte())
    moved = images.to("meta")
    assert type(moved) is ColourImages
    assert [i.device.type for i in (images, moved)] == ["cpu", "meta"]
    assert moved.index_device.type == "meta"
    assert (moved.name, moved.split, moved.shape, len(moved)) == ("made", "valid", (3, 2, 4), 5)


def test_mapped_images_stay_and_their_batches_move() -> None:
    images = MappedImages("made", "valid", (3, 2, 4), torch.from_numpy(levels(5, 2, 4, 3)))
    moved = images.to("meta")
    assert type(moved) is MappedImages
    assert [i.device.type for i in (images, moved)] == ["cpu", "meta"]
    assert moved.index_device.type == "cpu"
    assert (moved.name, moved.split, moved.shape, len(moved)) == ("made", "valid", (3, 2, 4), 5)
    batch = moved.batch(torch.tensor([4, 2, 2]))
    assert (batch.device.type, batch.shape) == ("meta", (3, 3, 2, 4))
    back = moved.to("cpu")
    np.testing.assert_array_equal(everything(back), everything(images))


def test_training_batches_of_mapped_images_are_those_of_images_in_memory() -> None:
    stored = torch.from_numpy(levels(10, 4, 4, 3))
    ours, theirs = (
        TrainingBatches(kind("made", "train", (3, 4, 4), stored), 4, seed=1)
        for kind in (MappedImages, ColourImages)
    )
    for step in range(5):
        assert torch.equal(ours(step), theirs(step))
