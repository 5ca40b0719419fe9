"""Training batches: shuffles, noise, and their dependence on seed and step alone."""

from functools import partial

import numpy as np
import torch

from datasets import TrainingBatches
from datasets.images import DynamicallyBinarizedImages, PackedImages
from tests.made_data import (
    refusal,
)


def numbered(count: int) -> PackedImages:
    """Images whose pixels are the binary digits of their number."""
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
