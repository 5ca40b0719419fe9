"""train_svi.py --init-from: a new run from trained weights."""

import json
from pathlib import Path

import pytest
import torch

import train_svi
from ladder_vae.runs.published import published_weights, write_folder
from ladder_vae.runs.run import Run
from tests.commands import content, refusal, run, words
from tests.tiny_runs import stopping, train, training_entries

CPU = torch.device("cpu")
SHORT = words("--steps 3 --batch-size 32 --test-batch-size 297 --ts-log-interv 0 --device cpu")

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def published(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "digits"
    write_folder(folder, *published_weights(Run.open(trained_run), None))
    return folder


def test_a_run_starts_from_the_averaged_weights(trained_run: Path, published: Path) -> None:
    """Its weights and their average, whatever initialisation the preset asks for."""
    expected = Run.open(trained_run).load_checkpoint(30, CPU)["average"]["weights"]
    for path in (trained_run, published, published / "model.safetensors"):
        out = Path(f"from-{path.name}")
        options = words(
            "--ema 0.5 --dropout 0.1 --data-dep-init --scale-branches --tr-log-interv 1"
        )
        assert train("--init-from", path, *SHORT, *options, "--out", out) == 0
        fine_tuned = Run.open(out)
        original = Run.open(trained_run)
        assert fine_tuned.config.dataset == "digits"
        assert fine_tuned.config.ladder.z_dims == original.config.ladder.z_dims
        assert fine_tuned.config.ladder.dropout == 0.1
        assert not fine_tuned.config.data_dep_init
        origin = {"path": str(path), "step": 30, "weights": "average"}
        assert fine_tuned.provenance["initial_weights"] == origin
        initial = fine_tuned.load_checkpoint(0, CPU)
        for weights in (initial["weights"], initial["average"]["weights"]):
            assert all(torch.equal(weights[name], expected[name]) for name in expected)
    logged = [training_entries(f"from-{name}") for name in ("run", "digits")]
    assert logged[0][-1]["train/loss"] == logged[1][-1]["train/loss"]
    first = training_entries(trained_run)[0]["train/negative_elbo"]
    assert logged[0][0]["train/negative_elbo"] < first


def test_an_interruption_changes_nothing(
    trained_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the initial weights are gone by then."""
    arguments = ["--init-from", trained_copy, *SHORT]
    assert train(*arguments, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        stopping(patch, lambda step: step == 1)
        assert train(*arguments, "--out", "again") == 143
    Path("again/checkpoints/1.pt").unlink()  # as after a power failure
    for file in trained_copy.glob("checkpoints/*"):
        file.unlink()
    assert train("--resume", "again", "--device", "cpu") == 0
    states = [
        Run.open(Path(name)).load_checkpoint(3, CPU)["weights"] for name in ("whole", "again")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_run_without_its_initial_weights_does_not_start_again(trained_run: Path) -> None:
    assert train("--init-from", trained_run, *SHORT, "--out", "run") == 0
    for file in Path("run/checkpoints").iterdir():
        file.unlink()
    assert "start it again with --init-from" in refusal(train_svi.main, "--resume", "run")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--zdims 2 3", ["--zdims is 2 3", "a ladder with 2 2"]),
        ("--nonlin relu", ["--nonlin is relu", "elu"]),
        ("--preset mnist-3", ["with"]),
        ("--dataset static_mnist --data-dir .", ["static_mnist"]),
        ("--resume run", ["--resume cannot be combined", "--init-from"]),
    ],
)
def test_another_architecture_is_refused(
    options: str, named: list[str], trained_run: Path, tmp_path: Path
) -> None:
    line = refusal(train_svi.main, "--init-from", trained_run, *words(options), "--device", "cpu")
    for name in named:
        assert name in line
    assert content(tmp_path) == {}


def test_images_of_another_shape_are_refused(published: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.mkdir()
    for name in ("config.json", "model.safetensors"):
        (weights / name).write_bytes((published / name).read_bytes())
    config = json.loads((weights / "config.json").read_text())
    (weights / "config.json").write_text(json.dumps(config | {"image_shape": [1, 9, 8]}))
    line = refusal(train_svi.main, "--init-from", weights, *SHORT, "--out", "run")
    assert "are for images (1, 9, 8), but those of the data set are (1, 8, 8)" in line
    assert not Path("run").exists()


@pytest.mark.parametrize("path", ["absent", "absent.safetensors", "."])
def test_other_places_are_refused(path: str) -> None:
    assert "absent" in refusal(train_svi.main, "--init-from", path) or path == "."
    assert run(train_svi.main, "--init-from", path).code == 2
