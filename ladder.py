"""A trained ladder in Python: load it, sample, encode, compute bounds.

    ladder = Ladder.load("runs/mnist-12")
    images = ladder.sample(64, temperature=0.8)

Needs no data set, and no file once it is loaded. Layers are numbered from 1, the bottom, and lists
run from the bottom to the top. Samples are drawn with PyTorch's global random generator, which
`torch.manual_seed` seeds. docs/python.md shows more.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from torch import Tensor

from elbo import FreeBitsELBO
from guide import LadderGuide, build_ladder
from ladder_vae.evaluation.annealed import Annealed, AnnealedSampler, Annealing
from ladder_vae.evaluation.batch_size import automatic_batch_size
from ladder_vae.evaluation.groups import Found, Sampler
from ladder_vae.evaluation.importance import Bounds, ImportanceSampler
from ladder_vae.evaluation.inputs import GivenImages, as_images, as_levels
from ladder_vae.evaluation.sampling import (
    Latents,
    check_temperature,
    draws,
    encodings,
    interpolation,
    reconstructions,
)
from ladder_vae.networks import LadderConfig
from ladder_vae.networks.precision import Execution
from ladder_vae.runs.checkpoint import load_weights
from ladder_vae.runs.trained import Source, load_trained
from model import LadderModel
from runtime.device import choose_device
from runtime.errors import UserError

__all__ = ["Bounds", "Ladder", "Latents", "UserError"]


@dataclass(frozen=True, eq=False)
class Ladder:
    """A trained model and guide, in evaluation mode.

    Images x are NumPy arrays or tensors on any device: uint8 with levels from 0 to 255, or floats
    from 0 to 1, of the shape (N, C, H, W), (C, H, W), or for grey images (N, H, W) or (H, W). A
    ladder for binary images takes black and white pixels only and thresholds nothing. Results are
    tensors on the ladder's device. Methods raise `UserError`, with a message of one line, for
    arguments that do not fit.
    """

    model: LadderModel  # p(x, z)
    guide: LadderGuide  # q(z | x)
    source: Source
    device: torch.device
    execution: Execution

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        checkpoint: int | str = "last",
        device: torch.device | str = "auto",
        average: bool = True,
        execution: Execution = Execution(),  # noqa: B008 (immutable)
    ) -> Self:
        """Load trained weights.

        Args:
            path: a run folder, a published folder, or a published .safetensors file.
            checkpoint: a step, "best" or "last", of a run folder.
            device: a device, or the name of one; "auto" prefers a GPU.
            average: use the moving average of the weights, if there is one.
            execution: how the networks are run.

        Raises:
            UserError: there are no such weights or device, or a file is damaged.
        """
        source, weights = load_trained(Path(path).expanduser(), str(checkpoint), average=average)
        device = choose_device(device) if isinstance(device, str) else device
        described = source.description
        try:
            model, guide = build_ladder(described.ladder, described.image_shape)
        except ValueError as error:
            raise UserError(f"{source.path} describes no ladder: {error}") from error
        module: Any = FreeBitsELBO()(model, guide)
        load_weights(module, weights)
        if not all(tensor.isfinite().all() for tensor in module.state_dict().values()):
            raise UserError(
                f"the weights of step {source.step} are not all finite, because the training "
                "diverged: give an earlier step to --checkpoint"
            )
        execution.prepare(module.to(device).eval())
        return cls(model, guide, source, device, execution)

    @classmethod
    def from_pretrained(cls, name: str, *, revision: str | None = None, **options: Any) -> Self:
        """Download a published ladder from the Hugging Face hub, once, and load it.

        Args:
            name: OWNER/NAME on the hub.
            revision: a branch, tag or commit there; None for the newest.
            options: those of `load`.

        Raises:
            UserError: huggingface_hub is not installed, or the download fails.
        """
        try:
            from huggingface_hub import snapshot_download
        except ImportError:
            raise UserError(
                "downloads need the package huggingface_hub: run pip install huggingface_hub, or "
                "download the folder and give its path to Ladder.load"
            ) from None
        files = ["model.safetensors", "config.json"]
        try:
            folder = snapshot_download(name, revision=revision, allow_patterns=files)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"cannot download {name!r} from the Hugging Face hub: {reason}"
            ) from error
        return cls.load(folder, **options)

    @property
    def config(self) -> LadderConfig:
        """The architecture."""
        return self.source.description.ladder

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.source.description.image_shape

    @property
    def depth(self) -> int:
        """The number of stochastic layers."""
        return len(self.config.z_dims)

    @property
    def step(self) -> int:
        """The training step of the weights."""
        return self.source.step

    @cached_property
    def batch_size(self) -> int:
        """The number of images per pass that suits the network and the device."""
        x = torch.zeros(1, *self.image_shape, device=self.device)
        return automatic_batch_size(self.config, self.guide, x)

    @cached_property
    def annealing_batch_size(self) -> int:
        """The number of chains per pass with gradients that suits the network and the device."""
        x = torch.zeros(1, *self.image_shape, device=self.device)
        return automatic_batch_size(self.config, self.guide, x, gradients=True)

    def sample(
        self,
        n: int = 64,
        *,
        temperature: float | Sequence[float] = 1.0,
        above: int | None = None,
        given: Any = None,
        mean: bool = False,
    ) -> Tensor:
        """Images from the prior: (n, C, H, W) in [0, 1].

        Args:
            n: the number of images, at least 1.
            temperature: factor on the standard deviations of the prior, for all layers or for
                each from the bottom.
            above: keep the layers above this one, as encoded from `given`, and draw the layers
                from it down, so that 0 keeps all layers.
            given: one image, which all samples share, or n images.
            mean: return the means of p(x | z) instead of draws of x.
        """
        _check_count("n", n, 1)
        check_temperature(temperature, self.depth)
        kept = self._kept(n, above, given)
        found = [
            draws(
                self.model,
                min(self.batch_size, n - start),
                {name: z[start : start + self.batch_size] for name, z in kept.items()},
                temperature,
                mean=mean,
            )
            for start in range(0, n, self.batch_size)
        ]
        return torch.cat(found).clamp(0, 1)  # a Gaussian likelihood reaches beyond

    def _kept(self, n: int, above: int | None, given: Any) -> dict[str, Tensor]:
        """The latents of the layers above `above`, by site name, each (n, Z, h, w)."""
        if above is None and given is None:
            return {}
        if above is None or given is None:
            raise UserError("`above` and `given` need each other: a layer, and an image")
        if not 0 <= above < self.depth:
            raise UserError(f"`above` is {above}; it must be from 0 to {self.depth - 1}")
        images = self._images(given, "given")
        if len(images) not in (1, n):
            raise UserError(f"`given` holds {len(images)} images; it must hold one, or n = {n}")
        latents = self.encode(images)
        return {
            f"z_{i + 1}": latents[i].sample.expand(n, -1, -1, -1) for i in range(above, self.depth)
        }

    def encode(self, x: Any) -> list[Latents]:
        """Draw the latents of images from q(z | x).

        Returns, for each layer from the bottom, `sample`, `mean` and `std`, (N, Z, h, w) each.
        Mean and standard deviation are those given the samples of the layers above.
        """
        parts = [encodings(self.guide, part) for part in self._images(x).split(self.batch_size)]
        return [
            Latents(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*parts, strict=True)
        ]

    def reconstruct(self, x: Any) -> Tensor:
        """The means of p(x | z) for one draw of z from q(z | x): (N, C, H, W) in [0, 1]."""
        parts = self._images(x).split(self.batch_size)
        return torch.cat([reconstructions(self.guide, part) for part in parts]).clamp(0, 1)

    def interpolate(
        self, a: Any, b: Any, steps: int = 9, layers: Collection[int] | None = None
    ) -> Tensor:
        """Images between two images: (steps, C, H, W) in [0, 1], means of p(x | z).

        The latents of `layers`, by default of all, are interpolated linearly between the means of
        the two images' posteriors. The other layers are at the mode of their prior. With all
        layers, the first and the last image are reconstructions of `a` and `b`.
        """
        _check_count("steps", steps, 2)
        layers = range(1, self.depth + 1) if layers is None else layers
        if not layers or not set(layers) <= set(range(1, self.depth + 1)):
            shown = " ".join(map(str, layers)) or "empty"
            raise UserError(f"`layers` is {shown}; layers go from 1, the bottom, to {self.depth}")
        ends = torch.cat([self._images(a, "a"), self._images(b, "b")])
        if len(ends) != 2:
            raise UserError("`a` and `b` must be one image each")
        return interpolation(self.model, self.guide, ends, steps, layers).clamp(0, 1)

    @overload
    def log_likelihood(
        self,
        x: Any,
        samples: int | Sequence[int] = ...,
        *,
        method: Literal["importance"] = ...,
        seed: int = ...,
    ) -> Bounds: ...

    @overload
    def log_likelihood(
        self,
        x: Any,
        *,
        method: Literal["ais"],
        temperatures: int = ...,
        chains: int = ...,
        seed: int = ...,
    ) -> Annealed: ...

    def log_likelihood(
        self,
        x: Any,
        samples: int | Sequence[int] = 1000,
        *,
        method: str = "importance",
        temperatures: int = 100,
        chains: int = 4,
        seed: int = 0,
    ) -> Bounds | Annealed:
        """Bounds on log p(x), image by image, in nats, on the CPU in float64.

        Args:
            x: images.
            samples: the number K of importance samples, or several in ascending order.
            method: "importance", or "ais" for annealed importance sampling, which is slower and
                closer to log p(x).
            temperatures: the number of temperatures of "ais", at least 2.
            chains: the number of chains of "ais" for each image.
            seed: random seed of the noise; the same one gives the same digits.

        Returns for "importance" the ELBO (N,), the bound for each K, `importance_weighted[K]` (N,),
        the KL by layer (N, L), the effective sample sizes, Pareto k-hat and the Pareto-smoothed
        estimate (N,); for "ais" the `bound` (N,) and the chains' `log_weights` (N, chains).
        """
        if method not in ("importance", "ais"):
            raise UserError(f"`method` is {method!r}; it must be importance or ais")
        images = self._images(x)
        if self.config.likelihood.startswith("discr"):
            images = as_levels(images)
        given, index = GivenImages(images), torch.arange(len(images))
        options: dict[str, Any] = {"seed": seed, "execution": self.execution}
        if method == "ais":
            _check_count("temperatures", temperatures, 2)
            _check_count("chains", chains, 1)
            annealing = Annealing(temperatures, chains)
            options["batch_size"] = self.annealing_batch_size
            return _all(AnnealedSampler(self.guide, given, index, annealing, **options))
        numbers = _ascending(samples)
        options["batch_size"] = self.batch_size
        return _all(ImportanceSampler(self.model, self.guide, given, index, numbers, **options))

    def _images(self, x: Any, name: str = "x") -> Tensor:
        binary = self.config.likelihood == "bernoulli"
        return as_images(x, self.image_shape, self.device, binary=binary, name=name)


def _check_count(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise UserError(f"`{name}` is {value}; it must be a whole number, at least {least}")


def _ascending(samples: int | Sequence[int]) -> list[int]:
    """The numbers of samples; raises `UserError` unless they are valid and ascend."""
    numbers = [samples] if isinstance(samples, int) else list(samples)
    for number in numbers:
        _check_count("samples", number, 1)
    if not numbers or numbers != sorted(set(numbers)):
        raise UserError(f"`samples` is {samples}; it must be a number, or several that ascend")
    return numbers


def _all(sampler: Sampler[Found]) -> Found:
    """The results of all groups of images."""
    return sampler.in_order(sampler.group(number).table() for number in range(len(sampler)))
