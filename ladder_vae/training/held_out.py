"""Evaluation of held-out images during training. Each evaluation draws the same noise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from datasets import ImageSet
from ladder_vae.evaluation.importance import Bounds, importance_weighted_bounds, random_index
from ladder_vae.evaluation.kl import ACTIVE_KL, by_channel, mean_kl
from ladder_vae.evaluation.sampling import prior_samples, reconstructions
from ladder_vae.reports.image_grids import reconstruction_grid, sample_grid
from ladder_vae.runs.options import RunConfig
from runtime.distributed import ONE_PROCESS, Ranks


class HeldOutEvaluation:
    """Bounds, active channels and pictures of the held-out images.

    Call its methods with the ELBO module in evaluation mode; see `evaluation_mode`.
    """

    def __init__(self, config: RunConfig, images: ImageSet, ranks: Ranks = ONE_PROCESS) -> None:
        self._config = config
        self._images = images
        self._ranks = ranks

    def elbo(self, module: Any, on_images: Callable[[int], None]) -> Bounds:
        """The ELBO of all held-out images; the processes share the work."""
        return self._bounds(module, len(self._images), 1, on_images)

    def bound(self, module: Any, on_images: Callable[[int], None]) -> Bounds:
        """The importance-weighted bound of all held-out images, or of `ll_images` random ones."""
        count = self._config.ll_images or len(self._images)
        return self._bounds(module, count, self._config.ll_samples, on_images)

    def _bounds(
        self, module: Any, count: int, samples: int, on_images: Callable[[int], None]
    ) -> Bounds:
        return importance_weighted_bounds(
            module.model,
            module.guide,
            self._images,
            random_index(len(self._images), count, self._config.seed),
            [samples],
            batch_size=self._config.test_batch_size,
            seed=self._config.seed,
            ranks=self._ranks,
            on_images=on_images,
        )

    def active_channels(self, module: Any) -> list[float]:
        """The number of active latent channels of each layer, from up to a thousand images."""
        some = random_index(len(self._images), 1000, self._config.seed)
        with self._seeded():
            kl = mean_kl(module.guide, self._images, some, self._config.test_batch_size)
        return [float((channel > ACTIVE_KL).sum()) for channel in by_channel(kl)]

    def pictures(self, module: Any) -> dict[str, Tensor]:
        """Samples, and reconstructions of held-out images, as pictures (3, H, W) by name."""
        images = self._images
        index = random_index(len(images), 32, self._config.seed)
        x = images.batch(index.to(images.index_device))
        with self._seeded():
            samples = prior_samples(module.model, 64)
            reconstructed = reconstructions(module.guide, x)
        return {
            "samples": sample_grid(samples, 8),
            "reconstructions": reconstruction_grid(x, reconstructed, 8),
        }

    @contextmanager
    def _seeded(self) -> Iterator[None]:
        """A context with the run's random seed, which leaves training's random state unchanged."""
        device = self._images.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._config.seed)
            yield


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and back into the mode it had."""
    mode = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(mode)
