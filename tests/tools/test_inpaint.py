"""What tools.inpaint writes and refuses."""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets.images import DynamicallyBinarizedImages
from tests.commands import Result, content, refusal, run, words
from tools import inpaint

pytestmark = pytest.mark.usefixtures("own_folder")


def completed(folder: Path, options: str) -> Result:
    result = run(inpaint.main, folder, *words("--device cpu"), *words(options))
    assert result.code == 0, result.err
    return result


def test_completions_keep_the_known_pixels(evaluated_copy: Path) -> None:
    result = completed(evaluated_copy, "--mask left --limit 3 --sweeps 6 --chains 2 --seed 5")
    assert "3 test images, 32 of 64 pixels completed by 2 chains of 6 sweeps" in result.out
    folder = evaluated_copy / "eval" / "30"
    with np.load(folder / "inpainting.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    assert found["completions"].shape == (3, 2, 1, 8, 8)
    assert found["missing"].sum(0).tolist() == [8] * 4 + [0] * 4
    images = datasets.load("digits", "test", "data").batch(torch.from_numpy(found["image"]))
    known = (images.numpy()[..., 4:] * 255).astype(np.uint8)
    assert (found["completions"][..., 4:] == known[:, np.newaxis]).all()
    assert set(np.unique(found["completions"])) == {0, 255}
    assert ((found["acceptance"] >= 0) & (found["acceptance"] <= 1)).all()
    picture = (folder / "inpainting.png").read_bytes()
    assert base64.b64encode(picture).decode() in (folder / "report.html").read_text()


def test_images_binarized_at_each_reading_depend_on_the_seed_alone(
    evaluated_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = torch.randint(1, 255, (8, 1, 8, 8), dtype=torch.uint8)
    images = DynamicallyBinarizedImages("digits", "train", (1, 8, 8), grey)
    monkeypatch.setattr(datasets, "load", lambda *arguments: images)
    known = []
    for state in (1, 2):
        torch.manual_seed(state)
        completed(evaluated_copy, "--mask left --sweeps 2 --chains 1 --overwrite")
        with np.load(evaluated_copy / "eval" / "30" / "inpainting.npz") as arrays:
            known.append(arrays["completions"][..., 4:])
    assert (known[0] == known[1]).all()


def test_earlier_completions_are_kept(trained_copy: Path) -> None:
    arguments = words("--device cpu --mask left --sweeps 2 --chains 1")
    completed(trained_copy, "--mask right --limit 1 --sweeps 2 --chains 1")
    before = content(trained_copy)
    assert "eval/30/inpainting.npz exists" in refusal(inpaint.main, trained_copy, *arguments)
    assert content(trained_copy) == before


def test_a_mask_may_be_a_picture(trained_copy: Path, tmp_path: Path) -> None:
    """A run needs no evaluation before."""
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    result = completed(trained_copy, "--mask mask.png --sweeps 2")
    assert "8 test images, 3 of 64 pixels completed by 6 chains of 2 sweeps" in result.out
    assert sorted(path.name for path in (trained_copy / "eval" / "30").iterdir()) == [
        "inpainting.npz",
        "inpainting.png",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("", ["--mask"]),
        ("--mask middle", ["no mask middle", "left", "centre", "image file"]),
        ("--mask left --out text.png", ["cannot write text.png", "File exists"]),
        ("--mask wide.png", ["wide.png", "9 wide and 8 high", "8 wide and 8 high"]),
        ("--mask white.png", ["masks every pixel"]),
        ("--mask black.png", ["masks no pixel"]),
        ("--mask text.png", ["text.png", "image"]),
        ("--mask left --chains 0", ["--chains", "0", "at least 1"]),
        ("--mask left --sweeps 1", ["--sweeps", "1", "at least 2"]),
        ("--mask left --limit 298", ["--limit is 298", "297"]),
    ],
)
def test_invalid_options_are_refused(
    options: str, named: list[str], trained_copy: Path, tmp_path: Path
) -> None:
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    before = content(tmp_path)
    line = refusal(inpaint.main, trained_copy, *words("--device cpu"), *words(options))
    for name in named:
        assert name in line
    assert content(tmp_path) == before
