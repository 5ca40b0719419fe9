"""Completes images with missing pixels by draws from p(x_mis | x_obs).

The method is Metropolis-within-Gibbs as in Mattei and Frellsen (2018), "Leveraging the exact
likelihood of deep latent variable models", section 3. A chain's state is the missing pixels and the
latents. In each sweep, the guide proposes latents z' given the current image, which are accepted
with probability

    min(1, w(z'; x) / w(z; x)),  w(z; x) = p(x, z) / q(z | x),  x = (x_obs, x_mis),

and new missing pixels are drawn from p(x_mis | z). The chain's stationary distribution is
p(x_mis, z | x_obs) for any guide. The warm-up accepts all proposals, which is the pseudo-Gibbs
sampler of Rezende, Mohamed and Wierstra (2014), "Stochastic backpropagation and approximate
inference in deep generative models": its samples are biased by the guide's error, but it moves away
from a poor start quickly.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from datasets.folder import read_picture
from ladder_vae.evaluation.interfaces import Guide, Model
from runtime.errors import UserError
from runtime.files import write_atomically
from runtime.random import torch_seed

# The named masks: functions from height and width to the missing rows and columns.
_AREAS: dict[str, Callable[[int, int], tuple[slice, slice]]] = {
    "left": lambda height, width: (slice(None), slice(width // 2)),
    "right": lambda height, width: (slice(None), slice(width // 2, None)),
    "top": lambda height, width: (slice(height // 2), slice(None)),
    "bottom": lambda height, width: (slice(height // 2, None), slice(None)),
    "centre": lambda height, width: (
        slice(height // 4, height - height // 4),
        slice(width // 4, width - width // 4),
    ),
}
MASKS = tuple(_AREAS)


def read_mask(text: str, image_size: tuple[int, int]) -> Tensor:
    """The pixels to complete: bool (H, W), true if a pixel is missing.

    `text` is one of `MASKS`, or an image file of `image_size` (height, width) whose white pixels
    (at least 128) are missing. A named mask is half of the image, or for `centre` the middle half
    in both directions. If the size is odd, left and top are the smaller halves.

    Raises:
        UserError: there is no such mask, it has another size, or it masks no pixel or all of them.
    """
    mask = torch.zeros(image_size, dtype=torch.bool)
    if text in _AREAS:
        mask[_AREAS[text](*image_size)] = True
    else:
        mask = torch.from_numpy(_mask_from_file(Path(os.path.expanduser(text)), image_size))
    if not mask.any():
        raise UserError(f"the mask {text} masks no pixel: paint the missing ones white")
    if mask.all():
        raise UserError(
            f"the mask {text} masks every pixel: paint the known ones black (for samples without "
            "known pixels, use evaluate.py)"
        )
    return mask


def _mask_from_file(path: Path, image_size: tuple[int, int]) -> np.ndarray:
    if not os.path.isfile(path):  # unlike Path.is_file, never raises
        raise UserError(f"there is no mask {path}: give {', '.join(MASKS)}, or an image file")
    levels = read_picture(path)  # (H, W, 1) or (H, W, 3)
    height, width = image_size
    if levels.shape[:2] != image_size:
        raise UserError(
            f"the mask {path} is {levels.shape[1]} wide and {levels.shape[0]} high; it must be "
            f"{width} wide and {height} high like the images"
        )
    # A threshold, because lossy formats do not store pure black and white.
    return levels.mean(-1) >= 128


@dataclass(frozen=True)
class Completions:
    """The completions of N images, on the device of the images."""

    images: Tensor  # (N, chains, C, H, W), the last state of each chain
    mean: Tensor  # (N, C, H, W), of p(x_mis | z) over chains and sweeps
    acceptance: Tensor  # (N,), the share of proposals accepted after the warm-up


def write_completions(path: Path, index: Tensor, missing: Tensor, completions: Completions) -> None:
    """Write completions as an .npz file; images are uint8, from 0 to 255.

    Its arrays are `image` (N,), the index of each image in the split, `missing` (H, W) bool,
    `completions` (N, chains, C, H, W), `mean` (N, C, H, W) and `acceptance` (N,).
    """
    arrays: dict[str, Any] = {
        "image": index.numpy(),
        "missing": missing.cpu().numpy(),
        "completions": _levels(completions.images),
        "mean": _levels(completions.mean),
        "acceptance": completions.acceptance.cpu().numpy(),
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def _levels(images: Tensor) -> np.ndarray:
    return (images * 255).round().byte().cpu().numpy()


def inpaint(
    model: Model,
    guide: Guide,
    x: Tensor,
    missing: Tensor,
    *,
    chains: int,
    sweeps: int,
    warmup: int,
    batch_size: int,
    seed: int,
    on_sweep: Callable[[int], object] = lambda count: None,
) -> Completions:
    """Complete images x (N, C, H, W) in [0, 1] where `missing` (H, W) bool is true.

    The missing pixels of x are never read; the known ones are returned unchanged. Each image is
    completed by `chains` independent chains. They start with pixels drawn from the model and take
    `sweeps` sweeps, of which the first `warmup` (at least one) accept all proposals. The mean is
    that of p(x_mis | z) over the latents at the start of each counted sweep. Counted are the sweeps
    of the second half, or those after the warm-up if the warm-up is longer than the first half.
    `batch_size` image-chain pairs go through the network at a time. Put model and guide in
    evaluation mode first.

    With a Gaussian likelihood, values may leave [0, 1] within a chain; the result is clamped.

    The noise depends only on `seed` and `batch_size`, and the global random state is not changed.
    `on_sweep` is called after each sweep of a batch with the number of its pairs; these numbers add
    up to N * chains * sweeps.

    Raises:
        ValueError: there is no chain, no warm-up, or no sweep after it.
    """
    if chains < 1 or not 1 <= warmup < sweeps:
        raise ValueError(
            f"{chains} chains of {sweeps} sweeps, {warmup} of them warm-up: there must be a chain, "
            "a warm-up sweep and a sweep after it"
        )
    missing = missing.to(x.device)
    devices = [x.device] if x.device.type == "cuda" else []
    parts = []
    with torch.no_grad(), torch.random.fork_rng(devices):
        # Chains of an image are adjacent: (N * chains, C, H, W).
        for number, pairs in enumerate(x.repeat_interleave(chains, 0).split(batch_size)):
            torch.manual_seed(torch_seed(seed, number))
            parts.append(_run_chains(model, guide, pairs, missing, sweeps, warmup, on_sweep))
    images, mean, acceptance = (
        torch.cat(values).unflatten(0, (len(x), chains)) for values in zip(*parts, strict=True)
    )

    def with_known(completed: Tensor, known: Tensor) -> Tensor:
        return torch.where(missing, completed.clamp(0, 1), known)

    return Completions(
        with_known(images, x.unsqueeze(1)), with_known(mean.mean(1), x), acceptance.mean(1)
    )


def _run_chains(
    model: Model,
    guide: Guide,
    x: Tensor,
    missing: Tensor,
    sweeps: int,
    warmup: int,
    on_sweep: Callable[[int], object],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a chain for each image x (B, C, H, W): last image, mean, and acceptance (B,)."""
    x = torch.where(missing, model(n=len(x)), x)
    z: dict[str, Tensor] = {}
    total, accepted = torch.zeros_like(x), x.new_zeros(len(x))
    first_counted = max(warmup, sweeps // 2)
    for sweep in range(sweeps):
        features = guide.bottom_up(x)
        proposed = _draw(guide, x, features)
        if sweep < warmup:
            z, drawn = proposed.z, proposed.likelihood.sample()
        else:
            present = _draw(guide, x, features, z)
            log_ratio = proposed.log_weight - present.log_weight
            accept = torch.rand_like(log_ratio).log() < log_ratio  # (B,)
            z = {name: _choose(accept, new, z[name]) for name, new in proposed.z.items()}
            drawn = _choose(accept, proposed.likelihood.sample(), present.likelihood.sample())
            accepted += accept
            if sweep >= first_counted:
                total += present.likelihood.mean
        x = torch.where(missing, drawn, x)
        on_sweep(len(x))
    return x, total / (sweeps - first_counted), accepted / (sweeps - warmup)


class _Draw(NamedTuple):
    """Latents of B images, their log-weights, and the likelihood given them."""

    z: dict[str, Tensor]  # z_i (B, z_dims[i], h_i, w_i)
    log_weight: Tensor  # (B,), log p(x, z) - log q(z | x)
    likelihood: dist.TorchDistribution  # p(x | z)


def _draw(
    guide: Guide, x: Tensor, features: list[Tensor], given: dict[str, Tensor] | None = None
) -> _Draw:
    """One pass of the guide with latents drawn from q(z | x), or `given`."""
    program = guide if given is None else poutine.condition(guide, data=given)
    program(x, features)
    # Given latents become observed sites, which `get_traces` does not treat as latents. So read the
    # guide's own trace: there a latent's `fn` is always the posterior, and `infer` holds its prior.
    sites = {name: site for name, site in guide.trace.nodes.items() if site["type"] == "sample"}
    likelihood = sites["x"]["fn"]
    log_weight = likelihood.log_prob(x)
    z = {}
    for name, site in sites.items():
        if "prior" in site["infer"]:
            z[name] = site["value"]
            log_weight = log_weight + site["infer"]["prior"].log_prob(site["value"])
            log_weight = log_weight - site["fn"].log_prob(site["value"])
    return _Draw(z, log_weight, likelihood)


def _choose(accept: Tensor, proposed: Tensor, present: Tensor) -> Tensor:
    """`proposed` for the images that accept it, `accept` (B,), and `present` for the others."""
    return torch.where(accept.view(-1, *[1] * (present.ndim - 1)), proposed, present)
