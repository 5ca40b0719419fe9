"""reproduce.py: the budget, rows from beginning to end, stops, and what is left to be kept."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import datasets
import evaluate
import pieces
import train_svi
from benchmarks import recipes
from ladder_vae.runs import provenance
from ladder_vae.runs import published as published_weights
from ladder_vae.runs.command_line import config_from
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS, ROWS
from ladder_vae.training import rate as budget
from ladder_vae.training.rate import Rate, fitted_steps, measured_rate
from ladder_vae.training.signals import Interrupted
from runtime.errors import UserError
from tests.commands import ROOT, content, refusal, run, subprocess_environment, words
from tests.datasets.test_celeba import Published, published  # noqa: F401 (a fixture)
from tests.made_data import make_svhn, serving
from tests.runs.test_presets import made_images
from tools import readme_tables as readme
from tools import reproduce

# A ladder of two layers on the 8x8 digits that come with scikit-learn, in place of the row's own.
TINY = words(
    "--dataset digits --zdims 2 2 --downsample 0 1 --nfilters 4 --blocks-per-layer 1 "
    "--batch-size 32 --device cpu --samples 1 5 --limit 40"
)
STEPS = words("--steps 6 --tr-log-interv 1 --ts-log-interv 3")
COMMAND = ["mnist-3", *TINY, *STEPS]
# Images times samples of a pass in scoring: ten groups of four images.
BLOCK = 20


def in_blocks(patch: pytest.MonkeyPatch, size: int) -> None:
    """Have a machine's memory suggest blocks of this size."""
    patch.setattr(evaluate, "automatic_batch_size", lambda *_: size)


@pytest.fixture(autouse=True)
def blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    in_blocks(monkeypatch, BLOCK)


# --- The budget ---


class Machine:
    """A clock that a step moves on, by other times for the steps that are listed."""

    def __init__(self, seconds: float, others: dict[int, float]) -> None:
        self.now, self.seconds, self.others, self.steps = 0.0, seconds, others, 0

    def clock(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += self.others.get(self.steps, self.seconds)
        self.steps += 1


def test_compilation_does_not_count() -> None:
    machine = Machine(0.25, {0: 60.0, 3: 45.0})
    rate = measured_rate(machine.step, machine.clock, seconds=20)
    assert rate == Rate(steps_per_second=4.0, steps=80)
    assert machine.steps == budget.UNCOUNTED + 1 + 80


def test_a_disturbance_does_not_count() -> None:
    """Of one stretch in five, or of two."""
    machine = Machine(0.25, {budget.UNCOUNTED + 5: 30.0, budget.UNCOUNTED + 40: 10.0})
    assert measured_rate(machine.step, machine.clock, seconds=20).steps_per_second == 4.0


def test_steps_that_take_longer_than_the_measurement() -> None:
    machine = Machine(32.0, {})
    assert measured_rate(machine.step, machine.clock, seconds=20, uncounted=1) == Rate(1 / 32, 5)


def test_steps_fit_into_the_minutes_but_for_the_reserve() -> None:
    assert budget.RESERVE == 0.05
    assert fitted_steps(20, Rate(10.0, 100)) == 11_400
    assert fitted_steps(1 / 60, Rate(2.2, 1)) == 2
    with pytest.raises(UserError, match=r"^--minutes is 0.01, .* it must be at least 0.018 here$"):
        fitted_steps(0.01, Rate(1.0, 1))


def test_the_schedule_is_fitted_to_the_steps() -> None:
    config = reproduce.fitted_config(PRESETS["mnist-12-fast"] | {"epochs": 0}, 1001)
    assert (config["steps"], config["epochs"], config["max_minutes"]) == (1001, 0, 0)
    assert config["lr_decay"] == "cosine"
    assert config["lr_warmup"] == 100  # a tenth, where the recipe has more
    assert config["ts_log_interv"] == 101  # ten evaluations
    assert config["tr_log_interv"] == 10
    assert reproduce.fitted_config({"lr_warmup": 7, "lr_decay": "cosine"}, 1001)["lr_warmup"] == 7
    assert reproduce.fitted_config({"ts_log_interv": 7}, 1001)["ts_log_interv"] == 7


# --- Rows ---


def reproduced(folder: Path, *command: object) -> str:
    """Run a command to its end; returns what it printed."""
    result = run(reproduce.main, *(command or COMMAND), "--out", folder)
    assert result.code == 0, result.err
    return result.out


def kept(folder: Path) -> dict[str, Any]:
    """Everything in the folder of a complete row that an undisturbed run must give too."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for name in ("minutes", "provenance", "trained"):
        del metrics[name]
    with np.load(folder / "per_image.npz") as arrays:
        per_image = {name: arrays[name].tobytes() for name in arrays}
    (path,) = folder.glob("*-fast")
    entries = read_entries(path / "metrics.jsonl")
    for entry in entries:
        entry.pop("time")
        entry.pop("train/images_per_second", None)
    tensors = load_file(folder / "weights.safetensors")
    weights = {name: value.numpy().tobytes() for name, value in tensors.items()}
    pictures = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.png"))}
    config = json.loads((path / "config.json").read_text())["config"]
    return {
        **{"metrics": metrics, "per_image": per_image, "entries": entries, "weights": weights},
        **{"pictures": pictures, "config": config},
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "row"
    with pytest.MonkeyPatch.context() as patch:
        in_blocks(patch, BLOCK)
        reproduced(folder)
    return folder


def test_what_is_left_of_a_row(undisturbed: Path) -> None:
    names = {name for name, body in content(undisturbed).items() if body is not None}
    assert {
        *("metrics.json", "per_image.npz", "report.html", "reproduce.json", "weights.safetensors"),
        *("samples.png", "reconstructions.png", "layers.png", "layer_01.png", "interpolation.png"),
        *("mnist-3-fast/config.json", "mnist-3-fast/metrics.jsonl", "mnist-3-fast/report.html"),
    } <= names
    assert any("events.out.tfevents" in name for name in names)
    assert not any(".pt" in Path(name).name or ".progress" in name for name in names)
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    assert (metrics["weights"], metrics["step"], metrics["n_images"]) == ("average", 6, 40)
    assert metrics["training_seed"] == 42
    assert metrics["minutes"] > 0
    assert metrics["iw"].keys() == {"1", "5"}
    plan = json.loads((undisturbed / "reproduce.json").read_text())
    assert plan["phase"] == "complete"
    assert plan["asked"]["row"] == "mnist-3"
    assert [s["phase"] for s in plan["sessions"]] == ["training"]


def test_a_complete_row_is_left_alone(undisturbed: Path) -> None:
    before = content(undisturbed)
    assert reproduced(undisturbed) == f"complete  {undisturbed / 'metrics.json'}\n"
    assert content(undisturbed) == before


def test_minutes_become_steps_and_nothing_else(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured steps leave no trace, and the clock has no part in what is learned."""

    def measured(step: Callable[[], object], clock: Any, seconds: float) -> Rate:
        step()
        step()
        assert clock() < clock()
        assert seconds == 0.5
        return Rate(6.5, 2)

    monkeypatch.setattr(reproduce, "measured_rate", measured)
    intervals = words("--tr-log-interv 1 --ts-log-interv 3 --measure 0.5")
    command = ["mnist-3", *TINY, *intervals, "--minutes", 1 / 60]
    out = reproduced(tmp_path / "row", *command)
    assert "rate      6.5 steps/s of 32 images on " in out
    assert "training  6 steps\n" in out
    assert kept(tmp_path / "row") == kept(undisturbed)
    plan = json.loads((tmp_path / "row" / "reproduce.json").read_text())
    assert plan["rate"]["steps_per_second"] == 6.5
    assert plan["rate"].keys() >= {"machine", "commit"}


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["mnist-3", *TINY, "--minutes", 0.5, "--measure", 0.1, "--dry-run"]
    result = run(reproduce.main, *command)
    assert result.code == 0, result.err
    lines = [line.split()[0] for line in result.out.splitlines()]
    assert lines == ["measures", "rate", "training", "scoring"]
    assert content(tmp_path) == before


# --- Stops ---


def stopping(patch: pytest.MonkeyPatch, at: int) -> None:
    """Have the command end at the so-manieth time that it looks for a signal."""
    calls = iter(range(1, 10**6))

    def check(self: reproduce.Pause, _: int = 0) -> None:
        if next(calls) >= at:
            raise Interrupted

    patch.setattr(reproduce.Pause, "check", check)


def moved(folder: Path, to: Path) -> Path:
    """The folder as another machine gets it: packed, and unpacked there."""
    assert run(pieces.main, "pack", folder, "--out", to / "packed").code == 0
    shutil.rmtree(folder)
    assert run(pieces.main, "unpack", to / "packed", "--out", to / "row").code == 0
    shutil.rmtree(to / "packed")
    return to / "row"


def test_a_row_that_is_stopped_all_the_time_comes_out_the_same(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, in evaluations on the way, in scoring; each time it moves to another machine.

    The machines have other memory, but blocks of the scoring stay what they were.
    """
    monkeypatch.setattr(pieces, "LARGEST", 10_000)
    folder = tmp_path / "row"
    phases: list[str] = []
    for turn in range(30):
        with monkeypatch.context() as patch:
            stopping(patch, at=4 if turn < 4 else 6)
            in_blocks(patch, 8 if "scoring" in phases else BLOCK)
            result = run(reproduce.main, *COMMAND, "--out", folder)
        phases.append(json.loads((folder / "reproduce.json").read_text())["phase"])
        if result.code == 0:
            break
        assert result.code == reproduce.PAUSED
        assert result.err.endswith("paused: the same command goes on from here\n")
        assert max(path.stat().st_size for path in folder.rglob("*.pt*")) <= 10_000
        folder = moved(folder, tmp_path / str(turn))
    assert phases.count("training") > 2
    assert phases.count("scoring") > 2
    assert phases[-1] == "complete"
    plan = json.loads((folder / "reproduce.json").read_text())
    assert [session["step"] for session in plan["sessions"]][:4] == [0, 3, 5, 6]
    assert kept(joined(folder, tmp_path / "joined")) == kept(undisturbed)


def joined(folder: Path, to: Path) -> Path:
    """A complete row's folder with its files in one piece each."""
    shutil.copytree(folder, to)
    manifests = sorted(to.rglob("*.pieces.json"))
    assert manifests  # of the weights at least
    for manifest in manifests:
        path = manifest.with_name(manifest.name.removesuffix(".pieces.json"))
        pieces.join(path, path)
    return to


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_ended_is_continued_elsewhere(
    number: signal.Signals, tmp_path: Path
) -> None:
    """By the same command, from what lies in the folder; a signal leaves the step it came at."""
    folder = tmp_path / "row"
    options = "--steps 400 --tr-log-interv 1 --ts-log-interv 0 --checkpoint-minutes 0.001".split()
    command = ["mnist-3", *TINY, *options]
    with subprocess.Popen(
        [sys.executable, ROOT / "reproduce.py", *command, "--out", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=subprocess_environment(),
    ) as process:
        deadline = time.monotonic() + 240
        while not list(folder.glob("mnist-3-fast/checkpoints/*.pt")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=240)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in err
    state = reproduce.PiecedRun.open(folder / "mnist-3-fast").load_checkpoint(
        None, torch.device("cpu")
    )
    assert 0 < state["step"] < 400
    elsewhere = moved(folder, tmp_path / "elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        stopping(patch, at=3)
        result = run(reproduce.main, *command, "--out", elsewhere)
    assert result.code == reproduce.PAUSED
    assert f"{400 - state['step']} of 400 steps left\n" in result.out
    assert result.err.startswith(f"step {state['step'] + 1}: ")


def test_a_command_pauses_by_itself(tmp_path: Path) -> None:
    result = run(reproduce.main, *COMMAND, "--out", tmp_path / "row", "--pause-after", 1e-6)
    assert result.code == reproduce.PAUSED
    assert result.err == "paused: the same command goes on from here\n"
    pause = reproduce.Pause(None)
    pause.check()  # never
    with pytest.raises(Interrupted):
        reproduce.Pause(1e-9).check()


def test_what_is_not_right_with_the_numbers_is_told(tmp_path: Path) -> None:
    command = ["mnist-3", *TINY, "--steps", 30, "--grad-skip", 1e-9]
    result = run(reproduce.main, *command, "--out", tmp_path / "row")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("error: step 10: 10 updates in a row were skip")


# --- Damage ---


@pytest.fixture
def half_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A row that has been stopped in its training, its state in small pieces."""
    monkeypatch.setattr(pieces, "LARGEST", 10_000)
    with monkeypatch.context() as patch:
        stopping(patch, at=4)
        result = run(reproduce.main, *COMMAND, "--out", tmp_path / "row")
    assert result.code == reproduce.PAUSED
    assert len(list((tmp_path / "row").rglob("3.pt.0*"))) > 2
    return tmp_path / "row"


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        ("mnist-3-fast/checkpoints/3.pt.001-*", Path.unlink, " is missing: fetch it again"),
        ("mnist-3-fast/checkpoints/3.pt.001-*", cut_short, " is damaged: it has 9,993 bytes"),
        ("mnist-3-fast/checkpoints/3.pt.pieces.json", cut_short, "3.pt.pieces.json is damaged"),
        ("mnist-3-fast/config.json", cut_short, "config.json is damaged"),
        ("reproduce.json", cut_short, "reproduce.json is damaged"),
        ("reproduce.json", Path.unlink, "is not an empty folder"),
    ],
)
def test_a_damaged_folder_is_refused(
    half_trained: Path, name: str, damage: Callable[[Path], None], told: str
) -> None:
    (path,) = half_trained.glob(name)
    damage(path)
    result = run(reproduce.main, *COMMAND, "--out", half_trained)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ")
    assert told in line


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--lr", "0.5"], "was begun with lr not given, and this command has 0.5: give the same"),
        (["--steps", "7"], "was begun with steps 6, and this command has 7"),
        (["--samples", "1"], "was begun with samples 1 5, and this command has 1"),
        (["--limit", "41"], "was begun with limit 40, and this command has 41"),
        (["--split", "valid"], "was begun with split test, and this command has valid"),
    ],
)
def test_another_command_does_not_continue_a_row(
    half_trained: Path, changes: list[str], told: str
) -> None:
    before = content(half_trained)
    assert told in refusal(reproduce.main, *COMMAND, *changes, "--out", half_trained)
    assert content(half_trained) == before


# --- Refusals ---


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("digits --minutes 1", "invalid choice: 'digits'"),
        ("mnist-3-fast --minutes 1", "invalid choice: 'mnist-3-fast'"),
        ("mnist-3", "give --minutes of training, or its --steps, and not both"),
        ("mnist-3 --minutes 1 --steps 5", "give --minutes of training, or its --steps, and not"),
        ("mnist-3 --minutes 0", "--minutes is 0; it must be finite and positive"),
        ("mnist-3 --minutes nan", "--minutes is nan; it must be finite and positive"),
        ("mnist-3 --minutes 1 --pause-after -1", "--pause-after is -1; it must be finite and pos"),
        ("mnist-3 --minutes 1 --measure 0", "--measure is 0; it must be finite and positive"),
        ("mnist-3 --steps 0", "--steps is 0; it must be at least 1"),
        ("mnist-3 --steps -3", "--steps is -3; it must be finite and not negative"),
        ("mnist-3 --minutes 1 --epochs 3", "--epochs does nothing here"),
        ("mnist-3 --minutes 1 --max-minutes 3", "--max-minutes does nothing here"),
        ("mnist-3 --minutes 1 --preset digits", "unrecognized arguments: --preset digits"),
        ("mnist-3 --minutes 1 --samples 5 1", "--samples is 5 1; it must be positive numbers th"),
        ("mnist-3 --minutes 1 --limit 0", "--limit is 0; it must be at least 1"),
        ("mnist-3 --steps 1 --dataset digits --limit 298", "--limit is 298 but there are 297 im"),
        ("mnist-3 --steps 1 --dataset digits --lr 0", "--lr is 0.0; it must be finite and posit"),
        ("mnist-3 --steps 1 --device tpu", "--device is 'tpu'; it must be auto, cpu, cuda or cud"),
    ],
)
def test_wrong_commands_are_refused(arguments: str, told: str, tmp_path: Path) -> None:
    line = refusal(reproduce.main, *words(arguments), "--out", tmp_path / "row")
    assert told in line
    assert not (tmp_path / "row").exists()


def test_what_a_dry_run_does_not_take() -> None:
    line = refusal(reproduce.main, "mnist-3", "--minutes", 1, "--dry-run", "--out", "row")
    assert line == "error: --dry-run writes nothing: leave out --out and --pause-after\n"
    assert "--out is missing" in refusal(reproduce.main, "mnist-3", "--minutes", 1)


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = refusal(reproduce.main, *COMMAND, "--out", "row")
    assert line == "error: reproduce.py is a single process: start it without torchrun\n"


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    line = refusal(reproduce.main, *COMMAND, "--out", tmp_path)
    assert line == f"error: {tmp_path} is not an empty folder; give a new folder to --out\n"
    assert content(tmp_path) == {"notes.txt": b"mine"}


# --- Every row ---


def narrowed(row: str) -> list[str]:
    """A row's command with a ladder as deep as its own, of few channels, and one step."""
    preset = PRESETS[row]
    options = ["--zdims", *["1"] * len(preset["z_dims"]), "--downsample"]
    options += [str(min(halvings, 1)) for halvings in preset["downsample"]]
    options += words("--nfilters 2 --blocks-per-layer 1 --batch-size 4 --steps 1 --device cpu")
    options += words("--samples 1 2")
    return [row, *options]


def check_row(row: str, folder: Path, count: int) -> None:
    """What is left of a row of one step is what the table and others need."""
    metrics = json.loads((folder / "metrics.json").read_text())
    split = "valid" if row == "celeba-20" else "test"
    assert (metrics["dataset"], metrics["split"]) == (PRESETS[row]["dataset"], split)
    assert (metrics["layers"], metrics["n_images"]) == (len(PRESETS[row]["z_dims"]), count)
    assert (metrics["weights"], metrics["limit"]) == ("average", None)
    binary = datasets.is_binary(metrics["dataset"])
    assert 0 < metrics["bits_per_dim"]["2"] < (1.5 if binary else 16)
    config = json.loads((folder / f"{row}-fast" / "config.json").read_text())["config"]
    fast = PRESETS[f"{row}-fast"]
    for name in ("lr", "lr_decay", "ema", "free_bits", "train_split", "grad_clip", "dropout"):
        assert config[name] == fast.get(name, getattr(RunConfig.of(), name))
    assert (config["train_split"] == "train") == (row == "celeba-20")
    run_folder = folder.with_name("imported")
    weights = folder / "weights.safetensors"
    assert published_weights.import_weights(weights, run_folder).checkpoint_steps() == [1]


@pytest.mark.parametrize("row", [row for row in ROWS if row not in ("svhn-15", "celeba-20")])
def test_each_row_goes_from_beginning_to_end(
    row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On made images, by its fast preset."""
    monkeypatch.setattr(datasets, "load", made_images)
    reproduced(tmp_path / row, *narrowed(row))
    check_row(row, tmp_path / row, count=12)


def test_svhn_from_its_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        make_svhn(server, monkeypatch)
        reproduced(tmp_path / "row", *narrowed("svhn-15"), "--data-dir", tmp_path / "data")
    check_row("svhn-15", tmp_path / "row", count=6)


def test_celeba_from_its_published_files(
    published: Published,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Trained on its training images, scored on its validation images."""
    data = published.file.parent
    out = reproduced(tmp_path / "row", *narrowed("celeba-20"), "--data-dir", data)
    check_row("celeba-20", tmp_path / "row", count=3)
    assert "5 images of celeba (train)" in out
    assert "note" not in out  # no image that was scored has been trained on


def test_a_row_is_the_table_s_network() -> None:
    """A fast preset changes nothing of the network: only how it is trained."""
    training = {
        *("batch_size", "lr", "lr_warmup", "lr_decay", "ema", "epochs", "grad_clip", "grad_skip"),
        *("train_split", "dropout", "precision"),
    }
    for row in ROWS:
        fast, plain = PRESETS[f"{row}-fast"], PRESETS[row]
        changed = {name for name in fast if fast[name] != plain.get(name)}
        assert changed <= training
        assert fast["lr_decay"] == "cosine"
        assert fast["batch_size"] >= 256
        assert fast["ema"] >= 0.99
    assert set(ROWS) == {row["preset"] for row in readme.read("reference.json")["rows"]}


# --- What is published ---


def test_the_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_git(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.delenv("LVAE_COMMIT", raising=False)
    assert provenance.commit() is None
    monkeypatch.setenv("LVAE_COMMIT", "0123456789ab")
    assert provenance.commit() == "0123456789ab"


def test_published_weights_can_be_checked_by_anyone(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """README's commands, from the file alone: the figure comes out again, to the digit here."""
    results, pretrained = tmp_path / "results", tmp_path / "pretrained"
    monkeypatch.setattr(readme, "RESULTS", results)
    monkeypatch.setattr(readme, "PRETRAINED", pretrained)
    assert readme.pretrained_table() == ""
    (results / "mnist-3").mkdir(parents=True)
    pretrained.mkdir()
    shutil.copy(undisturbed / "metrics.json", results / "mnist-3")
    shutil.copy(undisturbed / "weights.safetensors", pretrained / "mnist-3.safetensors")
    text = readme.pretrained_table()
    metrics = json.loads((undisturbed / "metrics.json").read_text())
    assert "| weights | ELBO | 1 sample | 5 samples |" in text
    assert f"| [mnist-3](pretrained/mnist-3.safetensors) | {metrics['elbo']:.2f} ± " in text
    imported, evaluated = (line.split() for line in text.splitlines() if line.startswith("python "))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LVAE_DATA", raising=False)
    assert imported[1] == "published.py"
    assert run(published_weights.main, *imported[2:]).code == 0
    assert evaluated[1] == "evaluate.py"
    result = run(evaluate.main, *evaluated[2:], "--limit", 40, "--batch-size", BLOCK)
    assert result.code == 0, result.err
    (again,) = tmp_path.glob("runs/mnist-3-pretrained/eval/*/metrics.json")
    found = json.loads(again.read_text())
    for name in ("elbo", "iw", "standard_error", "kl_per_layer"):
        assert found[name] == metrics[name]


# --- Recipes ---


def test_the_comparison_of_recipes_is_that_of_its_figures() -> None:
    assert (readme.RESULTS / "recipes.md").read_text() == recipes.table()


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_recipes_are_compared_for_as_many_images_and_never_on_the_test_set(name: str) -> None:
    recipe = recipes.RECIPES[name]
    options = [*recipes.SETTING, *recipe.options.split(), "--steps", str(recipe.steps)]
    config = config_from(train_svi.parse_arguments(options))
    images = recipes.DEEP_IMAGES if recipe.is_deep else recipes.IMAGES
    assert config.steps * config.batch_size == images
    assert config.train_split == "train"


def test_changes_of_the_network_are_gone_after_a_recipe(
    make_pair: Callable[..., Any], x: torch.Tensor
) -> None:
    """And within one they do what they say."""
    _, guide = make_pair()

    def scales() -> list[torch.Tensor]:
        torch.manual_seed(0)
        guide(x)
        posterior = guide.get_traces()[1].nodes["z_1"]["fn"].base_dist
        prior = guide.get_traces()[0].nodes["z_1"]["fn"].base_dist
        return [posterior.loc, posterior.scale, prior.scale]

    with torch.no_grad():
        before = scales()
        with recipes.softplus_scales():
            softplus = scales()
        guide.posteriors[0].conv.bias.fill_(1000.0)
        with recipes.soft_clamp():
            clamped = scales()
        torch.testing.assert_close(clamped[0], torch.full_like(clamped[0], 5.0))
        torch.testing.assert_close(clamped[1], torch.full_like(clamped[1], math.exp(5)))
        assert not torch.equal(softplus[1], before[1])
        assert not torch.equal(softplus[2], before[2])
