"""Which images a training step sees, as a pure function of the seed and the step."""

import torch
from torch import Tensor

from runtime import random as draws
from runtime.errors import UserError

from .images import ImageSet

# What a draw is for, the second part of its key.
_ORDER, _NOISE = 0, 1


class TrainingBatches:
    """Batches of shuffled images: ``batches(step)`` is float32 (batch_size, C, H, W) in [0, 1].

    Each epoch goes through the images in an order of its own and drops the last, incomplete
    batch. Order and binarization noise depend on ``seed`` and ``step`` alone, so a resumed run
    sees what an unbroken one would have seen, and no state need be stored. (Noise is drawn on
    the images' device, and CPU and GPU draw differently.)

    Raises:
        UserError: ``batch_size`` is below 1 or above the number of images, or ``seed`` is
            negative.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int) -> None:
        if not 1 <= batch_size <= len(images):
            raise UserError(
                f"batch size {batch_size} does not suit the {len(images)} images of {images.name} "
                f"({images.split}): choose one from 1 to {len(images)}"
            )
        if seed < 0:
            raise UserError(f"seed {seed} is negative: choose 0 or more")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = len(images) // batch_size
        self._generator = torch.Generator(images.device)
        self._epoch = -1
        self._order = torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """The batch of ``step``, counted from 0 over all epochs."""
        return self.part(step, 0, 1)

    def part(self, step: int, number: int, parts: int) -> Tensor:
        """One of equal ``parts`` of the batch of ``step``, by its ``number`` from 0."""
        index = self._index(step)
        size = self.batch_size // parts
        chosen = slice(number * size, (number + 1) * size)
        self._generator.manual_seed(draws.torch_seed(self.seed, _NOISE, step))
        if self.images.is_noisy:  # the noise of the whole batch is drawn, and that of the part kept
            return self.images.batch(index, self._generator)[chosen]
        return self.images.batch(index[chosen], self._generator)

    def _index(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._shuffle(epoch)
            self._epoch = epoch
        start = position * self.batch_size
        return self._order[start : start + self.batch_size]

    def _shuffle(self, epoch: int) -> Tensor:
        # Kept there for the whole epoch, so that a step costs one slice of it.
        order = torch.from_numpy(draws.permutation(len(self.images), self.seed, _ORDER, epoch))
        if self.images.index_device.type == "cuda":
            order = order.pin_memory()  # without which the copy would halt the GPU's queue
        return order.to(self.images.index_device, non_blocking=True)
