"""Published weights: exported, read, and refused if damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.testing import assert_close

from ladder_vae.runs.checkpoint import weights_only
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.published import export_weights, read_published
from ladder_vae.runs.run import Run
from runtime.errors import UserError


@pytest.fixture
def trained(tmp_path: Path) -> Run:
    """A run with checkpoints at two steps, whose moving averages differ from their weights."""
    run = Run.create(tmp_path / "run", RunConfig.of(dataset="digits"), (1, 8, 8), {"commit": "abc"})
    for step in (1, 2):
        weights, average = (nn.BatchNorm2d(step + 1) for _ in range(2))
        nn.init.normal_(average.weight)
        state = weights_only(weights.state_dict())
        run.save_checkpoint(step, state | {"average": {"weights": average.state_dict()}})
    return run


@pytest.mark.parametrize(("step", "expected"), [(None, 2), (1, 1)])
def test_the_average_is_published_with_its_description(
    step: int | None, expected: int, trained: Run, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    assert export_weights(trained, step, file) == expected
    description, weights = read_published(file)
    state = trained.load_checkpoint(expected, torch.device("cpu"))
    assert_close(weights, dict(state["average"]["weights"]), rtol=0, atol=0)
    assert description["step"] == expected
    copy = Run.from_description(tmp_path / "copy", description, file)
    assert (copy.config, copy.image_shape) == (trained.config, trained.image_shape)
    assert copy.provenance == trained.provenance


def test_a_missing_checkpoint_is_not_published(trained: Run, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    with pytest.raises(UserError, match="no checkpoint of step 3; it has 1, 2"):
        export_weights(trained, 3, file)
    assert not file.exists()


def without_metadata(content: bytes) -> bytes:
    return safetensors.torch.save(safetensors.torch.load(content))


def with_other_weights(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda content: content[:-4], "is damaged or not a safetensors file"),
        (lambda content: b"weights", "is damaged or not a safetensors file"),
        (lambda content: b"", "is damaged or not a safetensors file"),
        (without_metadata, "was not written by tools.export_weights"),
        (with_other_weights, "its checksum does not match"),
    ],
)
def test_other_files_are_refused(
    change: Callable[[bytes], bytes], complaint: str, trained: Run, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    export_weights(trained, None, file)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError) as refusal:
        read_published(file)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_published(tmp_path / "nothing")
