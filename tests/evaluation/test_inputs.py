"""Images as a user has them: their types, shapes and ranges."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ladder_vae.evaluation.inputs import as_images, as_levels
from runtime.errors import UserError

CPU = torch.device("cpu")
GREY, COLOUR = (1, 4, 5), (3, 4, 5)
LEVELS = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5)).astype(np.uint8)
FLOATS = LEVELS.astype(np.float32) / 255


def converted(x: Any, shape: tuple[int, int, int] = COLOUR, *, binary: bool = False) -> Tensor:
    return as_images(x, shape, CPU, binary=binary)


@pytest.mark.parametrize(
    "x",
    [
        LEVELS,
        torch.from_numpy(LEVELS),
        FLOATS,
        torch.from_numpy(FLOATS),
        torch.from_numpy(FLOATS).requires_grad_(),
        FLOATS.astype(np.float64),
        FLOATS.astype(">f8"),
        np.asfortranarray(LEVELS),
        LEVELS[::-1][::-1],
    ],
    ids=["u8", "u8 tensor", "f4", "f4 tensor", "grad", "f8", "big-endian", "fortran", "strides"],
)
def test_levels_and_floats_are_the_same_images(x: Any) -> None:
    images = converted(x)
    assert images.dtype == torch.float32
    assert not images.requires_grad
    assert_close(images, torch.from_numpy(FLOATS), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accepted(dtype: torch.dtype) -> None:
    assert_close(
        converted(torch.from_numpy(FLOATS).to(dtype)), torch.from_numpy(FLOATS), rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 4, 5), (1, 4, 5), (4, 5)])
def test_grey_images_need_no_channel(shape: tuple[int, ...]) -> None:
    x = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    images = converted(x, GREY)
    assert images.shape[1:] == GREY
    assert_close(images.flatten() * 255, torch.arange(float(x.size)))


def test_a_single_colour_image_is_a_batch_of_one() -> None:
    assert converted(LEVELS[0]).shape == (1, 3, 4, 5)


def test_binary_images_are_taken_as_they_are() -> None:
    bits = LEVELS[:, :1] > 127
    expected = torch.from_numpy(bits.astype(np.float32))
    for x in (bits, bits.astype(np.float64), bits.astype(np.uint8) * 255):
        assert torch.equal(converted(x, GREY, binary=True), expected)


@pytest.mark.parametrize(
    ("x", "shape", "binary", "message"),
    [
        (LEVELS.transpose(0, 2, 3, 1), COLOUR, False, "move the channels before the height"),
        (LEVELS[:, :1], COLOUR, False, r"has the shape \(2, 1, 4, 5\); it must be \(N, 3, 4, 5\)"),
        (LEVELS, GREY, False, r"must be \(N, 1, 4, 5\), \(N, 4, 5\) or \(4, 5\)"),
        (LEVELS[None], COLOUR, False, "has the shape"),
        (LEVELS[:0], COLOUR, False, "holds no image"),
        (FLOATS * 255, COLOUR, False, "divide levels by 255"),
        (FLOATS - 1, COLOUR, False, "from -1 to"),
        (FLOATS * np.nan, COLOUR, False, "not finite"),
        (LEVELS.astype(np.int64), COLOUR, False, "pixels of type int64"),
        (FLOATS.astype(complex), COLOUR, False, "must be a NumPy array or a tensor"),
        ("image.png", COLOUR, False, "x is str; it must be a NumPy array"),
        ([[1.0], [1.0, 2.0]], COLOUR, False, "x is list"),
        (None, COLOUR, False, "x is NoneType"),
        (FLOATS[:, 0], GREY, True, "grey pixels, such as .* binarize"),
        (LEVELS[:, 0] % 2, GREY, True, "as uint8: of 0 and 255"),
    ],
)
def test_other_images_are_refused(
    x: Any, shape: tuple[int, int, int], binary: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        converted(x, shape, binary=binary)
    assert "\n" not in str(refusal.value)


def test_floats_are_rounded_to_near_levels_alone() -> None:
    images = torch.from_numpy(FLOATS)
    assert torch.equal(as_levels(images.half().float()), images)
    with pytest.raises(UserError, match="round them first"):
        as_levels(images + 0.5 / 255)
