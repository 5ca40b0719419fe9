"""Grids of samples and reconstructions."""

from pathlib import Path

import torch
from pyro import poutine
from torch import Tensor

from atomic import write_atomically
from guide import LadderGuide
from model import LadderModel

# Small images are enlarged, pixel by pixel, until a grid's rows are about this high.
_LEGIBLE = 56


@torch.no_grad()
def prior_samples(model: LadderModel, n: int) -> Tensor:
    """The means of p(x | z) for n draws of z from the prior, (n, C, H, W) in [0, 1]."""
    trace = poutine.trace(model).get_trace(n=n)
    return trace.nodes["x"]["fn"].mean


@torch.no_grad()
def reconstructions(guide: LadderGuide, x: Tensor) -> Tensor:
    """The means of p(x | z) for one draw of z from q(z | x) for each image x (N, C, H, W)."""
    guide(x)
    model_trace, _ = guide.get_traces()
    return model_trace.nodes["x"]["fn"].mean


def sample_grid(images: Tensor, columns: int) -> Tensor:
    """One picture (3, H', W') of images (N, C, H, W) in [0, 1], row by row."""
    from torchvision.utils import make_grid  # takes seconds to import

    scale = max(1, round(_LEGIBLE / images.shape[-2]))
    enlarged = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    return make_grid(enlarged.clamp(0, 1).cpu(), nrow=columns, padding=2, pad_value=0.4)


def reconstruction_grid(x: Tensor, reconstructed: Tensor, columns: int) -> Tensor:
    """Rows of images in turn with rows of their reconstructions below them."""
    columns = min(columns, len(x))
    rows = []
    for row in zip(x.split(columns), reconstructed.split(columns), strict=True):
        rows += [_fill(images, columns) for images in row]
    return sample_grid(torch.cat(rows), columns)


def _fill(images: Tensor, columns: int) -> Tensor:
    """A last row made whole with empty images, so that what comes next starts a row."""
    return torch.cat([images, images.new_zeros(columns - len(images), *images.shape[1:])])


def write_png(path: Path, picture: Tensor) -> None:
    """Write a picture (3, H, W) in [0, 1]; raises `UserError` where it cannot be written."""
    from torchvision.transforms.functional import to_pil_image

    image = to_pil_image(picture)
    write_atomically(path, lambda file: image.save(file, format="png"))
