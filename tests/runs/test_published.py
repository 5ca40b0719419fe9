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
from ladder_vae.runs.published import (
    checksum,
    is_published,
    published_weights,
    read_published,
    write_folder,
    write_weights,
)
from ladder_vae.runs.run import Run
from ladder_vae.runs.trained import load_trained
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
    write_weights(file, *published_weights(trained, step))
    description, weights = read_published(file)
    state = trained.load_checkpoint(expected, torch.device("cpu"))
    assert_close(weights, dict(state["average"]["weights"]), rtol=0, atol=0)
    assert (description["step"], description["weights"]) == (expected, "average")
    copy = Run.from_description(tmp_path / "copy", description, file)
    assert (copy.config, copy.image_shape) == (trained.config, trained.image_shape)
    assert copy.provenance == trained.provenance


def test_a_missing_checkpoint_is_not_published(trained: Run) -> None:
    with pytest.raises(UserError, match="no checkpoint of step 3; it has 1, 2"):
        published_weights(trained, 3)


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
    write_weights(file, *published_weights(trained, None))
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UserError) as refusal:
        read_published(file)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        read_published(tmp_path / "nothing")


# --- Folders ---


@pytest.fixture
def folder(trained: Run, tmp_path: Path) -> Path:
    write_folder(tmp_path / "published", *published_weights(trained, None))
    return tmp_path / "published"


def test_a_folder_holds_the_same_as_its_file(folder: Path) -> None:
    description, weights = read_published(folder)
    again, same = read_published(folder / "model.safetensors")
    assert description == again
    assert description["sha256"] == checksum(weights) == checksum(same)


def test_what_counts_as_published(folder: Path, trained: Run, tmp_path: Path) -> None:
    assert is_published(folder)
    assert is_published(folder / "model.safetensors")
    assert is_published(tmp_path / "absent.safetensors")
    assert not is_published(trained.path)
    assert not is_published(tmp_path / "absent")


def test_a_folder_with_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(UserError, match=r"published has no config\.json"):
        read_published(folder)
    (folder / "other.json").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"published is a published ladder without .*safetensors"):
        load_trained(folder)


def test_a_folder_with_the_weights_of_another_ladder_is_refused(folder: Path, trained: Run) -> None:
    write_weights(folder / "model.safetensors", *published_weights(trained, 1))
    with pytest.raises(UserError, match=r"not the file that config.json beside it describes"):
        read_published(folder)
