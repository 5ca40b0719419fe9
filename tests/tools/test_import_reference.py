"""Weights of the original implementation become run folders that evaluate.py evaluates."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import datasets
import train_svi
from elbo import FreeBitsELBO
from ladder import Ladder
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.runs.run import Run
from runtime.errors import UserError
from tests.commands import refusal, run, words
from tests.runs.test_presets import made_images
from tools import import_reference
from tools.import_reference import config_from_case, from_reference, read_weights

WEIGHTS = Path(__file__).parents[1] / "golden" / "run_2000.npz"
# The options that they were trained with, on the command line and by the reference's names.
OPTIONS = words(
    "--zdims 8 8 8 --downsample 1 1 1 --blocks-per-layer 1 --nfilters 16 --skip --gated "
    "--learn-top-prior --freebits 0.5"
)
CASE: dict[str, Any] = {
    "color_ch": 1,
    "img_shape": [28, 28],
    "z_dims": [8, 8, 8],
    "blocks_per_layer": 1,
    "downsample": [1, 1, 1],
    "n_filters": 16,
    "nonlin": "elu",
    "merge_type": "residual",
    "res_block_type": "bacdbacd",
    "batchnorm": True,
    "dropout": 0.2,
    "gated": True,
    "stochastic_skip": True,
    "free_bits": 0.5,
    "learn_top_prior": True,
    "likelihood_form": "bernoulli",
    "analytical_kl": False,
    "no_initial_downscaling": False,
}


def command(out: Path, weights: Path = WEIGHTS, *changes: str) -> list[str]:
    return [str(weights), *OPTIONS, *changes, "--step", "2000", "--out", str(out)]


# --- The run folder ---


def test_weights_become_a_run(tmp_path: Path) -> None:
    """The checkpoint holds exactly the arrays of the file."""
    result = run(import_reference.main, *command(tmp_path / "run"))
    assert result.code == 0, result.err
    ladder = Ladder.load(tmp_path / "run", device="cpu")
    assert (ladder.step, ladder.weights, ladder.run.image_shape) == (2000, "last", (1, 28, 28))
    assert ladder.run.config.free_bits == 0.5
    state = read_weights(WEIGHTS)
    tensors = import_reference.reference_tensors(ladder.model, ladder.guide, state.keys())
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    assert count_parameters(ladder.model, ladder.guide) == 94_193


def test_training_cannot_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint of the original implementation has no optimizer state."""
    arguments = command(tmp_path / "run", WEIGHTS, "--batch-size", "4")
    assert import_reference.main(arguments) == 0
    monkeypatch.setattr(datasets, "load", made_images)
    line = refusal(train_svi.main, "--resume", tmp_path / "run", "--steps", 3000)
    assert "the checkpoint holds only weights" in line


def test_files_of_torch_give_the_same_run(tmp_path: Path) -> None:
    """The original saves its state dict with torch.save."""
    torch.save(read_weights(WEIGHTS), tmp_path / "weights.pt")
    assert import_reference.main(command(tmp_path / "a")) == 0
    assert import_reference.main(command(tmp_path / "b", tmp_path / "weights.pt")) == 0
    a, b = (
        Run.open(tmp_path / name).load_checkpoint(None, torch.device("cpu"))["weights"]
        for name in "ab"
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# --- The pair ---


def test_the_reference_s_options_are_read() -> None:
    config = config_from_case(CASE)
    assert (config.n_filters, config.dropout, config.merge_layers) == (16, 0.2, "residual")
    assert (config.skip, config.gated, config.initial_downscaling) == (True, True, True)
    assert not config_from_case(CASE | {"no_initial_downscaling": True}).initial_downscaling
    assert config_from_case(CASE | {"dropout": None}).dropout == 0


def test_trained_weights_give_a_trained_ladder() -> None:
    """A blank image scores far above chance, and above random images."""
    model: Any
    guide: Any
    model, guide = from_reference(CASE, read_weights(WEIGHTS))
    model.eval()
    guide.eval()
    torch.manual_seed(0)
    x = torch.cat([torch.zeros(1, 1, 28, 28), torch.rand(3, 1, 28, 28).round()])
    with torch.no_grad():
        terms = FreeBitsELBO().compute_terms(model, guide, x)
    assert terms.kl.shape == (4, 3)
    assert terms.elbo.isfinite().all()
    chance = -784 * math.log(2)
    assert terms.elbo[0] > 0.5 * chance
    assert (terms.elbo[1:] < terms.elbo[0]).all()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n_filters": 8}, "has shape (16, 1, 5, 5) in the reference's weights but (8, 1, 5, 5)"),
        ({"z_dims": [8, 8, 4]}, "shape"),
        ({"color_ch": 3}, "shape"),
        ({"z_dims": [8, 8], "downsample": [1, 1]}, "lack"),
        ({"z_dims": [8] * 4, "downsample": [1] * 4}, "layers in bottom_up_layers.3"),
        ({"blocks_per_layer": 2}, "have 0 layers in bottom_up_layers.0.net.1.res"),
        ({"batchnorm": False}, "layers in first_bottom_up.2.res"),
        ({"gated": False}, "layers in"),
        (
            {"stochastic_skip": False},
            "has no weights top_down_layers.0.skip_connection_merger",
        ),
        ({"merge_type": "linear"}, ""),
        ({"downsample": [1, 1, 0]}, "has no weights"),
    ],
    ids=str,
)
def test_weights_of_another_network_are_refused(change: dict[str, Any], complaint: str) -> None:
    """One line names a difference and the remedy."""
    weights = read_weights(WEIGHTS)
    with pytest.raises(UserError) as caught:
        from_reference(CASE | change, weights)
    line = str(caught.value)
    assert complaint in line
    assert line.endswith("give the options that it was trained with")
    assert line.isprintable()


# --- Wrong commands and files ---


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("--zdims 8 8", "--zdims lists 2 layers but --downsample 3"),
        ("--nfilters 8", "has shape (16, 1, 5, 5)"),
        ("--step -1", "--step: -1 is too small"),
    ],
)
def test_wrong_commands_make_no_run(tmp_path: Path, change: str, complaint: str) -> None:
    arguments = [*command(tmp_path / "run"), *words(change)]
    assert complaint in refusal(import_reference.main, *arguments)
    assert not (tmp_path / "run").exists()


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("weights")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    torch.save(["a", "list"], tmp_path / "list.pt")
    torch.save(torch.zeros(2), tmp_path / "tensor.pt")
    torch.save({"a": 1}, tmp_path / "number.pt")
    names = ("text.pt", "other.npz", "list.pt", "tensor.pt", "number.pt", "none.npz", "none.pt")
    for name in names:
        line = refusal(import_reference.main, *command(tmp_path / "run", tmp_path / name))
        assert str(tmp_path / name) in line
        assert not (tmp_path / "run").exists()


def read_refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_weights(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_arrays_that_are_not_weights_are_skipped(tmp_path: Path) -> None:
    arrays = {"state/a.weight": np.ones(2), "x": np.ones(3)}
    np.savez(tmp_path / "weights.npz", allow_pickle=False, **arrays)
    assert list(read_weights(tmp_path / "weights.npz")) == ["a.weight"]


@pytest.mark.parametrize("name", ["weights.npz", "weights.pt"])
@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_truncated_files_are_refused(name: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".npz":
        whole = WEIGHTS.read_bytes()
    else:
        torch.save({"weight": torch.zeros(1000)}, path)
        whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert f"{path} is damaged or not" in read_refusal(path)


class Malicious:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("executed", "w")


def test_reading_runs_no_code_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Malicious(), tmp_path / "weights.pt")
    objects = {"state/a": np.array([Malicious()], dtype=object)}
    np.savez(tmp_path / "weights.npz", allow_pickle=True, **objects)
    for name in ("weights.pt", "weights.npz"):
        assert f"{tmp_path / name} is damaged or not" in read_refusal(tmp_path / name)
        assert not os.path.exists("executed")
