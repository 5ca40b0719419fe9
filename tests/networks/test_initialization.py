"""Initial weights: data-dependent ones, and smaller residual branches."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from ladder_vae.networks.blocks import ResidualBlock
from ladder_vae.networks.initialization import data_dependent_init, scale_branches
from tests.networks.blocks_definitions import MakePair, Noise, feature_map, noise_for


def watch_convolutions(*modules: nn.Module) -> dict[nn.Module, Tensor]:
    """The output of every convolution of the modules, as they run."""
    outputs: dict[nn.Module, Tensor] = {}
    for module in modules:
        for conv in module.modules():
            if isinstance(conv, nn.Conv2d | nn.ConvTranspose2d):
                conv.register_forward_hook(lambda m, _, y: outputs.update({m: y.detach()}))
    return outputs


@pytest.mark.parametrize("batchnorm", [False, True])
@pytest.mark.parametrize("pixel_shuffle", [False, True])
def test_data_dependent_init(
    make_pair: MakePair, x: Tensor, batchnorm: bool, pixel_shuffle: bool
) -> None:
    """On the batch that ran inside, every convolution's output has mean 0 and deviation 0.1."""
    options = {"batchnorm": batchnorm, "dropout": 0.0, "gated": True, "skip": True}
    likelihood = {"pixel_shuffle": pixel_shuffle, "likelihood": "gaussian"}
    model, guide = make_pair(**options, **likelihood, blocks_per_layer=2)
    noise = noise_for(model, len(x))
    raw = watch_convolutions(model, guide)  # before it is normalised
    with Noise(noise), data_dependent_init(model, guide):
        outputs = watch_convolutions(model, guide)  # after it is normalised
        sites = guide(x)
    convs = {
        m
        for part in (model, guide)
        for m in part.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    }
    assert outputs.keys() == convs
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in convs) == 2
    variances = {conv: y.var((0, 2, 3)) for conv, y in raw.items()}
    assert sum(bool((v > 1e-3).all()) for v in variances.values()) > 0.8 * len(convs)
    first = dict(outputs)
    with Noise(noise), torch.no_grad():
        again = guide(x)
    for conv, y in outputs.items():
        mean = y.mean((0, 2, 3))
        std = y.std((0, 2, 3))
        expected = 0.1 * (variances[conv] / (variances[conv] + 1e-5)).sqrt()
        assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)
        assert_close(std, expected, rtol=0, atol=1e-4)
        assert_close(first[conv], y, rtol=1e-3, atol=1e-4)
    for name, value in sites.items():
        assert_close(again[name], value, rtol=1e-3, atol=1e-4)
    assert all(torch.isfinite(p).all() for m in (model, guide) for p in m.parameters())


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_data_dependent_init_of_one_convolution(kind: Any, size: int) -> None:
    """The weight is rescaled per output channel, the bias shifted, by the sample's moments."""
    conv = kind(3, 5, 3, padding=1)
    x = 2 * feature_map(n=4, channels=3)[..., :size, :size] + 1
    with data_dependent_init(conv, std=0.25):
        weight = conv.weight.clone()
        assert torch.equal(conv.bias, torch.zeros(5))
        y = conv(x)
    function = F.conv2d if kind is nn.Conv2d else F.conv_transpose2d
    before = function(x, weight, padding=1)
    mean = before.mean((0, 2, 3))
    squares = ((before - mean.view(1, -1, 1, 1)) ** 2).sum((0, 2, 3))
    scale = 0.25 / (squares / (4 * size**2 - 1) + 1e-5).sqrt()
    view = (-1, 1, 1, 1) if kind is nn.Conv2d else (1, -1, 1, 1)
    assert_close(conv.weight, weight * scale.view(view), check_stride=False)
    assert_close(conv.bias, -mean * scale)
    assert_close(y, conv(x).detach(), rtol=1e-4, atol=1e-5)
    assert conv.weight.requires_grad
    assert not y.requires_grad


def test_data_dependent_init_of_dead_channels() -> None:
    """A channel that does not vary over the batch ends at zero, and everything stays finite."""
    conv: Any = nn.Conv2d(2, 3, 3, padding=1)
    with data_dependent_init(conv):
        y = conv(torch.zeros(4, 2, 5, 5))
    assert torch.equal(y, torch.zeros(4, 3, 5, 5))
    assert torch.isfinite(conv.weight).all()
    assert torch.equal(conv.bias, torch.zeros(3))


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_data_dependent_init_by_a_single_value(kind: Any) -> None:
    """One image of one pixel has no sample variance; it counts as 0."""
    conv = kind(2, 3, 1)
    x = feature_map(n=1, channels=2)[..., :1, :1]
    with data_dependent_init(conv):
        weight = conv.weight.clone()
        assert torch.equal(conv(x), torch.zeros(1, 3, 1, 1))
    assert_close(conv.weight, weight * 0.1 / 1e-5**0.5)
    assert_close(conv(x).detach(), torch.zeros(1, 3, 1, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_initial_weights_are_kaiming_normal(kind: Any) -> None:
    """Weights start at standard deviation sqrt(2 / fan-in), biases at zero."""
    conv = kind(32, 32, 3)
    with data_dependent_init(conv):
        weight = conv.weight.clone()
    n = weight.numel()
    std = (2 / (32 * 9)) ** 0.5
    assert abs(weight.mean()) < 4 * std / n**0.5
    assert abs(weight.std() - std) < 4 * std / (2 * n) ** 0.5
    # A uniform distribution would have no values beyond three standard deviations.
    assert (weight.abs() > 3 * std).any()


def test_data_dependent_init_leaves_no_hooks(make_pair: MakePair, x: Tensor) -> None:
    """After the context, even if it ended with an error, convolutions no longer change."""
    model, guide = make_pair(dropout=0.0)
    with data_dependent_init(model, guide):
        guide(x)
    with pytest.raises(ValueError, match="shape"), data_dependent_init(model, guide):
        guide(x[:, :0])
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks for part in (model, guide) for m in part.modules())
    before = [p.detach().clone() for part in (model, guide) for p in part.parameters()]
    guide(1 - x)
    for old, p in zip(before, [*model.parameters(), *guide.parameters()], strict=True):
        assert torch.equal(old, p)


def test_data_dependent_init_starts_afresh(make_pair: MakePair, x: Tensor) -> None:
    """The convolutions' old values do not matter; other parameters do not change."""
    model, guide = make_pair(dropout=0.0)
    convs = [
        m
        for part in (model, guide)
        for m in part.modules()
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
    ]
    set_here = {id(p) for conv in convs for p in conv.parameters()}
    parameters = [*model.parameters(), *guide.parameters()]
    others = [p for p in parameters if id(p) not in set_here]
    assert any(p is model.top_prior.mean_log_variance for p in others)
    kept = [p.detach().clone() for p in others]
    results = []
    for spoil in (0.0, 100.0):
        with torch.no_grad():
            for conv in convs:
                for p in conv.parameters():
                    p.add_(spoil)
        torch.manual_seed(1)
        with data_dependent_init(model, guide):
            guide(x)
        results.append([p.detach().clone() for p in parameters])
    assert_close(results[0], results[1])
    for old, p in zip(kept, others, strict=True):
        assert torch.equal(old, p)


@pytest.mark.parametrize("gated", [False, True])
def test_scaled_branches(make_pair: MakePair, gated: bool) -> None:
    """The last convolution of each branch is divided by sqrt(n); nothing else changes."""
    model, _ = make_pair(gated=gated)
    blocks = [m for m in model.modules() if isinstance(m, ResidualBlock)]
    last = {[m for m in block.modules() if isinstance(m, nn.Conv2d)][-1] for block in blocks}
    assert {conv.kernel_size for conv in last} == {(1, 1) if gated else (3, 3)}
    before = {m: [p.clone() for p in m.parameters(recurse=False)] for m in model.modules()}
    scale_branches(model)
    for module, parameters in before.items():
        factor = len(blocks) ** -0.5 if module in last else 1.0
        for now, earlier in zip(module.parameters(recurse=False), parameters, strict=True):
            assert_close(now, factor * earlier)
