"""Every kind of file that the commands read: how to write an undamaged one, and how it is read."""

import io
import json
import os
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from datasets import celeba
from datasets.cache import Contents, load_arrays
from datasets.folder import load_folder
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.evaluation.inpainting import read_mask
from ladder_vae.runs.checkpoint import read_checkpoint, weights_only
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.published import export_weights, read_published
from ladder_vae.runs.run import Run
from tools.import_reference import read_weights

CPU = torch.device("cpu")
TRAIN = np.arange(48, dtype=np.uint8).reshape(4, 12)
CONTENTS = {"train": Contents(TRAIN.shape, None)}
IMAGE_FORMATS = ("png", "gif", "bmp", "tiff", "jpeg", "webp")


def make_run(folder: Path) -> Run:
    """A run folder of a tiny ladder whose only checkpoint holds random weights."""
    config = RunConfig.of(
        dataset="digits", z_dims=[2, 2], downsample=[0, 1], blocks_per_layer=1, n_filters=4
    )
    run = Run.create(folder, config, (1, 8, 8), {})
    weights = FreeBitsELBO()(*build_ladder(config.ladder, (1, 8, 8))).state_dict()
    run.save_checkpoint(2, weights_only(weights))
    return run


def picture(format: str, shape: tuple[int, ...] = (8, 10)) -> bytes:
    """An image file whose upper half is black and whose lower half is white."""
    levels = np.zeros(shape, np.uint8)
    levels[shape[0] // 2 :] = 255
    file = io.BytesIO()
    Image.fromarray(levels).save(file, format)
    return file.getvalue()


def save_arrays(save: Callable[..., None], **arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    save(file, allow_pickle=False, **arrays)
    return file.getvalue()


def whole_files(folder: Path) -> dict[str, list[bytes]]:
    """The bytes of undamaged files, by kind of file."""
    run = make_run(folder / "run")
    export_weights(run, None, folder / "weights.safetensors")
    state = io.BytesIO()
    torch.save({"conv.weight": torch.ones(2)}, state)
    return {
        "config.json": [(run.path / "config.json").read_bytes()],
        "checkpoint": [run.checkpoint_path(2).read_bytes()],
        "exported weights": [(folder / "weights.safetensors").read_bytes()],
        "reference weights": [state.getvalue()],
        "reference arrays": [save_arrays(np.savez, **{"state/a": TRAIN})],
        "metrics.jsonl": [b'{"step": 1, "train/loss": null}\n{"step": 2, "time": 3.5}\n'],
        "data set": [save_arrays(save, train=TRAIN) for save in (np.savez, np.savez_compressed)],
        "CelebA image": [picture(format, (218, 178, 3)) for format in ("jpeg", "png")],
        "mask": [picture(format) for format in IMAGE_FORMATS],
        "image": [picture(format) for format in IMAGE_FORMATS],
    }


def _read_config(folder: Path, content: bytes) -> Any:
    (folder / "config.json").write_bytes(content)
    return json.dumps(Run.open(folder).description())


def _read_checkpoint(folder: Path, content: bytes) -> Any:
    (folder / "2.pt").write_bytes(content)
    read_checkpoint(folder / "2.pt", CPU)
    return content  # a damaged checkpoint is never accepted


def _read_exported(folder: Path, content: bytes) -> Any:
    (folder / "weights").write_bytes(content)
    weights = read_published(folder / "weights")[1]
    return {name: value.tolist() for name, value in weights.items()}


def _read_reference(folder: Path, content: bytes) -> None:
    (folder / "weights.pt").write_bytes(content)
    read_weights(folder / "weights.pt")


def _read_reference_arrays(folder: Path, content: bytes) -> None:
    (folder / "weights.npz").write_bytes(content)
    read_weights(folder / "weights.npz")


def _read_metrics(folder: Path, content: bytes) -> None:
    (folder / "metrics.jsonl").write_bytes(content)
    assert all(isinstance(entry["step"], int) for entry in read_entries(folder / "metrics.jsonl"))


def _read_data_set(folder: Path, content: bytes) -> Any:
    (folder / "data.npz").write_bytes(content)
    return load_arrays(folder / "data.npz", CONTENTS, ["train"], dict)["train"].tolist()


def _read_celeba_image(folder: Path, content: bytes) -> None:
    (folder / "img_align_celeba").mkdir(exist_ok=True)
    (folder / "img_align_celeba" / "1.jpg").write_bytes(content)
    with redirect_stderr(io.StringIO()):  # the progress bar
        (image,) = celeba._prepared(folder, ["1.jpg"])
    assert image.shape == (64, 64, 3)


def _read_mask(folder: Path, content: bytes) -> None:
    (folder / "mask").write_bytes(content)
    assert 0 < read_mask(str(folder / "mask"), (8, 10)).sum() < 80


def _read_image(folder: Path, content: bytes) -> None:
    os.makedirs(folder / "images", exist_ok=True)
    (folder / "images" / "1.png").write_bytes(content)
    images, names = load_folder(folder / "images", (1, 8, 10), binary=False)
    assert (len(images), names) == (1, ["1.png"])


# Each reader writes the bytes into a folder and reads them there. What it returns must be the same
# for every file that it accepts; None says that accepted files may differ.
READERS: dict[str, Callable[[Path, bytes], Any]] = {
    "config.json": _read_config,
    "checkpoint": _read_checkpoint,
    "exported weights": _read_exported,
    "reference weights": _read_reference,
    "reference arrays": _read_reference_arrays,
    "metrics.jsonl": _read_metrics,
    "data set": _read_data_set,
    "CelebA image": _read_celeba_image,
    "mask": _read_mask,
    "image": _read_image,
}
# Their checksums detect any damage.
CHECKED = ("checkpoint", "exported weights", "data set")
