"""Weights trained with the reference implementation: what is read, and what is refused."""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elbo import FreeBitsELBO
from ladder_vae.networks.blocks import count_parameters
from runtime.errors import UserError
from tools.import_reference import config_from_case, from_reference, read_weights

WEIGHTS = Path(__file__).parent / "golden" / "run_2000.npz"
# What they were trained with, under the reference's names.
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


class Malicious:
    """Unpickling this would create a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("executed", "w")


def refusal(call: Callable[[], object]) -> str:
    """The one line with which `call` is refused."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert line.isprintable()  # one line, without colours
    return line


def test_the_options_are_read() -> None:
    config = config_from_case(CASE)
    assert (config.n_filters, config.free_bits, config.dropout) == (16, 0.5, 0.2)
    assert (config.skip, config.gated, config.initial_downscaling) == (True, True, True)
    assert config.merge_layers == "residual"
    assert not config_from_case(CASE | {"no_initial_downscaling": True}).initial_downscaling
    assert config_from_case(CASE | {"dropout": None}).dropout == 0


def test_trained_weights_give_a_trained_ladder() -> None:
    """94,193 parameters, each from the file; a blank image scores far above chance."""
    weights = read_weights(WEIGHTS)
    model: Any
    guide: Any
    model, guide = from_reference(CASE, weights)
    assert count_parameters(model, guide) == 94_193
    state = model.state_dict() | guide.state_dict()
    assert sum(v.numel() for v in state.values()) == sum(v.numel() for v in weights.values())
    assert torch.equal(
        model.likelihood.conv.weight.data,
        torch.as_tensor(weights["likelihood.parameter_net.weight"]),
    )
    model.eval()
    guide.eval()
    torch.manual_seed(0)
    x = torch.cat([torch.zeros(1, 1, 28, 28), torch.rand(3, 1, 28, 28).round()])
    with torch.no_grad():
        terms = FreeBitsELBO().compute_terms(model, guide, x)
    assert terms.log_likelihood.isfinite().all()
    assert terms.kl.shape == (4, 3)
    assert terms.kl.isfinite().all()
    chance = -784 * math.log(2)
    assert terms.elbo[0] > 0.5 * chance
    assert (terms.elbo[1:] < terms.elbo[0]).all()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_filters": 8}, "shape"),
        ({"z_dims": [8, 8, 4]}, "shape"),
        ({"color_ch": 3}, "shape"),
        ({"z_dims": [8, 8], "downsample": [1, 1]}, "lack"),
        ({"z_dims": [8] * 4, "downsample": [1] * 4}, "layers in bottom_up_layers.3"),
        ({"blocks_per_layer": 2}, ""),
        ({"batchnorm": False}, "layers in"),
        ({"gated": False}, "layers in"),
        ({"stochastic_skip": False}, "no place for the weights"),
        ({"merge_type": "linear"}, ""),
        ({"downsample": [1, 1, 0]}, "no place for the weights"),
    ],
    ids=str,
)
def test_weights_of_another_architecture_are_refused(change: dict[str, Any], named: str) -> None:
    """One line says what does not fit, and what to do."""
    weights = read_weights(WEIGHTS)
    line = refusal(lambda: from_reference(CASE | change, weights))
    assert named in line
    assert line.endswith("give the options that it was trained with")


def test_weights_saved_by_torch_are_read(tmp_path: Path) -> None:
    weights = {name: torch.as_tensor(value) for name, value in read_weights(WEIGHTS).items()}
    torch.save(weights, tmp_path / "weights.pt")
    again = read_weights(tmp_path / "weights.pt")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_other_arrays_of_the_file_are_left_out(tmp_path: Path) -> None:
    arrays = {"state/a.weight": np.ones(2), "x": np.ones(3)}
    np.savez(tmp_path / "weights.npz", allow_pickle=False, **arrays)
    assert list(read_weights(tmp_path / "weights.npz")) == ["a.weight"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for name in ("none.pt", "none.npz"):
        assert str(tmp_path / name) in refusal(partial(read_weights, tmp_path / name))


@pytest.mark.parametrize("name", ["weights.npz", "weights.pt"])
@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_truncated_file_is_refused(name: str, kept: float, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".npz":
        whole = WEIGHTS.read_bytes()
    else:
        torch.save({"weight": torch.zeros(1000)}, path)
        whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    assert f"{path} is damaged or not" in refusal(lambda: read_weights(path))


def test_nothing_read_from_a_file_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Malicious(), tmp_path / "weights.pt")
    objects = {"state/a": np.array([Malicious()], dtype=object)}
    np.savez(tmp_path / "weights.npz", allow_pickle=True, **objects)
    for name in ("weights.pt", "weights.npz"):
        line = refusal(partial(read_weights, tmp_path / name))
        assert f"{tmp_path / name} is damaged or not" in line
        assert not os.path.exists("executed")


@pytest.mark.parametrize("content", [torch.zeros(2), [1, 2]], ids=["tensor", "list"])
def test_a_torch_file_without_a_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pt")
    refusal(lambda: from_reference(CASE, read_weights(tmp_path / "weights.pt")))
