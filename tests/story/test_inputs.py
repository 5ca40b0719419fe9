"""Images that do not suit a ladder are refused at its entrance, in one sentence."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from guide import build_ladder
from ladder_vae.networks import LadderConfig

CONFIG = LadderConfig(
    z_dims=[2, 2], downsample=[0, 1], n_filters=4, blocks_per_layer=1, initial_downscaling=False
)
GOOD = torch.ones(2, 3, 8, 6)


def ladder(**options: Any) -> tuple[Any, Any]:
    config = LadderConfig(**(vars(CONFIG) | options))
    return build_ladder(config, (3, 8, 6))


@pytest.mark.parametrize(
    ("x", "kind", "message"),
    [
        (
            GOOD.numpy(),
            TypeError,
            "must be a torch.Tensor of floats of shape (N, 3, 8, 6), not a ndarray",
        ),
        (GOOD.byte(), TypeError, "in [0, 1], not torch.uint8: divide 8-bit levels by 255"),
        (GOOD.long(), TypeError, "not torch.int64"),
        (
            GOOD[0],
            ValueError,
            "must be floats of shape (N, 3, 8, 6); this tensor has shape (3, 8, 6)",
        ),
        (GOOD[:, 0], ValueError, "this tensor has shape (2, 8, 6)"),
        (
            GOOD.permute(0, 2, 3, 1),
            ValueError,
            "this tensor has shape (2, 8, 6, 3), channels last: permute it by (0, 3, 1, 2)",
        ),
        (GOOD[..., :5], ValueError, "this tensor has shape (2, 3, 8, 5)"),
        (GOOD.to("meta"), ValueError, "images are on meta, but the ladder is on cpu"),
        (255 * GOOD, ValueError, "reach from 255 to 255: divide 8-bit levels by 255"),
        (GOOD - 2, ValueError, "must be in [0, 1]; these reach from -1 to -1"),
        (GOOD * torch.nan, ValueError, "must be in [0, 1]; these reach from nan to nan"),
        (GOOD / 2, ValueError, "must be 0 or 1 for a Bernoulli likelihood"),
    ],
    ids=lambda value: None if isinstance(value, str | type) else "",
)
@pytest.mark.parametrize("which", ["model", "guide"])
def test_unsuitable_images(which: str, x: Any, kind: type[Exception], message: str) -> None:
    model, guide = ladder()
    program: Callable[[Any], Any] = model if which == "model" else guide
    with pytest.raises(kind) as caught:
        program(x)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_suitable_images() -> None:
    """Of any number, in float64 as in float32; levels for other likelihoods, any value for one."""
    for likelihood, x in {"bernoulli": GOOD, "discr_log": GOOD / 255, "gaussian": 3 * GOOD}.items():
        model, guide = ladder(likelihood=likelihood)
        for images in (x, x[:1]):
            assert model(images) is images
            assert guide(images)["x"] is images
    model, guide = (module.double() for module in ladder())
    assert guide(GOOD.double())["z_1"].dtype == torch.float64


class Waiting(TorchDispatchMode):
    """Refuses to read a number from a tensor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits"
        return func(*args, **(kwargs or {}))


def test_values_are_read_only_while_pyro_validates() -> None:
    """On a GPU the host would wait for them at each step."""
    _, guide = ladder()
    with pyro.validation_enabled(False), Waiting():
        guide(GOOD / 2)
    with pytest.raises(AssertionError, match="the host waits"), Waiting():
        guide(GOOD)


def test_a_batch_from_another_plate_keeps_its_shape(x: Tensor) -> None:
    model, _ = ladder()
    with pyro.plate("groups", 4, dim=-2):
        assert model(n=2).shape == (4, 2, 3, 8, 6)
