"""README.md: its tables are what results/ holds, and its code and links are right."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

import evaluate
import pieces
import train_svi
from ladder_vae.reports import report
from ladder_vae.runs import published
from ladder_vae.runs.command_line import config_from, given_options
from tools import import_reference as reference_checkpoint
from tools import readme_tables as readme
from tools import reproduce

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_results() -> None:
    """Nothing in a table is typed in by hand, or out of date."""
    assert set(re.findall(r"<!-- table (\w+) -->", TEXT)) == readme.TABLES.keys()
    assert readme.written(TEXT) == TEXT


def test_tables_follow_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that changes in results/ changes in the table."""
    metrics = {
        "elbo": 81.5,
        "iw": {"1": 81.4, "100": 79.0},
        "standard_error": {"elbo": 0.25, "1": 0.3, "100": 0.25},
        "bits_per_dim": {"elbo": 0.15, "1": 0.15, "100": 0.145},
        "n_images": 1500,
        "trained": {"machine": "a machine", "commit": "abc"},
        "provenance": {"machine": "a machine", "commit": "abc"},
    }

    def read(name: str) -> dict[str, Any]:
        assert name == "demo/metrics.json"
        return metrics

    monkeypatch.setattr(readme, "read", read)
    table = readme.written("<!-- table demo -->\nold\n<!-- end -->")
    assert "| negative bound, 1,500 test images | nats | bits/dim |" in table
    assert "| ELBO | 81.50 ± 0.25 | 0.150 |" in table
    assert "| 100 importance samples | 79.00 ± 0.25 | 0.145 |" in table
    assert "0.145 |\n\nObtained on a machine, commit abc." in table
    assert "old" not in table
    metrics["warning"] = "the bound is loose"
    table = readme.written("<!-- table demo -->\nold\n<!-- end -->")
    assert "0.145 |\n\nThe bound is loose.\n\nObtained on a machine, commit abc." in table


def test_our_figures_stand_below_the_published_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where results/PRESET/metrics.json is there, and no column is empty where it is not."""
    for name in ("reference.json", "demo"):
        (tmp_path / name).symlink_to(readme.RESULTS / name)
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    header = [cell.strip() for cell in readme.likelihood_table().splitlines()[0].split("|")]
    assert header[1:-1] == ["data", "layers", "run", "ELBO", "100 samples", "1,000 samples"]
    content = {
        **{"elbo": 80.0, "iw": {"100": 78.25}, "standard_error": {"elbo": 0.25, "100": 0.2}},
        **{"dataset": "static_mnist", "split": "test", "n_images": 10000, "step": 1, "layers": 6},
        **{"kl_per_layer": [1.0], "provenance": {"machine": "a GPU", "commit": "abc"}},
        **{"minutes": 19.25, "seed": 0, "training_seed": 42},
    }
    (tmp_path / "mnist-6").mkdir()
    (tmp_path / "mnist-6" / "metrics.json").write_text(json.dumps(content))
    rows = [
        re.findall(r"[^| ][^|]*[^| ]|[^| ]", row) for row in readme.likelihood_table().split("\n")
    ]
    assert rows[3:5] == [
        ["static_mnist", "6", "reference", "80.74", "78.65", "78.52"],
        [
            *("static_mnist", "6", "ours", "80.00 ± 0.25", "78.25 ± 0.20"),
            *("19.2", "42", "a GPU, commit abc"),
        ],
    ]


def test_files_it_names_are_there() -> None:
    """Every relative link leads somewhere."""
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    relative = [link for link in links if "://" not in link]
    assert len(relative) > 10
    assert [link for link in relative if not (ROOT / link).exists()] == []


def test_its_program_runs() -> None:
    """The example of the pair as Pyro programs, as a reader would run it."""
    (program,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    program += "\nassert loss_fn.elbo.terms.kl.shape == (16, 3)"
    program += "\nassert [n for n in z_and_x.nodes if n[0] in 'zx'] == ['z_3', 'z_2', 'z_1', 'x']"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


COMMANDS = [
    line.split("#")[0].split()
    for block in re.findall(r"```sh\n(.*?)```", TEXT, flags=re.DOTALL)
    for line in block.splitlines()
]
SCRIPTS: dict[str, Any] = {
    "train_svi.py": train_svi,
    "evaluate.py": evaluate,
    "pieces.py": pieces,
    "published.py": published,
    "reference_checkpoint.py": reference_checkpoint,
    "report.py": report,
    "reproduce.py": reproduce,
}


# Those of our scripts, by themselves or as several processes.
OF_SCRIPTS = [command for command in COMMANDS if command[0] in ("python", "torchrun")]


@pytest.mark.parametrize("command", OF_SCRIPTS, ids=" ".join)
def test_command_lines_are_understood(command: list[str]) -> None:
    """Every option of every command is one of the script's, and together they make sense."""
    if command[0] == "torchrun":
        launch = get_args_parser().parse_args(command[1:])
        assert int(launch.nproc_per_node) == 8
        command = ["python", launch.training_script, *launch.training_script_args]
    arguments = SCRIPTS[command[1]].parse_arguments(command[2:])
    if command[1] == "train_svi.py" and arguments.resume is None:
        # The command without a preset is the original implementation's, of twelve layers.
        layers = {"mnist-3": 3, "mnist-12": 12, None: 12}[arguments.preset]
        config = config_from(arguments)
        assert len(config.z_dims) == layers
        assert config.free_bits == (1.0 if layers == 12 else 0.5)
        assert (config.skip, config.gated, config.blocks_per_layer) == (True, True, 4)
    if command[1] == "train_svi.py" and arguments.resume is not None:
        assert given_options(arguments).keys() <= train_svi.CHANGEABLE
    if command[1] == "reference_checkpoint.py":
        assert config_from(arguments).z_dims == [32, 32, 32]


def test_other_commands_are_there() -> None:
    """What README has make do, the Makefile does."""
    makefile = (ROOT / "Makefile").read_text()
    targets = {command[1] for command in COMMANDS if command[0] == "make"}
    assert targets == {"demo", "test"}
    assert all(re.search(rf"(?m)^{target}:", makefile) for target in (*targets, "setup"))
    assert {command[0] for command in COMMANDS} == {"make", "python", "tensorboard", "torchrun"}
