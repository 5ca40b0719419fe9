"""Loading a trained ladder in Python, and the images that it accepts."""

from pathlib import Path

import pytest
import torch

from ladder import Ladder
from ladder_vae.runs.run import Run
from runtime.errors import UserError


def test_a_ladder_is_loaded_from_a_run_or_its_folder(trained_run: Path) -> None:
    first = Ladder.load(str(trained_run), device="cpu")
    second = Ladder.load(Run.open(trained_run), checkpoint=30, device=torch.device("cpu"))
    assert (first.step, first.depth, first.weights) == (30, 2, "average")
    assert not first.model.training
    assert not first.guide.training
    for one, other in zip(first.guide.parameters(), second.guide.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_and_its_weights_are_chosen(trained_run: Path) -> None:
    ladder = Ladder.load(trained_run, checkpoint=20, average=False, device="cpu")
    assert (ladder.step, ladder.weights) == (20, "last")
    with pytest.raises(UserError, match="no checkpoint"):
        Ladder.load(trained_run, checkpoint=7, device="cpu")


def test_only_images_that_fit_are_loaded(trained_run: Path, tmp_path: Path) -> None:
    ladder = Ladder.load(trained_run, device="cpu")
    images = ladder.images("test", tmp_path)
    assert (images.name, images.split, len(images)) == ("digits", "test", 297)
    with pytest.raises(UserError, match=r"those of cifar10 are \(3, 32, 32\)"):
        ladder.images("test", tmp_path, "cifar10")
