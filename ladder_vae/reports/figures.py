"""The pictures of an evaluation: samples, reconstructions, and what each layer knows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import ImageSet
from ladder_vae.evaluation.importance import Bounds, random_index
from ladder_vae.evaluation.inpainting import Completions
from ladder_vae.evaluation.interfaces import Guide, Model
from ladder_vae.evaluation.kl import by_position, mean_kl
from ladder_vae.evaluation.sampling import (
    interpolations,
    layer_samples,
    prior_samples,
    reconstructions,
)
from ladder_vae.networks import LadderConfig
from ladder_vae.reports.charts import draw_bound, draw_kl_by_layer, draw_pareto_k
from ladder_vae.reports.image_grids import (
    Block,
    draw_interpolations,
    draw_kl_maps,
    draw_layer,
    draw_layers,
    draw_page,
    draw_reconstructions,
    draw_samples,
)
from runtime.random import torch_seed

_SAMPLES, _RECONSTRUCTIONS, _GRID, _STEPS, _KL_IMAGES = 64, 32, 8, 10, 1000
# The overview of a deep ladder has one row a layer, that of a shallow one several.
_ROWS_OF_OVERVIEW = 16


def draw_album(
    folder: Path,
    model: Model,
    guide: Guide,
    config: LadderConfig,
    images: ImageSet,
    *,
    temperature: float | Sequence[float],
    batch_size: int,
    seed: int,
) -> None:
    """Write samples.png, reconstructions.png, layers.png, layer_01.png ..., interpolation.png and
    kl_maps.png into `folder`.

    `temperature` is that of the samples; the images shown and all draws depend on `seed`. Put model
    and guide in evaluation mode first. Raises `UserError` where a file cannot be written.
    """
    # Each picture has noise of its own, so that it stays the same whatever the others show.
    torch.manual_seed(torch_seed(seed, 0))
    warmth = temperature if isinstance(temperature, Sequence) else [temperature]
    title = "Samples from the prior"
    if any(t != 1 for t in warmth):
        title += f", temperature {' '.join(f'{t:g}' for t in warmth)}"
    samples = prior_samples(model, _SAMPLES, temperature)
    draw_samples(folder / "samples.png", samples, title=title)

    torch.manual_seed(torch_seed(seed, 1))
    x = images.batch(_some(images, _RECONSTRUCTIONS, seed).to(images.index_device))
    draw_reconstructions(folder / "reconstructions.png", x, reconstructions(guide, x))

    torch.manual_seed(torch_seed(seed, 2))
    _draw_layers(folder, model, config, images)
    ends = x[:2]
    if len(ends) == 2:
        between = interpolations(model, guide, ends, _STEPS)
        draw_interpolations(folder / "interpolation.png", between, ends)
    torch.manual_seed(torch_seed(seed, 3))
    some = _some(images, _KL_IMAGES, seed)
    draw_kl_maps(folder / "kl_maps.png", by_position(mean_kl(guide, images, some, batch_size)))


def _some(images: ImageSet, count: int, seed: int) -> Tensor:
    return random_index(len(images), count, seed)[:count]


def _draw_layers(folder: Path, model: Model, config: LadderConfig, images: ImageSet) -> None:
    _, height, width = images.shape
    sizes = config.latent_sizes((height, width))
    depth = len(sizes)
    by_layer = [layer_samples(model, layer, _GRID, _GRID) for layer in range(1, depth + 1)]
    for layer, drawn in enumerate(by_layer, start=1):
        draw_layer(folder / f"layer_{layer:02d}.png", drawn, layer, sizes)
    rows = max(1, min(4, _ROWS_OF_OVERVIEW // depth))
    draw_layers(folder / "layers.png", [drawn[:rows] for drawn in by_layer], sizes)


def draw_charts(folder: Path, bounds: Bounds, results: dict[str, Any]) -> None:
    """Write kl.png, bound.png and, where the samples are enough for it, pareto_k.png.

    `results` are those of `metrics.metrics`, made of `bounds`. A pareto_k.png of earlier ones goes
    where there is none of these.
    """
    draw_kl_by_layer(folder / "kl.png", results["kl_per_layer"])
    curve = results["curve"]
    errors = [error or 0.0 for error in curve["standard_error"]]
    draw_bound(folder / "bound.png", curve["samples"], curve["nats"], errors)
    if results["pareto_k"] is not None:
        draw_pareto_k(folder / "pareto_k.png", bounds.pareto_k.numpy())
    else:
        (folder / "pareto_k.png").unlink(missing_ok=True)


def draw_completions(path: Path, x: Tensor, missing: Tensor, found: Completions) -> None:
    """Write one row for each image x (N, C, H, W): it, what is known of it, its completions."""
    known = torch.where(missing, torch.full_like(x, 0.5), x)
    columns = [x.unsqueeze(1), known.unsqueeze(1), found.images, found.mean.unsqueeze(1)]
    images = torch.cat([column.cpu() for column in columns], 1)
    caption = (
        f"From the left: the image, what is known of it, {found.images.shape[1]} completions "
        "drawn from p(x_mis | x_obs), and their mean."
    )
    block = Block([], images.flatten(0, 1), images.shape[1])
    draw_page(path, "Completions", caption, [block])
