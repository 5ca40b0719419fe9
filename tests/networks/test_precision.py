"""Precision, memory layout and compiled blocks change results only by rounding."""

import copy
import shutil
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from elbo import FreeBitsELBO
from ladder_vae.networks.blocks import BlockStyle, ParameterConv, ResidualBlock, residual_blocks
from ladder_vae.networks.precision import Execution
from ladder_vae.runs.options import RunConfig

CPU = torch.device("cpu")
CHANNELS_LAST = torch.channels_last


@pytest.fixture
def loss_fn(make_pair: Callable[..., tuple[Any, Any]]) -> Any:
    """The objective of a ladder with all options on, but without dropout noise."""
    pair = make_pair(n_filters=8, gated=True, skip=True, dropout=0.0, learn_top_prior=True)
    return FreeBitsELBO(0.5)(*pair)


def passed(loss_fn: Any, x: Tensor, execution: Execution) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a pass with `execution`, and its gradients, from a fixed seed."""
    torch.manual_seed(3)
    with execution.autocast(CPU):
        loss = loss_fn(x)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in loss_fn.named_parameters()}


def test_the_layout_changes_no_more_than_rounding(loss_fn: Any, x: Tensor) -> None:
    other = copy.deepcopy(loss_fn)
    Execution().prepare(other)
    convolutions = [m for m in other.modules() if isinstance(m, nn.Conv2d)]
    assert all(conv.weight.is_contiguous(memory_format=CHANNELS_LAST) for conv in convolutions)
    loss, gradients = passed(loss_fn, x, Execution(channels_last=False))
    found, others = passed(other, x, Execution())
    assert_close(found, loss, rtol=1e-5, atol=0)
    assert gradients.keys() == others.keys()
    # A bias before batch normalisation has a gradient of zero up to rounding.
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def test_no_feature_map_falls_back_to_another_layout(loss_fn: Any, x: Tensor) -> None:
    """Forward and backward: otherwise all later layers would copy between layouts."""
    Execution().prepare(loss_fn)
    fallen: list[str] = []

    def watch(name: str, maps: Any) -> None:
        # With one channel or one position the two layouts are the same.
        if not all(h is None or h.is_contiguous(memory_format=CHANNELS_LAST) for h in maps):
            fallen.append(name)

    for name, module in loss_fn.named_modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda m, i, o, name=name: watch(name, (*i, o)))
            module.register_full_backward_hook(
                lambda m, i, o, name=name: watch(name, (*i, *o))  # type: ignore[misc]
            )
    loss_fn(x.to(memory_format=CHANNELS_LAST)).backward()
    assert fallen == []


def test_in_bf16_all_but_the_networks_is_in_single_precision(loss_fn: Any, x: Tensor) -> None:
    """Only feature maps are in bfloat16, not latents, log-probabilities or parameters."""
    execution = Execution("bf16")
    maps: list[Tensor] = []
    for module in loss_fn.modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_hook(lambda m, i, o: maps.append(o))
    with execution.autocast(CPU), pyro.validation_enabled(False):
        loss = loss_fn(x)
        loss_fn.guide(x)
        model_trace, guide_trace = loss_fn.guide.get_traces()
    assert {h.dtype for h in maps} == {torch.bfloat16}
    assert loss.dtype == torch.float32
    assert {t.dtype for t in loss_fn.elbo.terms} == {torch.float32}
    for trace in (model_trace, guide_trace):
        for name in trace.stochastic_nodes:
            site = trace.nodes[name]
            base = site["fn"].base_dist
            assert {site["value"].dtype, base.loc.dtype, base.scale.dtype} == {torch.float32}
    assert model_trace.nodes["x"]["fn"].base_dist.logits.dtype == torch.float32
    loss.backward()
    assert {p.grad.dtype for p in loss_fn.parameters()} == {torch.float32}


def test_heads_are_exact_in_bf16() -> None:
    """`ParameterConv` does not round its input or its output."""
    conv, h = ParameterConv(3, 2), torch.randn(2, 3, 5, 5)
    expected = nn.functional.conv2d(h, conv.weight, conv.bias, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(h), expected)
        rounded = conv(h.bfloat16())
    assert_close(
        rounded, nn.functional.conv2d(h.bfloat16().float(), conv.weight, conv.bias, padding=1)
    )


def test_bf16_is_near(loss_fn: Any, x: Tensor) -> None:
    """Log-likelihood and KL agree within bfloat16's precision of 8 bits."""
    Execution().prepare(loss_fn)
    loss_fn.eval()
    terms = []
    for precision in ("float32", "bf16"):
        torch.manual_seed(1)
        with torch.no_grad(), Execution(precision).autocast(CPU), pyro.validation_enabled(False):
            loss_fn(x)
        terms.append(loss_fn.elbo.terms)
    assert not torch.equal(terms[0].elbo, terms[1].elbo)
    assert_close(terms[1].log_likelihood, terms[0].log_likelihood, rtol=0.02, atol=0.05)
    assert_close(terms[1].kl, terms[0].kl, rtol=0.02, atol=0.05)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compiled_blocks_do_the_same() -> None:
    """Compilation keeps the weights' names and values, and compiles equal blocks once."""
    style = BlockStyle(4, "bacdbac", "elu", batchnorm=True, dropout=0.0, gated=False)
    blocks = residual_blocks(style, 2)
    compiled = copy.deepcopy(blocks)
    Execution(compile=True).prepare(compiled)
    assert list(compiled.state_dict()) == list(blocks.state_dict())
    x = torch.randn(3, 4, 6, 6).to(memory_format=CHANNELS_LAST).requires_grad_()
    torch._dynamo.utils.counters.clear()
    found = compiled(x)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert_close(found, blocks(x), rtol=1e-5, atol=1e-6)
    found.square().sum().backward()
    blocks(x).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), blocks.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)
    copied = copy.deepcopy(compiled)  # as for the moving average
    assert list(copied.state_dict()) == list(blocks.state_dict())


def test_without_a_compiler_blocks_stay_as_they_are(
    loss_fn: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning of one line gives the reason."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("No working C++ compiler found in a, b\nSet CXX.")

    monkeypatch.setattr(torch, "compile", refuse)
    Execution(compile=True).prepare(loss_fn)
    assert capsys.readouterr().err == (
        "warning: blocks run without compilation (No working C++ compiler found in a, b)\n"
    )
    assert all(module._compiled_call_impl is None for module in loss_fn.modules())


def test_what_suits_the_device() -> None:
    assert Execution.choose("float32", "auto", CPU) == Execution()
    assert Execution.choose("bf16", "yes", CPU) == Execution("bf16", compile=True)
    cuda = torch.device("cuda")
    assert Execution.choose("tf32", "auto", cuda) == Execution("tf32", compile=True)
    assert not Execution.choose("float32", "no", cuda).compile
    with pytest.raises(ValueError, match="`precision` tf32 needs a GPU; on the CPU use float32"):
        Execution.choose("tf32", "no", CPU)


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"amx_bf16": True}, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bf16"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({}, "float32"),
    ],
)
def test_auto_is_bf16_on_processors_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert Execution.choose("auto", "no", CPU) == Execution(precision)
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert Execution.choose("auto", "no", CPU) == Execution("float32")


@pytest.mark.parametrize(("supported", "precision"), [(True, "bf16"), (False, "float32")])
def test_auto_is_bf16_on_gpus_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, supported: bool, precision: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported)
    assert Execution.choose("auto", "no", torch.device("cuda")) == Execution(precision)


def test_only_tf32_lets_a_gpu_round() -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for precision, rounds in (("float32", False), ("tf32", True), ("bf16", False)):
            Execution(precision).lay_out(nn.Identity())
            assert torch.backends.cudnn.allow_tf32 == rounds
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_an_unknown_precision_is_an_error() -> None:
    with pytest.raises(ValueError, match="`precision` is 'half'; it must be one of auto, float32"):
        RunConfig.of(precision="half")
