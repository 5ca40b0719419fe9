"""Checkpoints of the original implementation become run folders that evaluate.py scores."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from ladder_vae.runs.run import Run
from runtime.errors import UserError
from tools import import_reference as reference_checkpoint

WEIGHTS = Path(__file__).parent / "golden" / "run_2000.npz"
OPTIONS = (
    "--zdims 8 8 8 --downsample 1 1 1 --blocks-per-layer 1 --nfilters 16 --skip --gated "
    "--learn-top-prior --freebits 0.5"
).split()


def convert(out: Path, weights: Path = WEIGHTS, options: list[str] = OPTIONS) -> int:
    arguments = [str(weights), *options, "--step", "2000", "--out", str(out)]
    return reference_checkpoint.main(arguments)


def test_weights_become_a_run(tmp_path: Path) -> None:
    """Every array of the file is somewhere in the checkpoint, and nothing else is."""
    assert convert(tmp_path / "run") == 0
    run = Run.open(tmp_path / "run")
    trained: Any = evaluate.Trained.load(run, None, torch.device("cpu"), average=True)
    assert (trained.step, trained.weights) == (2000, "last")
    state = reference_checkpoint.read_weights(WEIGHTS)
    tensors = reference_checkpoint.reference_tensors(trained.model, trained.guide, state.keys())
    assert tensors.keys() == state.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor.detach().numpy(), state[name])
    parameters = [*trained.model.parameters(), *trained.guide.parameters()]
    assert sum(p.numel() for p in parameters) == 94_193


def test_torch_files_are_read_too(tmp_path: Path) -> None:
    """The original saves its state dict with torch.save."""
    state = reference_checkpoint.read_weights(WEIGHTS)
    torch.save({k: torch.as_tensor(v) for k, v in state.items()}, tmp_path / "weights.pt")
    assert convert(tmp_path / "a") == convert(tmp_path / "b", tmp_path / "weights.pt") == 0
    a, b = (
        Run.open(tmp_path / name).load_checkpoint(None, torch.device("cpu"))["weights"]
        for name in "ab"
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("--zdims", "8 8"), "--zdims lists 2 layers but --downsample 3"),
        (
            ("--nfilters", "8"),
            "has shape (16, 1, 5, 5) in the reference's weights but (8, 1, 5, 5)",
        ),
        (("--blocks-per-layer", "2"), "have 0 layers in bottom_up_layers.0.net.1.res"),
        (
            ("--no-skip", ""),
            "has no place for the weights top_down_layers.0.skip_connection_merger",
        ),
        (("--no-bn", ""), "layers in first_bottom_up.2.res"),
    ],
)
def test_options_of_another_network(
    tmp_path: Path, change: tuple[str, str], complaint: str
) -> None:
    """One line says what does not fit, and no run folder is made."""
    with pytest.raises(UserError) as refusal:
        convert(tmp_path / "run", options=[*OPTIONS, change[0], *change[1].split()])
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    """Other files, missing ones and pickled objects are refused by name."""
    (tmp_path / "text.pt").write_text("weights")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    torch.save(["a", "list"], tmp_path / "list.pt")
    for name in ("text.pt", "other.npz", "list.pt", "missing.npz"):
        with pytest.raises(UserError) as refusal:
            convert(tmp_path / "run", tmp_path / name)
        assert name in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "run").exists()


def test_weights_alone_are_not_trained_further(tmp_path: Path) -> None:
    """The original's checkpoint has no state of the optimiser; evaluation is what it is for."""
    assert convert(tmp_path / "run") == 0
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["image_shape"] == [1, 28, 28]
    state = Run.open(tmp_path / "run").load_checkpoint(None, torch.device("cpu"))
    assert state["optimizer"] is None
    assert state["average"] is None
