"""sample.py: what it draws, where it writes, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import sample
from ladder import Ladder
from tests.commands import Result, content, refusal, run, script, words

pytestmark = pytest.mark.usefixtures("own_folder")


def sampled(folder: Path, options: str) -> Result:
    result = run(sample.main, folder, *words("--device cpu"), *words(options))
    assert result.code == 0, result.err
    return result


def arrays(name: str) -> np.ndarray:
    with np.load(name, allow_pickle=False) as file:
        return file["images"]


def make_digit(name: str, *, size: tuple[int, int] = (8, 8), level: int = 255) -> None:
    pixels = np.zeros((size[1], size[0]), np.uint8)
    pixels[2:6, 3:5] = level
    Image.fromarray(pixels).save(name)


def test_samples_by_the_command_line(trained_run: Path) -> None:
    """In a process of its own, the same as in Python with the same seed."""
    options = words("-n 7 --temperature 0.7 0.5 --mean --seed 3 --device cpu --out samples.npz")
    result = script("sample.py", trained_run, *options)
    assert (result.code, result.err) == (0, "")
    assert result.out == "7 images of step 30: samples.npz\n"
    ladder = Ladder.load(trained_run, device="cpu")
    torch.manual_seed(3)
    expected = ladder.sample(7, temperature=[0.7, 0.5], mean=True)
    assert_close(torch.from_numpy(arrays("samples.npz")), expected)


def test_a_grid_and_a_folder_hold_the_same_images(trained_run: Path) -> None:
    for out in ("grid.png", "folder", "samples.npz"):
        sampled(trained_run, f"-n 9 --out {out}")
    images = arrays("samples.npz")
    assert (images.shape, images.dtype) == ((9, 1, 8, 8), np.float32)
    assert set(np.unique(images)) == {0.0, 1.0}
    files = sorted(Path("folder").iterdir())
    assert [file.name for file in files] == [f"{i:06}.png" for i in range(9)]
    for file, image in zip(files, images, strict=True):
        assert (np.asarray(Image.open(file)) == 255 * image[0]).all()
    grid = np.asarray(Image.open("grid.png").convert("L"))
    assert grid.shape == (2 + 3 * 58, 2 + 3 * 58)
    assert (grid[2:58:7, 60:116:7] == 255 * images[1, 0]).all()


def test_layers_are_kept_from_an_image(trained_run: Path) -> None:
    make_digit("digit.png")
    sampled(trained_run, "--keep-above 1 --from digit.png --temperature 0 --mean --out a.npz -n 3")
    images = arrays("a.npz")
    assert_close(images, np.repeat(images[:1], 3, 0))
    sampled(trained_run, "--temperature 0 --mean --out b.npz -n 1")
    assert np.abs(arrays("b.npz") - images[:1]).max() > 1e-3


def test_an_interpolation_joins_two_images(trained_run: Path) -> None:
    make_digit("a.png")
    make_digit("b.png", level=0)
    sampled(trained_run, "--interpolate a.png b.png --out way.npz")
    a, b = (np.asarray(Image.open(name)) for name in ("a.png", "b.png"))
    expected = Ladder.load(trained_run, device="cpu").interpolate(a, b)
    assert_close(torch.from_numpy(arrays("way.npz")), expected)
    sampled(trained_run, "--interpolate a.png b.png -n 4 --layers 2 --out top.npz")
    assert len(arrays("top.npz")) == 4


@pytest.mark.parametrize("out", ["samples.npz", "grid.png", "folder"])
def test_nothing_is_overwritten_unasked(out: str, trained_run: Path, tmp_path: Path) -> None:
    sampled(trained_run, f"-n 3 --out {out}")
    before = content(tmp_path)
    line = refusal(sample.main, trained_run, *words(f"--device cpu -n 2 --seed 1 --out {out}"))
    assert f"{out} exists" in line
    assert "--overwrite" in line
    assert content(tmp_path) == before
    sampled(trained_run, f"-n 2 --seed 1 --out {out} --overwrite")
    assert content(tmp_path) != before
    assert len(list(tmp_path.rglob("0*.png"))) == (2 if out == "folder" else 0)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("", ["--out"]),
        ("--out samples.jpg", ["--out is samples.jpg", ".npz or .png"]),
        ("--out other --overwrite", ["other holds other files than samples"]),
        ("--out a.npz -n 0", ["-n", "at least 1"]),
        ("--out a.npz --temperature 1 1 1", ["temperature has 3 values", "2 layers"]),
        ("--out a.npz --temperature nan", ["temperature is nan"]),
        ("--out a.npz --keep-above 1", ["--keep-above and --from need each other"]),
        ("--out a.npz --from digit.png", ["--keep-above and --from need each other"]),
        ("--out a.npz --keep-above 2 --from digit.png", ["`above` is 2", "from 0 to 1"]),
        ("--out a.npz --keep-above 1 --from grey.png", ["grey.png", "binarize"]),
        ("--out a.npz --keep-above 1 --from wide.png", ["wide.png is 9 wide and 8 high"]),
        ("--out a.npz --interpolate digit.png absent.png", ["there is no file absent.png"]),
        ("--out a.npz --interpolate digit.png digit.png -n 1", ["--number is 1"]),
        ("--out a.npz --interpolate digit.png digit.png --layers 3", ["`layers` is 3", "to 2"]),
        ("--out a.npz --interpolate digit.png digit.png --temperature 0.5", ["--temperature"]),
        ("--out a.npz --layers 1", ["--layers has no effect without --interpolate"]),
        ("--out a.npz --checkpoint 7", ["no checkpoint of step 7"]),
        ("--out text/a.npz", ["cannot write text/a.npz"]),
    ],
)
def test_invalid_options_are_refused(
    options: str, named: list[str], trained_run: Path, tmp_path: Path
) -> None:
    make_digit("digit.png")
    make_digit("grey.png", level=100)
    make_digit("wide.png", size=(9, 8))
    Path("other").mkdir()
    Path("other", "notes.txt").write_text("mine")
    Path("text").write_text("no folder")
    before = content(tmp_path)
    line = refusal(sample.main, trained_run, *words("--device cpu"), *words(options))
    for name in named:
        assert name in line
    assert content(tmp_path) == before
