"""Annealed bounds on the log-likelihood, image by image; see `annealing.py`."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from ladder_vae.evaluation.annealing import Chains, LogWeight, Path, anneal
from ladder_vae.evaluation.groups import FORWARD, PILOT, REVERSE, ImageGroups
from ladder_vae.evaluation.interfaces import Guide, Images, Model
from ladder_vae.networks.precision import Execution
from runtime.random import torch_seed


@dataclass(frozen=True)
class Annealing:
    """What to anneal, and how finely; `ValueError` for invalid numbers."""

    temperatures: int  # the number T of steps from q(z | x) to p(x, z), at least 2
    chains: int = 4  # for each image, at least 1
    generated: int | None = None  # images to bound from both sides, at least 2

    def __post_init__(self) -> None:
        if self.temperatures < 2:
            raise ValueError(f"`temperatures` is {self.temperatures}; it must be at least 2")
        if self.chains < 1:
            raise ValueError(f"`chains` is {self.chains}; it must be at least 1")


@dataclass(frozen=True)
class Annealed:
    """The chains of N images, C for each: float64, on the CPU, log weights in nats."""

    log_weights: Tensor  # (N, C)
    reverse_log_weights: Tensor  # (N, C) of reverse chains, or (N, 0) without them
    acceptance: Tensor  # (N,), the mean over all transitions of forward chains
    seconds: Tensor  # (N,), an image's share of its group's time

    @property
    def bound(self) -> Tensor:
        """(N,), log mean W: a lower bound on log p(x) in expectation, which increases with C."""
        return _log_mean(self.log_weights)

    @property
    def upper_bound(self) -> Tensor:
        """(N,), -log mean 1 / W of the reverse chains: an upper bound in expectation."""
        return -_log_mean(-self.reverse_log_weights)

    def table(self) -> Tensor:
        """All values as one table (N, columns); see `from_table`."""
        single = torch.stack([self.acceptance, self.seconds], 1)
        return torch.cat([self.log_weights, self.reverse_log_weights, single], 1)

    @classmethod
    def from_table(cls, table: Tensor, chains: int) -> Self:
        """From a `table` that was made for the same number of `chains`."""
        return cls(table[:, :chains], table[:, chains:-2], table[:, -2], table[:, -1])


def _log_mean(log_weights: Tensor) -> Tensor:
    return log_weights.logsumexp(1) - math.log(log_weights.shape[1])


class AnnealedSampler(ImageGroups):
    """Computes the annealed bounds of the images at `index` (N,).

    Put model and guide in evaluation mode and prepare them with `execution` first. All chains of an
    image pass through the network together, with those of other images if `batch_size` allows.

    Args:
        latents: exact samples of p(z | x), by site name (len(images), Z, h, w); with them, as many
            reverse chains are run.
    """

    def __init__(
        self,
        guide: Guide,
        images: Images,
        index: Tensor,
        annealing: Annealing,
        *,
        batch_size: int,
        seed: int,
        latents: Mapping[str, Tensor] | None = None,
        execution: Execution = Execution(),  # noqa: B008 (immutable)
    ) -> None:
        self.temperatures, self.chains = annealing.temperatures, annealing.chains
        super().__init__(images, index, max(1, batch_size // self.chains), seed)
        self.guide = guide
        self.latents = latents
        self.execution = execution

    @property
    def columns(self) -> int:
        """The number of columns of a group's table."""
        return self.chains * (1 if self.latents is None else 2) + 2

    @property
    def pairs(self) -> int:
        """The largest number of chains in a pass through the network."""
        return self.chains * self._count

    def settings(self) -> dict[str, Any]:
        """What the bounds depend on besides weights and images."""
        return {
            "temperatures": self.temperatures,
            "chains": self.chains,
            "group": self._count,
            "seed": self.seed,
            "reverse": self.latents is not None,
        }

    def bound(self, table: Tensor) -> Tensor:
        """The lower bound (n,), from a table (n, columns)."""
        return Annealed.from_table(table, self.chains).bound

    def describe_bound(self) -> str:
        """The number of temperatures."""
        return f"{self.temperatures:,} temperatures"

    def in_order(self, tables: Iterable[Tensor]) -> Annealed:
        """All bounds, in the order of `index`, from the tables of groups 0, 1, ..."""
        return Annealed.from_table(self.ordered(tables), self.chains)

    def group(self, number: int) -> Annealed:
        """The bounds of one group's images."""
        began = time.monotonic()
        autocast = self.execution.autocast(self.images.device)
        with torch.no_grad(), autocast, torch.random.fork_rng(self.random_devices()):
            found = self._annealed(number, self.read(number))
        seconds = (time.monotonic() - began) / len(found.acceptance)
        return replace(found, seconds=torch.full_like(found.acceptance, seconds))

    def _annealed(self, number: int, x: Tensor) -> Annealed:
        features = [self._for_chains(d) for d in self.guide.bottom_up(x)]
        log_weight = LogWeight(self.guide, self._for_chains(x), features)

        def noise(purpose: int) -> Tensor:
            """The noise at the start of chains, whose later noise follows it."""
            torch.manual_seed(torch_seed(self.seed, purpose, number))
            return torch.randn(len(x) * self.chains, log_weight.dimensions, device=x.device)

        path = Path.tuned(log_weight, noise(PILOT), self.temperatures, self.chains)
        found, acceptance = anneal(Chains(log_weight, noise(FORWARD)), path)
        reverse = found.new_empty(len(x), 0)
        if self.latents is not None:
            index = self.positions(number)
            z = {name: self._for_chains(maps[index]) for name, maps in self.latents.items()}
            torch.manual_seed(torch_seed(self.seed, REVERSE, number))
            chains = Chains(log_weight, log_weight.noise(z))
            reverse = self._by_image(anneal(chains, path, reverse=True)[0])
        accepted = self._by_image(acceptance).mean(1).double()
        return Annealed(self._by_image(found), reverse.cpu(), accepted, torch.zeros_like(accepted))

    def _for_chains(self, maps: Tensor) -> Tensor:
        """(n, ...) to (n * C, ...), with the chains of an image adjacent."""
        return maps.repeat_interleave(self.chains, 0)

    def _by_image(self, values: Tensor) -> Tensor:
        """(n * C,) to (n, C), on the CPU."""
        return values.unflatten(0, (-1, self.chains)).cpu()


@dataclass(frozen=True)
class Annealer:
    """Computes annealed bounds of one ladder."""

    model: Model
    guide: Guide
    batch_size: int  # the number of chains in a pass through the network
    seed: int
    execution: Execution
    scored: Callable[[AnnealedSampler], Annealed]  # has the sampler's groups computed

    def bounds(
        self,
        images: Images,
        index: Tensor,
        annealing: Annealing,
        latents: Mapping[str, Tensor] | None = None,
    ) -> Annealed:
        """The bounds of the images at `index`; see `AnnealedSampler`."""
        return self.scored(
            AnnealedSampler(
                self.guide,
                images,
                index,
                annealing,
                batch_size=self.batch_size,
                seed=self.seed,
                latents=latents,
                execution=self.execution,
            )
        )
