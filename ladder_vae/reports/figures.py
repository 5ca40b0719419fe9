"""The pictures of an evaluation: what a ladder generates, and what each layer contributes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
from ladder_vae.reports.charts import draw_bound, draw_kl_by_layer, draw_pareto_k, draw_sandwich
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
from ladder_vae.reports.tables import layer_name
from runtime.random import torch_seed

_SAMPLES, _RECONSTRUCTIONS, _GRID, _STEPS, _KL_IMAGES = 64, 32, 8, 10, 1000
# About the total number of rows in layers.png: each layer of a shallow ladder has several rows.
_ROWS_OF_OVERVIEW = 16


# --- Titles and captions ---


class Picture(NamedTuple):
    """A picture in an evaluation's folder, and its text in a report."""

    file: str  # or a pattern for several files
    title: str
    caption: str
    folded: bool = False  # hidden until its title is clicked
    chart: bool = False  # a chart on white, not a grid of small images


def ladder_pictures(layers: int) -> list[Picture]:
    """The pictures of a ladder with `layers` layers, in the order of a report."""
    single_layers = [
        Picture(
            f"layer_{layer:02d}.png",
            layer_name(layer, layers).capitalize(),
            "The images of a row share the latents above this layer and differ in its sample.",
            folded=True,
        )
        for layer in range(layers, 0, -1)
    ]
    return [*_GRIDS[:3], *single_layers, *_GRIDS[3:], *_CHARTS]


_GRIDS = [
    Picture(
        "samples.png",
        "Samples",
        "Each image is the mean of p(x | z) for latents z drawn from the prior, layer by layer "
        "from the top. Good samples look like the data and are as diverse.",
    ),
    Picture(
        "reconstructions.png",
        "Reconstructions",
        "Rows of images, each with its reconstructions below: the means of p(x | z) for one draw "
        "of z from q(z | x).",
    ),
    Picture(
        "layers.png",
        "The role of each layer",
        "The images of a row share the latents above the named layer and differ in that layer's "
        "sample; the layers below are at the mode of their prior. If the images of a row vary a "
        "lot, the layer encodes the overall content; if they hardly vary, it encodes details, or "
        "nothing if its KL is near 0.",
    ),
    Picture(
        "interpolation.png",
        "Interpolation",
        "From one image to another. Each row interpolates the latents of the named layers. In the "
        "upper rows only the overall content changes; the last row starts and ends with the "
        "reconstructions.",
    ),
]
_CHARTS = [
    Picture(
        "kl.png",
        "KL by layer",
        "How much each layer encodes about an image: the KL between its posterior and prior in "
        "nats, averaged over the images and the importance samples. A layer with a KL near 0 is "
        "not used.",
        chart=True,
    ),
    Picture(
        "kl_maps.png",
        "KL by position",
        "The KL at each position of the layer's feature map, summed over channels. It is another "
        f"estimate, in closed form for one draw of the layers above and at most {_KL_IMAGES:,} "
        "images, so its total differs slightly from that of the KL by layer.",
        chart=True,
    ),
    Picture(
        "bound.png",
        "Bound by number of samples",
        "The negative bound in nats with its standard error. If the curve is flat at the end, more "
        "samples would change little; if it still falls, they would tighten the bound.",
        chart=True,
    ),
    Picture(
        "pareto_k.png",
        "Pareto k-hat of the importance weights",
        "One value for each image; above the dashed line, a few samples dominate the weights. The "
        "line depends on the number of samples: 0.5 for 100, and 0.7 for 2,200 or more.",
        chart=True,
    ),
    Picture(
        "sandwich.png",
        "Bounds from both sides",
        "The negative log-likelihood of generated images lies between the two curves in "
        "expectation. They approach each other as the number of temperatures grows.",
        chart=True,
    ),
    Picture(
        "inpainting.png",
        "Completions",
        "Images with a missing part, and the ladder's completions of it.",
    ),
    Picture(
        "roc-*.png",
        "Out-of-distribution images",
        "How well the scores separate other images from those of the data set: the further a "
        "curve is above the diagonal, the better.",
        chart=True,
    ),
]


# --- Drawing ---


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
    """Draw samples.png, reconstructions.png, layers.png, layer_01.png ..., interpolation.png and
    kl_maps.png into `folder`.

    `temperature` applies to the samples. The choice of images and all noise depend on `seed`. Put
    model and guide in evaluation mode first. Raises `UserError` if a file cannot be written.
    """
    # Each picture seeds its own noise, so it does not depend on the pictures drawn before it.
    torch.manual_seed(torch_seed(seed, 0))
    temperatures = temperature if isinstance(temperature, Sequence) else [temperature]
    title = "Samples from the prior"
    if any(t != 1 for t in temperatures):
        title += f", temperature {' '.join(f'{t:g}' for t in temperatures)}"
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
    """Draw kl.png, bound.png and, if there are such results, pareto_k.png and sandwich.png.

    `results` are the metrics of `bounds`. Removes earlier charts that are not drawn again.
    """
    draw_kl_by_layer(folder / "kl.png", results["kl_per_layer"])
    curve = results["curve"]
    errors = [error or 0.0 for error in curve["standard_error"]]
    draw_bound(folder / "bound.png", curve["samples"], curve["nats"], errors)
    if results["pareto_k"] is not None:
        threshold = results["pareto_k"]["threshold"]
        draw_pareto_k(folder / "pareto_k.png", bounds.pareto_k.numpy(), threshold=threshold)
    else:
        (folder / "pareto_k.png").unlink(missing_ok=True)
    if "sandwich" in results:
        draw_sandwich(folder / "sandwich.png", results["sandwich"]["rows"])
    else:
        (folder / "sandwich.png").unlink(missing_ok=True)


def draw_completions(path: Path, x: Tensor, missing: Tensor, found: Completions) -> None:
    """Draw a row for each image x (N, C, H, W): the image, its known part and its completions."""
    known = torch.where(missing, torch.full_like(x, 0.5), x)
    columns = [x.unsqueeze(1), known.unsqueeze(1), found.images, found.mean.unsqueeze(1)]
    images = torch.cat([column.cpu() for column in columns], 1)
    caption = (
        f"From the left: the image, its known part, {found.images.shape[1]} completions drawn from "
        "p(x_mis | x_obs), and their mean."
    )
    block = Block([], images.flatten(0, 1), images.shape[1])
    draw_page(path, "Completions", caption, [block])
