"""Fixtures for all tests: clean global state, tiny ladders, and trained runs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

import evaluate
import train_svi
from guide import LadderGuide
from ladder_vae.runs.options import RunConfig
from model import LadderModel
from tests.commands import run
from tests.tiny_runs import TRAINED_RUN

IMAGE_SHAPE = (1, 8, 10)

torch.set_num_threads(1)  # threads do not help networks this small
if "LVAE_TEST_GPU" not in os.environ:  # `make gpu` sets it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests fork, which CUDA forbids once it is in use


@pytest.fixture(autouse=True)
def clean_start() -> None:
    """Turn on Pyro's validation, clear its parameters, and fix the seed."""
    pyro.enable_validation(True)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `tmp_path` the current folder, and ignore LVAE_DATA."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVAE_DATA", raising=False)
    return tmp_path


@pytest.fixture
def x() -> Tensor:
    """Five binary images, all different."""
    return torch.bernoulli(torch.full((5, *IMAGE_SHAPE), 0.4))


@pytest.fixture
def tiny_config() -> Callable[..., RunConfig]:
    """Makes configurations of tiny ladders, by default with three layers."""

    def make(**options: Any) -> RunConfig:
        tiny: dict[str, Any] = {
            "z_dims": [2, 3, 2],
            "downsample": [0, 1, 1],
            "blocks_per_layer": 1,
            "n_filters": 4,
        }
        return RunConfig.of(**(tiny | options))

    return make


@pytest.fixture
def make_pair(tiny_config: Callable[..., RunConfig]) -> Callable[..., tuple[Any, Any]]:
    """Makes tiny pairs (model, guide) whose parameters have no special initial values."""

    def make(
        image_shape: tuple[int, int, int] = IMAGE_SHAPE, **options: Any
    ) -> tuple[LadderModel, LadderGuide]:
        config = tiny_config(**options)
        model = LadderModel(config.ladder, image_shape)
        guide = LadderGuide(model, config.ladder, image_shape)
        with torch.no_grad():
            for module in (model, guide):
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model, guide

    return make


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder after 30 steps on digits, for tests that only read it.

    Checkpoints of steps 20 and 30 (and of the best, 15 or 30), evaluations at 15 and 30.
    """
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run(train_svi.main, *TRAINED_RUN, "--out", folder).code == 0
    return folder


@pytest.fixture(scope="session")
def evaluated_run(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `trained_run` whose step 30 is evaluated on 40 images with 1 and 30 samples."""
    folder = Path(shutil.copytree(trained_run, tmp_path_factory.mktemp("evaluated") / "run"))
    options = "--samples 1 30 --limit 40 --device cpu".split()
    assert run(evaluate.main, folder, *options, "--out", folder / "eval" / "30").code == 0
    return folder


@pytest.fixture
def evaluated_copy(evaluated_run: Path, tmp_path: Path) -> Path:
    """A copy of `evaluated_run` that the test may change."""
    return Path(shutil.copytree(evaluated_run, tmp_path / "run"))


@pytest.fixture
def trained_copy(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of `trained_run` that the test may change."""
    return Path(shutil.copytree(trained_run, tmp_path / "run"))
