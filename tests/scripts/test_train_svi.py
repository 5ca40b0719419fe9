"""train_svi.py's command line: a whole run by a real command, options, and what it writes."""

import re
from pathlib import Path

import numpy as np
import pytest

import train_svi
from datasets import static_mnist
from ladder_vae.runs.config_file import config_from
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from tests.commands import Result, content, run, script, words
from tests.made_data import contents
from tests.tiny_runs import LADDER, TRAINED_RUN

pytestmark = pytest.mark.usefixtures("own_folder")

# The example in the README of the original implementation.
REFERENCE_COMMAND = words("""
    --zdims 32 32 32 32 32 32 32 32 32 32 32 32 --downsample 0 0 1 0 0 1 0 0 0 1 0 0 --nonlin elu
    --skip --blocks-per-layer 4 --gated --test-batch-size 2000 --freebits 1.0 --tr-log-interv 10000
    --ts-log-interv 10000 --ckpt-interv 100000 --ll-interv 50000 --ll-samples 100
    --learn-top-prior --data-dep-init --seed 42 --dataset static_mnist
""")


def train(*arguments: object) -> Result:
    """Train in this process; must succeed."""
    result = run(train_svi.main, *arguments)
    assert result.code == 0, result.err
    return result


def parsed(*arguments: str) -> RunConfig:
    return config_from(train_svi.parse_arguments(arguments))


# --- A run by a real command ---


def test_training_by_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = "--tr-log-interv 2 --ts-log-interv 3 --ll-interv 3 --ckpt-interv 2 --steps 6"
    result = script("train_svi.py", *LADDER, *options.split(), "--out", folder)
    assert result.code == 0, result.err
    assert re.search(r"2 layers, [\d,]+ parameters, on cpu; 1,500 images of digits", result.out)
    assert f"run folder {folder}; to monitor it: tensorboard --logdir {folder}" in result.out
    for line in ("step 2: ELBO -", "step 6: ELBO -", "step 3: test ELBO -", "step 6: test ELBO -"):
        assert line in result.err
    assert "step 6: test log-likelihood at least -" in result.err
    assert "Traceback" not in result.err
    assert Run.open(folder).checkpoint_steps()[-1] == 6


def test_a_run_folder_is_complete(trained_run: Path) -> None:
    events = [path.name for path in trained_run.glob("events.out.tfevents.*")]
    assert len(events) == 1
    pictures = [
        f"{name}-{step}.png" for name in ("samples", "reconstructions") for step in (15, 30)
    ]
    assert set(content(trained_run)) - {"checkpoints/15.pt"} == {
        "config.json",
        "metrics.jsonl",
        *events,
        *(".lock", "checkpoints"),
        *("checkpoints/20.pt", "checkpoints/30.pt"),  # the newest two
        "checkpoints/best.json",
        "images",
        *(f"images/{name}" for name in pictures),
    }
    stored = Run.open(trained_run)
    assert stored.image_shape == (1, 8, 8)
    assert stored.config == parsed(*TRAINED_RUN)


# --- The command line of the original implementation ---


@pytest.fixture
def made_static_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a few random images in place of static MNIST."""
    rng = np.random.default_rng(0)
    arrays = {
        split: rng.integers(0, 256, (count, 98), np.uint8)
        for split, count in (("train", 60), ("valid", 8), ("test", 16))
    }
    monkeypatch.setattr(static_mnist, "CONTENTS", contents(arrays))
    folder = tmp_path / "made-data"
    folder.mkdir()
    np.savez_compressed(folder / "static_mnist.npz", allow_pickle=False, **arrays)
    return folder


def test_the_original_command_line_means_the_same() -> None:
    """Every option but `train_split`; those not given have the original's defaults."""
    assert parsed(*REFERENCE_COMMAND).options() == {
        "dataset": "static_mnist",
        "image_size": [0, 0],
        "flip": False,
        "train_split": "train",
        "z_dims": [32] * 12,
        "downsample": [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0],
        "blocks_per_layer": 4,
        "n_filters": 64,
        "nonlin": "elu",
        "residual_type": "bacdbacd",
        "merge_layers": "residual",
        "gated": True,
        "skip": True,
        "batchnorm": True,
        "sync_bn": False,
        "dropout": 0.2,
        "learn_top_prior": True,
        "initial_downscaling": True,
        "pixel_shuffle": False,
        "scales": "exp",
        "likelihood": "bernoulli",
        "data_dep_init": True,
        "scale_branches": False,
        **{"objective": "elbo", "particles": 1, "elbo_share": 0.0},
        "free_bits": 1.0,
        "analytical_kl": False,
        "beta_anneal": 0,
        "batch_size": 64,
        "optimizer": "adamax",
        "lr": 3e-4,
        "weight_decay": 0.0,
        "lr_warmup": 0,
        "lr_decay": "none",
        "ema": 0.0,
        "grad_clip": 0.0,
        "grad_skip": 0.0,
        "grad_spike": 100.0,
        "seed": 42,
        "precision": "float32",
        "compile": "auto",
        "steps": 0,
        "epochs": 0,
        "max_minutes": 0.0,
        "tr_log_interv": 10000,
        "ts_log_interv": 10000,
        "ll_interv": 50000,
        "ll_samples": 100,
        "ll_images": 0,
        "test_batch_size": 2000,
        "ckpt_interv": 100000,
        "checkpoint_minutes": 30.0,
        "keep_checkpoints": 3,
        "descr": "",
    }


def test_the_original_command_line_runs(made_static_mnist: Path, tmp_path: Path) -> None:
    """On random images and on the original's splits, made small by further options after it."""
    small = "--zdims 2 2 --downsample 1 0 --nfilters 4 --blocks-per-layer 1 --steps 2 --device cpu"
    small += " --train-split train+valid"
    result = train(*REFERENCE_COMMAND, *small.split(), "--data-dir", made_static_mnist)
    assert "68 images of static_mnist (train+valid)" in result.out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("static_mnist-2-layers-")
    assert Run.open(folder).image_shape == (1, 28, 28)
    assert Run.open(folder).checkpoint_steps() == [2]


def test_the_data_folder_may_come_from_the_environment(
    made_static_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVAE_DATA", str(made_static_mnist))
    small = (
        "-d static_mnist --zdims 2 --downsample 1 --nfilters 4 --batch-size 8 --steps 1 --dry-run"
    )
    assert "60 images" in train(*small.split(), "--device", "cpu").out


# --- Other options of the script ---


def test_nocuda_means_the_cpu() -> None:
    assert train_svi.parse_arguments(["--nocuda"]).device == "cpu"
    assert train_svi.parse_arguments([]).device == "auto"


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    options = "--steps 4 --tr-log-interv 1 --ts-log-interv 2 --ckpt-interv 1 --ll-interv 2"
    result = train(*LADDER, *options.split(), "--dry-run", "--out", "run")
    assert "step 4: test ELBO" in result.err
    assert content(tmp_path) == {}


def test_the_description_is_part_of_the_run_s_name(tmp_path: Path) -> None:
    train(*LADDER, "--steps", 1, "--ts-log-interv", 0, "--descr", "wide / deep")
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-wide---deep-\d{8}-\d{6}", folder.name)
    assert Run.open(folder).config.descr == "wide / deep"
