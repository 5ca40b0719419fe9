"""Multi-dSprites, binary RGB: up to two coloured sprites on black, generated here.

The sprites follow L. Matthey, I. Higgins, D. Hassabis and A. Lerchner, "dSprites: disentanglement
testing sprites dataset", 2017; several sprites per image follow R. Kabra et al., "Multi-object
datasets", 2019. An image has 0, 1 or 2 sprites, equally often. Each sprite is a square, an ellipse
or a heart, in one of 6 scales, 40 orientations, 32 x 32 positions and 7 colours, all independent
and uniform. The second sprite hides the parts of the first that it covers.

Cached as `multi_dsprites.npz`: `train` (50000, 1536), `valid` (5000, 1536) and `test`
(5000, 1536) uint8, `numpy.packbits` of the 3x64x64 pixels of each image. They are made by keyed
draws and integer arithmetic only, so they are the same on every machine.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from datasets.cache import Contents, load_arrays
from datasets.images import ImageSet, PackedImages, Shape
from runtime import random as draws

SHAPE: Shape = (3, 64, 64)
BINARY = True
CONTENTS = {
    "train": Contents(
        (50000, 1536), "f063d28c1da12f806021aa8844060f923beac3321cb53ab372ff21b4f35234e8"
    ),
    "valid": Contents(
        (5000, 1536), "c2f5256494aa0009fac16dccfe97873b95c1bcac8962c46dde3d39b0eb1c5239"
    ),
    "test": Contents(
        (5000, 1536), "84f2268cf948bcd203e5699f99015b90a3c4c3046b90a6b4a6d3ea659185a5c7"
    ),
}
SHAPES = ("square", "ellipse", "heart")
SCALES, ORIENTATIONS, POSITIONS, COLOURS = 6, 40, 32, 7
_SEED = 0
_PLACES = 2  # the largest number of sprites in an image
_WINDOW = 26  # pixels; a sprite's centre is its window's centre, between four pixels
_FIRST_CENTRE = 16  # the first of the 32 positions, so that no sprite is cut off
_CHUNK = 2000  # images drawn at a time


class Factors(NamedTuple):
    """The factors (N, 2) of two sprites in N images, of which the first `number` (N,) are shown.

    `scale` k is a size of (5 + k) / 10; `orientation` k is an angle of k / 40 turns; `row` and
    `column` are the position of the centre; `colour` is 4 * red + 2 * green + blue. All int64.
    """

    number: np.ndarray
    shape: np.ndarray
    scale: np.ndarray
    orientation: np.ndarray
    row: np.ndarray
    column: np.ndarray
    colour: np.ndarray


def load(split: str, data_dir: Path) -> ImageSet:
    """One split, from `DATA_DIR/multi_dsprites.npz`, which is generated if it is missing.

    Raises:
        UserError: the file has unexpected contents, or cannot be read or written.
    """
    names = split.split("+")
    arrays = load_arrays(data_dir / "multi_dsprites.npz", CONTENTS, names, _generate)
    packed = np.concatenate([arrays[name] for name in names])
    return PackedImages("multi_dsprites", split, SHAPE, torch.from_numpy(packed))


def draw_factors(split: str, count: int) -> Factors:
    """The factors of the first `count` images of `train`, `valid` or `test`."""
    key = list(CONTENTS).index(split)
    below = (len(SHAPES), SCALES, ORIENTATIONS, POSITIONS, POSITIONS, COLOURS)
    shape, scale, orientation, row, column, colour = (
        draws.integers(n, count * _PLACES, _SEED, key, factor).reshape(count, _PLACES)
        for factor, n in enumerate(below, 1)
    )
    number = draws.integers(_PLACES + 1, count, _SEED, key, 0)
    return Factors(number, shape, scale, orientation, row, column, colour + 1)


def render(factors: Factors) -> np.ndarray:
    """The images of `factors`: bool (N, 3, 64, 64)."""
    windows = _windows()[factors.shape, factors.scale, factors.orientation]  # (N, 2, 26, 26)
    canvas = np.zeros((len(factors.number), *SHAPE[1:]), np.uint8)  # the colour of each pixel
    offsets = np.arange(_WINDOW) + _FIRST_CENTRE - _WINDOW // 2
    for place in range(_PLACES):
        image = np.flatnonzero(factors.number > place)
        rows = (factors.row[image, place, None] + offsets)[:, :, None]
        columns = (factors.column[image, place, None] + offsets)[:, None, :]
        at = (image[:, None, None], rows, columns)
        colours = factors.colour[image, place, None, None]
        canvas[at] = np.where(windows[image, place], colours, canvas[at])
    return (canvas[:, None] >> np.array([2, 1, 0], np.uint8)[:, None, None]) & 1 == 1


def _generate() -> dict[str, np.ndarray]:
    return {
        split: np.concatenate(
            [
                np.packbits(render(chunk).reshape(len(chunk.number), -1), axis=1)
                for chunk in _chunks(draw_factors(split, contents.shape[0]))
            ]
        )
        for split, contents in CONTENTS.items()
    }


def _chunks(factors: Factors) -> Iterator[Factors]:
    for start in range(0, len(factors.number), _CHUNK):
        yield Factors(*(factor[start : start + _CHUNK] for factor in factors))


# --- The sprites ---
#
# All arithmetic is on integers. Lengths are in half pixels, so pixel centres are odd numbers. A
# point is in a sprite of scale s if the point divided by s is in the sprite of scale 1.

_TURN_BITS = 14
_HALF_SIDE = 18  # of the square: 18x18 pixels
_AXES = (24, 15)  # of the ellipse; all three shapes have about the same area
_HEART_HALF_DIAGONAL = 18  # of the square in the heart


def _windows() -> np.ndarray:
    """Every sprite in its window: bool (3 shapes, 6 scales, 40 orientations, 26, 26)."""
    u, v = _turned_pixels()
    scales = np.arange(5, 5 + SCALES)[:, None, None, None]  # in tenths
    inside = [test(10 * u, 10 * v, scales) for test in (_in_square, _in_ellipse, _in_heart)]
    return np.stack(inside)


def _turned_pixels() -> tuple[np.ndarray, np.ndarray]:
    """A window's pixel centres in the axes of each orientation: two int64 (40, 26, 26).

    The first is the coordinate to the right, the second upwards, both in units of half a pixel
    divided by 2^`_TURN_BITS`.
    """
    angles = 2 * np.pi / ORIENTATIONS * np.arange(ORIENTATIONS)[:, None, None]
    # Rounded, because the last bit of a cosine differs between machines.
    cosine, sine = (np.rint(f(angles) * 2**_TURN_BITS).astype(np.int64) for f in (np.cos, np.sin))
    centres = np.arange(1 - _WINDOW, _WINDOW, 2)
    x, y = centres[None, None, :], -centres[None, :, None]
    return cosine * x + sine * y, cosine * y - sine * x


def _in_square(u: np.ndarray, v: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) <= scales * _HALF_SIDE << _TURN_BITS


def _in_ellipse(u: np.ndarray, v: np.ndarray, scales: np.ndarray) -> np.ndarray:
    a, b = _AXES
    return (u * b) ** 2 + (v * a) ** 2 <= (scales * a * b << _TURN_BITS) ** 2


def _in_heart(u: np.ndarray, v: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """A square on its corner, and the two discs with its upper sides as diameters."""
    k = scales * _HEART_HALF_DIAGONAL << _TURN_BITS
    v = v + k // 10  # move the heart's middle to the window's centre
    p, q = v + u, v - u  # coordinates along the square's sides, times sqrt(2)
    square = np.maximum(abs(p), abs(q)) <= k
    return square | ((p - k) ** 2 + q**2 <= k**2) | (p**2 + (q - k) ** 2 <= k**2)
