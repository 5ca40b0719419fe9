"""Lower and upper bounds on log p(x) of images that the ladder itself generates.

Grosse, Ghahramani and Adams (2015), "Sandwiching the marginal likelihood using bidirectional Monte
Carlo". For an image that was generated together with latents z, z is an exact sample of p(z | x),
from which reverse chains can start (see `annealing.py`). The gap between the bounds limits the
error of both, for images of the model, not for data.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ladder_vae.evaluation.annealed import Annealed, Annealer, Annealing
from ladder_vae.evaluation.groups import GENERATED
from ladder_vae.evaluation.inputs import GivenImages
from ladder_vae.evaluation.interfaces import Model
from ladder_vae.evaluation.metrics import standard_error
from runtime.random import torch_seed


def sandwiched(annealer: Annealer, annealing: Annealing) -> dict[str, Any]:
    """The entry of metrics.json about generated images, with up to all of the temperatures."""
    n = annealing.generated or 0
    images, latents = generated(
        annealer.model, n, batch_size=annealer.batch_size, seed=annealer.seed
    )
    found = [
        (
            temperatures,
            annealer.bounds(
                images, torch.arange(n), replace(annealing, temperatures=temperatures), latents
            ),
        )
        for temperatures in sandwich_temperatures(annealing.temperatures)
    ]
    return sandwich_metrics(found)


def generated(
    model: Model, n: int, *, batch_size: int, seed: int
) -> tuple[GivenImages, dict[str, Tensor]]:
    """n images drawn from p(x, z), and their latents by site name (n, Z, h, w)."""
    names = ["x", *(f"z_{i + 1}" for i in range(len(model.layers)))]
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(torch_seed(seed, GENERATED))
        for start in range(0, n, batch_size):
            nodes = poutine.trace(model).get_trace(n=min(batch_size, n - start)).nodes
            for name in names:
                parts[name].append(nodes[name]["value"])
    drawn = {name: torch.cat(maps) for name, maps in parts.items()}
    return GivenImages(drawn.pop("x")), drawn


def sandwich_temperatures(temperatures: int) -> list[int]:
    """An eighth, a quarter, half and all of the `temperatures`, as far as there are two."""
    return sorted({max(2, temperatures // share) for share in (8, 4, 2, 1)})


def sandwich_metrics(found: Sequence[tuple[int, Annealed]]) -> dict[str, Any]:
    """The entry of metrics.json, from the bounds for each number of temperatures.

    Bounds are negated, as everywhere in metrics.json: `negative_lower_bound` is the larger one.
    """
    return {
        "images": len(found[0][1].acceptance),
        "chains": found[0][1].log_weights.shape[1],
        "rows": [_row(temperatures, annealed) for temperatures, annealed in found],
    }


def _row(temperatures: int, annealed: Annealed) -> dict[str, Any]:
    gap = annealed.upper_bound - annealed.bound
    return {
        "temperatures": temperatures,
        "negative_lower_bound": -annealed.bound.mean().item(),
        "negative_upper_bound": -annealed.upper_bound.mean().item(),
        "gap": gap.mean().item(),
        "standard_error": standard_error(gap),
        "seconds_per_image": annealed.seconds.mean().item(),
    }
