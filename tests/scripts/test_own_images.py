"""A run on the user's own images: trained, resumed, evaluated, and refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train_svi
from datasets import own_images
from ladder_vae.runs.run import Run
from tests.commands import refusal, run, words
from tests.made_data import levels

TINY = words(
    "--zdims 2 2 --downsample 0 1 --nfilters 4 --blocks-per-layer 1 --batch-size 8 --device cpu "
    "--tr-log-interv 1 --data-dir prepared"
)


@pytest.fixture(autouse=True)
def grey(own_folder: Path) -> Path:
    """100 grey images of 8x6, in the current folder."""
    np.save("grey.npy", levels(100, 8, 6))
    return own_folder / "grey.npy"


def train(*arguments: object) -> str:
    result = run(train_svi.main, *arguments)
    assert result.code == 0, result.err
    return result.out


def test_a_run_records_its_images_and_evaluation_finds_them(grey: Path) -> None:
    out = train("--dataset", "grey.npy", *TINY, *words("--steps 2 --out run"))
    config = Run.open(Path("run")).config
    assert config.own is not None
    assert config.own.path == str(grey)
    assert (config.ladder.likelihood, config.train_split) == ("discr_log", "train")
    assert f"{config.own.counts['train']} images of grey.npy (train)" in out
    grey.unlink()  # the prepared file is enough
    result = run(evaluate.main, "run", *words("--samples 1 2 --device cpu --data-dir prepared"))
    assert result.code == 0, result.err
    metrics = json.loads(Path("run/eval/2-samples-1-2/metrics.json").read_text())
    assert metrics["dataset"] == config.own.name
    assert metrics["n_images"] == config.own.counts["test"]
    assert "moved" in refusal(evaluate.main, "run", *words("--device cpu --data-dir elsewhere"))


def test_flipped_images_resume_bit_for_bit(grey: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if the source has changed meanwhile, of which one line warns."""
    options = ["--dataset", "grey.npy", "--flip", *TINY]
    train(*options, *words("--steps 4 --out whole"))
    train(*options, *words("--steps 2 --out run"))
    np.save(grey, levels(101, 8, 6))
    own_images._warn_of_changes.cache_clear()
    result = run(train_svi.main, *words("--resume run --steps 4 --device cpu --data-dir prepared"))
    assert result.err.count("grey.npy has changed since it was prepared") == 1
    one, other = (
        Run.open(Path(name)).load_checkpoint(4, torch.device("cpu"))["weights"]
        for name in ("whole", "run")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    train("--dataset", "grey.npy", *TINY, *words("--steps 4 --out plain"))
    plain = Run.open(Path("plain")).load_checkpoint(4, torch.device("cpu"))["weights"]
    assert not all(torch.equal(one[name], plain[name]) for name in one)


@pytest.mark.parametrize("kind", ["binary", "colour"])
def test_the_likelihood_suits_the_images(kind: str) -> None:
    Path("pictures").mkdir()
    for number in range(60):
        picture = levels(1, 8, 8, 3)[0] + np.uint8(number)
        if kind == "binary":
            picture = np.where(picture[..., 0] > 99, 255, 0).astype(np.uint8)
        Image.fromarray(picture).save(f"pictures/{number}.png")
    train("--dataset", "pictures", *TINY, *words("--image-size 8 8 --steps 1 --out run"))
    expected = {"binary": "bernoulli", "colour": "discr_log_mix"}[kind]
    assert Run.open(Path("run")).config.ladder.likelihood == expected


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ("--dataset nowhere/", "there is no nowhere: give a folder of pictures"),
        ("--dataset grey.npy --lr -1", "--lr is -1.0; it must be finite and positive"),
        ("--dataset grey.npy --image-size 8", "--image-size is [8]; it must be a height and a"),
        ("--dataset grey.npy --likelihood bernoulli", "not binary"),
        ("--dataset digits --image-size 8 8", "--image-size is for your own images"),
        ("--dataset grey.npy --likelihood discr_log_mix", "needs images of 3 channels"),
    ],
)
def test_wrong_options(options: str, line: str) -> None:
    assert line in refusal(train_svi.main, *words(options), *TINY, *words("--steps 1 --out run"))
    assert not Path("run").exists()
