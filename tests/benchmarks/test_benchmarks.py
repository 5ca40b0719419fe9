"""What the benchmarks of speed compare: the same losses, the same convolutions, counted right."""

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

from benchmarks import evaluation, learning, plain, scaling, training
from benchmarks.convolutions import Convolutions, recorded
from benchmarks.lines import Case, Line, execution_named
from benchmarks.operations import times_by_kind
from benchmarks.records import merged
from benchmarks.roofline import Peak, counted, least_milliseconds, totals
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
    """An ELBO module with free bits that clamp about half of the KLs."""
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
def test_the_plain_loop_has_our_losses_and_gradients(
    options: dict[str, Any], dtype: torch.dtype, make_pair: MakePair, x: Tensor
) -> None:
    """From the same random state, dropout and batch-norm statistics included."""
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


def test_its_steps_are_ours(make_pair: MakePair, x: Tensor) -> None:
    """Three of them, by the weights that they lead to."""
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
def test_a_step_s_convolutions_are_all_there(
    options: dict[str, Any], make_pair: MakePair, x: Tensor
) -> None:
    loss_fn = ladder(make_pair, x, **options)
    with recorded() as calls:
        plain.free_bits_loss(loss_fn.model, loss_fn.guide, x).backward()
    half = convolutions_in(loss_fn)
    assert [call.is_backward for call in calls] == [False] * half + [True] * half
    # All gradients are wanted but that of the image, which the first convolution sees.
    masks = [call.arguments[-1] for call in calls[half:]]
    assert sorted(masks) == [[False, True, True]] + [[True, True, True]] * (half - 1)
    assert calls[0].arguments[0].shape[1] == x.shape[1]
    Convolutions(calls, x.device).run()


def test_they_keep_layout_and_precision(make_pair: MakePair, x: Tensor) -> None:
    loss_fn = ladder(make_pair, x, **LADDERS[0]).to(memory_format=torch.channels_last)
    with recorded() as calls, torch.autocast("cpu", torch.bfloat16):
        plain.free_bits_loss(loss_fn.model, loss_fn.guide, x).backward()
    forward = [call for call in calls if not call.is_backward]
    inner = [call for call in forward if call.arguments[0].shape[1:3] == (4, 4)]
    assert len(inner) > 10
    for call in inner:
        # Channels are next to each other, and there are 4 of them.
        assert call.arguments[0].stride[1::2] == (1, 4)
    assert {call.arguments[0].dtype for call in inner} >= {torch.bfloat16}
    again = Convolutions(calls, x.device)
    with recorded() as repeated:
        again.run()
    assert repeated == calls


# --- Operations and bytes ---


def test_counts_of_one_convolution() -> None:
    """3x3, from 2 to 5 channels, 7 images of 6x4: by hand."""
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
    # Of the input and of the weight as much each; it reads both and y's, and writes three.
    assert totals(counts)["convolution_operations"] == 2 * forward
    read = values["x"] + values["y"] + values["weight"]
    written = values["x"] + values["weight"] + values["bias"]
    assert totals(counts)["convolution_bytes"] == 4 * (read + written)


def test_counts_of_passes() -> None:
    """A sum reads two tensors and writes one; views cost nothing, and repeats of a row its row."""
    a, b = torch.ones(8, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    with counted() as counts:
        a.view(4, 8).t()
        a + b.expand(8, 4)
    assert [(c.operations, c.bytes) for c in counts] == [(0, 8 * (32 + 4 + 32))]


def test_roofline_by_hand() -> None:
    """What takes longer counts, operations or bytes, of each operation."""
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
    # In single precision all the same where the networks are in bf16.
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


def test_kinds_come_and_go_with_what_makes_them(make_pair: MakePair, x: Tensor) -> None:
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


def test_derivatives_go_where_their_operation_went() -> None:
    """A product's may be of a gate or of dropout: by where the product itself was made."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 1.5

    module = nn.Sequential(nn.Dropout2d(0.5), Gate())
    weight = nn.Parameter(torch.ones(64, 64, 16, 16))
    module.register_parameter("weight", weight)

    def backward_of(parts: nn.Module) -> Callable[[], None]:
        y = parts(weight * 1.0).sum()
        return lambda: y.backward(retain_graph=True)

    # The forward pass is outside: whatever is found is of the derivative, and not in its place.
    assert "dropout" not in times_by_kind(backward_of(module), module, compiled=False)
    # Inside, the derivative of the product counts as the product does.
    both = times_by_kind(lambda: module(weight * 1.0).sum().backward(), module, compiled=False)
    forward = times_by_kind(lambda: module(weight * 1.0).sum(), module, compiled=False)
    assert both.keys() >= {"dropout", "gates and sums"}
    assert forward.keys() >= {"dropout", "gates and sums"}


# --- Lines, and what is written ---


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
    """Only the plain line by itself leaves the allocator as it is; a floor compiles nothing."""
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
        (["--lines", "plain/float32+graph"], "only ours is recorded as a graph"),
        (["--lines", "ours/float32+graph"], "only on a GPU"),
        (["--lines", "theirs/float32"], "there is no line 'theirs/float32'"),
        (["--lines", "ours"], "there is no line 'ours'"),
        (["--lines", "plain/"], "there is no line 'plain/'"),
        (["--lines", "ours/fp16"], "'fp16' is no way to run"),
        (["--lines", "ours/bf16+channels"], "'bf16+channels' is no way to run"),
        (["--lines", "convolutions/bf16+compile"], "leave nothing to compile"),
        (["--presets", "mnist"], "there is no preset 'mnist'"),
        (["--batch-sizes", "0"], "--batch-sizes and --repeats must be at least 1"),
        (["--repeats", "many"], "invalid int value"),
        (["--device", "tpu"], "--device is 'tpu'"),
    ],
)
def test_refusals(arguments: list[str], message: str) -> None:
    assert message in refusal(training.main, *arguments)


def case(preset: str, batch_size: int, machine: str, value: int) -> dict[str, Any]:
    return {
        "preset": preset,
        "batch_size": batch_size,
        "provenance": {"machine": machine},
        "value": value,
    }


def test_a_case_takes_the_place_of_the_one_it_repeats(tmp_path: Path) -> None:
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
    with pytest.raises(UserError, match="holds no figures of this benchmark"):
        merged(path, cases[0])


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the benchmarks write during a test."""
    monkeypatch.setattr(training, "RESULT", tmp_path / "training.json")
    monkeypatch.setattr(training, "PICTURE", tmp_path / "training_profile.png")
    monkeypatch.setattr(scaling, "RESULT", tmp_path / "scaling.json")
    monkeypatch.setattr(scaling, "PICTURE", tmp_path / "scaling.png")
    monkeypatch.setattr(learning, "RESULT", tmp_path / "learning.json")
    monkeypatch.setattr(learning, "PICTURE", tmp_path / "learning.png")
    return tmp_path


def test_the_command(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is run, with two lines in their own processes."""
    lines = ["ours/float32", "convolutions/float32"]
    command = ["--presets", "digits", "--batch-sizes", "2", "--repeats", "1", "--lines", *lines]
    assert training.main(command) == 0
    (found,) = json.loads((results / "training.json").read_text())["cases"]
    assert (found["preset"], found["batch_size"], found["roofline"]) == ("digits", 2, {})
    assert list(found["lines"]) == lines
    for line in found["lines"].values():
        assert line["images_per_second"] == pytest.approx(2000 / line["ms_per_step"])
    ours, floor = found["lines"].values()
    assert ours["peak_bytes"] > 2**27
    assert "convolution backward" in ours["profile_ms"]
    assert floor.keys().isdisjoint({"peak_bytes", "profile_ms"})
    assert (results / "training_profile.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr()
    assert printed.out.startswith("digits, batch 2, ")
    assert [row.split()[0] for row in printed.out.splitlines()[2:]] == lines
    assert printed.err == ""


def test_scaling(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the batch has twice the operations, and the slope is what these cost."""
    sizes = [scaling.Size(layers=1, filters=2, side=8, batch=n) for n in (2, 4)]
    monkeypatch.setattr(scaling, "SERIES", {"images a batch": sizes})
    assert scaling.measure(1, torch.device("cpu")) == 0
    found = json.loads((results / "scaling.json").read_text())
    first, second = found["series"]["images a batch"]
    assert second["operations"] == 2 * first["operations"] > 0
    assert (first["value"], second["value"]) == (2, 4)
    assert first["ms_per_gflop_more"] is None
    more = (second["ours_ms"] - first["ours_ms"]) / (first["operations"] / 1e9)
    assert second["ms_per_gflop_more"] == pytest.approx(more)
    assert (results / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_scaled_is_changed_in_one_respect_at_a_time() -> None:
    base = scaling.Size()
    for sizes in scaling.SERIES.values():
        assert base in sizes
        for size in sizes:
            assert (
                sum(a != b for a, b in zip(vars(size).values(), vars(base).values(), strict=True))
                <= 1
            )
            assert sum(size.config.downsample) == 3


# --- Evaluation ---


def test_ways_to_the_bound_agree() -> None:
    """Ours and the whole network every time, from the same noise, over two chunks."""
    case = Case("digits", 5, "cpu")
    with pyro.validation_enabled(False):
        ours = evaluation.Way(case, Line("ours", "float32"), samples=8)
        whole = evaluation.Way(case, Line("whole", "float32"), samples=8)
        by_default = evaluation.Way(case, Line("plain"), samples=8)
        bottom_up = evaluation.Way(case, Line("bottom_up", "float32"), samples=8)
        assert len(ours.bounds()) == 1
        assert ours.bounds() == pytest.approx(whole.bounds(), abs=1e-3)
        assert by_default.bounds() == whole.bounds()
        assert bottom_up.bounds() == []
        # It is an estimate: other noise gives another one.
        other = evaluation.Way(case, Line("ours", "float32"), samples=7)
        assert abs(other.bounds()[0] - ours.bounds()[0]) > 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lines", "convolutions/float32"], "there is no line 'convolutions/float32'"),
        (["--samples", "0"], "--batch-sizes, --samples and --repeats must be at least 1"),
    ],
)
def test_refusals_of_evaluation(arguments: list[str], message: str) -> None:
    assert message in refusal(evaluation.main, *arguments)


# --- Learning ---


def a_run(*, steps: int, values: list[float], test: float, apart: float) -> dict[str, Any]:
    figure = {"mean": apart, "standard_error": 0.01}
    return {
        "steps": steps,
        "curve": {"step": [500.0 * (i + 1) for i in range(len(values))], "negative_elbo": values},
        "test": {
            "by_precision": {"float32": {"negative_elbo": {"mean": test, "standard_error": 0.2}}},
            "bf16_less_float32": {"negative_elbo": figure},
        },
    }


def test_runs_are_kept_in_order_and_replaced() -> None:
    runs: dict[str, dict[str, Any]] = {}
    for options, seed, found in (
        ("bf16", 10, "first"),
        ("float32", 2, "second"),
        ("bf16", 9, "third"),
        ("bf16", 10, "fourth"),
    ):
        runs = learning.merged(runs, options, seed, found)
    assert list(runs) == ["float32", "bf16"]
    assert list(runs["bf16"].items()) == [("9", "third"), ("10", "fourth")]


def test_differences_are_between_the_same_seeds() -> None:
    """Means over the last 500 steps, and the spread of the differences, not of the figures."""
    plainly = {
        "1": a_run(steps=1000, values=[500.0, 100.0], test=90.0, apart=0.0),
        "2": a_run(steps=1000, values=[500.0, 120.0], test=110.0, apart=0.0),
    }
    fast = {
        "1": a_run(steps=1000, values=[400.0, 101.0], test=90.5, apart=0.25),
        "2": a_run(steps=1000, values=[400.0, 121.0], test=110.5, apart=0.75),
        "3": a_run(steps=1000, values=[400.0, 900.0], test=900.0, apart=0.5),
    }
    first, second = learning.summary({"float32": plainly, "bf16": fast})
    assert first["training"]["mean"] == 110.0
    assert first["training"]["spread"] == pytest.approx(200**0.5)
    assert "test_difference" not in first
    assert second["training_difference"] == {"mean": 1.0, "spread": 0.0}
    assert second["test_difference"] == {"mean": 0.5, "spread": 0.0}
    row = learning.table({"float32": plainly, "bf16": fast}).splitlines()[2]
    assert "+0.50 ± 0.25" in row


def test_learning(results: Path, monkeypatch: pytest.MonkeyPatch, digits_for_mnist: None) -> None:
    """A run as it is trained and scored, but shorter and on smaller images."""
    monkeypatch.setattr(learning, "LAST_STEPS", 2)
    monkeypatch.setattr(learning, "LOGGING", "--tr-log-interv 2 --ts-log-interv 0".split())
    monkeypatch.setattr(learning, "EVALUATION_BATCH", 297)
    assert learning.main(["--only", "bf16", "4", "--steps", "4"]) == 0
    found = json.loads((results / "learning.json").read_text())
    run = found["runs"]["bf16"]["4"]
    assert run["curve"]["step"] == [2, 4]
    assert all(0 < value < 1e4 for value in run["curve"]["negative_elbo"])
    assert run["test"]["images"] == 297
    by_precision = run["test"]["by_precision"]
    apart = run["test"]["bf16_less_float32"]["negative_elbo"]["mean"]
    means = [by_precision[name]["negative_elbo"]["mean"] for name in ("bf16", "float32")]
    assert apart == pytest.approx(means[0] - means[1], abs=1e-4)
    assert 0 < abs(apart) < 5
    assert (results / "learning.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def digits_for_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 8x8 digits in the place of static MNIST."""
    setting = "--zdims 2 2 --downsample 1 1 --blocks-per-layer 1 --nfilters 4 --dataset digits"
    monkeypatch.setattr(learning, "SETTING", setting.split())
    monkeypatch.setattr(learning, "DATASET", "digits")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fp16", "1"], "--only is fp16 1; it must be one of float32, float32+compile"),
        (["--only", "bf16", "one"], "--only is bf16 one"),
        (["--steps", "100"], "--steps is 100; it must be at least 500"),
    ],
)
def test_refusals_of_learning(arguments: list[str], message: str) -> None:
    assert message in refusal(learning.main, *arguments)


def test_a_training_that_fails_is_told_of_in_one_line(
    results: Path, monkeypatch: pytest.MonkeyPatch, digits_for_mnist: None
) -> None:
    """By what it said last; nothing is written."""
    monkeypatch.setattr(learning, "SETTING", ["--zdims", "2", "2", "--downsample", "1"])
    message = refusal(learning.main, "--only", "float32", "1")
    assert "the training with float32 from seed 1 failed: error: --zdims lists 2" in message
    assert not (results / "learning.json").exists()
