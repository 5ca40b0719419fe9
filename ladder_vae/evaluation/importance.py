"""The importance-weighted bound on the log-likelihood (Burda et al., 2016), image by image.

    log p(x) >= E[ log (1/K) sum_k w_k ],   log w_k = log p(x, z_k) - log q(z_k | x),  z_k ~ q

K = 1 is the ELBO; the bound increases with K towards log p(x). The bound at K uses the first K
samples, so a single pass with the largest K gives the bounds at all K.

Image-sample pairs go through the network in blocks: a group of images times a chunk of samples.
Each block seeds its own noise from (seed, group, chunk), so its result does not depend on which
process computes it, or when.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ladder_vae.evaluation.groups import NOISE, SUBSET, ImageGroups
from ladder_vae.evaluation.interfaces import Guide, Images, Model
from ladder_vae.evaluation.kl import sampled_terms
from ladder_vae.evaluation.pareto import pareto_k, smoothed_log_mean, tail_length
from ladder_vae.networks.precision import Execution
from runtime.distributed import Ranks
from runtime.random import permutation, torch_seed


@dataclass(frozen=True)
class Bounds:
    """Bounds and related metrics of N images: float64, on the CPU.

    In nats, except `effective_samples` and `pareto_k`.
    """

    elbo: Tensor  # (N,), the mean of log w over all samples
    importance_weighted: dict[int, Tensor]  # K -> (N,)
    log_likelihood: Tensor  # (N,), the mean of log p(x | z) over all samples
    kl: Tensor  # (N, L), the mean KL by layer, bottom to top
    effective_samples: Tensor  # (N,), (sum w)^2 / sum w^2, from 1 to max(K)
    pareto_k: Tensor  # (N,), of all samples' weights; nan for too few samples
    pareto_smoothed: Tensor  # (N,), an estimate, not a bound; nan for too few samples

    def table(self) -> Tensor:
        """All metrics as one table (N, columns); see `from_table`."""
        single = [self.elbo, self.log_likelihood, self.effective_samples, self.pareto_k]
        single.append(self.pareto_smoothed)
        columns = torch.stack([*single, *self.importance_weighted.values()], 1)
        return torch.cat([columns, self.kl], 1)

    @classmethod
    def from_table(cls, table: Tensor, samples: Sequence[int]) -> Self:
        """The bounds from a `table` that was made for the same `samples`."""
        elbo, log_likelihood, effective_samples, pareto, smoothed = table[:, :5].unbind(1)
        bounds = table[:, 5 : 5 + len(samples)].unbind(1)
        return cls(
            elbo=elbo,
            importance_weighted=dict(zip(samples, bounds, strict=True)),
            log_likelihood=log_likelihood,
            kl=table[:, 5 + len(samples) :],
            effective_samples=effective_samples,
            pareto_k=pareto,
            pareto_smoothed=smoothed,
        )


@dataclass(frozen=True)
class Blocks:
    """The size of a block: the images and samples of one pass through the network."""

    images: int  # in a group
    samples: int  # of each image, in a chunk

    @classmethod
    def of(cls, batch_size: int, samples: int) -> Self:
        """Blocks of at most `batch_size` pairs, with all samples of an image if that many fit."""
        chunk = min(samples, batch_size)
        return cls(batch_size // chunk, chunk)

    def chunks(self, samples: int) -> list[int]:
        """The sizes of the chunks for `samples` samples."""
        return [min(self.samples, samples - done) for done in range(0, samples, self.samples)]


class LogWeights:
    """Streaming sums over the log importance weights of n images.

    Log-sum-exp is accumulated in float64; only the largest weights are kept, for Pareto k-hat.
    """

    def __init__(self, n: int, samples: Sequence[int]) -> None:
        self.samples = samples
        self.bounds: dict[int, Tensor] = {}
        self._count = 0
        self._log_sum = torch.full((n,), -torch.inf, dtype=torch.float64)
        self._log_sum_of_squares = self._log_sum
        self._tail = tail_length(samples[-1])
        self._largest = torch.empty(n, 0, dtype=torch.float64)

    def add(self, log_w: Tensor) -> None:
        """Add the log-weights (n, k) of the next k samples, float64."""
        k = log_w.shape[1]
        sums = torch.logaddexp(self._log_sum[:, None], log_w.logcumsumexp(1))  # (n, k)
        for wanted in self.samples:
            if self._count < wanted <= self._count + k:
                self.bounds[wanted] = sums[:, wanted - self._count - 1] - math.log(wanted)
        self._log_sum = sums[:, -1]
        squares = (2 * log_w).logsumexp(1)
        self._log_sum_of_squares = torch.logaddexp(self._log_sum_of_squares, squares)
        if self._tail:
            seen = torch.cat([self._largest, log_w], 1)
            self._largest = seen.topk(min(self._tail + 1, seen.shape[1])).values
        self._count += k

    def effective_samples(self) -> Tensor:
        """(n,), (sum w)^2 / sum w^2."""
        return (2 * self._log_sum - self._log_sum_of_squares).exp()

    def pareto_k(self) -> Tensor:
        """(n,); nan if there are too few samples for a tail."""
        if not self._tail:
            return torch.full_like(self._log_sum, torch.nan)
        return pareto_k(self._largest)

    def pareto_smoothed(self) -> Tensor:
        """(N,), an estimate of the log mean; nan if there are too few samples for a tail."""
        if not self._tail:
            return torch.full_like(self._log_sum, torch.nan)
        return smoothed_log_mean(self._log_sum, self._largest, self._count)


class ImportanceSampler(ImageGroups):
    """Computes the bounds of the images at `index` (N,), for each K in `samples` (ascending).

    Put model and guide in evaluation mode and prepare them with `execution` first. The lowest
    `from_prior` layers are drawn from their priors (see `LadderGuide`).
    """

    def __init__(
        self,
        model: Model,
        guide: Guide,
        images: Images,
        index: Tensor,
        samples: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        from_prior: int = 0,
        execution: Execution = Execution(),  # noqa: B008 (immutable)
    ) -> None:
        self.execution = execution
        self.model = model
        self.guide = guide
        self.samples = list(samples)
        self.from_prior = from_prior
        self.blocks = Blocks.of(batch_size, self.samples[-1])
        super().__init__(images, index, self.blocks.images, seed)

    @property
    def columns(self) -> int:
        """The number of columns of a group's table."""
        return 5 + len(self.samples) + len(self.model.layers)

    @property
    def pairs(self) -> int:
        """The largest number of image-sample pairs in a pass through the network."""
        return self.blocks.images * self.blocks.samples

    def settings(self) -> dict[str, Any]:
        """What the bounds depend on besides weights and images."""
        return {
            "samples": self.samples,
            "blocks": [self.blocks.images, self.blocks.samples],
            "seed": self.seed,
            "from_prior": self.from_prior,
        }

    def bound(self, table: Tensor) -> Tensor:
        """The bound (n,) at the largest K, from a table (n, columns)."""
        return Bounds.from_table(table, self.samples).importance_weighted[self.samples[-1]]

    def describe_bound(self) -> str:
        """The largest K."""
        return f"K = {self.samples[-1]}"

    def group(self, number: int) -> Bounds:
        """The bounds of one group's images."""
        autocast = self.execution.autocast(self.images.device)
        with torch.no_grad(), autocast, torch.random.fork_rng(self.random_devices()):
            return self._bounds(number, self.read(number))

    def in_order(self, groups: Iterable[Tensor]) -> Bounds:
        """All bounds, in the order of `index`, from the tables of groups 0, 1, ..."""
        return Bounds.from_table(self.ordered(groups), self.samples)

    def _bounds(self, number: int, x: Tensor) -> Bounds:
        n, total = len(x), self.samples[-1]
        features = self.guide.bottom_up(x)
        weights = LogWeights(n, self.samples)
        log_likelihood = torch.zeros(n, dtype=torch.float64)
        kl = torch.zeros(n, len(features), dtype=torch.float64)
        for chunk, k in enumerate(self.blocks.chunks(total)):
            torch.manual_seed(torch_seed(self.seed, NOISE, number, chunk))
            # Samples of an image are adjacent: (n * k, ...).
            self.guide(
                x.repeat_interleave(k, 0),
                [d.repeat_interleave(k, 0) for d in features],
                from_prior=self.from_prior,
            )
            chunk_log_likelihood, chunk_kl = (
                term.unflatten(0, (n, k)).cpu().double() for term in sampled_terms(self.guide)
            )
            weights.add(chunk_log_likelihood - chunk_kl.sum(2))
            log_likelihood += chunk_log_likelihood.sum(1)
            kl += chunk_kl.sum(1)
        log_likelihood, kl = log_likelihood / total, kl / total
        return Bounds(
            elbo=log_likelihood - kl.sum(1),
            importance_weighted=weights.bounds,
            log_likelihood=log_likelihood,
            kl=kl,
            effective_samples=weights.effective_samples(),
            pareto_k=weights.pareto_k(),
            pareto_smoothed=weights.pareto_smoothed(),
        )


def importance_weighted_bounds(
    model: Model,
    guide: Guide,
    images: Images,
    index: Tensor,
    samples: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    on_images: Callable[[int], object] = lambda count: None,
) -> Bounds:
    """The bounds of the images at `index` (N,), for each K in `samples` (ascending).

    Put model and guide in evaluation mode first. The processes share the groups, and each returns
    all bounds. `on_images` is called with the number of images that this process has finished since
    the last call, the same number of times in every process.
    """
    sampler = ImportanceSampler(
        model, guide, images, index, samples, batch_size=batch_size, seed=seed
    )
    tables: dict[int, Tensor] = {}
    for first in range(0, len(sampler), ranks.size):
        number = first + ranks.rank
        if number < len(sampler):
            tables[number] = sampler.group(number).table()
        on_images(len(tables[number]) if number in tables else 0)
    for part in ranks.collect(tables):
        tables |= part
    return sampler.in_order(tables[number] for number in range(len(sampler)))


def random_index(n: int, count: int, seed: int) -> Tensor:
    """`count` random numbers below n, all different; if count >= n, all of them in ascending order.

    They are random because some test sets are sorted by class.
    """
    if count >= n:
        return torch.arange(n)
    return torch.from_numpy(permutation(n, seed, SUBSET)[:count])
