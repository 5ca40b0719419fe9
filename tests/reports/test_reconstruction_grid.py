"""The grid of images and their reconstructions."""

import torch
from torch.testing import assert_close

from ladder_vae.reports.image_grids import reconstruction_grid, sample_grid


def test_a_reconstruction_is_below_its_image() -> None:
    x = torch.rand((16, 1, 56, 56), generator=torch.Generator().manual_seed(0))
    grid = reconstruction_grid(x, 1 - x, 8)
    assert grid.shape == (3, 4 * 58 + 2, 8 * 58 + 2)
    for i in range(16):
        row, column = divmod(i, 8)
        top, left = 2 * row * 58 + 2, column * 58 + 2
        above = grid[:, top : top + 56, left : left + 56]
        below = grid[:, top + 58 : top + 58 + 56, left : left + 56]
        assert_close(above, x[i].expand(3, -1, -1), rtol=0, atol=0)
        assert_close(below, 1 - above, rtol=0, atol=0)
    assert sample_grid(x[:, :, :8, :8], 8).shape == (3, 2 * 58 + 2, 8 * 58 + 2)
