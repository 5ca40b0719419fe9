"""Training and evaluation from the command line: what they write, resume, and refuse."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

import datasets
import evaluate
import train_svi
from datasets import static_mnist
from datasets.cache import Contents
from ladder_vae.evaluation.importance import importance_weighted_bounds
from ladder_vae.networks.blocks import Merge, ResidualBlock
from ladder_vae.reports.image_grids import reconstruction_grid, sample_grid
from ladder_vae.runs.checkpoint import FORMAT, write_checkpoint
from ladder_vae.runs.command_line import config_from
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from tests.commands import (
    Result,
    content,
    is_one_line_error,
    refusal,
    run,
    script,
    subprocess_environment,
    words,
)

ROOT = Path(__file__).parent.parent
NAMES = datasets.NAMES
LADDER = words("--preset digits --zdims 2 2 --downsample 0 1 --nfilters 4")
TINY = [
    *LADDER,
    *words("--batch-size 32 --test-batch-size 297 --lr 0.003 --beta-anneal 0 --device cpu"),
]

# The example of the reference implementation's README.
REFERENCE_COMMAND = words("""
    --zdims 32 32 32 32 32 32 32 32 32 32 32 32 --downsample 0 0 1 0 0 1 0 0 0 1 0 0 --nonlin elu
    --skip --blocks-per-layer 4 --gated --test-batch-size 2000 --freebits 1.0 --tr-log-interv 10000
    --ts-log-interv 10000 --ckpt-interv 100000 --ll-interv 50000 --ll-samples 100
    --learn-top-prior --data-dep-init --seed 42 --dataset static_mnist
""")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths lead into a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVAE_DATA", raising=False)


def train(*arguments: object) -> Result:
    """Train in this process; must go well."""
    result = run(train_svi.main, *arguments)
    assert result.code == 0, result.err
    return result


def entries(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def training_entries(folder: Path) -> list[dict[str, float]]:
    return [entry for entry in entries(folder) if "train/loss" in entry]


def load(folder: Path, step: int) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / f"{step}.pt", weights_only=True)


def parsed(*arguments: str) -> RunConfig:
    return config_from(train_svi.parse_arguments(arguments))


def prepared(*arguments: str) -> train_svi.Training:
    """A run that is ready to go, without a folder."""
    training, folder = train_svi.prepare(
        train_svi.parse_arguments([*TINY, "--dry-run", *arguments])
    )
    assert folder is None
    return training


# --- One run by real commands ---


@dataclass(frozen=True)
class Demonstration:
    folder: Path
    training: Result
    evaluation: Result


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """Six steps of training and an evaluation, each a command of its own."""
    folder = tmp_path_factory.mktemp("demonstration") / "run"
    intervals = "--tr-log-interv 2 --ts-log-interv 3 --ll-interv 3 --ll-samples 2 --ckpt-interv 2"
    training = script(
        "train_svi.py",
        *TINY,
        *words("--steps 6 --keep-checkpoints 2"),
        *intervals.split(),
        *("--out", folder),
    )
    evaluation = script("evaluate.py", folder, "--samples", 1, 3, "--device", "cpu")
    return Demonstration(folder, training, evaluation)


@pytest.fixture
def run_folder(demonstration: Demonstration, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(demonstration.folder, tmp_path / "run"))


def test_training_says_what_it_does_and_where(demonstration: Demonstration) -> None:
    result, folder = demonstration.training, demonstration.folder
    assert result.code == 0, result.err
    assert re.search(r"2 layers, [\d,]+ parameters, on cpu; 1,500 images of digits", result.out)
    assert f"run folder {folder}; watch it with: tensorboard --logdir {folder}" in result.out
    for line in ("step 2: ELBO -", "step 6: ELBO -", "step 3: test ELBO -", "step 6: test ELBO -"):
        assert line in result.err
    assert "step 6: test log-likelihood at least -" in result.err
    assert "Traceback" not in result.err


def test_a_run_folder_holds_what_is_promised(demonstration: Demonstration) -> None:
    folder = demonstration.folder
    events = [path.name for path in folder.glob("events.out.tfevents.*")]
    assert len(events) == 1
    pictures = [f"{name}-{step}.png" for name in ("samples", "reconstructions") for step in (3, 6)]
    assert set(content(folder)) == {
        "config.json",
        "metrics.jsonl",
        *events,
        "checkpoints",
        *("checkpoints/4.pt", "checkpoints/6.pt"),  # the newest two
        "checkpoints/best.json",
        "images",
        *(f"images/{name}" for name in pictures),
        *("eval", "eval/6"),
        *(f"eval/6/{path.name}" for path in (folder / "eval" / "6").iterdir()),
    }
    stored = Run.open(folder)
    assert stored.image_shape == (1, 8, 8)
    options = words("--steps 6 --keep-checkpoints 2 --tr-log-interv 2 --ts-log-interv 3")
    more = words("--ll-interv 3 --ll-samples 2 --ckpt-interv 2")
    assert stored.config == parsed(*TINY, *options, *more)


def test_evaluation_says_what_it_found_and_where(demonstration: Demonstration) -> None:
    result, folder = demonstration.evaluation, demonstration.folder / "eval" / "6"
    assert result.code == 0, result.err
    assert result.err == ""
    assert "digits, 297 test images, step 6, moving average of the weights" in result.out
    for name in ("metrics.json", "per_image.npz", "report.html"):
        assert str(folder / name) in result.out
        assert (folder / name).is_file()
    found = json.loads((folder / "metrics.json").read_text())
    shown = {"ELBO": found["elbo"]}
    shown |= {"1 importance sample": found["iw"]["1"], "3 importance samples": found["iw"]["3"]}
    for name, value in shown.items():
        assert re.search(rf"(?m)^{name} +{value:.2f} ", result.out)


def test_metrics_hold_together(demonstration: Demonstration) -> None:
    """The figures of metrics.json are those of one pass over 297 images of 64 pixels."""
    found = json.loads((demonstration.folder / "eval" / "6" / "metrics.json").read_text())
    assert list(found["iw"]) == ["1", "3"]
    assert found["n_images"] == 297
    assert (found["dataset"], found["split"], found["step"]) == ("digits", "test", 6)
    assert len(found["kl_per_layer"]) == 2
    total = found["reconstruction"] + sum(found["kl_per_layer"])
    assert found["elbo"] == pytest.approx(total, rel=1e-9)
    bounds = {"elbo": found["elbo"]} | found["iw"]
    assert found["bits_per_dim"].keys() == found["standard_error"].keys() == bounds.keys()
    for name, nats in bounds.items():
        assert found["bits_per_dim"][name] == pytest.approx(nats / (64 * math.log(2)), rel=1e-9)
        assert 0 < found["standard_error"][name] < nats
    # log-mean-exp of the same three samples is at least their mean
    assert found["iw"]["3"] <= found["elbo"]


def test_metrics_list_the_layers_from_the_bottom(
    demonstration: Demonstration, tmp_path: Path
) -> None:
    """A top layer whose posterior and prior are made equal has no KL, and it comes last."""
    folder = Path(shutil.copytree(demonstration.folder, tmp_path / "run"))
    state = load(folder, 6)
    for name, value in state["average"]["weights"].items():
        if "top_posterior" in name or "top_prior" in name:
            value.zero_()
    write_checkpoint(folder / "checkpoints" / "6.pt", state)
    assert run(evaluate.main, folder, "--samples", 1, "--device", "cpu").code == 0
    kl = json.loads((folder / "eval" / "6" / "metrics.json").read_text())["kl_per_layer"]
    assert kl[0] != 0
    assert kl[1] == 0


@pytest.mark.parametrize("file", ["images/{}-3.png", "images/{}-6.png"])
def test_pictures_are_png_files_of_the_right_size(demonstration: Demonstration, file: str) -> None:
    """Digits are enlarged seven times: 8 by 8 tiles of 56 pixels, with 2 between and around."""
    for name in ("samples", "reconstructions"):
        with Image.open(demonstration.folder / file.format(name)) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.mode == "RGB"
            assert picture.size == (8 * 58 + 2, 8 * 58 + 2)


def test_evaluating_again_gives_the_same_figures(run_folder: Path) -> None:
    """In another process, with other threads: the same seed and blocks, the same digits."""
    before = json.loads((run_folder / "eval" / "6" / "metrics.json").read_text())
    result = run(evaluate.main, run_folder, "--samples", 1, 3, "--device", "cpu")
    assert result.code == 0, result.err
    after = json.loads((run_folder / "eval" / "6" / "metrics.json").read_text())
    assert after["elbo"] == pytest.approx(before["elbo"], rel=1e-6)
    assert after["iw"] == pytest.approx(before["iw"], rel=1e-6)


def test_evaluation_options_do_what_they_say(run_folder: Path) -> None:
    """An older checkpoint, its last weights, another split and a few random images."""
    arguments = words("--checkpoint 4 --no-average --split valid --limit 20 --samples 2 --seed 3")
    result = run(evaluate.main, run_folder, *arguments, "--batch-size", 7, "--device", "cpu")
    assert result.code == 0, result.err
    assert "digits, 20 valid images, step 4, last weights" in result.out
    found = json.loads((run_folder / "eval" / "4-valid" / "metrics.json").read_text())
    expected = {"step": 4, "weights": "last", "split": "valid", "n_images": 20}
    expected |= {"seed": 3, "batch_size": 7}
    assert {name: found[name] for name in expected} == expected
    assert list(found["iw"]) == ["2"]


def test_a_single_image_has_no_standard_error(run_folder: Path) -> None:
    result = run(evaluate.main, run_folder, "--limit", 1, "--samples", 1, "--device", "cpu")
    assert result.code == 0, result.err
    found = json.loads((run_folder / "eval" / "6" / "metrics.json").read_text())
    assert found["standard_error"] == {"elbo": None, "1": None}
    assert re.search(r"(?m)^ELBO +[\d.]+ +- +[\d.]+$", result.out)


def test_a_reconstruction_lies_below_its_image() -> None:
    x = torch.rand((16, 1, 56, 56), generator=torch.Generator().manual_seed(0))
    grid = reconstruction_grid(x, 1 - x, 8)
    assert grid.shape == (3, 4 * 58 + 2, 8 * 58 + 2)
    for i in range(16):
        row, column = divmod(i, 8)
        top, left = 2 * row * 58 + 2, column * 58 + 2
        above = grid[:, top : top + 56, left : left + 56]
        below = grid[:, top + 58 : top + 58 + 56, left : left + 56]
        assert_close(above, x[i].expand(3, -1, -1), rtol=0, atol=0)
        assert_close(below, 1 - above, rtol=0, atol=0)
    assert sample_grid(x[:, :, :8, :8], 8).shape == (3, 2 * 58 + 2, 8 * 58 + 2)


# --- Interruption ---


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order(number: signal.Signals, tmp_path: Path) -> None:
    """The step is finished and kept, the exit code says which signal, and the run goes on."""
    folder = tmp_path / "run"
    options = "--steps 0 --lr-decay none --tr-log-interv 1 --ts-log-interv 0 --ckpt-interv 0"
    command = [sys.executable, ROOT / "train_svi.py", *TINY, *options.split(), "--out", folder]
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=subprocess_environment(),
    ) as process:
        deadline = time.monotonic() + 240
        metrics = folder / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().endswith("\n")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=240)
    assert process.returncode == 128 + number
    assert "trains until interrupted" in out
    assert "Traceback" not in err
    (step,) = Run.open(folder).checkpoint_steps()
    assert err.endswith(f"interrupted after step {step}\n")
    assert [entry["step"] for entry in entries(folder)] == list(range(1, step + 1))
    assert not list(folder.rglob("*.part"))

    train("--resume", folder, "--steps", step + 2, "--device", "cpu")
    assert Run.open(folder).checkpoint_steps() == [step, step + 2]
    steps = [entry["step"] for entry in training_entries(folder)]
    assert steps == list(range(1, step + 3))


def test_an_evaluation_is_broken_off_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during an evaluation leaves a checkpoint of the step before it."""
    original = importance_weighted_bounds
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(train_svi, "importance_weighted_bounds", interrupted)
    folder = tmp_path / "run"
    options = words("--steps 9 --ts-log-interv 2 --ckpt-interv 0")
    result = run(train_svi.main, *TINY, *options, "--out", folder)
    assert result.code == 130
    assert result.err == "interrupted after step 2\n"
    assert Run.open(folder).checkpoint_steps() == [2]
    assert not (folder / "images").exists()
    assert signal.getsignal(signal.SIGINT) is handler  # as it was


# --- TensorBoard and metrics.jsonl ---


@pytest.fixture(scope="module")
def events(demonstration: Demonstration) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(
        str(demonstration.folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}
    )
    return accumulator.Reload()


TRAINING_TAGS = {
    "train/loss",
    "train/negative_elbo",
    "train/reconstruction",
    "train/kl",
    "train/gradient_norm",
    "train/learning_rate",
    "train/kl_weight",
    "train/images_per_second",
    "train/skipped_updates",
    "train/gradient_spikes",
    "train_kl/layer_01",
    "train_kl/layer_02",
    "train_kl_collapsed/layer_01",
    "train_kl_collapsed/layer_02",
}
TEST_TAGS = {
    "test/negative_elbo",
    "test/reconstruction",
    "test/kl",
    "test_kl/layer_01",
    "test_kl/layer_02",
    "test_active_channels/layer_01",
    "test_active_channels/layer_02",
}
BOUND_TAGS = {"test/negative_bound_2_samples"}


def test_tensorboard_shows_scalars_pictures_and_configuration(events: Any) -> None:
    tags = events.Tags()
    assert set(tags["scalars"]) == TRAINING_TAGS | TEST_TAGS | BOUND_TAGS
    assert set(tags["images"]) == {"samples", "reconstructions"}
    assert tags["tensors"] == ["configuration/text_summary"]
    for name in tags["images"]:
        pictures = events.Images(name)
        assert [picture.step for picture in pictures] == [3, 6]
        assert {(p.width, p.height) for p in pictures} == {(466, 466)}
    (text,) = events.Tensors("configuration/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "| n_filters | 4 |" in shown
    assert "| z_dims | [2, 2] |" in shown
    assert shown.count("\n") == 2 + len(RunConfig.of().to_dict())


def test_tensorboard_shows_hyperparameters(events: Any) -> None:
    """The options stand beside the test ELBO in the table of runs."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    contents = {
        tag: HParamsPluginData.FromString(data)
        for tag, data in events.PluginTagToContent("hparams").items()
    }
    session = contents["_hparams_/session_start_info"].session_start_info.hparams
    assert set(session) == set(RunConfig.of().to_dict())
    assert session["n_filters"].number_value == 4
    assert session["lr"].number_value == 0.003
    # Whether true is shown as a number is torch's affair.
    assert session["gated"].bool_value or session["gated"].number_value == 1
    assert session["downsample"].string_value == "[0, 1]"
    experiment = contents["_hparams_/experiment"].experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["test/negative_elbo"]


def test_metrics_jsonl_holds_the_scalars_of_tensorboard(
    demonstration: Demonstration, events: Any
) -> None:
    kinds = (TRAINING_TAGS, TEST_TAGS, BOUND_TAGS)
    logged = entries(demonstration.folder)
    found = [(entry["step"], entry.keys() - {"step", "time"}) for entry in logged]
    due = [(2, 0), (3, 1), (3, 2), (4, 0), (6, 0), (6, 1), (6, 2)]
    assert found == [(step, kinds[kind]) for step, kind in due]
    times = [entry["time"] for entry in logged]
    assert times == sorted(times)
    for tag in TRAINING_TAGS | TEST_TAGS | BOUND_TAGS:
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert shown == [(e["step"], float(np.float32(e[tag]))) for e in logged if tag in e]


def test_logged_figures_hold_together(demonstration: Demonstration) -> None:
    for entry in entries(demonstration.folder):
        for split in ("train", "test"):
            if f"{split}/kl" in entry:
                layers = entry[f"{split}_kl/layer_01"] + entry[f"{split}_kl/layer_02"]
                assert entry[f"{split}/kl"] == pytest.approx(layers, rel=1e-6)
                total = entry[f"{split}/reconstruction"] + entry[f"{split}/kl"]
                assert entry[f"{split}/negative_elbo"] == pytest.approx(total, rel=1e-6)
        if "train/loss" in entry:
            assert entry["train/loss"] >= entry["train/negative_elbo"]  # free bits
            assert entry["train/skipped_updates"] == 0
        else:
            active = [v for tag, v in entry.items() if "active_channels" in tag]
            assert all(value in (0, 1, 2) for value in active)
    rates = [entry["train/learning_rate"] for entry in training_entries(demonstration.folder)]
    # The cosine at the step taken, the one before it is counted.
    expected = [0.003 * (1 + math.cos(math.pi * step / 6)) / 2 for step in (1, 3, 5)]
    assert rates == pytest.approx(expected)


# --- The command line of the reference, and its options ---


@pytest.fixture
def made_static_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder with a few made images in the place of static MNIST."""
    rng = np.random.default_rng(0)
    arrays = {
        split: rng.integers(0, 256, (count, 98), np.uint8)
        for split, count in (("train", 60), ("valid", 8), ("test", 16))
    }
    contents = {
        split: Contents(array.shape, hashlib.sha256(array.tobytes()).hexdigest())
        for split, array in arrays.items()
    }
    monkeypatch.setattr(static_mnist, "CONTENTS", contents)
    folder = tmp_path / "made-data"
    folder.mkdir()
    np.savez_compressed(folder / "static_mnist.npz", allow_pickle=False, **arrays)
    return folder


def test_the_reference_s_command_means_what_it_meant() -> None:
    """Every option of RunConfig, those left out at the reference's defaults."""
    assert parsed(*REFERENCE_COMMAND).to_dict() == {
        "dataset": "static_mnist",
        "train_split": "train+valid",
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
        "likelihood": "bernoulli",
        "data_dep_init": True,
        "free_bits": 1.0,
        "analytical_kl": False,
        "beta_anneal": 0,
        "batch_size": 64,
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


def test_the_reference_s_command_runs(made_static_mnist: Path, tmp_path: Path) -> None:
    """As it stands, on made images and made small by options put after it."""
    small = "--zdims 2 2 --downsample 1 0 --nfilters 4 --blocks-per-layer 1 --steps 2 --device cpu"
    result = train(*REFERENCE_COMMAND, *small.split(), "--data-dir", made_static_mnist)
    assert "68 images of static_mnist (train+valid)" in result.out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("static_mnist-2-layers-")
    assert Run.open(folder).image_shape == (1, 28, 28)
    assert Run.open(folder).checkpoint_steps() == [2]
    result = run(
        *(evaluate.main, folder, "--samples", 1, "--device", "cpu"),
        *("--data-dir", made_static_mnist),
    )
    assert result.code == 0, result.err
    found = json.loads((folder / "eval" / "2" / "metrics.json").read_text())
    assert (found["dataset"], found["n_images"]) == ("static_mnist", 16)


def test_the_data_folder_may_come_from_the_environment(
    made_static_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LVAE_DATA", str(made_static_mnist))
    small = "-d static_mnist --zdims 2 --downsample 1 --nfilters 4 --steps 1 --dry-run"
    assert "68 images" in train(*small.split(), "--device", "cpu").out


def test_the_first_batch_sets_the_initial_weights() -> None:
    """With --data-dep-init a convolution's channels begin with mean 0 and deviation 0.1 on it."""

    def first_convolution(option: str) -> torch.Tensor:
        training = prepared(option)
        with torch.no_grad():
            y = training.loss_fn.guide.bottom_up.stem[0](training.batches(0))
        return torch.stack([y.mean((0, 2, 3)), y.std((0, 2, 3))])

    expected = torch.tensor([[0.0], [0.1]]).expand(2, 4)
    assert_close(first_convolution("--data-dep-init"), expected, rtol=1e-2, atol=1e-4)
    difference = first_convolution("--no-data-dep-init") - expected
    assert (difference.abs() > 0.05).any(1).all()


def test_options_of_the_network_shape_it() -> None:
    plain: Any = prepared().loss_fn
    assert any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert plain.guide.bottom_up.stem[0].stride == (1, 1)
    assert type(plain.guide.posteriors[0].merge.residual) is ResidualBlock

    bare: Any = prepared(
        *words("--no-bn --dropout 0 --merge-layers linear --no-gated --no-skip"),
        *words("--initial-downscaling --nonlin selu --residual-type cabdcabd"),
    ).loss_fn
    kinds = {type(m) for m in bare.modules()}
    assert not kinds & {nn.BatchNorm2d, nn.Dropout2d, nn.ELU}
    assert type(bare.guide.posteriors[0].merge.residual) is nn.Identity
    assert len([m for m in bare.model.modules() if isinstance(m, Merge)]) == 0
    assert bare.guide.bottom_up.stem[0].stride == (2, 2)
    block = bare.model.layers[0].blocks[0].block
    assert [type(m) for m in block] == [nn.Conv2d, nn.SELU, nn.Conv2d, nn.SELU]

    asymmetric: Any = prepared("--residual-type", "bacdbac", "--no-gated").loss_fn
    first, second = ([nn.BatchNorm2d, nn.ELU, nn.Conv2d, *d] for d in ([nn.Dropout2d], []))
    assert [type(m) for m in asymmetric.model.layers[0].blocks[0].block] == first + second


def test_the_top_prior_is_learned_or_fixed() -> None:
    for option, learned in (("--learn-top-prior", True), ("--no-learn-top-prior", False)):
        training = prepared(option)
        prior: Any = training.loss_fn.model.top_prior.mean_log_variance
        assert prior.requires_grad is learned
        trained = [p for group in training.svi.optimizer.param_groups for p in group["params"]]
        assert any(p is prior for p in trained) is learned


def test_options_of_the_objective_and_the_optimizer_reach_them() -> None:
    training = prepared(
        *words("--wd 0.25 --lr 0.5 --analytical-kl --freebits 0.75 --grad-clip 2 --grad-skip 3"),
        *words("--ema 0.5"),
    )
    (group,) = training.svi.optimizer.param_groups
    assert (group["weight_decay"], group["lr"]) == (0.25, 0.5)
    assert training.svi.elbo.analytic_kl
    assert training.svi.elbo.free_bits == 0.75
    assert (training.svi.clip_norm, training.svi.guard.skip_norm) == (2, 3)
    assert training.average is not None
    assert training.average.decay == 0.5
    assert training.evaluated_module() is training.average.module
    assert prepared("--ema", "0").average is None


def test_nocuda_is_the_cpu() -> None:
    assert train_svi.parse_arguments(["--nocuda"]).device == "cpu"
    assert train_svi.parse_arguments([]).device == "auto"


def test_a_dry_run_writes_nothing_at_all(tmp_path: Path) -> None:
    options = "--steps 4 --tr-log-interv 1 --ts-log-interv 2 --ckpt-interv 1 --ll-interv 2"
    result = train(*TINY, *options.split(), "--ll-samples", 2, "--dry-run", "--out", "run")
    assert "step 4: test ELBO" in result.err
    assert content(tmp_path) == {}


def test_the_description_is_part_of_the_run_s_name(tmp_path: Path) -> None:
    train(*TINY, "--steps", 1, "--descr", "wide / deep")
    (folder,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"digits-wide---deep-\d{8}-\d{6}", folder.name)
    assert Run.open(folder).config.descr == "wide / deep"


def test_the_kl_weight_is_annealed(tmp_path: Path) -> None:
    """From 0 over --beta-anneal steps; the loss weighs the KL with it."""
    options = words("--steps 6 --beta-anneal 4 --freebits 0 --tr-log-interv 1")
    train(*TINY, *options, "--out", "run")
    logged = training_entries(tmp_path / "run")
    weights = [entry["train/kl_weight"] for entry in logged]
    assert weights == [0, 0.25, 0.5, 0.75, 1, 1]
    for entry, weight in zip(logged, weights, strict=True):
        expected = entry["train/reconstruction"] + weight * entry["train/kl"]
        assert entry["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_a_validation_set_keeps_the_test_set_unseen(tmp_path: Path) -> None:
    result = train(*TINY, *words("--train-split train --steps 2 --out run"))
    assert "1,200 images of digits (train)" in result.out
    assert "step 2: valid ELBO" in result.err
    (entry,) = entries(tmp_path / "run")
    assert {tag.partition("/")[0] for tag in entry} - {"step", "time"} == {
        "valid",
        "valid_kl",
        "valid_active_channels",
    }


# --- The length of a run ---


def test_epochs_are_counted_in_whole_batches(tmp_path: Path) -> None:
    """1,500 images make two batches of 700, and the rest is dropped."""
    train(*LADDER, *words("--device cpu --batch-size 700 --steps 0 --epochs 3 --out run"))
    assert Run.open(tmp_path / "run").checkpoint_steps() == [6]


def test_minutes_end_a_run_without_other_bound(tmp_path: Path) -> None:
    train(*TINY, *words("--steps 0 --max-minutes 0.02 --tr-log-interv 1 --out run"))
    (step,) = Run.open(tmp_path / "run").checkpoint_steps()
    assert load(tmp_path / "run", step)["minutes"] >= 0.02
    last = entries(tmp_path / "run")[-1]
    assert last["step"] == step >= 1
    assert "test/negative_elbo" in last


# --- Resuming ---


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path) -> None:
    """Bitwise: weights, average, optimizer and random state, with dropout and a moving average."""
    options = [*TINY, *words("--lr-decay none --dropout 0.2 --ema 0.9 --tr-log-interv 1")]
    train(*options, "--steps", 6, "--out", "unbroken")
    train(*options, "--steps", 3, "--out", "broken")
    train("--resume", "broken", "--steps", 6, "--device", "cpu")
    states = [load(tmp_path / name, 6) for name in ("unbroken", "broken")]
    for state in states:
        assert state.pop("minutes") > 0
    assert_close(states[1], states[0], rtol=0, atol=0)

    one, two = (training_entries(tmp_path / name) for name in ("unbroken", "broken"))
    assert [entry["step"] for entry in two] == [1, 2, 3, 4, 5, 6]
    varying = {"time", "train/images_per_second"}
    for a, b in zip(one, two, strict=True):
        assert {k: a[k] for k in a.keys() - varying} == {k: b[k] for k in b.keys() - varying}
    assert Run.open(tmp_path / "broken").config == Run.open(tmp_path / "unbroken").config


def test_what_came_after_the_checkpoint_is_logged_once(tmp_path: Path) -> None:
    """A run that was killed between checkpoints logs those steps anew."""
    options = words("--lr-decay none --tr-log-interv 1 --ckpt-interv 2")
    train(*TINY, *options, "--steps", 5, "--out", "run")
    folder = tmp_path / "run"
    (folder / "checkpoints" / "5.pt").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/lo')  # cut short
    train("--resume", "run", "--steps", 6, "--device", "cpu")
    assert [entry["step"] for entry in training_entries(folder)] == [1, 2, 3, 4, 5, 6]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    options = words("--lr-decay none --ckpt-interv 1 --keep-checkpoints 2 --steps 4")
    train(*TINY, *options, "--out", "run")
    assert Run.open(tmp_path / "run").checkpoint_steps() == [3, 4]
    train("--resume", "run", "--steps", 5, "--keep-checkpoints", 1, "--device", "cpu")
    assert Run.open(tmp_path / "run").checkpoint_steps() == [5]
    assert Run.open(tmp_path / "run").config.steps == 5


def test_a_finished_run_is_not_resumed(run_folder: Path) -> None:
    before = content(run_folder)
    for options in ([], ["--steps", 6], ["--steps", 5]):
        line = refusal(train_svi.main, "--resume", run_folder, "--device", "cpu", *options)
        assert f"{run_folder} has come to its end at step 6" in line
        assert "--steps" in line
    assert content(run_folder) == before


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (["--wd", "0.5"], "weight_decay"),
        (["--zdims", "2", "3"], "z_dims"),
        (["--seed", "1"], "seed"),
        (["--batch-size", "16"], "batch_size"),
        (["--no-gated"], "gated"),
        (["--dataset", "mnist"], "dataset"),
    ],
)
def test_what_cannot_be_changed_is_refused(run_folder: Path, option: list[str], name: str) -> None:
    before = content(run_folder)
    line = refusal(train_svi.main, "--resume", run_folder, "--steps", 7, *option)
    assert re.search(rf"\b{name} \S.*cannot be changed", line)
    assert content(run_folder) == before


def test_the_same_value_is_no_change(run_folder: Path) -> None:
    same = words("--zdims 2 2 --lr 0.003 --steps 7 --device cpu")
    train("--resume", run_folder, *same)
    assert Run.open(run_folder).checkpoint_steps() == [6, 7]


def test_a_run_goes_on_in_another_precision(run_folder: Path) -> None:
    """As on another machine; evaluations stay in float32, and so do the weights."""
    train("--resume", run_folder, *words("--steps 7 --precision bf16 --compile no --device cpu"))
    assert Run.open(run_folder).config.precision == "bf16"
    state = load(run_folder, 7)
    assert {w.dtype for w in state["weights"].values()} <= {torch.float32, torch.int64}
    means = entries(run_folder)[-1]
    assert math.isfinite(means["test/negative_elbo"])
    line = refusal(
        *(train_svi.main, "--resume", run_folder),
        *words("--steps 8 --precision tf32 --device cpu"),
    )
    assert "--precision tf32 is a GPU's" in line


@pytest.mark.parametrize(
    "options", [["--out", "other"], ["--preset", "digits"], ["--dry-run"]], ids=" ".join
)
def test_resuming_takes_the_run_as_it_is(run_folder: Path, options: list[str]) -> None:
    line = refusal(train_svi.main, "--resume", run_folder, "--steps", 7, *options)
    assert options[0] in line


# --- Bad input: one line, exit code 2, nothing written ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--preset mnist-99", ["'mnist-99'", "mnist-12"]),
        ("--dataset mnits", ["'mnits'", *NAMES]),
        ("--dataste digits", ["--dataste"]),
        ("--step 3", ["--step"]),  # no abbreviations
        ("something", ["something"]),
        ("--zdims 2 2 2", ["--zdims", "3 layers", "--downsample 2"]),
        ("--downsample 1", ["--zdims", "2 layers", "--downsample 1"]),
        ("--downsample 0 2", ["--downsample", "2 halvings", "--blocks-per-layer is 1"]),
        ("--zdims", ["--zdims"]),
        ("--zdims 2 0", ["--zdims", "at least 1"]),
        ("--downsample 0 -1", ["--downsample", "not negative"]),
        ("--batch-size 0", ["--batch-size", "at least 1"]),
        ("--batch-size 1501", ["1501", "1500"]),
        ("--steps -5", ["--steps", "not negative"]),
        ("--lr -0.1", ["--lr", "positive"]),
        ("--lr nan", ["--lr", "nan"]),
        ("--lr inf", ["--lr", "inf"]),
        ("--freebits nan", ["--freebits", "nan"]),
        ("--max-minutes inf", ["--max-minutes", "inf"]),
        ("--dropout 1", ["--dropout", "below 1"]),
        ("--ema -0.5", ["--ema", "at least 0"]),
        ("--seed -1", ["--seed is -1"]),
        ("--seed 99999999999999999999999", ["--seed"]),
        ("--lr fast", ["--lr", "'fast'"]),
        ("--steps 1.5", ["--steps", "'1.5'"]),
        ("--nfilters many", ["--nfilters", "'many'"]),
        ("--nonlin gelu", ["--nonlin", "'gelu'", "elu"]),
        ("--likelihood poisson", ["--likelihood", "'poisson'", "discr_log_mix"]),
        ("--likelihood discr_log_mix", ["discr_log_mix", "3"]),
        ("--zdims 2 2 2 --downsample 1 1 1 --batch-size 1", ["--batch-size is 1", "--no-bn"]),
        ("--lr-decay cosine --steps 0", ["--lr-decay", "--steps", "--epochs", "--max-minutes"]),
        ("--device tpu", ["'tpu'", "cpu"]),
        ("--device nonsense", ["'nonsense'", "cpu"]),
    ],
)
def test_wrong_options_are_refused(options: str, named: list[str], tmp_path: Path) -> None:
    line = refusal(train_svi.main, *TINY, "--steps", 1, *options.split(), "--out", "run")
    for name in named:
        assert name in line
    assert content(tmp_path) == {}


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_gpu_that_is_not_there_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(train_svi.main, *TINY, "--device", name, "--out", "run")
    assert f"'{name}'" in line
    assert "--device cpu" in line
    assert content(tmp_path) == {}


def test_a_folder_with_another_run_is_left_alone(run_folder: Path) -> None:
    before = content(run_folder)
    line = refusal(train_svi.main, *TINY, "--steps", 1, "--out", run_folder)
    assert f"{run_folder} holds another run" in line
    assert f"--resume {run_folder}" in line
    assert content(run_folder) == before


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine too")
    before = content(tmp_path)
    for name in ("mine", "file", "file/run"):
        line = refusal_after_preparing(*TINY, "--steps", 1, "--out", name)
        assert name in line
        assert "folder" in line
    assert content(tmp_path) == before


def refusal_after_preparing(*arguments: object) -> str:
    """The one line with which a run ends that may have told of its progress before."""
    result = run(train_svi.main, *arguments)
    *progress, line = result.err.splitlines(keepends=True)
    assert is_one_line_error(Result(result.code, result.out, line)), result
    assert all(re.match(r"step \d+: ", told) for told in progress), result
    return line


def full_disk(*args: Any, **kwargs: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", full_disk)
    line = refusal_after_preparing(*TINY, "--steps", 1, "--out", "run")
    assert "config.json" in line
    assert "No space left on device" in line
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_without_write_access_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*args: Any, **kwargs: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    line = refusal_after_preparing(*TINY, "--steps", 1, "--out", "run")
    assert "Permission denied" in line
    assert content(tmp_path) == {}


# --- Bad run folders ---


class Malicious:
    """Unpickling this would call `function`, which leaves something called `executed`."""

    def __init__(self, function: Callable[..., Any], *arguments: str) -> None:
        self.function = function
        self.arguments = arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.fixture(params=["train_svi", "evaluate"])
def open_run(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """How each script refuses a run folder, which it must leave as it is."""

    def refused(folder: Path) -> str:
        before = content(folder)
        if request.param == "train_svi":
            line = refusal(train_svi.main, "--resume", folder, "--steps", 7, "--device", "cpu")
        else:
            line = refusal(evaluate.main, folder, "--device", "cpu", "--samples", 1)
        assert content(folder) == before
        return line

    return refused


def test_a_folder_that_is_no_run_is_refused(
    open_run: Callable[[Path], str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file", "nowhere"):
        line = open_run(tmp_path / name)
        assert f"{tmp_path / name} is not a run folder" in line
        assert "config.json" in line
    assert not (tmp_path / "nowhere").exists()


def test_a_run_without_checkpoint_is_not_evaluated(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "checkpoints")
    line = refusal(evaluate.main, run_folder, "--device", "cpu", "--samples", 1)
    assert f"{run_folder} has no checkpoint" in line


@pytest.mark.parametrize("kind", ["truncated", "empty", "text"])
def test_a_damaged_checkpoint_is_refused(
    kind: str, open_run: Callable[[Path], str], run_folder: Path
) -> None:
    """By training, where there is none before it."""
    (run_folder / "checkpoints" / "4.pt").unlink()
    path = run_folder / "checkpoints" / "6.pt"
    whole = path.read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello"}[kind])
    line = open_run(run_folder)
    assert str(path) in line
    assert "not a checkpoint" in line


@pytest.mark.parametrize(
    "trap", [Malicious(os.mkdir, "executed"), Malicious(open, "executed", "w")]
)
def test_a_checkpoint_that_would_run_code_is_refused(
    trap: Malicious, open_run: Callable[[Path], str], run_folder: Path, tmp_path: Path
) -> None:
    """And nobody is told how to run it."""
    (run_folder / "checkpoints" / "4.pt").unlink()
    path = run_folder / "checkpoints" / "6.pt"
    with path.open("wb") as file:
        torch.save({"format": FORMAT, "step": 6, "weights": trap}, file)
    line = open_run(run_folder)
    assert str(path) in line
    assert "not a checkpoint" in line
    assert not (tmp_path / "executed").exists()
    assert "weights_only" not in line
    assert "can still be loaded" not in line


@pytest.mark.parametrize("trap", [Malicious(os.mkdir, "executed")])
def test_the_trap_of_these_tests_works(trap: Malicious, tmp_path: Path) -> None:
    torch.save(trap, tmp_path / "trap.pt")
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("foreign", [{"weight": torch.zeros(2)}, torch.zeros(2), [1, 2]])
def test_a_foreign_torch_file_is_refused(
    foreign: Any, open_run: Callable[[Path], str], run_folder: Path
) -> None:
    path = run_folder / "checkpoints" / "6.pt"
    torch.save(foreign, path)
    assert f"{path} is not a checkpoint of this project" in open_run(run_folder)


@pytest.mark.parametrize("missing", ["average", "step"])
def test_a_checkpoint_that_lacks_something_is_refused(
    missing: str, open_run: Callable[[Path], str], run_folder: Path
) -> None:
    remove_from_checkpoint(run_folder, missing)
    assert "6.pt" in open_run(run_folder)


@pytest.mark.parametrize("missing", ["weights", "optimizer", "cpu_random_state"])
def test_a_checkpoint_that_lacks_what_training_needs_is_refused(
    missing: str, run_folder: Path
) -> None:
    remove_from_checkpoint(run_folder, missing)
    before = content(run_folder)
    line = refusal(train_svi.main, "--resume", run_folder, "--steps", 7, "--device", "cpu")
    assert "6.pt" in line
    assert content(run_folder) == before


@pytest.mark.parametrize("average", [{}, [], 0.5], ids=str)
def test_a_checkpoint_with_a_damaged_average_is_refused(
    average: Any, open_run: Callable[[Path], str], run_folder: Path
) -> None:
    """Other weights are not scored silently in its place."""
    state = load(run_folder, 6) | {"average": average}
    write_checkpoint(run_folder / "checkpoints" / "6.pt", state)
    line = open_run(run_folder)
    assert "6.pt is not a checkpoint" in line
    assert "average" in line


def remove_from_checkpoint(folder: Path, name: str) -> None:
    state = load(folder, 6)
    del state[name]
    write_checkpoint(folder / "checkpoints" / "6.pt", state)


def test_the_checkpoint_of_another_network_is_refused(
    open_run: Callable[[Path], str], run_folder: Path
) -> None:
    train(*TINY, "--zdims", 2, 3, "--steps", 1, "--out", "other")
    shutil.copy("other/checkpoints/1.pt", run_folder / "checkpoints" / "6.pt")
    assert "does not fit the network in config.json" in open_run(run_folder)


def changed(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content | {"config": content["config"] | changes}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed(colour="red", shape="round"), "unknown entries: colour, shape"),
        (changed(lr="fast"), "--lr is 'fast'; it must be a number"),
        (changed(steps=2.5), "--steps is 2.5; it must be a whole number"),
        (changed(steps=True), "--steps is True; it must be a whole number"),
        (changed(gated=1), "--bn|gated is 1; it must be true or false"),
        (changed(z_dims=[]), "--zdims is []; it must be a list of whole numbers"),
        (changed(z_dims=[2, "2"]), "--zdims is [2, '2']"),
        (changed(dataset=3), "--dataset is 3; it must be text"),
        (changed(dataset="nothing"), "--dataset is 'nothing'"),
        (changed(lr=math.nan), "--lr is nan"),
        (changed(z_dims=[2]), "--zdims lists 1 layers but --downsample 2"),
        (lambda content: content | {"config": None}, "not a JSON object"),
        (lambda content: content | {"format": 99}, "format 2"),
        (lambda content: content | {"image_shape": [1, 8]}, "image_shape"),
        (lambda content: content | {"image_shape": [1, 8, -8]}, "image_shape"),
        (lambda content: [content], "format 2"),
    ],
)
def test_a_changed_configuration_is_refused(
    change: Callable[[dict[str, Any]], Any],
    named: str,
    open_run: Callable[[Path], str],
    run_folder: Path,
) -> None:
    path = run_folder / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    line = open_run(run_folder)
    assert str(path) in line
    assert any(part in line for part in named.split("|"))


@pytest.mark.parametrize("text", [b"", b'{"format": 1, "conf', b"\xff\xfe\x00"])
def test_a_damaged_configuration_is_refused(
    text: bytes, open_run: Callable[[Path], str], run_folder: Path
) -> None:
    path = run_folder / "config.json"
    path.write_bytes(text)
    assert f"{path} is damaged" in open_run(run_folder)


# --- Bad data, and bad options of the evaluation ---


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_without_network_the_data_can_be_put_there_by_hand(tmp_path: Path) -> None:
    """The line says which file is missing, why, and where to put what."""
    data = tmp_path / "data"
    proxy = f"http://127.0.0.1:{closed_port()}"
    result = script(
        *("train_svi.py", "--preset", "mnist-3", "--device", "cpu"),
        *("--out", tmp_path / "run", "--data-dir", data),
        **{"http_proxy": proxy, "HTTP_PROXY": proxy, "no_proxy": "", "NO_PROXY": ""},
    )
    assert is_one_line_error(result), result
    assert str(data / "static_mnist.npz") in result.err
    assert "Connection refused" in result.err
    for name in static_mnist.MD5:
        assert name in result.err
    assert f"into {data}" in result.err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_truncated_data_set_is_refused(
    kept: float, made_static_mnist: Path, tmp_path: Path
) -> None:
    path = made_static_mnist / "static_mnist.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    before = content(tmp_path)
    line = refusal(
        *(train_svi.main, "-d", "static_mnist", "--device", "cpu", "--out", "run"),
        *("--data-dir", made_static_mnist),
    )
    assert f"{path} is damaged" in line
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--samples 0", ["--samples is 0", "positive"]),
        ("--samples -1 5", ["--samples"]),
        ("--samples 3 2", ["--samples is 3 2", "rise"]),
        ("--samples 3 3", ["--samples is 3 3", "rise"]),
        ("--samples", ["--samples"]),
        ("--samples ten", ["--samples", "'ten'"]),
        ("--split validation", ["--split", "'validation'", "valid"]),
        ("--limit 0", ["--limit is 0", "at least 1"]),
        ("--limit -3", ["--limit is -3", "at least 1"]),
        ("--limit 298", ["--limit is 298", "297"]),
        ("--batch-size 0", ["--batch-size is 0", "at least 1"]),
        ("--checkpoint 5", ["no checkpoint of step 5", "4, 6"]),
        ("--checkpoint first", ["--checkpoint is 'first'", "last"]),
        ("--checkpoint -4", ["--checkpoint"]),
        ("--checkpoint 4.0", ["--checkpoint is '4.0'"]),
        ("--seed -1", ["--seed is -1"]),
        ("--seed 99999999999999999999999", ["--seed"]),
        ("--device tpu", ["'tpu'"]),
        ("--steps 3", ["--steps"]),
    ],
)
def test_wrong_options_of_the_evaluation_are_refused(
    options: str, named: list[str], run_folder: Path
) -> None:
    before = content(run_folder)
    line = refusal(evaluate.main, run_folder, *words("--device cpu --samples 1"), *options.split())
    for name in named:
        assert name in line
    assert content(run_folder) == before


def test_the_evaluation_needs_a_run() -> None:
    assert "RUN" in refusal(evaluate.main)


def test_a_full_disk_is_told_by_the_evaluation(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(run_folder)
    monkeypatch.setattr(os, "replace", full_disk)
    line = refusal(evaluate.main, run_folder, "--samples", 1, "--device", "cpu")
    assert "No space left on device" in line
    # What has been scored is kept, for the next try.
    after = content(run_folder)
    assert {name: after[name] for name in after if ".progress" not in name} == before
