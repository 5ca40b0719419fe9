"""The project as a whole: requirements, order of imports, sizes of modules, help of options."""

import ast
import os
import re
import subprocess
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
from ladder_vae.runs.command_line import OPTIONS, flag
from ladder_vae.runs.options import RunConfig
from tools import reproduce

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and path.relative_to(ROOT).parts[0] not in ("build", "data", "runs")
)
PRODUCT = [path for path in SOURCES if path.relative_to(ROOT).parts[0] != "tests"]
OWN = {path.stem for path in ROOT.glob("*.py")} | {
    *("benchmarks", "datasets", "ladder_vae", "runtime", "tests", "tools")
}
# The distribution that an import comes from, if its name differs.
DISTRIBUTIONS = {"PIL": "pillow", "pyro": "pyro-ppl", "sklearn": "scikit-learn", "yaml": "pyyaml"}
# Installed with pytest, which needs it; and what a user may install.
WITH_OTHERS = {"packaging", "huggingface_hub"}


def imported_names(path: Path) -> Iterator[str]:
    """The dotted names of all modules that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            prefix = f"{room(path)}." if node.level else ""
            yield prefix + node.module


# --- Requirements ---


def requirements(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    stated = [line.partition("#")[0].strip() for line in lines]
    parsed = [Requirement(line) for line in stated if line and not line.startswith("-r ")]
    assert len({r.name for r in parsed}) == len(parsed)
    return {r.name: r for r in parsed}


def foreign_imports(paths: list[Path]) -> set[str]:
    imported = {name.partition(".")[0] for path in paths for name in imported_names(path)}
    foreign = imported - set(sys.stdlib_module_names) - OWN - WITH_OTHERS
    return {DISTRIBUTIONS.get(name, name) for name in foreign}


def test_every_import_is_provided_by_a_requirement() -> None:
    """What users run needs requirements.txt alone."""
    users, developers = requirements("requirements.txt"), requirements("requirements-dev.txt")
    product = foreign_imports(PRODUCT)
    assert {"torch", "pyro-ppl", "scikit-learn"} <= product  # the walk does find them
    assert product - users.keys() == set()
    assert foreign_imports(SOURCES) - users.keys() - developers.keys() == set()
    assert users.keys() & developers.keys() == set()


def test_developers_and_conda_build_on_the_requirements_of_users() -> None:
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()
    environment = (ROOT / "environment.yml").read_text()
    assert "- -r requirements.txt" in environment
    for name in ("pyro-ppl", "torch", "torchvision", "numpy", "tensorboard"):
        assert re.search(rf"^      - {name}$", environment, re.MULTILINE)
        assert name in requirements("requirements.txt")


def test_the_python_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    stated = project["project"]["requires-python"]
    assert f"- python{stated}" in (ROOT / "environment.yml").read_text()
    assert sys.version.split()[0] in SpecifierSet(stated)
    minimum = stated.removeprefix(">=")
    assert project["tool"]["mypy"]["python_version"] == minimum
    assert project["tool"]["ruff"]["target-version"] == "py" + minimum.replace(".", "")


def test_torch_2_11_is_admitted() -> None:
    assert requirements("requirements.txt")["torch"].specifier.contains("2.11.0")


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-dev.txt", "environment.yml", "pyproject.toml"]
)
def test_no_package_index_is_named(name: str) -> None:
    """The user's machine decides where packages come from."""
    text = (ROOT / name).read_text()
    assert re.findall(r"https?://|--(?:extra-)?index-url|--find-links|(?m:^-[if] )", text) == []


# --- The order of imports between rooms (packages, and files of the root) ---

# From the top to the bottom; a module imports only from its own room and those below.
ORDER = [
    {"benchmarks", "tools"},
    {"train_svi", "evaluate", "sample", "hubconf"},
    {"ladder"},
    {"guide"},
    {"model", "elbo"},
    {"ladder_vae.training"},
    {"ladder_vae.reports"},
    {"ladder_vae.evaluation"},
    {"ladder_vae.runs"},
    {"datasets", "ladder_vae.networks"},
    {"runtime"},
]
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names}


def room_of(name: str) -> str:
    """The room (package, or file of the root) that a dotted module name belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "ladder_vae" else parts[0]


def room(path: Path) -> str:
    return room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = room(path)
    if own == "ladder_vae.__init__":
        return
    for name in imported_names(path):
        target = room_of(name)
        if target.partition(".")[0] in OWN and target != own:
            assert LEVELS[target] > LEVELS[own], f"{own} imports {name}"


def test_the_story_loads_the_networks_and_nothing_else() -> None:
    """The pair can be imported anywhere: no data sets, options, files, pictures."""
    code = "import sys, model, guide, elbo; print(*sorted(sys.modules))"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = set(loaded.split())
    ours = {name for name in names if name.partition(".")[0] in OWN}
    story = {"model", "guide", "elbo", "ladder_vae", "ladder_vae.networks"}
    assert story <= ours
    assert {name for name in ours - story if not name.startswith("ladder_vae.networks.")} == set()
    assert names & {"PIL", "tensorboard", "matplotlib", "sklearn", "jinja2"} == set()


def test_the_root_holds_the_story_and_the_daily_commands() -> None:
    present = {path.stem for path in ROOT.glob("*.py")}
    assert {"model", "guide", "elbo", "train_svi", "evaluate"} <= present
    assert len(present) <= 9
    assert {path.stem for path in SOURCES} & {"utils", "util", "helpers", "common", "misc"} == set()


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    limit = 350 if path.name in ("train_svi.py", "evaluate.py") else 400
    assert text.count("\n") <= limit
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, node.name


# --- Licence and continuous integration ---


def test_the_license_is_apache_2() -> None:
    text = " ".join((ROOT / "LICENSE").read_text().split())
    assert text.startswith("Apache License Version 2.0, January 2004")
    assert "END OF TERMS AND CONDITIONS" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["license"] == "Apache-2.0"


def test_continuous_integration_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text().splitlines()
    assert re.search(r"(?m)^test:", (ROOT / "Makefile").read_text())


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    listed = set(re.findall(r"^make (\w+) ", shown.stdout, re.MULTILINE))
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    assert listed == set(phony[1].split()) - {"help"}


# --- Options ---


def help_entries(main: Any) -> dict[str, str]:
    """The text that --help shows for each option, on one line, by the option's last name."""
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
        by_name[names[1]] = " ".join(entry.partition("\n\n")[0].split())
    return by_name


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # help wraps no value


def test_every_option_of_a_run_is_on_the_command_line_with_its_default(wide: None) -> None:
    entries = help_entries(train_svi.main)
    for name, default in RunConfig.of().options().items():
        entry = entries[flag(name)]
        shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
        if name != "likelihood":  # auto, which the data set resolves
            assert entry.endswith(f"(default: {shown})")
            assert OPTIONS[name].metadata["help"] in entry
    assert entries["--likelihood"].endswith("(default: auto)")


@pytest.mark.parametrize(
    ("main", "without"),
    [
        (
            train_svi.main,
            {"--help", "--nocuda", "--dry-run", "--preset", "--config", "--resume", "--init-from"},
        ),
        (evaluate.main, {"--help"}),
        (reproduce.main, {"--help", "--minutes", "--out", "--dry-run"}),
    ],
    ids=["train_svi", "evaluate", "reproduce"],
)
def test_every_option_states_its_default_once(main: Any, without: set[str], wide: None) -> None:
    for name, entry in help_entries(main).items():
        assert entry.count("default: ") == (name not in without), entry
        assert "None" not in entry, entry
