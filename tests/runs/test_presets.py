"""Every preset with a narrow ladder: one training step, and one evaluation of random images."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import evaluate
import train_svi
from datasets.images import ColourImages, ImageSet, PackedImages
from ladder_vae.runs.command_line import OneLineParser, add_options
from ladder_vae.runs.config_file import config_from
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.presets import PRESETS


def made_images(name: str, split: str, data_dir: object) -> ImageSet:
    """Twelve images of the data set's shape and kind."""
    shape = datasets.image_shape(name)
    rng = np.random.default_rng(len(split))
    if datasets.is_binary(name):
        return PackedImages.pack(name, split, rng.integers(0, 2, (12, *shape)))
    levels = rng.integers(0, 256, (12, *shape[1:], shape[0]), np.uint8)
    return ColourImages(name, split, shape, torch.from_numpy(levels))


@pytest.fixture(autouse=True)
def random_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load", made_images)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", (800, 0, 0)),
        ("--lr 1e-3", (800, 0, 0)),
        ("--epochs 200", (0, 200, 0)),
        ("--max-minutes 1.5", (0, 0, 1.5)),
        ("--minutes 1.5", (0, 0, 1.5)),
        ("--steps 9", (9, 0, 0)),
        ("--steps 9 --epochs 2", (9, 2, 0)),
    ],
)
def test_a_given_length_replaces_that_of_the_preset(
    given: str, expected: tuple[int, int, float]
) -> None:
    parser = OneLineParser()
    add_options(parser)
    config = config_from(parser.parse_args(["--preset", "digits", *given.split()]))
    assert (config.steps, config.epochs, config.max_minutes) == expected


def train(preset: str, folder: Path) -> None:
    depth = len(PRESETS[preset]["z_dims"])
    downsample = [min(n, 1) for n in PRESETS[preset]["downsample"]]
    narrow = ["--zdims", *["1"] * depth, "--downsample", *map(str, downsample)]
    narrow += "--nfilters 2 --blocks-per-layer 1 --batch-size 4 --steps 1 --device cpu".split()
    arguments = ["--preset", preset, *narrow, "--tr-log-interv", "1", "--out", str(folder)]
    assert train_svi.main(arguments) == 0


@pytest.mark.parametrize("preset", PRESETS)
def test_training(preset: str, tmp_path: Path) -> None:
    """Bits per dimension and pictures in colour for colour images only, in the right size."""
    train(preset, tmp_path / "run")
    dataset = PRESETS[preset]["dataset"]
    channels, height, width = datasets.image_shape(dataset)
    entries = read_entries(tmp_path / "run" / "metrics.jsonl")
    in_bits = [tag for entry in entries for tag in entry if "bits_per_dim" in tag]
    held_out = "valid" if PRESETS[preset].get("train_split") == "train" else "test"
    colour = ["train/bits_per_dim", f"{held_out}/bits_per_dim"]
    assert in_bits == ([] if datasets.is_binary(dataset) else colour)

    scale = max(1, round(56 / height))
    size = (8 * (width * scale + 2) + 2, 8 * (height * scale + 2) + 2)
    with Image.open(tmp_path / "run/images/samples-1.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", size)
    with Image.open(tmp_path / "run/images/reconstructions-1.png") as picture:
        pixels = np.asarray(picture).astype(int)
    assert bool((np.ptp(pixels, axis=2) > 0).any()) == (channels == 3)


@pytest.mark.parametrize("preset", ["digits", "cifar10-3", "celeba-20"])
def test_evaluation(preset: str, tmp_path: Path) -> None:
    """Of a binary ladder, one in colour, and the deepest one."""
    folder = tmp_path / "run"
    train(preset, folder)
    assert evaluate.main([str(folder), "--samples", "1", "2", "--device", "cpu"]) == 0
    dataset = PRESETS[preset]["dataset"]
    results: dict[str, Any] = json.loads((folder / "eval/1-samples-1-2/metrics.json").read_text())
    assert results["dataset"] == dataset
    assert len(results["kl_per_layer"]) == len(PRESETS[preset]["z_dims"])
    assert results["elbo"] == pytest.approx(
        results["reconstruction"] + sum(results["kl_per_layer"])
    )
    dimensions = math.prod(datasets.image_shape(dataset))
    for key, nats in {"elbo": results["elbo"], **results["iw"]}.items():
        assert math.isfinite(nats)
        assert results["bits_per_dim"][key] == pytest.approx(nats / (dimensions * math.log(2)))
    # An untrained network is not far from the uniform distribution over the levels.
    assert 0 < results["bits_per_dim"]["elbo"] < (1.5 if datasets.is_binary(dataset) else 16)
