"""The benchmarks' harness: equal losses, equal convolutions, correct counts."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks import training
from benchmarks.harness import plain
from benchmarks.harness.convolutions import Convolutions, recorded
from benchmarks.harness.lines import Line, execution_named
from benchmarks.harness.operations import times_by_kind
from benchmarks.harness.records import merged
from benchmarks.harness.roofline import Peak, counted, least_milliseconds, totals
from benchmarks.harness.timing import medians, runs_per_turn
from elbo import FreeBitsELBO
from ladder_vae.networks.precision import Execution
from ladder_vae.training.svi import SVI
from runtime.errors import UserError
from tests.commands import refusal

MakePair = Callable[..., tuple[Any, Any]]

LADDERS: list[dict[str, Any]] = [
    {"skip": True, "gated": True, "learn_top_prior": True, "dropout": 0.3},
    {"skip": False, "merge_layers": "linear", "batchnorm": False, "dropout": 0.0},
    {"z_dims": [3], "downsample": [1], "initial_downscaling": False},
    {"likelihood": "discr_log", "skip": True, "residual_type": "cabdcabd"},
]


def ladder(make_pair: MakePair, x: Tensor, **options: Any) -> Any:
    """An ELBO module with free bits that clamp about half of the KL terms."""
    loss_fn = FreeBitsELBO(0.0)(*make_pair(tuple(x.shape[1:]), **options))
    median = loss_fn.elbo.compute_terms(loss_fn.model, loss_fn.guide, x).kl.median().item()
    assert median > 0
    loss_fn.elbo.free_bits = median
    return loss_fn


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


# --- The plain loop ---


@pytest.mark.parametrize("options", LADDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_loop_gives_our_losses_and_gradients(
    options: dict[str, Any], dtype: torch.dtype, make_pair: MakePair, x: Tensor
) -> None:
    """From the same random state, with dropout and batch normalisation."""
    ours = ladder(make_pair, x, **options).to(dtype)
    theirs = copy.deepcopy(ours)
    x = x.to(dtype)
    torch.manual_seed(1)
    expected = ours(x) / len(x)
    expected.backward()
    torch.manual_seed(1)
    loss = plain.free_bits_loss(theirs.model, theirs.guide, x, ours.elbo.free_bits)
    loss.backward()
    rounding = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert_close(loss, expected, rtol=rounding, atol=0)
    found = gradients(theirs)
    assert found.keys() == gradients(ours).keys()
    for name, gradient in gradients(ours).items():
        scale = gradient.abs().max().item()
        assert_close(found[name], gradient, rtol=0, atol=10 * rounding * scale + rounding)
    assert_close(dict(theirs.named_buffers()), dict(ours.named_buffers()))


def test_plain_steps_give_our_weights(make_pair: MakePair, x: Tensor) -> None:
    """After three steps."""
    ours = ladder(make_pair, x, **LADDERS[0]).double()
    theirs, x = copy.deepcopy(ours), x.double()
    svi = SVI(ours, torch.optim.Adamax(ours.parameters(), lr=1e-2))
    optimizer = torch.optim.Adamax(theirs.parameters(), lr=1e-2)
    for seed in range(3):
        torch.manual_seed(seed)
        expected = svi.step(x)
        torch.manual_seed(seed)
        free_bits = ours.elbo.free_bits
        loss = plain.training_step(theirs.model, theirs.guide, optimizer, x, free_bits)
        assert_close(loss, expected, rtol=1e-8, atol=0)
    assert_close(theirs.state_dict(), ours.state_dict(), rtol=1e-7, atol=1e-9)


# --- Convolutions alone ---


def convolutions_in(module: nn.Module) -> int:
    return sum(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in module.modules())


@pytest.mark.parametrize("options", LADDERS)
def test_all_convolutions_of_a_step_are_recorded(
    options: dict[str, Any], make_pair: MakePair, x: Tensor
) -> None:
    loss_fn = ladder(make_pair, x, **options)
    with recorded() as calls:
        plain.free_bits_loss(loss_fn.model, loss_fn.guide, x).backward()
    half = convolutions_in(loss_fn)
    assert [call.is_backward for call in calls] == [False] * half + [True] * half
    # All gradients are computed except that of the images, the input of the first convolution.
    masks = [call.arguments[-1] for call in calls[half:]]
    assert sorted(masks) == [[False, True, True]] + [[True, True, True]] * (half - 1)
    assert calls[0].arguments[0].shape[1] == x.shape[1]
    Convolutions(calls, x.device).run()


def test_convolutions_keep_layout_and_precision(make_pair: MakePair, x: Tensor) -> None:
    loss_fn = ladder(make_pair, x, **LADDERS[0]).to(memory_format=torch.channels_last)
    with recorded() as calls, torch.autocast("cpu", torch.bfloat16):
        plain.free_bits_loss(loss_fn.model, loss_fn.guide, x).backward()
    forward = [call for call in calls if not call.is_backward]
    inner = [call for call in forward if call.arguments[0].shape[1:3] == (4, 4)]
    assert len(inner) > 10
    for call in inner:
        # The 4 channels of a pixel are adjacent in memory.
        assert call.arguments[0].stride[1::2] == (1, 4)
    assert {call.arguments[0].dtype for call in inner} >= {torch.bfloat16}
    again = Convolutions(calls, x.device)
    with recorded() as repeated:
        again.run()
    assert repeated == calls


# --- Operations and bytes ---


def test_counts_of_one_convolution() -> None:
    """3x3, from 2 to 5 channels, 7 images of 6x4, counted by hand."""
    conv = nn.Conv2d(2, 5, 3, padding=1)
    x = torch.randn(7, 2, 6, 4, requires_grad=True)
    with counted() as counts:
        y = conv(x)
    forward = 2 * (7 * 6 * 4) * (2 * 5 * 9)
    values = {"x": 7 * 2 * 24, "y": 7 * 5 * 24, "weight": 90, "bias": 5}
    assert totals(counts) == {
        "convolution_operations": forward,
        "convolution_bytes": 4 * sum(values.values()),
        "other_passes": 0,
        "other_bytes": 0,
    }
    with counted() as counts:
        y.backward(torch.ones_like(y))
    # The gradients of input and weight cost as much each. Inputs: x, weight, y's gradient;
    # outputs: the gradients of x, weight and bias.
    assert totals(counts)["convolution_operations"] == 2 * forward
    read = values["x"] + values["y"] + values["weight"]
    written = values["x"] + values["weight"] + values["bias"]
    assert totals(counts)["convolution_bytes"] == 4 * (read + written)


def test_counts_of_passes() -> None:
    """A sum reads two tensors and writes one; views are free, an expanded row counts once."""
    a, b = torch.ones(8, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    with counted() as counts:
        a.view(4, 8).t()
        a + b.expand(8, 4)
    assert [(c.operations, c.bytes) for c in counts] == [(0, 8 * (32 + 4 + 32))]


def test_roofline_by_hand() -> None:
    """Each operation takes the longer of the times for arithmetic and bytes."""
    peak = Peak({"float32": 1e6, "tf32": 1e7, "bf16": 1e8}, bytes=1e5)
    x = torch.ones(1, 1, 10, 10)
    with counted() as counts:
        torch.nn.functional.conv2d(x, torch.ones(1, 1, 1, 1))  # 200 operations, 804 bytes
        torch.nn.functional.conv2d(x, torch.ones(1, 1, 9, 9))  # 648 operations, 740 bytes
        x + 1  # 800 bytes
    found = least_milliseconds(counts, peak)
    assert_close(found["convolutions"], 8.04 + 7.40)
    assert_close(found["all_passes"], 8.04 + 7.40 + 8.00)
    slower = Peak({"float32": 1e4, "tf32": 2e4, "bf16": 1e8}, bytes=1e5)
    assert_close(least_milliseconds(counts, slower)["convolutions"], 20.0 + 64.8)
    # float32 operations count as such even if the networks are in bf16.
    assert_close(least_milliseconds(counts, slower, "bf16")["convolutions"], 20.0 + 64.8)
    assert_close(least_milliseconds(counts, slower, "tf32")["convolutions"], 10.0 + 32.4)


# --- Where the time goes ---


def kinds_of_a_step(make_pair: MakePair, x: Tensor, **options: Any) -> set[str]:
    loss_fn = ladder(make_pair, x, **options)
    optimizer = torch.optim.Adamax(loss_fn.parameters())

    def step() -> None:
        with pyro.validation_enabled(False):
            plain.training_step(loss_fn.model, loss_fn.guide, optimizer, x)

    return set(times_by_kind(step, loss_fn, compiled=False, steps=2))


def test_kinds_appear_with_the_modules_that_cause_them(make_pair: MakePair, x: Tensor) -> None:
    always = {
        *("convolution forward", "convolution backward", "activation", "gates and sums"),
        *("sampling and log-probabilities", "optimizer", "Python and rest"),
    }
    bare: dict[str, Any] = {"z_dims": [2], "downsample": [1], "skip": False, "dropout": 0.0}
    bare |= {"batchnorm": False, "initial_downscaling": False}
    assert kinds_of_a_step(make_pair, x, **bare) - {"casts"} == always
    with_others = bare | {"skip": True, "z_dims": [2, 2], "downsample": [1, 0]}
    assert kinds_of_a_step(make_pair, x, **with_others) - {"casts"} == always | {"merge"}
    for option, kind in (
        ({"dropout": 0.5}, "dropout"),
        ({"batchnorm": True}, "batch norm"),
        ({"initial_downscaling": True}, "upsample and padding"),
    ):
        assert kinds_of_a_step(make_pair, x, **(bare | option)) - {"casts"} == always | {kind}


def test_a_derivative_has_the_kind_of_its_operation() -> None:
    """The derivative of a product belongs to a gate or to dropout if the product does."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.5

    module = nn.Sequential(nn.Dropout2d(0.5), Gate())
    weight = nn.Parameter(torch.ones(64, 64, 16, 16))
    module.register_parameter("weight", weight)

    def backward_of(parts: nn.Module) -> Callable[[], None]:
        y = parts(weight * 1.0).sum()
        return lambda: y.backward(retain_graph=True)

    # The forward pass ran outside the profiler, so the derivative cannot be attributed.
    assert "dropout" not in times_by_kind(backward_of(module), module, compiled=False)
    # If both run inside, the derivative has the product's kind.
    both = times_by_kind(lambda: module(weight * 1.0).sum().backward(), module, compiled=False)
    forward = times_by_kind(lambda: module(weight * 1.0).sum(), module, compiled=False)
    assert both.keys() >= {"dropout", "gates and sums"}
    assert forward.keys() >= {"dropout", "gates and sums"}


# --- Lines and records ---


@pytest.mark.parametrize(
    ("name", "execution"),
    [
        ("float32", Execution(precision="float32", channels_last=False, compile=False)),
        ("bf16+compile", Execution(precision="bf16", channels_last=False, compile=True)),
        (
            "float32+channels_last+compile",
            Execution(precision="float32", channels_last=True, compile=True),
        ),
    ],
)
def test_options_by_name(name: str, execution: Execution) -> None:
    assert execution_named(name) == execution


def test_lines_by_name() -> None:
    """Only the line `plain` keeps the default allocator; a floor is never compiled."""
    line = Line.named("ours/bf16+channels_last+compile", training.KINDS)
    assert (line.kind, line.keeps_memory) == ("ours", True)
    assert line.floor == "convolutions/bf16+channels_last"
    graph = Line.named("ours/bf16+channels_last+compile+graph", training.KINDS)
    assert (graph.execution, graph.floor) == (line.execution, line.floor)
    assert (graph.is_graph, line.is_graph) == (True, False)
    by_default = Line.named("plain", training.KINDS)
    assert not by_default.keeps_memory
    assert by_default.execution == execution_named("float32")
    assert by_default.floor == "convolutions/float32"
    assert Line.named("plain/float32", training.KINDS).keeps_memory
    for name in (*training.DEFAULT_LINES, "plain", "ours/float32"):
        assert Line.named(name, training.KINDS).name == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lines", "plain/float32+graph"], "only the kind ours can be recorded as a CUDA graph"),
        (["--lines", "ours/float32+graph"], "CUDA graphs need a GPU"),
        (["--lines", "theirs/float32"], "there is no line 'theirs/float32'"),
        (["--lines", "ours"], "there is no line 'ours'"),
        (["--lines", "plain/"], "there is no line 'plain/'"),
        (["--lines", "ours/fp16"], "there are no options 'fp16'"),
        (["--lines", "ours/bf16+channels"], "there are no options 'bf16+channels'"),
        (["--lines", "convolutions/bf16+compile"], "convolutions alone cannot be compiled"),
        (["--presets", "mnist"], "argument --presets: invalid choice: 'mnist'"),
        (["--batch-sizes", "0"], "argument --batch-sizes: 0 is too small; it must be at least 1"),
        (["--repeats", "many"], "argument --repeats: invalid integer value: 'many'"),
        (["--device", "tpu"], "--device is 'tpu'"),
    ],
)
def test_wrong_commands_are_refused(arguments: list[str], message: str) -> None:
    assert message in refusal(training.main, *arguments)


def case(preset: str, batch_size: int, machine: str, value: int) -> dict[str, Any]:
    return {
        "preset": preset,
        "batch_size": batch_size,
        "provenance": {"machine": machine},
        "value": value,
    }


def test_a_case_replaces_an_earlier_one_of_its_key(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    cases: list[dict[str, Any]] = []
    for found in (
        case("digits", 8, "a laptop", 1),
        case("digits", 16, "a laptop", 2),
        case("digits", 8, "a GPU", 3),
        case("digits", 8, "a laptop", 4),
    ):
        cases = merged(path, found)
        path.write_text(json.dumps({"cases": cases}))
    assert [found["value"] for found in cases] == [4, 2, 3]
    path.write_text("[]")
    with pytest.raises(UserError, match="is not a result of this benchmark"):
        merged(path, cases[0])


# --- Turns ---


def test_medians_over_turns() -> None:
    """A single disturbed turn has no effect."""
    times = {"a": iter([1.0, 9.0, 2.0]), "b": iter([5.0, 4.0, 6.0])}
    ways = {name: values.__next__ for name, values in times.items()}
    assert medians(ways, repeats=3) == {"a": 2.0, "b": 5.0}
    assert [runs_per_turn(taken) for taken in (10.0, 0.1, 1e-9)] == [1, 3, 200]
