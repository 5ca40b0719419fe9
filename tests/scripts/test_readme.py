"""README.md and docs/: tables are up to date; commands, snippets and links work as they stand."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.distributed.run import get_args_parser

import datasets
import train_svi
from ladder_vae.runs.command_line import given_options
from ladder_vae.runs.config_file import config_from
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from ladder_vae.training.resume import CHANGEABLE
from tests.commands import run
from tools import readme_tables

ROOT = readme_tables.ROOT
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in readme_tables.pages()}
ALL = PAGES | {name: (ROOT / name).read_text() for name in ("CHANGELOG.md", "CONTRIBUTING.md")}


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(*first: str) -> list[str]:
    """Every command of all pages, or those whose first word is one of `first`."""
    shell = "".join(block for text in ALL.values() for block in blocks(text, "sh"))
    lines = shell.replace("\\\n", "").splitlines()
    found = dict.fromkeys(" ".join(shlex.split(line, comments=True)) for line in lines)
    return [line for line in found if not first or line.split()[0] in first]


# --- Tables ---


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_results(page: str) -> None:
    assert readme_tables.written(PAGES[page]) == PAGES[page], "run python -m tools.readme_tables"


def test_every_table_is_on_one_page() -> None:
    names = re.findall(r"<!-- table (\w+) -->", "".join(PAGES.values()))
    assert Counter(names) == dict.fromkeys(readme_tables.TABLES, 1)


METRICS = {
    "elbo": 81.5,
    "iw": {"1": 81.4, "1000": 79.0},
    "standard_error": {"elbo": 0.25, "1": 0.3, "1000": 0.25},
    "bits_per_dim": {"elbo": 0.15, "1": 0.15, "1000": 0.145},
    "pareto_k": {"share_above_0.7": 0.04},
    **{"kl_per_layer": [1.0], "dataset": "static_mnist", "split": "test", "step": 1},
    "n_images": 1500,
    "trained": {"machine": "a machine", "commit": "abc"},
    "provenance": {"machine": "a machine", "commit": "abc"},
}
ROWS = """\
| negative bound           |  nats | std. error | bits/dim |
| ------------------------ | ----: | ---------: | -------: |
| ELBO                     | 81.50 |       0.25 |    0.150 |
| 1 importance sample      | 81.40 |       0.30 |    0.150 |
| 1,000 importance samples | 79.00 |       0.25 |    0.145 |

1,500 test images, measured on a machine, commit abc."""
WARNING = """

For 6% of the images a few importance samples dominate (Pareto k-hat above 0.7). The bound is \
loose for them; more samples would tighten it."""


@pytest.mark.parametrize(("share", "warning"), [(0.04, ""), (0.06, WARNING)])
def test_a_table_follows_its_file(
    share: float, warning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    content = METRICS | {"pareto_k": {"share_above_0.7": share}}
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "metrics.json").write_text(json.dumps(content))
    before, after = "text\n<!-- table demo -->\n", "\n<!-- end -->\ntext"
    expected = f"{before}{ROWS}{warning}{after}"
    assert readme_tables.written(f"{before}old{after}") == expected


def test_our_bounds_follow_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a row's own preset, then those of its data set's laptop, whatever the seed."""
    (tmp_path / "reference.json").symlink_to(readme_tables.RESULTS / "reference.json")
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)

    def rows() -> list[list[str]]:
        lines = readme_tables.likelihood_table().splitlines()
        return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]

    assert rows()[0] == ["data", "layers", "run", "ELBO", "100 samples", "1,000 samples"]
    content = {
        **{"elbo": 80.0, "iw": {"100": 78.25}, "standard_error": {"elbo": 0.25, "100": 0.2}},
        **{"dataset": "static_mnist", "split": "test", "n_images": 10000, "step": 1, "layers": 6},
        **{"kl_per_layer": [1.0], "trained": {"machine": "a GPU", "commit": "abc"}},
        **{"minutes": 19.25, "seed": 0, "training_seed": 42, "limit": None},
    }
    laptop = content | {"layers": 4, "parameters": 1_752_164}
    for name, found in (
        ("mnist-6", content),
        ("mnist-laptop", laptop | {"training_seed": 1}),
        ("mnist-laptop-seed-2", laptop | {"training_seed": 2}),
        ("mnist-laptop-15", laptop | {"limit": 1000}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(found))
    assert [cell for cell in rows()[3] if cell] == [
        "static_mnist",
        "6",
        "reference",
        "80.74",
        "78.65",
        "78.52",
    ]
    ours = [cell for cell in rows()[4] if cell]
    bounds = ["80.00 ± 0.25", "78.25 ± 0.20"]
    assert ours == ["static_mnist", "6", "`mnist-6`", *bounds, "19.2", "42"]
    for row, seed in ((rows()[6], "1"), (rows()[7], "2")):
        network = ["4", "`mnist-laptop`", "1,752,164"]
        assert [cell for cell in row if cell] == ["static_mnist", *network, *bounds, "19.2", seed]
    assert rows()[8][0].startswith("multi_dsprites")
    runs = [("mnist-6", 42), ("mnist-laptop", 1), ("mnist-laptop", 2)]
    trained = [f"`{name}` (seed {seed}) on a GPU, commit abc" for name, seed in runs]
    assert rows()[-1][0].startswith(f"Trained: {'; '.join(trained)}.")


def test_weights_are_verified_on_the_images_of_their_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RESULTS", "PRETRAINED"):
        monkeypatch.setattr(readme_tables, name, tmp_path)
    for name, limit in (("all", None), ("some", 500)):
        (tmp_path / f"{name}.safetensors").touch()
        (tmp_path / name).mkdir()
        content = METRICS | {"n_images": limit or 10_000, "limit": limit}
        content |= {"provenance": {"machine": "a CPU", "commit": "def"}}
        (tmp_path / name / "metrics.json").write_text(json.dumps(content))
    lines = readme_tables.pretrained_table().splitlines()
    for line, images in zip(lines[2:4], ("10,000", "500"), strict=True):
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        assert (cells[1], cells[-1]) == (images, "a CPU, commit def")
    assert [line for line in lines if line.startswith("python")] == [
        "python evaluate.py pretrained/all.safetensors --samples 1 1000 --out runs/all-pretrained",
        "python evaluate.py pretrained/some.safetensors --samples 1 1000 --limit 500 "
        "--out runs/some-pretrained",
    ]


def test_the_log_of_a_run_gets_its_learning_curve(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    entries = [
        {"step": step, "train/negative_elbo": 90.0 - step, "test/negative_elbo": 91.0 - step}
        for step in (1, 2, 3)
    ]
    log.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))
    readme_tables.draw_learning_curve(log)
    curve = (tmp_path / "learning.svg").read_text()
    assert all(label in curve for label in (">training<", ">test images<", ">nats<"))


def test_data_sets_are_those_of_the_code() -> None:
    """Names, sizes and likelihoods of docs/data.md, and the counts of the set that is installed."""
    rows = re.findall(
        r"(?m)^\| `(\w+)` \| (\d+)x(\d+).* \| (.*) \| (.*) \| (.*) \|$", PAGES["docs/data.md"]
    )
    assert sorted(row[0] for row in rows) == sorted(datasets.NAMES)
    for name, height, width, likelihood, *_ in rows:
        assert datasets.image_shape(name)[1:] == (int(height), int(width))
        default = RunConfig.of(dataset=name).ladder.likelihood
        assert (
            likelihood
            == {
                "bernoulli": "Bernoulli",
                "discr_log": "discretized logistic",
                "discr_log_mix": "mixture of logistics",
            }[default]
        )
    counts = [len(datasets.load("digits", split, ROOT)) for split in ("train+valid", "test")]
    (digits,) = (row for row in rows if row[0] == "digits")
    assert [f"{count:,}" for count in counts] == list(digits[4:])


# --- Links and size ---


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(
        r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL)
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)", ALL[page]) + re.findall(r'src="([^"]+)"', ALL[page])
    for link in links:
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in PAGES["README.md"]


def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].encode()) <= 9000


# --- Python ---


def test_the_program_of_the_readme_runs() -> None:
    """As a reader runs it, in a process of its own."""
    program = "".join(blocks(PAGES["README.md"], "python")[:-1])
    program += "\nassert kl.shape == (16, 3)\nassert samples.shape == (4, 1, 28, 28)"
    program += "\nassert all(p.grad is not None for p in loss_fn.parameters() if p.requires_grad)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_snippets_of_the_pyro_page_run() -> None:
    """One after another, with the values that the page states."""
    found: dict[str, Any] = {}
    for block in blocks(PAGES["docs/pyro.md"], "python"):
        exec(compile(block, "docs/pyro.md", "exec"), found)
    assert found["prior"]["x"].shape == (3, 4, 1, 28, 28)
    assert found["posterior"]["z_1"].shape[:2] == (3, 16)
    assert found["reconstruction"].shape == (1, 16, 1, 28, 28)
    assert found["replicates"].shape == (3, 16, 1, 28, 28)
    assert found["drawn"]["z_3"].equal(found["z"]["z_3"])
    assert not found["drawn"]["z_1"].equal(found["z"]["z_1"])
    assert not found["terms"].kl[:, :2].any()
    assert found["terms"].kl[:, 2].all()
    for name in ("loss", "negative_elbo", "log_joint", "bound", "evidence", "wake_phi"):
        assert torch.isfinite(torch.as_tensor(found[name])), name


def test_pyros_standard_loop_is_the_same_on_both_pages() -> None:
    (loop,) = (block for block in blocks(PAGES["README.md"], "python") if "svi.step" in block)
    assert len([line for line in loop.splitlines() if line]) == 5
    assert loop in blocks(PAGES["docs/pyro.md"], "python")


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An untrained ladder of the demo's preset, as runs/digits and runs/demo, in a new folder."""
    monkeypatch.chdir(tmp_path)
    options = "--preset digits --steps 1 --data-dir . --device cpu --out runs/digits".split()
    assert run(train_svi.main, *options).code == 0
    shutil.copytree("runs/digits", "runs/demo")


@pytest.mark.usefixtures("demo")
def test_the_snippets_of_trained_ladders_run() -> None:
    """Of README.md and, one after another, of docs/python.md, with the shapes that they state."""
    found: dict[str, Any] = {}
    block = blocks(PAGES["README.md"], "python")[-1]
    here = block.replace('"pretrained/', f'"{ROOT}/pretrained/')
    exec(compile(here, "README.md", "exec"), found)
    assert found["images"].shape == (64, 1, 28, 28)
    found = {}
    for block in blocks(PAGES["docs/python.md"], "python"):
        here = block.replace('FOLDER = "."', f"FOLDER = {str(ROOT)!r}")
        exec(compile(here, "docs/python.md", "exec"), found)
    for name, count in {"images": 64, "draws": 16, "means": 16, "calm": 16, "related": 8}.items():
        assert found[name].shape == (count, 1, 8, 8)
    assert found["top"].mean.shape == found["top"].std.shape == (2, 16, 1, 1)
    assert found["reconstructions"].shape == (2, 1, 8, 8)
    assert found["between"].shape == found["top_only"].shape == (9, 1, 8, 8)
    assert (found["bounds"].importance_weighted[100] >= found["bounds"].elbo).all()
    assert found["bounds"].kl.shape == (2, 3)
    assert type(found["ladder"]).__name__ == "Ladder"


def test_python_is_on_tested_pages_only() -> None:
    pages = [page for page, text in ALL.items() if blocks(text, "python")]
    assert pages == ["README.md", "docs/pyro.md", "docs/python.md"]


# --- Commands ---


def script_of(words: list[str]) -> tuple[ModuleType, list[str]]:
    """The module that a command runs, and its arguments."""
    if words[0] == "-m":
        return importlib.import_module(words[1]), words[2:]
    return importlib.import_module(words[0].removesuffix(".py")), words[1:]


def check_training(arguments: Any) -> None:
    """Beyond their names: the options of a training command make sense together."""
    if arguments.resume is not None:
        assert given_options(arguments).keys() <= CHANGEABLE
        return
    config = config_from(arguments)
    if arguments.preset:
        assert config.ladder.z_dims == PRESETS[arguments.preset]["z_dims"]


@pytest.mark.parametrize("command", commands("python", "torchrun"))
def test_command_lines_are_understood(command: str) -> None:
    """The parser of the script accepts each option and value."""
    first, *words = shlex.split(command)
    if first == "torchrun":
        launch = get_args_parser().parse_args(words)
        assert int(launch.nproc_per_node) == 8
        words = [launch.training_script, *launch.training_script_args]
    if words[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in words[2:])
        return
    module, given = script_of(words)
    if not hasattr(module, "parse_arguments"):
        assert given == []
        assert callable(module.main)
        return
    arguments = module.parse_arguments(given)
    if module is train_svi:
        check_training(arguments)
    if words[1] == "tools.import_reference":
        assert config_from(arguments).ladder.z_dims == [32, 32, 32]


def test_the_pages_lead_from_a_run_to_its_weights_and_pictures(
    trained_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands that a reader tries on a trained run, word for word but for the run's name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("mnist-12", "mnist-3"):
        shutil.copytree(trained_copy, tmp_path / "runs" / name)
    export = "python -m tools.export_weights runs/mnist-12 --checkpoint best"
    evaluation = "runs/mnist-12/eval/30"
    outputs = {
        "python evaluate.py runs/mnist-12 --samples 1 100 1000": (
            f"{evaluation}-limit-10-samples-1-5/samples.png"
        ),
        "python evaluate.py runs/mnist-3": "runs/mnist-3/eval/30/report.html",
        "python -m tools.report runs/mnist-12": "runs/mnist-12/report.html",
        "python -m tools.inpaint runs/mnist-12 --mask bottom": f"{evaluation}/inpainting.png",
        f"{export} --out mnist-12": "mnist-12/model.safetensors",
        "python sample.py runs/mnist-12 -n 1000 --temperature 0.7 --out samples.npz": "samples.npz",
        "python -m tools.compare runs/mnist-3 runs/mnist-12 --out comparison": (
            "comparison/comparison.csv"
        ),
    }
    for command, output in outputs.items():
        assert command in commands("python")
        module, given = script_of(shlex.split(command)[1:])
        if module.__name__ == "evaluate" and "--samples" in given:
            given = [*given[:-3], "1", "5", "--limit", "10"]  # as it stands it takes minutes
        result = run(module.main, *given)
        assert result.code == 0, result.err
        assert (tmp_path / output).exists(), result.out


def test_other_commands_are_known() -> None:
    first = {command.split()[0] for command in commands()}
    assert first == {"make", "python", "torchrun", "tensorboard", "conda"}
    assert commands("tensorboard") == ["tensorboard --logdir runs"]
    environment = (ROOT / "environment.yml").read_text()
    name = re.findall(r"(?m)^name: (.*)$", environment)[0]
    assert commands("conda") == ["conda env create -f environment.yml", f"conda activate {name}"]


def make(*arguments: str) -> str:
    command = ["make", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_knows_the_targets() -> None:
    """Each target of the pages can be made, and `make help` lists it."""
    targets = [command.split()[1] for command in commands("make")]
    assert set(targets) == {"setup", "help", "demo", "test", "gpu", "stress", "format"}
    for target in targets:
        make("--dry-run", target)
        assert target == "help" or f"make {target} " in make("help")
    assert "--torch-backend cpu" in make("--dry-run", "--always-make", "setup", "TORCH_BACKEND=cpu")


def test_options_named_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """`--options` within sentences and tables of the pages."""
    pattern = "--[a-z][a-z-]+"
    known = set(re.findall(pattern, " ".join(commands("python", "torchrun"))))
    known |= {"--max-restarts", "--shutdown-timeout", "--signal"}  # of torchrun, Slurm
    for module in (
        *("train_svi", "evaluate", "sample"),
        *("tools.reproduce", "tools.score_images", "tools.export_weights"),
    ):
        with pytest.raises(SystemExit):
            importlib.import_module(module).parse_arguments(["--help"])
        known |= set(re.findall(pattern, capsys.readouterr().out))
    for page, text in PAGES.items():
        prose = re.sub(r"```.*?```|<!-- .*? -->", "", text, flags=re.DOTALL)
        named = {
            name for code in re.findall(r"`([^`]*)`", prose) for name in re.findall(pattern, code)
        }
        # `--grad-...` stands for all options that begin so.
        named = {name for name in named if not name.endswith("-")}
        assert named <= known, (page, named - known)
