"""What an evaluation's pictures show, and what their noise depends on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datasets.images import PackedImages
from guide import build_ladder
from ladder_vae.evaluation.inpainting import Completions
from ladder_vae.reports import figures as album
from ladder_vae.reports.figures import draw_album, draw_completions
from ladder_vae.reports.image_grids import Block
from ladder_vae.runs.options import RunConfig
from tests.commands import content


@pytest.fixture
def draw(tiny_config: Callable[..., RunConfig]) -> Callable[..., None]:
    """Draws the pictures of a tiny ladder with three layers into a folder."""
    config = tiny_config().ladder
    model, guide = build_ladder(config, (1, 28, 28))
    model.eval()
    guide.eval()
    pixels = np.random.default_rng(0).integers(0, 2, (40, 1, 28, 28), np.uint8)
    images = PackedImages.pack("made", "test", pixels)

    def draw(folder: Path, seed: int = 0, temperature: float = 1.0) -> None:
        settings: dict[str, Any] = {"temperature": temperature, "batch_size": 16, "seed": seed}
        draw_album(folder, model, guide, config, images, **settings)

    return draw


def test_pictures_depend_only_on_the_seed(draw: Callable[..., None], tmp_path: Path) -> None:
    for state, (name, seed) in enumerate((("first", 0), ("again", 0), ("other", 1))):
        torch.manual_seed(state)
        draw(tmp_path / name, seed)
    first, again, other = (content(tmp_path / name) for name in ("first", "again", "other"))
    assert first == again
    assert first.keys() == other.keys()
    for name in ("samples.png", "reconstructions.png", "layers.png", "interpolation.png"):
        assert first[name] != other[name]


def test_each_picture_has_its_own_noise(draw: Callable[..., None], tmp_path: Path) -> None:
    """Temperature 0, which needs fewer draws, changes no picture but the samples."""
    draw(tmp_path / "one")
    draw(tmp_path / "none", temperature=0.0)
    one, none = content(tmp_path / "one"), content(tmp_path / "none")
    assert {name for name in one if one[name] != none[name]} == {"samples.png"}


def test_each_layer_has_its_own_picture(
    draw: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer has its own grey here; the overview lists layers from the bottom."""
    pages: dict[str, tuple[int, Tensor]] = {}
    overview: list[Tensor] = []

    def layer_samples(model: Any, layer: int, rows: int, columns: int) -> Tensor:
        return torch.full((rows, columns, 1, 28, 28), layer / 4)

    def draw_layer(path: Path, images: Tensor, layer: int, sizes: Any) -> None:
        pages[path.name] = (layer, images)

    monkeypatch.setattr(album, "layer_samples", layer_samples)
    monkeypatch.setattr(album, "draw_layer", draw_layer)
    monkeypatch.setattr(album, "draw_layers", lambda path, images, sizes: overview.extend(images))
    draw(tmp_path)
    assert sorted(pages) == ["layer_01.png", "layer_02.png", "layer_03.png"]
    for number, name in enumerate(sorted(pages), start=1):
        layer, images = pages[name]
        assert layer == number
        assert images.unique().tolist() == [number / 4]
    assert [images.unique().tolist() for images in overview] == [[0.25], [0.5], [0.75]]


def test_a_row_of_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image, its known part on grey, its completions, and their mean."""
    blocks: list[Block] = []
    monkeypatch.setattr(album, "draw_page", lambda *arguments: blocks.extend(arguments[-1]))
    x = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(-1, 1, 1, 2)
    missing = torch.tensor([[False, True]])
    completed = torch.rand(2, 3, 1, 1, 2)
    mean = torch.rand(2, 1, 1, 2)
    draw_completions(tmp_path / "c.png", x, missing, Completions(completed, mean, torch.ones(2)))
    (block,) = blocks
    assert block.columns == 6
    for row, i in zip(block.images.split(6), range(2), strict=True):
        known = torch.tensor([float(i), 0.5]).view(1, 1, 2)
        assert torch.equal(row, torch.stack([x[i], known, *completed[i], mean[i]]))
