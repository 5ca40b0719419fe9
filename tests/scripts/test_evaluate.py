"""What evaluate.py finds, writes, draws and refuses, from the command line."""

import base64
import csv
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import datasets
import evaluate
import train_svi
from datasets.images import DynamicallyBinarizedImages
from elbo import FreeBitsELBO
from ladder_vae.runs.checkpoint import read_checkpoint, write_checkpoint
from runtime.errors import UserError
from tests.commands import Result, content, refusal, run, words

PICTURES = [
    *("samples", "reconstructions", "layers", "layer_01", "layer_02", "interpolation"),
    *("kl", "kl_maps", "bound", "pareto_k"),
]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths lead into a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVAE_DATA", raising=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, scored once."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    options = words("--preset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --batch-size 32")
    more = words("--test-batch-size 297 --lr 0.003 --beta-anneal 0 --device cpu --steps 4")
    assert run(train_svi.main, *options, *more, "--out", folder).code == 0
    assert evaluated(folder, "--samples", 1, 30, "--limit", 40).code == 0
    return folder


@pytest.fixture
def run_folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def evaluated(folder: Path, *options: object) -> Result:
    return run(evaluate.main, folder, "--device", "cpu", *options)


def made_pictures(folder: Path, *, size: tuple[int, int] = (8, 8), levels: int = 2) -> Path:
    """A dozen noise images."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(12):
        pixels = random.integers(0, levels, (size[1], size[0])) * (255 // (levels - 1))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:02d}.png")
    return folder


# --- Scoring ---


def test_figures_by_image_make_the_figures(trained: Path) -> None:
    """The means of per_image.npz are those of metrics.json; bounds there are not negated."""
    found = json.loads((trained / "eval" / "4" / "metrics.json").read_text())
    with np.load(trained / "eval" / "4" / "per_image.npz", allow_pickle=False) as arrays:
        by_image = dict(arrays)
    assert len(set(by_image["image"].tolist())) == found["n_images"] == found["limit"] == 40
    samples = by_image["samples"].tolist()
    assert samples == found["curve"]["samples"] == [1, 2, 4, 8, 16, 30]
    bounds = -by_image["bound"].mean(0)
    assert_close(found["curve"]["nats"], bounds.tolist())
    assert_close([found["iw"]["1"], found["iw"]["30"]], [bounds[0], bounds[-1]])
    assert found["elbo"] == pytest.approx(-by_image["elbo"].mean())
    assert found["reconstruction"] == pytest.approx(-by_image["log_likelihood"].mean())
    assert_close(found["kl_per_layer"], by_image["kl"].mean(0).tolist())
    assert found["effective_samples"]["min"] == by_image["effective_samples"].min() >= 1
    share = (by_image["pareto_k"] > 0.7).mean()
    assert found["pareto_k"]["share_above_0.7"] == pytest.approx(share)
    assert (share > 0.05) == (found["warning"] is not None)


def test_pictures_and_a_report_that_holds_them(trained: Path) -> None:
    folder = trained / "eval" / "4"
    report = (folder / "report.html").read_text()
    for name in PICTURES:
        picture = (folder / f"{name}.png").read_bytes()
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 100
        assert base64.b64encode(picture).decode() in report
    expected = {"metrics.json", "per_image.npz", "report.html", *(f"{n}.png" for n in PICTURES)}
    assert set(content(folder)) == expected  # and no trace of the progress


def test_the_temperature_is_that_of_the_samples(run_folder: Path) -> None:
    """At temperature 0 all samples are the same, and nothing else changes."""
    before = content(run_folder / "eval" / "4")
    options = words("--samples 1 30 --limit 40 --temperature 0")
    assert evaluated(run_folder, *options).code == 0
    after = content(run_folder / "eval" / "4")
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {"metrics.json"} == {"samples.png", "report.html"}
    with Image.open(run_folder / "eval" / "4" / "samples.png") as image:
        pixels = np.asarray(image.convert("L"))
    grid = pixels[-16 - 466 : -16, 16 : 16 + 466]  # 8 x 8 images of 56, with 2 between and around
    tiles = {
        grid[2 + 58 * r :][:56, 2 + 58 * c :][:, :56].tobytes() for r in range(8) for c in range(8)
    }
    assert len(tiles) == 1


def test_a_folder_may_be_given(run_folder: Path, tmp_path: Path) -> None:
    before = content(run_folder)
    assert (
        evaluated(run_folder, "--samples", 1, "--limit", 5, "--out", tmp_path / "there").code == 0
    )
    assert content(run_folder) == before
    assert (tmp_path / "there" / "metrics.json").exists()


def test_another_split_leaves_the_test_set_s_figures(run_folder: Path) -> None:
    before = content(run_folder / "eval" / "4")
    assert evaluated(run_folder, *words("--samples 1 30 --limit 40 --split valid")).code == 0
    assert content(run_folder / "eval" / "4") == before
    found, other = (
        json.loads((run_folder / "eval" / name / "metrics.json").read_text())
        for name in ("4-valid", "4")
    )
    assert (found["split"], found["n_images"]) == ("valid", 40)
    assert found["elbo"] != other["elbo"]  # from the same noise
    assert (
        evaluated(run_folder, *words("--inpaint left --limit 1 --sweeps 2 --split valid")).code == 0
    )
    report = (run_folder / "eval" / "4-valid" / "report.html").read_text()
    assert "40 valid images of digits" in report
    assert 'alt="Completions"' in report


def test_no_picture_of_the_figures_before_is_left(run_folder: Path) -> None:
    """With too few samples for a k-hat there is no chart of it, nor one of other samples."""
    assert evaluated(run_folder, *words("--samples 1 4 --limit 40")).code == 0
    folder = run_folder / "eval" / "4"
    assert {path.stem for path in folder.glob("*.png")} == set(PICTURES) - {"pareto_k"}
    assert "k-hat" not in (folder / "report.html").read_text()


def test_all_noise_is_of_the_seed(run_folder: Path) -> None:
    """Another one gives other figures and other pictures of the same model."""
    before = content(run_folder / "eval" / "4")
    assert evaluated(run_folder, *words("--samples 1 30 --limit 40 --seed 1")).code == 0
    after = content(run_folder / "eval" / "4")
    assert {name for name in before if before[name] == after[name]} == set()


def test_the_average_of_the_weights_is_scored_unless_told(run_folder: Path) -> None:
    """Where the checkpoint has one, here that of other weights."""
    path = run_folder / "checkpoints" / "4.pt"
    state = read_checkpoint(path, torch.device("cpu"))
    moved = {name: value + 0.1 for name, value in state["weights"].items()}
    found = []
    for last, average in ((moved, None), (state["weights"], {"weights": moved})):
        write_checkpoint(path, state | {"weights": last, "average": average})
        assert evaluated(run_folder, *words("--samples 1 --limit 9")).code == 0
        found.append(json.loads((run_folder / "eval" / "4" / "metrics.json").read_text()))
    assert [figures["weights"] for figures in found] == ["last", "average"]
    assert found[0]["elbo"] == found[1]["elbo"]


def test_weights_that_are_not_finite_are_refused(run_folder: Path) -> None:
    path = run_folder / "checkpoints" / "4.pt"
    state = read_checkpoint(path, torch.device("cpu"))
    next(iter(state["average"]["weights"].values())).fill_(torch.nan)
    write_checkpoint(path, state)
    line = refusal(evaluate.main, run_folder, *words("--samples 1 --device cpu"))
    assert "the weights of step 4 are not all finite" in line
    assert "--checkpoint" in line


def test_another_precision_is_asked_for_and_recorded(run_folder: Path, tmp_path: Path) -> None:
    """bf16 is near float32; it does nothing to in-painting, where it is refused."""
    found = []
    for precision in ("float32", "bf16"):
        options = words(f"--samples 1 4 --device cpu --precision {precision}")
        result = run(evaluate.main, run_folder, *options, "--out", tmp_path / precision)
        assert result.code == 0, result.err
        found.append(json.loads((tmp_path / precision / "metrics.json").read_text()))
    assert [figures["precision"] for figures in found] == ["float32", "bf16"]
    assert found[0]["elbo"] != found[1]["elbo"]
    assert found[0]["elbo"] == pytest.approx(found[1]["elbo"], rel=0.01)
    line = refusal(evaluate.main, run_folder, *words("--inpaint left --precision bf16"))
    assert "--precision does nothing with --inpaint" in line


def test_too_little_memory_is_told(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(FreeBitsELBO, "compute_terms", full)
    line = refusal(evaluate.main, run_folder, *words("--samples 3 --batch-size 24 --device cpu"))
    assert "24 images at a time do not fit into the GPU's memory" in line
    assert "--batch-size" in line


# --- In-painting ---


def test_completions_keep_what_is_known(run_folder: Path) -> None:
    result = evaluated(
        run_folder, *words("--inpaint left --limit 3 --sweeps 6 --chains 2 --seed 5")
    )
    assert result.code == 0, result.err
    assert "3 test images, 32 of 64 pixels completed by 2 chains of 6 sweeps" in result.out
    folder = run_folder / "eval" / "4"
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


def test_images_drawn_anew_are_the_same_ones_to_complete(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grey = torch.randint(1, 255, (5, 1, 8, 8), dtype=torch.uint8)
    images = DynamicallyBinarizedImages("digits", "train", (1, 8, 8), grey)
    monkeypatch.setattr(datasets, "load", lambda *arguments: images)
    known = []
    for state in (1, 2):
        torch.manual_seed(state)
        assert evaluated(run_folder, *words("--inpaint left --sweeps 2 --chains 1")).code == 0
        with np.load(run_folder / "eval" / "4" / "inpainting.npz", allow_pickle=False) as arrays:
            known.append(arrays["completions"][..., 4:])
    assert (known[0] == known[1]).all()


def test_a_mask_may_be_a_picture(run_folder: Path, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:5, 3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    result = evaluated(run_folder, *words("--inpaint mask.png --sweeps 2"))
    assert "8 test images, 3 of 64 pixels completed by 6 chains of 2 sweeps" in result.out


# --- Scores of other images ---


@pytest.mark.parametrize(("depth", "expected"), [(1, []), (2, [1]), (3, [1]), (12, [6])])
def test_half_of_the_layers_are_drawn_from_their_priors(depth: int, expected: list[int]) -> None:
    assert evaluate.prior_layers(None, depth) == expected
    if depth > 2:
        assert evaluate.prior_layers([2, 1], depth) == [2, 1]
    reason = "has but one" if depth == 1 else f"from 1 to {depth - 1}"
    with pytest.raises(UserError, match=reason):
        evaluate.prior_layers([depth], depth)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_scores_of_a_data_set_are_its_bounds(run_folder: Path) -> None:
    """The same images and samples as scored before, without the Ks in between."""
    options = words("--score digits --samples 30 --limit 40")
    result = evaluated(run_folder, *options)
    assert result.code == 0, result.err
    folder = run_folder / "eval" / "4"
    table = rows(folder / "scores-digits.csv")
    names = ["image", "elbo", "bound_30", "bound_30_above_1", "llr_above_1"]
    assert list(table[0]) == names
    with np.load(folder / "per_image.npz") as before:
        assert [int(row["image"]) for row in table] == before["image"].tolist()
        assert [float(row["bound_30"]) for row in table] == before["bound"][:, -1].tolist()
    for row in table:
        difference = float(row["bound_30"]) - float(row["bound_30_above_1"])
        assert float(row["llr_above_1"]) == pytest.approx(difference)
    assert not (folder / ".progress").exists()


def test_other_images_are_told_from_the_run_s_own(run_folder: Path, tmp_path: Path) -> None:
    made_pictures(tmp_path / "noise")
    options = words("--score digits --against noise --samples 5 --limit 12 --prior-layers 1")
    result = evaluated(run_folder, *options)
    assert result.code == 0, result.err
    assert "Telling noise from digits: AUROC" in result.out
    folder = run_folder / "eval" / "4"
    names = [row["image"] for row in rows(folder / "scores-noise.csv")]
    assert names == sorted(path.name for path in (tmp_path / "noise").iterdir())
    found = json.loads((folder / "auroc.json").read_text())
    assert (found["inliers"], found["outliers"]) == ("digits", "noise")
    for name, area in found["auroc"].items():
        inside, outside = (
            np.array([float(row[name]) for row in rows(folder / f"scores-{which}.csv")])
            for which in ("digits", "noise")
        )
        sign = 1 if name.startswith("llr") else -1
        above = (sign * outside[:, None] > sign * inside[None]).mean()
        assert area == pytest.approx(above)
    assert (folder / "roc.png").exists()


# --- Comparison ---


def test_runs_are_compared(run_folder: Path, trained: Path, tmp_path: Path) -> None:
    result = run(evaluate.main, "--compare", run_folder, trained, "--out", tmp_path / "table")
    assert result.code == 0, result.err
    assert result.out == (tmp_path / "table" / "comparison.md").read_text()
    found = json.loads((trained / "eval" / "4" / "metrics.json").read_text())
    table = rows(tmp_path / "table" / "comparison.csv")
    assert [row["run"] for row in table] == [str(run_folder), str(trained)]
    assert {float(row["negative_elbo"]) for row in table} == {found["elbo"]}
    assert result.out.count(f"**{found['elbo']:.2f} ± ") == 2


# --- Refusals ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--temperature -1", ["temperature is -1"]),
        ("--temperature 1 1 1", ["3 temperatures", "2 layers"]),
        ("--temperature nan", ["temperature is nan"]),
        ("--inpaint middle", ["no mask middle", "left", "centre", "image file"]),
        ("--inpaint=", ["--inpaint is empty", "give a mask"]),
        ("--score=", ["--score is empty", "give a data set or a folder"]),
        ("--score digits --against=", ["--against is empty"]),
        ("--inpaint left --out text.png", ["cannot write text.png", "File exists"]),
        ("--inpaint wide.png", ["wide.png", "9 wide and 8 high", "8 wide and 8 high"]),
        ("--inpaint white.png", ["masks every pixel"]),
        ("--inpaint black.png", ["masks no pixel"]),
        ("--inpaint text.png", ["text.png", "no image"]),
        ("--inpaint left --chains 0", ["--chains is 0", "at least 1"]),
        ("--inpaint left --sweeps 1", ["--sweeps is 1", "at least 2"]),
        ("--chains 3", ["--chains goes with --inpaint"]),
        ("--sweeps 3", ["--sweeps goes with --inpaint"]),
        ("--against digits", ["--against goes with --score"]),
        ("--prior-layers 1", ["--prior-layers goes with --score"]),
        ("--score digits --temperature 1", ["--temperature does nothing with --score"]),
        ("--inpaint left --samples 3", ["--samples does nothing with --inpaint"]),
        ("--score digits --prior-layers 2", ["--prior-layers is 2", "from 1 to 1"]),
        ("--score digits --prior-layers 0", ["--prior-layers is 0"]),
        ("--score digits --inpaint left", ["--inpaint and --score", "one"]),
        ("--score digits --against digits", ["both sets are called digits"]),
        ("--score nowhere", ["no folder nowhere"]),
        ("--score cifar10", ["of images (1, 8, 8), cifar10 has (3, 32, 32)"]),
        ("--score empty", ["empty holds no image"]),
        ("--score large --split test", ["--split does nothing with images of a folder"]),
        ("--score large", ["large/00.png is 9 wide and 8 high", "8 wide and 8 high"]),
        ("--score grey", ["grey/", "between black (0) and white (255)", "binarize"]),
        ("--score digits --against large", ["large/00.png"]),
        ("--compare run", ["run", "--compare"]),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: str, named: list[str], run_folder: Path, tmp_path: Path
) -> None:
    made_pictures(tmp_path / "large", size=(9, 8))
    made_pictures(tmp_path / "grey", levels=4)
    (tmp_path / "empty").mkdir()
    Image.new("L", (9, 8)).save(tmp_path / "wide.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "white.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    before = content(tmp_path)
    line = refusal(evaluate.main, run_folder, *words("--device cpu"), *options.split())
    for name in named:
        assert name in line
    assert content(tmp_path) == before


def test_a_comparison_needs_figures(run_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(run_folder / "eval")
    line = refusal(evaluate.main, "--compare", run_folder, "--limit", 3)
    assert "--limit does nothing with --compare" in line
    line = refusal(evaluate.main, "--compare", run_folder)
    assert f"{run_folder} has not been evaluated yet" in line
    assert not (tmp_path / "comparison.md").exists()


@pytest.mark.parametrize("options", ["--inpaint left --sweeps 2", "--score digits --samples 1"])
def test_a_full_disk_spoils_nothing(
    options: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = content(run_folder)
    monkeypatch.setattr(os, "replace", full)
    line = refusal(evaluate.main, run_folder, *words("--device cpu --limit 2"), *options.split())
    assert "No space left on device" in line
    after = content(run_folder)
    # What has been scored is kept, for the next try.
    assert {name: after[name] for name in after if ".progress" not in name} == before
