"""The optimizer Muon: its updates, the weights it leaves to Adamax, and its state."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.durability import differences
from guide import build_ladder
from ladder_vae.networks import LadderConfig
from ladder_vae.training.muon import Muon, hidden_convolutions, orthogonalised
from tests.tiny_runs import LADDER, RESUME, stopping, train


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 30), (2, 30, 4)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_orthogonalised(shape: tuple[int, int, int], scale: float) -> None:
    """The singular vectors stay, and the singular values come close to 1."""
    torch.manual_seed(1)
    matrices = scale * torch.randn(shape, dtype=torch.float64)
    found = orthogonalised(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.mT @ found @ v.mT  # diagonal: the new singular values
    values = rotated.diagonal(dim1=1, dim2=2)
    assert_close(rotated, torch.diag_embed(values), rtol=0, atol=1e-6)
    assert values.median() == pytest.approx(1, abs=0.3)
    assert values.max() < 1.25


def test_bfloat16_is_precise_enough() -> None:
    """The singular values stay close to 1."""
    torch.manual_seed(1)
    found = orthogonalised(torch.randn(4, 32, 288).bfloat16()).float()
    values = torch.linalg.svdvals(found)
    assert (values > 0.6).all()
    assert (values < 1.3).all()


def pair() -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(2)
    return nn.Parameter(torch.randn(16, 8, 3, 3)), nn.Parameter(torch.randn(16))


def gradients(*parameters: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_the_first_update() -> None:
    """It is orthogonal to its gradient's matrix, and of a fixed size whatever the gradient's."""
    for size in (1e-4, 1e4):
        weight, bias = pair()
        gradients(weight, bias, seed=3)
        assert weight.grad is not None
        weight.grad *= size
        before = weight.detach().clone()
        Muon([weight], [bias], lr=0.1, dtype=torch.float32).step()
        update = (weight.detach() - before).flatten(1)
        assert update.square().mean().sqrt() == pytest.approx(0.1 * 0.05, rel=0.2)
        values = torch.linalg.svdvals(update) / (0.1 * 0.05 * math.sqrt(72))
        assert ((values > 0.6) & (values < 1.3)).all()
        assert (update * weight.grad.flatten(1)).sum() < 0  # downhill


def test_updates_do_not_depend_on_the_other_weights() -> None:
    """Weights of one shape are updated together, each as if it were alone."""
    weights = [nn.Parameter(torch.randn(4, 6, 3, 3)) for _ in range(3)]
    alone = copy.deepcopy(weights)
    gradients(*weights, seed=4)
    gradients(*alone, seed=4)
    Muon(weights, [nn.Parameter(torch.zeros(1))], lr=0.1, dtype=torch.float32).step()
    for weight in alone:
        Muon([weight], [nn.Parameter(torch.zeros(1))], lr=0.1, dtype=torch.float32).step()
    assert_close(weights, alone)


def test_other_weights_are_left_to_adamax() -> None:
    weight, bias = pair()
    reference = nn.Parameter(bias.detach().clone())
    muon = Muon([weight], [bias], lr=0.1, weight_decay=0.1)
    adamax = torch.optim.Adamax([reference], lr=0.1, weight_decay=0.1)
    for seed in range(3):
        gradients(weight, bias, seed=seed)
        assert bias.grad is not None
        reference.grad = bias.grad.clone()
        muon.step()
        adamax.step()
    assert torch.equal(bias, reference)


def test_weight_decay_and_momentum() -> None:
    """With L2 penalty, a zero gradient shrinks the weights; momentum outlasts the gradient."""
    weight, bias = pair()
    norm = weight.norm().item()
    weight.grad, bias.grad = torch.zeros_like(weight), torch.zeros_like(bias)
    Muon([weight], [bias], lr=0.1, weight_decay=0.1, dtype=torch.float32).step()
    assert weight.norm() < norm

    weight, bias = pair()
    muon = Muon([weight], [bias], lr=0.1, dtype=torch.float32)
    gradients(weight, bias, seed=5)
    muon.step()
    between = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    muon.step()
    assert not torch.equal(weight, between)


def test_a_restored_state_continues_alike() -> None:
    weight, bias = pair()
    muon = Muon([weight], [bias], lr=0.1)
    for seed in range(2):
        gradients(weight, bias, seed=seed)
        muon.step()
    copies = copy.deepcopy((weight, bias))
    other: Any = Muon([copies[0]], [copies[1]], lr=0.5)
    other.load_state_dict(copy.deepcopy(muon.state_dict()))
    for parameters, optimizer in (((weight, bias), muon), (copies, other)):
        gradients(*parameters, seed=7)
        optimizer.step()
    assert torch.equal(copies[0], weight)
    assert torch.equal(copies[1], bias)


def test_the_first_and_the_last_convolution_are_left_to_adamax() -> None:
    config = LadderConfig(z_dims=[2, 2], downsample=[0, 1], n_filters=4, blocks_per_layer=1)
    model, guide = build_ladder(config, (1, 8, 8))
    found = {id(weight) for weight in hidden_convolutions(model, guide)}
    named = dict([*model.named_parameters(), *guide.named_parameters()])
    convolutions = {n for n, p in named.items() if p.ndim == 4 and n.endswith("weight")}
    left = {n for n in convolutions if id(named[n]) not in found}
    assert left == {"likelihood.conv.weight", "bottom_up.stem.0.weight"}
    assert len(found) == len(convolutions) - 2


@pytest.mark.usefixtures("own_folder")
def test_a_run_with_muon_resumes_to_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, and with other weights than Adamax gives."""
    muon = (*LADDER, "--optimizer", "muon", "--steps", 4)
    assert train(*muon, "--out", "whole") == 0
    assert train(*LADDER, "--steps", 4, "--out", "adamax") == 0
    with monkeypatch.context() as patch:
        stopping(patch, lambda step: step == 2)
        assert train(*muon, "--out", "run") == 143
    assert train(*RESUME) == 0
    assert differences(Path("whole"), Path("run")) == []
    assert differences(Path("whole"), Path("adamax")) != []
