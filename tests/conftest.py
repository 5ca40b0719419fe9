"""What the tests share: Pyro's checks on, a clean start for each test, and tiny ladders."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor

from guide import LadderGuide
from ladder_vae.runs.options import RunConfig
from model import LadderModel

IMAGE_SHAPE = (1, 8, 10)

torch.set_num_threads(1)  # the networks are so small that threads only wait for each other


@pytest.fixture(autouse=True)
def clean_start() -> None:
    """Pyro's validation on, no parameters left from another test, and a fixed seed."""
    pyro.enable_validation(True)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.fixture
def x() -> Tensor:
    """Five binary images, all different."""
    return torch.bernoulli(torch.full((5, *IMAGE_SHAPE), 0.4))


@pytest.fixture
def tiny_config() -> Callable[..., RunConfig]:
    """A maker of configurations of tiny ladders, three layers unless told."""

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
    """A maker of tiny (model, guide), with no parameter left at a special initial value."""

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
