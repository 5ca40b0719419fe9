"""The images of each training step, as a function of the seed and the step alone."""

import torch
from torch import Tensor

from datasets.images import ImageSet
from runtime import random as draws
from runtime.errors import UserError

# The second part of a random key names the purpose of the draw.
_ORDER, _NOISE, _FLIP = 0, 1, 2


class TrainingBatches:
    """Batches of shuffled images: `batches(step)` is float32 (batch_size, C, H, W) in [0, 1].

    Each epoch shuffles the images and drops the last batch if it is incomplete. Order and
    binarization noise depend on `seed` and `step` alone, so a resumed run sees the same images as
    an uninterrupted one, and there is no state to store. (Noise is drawn on the images' device; a
    CPU and a GPU draw different noise.) With `flip`, each image is flipped horizontally with
    probability 1/2, each time again.

    Raises:
        UserError: `batch_size` is below 1 or above the number of images, or `seed` is negative.
    """

    def __init__(self, images: ImageSet, batch_size: int, seed: int, *, flip: bool = False) -> None:
        if not 1 <= batch_size <= len(images):
            raise UserError(
                f"batch size {batch_size} does not fit the {len(images)} images of {images.name} "
                f"({images.split}): choose one from 1 to {len(images)}"
            )
        if seed < 0:
            raise UserError(f"seed {seed} is negative: choose 0 or more")
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.flip = flip
        self.steps_per_epoch = len(images) // batch_size
        self._generator = torch.Generator(images.device)
        self._epoch = -1
        self._order = torch.empty(0)

    def __call__(self, step: int) -> Tensor:
        """The batch of `step`, which counts from 0 over all epochs."""
        return self.part(step, 0, 1)

    def part(self, step: int, number: int, parts: int) -> Tensor:
        """Part `number` (from 0) of `parts` equal parts of the batch of `step`."""
        index = self._index(step)
        size = self.batch_size // parts
        chosen = slice(number * size, (number + 1) * size)
        self._generator.manual_seed(draws.torch_seed(self.seed, _NOISE, step))
        if self.images.is_noisy:  # draw the whole batch's noise, so that parts agree with the whole
            x = self.images.batch(index, self._generator)[chosen]
        else:
            x = self.images.batch(index[chosen], self._generator)
        if not self.flip:
            return x
        self._generator.manual_seed(draws.torch_seed(self.seed, _FLIP, step))
        drawn = torch.rand(self.batch_size, generator=self._generator, device=self.images.device)
        return torch.where(drawn[chosen, None, None, None] < 0.5, x.flip(-1), x)

    def _index(self, step: int) -> Tensor:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._shuffle(epoch)
            self._epoch = epoch
        start = position * self.batch_size
        return self._order[start : start + self.batch_size]

    def _shuffle(self, epoch: int) -> Tensor:
        # The order stays on the device for the whole epoch, so that a step only slices it.
        order = torch.from_numpy(draws.permutation(len(self.images), self.seed, _ORDER, epoch))
        if self.images.index_device.type == "cuda":
            order = order.pin_memory()  # else the copy waits for the GPU
        return order.to(self.images.index_device, non_blocking=True)
