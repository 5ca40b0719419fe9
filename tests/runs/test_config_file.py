"""--config: the same options from a run, JSON, YAML or TOML; and what is suggested for typos."""

import json
import shutil
from pathlib import Path

import pytest

import train_svi
from ladder_vae.runs.config_file import config_from, read_options
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from tests.commands import refusal, words
from tests.made_data import refusal as refused


def parsed(*arguments: str) -> RunConfig:
    return config_from(train_svi.parse_arguments(arguments))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"z_dims": [4, 5], "downsample": [1, 0], "lr": 0.001, "skip": true}'),
        ("a.yaml", "zdims: [4, 5]\ndownsample: [1, 0]\nlr: 1e-3\nskip: yes\n"),
        ("a.yml", "z-dims: [4, 5]\ndownsample:\n- 1\n- 0\nlr: 0.001\nskip: true\n"),
        ("a.toml", "z_dims = [4, 5]\ndownsample = [1, 0]\nlr = 1e-3\nskip = true\n"),
    ],
)
def test_every_format_means_the_same(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    expected = RunConfig.of(z_dims=[4, 5], downsample=[1, 0], lr=1e-3, skip=True)
    assert parsed("--config", str(tmp_path / name)) == expected


def test_options_override_the_file_and_the_file_the_preset(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("lr = 1\nseed = 3")
    config = parsed(*words(f"--preset digits --config {tmp_path / 'a.toml'} --seed 5"))
    assert (config.lr, config.seed, config.batch_size) == (1, 5, 128)


def test_a_run_can_be_repeated(trained_run: Path) -> None:
    assert parsed("--config", str(trained_run / "config.json")) == Run.open(trained_run).config


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("a.json", "{", "is damaged: "),
        ("a.json", "[1]", "it must map names of options to values"),
        ("a.yaml", "a: [", "is not YAML: "),
        ("a.toml", "a = ", "is not TOML: "),
        ("a.txt", "a: 1", "must end in .json, .yaml, .yml or .toml"),
        ("a.yaml", "learning_rates: 1", "has 'learning_rates', which is no option"),
        ("a.yaml", "freebit: 1", "has 'freebit', which is no option; did you mean freebits?"),
    ],
)
def test_other_files_are_refused(name: str, text: str, line: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(text)
    found = refused(lambda: read_options(path))
    assert found.startswith(str(path))
    assert line in found


def test_wrong_values_name_the_flag(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: fast")
    line = refusal(train_svi.main, "--config", tmp_path / "a.yaml", "--dry-run")
    assert line == "error: --lr is 'fast'; it must be a number\n"


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ("--preset mnist3", "; did you mean mnist-3? (see --help)"),
        ("--dataset fashion-mnist", "; did you mean fashion_mnist?"),
        ("--free-bits 2", "; did you mean --freebits? (see --help)"),
        ("--nonlin rellu", "; did you mean relu? (see --help)"),
        ("--colour red", "unrecognized arguments: --colour red (see --help)"),
    ],
)
def test_typos_are_answered_with_the_nearest_word(arguments: str, advice: str) -> None:
    assert refusal(train_svi.main, *words(arguments), "--dry-run").rstrip().endswith(advice)


def test_the_images_of_another_run_are_prepared_again(tmp_path: Path, trained_run: Path) -> None:
    """The file's `own` describes what the other run found, not what is there now."""
    file = tmp_path / "config.json"
    shutil.copy(trained_run / "config.json", file)
    content = json.loads(file.read_text())
    content["config"] |= {"own": {"path": "/nowhere"}, "dataset": "digits"}
    file.write_text(json.dumps(content))
    assert parsed("--config", str(file)).own is None
