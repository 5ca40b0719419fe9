"""tools.reproduce: the budget, complete rows, interruptions, and wrong commands."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

import datasets
import evaluate
from ladder_vae.evaluation.importance import ImportanceSampler
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS, ROWS
from ladder_vae.training.rate import Rate
from ladder_vae.training.trainer import Trainer
from tests.commands import ROOT, content, refusal, run, words
from tests.runs.test_presets import made_images
from tools import reproduce

# A ladder of two layers on the 8x8 digits of scikit-learn, instead of the row's own.
TINY = words(
    "--dataset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --blocks-per-layer 1 "
    "--batch-size 32 --device cpu --samples 1 5 --limit 40"
)
INTERVALS = words("--tr-log-interv 1 --ts-log-interv 3")
COMMAND = ["mnist-3", *TINY, *INTERVALS, "--steps", "6"]


def reproduced(folder: Path, *command: object) -> str:
    """Run a command that must succeed; returns what it printed."""
    result = run(reproduce.main, *(command or COMMAND), "--out", folder)
    assert result.code == 0, result.err
    return result.out


def outcome(folder: Path) -> dict[str, Any]:
    """Everything in a complete row's folder that does not depend on the clock."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("minutes", "provenance", "trained"):
        del metrics[name]
    with np.load(folder / "per_image.npz") as arrays:
        per_image = {name: arrays[name].tobytes() for name in arrays}
    entries = read_entries(folder / "run" / "metrics.jsonl")
    for entry in entries:
        entry.pop("time")
        entry.pop("train/images_per_second", None)
    tensors = load_file(folder / "weights.safetensors")
    return {
        "metrics": metrics,
        "per_image": per_image,
        "entries": entries,
        "weights": {name: value.numpy().tobytes() for name, value in tensors.items()},
        "pictures": {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.png")},
        "config": json.loads((folder / "run" / "config.json").read_text())["config"],
    }


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete row, for tests that only read it."""
    folder = tmp_path_factory.mktemp("complete") / "row"
    reproduced(folder)
    return folder


# --- A complete row ---


def test_files_of_a_complete_row(row: Path) -> None:
    names = {name for name, body in content(row).items() if body is not None}
    assert {
        *("metrics.json", "per_image.npz", "report.html", "weights.safetensors"),
        *("samples.png", "reconstructions.png", "layers.png", "layer_01.png", "interpolation.png"),
        *("run/config.json", "run/metrics.jsonl", "run/checkpoints/6.pt"),
    } <= names
    assert not any("progress" in name or name.endswith(".part") for name in names)
    metrics = json.loads((row / "metrics.json").read_text())
    assert (metrics["weights"], metrics["step"], metrics["n_images"]) == ("average", 6, 40)
    assert metrics["training_seed"] == 42
    assert metrics["minutes"] > 0
    assert list(metrics["iw"]) == ["1", "5"]


def test_the_same_command_again_changes_nothing(row: Path) -> None:
    before = content(row)
    assert reproduced(row) == f"complete  {row / 'metrics.json'}\n"
    assert content(row) == before


def test_minutes_determine_the_number_of_steps_and_nothing_else(
    row: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps of the warm-up leave no trace."""

    def measured(step: Callable[[], object], clock: Callable[[], float], seconds: float) -> Rate:
        step()
        step()
        assert clock() < clock()
        assert seconds == 0.5
        return Rate(6.5, 2)

    monkeypatch.setattr(reproduce, "measured_rate", measured)
    command = ["mnist-3", *TINY, *INTERVALS, "--measure", 0.5, "--minutes", 1 / 60]
    out = reproduced(tmp_path / "row", *command)
    assert "rate        6.5 steps/s of 32 images on " in out
    assert "training    6 steps\n" in out  # 95% of 6.5
    assert outcome(tmp_path / "row") == outcome(row)


def test_a_longer_run_continues_and_is_evaluated_again(row: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(row, tmp_path / "row"))
    reproduced(folder, *COMMAND[:-1], 7)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["step"] == 7
    assert [e["step"] for e in read_entries(folder / "run/metrics.jsonl") if "train/loss" in e] == [
        *range(1, 8)
    ]


def test_other_samples_are_evaluated_without_training(row: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(row, tmp_path / "row"))
    line = refusal(reproduce.main, *COMMAND, "--samples", 1, 2, "--out", folder)
    assert "another samples ([1, 5] instead of [1, 2])" in line
    out = reproduced(folder, *COMMAND, "--samples", 1, 2, "--overwrite")
    assert list(json.loads((folder / "metrics.json").read_text())["iw"]) == ["1", "2"]
    assert "run folder" not in out


def test_intervals_and_warm_up_suit_the_number_of_steps() -> None:
    config = reproduce.fitted_config(PRESETS["mnist-12-fast"] | {"epochs": 0}, 1001)
    assert (config.steps, config.epochs, config.max_minutes) == (1001, 0, 0)
    assert config.lr_decay == "cosine"
    assert config.lr_warmup == 100  # a tenth; the preset has more
    assert config.ts_log_interv == 101  # ten evaluations
    assert config.tr_log_interv == 10
    short = {"lr_warmup": 7, "ts_log_interv": 9}
    fitted = reproduce.fitted_config(short, 1001)
    assert (fitted.lr_warmup, fitted.ts_log_interv) == (7, 9)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(reproduce.main, "mnist-3", *TINY, "--minutes", 0.5, "--measure", 0.1, "--dry-run")
    assert result.code == 0, result.err
    lines = [line.split()[0] for line in result.out.splitlines()]
    assert lines == ["measuring", "rate", "training", "evaluation"]
    assert content(tmp_path) == {}


# --- Interruptions ---


def test_interruptions_change_nothing(
    row: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in a training step, then interruptions between groups of the evaluation."""
    folder = tmp_path / "row"
    take_step, group = Trainer.take_step, ImportanceSampler.group

    def interrupted_step(trainer: Trainer) -> None:
        take_step(trainer)
        if trainer.step in (2, 4):
            os.kill(os.getpid(), signal.SIGTERM)

    for step in (2, 4):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "take_step", interrupted_step)
            result = run(reproduce.main, *COMMAND, "--out", folder)
        assert (result.code, f"interrupted after step {step}" in result.err) == (143, True)
        assert not (folder / "metrics.json").exists()
    scored: list[int] = []

    def interrupted_group(sampler: ImportanceSampler, number: int) -> Any:
        if sampler.samples[-1] == 5 and len(scored) % 2:
            scored.append(-1)
            raise KeyboardInterrupt
        if sampler.samples[-1] == 5:
            scored.append(number)
        return group(sampler, number)

    monkeypatch.setattr("ladder.Ladder.batch_size", 20)  # ten groups
    with monkeypatch.context() as patch:
        patch.setattr(ImportanceSampler, "group", interrupted_group)
        codes = [run(reproduce.main, *COMMAND, "--out", folder).code for _ in range(10)]
    reproduced(folder)
    assert codes[:3] == [130, 130, 130]
    assert [number for number in scored if number >= 0][:3] == [0, 1, 2]  # resumed, not repeated
    whole = outcome(row)
    found = outcome(folder)
    for name in ("entries", "weights", "config"):
        assert found[name] == whole[name]


def test_a_diverged_training_is_reported(tmp_path: Path) -> None:
    command = ["mnist-3", *TINY, "--steps", 30, "--grad-skip", 1e-9]
    result = run(reproduce.main, *command, "--out", tmp_path / "row")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: step 10: 10 updates in a row were skip")


# --- Wrong commands and folders ---


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ("--nfilters 8", "--nfilters is 4 in the run to resume and cannot be changed to 8"),
        ("--seed 7", "--seed is 42 in the run to resume and cannot be changed to 7"),
        ("--limit 298", "--limit is 298 but test has only 297 images"),
    ],
)
def test_another_command_does_not_continue_a_row(row: Path, changes: str, complaint: str) -> None:
    before = content(row)
    assert complaint in refusal(reproduce.main, *COMMAND, *words(changes), "--out", row)
    assert content(row) == before


def test_another_row_does_not_continue_a_row(row: Path) -> None:
    line = refusal(reproduce.main, "mnist-12", *COMMAND[1:], "--out", row)
    assert "--freebits is 0.5 in the run to resume and cannot be changed to 1.0" in line


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("digits --minutes 1", "invalid choice: 'digits'"),
        ("mnist-3-fast --minutes 1", "invalid choice: 'mnist-3-fast'"),
        ("mnist-3", "give either --minutes of training or its --steps"),
        ("mnist-3 --minutes 1 --steps 5", "give either --minutes of training or its --steps"),
        ("mnist-3 --minutes 0", "--minutes: 0 must be finite and positive"),
        ("mnist-3 --minutes nan", "--minutes: nan must be finite and positive"),
        ("mnist-3 --minutes 1 --measure 0", "--measure: 0 must be finite and positive"),
        ("mnist-3 --minutes 1 --dry-run", "give either --out FOLDER or --dry-run"),
        ("mnist-3 --steps 0", "--steps is 0; it must be at least 1"),
        ("mnist-3 --steps -3", "--steps is -3; it must be"),
        ("mnist-3 --minutes 1 --epochs 3", "--epochs has no effect here"),
        ("mnist-3 --minutes 1 --max-minutes 3", "--max-minutes has no effect here"),
        ("mnist-3 --minutes 1 --preset digits", "unrecognized arguments: --preset digits"),
        ("mnist-3 --minutes 1 --samples 5 1", "--samples is 5 1; give ascending numbers"),
        ("mnist-3 --minutes 1 --limit 0", "--limit: 0 is too small; it must be at least 1"),
        (
            "mnist-3 --steps 1 --dataset digits --limit 298",
            "--limit is 298 but test has only 297 images",
        ),
        (
            "mnist-3 --minutes 1 --objective iwae --particles 2 --elbo-share 0.5",
            "the steps of a run with --elbo-share become slower once the bound replaces the ELBO",
        ),
        ("mnist-3 --steps 1 --dataset digits --lr 0", "--lr is 0.0; it must be finite and posit"),
        ("mnist-3 --steps 1 --device tpu", "--device is 'tpu'; it must be auto, cpu, cuda or cud"),
    ],
)
def test_wrong_commands_are_refused(arguments: str, complaint: str, tmp_path: Path) -> None:
    assert complaint in refusal(reproduce.main, *words(arguments), "--out", tmp_path / "row")
    assert not (tmp_path / "row").exists()


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(reproduce.main, *COMMAND, "--out", "row")
    assert "runs as a single process: start it without torchrun, or unset WORLD_SIZE" in line


def test_a_folder_with_other_files_stays_unchanged(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    line = refusal(reproduce.main, *COMMAND, "--out", tmp_path)
    assert line == f"error: {tmp_path} is not an empty folder; give a new folder to --out\n"
    assert content(tmp_path) == {"notes.txt": b"mine"}


# --- Every row ---


@pytest.mark.parametrize("name", ROWS)
def test_each_row_has_the_options_of_its_fast_preset(name: str) -> None:
    arguments = reproduce.parse_arguments([name, "--steps", "1000", "--out", "row"])
    config = reproduce.fitted_config(reproduce.preset_options(arguments), arguments.steps)
    fast = PRESETS[f"{name}-fast"] | {"steps": 1000, "epochs": 0, "max_minutes": 0}
    fitted = {"lr_warmup", "tr_log_interv", "ts_log_interv", "ll_interv", "ckpt_interv"}
    fitted |= {"checkpoint_minutes", "keep_checkpoints"}
    for option, value in RunConfig.of(**fast).options().items():
        assert option in fitted or config.options()[option] == value
    assert (config.train_split == "train") == (name == "celeba-20")
    assert arguments.samples == [1, 100, 1000]
    assert arguments.limit is None


def test_celeba_is_evaluated_on_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the original implementation, training uses the training images only."""
    monkeypatch.setattr(datasets, "load", made_images)
    options = words(
        "--zdims 1 1 --downsample 1 1 --nfilters 2 --blocks-per-layer 1 --batch-size 4 --steps 1 "
        "--samples 1 2 --device cpu"
    )
    folder = tmp_path / "row"
    out = reproduced(folder, "celeba-20", *options)
    assert "12 images of celeba (train)" in out
    assert "note" not in out  # no evaluated image has been trained on
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["dataset"], metrics["split"]) == ("celeba", "valid")
    assert (metrics["n_images"], metrics["weights"]) == (12, "average")


def test_fast_presets_change_the_training_and_not_the_network() -> None:
    training = {
        *("batch_size", "lr", "lr_warmup", "lr_decay", "ema", "epochs", "grad_clip", "grad_skip"),
        *("train_split", "dropout", "precision"),
    }
    for name in ROWS:
        fast, plain = PRESETS[f"{name}-fast"], PRESETS[name]
        assert {option for option in fast if fast[option] != plain.get(option)} <= training
        assert fast["lr_decay"] == "cosine"
        assert fast["batch_size"] >= 256
        assert fast["ema"] >= 0.99
    reference = json.loads((ROOT / "results" / "reference.json").read_text())
    assert set(ROWS) == {row["preset"] for row in reference["rows"]}


def test_exported_weights_give_the_same_metrics(row: Path, tmp_path: Path) -> None:
    """From the weights' file alone, with the printed metrics' settings."""
    weights, again = row / "weights.safetensors", tmp_path / "again"
    metrics = json.loads((row / "metrics.json").read_text())
    size = words(f"--limit 40 --samples 1 5 --batch-size {metrics['batch_size']} --device cpu")
    assert run(evaluate.main, weights, *size, "--out", again).code == 0
    found = json.loads((again / "metrics.json").read_text())
    for name in ("elbo", "iw", "standard_error", "kl_per_layer"):
        assert found[name] == metrics[name]
