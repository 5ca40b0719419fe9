"""Horizontal flips while training: half of the images, as a function of seed and step."""

import numpy as np
import torch

from datasets import TrainingBatches
from datasets.images import ColourImages
from tests.made_data import levels


def test_flips_depend_on_seed_and_step() -> None:
    images = ColourImages("made", "train", (3, 4, 5), torch.from_numpy(levels(64, 4, 5, 3)))
    plain = TrainingBatches(images, 16, 3)
    flipped, again = (TrainingBatches(images, 16, 3, flip=True) for _ in range(2))
    count = 0
    for step in range(100):
        x, y = plain(step), flipped(step)
        was_flipped = (y != x).flatten(1).any(1)
        torch.testing.assert_close(
            y, torch.where(was_flipped[:, None, None, None], x.flip(-1), x), rtol=0, atol=0
        )
        count += int(was_flipped.sum())
        # The same from any step on, and in parts.
        parts = torch.cat([again.part(step, number, 2) for number in range(2)])
        torch.testing.assert_close(parts, y, rtol=0, atol=0)
    assert abs(count - 800) < 4 * np.sqrt(400)  # four standard deviations
    assert not torch.equal(TrainingBatches(images, 16, 4, flip=True)(99), y)
