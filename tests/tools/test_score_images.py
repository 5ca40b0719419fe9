"""What tools.score_images writes and refuses."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.errors import UserError
from tests.commands import Result, content, refusal, run, words
from tools import score_images
from tools.score_images import choose_prior_layers

pytestmark = pytest.mark.usefixtures("own_folder")


def scored(folder: Path, options: str) -> Result:
    result = run(score_images.main, folder, *words("--device cpu"), *words(options))
    assert result.code == 0, result.err
    return result


def make_pictures(folder: Path, *, size: tuple[int, int] = (8, 8), levels: int = 2) -> None:
    """Twelve images of noise."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = random.integers(0, levels, (size[1], size[0])) * (255 // (levels - 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def only(folder: Path, pattern: str) -> Path:
    """The file with such a name."""
    (path,) = folder.glob(pattern)
    return path


@pytest.mark.parametrize(("depth", "expected"), [(1, []), (2, [1]), (3, [1]), (12, [6])])
def test_by_default_half_of_the_layers_are_drawn_from_their_priors(
    depth: int, expected: list[int]
) -> None:
    assert choose_prior_layers(None, depth) == expected
    if depth > 2:
        assert choose_prior_layers([2, 1], depth) == [2, 1]
    reason = "the ladder has one" if depth == 1 else f"from 1 to {depth - 1}"
    with pytest.raises(UserError, match=reason):
        choose_prior_layers([depth], depth)


def test_scores_of_a_data_set_are_its_bounds(evaluated_copy: Path) -> None:
    """The same as evaluate.py computes for the same images and samples."""
    scored(evaluated_copy, "digits --samples 30 --limit 40")
    folder = evaluated_copy / "eval" / "30"
    table = rows(folder / "scores-digits.csv")
    assert list(table[0]) == ["image", "elbo", "bound_30", "bound_30_above_1", "llr_above_1"]
    with np.load(folder / "per_image.npz") as before:
        assert [int(row["image"]) for row in table] == before["image"].tolist()
        assert [float(row["bound_30"]) for row in table] == before["bound"][:, -1].tolist()
    for row in table:
        difference = float(row["bound_30"]) - float(row["bound_30_above_1"])
        assert float(row["llr_above_1"]) == pytest.approx(difference)
    assert not (folder / ".progress").exists()


def test_the_auroc_of_separating_two_sets(evaluated_copy: Path, tmp_path: Path) -> None:
    make_pictures(tmp_path / "noise")
    result = scored(
        evaluated_copy, "digits --against noise --samples 5 --limit 12 --prior-layers 1"
    )
    assert "Separating noise from digits: AUROC" in result.out
    folder = evaluated_copy / "eval" / "30"
    names = [row["image"] for row in rows(only(folder, "scores-noise-*.csv"))]
    assert names == sorted(path.name for path in (tmp_path / "noise").iterdir())
    found = json.loads(only(folder, "auroc-digits-noise-*.json").read_text())
    assert (found["inliers"], found["outliers"]) == ("digits", "noise")
    for name, area in found["auroc"].items():
        inside, outside = (
            np.array([float(row[name]) for row in rows(only(folder, f"scores-{which}.csv"))])
            for which in ("digits", "noise-*")
        )
        sign = 1 if name.startswith("llr") else -1
        above = (sign * outside[:, None] > sign * inside[None]).mean()
        assert area == pytest.approx(above)
    assert only(folder, "roc-digits-noise-*.png").exists()
    assert 'alt="Out-of-distribution images"' in (folder / "report.html").read_text()


def test_folders_with_the_same_name_have_files_of_their_own(
    evaluated_copy: Path, tmp_path: Path
) -> None:
    """Also one that is called like a data set; another spelling of a path is the same folder."""
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
        make_pictures(tmp_path / parent / "digits")
    folder = evaluated_copy / "eval" / "30"
    options = "--samples 2 --limit 3 --prior-layers 1"
    scored(evaluated_copy, f"digits {options}")
    result = scored(evaluated_copy, f"a/digits --against b/digits {options}")
    assert "Separating b/digits from a/digits: AUROC" in result.out
    assert len(list(folder.glob("scores-*.csv"))) == 3
    options += " --overwrite"
    assert "Separating" in scored(evaluated_copy, f"b/digits --against digits {options}").out
    scored(evaluated_copy, f"{tmp_path}/b/../a/digits {options}")
    assert len(list(folder.glob("scores-*.csv"))) == 3
    assert len(list(folder.glob("auroc-*.json"))) == len(list(folder.glob("roc-*.png"))) == 2
    report = (folder / "report.html").read_text()
    assert report.count('alt="Out-of-distribution images"') == 2
    line = refusal(score_images.main, evaluated_copy, *words("a/digits --against ./a/digits"))
    assert "both sets are a/digits" in line


def test_earlier_scores_are_kept(trained_copy: Path) -> None:
    """Unless another file holds them, or --overwrite is given."""
    arguments = words("digits --samples 1 --limit 2")
    scored(trained_copy, " ".join(arguments))
    before = content(trained_copy)
    line = refusal(score_images.main, trained_copy, *words("--device cpu"), *arguments)
    assert "eval/30/scores-digits.csv exists" in line
    assert content(trained_copy) == before
    scored(trained_copy, "digits --samples 1 --limit 3 --overwrite")
    assert len(rows(trained_copy / "eval" / "30" / "scores-digits.csv")) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("", ["IMAGES"]),
        ("digits --prior-layers 2", ["--prior-layers is 2", "from 1 to 1"]),
        ("digits --prior-layers 0", ["--prior-layers is 0"]),
        ("digits --against digits", ["both sets are digits"]),
        ("digits --samples 2 1", ["--samples is 2 1", "ascend"]),
        ("nowhere", ["no folder nowhere"]),
        ("cifar10", ["images (1, 8, 8)", "cifar10 are (3, 32, 32)"]),
        ("empty", ["empty holds no image"]),
        ("large", ["large/00.png is 9 wide and 8 high", "8 wide and 8 high"]),
        ("grey", ["grey/", "between black (0) and white (255)", "binarize"]),
        ("digits --against large", ["large/00.png"]),
    ],
)
def test_invalid_options_are_refused(
    options: str, named: list[str], trained_copy: Path, tmp_path: Path
) -> None:
    make_pictures(tmp_path / "large", size=(9, 8))
    make_pictures(tmp_path / "grey", levels=4)
    (tmp_path / "empty").mkdir()
    before = content(tmp_path)
    line = refusal(score_images.main, trained_copy, *words("--device cpu"), *words(options))
    for name in named:
        assert name in line
    assert content(tmp_path) == before
