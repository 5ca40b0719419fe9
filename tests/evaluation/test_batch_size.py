"""The automatic batch size."""

from typing import Any

import pytest
import torch

from guide import build_ladder
from ladder_vae.evaluation.batch_size import automatic_batch_size
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS


def size_for(image_shape: tuple[int, int, int], **options: Any) -> int:
    tiny: dict[str, Any] = {"z_dims": [1], "downsample": [0], "blocks_per_layer": 1}
    config = RunConfig.of(**(tiny | options))
    _, guide = build_ladder(config.ladder, image_shape)
    return automatic_batch_size(config.ladder, guide, torch.zeros(1, *image_shape))


@pytest.mark.parametrize(
    ("filters", "side", "expected"),
    [
        (64, 32, 64),  # 16 MiB for maps of 256 KiB
        (64, 28, 64),  # 83 maps would fit; rounded down to a power of two
        (64, 64, 16),
        (32, 32, 128),
        (33, 32, 64),
        (2, 8, 1024),  # never more
        (512, 64, 8),  # never fewer
    ],
)
def test_on_a_cpu_the_feature_maps_of_a_batch_fit_into_the_caches(
    filters: int, side: int, expected: int
) -> None:
    assert size_for((1, side, side), n_filters=filters) == expected


def test_a_larger_network_never_gets_a_larger_batch() -> None:
    sizes = [size_for((3, 32, 32), n_filters=filters) for filters in (1, 3, 8, 20, 64, 200)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size & (size - 1) == 0 for size in sizes)
    sizes = [size_for((1, side, side), n_filters=16) for side in (4, 8, 20, 32, 60, 96)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size & (size - 1) == 0 for size in sizes)


def test_the_batch_size_does_not_depend_on_the_weights_or_the_image() -> None:
    """The noise depends on the batch size, so that must not change."""
    config = RunConfig.of(**PRESETS["digits"])
    sizes = set()
    for seed in range(2):
        torch.manual_seed(seed)
        _, guide = build_ladder(config.ladder, (1, 8, 8))
        sizes.add(automatic_batch_size(config.ladder, guide, torch.rand(1, 1, 8, 8)))
    assert len(sizes) == 1
