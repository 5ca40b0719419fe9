"""Each benchmark, run at the smallest size, and its arithmetic."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

import evaluate
from benchmarks import (
    annealing,
    evaluation,
    learning,
    likelihoods,
    memory,
    parallel,
    recipes,
    scaling,
    time_to_quality,
    training,
)
from benchmarks.harness.lines import Case, Line
from runtime.errors import UserError
from tests.commands import refusal
from tools.benchmark_tables import annealing_table, recipes_table, time_to_quality_table

PNG = b"\x89PNG"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder into which the benchmarks write during a test."""
    for module in (
        annealing,
        evaluation,
        learning,
        likelihoods,
        memory,
        parallel,
        scaling,
        time_to_quality,
        training,
    ):
        monkeypatch.setattr(module, "RESULT", tmp_path / module.RESULT.name)
        if hasattr(module, "PICTURE"):
            monkeypatch.setattr(module, "PICTURE", tmp_path / module.PICTURE.name)
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call in this process what benchmarks call in fresh processes: this is faster."""
    for module in (learning, memory):
        monkeypatch.setattr(
            module, "in_fresh_processes", lambda _, function, *values: [function(*values)]
        )


def read(path: Path) -> Any:
    return json.loads(path.read_text())


# --- Training steps ---


def test_training(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two lines in their own processes."""
    lines = ["ours/float32", "convolutions/float32"]
    command = ["--presets", "digits", "--batch-sizes", "2", "--repeats", "1", "--lines", *lines]
    assert training.main(command) == 0
    (found,) = read(results / "training.json")["cases"]
    assert (found["preset"], found["batch_size"], found["roofline"]) == ("digits", 2, {})
    assert list(found["lines"]) == lines
    for line in found["lines"].values():
        assert line["images_per_second"] == pytest.approx(2000 / line["ms_per_step"])
    ours, floor = found["lines"].values()
    assert ours["peak_bytes"] > 2**27
    assert "convolution backward" in ours["profile_ms"]
    assert floor.keys().isdisjoint({"peak_bytes", "profile_ms"})
    assert (results / "training_profile.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr()
    assert printed.out.startswith("digits, batch 2, ")
    assert [row.split()[0] for row in printed.out.splitlines()[2:]] == lines
    assert printed.err == ""


def test_scaling(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the batch has twice the operations, and the slope is their cost."""
    sizes = [scaling.Size(layers=1, filters=2, side=8, batch=n) for n in (2, 4)]
    monkeypatch.setattr(scaling, "SERIES", {"images a batch": sizes})
    assert scaling.main(["--repeats", "1"]) == 0
    first, second = read(results / "scaling.json")["series"]["images a batch"]
    assert second["operations"] == 2 * first["operations"] > 0
    assert (first["value"], second["value"]) == (2, 4)
    assert first["ms_per_gflop_more"] is None
    more = (second["ours_ms"] - first["ours_ms"]) / (first["operations"] / 1e9)
    assert second["ms_per_gflop_more"] == pytest.approx(more)
    assert (results / "scaling.png").read_bytes().startswith(PNG)


def test_sizes_differ_from_the_base_in_one_respect() -> None:
    base = scaling.Size()
    for sizes in scaling.SERIES.values():
        assert base in sizes
        for size in sizes:
            pairs = zip(vars(size).values(), vars(base).values(), strict=True)
            assert sum(a != b for a, b in pairs) <= 1
            assert sum(size.config.ladder.downsample) == 3


def test_likelihoods(results: Path) -> None:
    """Both implementations give the same values, and both are timed."""
    assert likelihoods.main(["--batch-size", "1", "--repeats", "1"]) == 0
    found = read(results / "likelihoods.json")["median_ms"]
    assert found.keys() == likelihoods.PAIRS.keys()
    assert all(
        ms > 0 for passes in found.values() for both in passes.values() for ms in both.values()
    )


# --- Memory ---


def test_memory(results: Path, in_this_process: None) -> None:
    assert memory.main(["--presets", "digits", "--batch-size", "8"]) == 0
    found = read(results / "memory.json")["figures"]["digits"]
    assert found.keys() == {"training", "evaluation"}
    for peaks in found.values():
        assert peaks["peak_bytes"].keys() == {"2", "4", "8"}
        assert peaks["at_batch_size"] == peaks["peak_bytes"]["8"] > 2**27
        assert not peaks["extrapolated"]


def test_memory_is_extrapolated_if_a_batch_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "in_fresh_processes", lambda *call: [1000 + 100 * call[4]])
    monkeypatch.setattr(memory, "available_memory", lambda _: 10_000)
    found = memory.results("digits", "training", 1000, torch.device("cpu"))
    assert found["peak_bytes"] == {"2": 1200, "4": 1400, "16": 2600, "64": 7400}
    assert (found["at_batch_size"], found["extrapolated"]) == (101_000, True)


# --- Evaluation ---


def test_evaluation(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["ours/float32", "bottom_up/float32"]
    sizes = ["--batch-sizes", "4", "--samples", "4"]
    command = ["--presets", "digits", *sizes, "--repeats", "1", "--lines", *lines]
    assert evaluation.main(command) == 0
    (found,) = read(results / "evaluation.json")["cases"]
    assert list(found["lines"]) == lines
    ours, bottom_up = found["lines"].values()
    assert ours["largest_difference_nats"] == 0
    assert "largest_difference_nats" not in bottom_up
    assert capsys.readouterr().out.startswith("digits, batch 4, ")


def test_all_ways_give_the_same_bounds() -> None:
    """Our sampler and the whole network, with the same noise, over two chunks."""
    case = Case("digits", 5, "cpu")
    with pyro.validation_enabled(False):
        ours = evaluation.Way(case, Line("ours", "float32"), samples=8)
        whole = evaluation.Way(case, Line("whole", "float32"), samples=8)
        by_default = evaluation.Way(case, Line("plain"), samples=8)
        assert len(ours.bounds()) == 1
        assert ours.bounds() == pytest.approx(whole.bounds(), abs=1e-3)
        assert by_default.bounds() == whole.bounds()
        # The bound is an estimate: other noise gives another value.
        other = evaluation.Way(case, Line("ours", "float32"), samples=7)
        assert abs(other.bounds()[0] - ours.bounds()[0]) > 1e-2


# --- Learning ---


def a_run(*, steps: int, values: list[float], test: float, apart: float) -> dict[str, Any]:
    difference = {"mean": apart, "standard_error": 0.01}
    return {
        "steps": steps,
        "curve": {"step": [500.0 * (i + 1) for i in range(len(values))], "negative_elbo": values},
        "test": {
            "by_precision": {"float32": {"negative_elbo": {"mean": test, "standard_error": 0.2}}},
            "bf16_less_float32": {"negative_elbo": difference},
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
    """Means over the last 500 steps, and the spread of the differences."""
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


def test_learning(results: Path, monkeypatch: pytest.MonkeyPatch, in_this_process: None) -> None:
    """A shorter run on smaller images, trained and evaluated."""
    setting = "--zdims 2 2 --downsample 1 1 --blocks-per-layer 1 --nfilters 4 --dataset digits"
    monkeypatch.setattr(learning, "SETTING", setting)
    monkeypatch.setattr(learning, "LOG_INTERVAL", 2)
    monkeypatch.setattr(learning, "LAST_STEPS", 2)
    monkeypatch.setattr(learning, "EVALUATION_BATCH", 297)
    assert learning.main(["--only", "bf16", "4", "--steps", "4"]) == 0
    found = read(results / "learning.json")
    assert found["setting"] == setting
    run = found["runs"]["bf16"]["4"]
    assert run["curve"]["step"] == [2, 4]
    assert all(0 < value < 1e4 for value in run["curve"]["negative_elbo"])
    assert run["test"]["images"] == 297
    by_precision = run["test"]["by_precision"]
    apart = run["test"]["bf16_less_float32"]["negative_elbo"]["mean"]
    means = [by_precision[name]["negative_elbo"]["mean"] for name in ("bf16", "float32")]
    assert apart == pytest.approx(means[0] - means[1], abs=1e-4)
    assert 0 < abs(apart) < 5
    assert (results / "learning.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "fp16", "1"], "--only is fp16 1; give one of float32, float32+compile"),
        (["--only", "bf16", "one"], "--only is bf16 one"),
        (["--steps", "100"], "argument --steps: 100 is too small; it must be at least 500"),
    ],
)
def test_wrong_commands_are_refused(arguments: list[str], message: str) -> None:
    assert message in refusal(learning.main, *arguments)


# --- Several processes ---


def test_batch_normalisation_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part gives the same as the whole batch, two parts do not."""
    monkeypatch.setattr(parallel, "PARTS", (1, 2))
    with pyro.validation_enabled(False):
        found = parallel.batch_norm_difference("digits")
    assert found["1"] == {"gradient": 0.0, "loss_nats": 0.0}
    assert 0 < found["2"]["gradient"] < 1


def test_counts_of_a_preset() -> None:
    with pyro.validation_enabled(False):
        counted = parallel.counted("digits")
    assert counted["gradient_bytes"] % 4 == 0
    assert counted["backward_multiply_adds"] > counted["forward_multiply_adds"] > 0


# --- Recipes ---


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_of_a_family_have_equal_lengths_and_never_see_test_images(name: str) -> None:
    recipe = recipes.RECIPES[name]
    config = recipe.config(seed=1)
    if config.max_minutes:
        assert (config.steps, config.epochs) == (0, 0)
    else:
        steps = recipe.family.images // config.batch_size
        assert (config.steps, config.epochs) == (steps, 0)
    assert config.train_split == "train"


def test_a_recipe_is_trained_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = recipes.SMALL.setting.replace("static_mnist", "digits").replace("8 8 8", "2 2 2")
    setting = setting.replace("--nfilters 16", "--nfilters 2") + " --tr-log-interv 2"
    small = replace(recipes.SMALL, setting=setting, images=256)
    recipe = replace(recipes.RECIPES["cosine-1e-2"], family=small)
    monkeypatch.setitem(recipes.RECIPES, "cosine-1e-2", recipe)
    monkeypatch.setattr(recipes, "BOUND_IMAGES", 4)
    monkeypatch.setattr(recipes, "TRAINING_IMAGES", 4)
    monkeypatch.setattr(recipes, "RESULTS", tmp_path)
    assert recipes.main(["cosine-1e-2", "--seed", "7"]) == 0
    found = read(tmp_path / "cosine-1e-2-seed-7.json")
    assert (found["steps"], found["batch_size"], found["iw_images"]) == (4, 64, 4)
    assert found["iw"].keys() == {"1", "100"}
    elbos = ("elbo", "elbo_of_last_weights", "elbo_of_training_images")
    assert len({found[name] for name in elbos}) == 3
    options = "`--lr 1e-2 --lr-warmup 100 --lr-decay cosine --ema 0.99`"
    assert f"| `cosine-1e-2` | {options} |    7 |     4 | " in recipes_table([found])


# --- Annealing ---


def test_largest_number_that_fits() -> None:
    assert annealing.largest(lambda t: 3 * t <= 100) == 33
    assert annealing.largest(lambda _: False) == 2


def test_annealing_against_importance_sampling(
    trained_run: Path, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both methods score all images, as `evaluate.py` scores them."""
    monkeypatch.setattr(annealing, "TRIAL", 2)
    arguments = [str(trained_run), "--samples", "2", "40", "--limit", "5", "--chains", "2"]
    assert annealing.main(arguments) == 0
    found = read(results / "annealing.json")
    assert (found["images"], found["chains"], found["dataset"]) == (5, 2, "digits")
    assert [row["samples"] for row in found["rows"]] == [2, 40]
    few, many = found["rows"]
    assert few["importance_weighted"] < many["importance_weighted"]
    ladder = evaluate.EvaluatedLadder.load(trained_run, device=torch.device("cpu"))
    images = ladder.images("test", Path("data"))
    metrics = evaluate.evaluate(ladder, images, results / "eval", samples=[1, 40], limit=5)
    assert many["importance_weighted"] == pytest.approx(-metrics["iw"]["40"], abs=1e-6)
    assert all(row["temperatures"] >= 2 for row in found["rows"])
    for row in found["rows"]:
        gain = row["annealed"] - row["importance_weighted"]
        assert row["gain"] == pytest.approx(gain, abs=1e-9)
    _, _, *lines = annealing_table(found).split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for row, (samples, bound, _, temperatures, annealed, _, gain) in zip(
        found["rows"], cells, strict=True
    ):
        assert (samples, temperatures) == (str(row["samples"]), str(row["temperatures"]))
        assert bound == f"{-row['importance_weighted']:.2f}"
        assert annealed == f"{-row['annealed']:.2f}"
        assert gain == f"{row['gain']:.2f} ± {row['standard_error']:.2f}"


# --- Time to quality ---

CURVE = [
    {"images": 0, "elbo": 110.0},
    {"images": 6000, "elbo": 98.0},
    {"images": 12000, "elbo": 92.0},
    {"images": 18000, "elbo": 93.0},
]


def test_minutes_to_a_mark() -> None:
    """Interpolated between evaluations, at one image per second."""
    assert time_to_quality.minutes_to(104, CURVE, 1.0) == pytest.approx(50)
    assert time_to_quality.minutes_to(98, CURVE, 1.0) == pytest.approx(100)
    assert time_to_quality.minutes_to(95, CURVE[2:], 2.0) == pytest.approx(100)  # at the first
    assert time_to_quality.minutes_to(95, CURVE, 2.0) == pytest.approx(75)
    assert time_to_quality.minutes_to(95, CURVE, 0.9) is None  # passed after 150 minutes
    assert time_to_quality.minutes_to(90, CURVE, 2.0) is None  # not passed in 150 minutes
    with pytest.raises(UserError, match="ends after 100 minutes, above 90 nats: train more"):
        time_to_quality.minutes_to(90, CURVE, 3.0)


def test_time_to_quality(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = "--nfilters 2 --zdims 2 2 2 --batch-size 128 --steps 1"
    ways = {"laptop": time_to_quality.Way("digits", options, 128, "a small ladder")}
    monkeypatch.setattr(time_to_quality, "WAYS", ways)
    monkeypatch.setattr(time_to_quality, "CURVES", results)
    monkeypatch.setattr(time_to_quality, "LIMIT", 1e-9)
    assert time_to_quality.main(["learn", "laptop"]) == 0
    curve = read(results / "laptop.json")
    assert [point["images"] for point in curve["curve"]] == [128]
    assert curve["config"]["train_split"] == "train"
    assert time_to_quality.main(["speed", "--repeats", "1"]) == 0
    assert time_to_quality.main(["minutes"]) == 0
    (way,) = read(results / "time_to_quality.json")["ways"].values()
    assert way["images_per_second"] > 0
    assert way["minutes"] == [None] * len(time_to_quality.MARKS)
    found = read(results / "time_to_quality.json") | {"marks": [100, 90], "limit": 150}
    found["ways"] = {"laptop": way | {"images_per_second": 300, "minutes": [1.5, None]}}
    row = "| a small ladder     |      300 |      1.5 |   > 150 |"
    assert row in time_to_quality_table(found)
    assert (results / "time_to_quality.png").read_bytes().startswith(PNG)
