"""The comparison of several runs: its table and files, which rows it compares, and its errors."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ladder_vae.evaluation.folders import evaluation_folder, evaluation_folders
from ladder_vae.evaluation.metrics import Metrics
from ladder_vae.reports.comparison import (
    Scored,
    columns,
    compare,
)
from ladder_vae.reports.tables import markdown
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from runtime.errors import UserError
from tests.commands import ROOT, refusal
from tests.commands import run as run_command
from tools import compare as command

RESULTS = ROOT / "results"
BINARY, LEVELS = "probability of 2 levels", "probability of 256 levels"
DENSITY: dict[str, Any] = {
    "likelihood": "gaussian",
    "likelihood_kind": "density",
    "bits_per_dim": {},
}
HERE = {"commit": "abc", "machine": "a GPU"}


def content(elbo: float, hundred: float | None = None, **changes: Any) -> dict[str, Any]:
    """The content of a metrics.json, by default of the whole test set of digits."""
    bounds = {"elbo": elbo} | ({} if hundred is None else {"100": hundred})
    made = {
        "elbo": elbo,
        "iw": {k: bound for k, bound in bounds.items() if k != "elbo"},
        "standard_error": dict.fromkeys(bounds, 0.25),
        "bits_per_dim": {k: bound / 1000 for k, bound in bounds.items()},
        "kl_per_layer": [3.0, 1.5],
        "n_images": 297,
        "limit": None,
        "dataset": "digits",
        "split": "test",
        "levels": 2,
        "likelihood": "bernoulli",
        "likelihood_kind": BINARY,
        "step": 800,
        "weights": "last",
        "seed": 0,
        "layers": 2,
        "parameters": 12345,
        "trained": HERE,
        "provenance": HERE,
    }
    return made | changes


def evaluated(folder: Path, metrics: Any, step: int = 800) -> Path:
    """A run folder with an evaluation."""
    file = folder / "eval" / str(step) / "metrics.json"
    file.parent.mkdir(parents=True)
    file.write_text(metrics if isinstance(metrics, str) else json.dumps(metrics))
    return folder


def scored(name: str, metrics: dict[str, Any]) -> Scored:
    return Scored(name, Metrics.from_dict(metrics))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `tmp_path` the current folder."""
    monkeypatch.chdir(tmp_path)


def row_of(table: str, name: str) -> list[str]:
    """The cells of a run's row."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} ")]
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- The table ---


def test_the_table() -> None:
    evaluated(Path("runs/b"), content(23.5, 22.9))
    evaluated(Path("runs/a"), content(23.25, layers=12, step=1200, weights="average", minutes=61.5))
    other = {"commit": "def", "machine": "a CPU, 2 threads"}
    colour = {"dataset": "cifar10", "limit": 1000, "n_images": 1000, "provenance": other}
    colour |= {"levels": 256, "likelihood": "discr_log_mix", "likelihood_kind": LEVELS}
    evaluated(Path("runs/c"), content(7128.4, 7068.2, standard_error={"elbo": 15.2}, **colour))
    assert (
        compare([Path("runs/b"), Path("runs/a"), Path("runs/c")], Path("out"))
        == """\
Negative bounds on the log-likelihood in nats ± standard error over the images (in brackets: \
bits per dimension). Lower is better; the best bound on the same images with the same kind of \
likelihood is in bold.

| run    | data                  | likelihood    | layers | parameters |  step | weights |             ELBO |  100 samples |   KL | minutes | obtained on                                               |
| ------ | --------------------- | ------------- | -----: | ---------: | ----: | ------- | ---------------: | -----------: | ---: | ------: | --------------------------------------------------------- |
| runs/a | digits                | bernoulli     |     12 |     12,345 | 1,200 | average | **23.25 ± 0.25** |              | 4.50 |    61.5 | a GPU, commit abc                                         |
| runs/b | digits                | bernoulli     |      2 |     12,345 |   800 | last    |     23.50 ± 0.25 | 22.90 ± 0.25 | 4.50 |         | a GPU, commit abc                                         |
| runs/c | cifar10, 1,000 images | discr_log_mix |      2 |     12,345 |   800 | last    | 7128 ± 15 (7.13) |  7068 (7.07) | 4.50 |         | a GPU, commit abc; scored on a CPU, 2 threads, commit def |

Rows with different images or kinds of likelihood cannot be compared: digits (2 levels), \
probability of 2 levels; cifar10, 1,000 images (256 levels), probability of 256 levels.
"""  # noqa: E501
    )
    assert sorted(path.name for path in Path("out").iterdir()) == [
        "comparison.csv",
        "comparison.md",
    ]


def test_the_files_hold_the_table_and_the_metrics() -> None:
    evaluated(Path("a"), content(81.123456789, 79.0))
    sparse = content(82.5, standard_error={}, bits_per_dim={}, trained=None, seed=None)
    evaluated(Path("b, too"), sparse | {"iw": {"1000": 78.25, "5": 80.0}})
    text = compare([Path("a"), Path("b, too")], Path())
    assert Path("comparison.md").read_text() == text
    header, *lines = csv.reader(Path("comparison.csv").read_text().splitlines())
    bounds = [f"negative_bound_{k}_samples" for k in (5, 100, 1000)]
    assert header == [
        *("run", "dataset", "split", "n_images", "levels", "limit"),
        *("likelihood", "likelihood_kind"),
        *("layers", "parameters", "step", "weights", "seed", "evaluation_seed"),
        *(
            f"{name}{kind}"
            for name in ("negative_elbo", *bounds)
            for kind in ("", "_standard_error", "_bits_per_dim")
        ),
        *("kl", "minutes"),
        *("trained_commit", "trained_machine", "scored_commit", "scored_machine"),
    ]
    first, second = (dict(zip(header, line, strict=True)) for line in lines)
    assert first["run"] == "a"
    assert float(first["negative_elbo"]) == 81.123456789  # unrounded
    assert float(first["negative_elbo_bits_per_dim"]) == 81.123456789 / 1000
    assert first["negative_bound_1000_samples"] == ""
    assert second["run"] == "b, too"
    assert second["negative_elbo_standard_error"] == second["evaluation_seed"] == ""
    assert [second[name] for name in bounds] == ["80.0", "", "78.25"]
    assert (second["kl"], second["parameters"]) == ("4.5", "12345")
    assert (second["trained_commit"], second["scored_machine"]) == ("", "a GPU")


def trained(name: str, metrics: dict[str, Any], **options: Any) -> Path:
    """A run folder with an evaluation and the options of its training."""
    run = evaluated(Path(name), metrics | {"training_seed": options.get("seed", 42)})
    Run(run, RunConfig.of(dataset="digits", **options), (1, 8, 8), {}).write_config()
    return run


def test_options_that_differ_have_a_column() -> None:
    """Those of the training, not of its monitoring; the seed is that of the training."""
    runs = [
        trained("a", content(3.0, seed=7), lr=1e-3, gated=True, seed=1),
        trained("b", content(2.0, seed=7), lr=1e-3, z_dims=[1, 2, 3], seed=2, ckpt_interv=7),
        evaluated(Path("c"), content(1.0, seed=7)),
    ]
    header, _, *rows = compare(runs, Path("out")).splitlines()[2:]
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names == [
        *("run", "data", "likelihood", "layers", "parameters", "seed", "--zdims", "--gated"),
        *("step", "weights", "ELBO", "KL", "obtained on"),
    ]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], *row[5:8]) for row in cells] == [  # the best first
        ("c", "", "", ""),
        ("b", "2", "1 2 3", "no"),
        ("a", "1", "32 32 32", "yes"),
    ]


def test_runs_that_differ_by_seed_alone_are_summarised() -> None:
    runs = [
        trained(f"s{seed}", content(elbo, elbo - 1), seed=seed, lr=0.1)
        for seed, elbo in ((1, 20.0), (2, 21.0), (3, 25.0))
    ]
    runs.append(trained("other", content(9.0, 8.0), seed=1, lr=0.2))
    text = compare(runs, Path("out"))
    assert text == Path("out/comparison.md").read_text()
    table = text.partition("Runs that differ by their training seed alone")[2]
    (row,) = table.splitlines()[4:]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # (20 + 21 + 25) / 3 = 22; the variance is (4 + 1 + 9) / 2 = 7
    assert cells == ["s1, s2, s3", "digits", "1 2 3", "22.00 ± 2.65", "21.00 ± 2.65"]


def test_the_same_run_twice_is_no_group() -> None:
    run = trained("a", content(3.0))
    assert "seed alone" not in compare([run, run], Path("out"))


def test_any_name_fits_into_the_table() -> None:
    evaluated(Path("a|b\nc"), content(1.0))
    (line,) = compare([Path("a|b\nc")], Path()).splitlines()[4:]
    assert line.startswith("| a\\|b c | digits | ")


def test_empty_columns_are_skipped() -> None:
    runs = [scored("a", content(1.0, seed=None)), scored("b", content(2.0))]
    headers = [column.header for column in columns(runs, ("run", "minutes", "bounds"))]
    assert headers == ["run", "ELBO"]


# --- What is compared ---


@pytest.mark.parametrize(
    ("first", "second", "bold"),
    [
        ({}, {}, {1}),
        ({"split": "valid"}, {}, set()),
        ({"dataset": "mnist"}, {}, set()),
        ({"n_images": 100, "limit": 100}, {}, set()),
        ({"n_images": 100, "limit": 100}, {"n_images": 100, "limit": 100}, {1}),
        # The seed chooses a subset; for the whole set, it only changes the noise.
        ({"n_images": 100, "limit": 100, "seed": 1}, {"n_images": 100, "limit": 100}, set()),
        ({"seed": 1}, {}, {1}),
        ({"limit": 297, "seed": 1}, {}, {1}),
        ({"elbo": 23.001}, {"elbo": 22.999}, {0, 1}),  # equal in the table
        ({"elbo": None}, {}, set()),
        ({"levels": 256}, {}, set()),
        (DENSITY, {}, set()),
        (DENSITY, DENSITY, {1}),
        ({"likelihood": "discr_log", "likelihood_kind": LEVELS}, {}, set()),
        (
            {"likelihood": "discr_log", "likelihood_kind": LEVELS},
            {"likelihood": "discr_log_mix", "likelihood_kind": LEVELS},
            {1},
        ),
        # Nothing is known about two files that do not name their likelihood.
        ({"likelihood_kind": None}, {"likelihood_kind": None}, set()),
        ({"levels": None}, {"levels": None}, set()),
    ],
)
def test_the_best_of_comparable_rows_is_bold(
    first: dict[str, Any], second: dict[str, Any], bold: set[int]
) -> None:
    runs = [scored("a", content(24.0) | first), scored("b", content(23.0) | second)]
    (column,) = columns(runs, ("bounds",))
    assert column.best == bold
    cells = [line.strip("| ") for line in markdown([column]).splitlines()[2:]]
    assert [cell.startswith("**") for cell in cells] == [row in bold for row in (0, 1)]


def test_a_density_is_not_the_best_of_probabilities() -> None:
    """A negative bound of 8-bit images, which would be -1.74 bits per dimension."""
    colour: dict[str, Any] = {"dataset": "cifar10", "levels": 256}
    evaluated(Path("a"), content(-3706.0, **colour, **DENSITY))
    discretized: dict[str, Any] = {"likelihood": "discr_log", "likelihood_kind": LEVELS}
    for name, elbo in (("b", 13351.0), ("c", 13400.0)):
        evaluated(Path(name), content(elbo, **colour, **discretized))
    text = compare([Path("a"), Path("b"), Path("c")], Path())
    assert row_of(text, "a")[2] == "gaussian (density)"
    assert [row_of(text, name)[7] for name in "abc"] == [
        *("-3706 ± 0", "**13351 ± 0 (13.35)**", "13400 ± 0 (13.40)")
    ]
    assert (
        "cannot be compared: cifar10 (256 levels), density; cifar10 (256 levels), probability of "
        "256 levels.\n" in text
    )


def test_a_file_may_lack_its_limit() -> None:
    """It is of the whole split if it has as many images as another file that says so."""
    old = content(23.0)
    del old["limit"]
    assert columns([scored("old", old)], ("data",))[0].cells == ["digits, 297 images"]
    both = [scored("old", old), scored("new", content(24.0))]
    assert columns(both, ("data",))[0].cells == ["digits", "digits"]
    other = scored("seed 3", old | {"split": "valid", "seed": 3})
    assert columns([other], ("data",))[0].cells == ["digits, valid, 297 images of seed 3"]


def test_no_note_if_all_rows_can_be_compared() -> None:
    evaluated(Path("a"), content(1.0))
    evaluated(Path("b"), content(2.0))
    assert "cannot be compared" not in compare([Path("a"), Path("b")], Path())


# --- Where evaluations are found ---


def test_the_newest_evaluation_counts() -> None:
    """The newest by its step; other folders are ignored."""
    for step in (900, 1000):
        evaluated(Path("run"), content(float(step), step=step), step)
    shutil.copytree("run/eval/900", "run/eval/2000-other")
    assert Scored.read(Path("run")).metrics.bound("elbo") == 1000.0
    assert Scored.read(Path("run/eval/900")).metrics.bound("elbo") == 900.0
    assert Scored.read(Path("run/eval/900/metrics.json")).name == "run/eval/900/metrics.json"


def test_each_split_has_its_own_evaluation() -> None:
    """The newest by its step counts, whatever its split; for one step, that of the test set."""
    run = Path("run")
    for step, split, elbo in ((900, "test", 4.0), (1000, "valid", 3.0), (1000, "train+valid", 2.0)):
        file = evaluation_folder(run, step, split) / "metrics.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content(elbo, step=step, split=split)))
    assert [folder.name for folder in evaluation_folders(run)] == [
        *("900", "1000-train+valid", "1000-valid")
    ]
    assert Scored.read(run).metrics.bound("elbo") == 3.0
    evaluated(run, content(5.0, step=1000), 1000)
    shutil.copytree(run / "eval" / "1000", run / "eval" / "1000-test")  # not one of ours
    assert [folder.name for folder in evaluation_folders(run)][-2:] == ["1000-valid", "1000"]
    assert Scored.read(run).metrics.bound("elbo") == 5.0


def test_the_metrics_in_results_are_read() -> None:
    """Some of them lack entries."""
    seeds = [f"small-static-mnist/seed-{seed}-step-2000" for seed in (1, 2, 42)]
    paths = [RESULTS / seed / "bound.json" for seed in seeds]
    table = compare(paths, Path())
    assert row_of(table, str(paths[1]))[7:11] == [
        *("**113.78 ± 0.80**", "**113.86 ± 0.83**", "104.87 ± 0.76", "35.63")
    ]
    assert row_of(table, str(paths[2]))[9] == "**104.51 ± 0.80**"


# --- Refusals ---


DAMAGED: list[Any] = [
    "{",
    "\udc80",
    "[1]",
    "[" * 100_000,
    content(1.0) | {"elbo": "low"},
    content(1.0, iw={"many": 1.0}),
    content(1.0, iw={"10": [1.0]}),
    content(1.0, kl_per_layer=3.0),
    content(1.0, standard_error={"elbo": "x"}),
    content(1.0, n_images=None),
    content(1.0, trained="here"),
    {name: value for name, value in content(1.0).items() if name != "elbo"},
]


@pytest.mark.parametrize("metrics", DAMAGED)
def test_a_damaged_file_is_refused(metrics: Any) -> None:
    run = evaluated(Path("run"), "")
    file = run / "eval/800/metrics.json"
    text = metrics if isinstance(metrics, str) else json.dumps(metrics)
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError) as refused:
        compare([run], Path("out"))
    assert str(refused.value).startswith(f"{file} is damaged")
    assert "\n" not in str(refused.value)
    assert not Path("out").exists()


def test_what_has_not_been_evaluated_is_refused() -> None:
    Path("folder").mkdir()
    Path("run").mkdir()
    Path("run/config.json").write_text("{}")
    neither = "is neither a run folder nor an evaluation: it has no config.json and no metrics.json"
    for name, reason in {
        "nowhere": f"nowhere {neither}",
        "folder": f"folder {neither}",
        "run": "run has not been evaluated yet; run: python evaluate.py run",
    }.items():
        assert refusal(command.main, name) == f"error: {reason}\n"
    assert not Path("comparison.md").exists()


def test_the_command_prints_the_table() -> None:
    evaluated(Path("a"), content(1.0))
    result = run_command(command.main, "a", "--out", "out")
    assert result.code == 0
    assert result.out == Path("out/comparison.md").read_text()


def test_a_folder_that_is_not_writable_is_refused() -> None:
    evaluated(Path("run"), content(1.0))
    Path("file").write_text("")
    with pytest.raises(UserError, match=r"cannot write file/comparison\.md"):
        compare([Path("run")], Path("file"))
