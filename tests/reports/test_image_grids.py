"""Grids, pages and charts: every image in its place, and the right numbers drawn."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.testing import assert_close
from torchvision.utils import make_grid

from ladder_vae.reports import charts
from ladder_vae.reports.image_grids import (
    Block,
    draw_interpolations,
    draw_kl_maps,
    draw_layer,
    draw_layers,
    draw_page,
    draw_reconstructions,
    draw_samples,
    sample_grid,
    write_png,
)
from runtime.errors import UserError

MARGIN, GAP = 16, 2
GREY = (102, 102, 102)


def made_images(*shape: int) -> Tensor:
    """Random images at the 256 levels of 8-bit pictures."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)) / 255


def pixels(path: Path) -> Tensor:
    """A written picture, (H, W, 3) uint8."""
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return torch.from_numpy(np.array(picture))


def expected_pixels(image: Tensor, scale: int) -> Tensor:
    """An image (C, H, W) as a picture shows it, each pixel a square."""
    colours = image.expand(3, -1, -1).permute(1, 2, 0)
    levels = (colours * 255).round().to(torch.uint8)
    return levels.repeat_interleave(scale, 0).repeat_interleave(scale, 1)


def check_grid(page: Tensor, bottom: int, left: int, rows: list[Tensor], scale: int) -> int:
    """Find each row's images, grid lines around them, the last row's frame ending at `bottom`.

    Returns where the grid begins.
    """
    height, width = rows[0].shape[-2] * scale, rows[0].shape[-1] * scale
    start = bottom - len(rows) * (height + GAP) - GAP
    for r, row in enumerate(rows):
        top = start + r * (height + GAP) + GAP
        for c, image in enumerate(row):
            x = left + c * (width + GAP) + GAP
            assert_close(page[top : top + height, x : x + width], expected_pixels(image, scale))
            frame = page[top - GAP : top + height + GAP, x - GAP : x + width + GAP].clone()
            frame[GAP:-GAP, GAP:-GAP] = GREY[0]
            assert (frame == GREY[0]).all()
    return start


def grid_left(page: Tensor, bottom: int) -> int:
    """The left edge, past labels and margin, of the grid that ends just above `bottom`."""
    return int((page[bottom - 1] == GREY[0]).all(-1).nonzero()[0])


# --- Grids ---


@pytest.mark.parametrize("shape", [(5, 1, 8, 10), (6, 3, 32, 32), (12, 3, 64, 64)])
def test_a_grid_is_torchvision_s(shape: tuple[int, ...]) -> None:
    images = made_images(*shape)
    scale = {8: 7, 32: 2, 64: 1}[shape[-2]]
    enlarged = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    expected = make_grid(enlarged, nrow=4, padding=2, pad_value=0.4)
    assert_close(sample_grid(images, 4), expected, rtol=0, atol=0)


@pytest.mark.parametrize("off", [-0.4, 0.0, 0.4])
def test_the_nearest_of_256_levels_is_written(off: float, tmp_path: Path) -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(16, 16)
    picture = ((levels + off) / 255).clamp(0, 1).expand(3, -1, -1)
    write_png(tmp_path / "levels.png", picture)
    assert (pixels(tmp_path / "levels.png") == levels.unsqueeze(-1)).all()


def test_values_outside_0_and_1_are_clipped(tmp_path: Path) -> None:
    draw_samples(tmp_path / "s.png", torch.tensor([-0.5, 1.5]).view(2, 1, 1, 1))
    page = pixels(tmp_path / "s.png")
    top, left = len(page) - MARGIN - GAP - 56, MARGIN + GAP
    assert (page[top : top + 56, left : left + 56] == 0).all()
    assert (page[top : top + 56, left + 58 : left + 58 + 56] == 255).all()


# --- Pages ---

SHAPES = [(1, 8, 8, 7), (1, 28, 28, 2), (3, 32, 32, 2), (3, 64, 64, 1)]


@pytest.mark.parametrize(("channels", "height", "width", "scale"), SHAPES)
def test_samples(channels: int, height: int, width: int, scale: int, tmp_path: Path) -> None:
    images = made_images(20, channels, height, width)
    draw_samples(tmp_path / "s.png", images)
    page = pixels(tmp_path / "s.png")
    start = check_grid(page, len(page) - MARGIN, MARGIN, list(images.split(8)), scale)
    assert page.shape[1] == 2 * MARGIN + 8 * (width * scale + GAP) + GAP
    assert (page[:start] != 255).any()  # the heading
    assert (page[:, :MARGIN] == 255).all()
    assert (page[:, -MARGIN:] == 255).all()


def test_a_reconstruction_is_below_its_image(tmp_path: Path) -> None:
    """Twelve pairs in rows of eight: two blocks."""
    x, reconstructed = made_images(24, 1, 28, 28).split(12)
    draw_reconstructions(tmp_path / "r.png", x, reconstructed)
    page = pixels(tmp_path / "r.png")
    bottom = len(page) - MARGIN
    left = grid_left(page, bottom)
    start = check_grid(page, bottom, left, [x[8:], reconstructed[8:]], 2)
    check_grid(page, start - 8, left, [x[:8], reconstructed[:8]], 2)
    labels = page[start:bottom, MARGIN : left - GAP]
    assert (labels != 255).any()


def test_rows_of_a_layer_are_rows_of_the_picture(tmp_path: Path) -> None:
    images = made_images(4, 8, 3, 64, 64)
    draw_layer(tmp_path / "l.png", images, 2, [(8, 8), (4, 4), (2, 2)])
    page = pixels(tmp_path / "l.png")
    check_grid(page, len(page) - MARGIN, MARGIN, list(images), 1)


def test_the_overview_has_the_top_layer_first(tmp_path: Path) -> None:
    """Twelve layers of two rows each, each with its label."""
    by_layer = list(made_images(12, 2, 6, 1, 28, 28))
    draw_layers(tmp_path / "l.png", by_layer, [(14, 14)] * 6 + [(7, 7)] * 6)
    page = pixels(tmp_path / "l.png")
    bottom = len(page) - MARGIN
    left = grid_left(page, bottom)
    for images in by_layer:  # upwards from the bottom
        start = check_grid(page, bottom, left, list(images), 2)
        assert (page[start:bottom, MARGIN : left - 8] != 255).any()
        bottom = start - 8


def test_an_interpolation_has_its_images_above_its_ends(tmp_path: Path) -> None:
    images, ends = made_images(3, 8, 1, 28, 28), made_images(2, 1, 28, 28)
    draw_interpolations(tmp_path / "i.png", images, ends)
    page = pixels(tmp_path / "i.png")
    bottom = len(page) - MARGIN
    left = grid_left(page, bottom)
    start = check_grid(page, bottom, left, list(images), 2)
    empty = torch.full((1, 28, 28), 0.4)
    check_grid(page, start - 8, left, [torch.stack([ends[0], *[empty] * 6, ends[1]])], 2)


def test_long_captions_are_wrapped_and_long_titles_widen_the_page(tmp_path: Path) -> None:
    block = Block([], made_images(2, 1, 8, 8), 2)
    heights, widths = [], []
    for title, words in [("short", 3), ("short", 60), ("a title " * 20, 60)]:
        draw_page(tmp_path / "p.png", title, "word " * words, [block])
        page = pixels(tmp_path / "p.png")
        check_grid(page, len(page) - MARGIN, MARGIN, [block.images], 7)
        assert (page[:, -MARGIN:] == 255).all()  # nothing is cut off
        heights.append(page.shape[0])
        widths.append(page.shape[1])
    assert heights[0] < heights[2] < heights[1]
    assert widths[0] == widths[1] < widths[2]


def test_kl_maps_have_their_positions_and_scales(tmp_path: Path) -> None:
    """From dark at 0 to bright at each layer's maximum; the top layer comes first."""
    dark, bright = torch.tensor([68, 1, 84]), torch.tensor([253, 231, 36])  # viridis
    bottom_map = torch.zeros(4, 4)
    bottom_map[3, 1] = 0.25
    top_map = torch.tensor([[0.0, 5.0], [0.0, 5.0]])
    draw_kl_maps(tmp_path / "kl.png", [bottom_map, torch.zeros(2, 3), top_map])
    page = pixels(tmp_path / "kl.png")

    def centre(panel: int, shape: tuple[int, int], row: int, column: int) -> Tensor:
        side = 112 // max(shape)
        top = len(page) - MARGIN - 8 - 112  # the panels are in one row, maps at its foot
        x = MARGIN + panel * 186 + column * side + side // 2
        return page[top + row * side + side // 2, x].long()

    for r in range(2):
        assert_close(centre(0, (2, 2), r, 0), dark)
        assert_close(centre(0, (2, 2), r, 1), bright)
        assert_close(centre(1, (2, 3), r, 2), dark)
    for r in range(4):
        for c in range(4):
            assert_close(centre(2, (4, 4), r, c), bright if (r, c) == (3, 1) else dark)


def test_twenty_kl_maps_fit(tmp_path: Path) -> None:
    draw_kl_maps(tmp_path / "kl.png", [torch.rand(32, 32)] * 20)
    height, width, _ = pixels(tmp_path / "kl.png").shape
    assert 700 <= width <= 900
    assert height < 1100


# --- Charts ---


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls a function of `charts` and returns the axes that it drew."""

    def draw(function: Callable[..., None], *arguments: Any, **options: Any) -> Any:
        figures: list[Any] = []
        with monkeypatch.context() as patched:
            patched.setattr(charts, "write_figure", lambda path, figure: figures.append(figure))
            function(Path("chart.png"), *arguments, **options)
        figures[0].savefig(io.BytesIO(), format="png")  # places the ticks
        return figures[0].axes[0]

    return draw


def texts(items: Any) -> list[str]:
    return [item.get_text() for item in items]


def test_kl_by_layer(drawn: Callable[..., Any]) -> None:
    axes = drawn(charts.draw_kl_by_layer, [5.79, 0.81712, 2.5])
    assert [bar.get_width() for bar in axes.patches] == [5.79, 0.81712, 2.5]
    heights = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert heights == pytest.approx([1, 2, 3])
    assert texts(axes.get_yticklabels()) == ["layer 1 (bottom)", "layer 2", "layer 3 (top)"]
    assert texts(axes.texts) == ["5.79", "0.817", "2.5"]
    assert axes.get_title("left") == "KL by layer: 9.11 nats in total"
    assert axes.get_xlim()[0] == 0


def test_kl_of_a_ladder_that_learned_nothing(drawn: Callable[..., Any]) -> None:
    axes = drawn(charts.draw_kl_by_layer, [0.0] * 12)
    assert texts(axes.texts) == ["0"] * 12
    assert axes.get_xlim()[0] == 0


def test_the_bound_has_its_band(drawn: Callable[..., Any]) -> None:
    samples, mean, error = [1, 10, 1000], [82.0, 80.0, 79.5], [0.5, 0.25, 0.125]
    axes = drawn(charts.draw_bound, samples, mean, error)
    (curve,) = axes.lines
    assert curve.get_xydata().tolist() == [[1, 82.0], [10, 80.0], [1000, 79.5]]
    band = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert band == {
        (k, m + sign * e)
        for k, m, e in zip(samples, mean, error, strict=True)
        for sign in (-1.0, 1.0)
    }
    assert axes.get_xscale() == "log"
    assert texts(axes.get_xticklabels()) == ["1", "10", "1,000"]
    assert texts(axes.get_legend().get_texts()) == ["± 1 standard error", "mean over images"]


def test_the_bound_of_every_k_has_ticks_with_room_between_them(drawn: Callable[..., Any]) -> None:
    samples = list(range(1, 1001))
    axes = drawn(charts.draw_bound, samples, [80.0] * 1000, [0.1] * 1000)
    ticks = axes.get_xticks()
    assert ticks[0] == 1
    assert 6 <= len(ticks) <= 13
    assert min(np.diff(np.log(ticks))) >= np.log(1000) / 12 - 1e-9


def test_the_bound_of_one_k(drawn: Callable[..., Any]) -> None:
    axes = drawn(charts.draw_bound, [100], [80.0], [0.1])
    assert texts(axes.get_xticklabels()) == ["100"]


def test_pareto_k_counts_the_images_above_the_threshold(drawn: Callable[..., Any]) -> None:
    """Images without a k-hat (nan) do not count; infinite ones do, and have no bar."""
    k = [0.1, 0.2, 0.7, 0.71, 0.9, np.inf, -np.inf, 0.3, np.nan]
    axes = drawn(charts.draw_pareto_k, k, threshold=0.7)
    assert axes.get_title("left") == "Pareto k-hat: above 0.7 for 37.5% of 8 images"
    assert sum(bar.get_height() for bar in axes.patches) == 6
    assert list(axes.lines[0].get_xdata()) == [0.7, 0.7]
    empty = drawn(charts.draw_pareto_k, [np.nan], threshold=0.7)
    assert empty.get_title("left") == "Pareto k-hat: above 0.7 for 0.0% of 0 images"


def test_roc_curves_have_their_areas_in_the_legend(drawn: Callable[..., Any]) -> None:
    curves = {
        "bound": ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0], 1.0),
        "ratio": ([0.0, 0.5, 1.0], [0.0, 1.0, 1.0], 0.75),
    }
    axes = drawn(charts.draw_roc, curves, title="Digits from letters")
    bound, ratio, chance = axes.lines
    assert bound.get_xydata().tolist() == [[0, 0], [0, 1], [1, 1]]
    assert ratio.get_xydata().tolist() == [[0, 0], [0.5, 1], [1, 1]]
    assert chance.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert bound.get_color() != ratio.get_color()
    assert texts(axes.get_legend().get_texts()) == [
        "bound: AUROC 1.000",
        "ratio: AUROC 0.750",
        "chance: AUROC 0.500",
    ]


# --- Files ---

SIZES = [(4, 4), (2, 2)]
DRAWINGS: dict[str, Callable[[Path], None]] = {
    "samples": lambda path: draw_samples(path, made_images(9, 1, 8, 8)),
    "reconstructions": lambda path: draw_reconstructions(path, *made_images(2, 4, 1, 8, 8)),
    "layer": lambda path: draw_layer(path, made_images(2, 3, 1, 8, 8), 1, SIZES),
    "layers": lambda path: draw_layers(path, list(made_images(2, 2, 3, 1, 8, 8)), SIZES),
    "interpolations": lambda path: draw_interpolations(
        path, made_images(2, 5, 1, 8, 8), made_images(2, 1, 8, 8)
    ),
    "kl_maps": lambda path: draw_kl_maps(path, [made_images(4, 4), made_images(2, 2)]),
    "kl_by_layer": lambda path: charts.draw_kl_by_layer(path, [1.0, 2.0]),
    "bound": lambda path: charts.draw_bound(path, [1, 10], [2.0, 1.0], [0.1, 0.1]),
    "pareto_k": lambda path: charts.draw_pareto_k(path, [0.1, 0.8], threshold=0.5),
    "roc": lambda path: charts.draw_roc(path, {"a": ([0, 1], [0, 1], 0.5)}, title="t"),
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_files_are_reproducible_and_hold_no_metadata(
    draw: Callable[[Path], None], tmp_path: Path
) -> None:
    first, second = tmp_path / "new" / "folder" / "a.png", tmp_path / "b.png"
    draw(first)
    draw(second)
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert picture.info.keys() <= {"dpi"}  # no date, no version
        assert picture.width <= 900
    assert list(first.parent.iterdir()) == [first]


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_a_folder_that_is_not_writable(draw: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*a\.png"):
        draw(tmp_path / "file" / "a.png")


def test_charts_are_800_pixels_wide(tmp_path: Path) -> None:
    charts.draw_bound(tmp_path / "b.png", [1, 10], [2.0, 1.0], [0.1, 0.1])
    with Image.open(tmp_path / "b.png") as picture:
        assert picture.size == (800, 450)
