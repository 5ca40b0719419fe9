"""The importance-weighted bound on the log-likelihood (Burda et al., 2016), image by image.

    log p(x) >= E[ log (1/K) sum_k w_k ],   log w_k = log p(x, z_k) - log q(z_k | x),  z_k ~ q

K = 1 is the ELBO; the bound rises with K towards log p(x). One pass of max(K) samples gives it for
every smaller K: the bound at K uses the first K samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from datasets import ImageSet
from draws import permutation, torch_seed
from elbo import FreeBitsELBO
from guide import LadderGuide
from model import LadderModel

# What a draw is for, the second part of its key.
_NOISE, _SUBSET = 0, 1


def bits_per_dim(nats: float, image_shape: Sequence[int]) -> float:
    """A log-likelihood of an image in bits per dimension: pixels times channels."""
    return nats / (math.prod(image_shape) * math.log(2))


@dataclass(frozen=True)
class Bounds:
    """Figures of N images, float64, in nats, on the CPU."""

    elbo: Tensor  # (N,), the mean of log w over all samples
    importance_weighted: dict[int, Tensor]  # K -> (N,)
    log_likelihood: Tensor  # (N,), the mean of log p(x | z) over all samples
    kl: Tensor  # (N, L), the mean KL by layer, bottom to top


def importance_weighted_bounds(
    model: LadderModel,
    guide: LadderGuide,
    images: ImageSet,
    index: Tensor,
    samples: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    on_images: Callable[[int], object] = lambda count: None,
) -> Bounds:
    """The bounds of the images at `index` (N,), for each K in `samples` (rising).

    The bottom-up pass runs once per image. Image-sample pairs go through the network `batch_size`
    at a time, in blocks of a group of images and a chunk of samples; each block seeds its own noise
    from (seed, group, chunk). Put model and guide in evaluation mode first. `on_images` is told
    how many images have been finished since it was last called.
    """
    chunk = min(samples[-1], batch_size)
    group = max(1, batch_size // chunk)
    parts = []
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        for number, start in enumerate(range(0, len(index), group)):
            x = images.batch(index[start : start + group].to(images.index_device))
            parts.append(_group_bounds(model, guide, x, samples, chunk, (seed, _NOISE, number)))
            on_images(len(x))
    return _concatenate(parts)


def _group_bounds(
    model: LadderModel,
    guide: LadderGuide,
    x: Tensor,
    samples: Sequence[int],
    chunk: int,
    key: tuple[int, int, int],
) -> Bounds:
    total = samples[-1]
    elbo = FreeBitsELBO()  # the one-sample KL, whose ELBO is the log importance weight
    features = guide.bottom_up(x)
    n = len(x)
    log_sum = torch.full((n,), -torch.inf, dtype=torch.float64)  # log sum_k w_k so far
    log_likelihood = torch.zeros(n, dtype=torch.float64)
    kl = torch.zeros(n, len(features), dtype=torch.float64)
    bounds = {}
    for number, done in enumerate(range(0, total, chunk)):
        k = min(chunk, total - done)
        torch.manual_seed(torch_seed(*key, number))
        # Samples of an image lie side by side: (n * k, ...).
        terms = elbo.compute_terms(
            model,
            guide,
            x.repeat_interleave(k, 0),
            features=[d.repeat_interleave(k, 0) for d in features],
        )
        log_w = terms.elbo.view(n, k).cpu().double()
        sums = torch.logaddexp(log_sum[:, None], log_w.logcumsumexp(1))  # (n, k)
        for wanted in samples:
            if done < wanted <= done + k:
                bounds[wanted] = sums[:, wanted - done - 1] - math.log(wanted)
        log_sum = sums[:, -1]
        log_likelihood += terms.log_likelihood.view(n, k).cpu().double().sum(1)
        kl += terms.kl.view(n, k, -1).cpu().double().sum(1)
    log_likelihood, kl = log_likelihood / total, kl / total
    return Bounds(log_likelihood - kl.sum(1), bounds, log_likelihood, kl)


def _concatenate(parts: Sequence[Bounds]) -> Bounds:
    return Bounds(
        elbo=torch.cat([part.elbo for part in parts]),
        importance_weighted={
            k: torch.cat([part.importance_weighted[k] for part in parts])
            for k in parts[0].importance_weighted
        },
        log_likelihood=torch.cat([part.log_likelihood for part in parts]),
        kl=torch.cat([part.kl for part in parts]),
    )


def random_index(n: int, count: int, seed: int) -> Tensor:
    """`count` of the numbers below n in random order; all of them, in order, where count is n.

    Test sets are sorted by class now and then, so that their first images are no sample of them.
    """
    if count >= n:
        return torch.arange(n)
    return torch.from_numpy(permutation(n, seed, _SUBSET)[:count])


def channel_kl(
    guide: LadderGuide, images: ImageSet, index: Tensor, batch_size: int
) -> list[Tensor]:
    """KL by latent channel, (z_dims[i],) for each layer from the bottom, in nats per image.

    In closed form given z_{>i}, summed over positions, and averaged over the images at `index`.
    """
    totals: list[Tensor] = []
    with torch.no_grad():
        for part in index.split(batch_size):
            guide(images.batch(part.to(images.index_device)))
            model_trace, guide_trace = guide.get_traces()
            maps = [
                kl_divergence(
                    guide_trace.nodes[name]["fn"].base_dist, model_trace.nodes[name]["fn"].base_dist
                )
                for name in reversed(guide_trace.stochastic_nodes)
            ]
            sums = [kl.sum((0, 2, 3)) for kl in maps]
            totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return [(total / len(index)).cpu() for total in totals]
