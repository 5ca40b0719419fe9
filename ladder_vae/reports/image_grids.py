"""Grids of images, and KL maps, as PNG files.

`sample_grid` and `reconstruction_grid` return plain grids. The functions named draw_... write
pages: a title, a caption, and grids with labels on their left. Images are (N, C, H, W), grey or
RGB, and are clipped to [0, 1]. The same images give the same file, byte for byte. Functions that
write a file raise `UserError` if that fails.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ladder_vae.reports.tables import layer_name
from runtime.files import write_atomically

# Small images are enlarged by a whole number to about this height, in pixels.
_LEGIBLE = 56
# The lines between images: grey shows the edges of both black and white images.
_GAP, _GAP_GREY = 2, 0.4
# Sizes on a page, in pixels.
_MARGIN, _SPACING, _LEAST_WIDTH = 16, 8, 440
_TITLE_SIZE, _TEXT_SIZE = 18, 13
_INK, _FAINT = (25, 25, 25), (95, 95, 95)
# The largest side of a KL map, and the widths of its colour bar and of the bar's labels.
_MAP_SIDE, _BAR_WIDTH, _BAR_LABEL = 112, 10, 56
_MAPS_PER_ROW = 4


# --- Grids ---


def sample_grid(images: Tensor, columns: int) -> Tensor:
    """One picture (3, H', W') of images (N, C, H, W) in [0, 1], row by row."""
    scale = max(1, round(_LEGIBLE / images.shape[-2]))
    enlarged = _enlarged(images.clamp(0, 1).cpu(), scale)
    n, _, height, width = enlarged.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    down, right = height + _GAP, width + _GAP
    grid = torch.full((3, rows * down + _GAP, columns * right + _GAP), _GAP_GREY)
    for i, image in enumerate(enlarged):
        row, column = divmod(i, columns)
        top, left = row * down + _GAP, column * right + _GAP
        grid[:, top : top + height, left : left + width] = image
    return grid


def _enlarged(images: Tensor, scale: int) -> Tensor:
    """Images (..., H, W) with each pixel a square of `scale` by `scale`."""
    return images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


def reconstruction_grid(x: Tensor, reconstructed: Tensor, columns: int) -> Tensor:
    """Rows of images, each followed by the row of their reconstructions."""
    columns = min(columns, len(x))
    rows = []
    for row in zip(x.split(columns), reconstructed.split(columns), strict=True):
        rows += [_fill(images, columns) for images in row]
    return sample_grid(torch.cat(rows), columns)


def _fill(images: Tensor, columns: int) -> Tensor:
    """A row of images, filled up to `columns` with black ones."""
    return torch.cat([images, images.new_zeros(columns - len(images), *images.shape[1:])])


def write_png(path: Path, picture: Tensor) -> None:
    """Write a picture (3, H, W) in [0, 1]."""
    _write_image(path, _to_image(picture))


def _to_image(picture: Tensor) -> Image.Image:
    levels = (picture * 255).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).numpy())


def _write_image(path: Path, image: Image.Image) -> None:
    write_atomically(path, lambda file: image.save(file, format="png"))


# --- Pages ---


class Block(NamedTuple):
    """A grid on a page; its labels are on its left, spaced evenly."""

    labels: Sequence[str]
    images: Tensor  # (N, C, H, W)
    columns: int


def draw_page(path: Path, title: str, caption: str, blocks: Sequence[Block]) -> None:
    """Draw a page with grids below each other."""
    grids = [_to_image(sample_grid(block.images, block.columns)) for block in blocks]
    indent = max(_label_width(block.labels) for block in blocks)
    height = sum(grid.height for grid in grids) + _SPACING * (len(grids) - 1)
    page, draw, top = _new_page(title, caption, indent + max(g.width for g in grids), height)
    left = _MARGIN + indent
    for block, grid in zip(blocks, grids, strict=True):
        page.paste(grid, (left, top))
        for number, label in enumerate(block.labels):
            middle = top + (number + 0.5) * grid.height / len(block.labels)
            position = (left - _SPACING, middle)
            draw.text(position, label, _INK, _font(_TEXT_SIZE), anchor="rm", align="right")
        top += grid.height + _SPACING
    _write_image(path, page)


def _new_page(
    title: str, caption: str, width: int, height: int
) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """A page with a heading and space for content of this size; also returns the content's top."""
    font = _font(_TITLE_SIZE)
    width = max(width, math.ceil(font.getlength(title)), _LEAST_WIDTH)
    lines = _wrapped(caption, width)
    top = _MARGIN + round(1.5 * _TITLE_SIZE) + round(1.3 * _TEXT_SIZE * len(lines)) + _SPACING
    page = Image.new("RGB", (width + 2 * _MARGIN, top + height + _MARGIN), "white")
    draw = ImageDraw.Draw(page)
    draw.text((_MARGIN, _MARGIN), title, _INK, font)
    for number, line in enumerate(lines):
        below = _MARGIN + round(1.5 * _TITLE_SIZE) + round(1.3 * _TEXT_SIZE * number)
        draw.text((_MARGIN, below), line, _FAINT, _font(_TEXT_SIZE))
    return page, draw, top


def _wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels; longer words get a line of their own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if _font(_TEXT_SIZE).getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _label_width(labels: Sequence[str]) -> int:
    """The width of a column of labels, including the space beside it; 0 without labels."""
    lines = [line for label in labels for line in label.split("\n")]
    widths = [math.ceil(_font(_TEXT_SIZE).getlength(line)) for line in lines]
    return max(widths) + _SPACING if widths else 0


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font of the charts, which comes with matplotlib, at `size` pixels."""
    import matplotlib  # takes a while to import

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


# --- Pages of a ladder ---


def draw_samples(
    path: Path, images: Tensor, *, title: str = "Samples from the prior", columns: int = 8
) -> None:
    """Draw `sampling.prior_samples` (N, C, H, W)."""
    draw_page(path, title, "Means of p(x | z) for z from the prior.", [Block([], images, columns)])


def draw_reconstructions(path: Path, x: Tensor, reconstructed: Tensor, *, columns: int = 8) -> None:
    """Draw images x (N, C, H, W), with their reconstructions below each row."""
    pairs = zip(x.split(columns), reconstructed.split(columns), strict=True)
    labels = ["image", "reconstruction"]
    caption = "Means of p(x | z) for one z from q(z | x), below their images."
    blocks = [Block(labels, torch.cat(pair), len(pair[0])) for pair in pairs]
    draw_page(path, "Reconstructions", caption, blocks)


def draw_layer(path: Path, images: Tensor, layer: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Draw `sampling.layer_samples` of one layer, (rows, columns, C, H, W).

    `layer` is 1 at the bottom; `sizes` holds the sizes of all layers' feature maps, bottom to top.
    """
    if layer == len(sizes):
        caption = "All images are independent."
    else:
        caption = (
            f"The images of a row share all latents above layer {layer} and differ in that layer's."
        )
    if layer > 1:
        caption += " The layers below are at the mode of their prior."
    title = f"{layer_name(layer, len(sizes)).capitalize()}, {_size_name(sizes[layer - 1])}"
    block = Block([], images.flatten(0, 1), images.shape[1])
    draw_page(path, title, f"{caption} Means of p(x | z).", [block])


def draw_layers(path: Path, by_layer: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> None:
    """Draw an overview of all layers, from the top.

    `by_layer` holds `sampling.layer_samples` of each layer, (rows, columns, C, H, W), and `sizes`
    the sizes of the layers' feature maps, both bottom to top.
    """
    caption = (
        "The images of a row share the latents above the named layer and differ in that layer's; "
        "the layers below are at the mode of their prior. Means of p(x | z)."
    )
    blocks = [
        Block(
            [f"{layer_name(i, len(sizes))}\n{_size_name(sizes[i - 1])}"],
            by_layer[i - 1].flatten(0, 1),
            by_layer[i - 1].shape[1],
        )
        for i in range(len(sizes), 0, -1)
    ]
    draw_page(path, "The role of each layer", caption, blocks)


def draw_interpolations(path: Path, images: Tensor, ends: Tensor) -> None:
    """Draw `sampling.interpolations` (L, steps, C, H, W) and their two images (2, C, H, W)."""
    depth, steps = images.shape[:2]
    labels = [f"layer {depth} (top)"] + [f"layers {depth} to {i}" for i in range(depth - 1, 0, -1)]
    between = ends.new_full((steps - 2, *ends.shape[1:]), _GAP_GREY)
    originals = torch.cat([ends[:1], between, ends[1:]])
    caption = (
        "Each row interpolates the latents of the named layers between the two images; the other "
        "layers are at the mode of their prior. Means of p(x | z)."
    )
    blocks = [Block(["images"], originals, steps), Block(labels, images.flatten(0, 1), steps)]
    draw_page(path, "Interpolation at each level", caption, blocks)


def _size_name(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


# --- KL maps ---


def draw_kl_maps(path: Path, maps: Sequence[Tensor]) -> None:
    """Draw the KL by position, (h_i, w_i) in nats for each layer, listed from the bottom.

    The top layer is drawn first.
    """
    panel_width = _MAP_SIDE + _SPACING + _BAR_WIDTH + _BAR_LABEL
    panel_height = 2 * round(1.3 * _TEXT_SIZE) + _MAP_SIDE + 2 * _SPACING
    columns = min(_MAPS_PER_ROW, len(maps))
    rows = math.ceil(len(maps) / columns)
    caption = (
        "Nats at each position, summed over channels and averaged over images. Each layer has its "
        "own scale."
    )
    page, draw, top = _new_page(
        f"KL by position: {sum(m.sum().item() for m in maps):.2f} nats in total",
        caption,
        columns * panel_width,
        rows * panel_height,
    )
    for number, layer in enumerate(range(len(maps), 0, -1)):
        row, column = divmod(number, columns)
        corner = (_MARGIN + column * panel_width, top + row * panel_height)
        name = layer_name(layer, len(maps))
        _draw_kl_map(page, draw, corner, name, maps[layer - 1])
    _write_image(path, page)


def _draw_kl_map(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    name: str,
    kl: Tensor,
) -> None:
    """A layer's panel: its name, size and KL, its map, and a colour bar that starts at 0."""
    left, top = corner
    font = _font(_TEXT_SIZE)
    draw.text((left, top), name, _INK, font)
    top += round(1.3 * _TEXT_SIZE)
    draw.text((left, top), f"{_size_name(kl.shape)}, {kl.sum().item():.3g} nats", _FAINT, font)
    top += round(1.3 * _TEXT_SIZE) + _SPACING
    greatest = kl.max().item()
    shares = kl.clamp(min=0) / greatest if greatest > 0 else torch.zeros_like(kl)
    picture = _coloured(_enlarged(shares, max(1, _MAP_SIDE // max(kl.shape))))
    page.paste(picture, (left, top))
    left += picture.width + _SPACING
    bar = torch.linspace(1, 0, picture.height).unsqueeze(1).expand(-1, _BAR_WIDTH)
    page.paste(_coloured(bar), (left, top))
    left += _BAR_WIDTH + 4
    draw.text((left, top), f"{greatest:.2g}", _FAINT, font, anchor="lt")
    draw.text((left, top + picture.height), "0", _FAINT, font, anchor="ls")


def _coloured(shares: Tensor) -> Image.Image:
    """Values (H, W) in [0, 1] as colours, from dark to bright."""
    from matplotlib import colormaps

    return Image.fromarray(colormaps["viridis"](shares.numpy(), bytes=True)[..., :3])
