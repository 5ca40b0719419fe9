"""Every preset with a narrow ladder: one training step and one evaluation of random images."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import datasets
import evaluate
import train_svi
from datasets.images import ColourImages, ImageSet, PackedImages
from ladder_vae.runs.presets import PRESETS


def made_images(name: str, split: str, data_dir: object) -> ImageSet:
    """Twelve images of the data set's shape and kind."""
    shape = datasets.image_shape(name)
    rng = np.random.default_rng(len(split))
    if datasets.is_binary(name):
        return PackedImages.pack(name, split, rng.integers(0, 2, (12, *shape)))
    levels = rng.integers(0, 256, (12, *shape[1:], shape[0]), np.uint8)
    return ColourImages(name, split, shape, torch.from_numpy(levels))


@pytest.fixture(params=PRESETS)
def trained(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, Path]:
    """A preset's name and the run folder of one step of it, with its evaluation."""
    name, folder = request.param, tmp_path / "run"
    monkeypatch.setattr(datasets, "load", made_images)
    depth = len(PRESETS[name]["z_dims"])
    downsample = [min(n, 1) for n in PRESETS[name]["downsample"]]
    narrow = ["--zdims", *["1"] * depth, "--downsample", *map(str, downsample)]
    narrow += "--nfilters 2 --blocks-per-layer 1 --batch-size 4 --steps 1 --device cpu".split()
    narrow += ["--tr-log-interv", "1"]
    assert train_svi.main(["--preset", name, *narrow, "--out", str(folder)]) == 0
    arguments = [str(folder), "--samples", "1", "2", "--device", "cpu"]
    assert evaluate.main(arguments) == 0
    return name, folder


def test_one_step_and_one_evaluation(
    trained: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Metrics of all layers, bits per dimension for colour images, pictures of the right size."""
    name, folder = trained
    dataset = PRESETS[name]["dataset"]
    channels, height, width = datasets.image_shape(dataset)
    results: dict[str, Any] = json.loads((folder / "eval/1/metrics.json").read_text())
    assert results["dataset"] == dataset
    assert len(results["kl_per_layer"]) == len(PRESETS[name]["z_dims"])
    assert results["elbo"] == pytest.approx(
        results["reconstruction"] + sum(results["kl_per_layer"])
    )
    dimensions = channels * height * width
    for key, nats in {"elbo": results["elbo"], **results["iw"]}.items():
        assert math.isfinite(nats)
        assert results["bits_per_dim"][key] == pytest.approx(nats / (dimensions * math.log(2)))
    # An untrained network is not far from the uniform distribution over the levels.
    assert 0 < results["bits_per_dim"]["elbo"] < (1.5 if datasets.is_binary(dataset) else 16)

    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    in_bits = [tag for entry in entries for tag in entry if "bits_per_dim" in tag]
    held_out = "valid" if PRESETS[name].get("train_split") == "train" else "test"
    colour = ["train/bits_per_dim", f"{held_out}/bits_per_dim"]
    assert in_bits == ([] if datasets.is_binary(dataset) else colour)

    scale = max(1, round(56 / height))
    size = (8 * (width * scale + 2) + 2, 8 * (height * scale + 2) + 2)
    with Image.open(folder / "images/samples-1.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", size)


def test_tensorboard_shows_pictures_in_colour(trained: tuple[str, Path]) -> None:
    """Samples and reconstructions are there; those of colour data are not grey."""
    name, folder = trained
    events = EventAccumulator(str(folder))
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples", "reconstructions"}
    pixels = np.asarray(Image.open(folder / "images/reconstructions-1.png")).astype(int)
    coloured = bool((np.ptp(pixels, axis=2) > 0).any())
    assert coloured == (datasets.image_shape(PRESETS[name]["dataset"])[0] == 3)
