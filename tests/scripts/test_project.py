"""What holds the project together: requirements, imports, layout and the options' help."""

import ast
import dataclasses
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import evaluate
import train_svi
from ladder_vae.runs.options import RunConfig
from tools import reproduce

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and path.relative_to(ROOT).parts[0] not in ("build", "data", "runs")
)
# The project's own modules and packages, by the name that imports them.
OWN = (
    {path.stem for path in ROOT.glob("*.py")}
    | {"benchmarks", "results", "tests"}
    | {path.parent.name for path in ROOT.glob("*/__init__.py")}
)
# Which distribution an import comes from, where it is not called the same.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "pyro": "pyro-ppl",
    "sklearn": "scikit-learn",
}
# Comes with pytest, which needs it.
WITH_OTHERS = {"packaging"}


def imported_names(path: Path) -> Iterator[str]:
    """The dotted names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            yield node.module


def imported_modules(path: Path) -> set[str]:
    """The top-level modules that a file imports."""
    return {name.partition(".")[0] for name in imported_names(path)}


def requirements() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    stated = [line.partition("#")[0].strip() for line in lines]
    parsed = [Requirement(line) for line in stated if line]
    assert len({r.name for r in parsed}) == len(parsed)
    return {r.name: r for r in parsed}


def environment_lines() -> list[str]:
    """The entries of environment.yml's dependencies, with their indentation."""
    lines = (ROOT / "environment.yml").read_text().splitlines()
    stated = [line for line in lines if line.strip() and not line.strip().startswith("#")]
    return stated[stated.index("dependencies:") + 1 :]


def project_table() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# --- Requirements ---


def test_conda_installs_the_same_requirements() -> None:
    """environment.yml adds Python and pip to requirements.txt, and nothing else."""
    python, *others = environment_lines()
    assert re.fullmatch(r"  - python\S+", python)
    assert others == ["  - pip", "  - pip:", "      - -r requirements.txt"]


def test_the_python_version_is_the_same_everywhere() -> None:
    stated = environment_lines()[0].removeprefix("  - python")
    assert SpecifierSet(stated) == SpecifierSet(project_table()["requires-python"])
    assert sys.version.split()[0] in SpecifierSet(stated)
    minimum = stated.removeprefix(">=")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["mypy"]["python_version"] == minimum
    assert tools["ruff"]["target-version"] == "py" + minimum.replace(".", "")


@pytest.mark.parametrize("name", ["pyro-ppl", "torch", "torchvision", "numpy", "tensorboard"])
def test_the_foundations_are_required(name: str) -> None:
    assert name in requirements()


def test_torch_2_11_is_admitted() -> None:
    assert requirements()["torch"].specifier.contains("2.11.0")


def test_every_import_is_provided_by_a_requirement() -> None:
    imported = set().union(*map(imported_modules, SOURCES))
    foreign = imported - set(sys.stdlib_module_names) - OWN - WITH_OTHERS
    assert {"torch", "pyro", "sklearn"} <= foreign  # the walk does find them
    missing = {DISTRIBUTIONS.get(name, name) for name in foreign} - requirements().keys()
    assert missing == set()


@pytest.mark.parametrize("name", ["requirements.txt", "environment.yml", "pyproject.toml"])
def test_no_package_index_is_named(name: str) -> None:
    """Where packages come from is for the machine to say."""
    text = (ROOT / name).read_text()
    assert re.findall(r"https?://|--(?:extra-)?index-url|--find-links|(?m:^-[if] )", text) == []


# --- Imports ---

MODULES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "datasets").glob("*.py"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("networks", set()),
        ("distributions", set()),
        ("likelihoods", {"distributions", "errors", "networks"}),
        ("elbo", set()),
        ("config", {"datasets", "errors", "execution", "likelihoods", "networks"}),
        ("execution", {"errors", "networks"}),
        ("step_graph", set()),
        ("skipping", {"readback"}),
        ("model", {"config", "likelihoods", "networks"}),
        ("guide", {"config", "model", "networks"}),
        ("inspection", {"datasets", "errors", "guide", "model"}),
        ("pictures", {"atomic"}),
        ("plots", {"atomic"}),
        ("inpainting", {"atomic", "datasets", "draws", "errors", "guide", "model"}),
        ("outliers", {"atomic", "errors", "importance"}),
    ],
)
def test_imports_point_one_way(name: str, expected: set[str]) -> None:
    assert imported_modules(ROOT / f"{name}.py") & OWN == expected


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_imports_a_script(path: Path) -> None:
    """But the one that does what both of them do, one after the other."""
    scripts = {"train_svi", "evaluate", "reproduce", "tests"}
    allowed = {"train_svi", "evaluate"} if path.stem == "reproduce" else set()
    assert imported_modules(path) & scripts == allowed


def test_no_import_cycle() -> None:
    """Modules can be put in an order in which each imports only those before it."""
    imports = {path.stem: imported_modules(path) & OWN for path in ROOT.glob("*.py")}
    inner = set().union(*map(imported_modules, (ROOT / "datasets").glob("*.py")))
    imports["datasets"] = (inner & OWN) - {"datasets"}
    placed: set[str] = set()
    while rest := imports.keys() - placed:
        ready = {name for name in rest if imports[name] & imports.keys() <= placed}
        assert ready, f"each of {sorted(rest)} imports another of them"
        placed |= ready
    assert placed >= {"train_svi", "evaluate", "datasets", "model"}


def test_no_module_is_a_drawer_of_odds_and_ends() -> None:
    assert {path.stem for path in SOURCES} & {"utils", "util", "helpers", "common", "misc"} == set()


# --- Layout ---


@pytest.mark.parametrize(
    "name",
    ["model.py", "guide.py", "train_svi.py", "evaluate.py", "environment.yml", "requirements.txt"],
)
def test_the_top_level_holds_the_story(name: str) -> None:
    assert (ROOT / name).is_file()


@pytest.mark.parametrize("name", ["datasets", "tests"])
def test_the_top_level_holds_folders(name: str) -> None:
    assert (ROOT / name).is_dir()


def test_the_license_is_apache_2() -> None:
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert "TERMS AND CONDITIONS FOR USE, REPRODUCTION, AND DISTRIBUTION" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert project_table()["license"] == "Apache-2.0"


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0].startswith("#!")
    assert "make test" in lines
    assert re.search(r"(?m)^test:", (ROOT / "Makefile").read_text())


# --- Options ---


def help_entries(main: Any) -> dict[str, str]:
    """What --help says of each option, on one line, by the option's last name."""
    out = StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    _, _, options = out.getvalue().partition("\noptions:\n")
    entries = re.split(r"\n  (?=-)", "\n" + options.rstrip())[1:]
    by_name = {}
    for entry in entries:
        names = re.match(r"(?:-\w(?: \S+)?, )?(--[\w-]+)", entry)
        assert names is not None, entry
        by_name[names[1]] = " ".join(entry.split())
    return by_name


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # help wraps no value


@pytest.mark.parametrize("field", dataclasses.fields(RunConfig), ids=lambda field: field.name)
def test_every_field_of_config_is_an_option_that_shows_its_default(
    field: dataclasses.Field[Any], wide: None
) -> None:
    listed = field.default_factory is not dataclasses.MISSING
    default = getattr(RunConfig.of(), field.name) if listed else field.default
    shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
    entry = help_entries(train_svi.main)[flag(field.name)]
    assert entry.endswith(f"(default: {shown})")
    assert field.metadata["help"] in entry


@pytest.mark.parametrize(
    ("main", "without"),
    [
        (train_svi.main, {"--help", "--nocuda", "--dry-run", "--preset", "--resume"}),
        (evaluate.main, {"--help", "--inpaint", "--score", "--against", "--compare"}),
        (reproduce.main, {"--help", "--minutes", "--out", "--pause-after", "--dry-run"}),
    ],
    ids=["train_svi", "evaluate", "reproduce"],
)
def test_every_option_says_its_default_once(main: Any, without: set[str], wide: None) -> None:
    for name, entry in help_entries(main).items():
        assert entry.count("default: ") == (name not in without), entry
        assert "None" not in entry, entry
