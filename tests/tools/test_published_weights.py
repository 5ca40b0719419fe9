"""tools.export_weights: the layout of the hub, and the same digits from it."""

import json
from pathlib import Path

import pytest

import evaluate
import train_svi
from ladder_vae.runs.published import read_published
from ladder_vae.runs.run import Run
from tests.commands import content, refusal, run
from tools import export_weights


@pytest.fixture(scope="module")
def published(evaluated_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an evaluated run."""
    folder = tmp_path_factory.mktemp("published") / "digits"
    result = run(export_weights.main, evaluated_run, "--out", folder)
    assert (result.code, result.out) == (0, f"weights of step 30 in {folder}\n")
    return folder


def test_the_folder_is_that_of_the_hub(published: Path, evaluated_run: Path) -> None:
    assert sorted(content(published)) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((published / "config.json").read_text())
    original = json.loads((evaluated_run / "config.json").read_text())
    assert config == config | original
    assert (config["step"], config["weights"]) == (30, "average")
    assert config["minutes"] > 0


def test_the_model_card_states_what_a_reader_asks(published: Path, evaluated_run: Path) -> None:
    card = (published / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert front.splitlines() == [
        "library_name: ladder-vae-pyro",
        "pipeline_tag: unconditional-image-generation",
        'license: "apache-2.0"',
        *("tags:", "- pyro", "- pytorch", "- ladder-vae", "- variational-autoencoder"),
        *("datasets:", '- "digits"'),
        *("metrics:", "- negative_elbo", "- negative_bound_1_samples"),
        "- negative_bound_30_samples",
    ]
    metrics = json.loads((evaluated_run / "eval" / "30" / "metrics.json").read_text())
    for key, name in {"elbo": "ELBO", "30": "30 importance samples"}.items():
        bound = metrics["elbo"] if key == "elbo" else metrics["iw"][key]
        error = metrics["standard_error"][key]
        (row,) = [line for line in body.splitlines() if line.startswith(f"| {name} ")]
        assert [cell.strip() for cell in row.split("|")][2:4] == [f"{bound:.2f}", f"{error:.2f}"]
    facts = [
        *("over 40 test images (a random subset) of digits", "grey images, 8 high and 8 wide"),
        *("2 stochastic layers", "independent Bernoulli pixels", "| layer 2 (top) "),
        *("30 steps of 32 images", "the moving average of the weights", "Ladder.load("),
        *(metrics["provenance"]["machine"], f"torch {metrics['provenance']['torch']}"),
        *(json.loads((published / "config.json").read_text())["sha256"], "licence `apache-2.0`"),
    ]
    for fact in facts:
        assert fact in body


def test_a_card_without_evaluation_says_so(trained_run: Path, tmp_path: Path) -> None:
    arguments = ["--license", "mit", "--out", tmp_path / "out"]
    assert run(export_weights.main, trained_run, *arguments).code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "These weights have not been evaluated." in card
    assert "metrics:" not in card
    assert 'license: "mit"' in card


def test_published_weights_score_the_same(
    published: Path, evaluated_run: Path, tmp_path: Path
) -> None:
    """To the last digit; a folder takes results as a run does, and a file needs --out."""
    options = "--samples 1 30 --limit 40 --device cpu".split()
    file = published / "model.safetensors"
    assert "add --out" in refusal(evaluate.main, file, *options)
    for path, out in ((published, tmp_path / "a"), (file, tmp_path / "b")):
        assert run(evaluate.main, path, *options, "--out", out).code == 0
        found = json.loads((out / "metrics.json").read_text())
        expected = json.loads((evaluated_run / "eval" / "30" / "metrics.json").read_text())
        assert found.keys() == expected.keys()
        for name in found.keys() - {"provenance"}:
            assert found[name] == expected[name], name
    assert Run.open(published).config == Run.open(evaluated_run).config


def test_nothing_is_overwritten_unasked(published: Path, trained_run: Path) -> None:
    before = content(published)
    line = refusal(export_weights.main, trained_run, "--checkpoint", 20, "--out", published)
    assert "model.safetensors exists" in line
    assert "--overwrite" in line
    assert content(published) == before


def test_training_cannot_resume_from_published_weights(published: Path) -> None:
    before = content(published)
    line = refusal(train_svi.main, "--resume", published, "--steps", 40)
    assert f"--init-from {published}" in line
    assert content(published) == before


@pytest.mark.parametrize(("checkpoint", "step"), [("last", 30), ("20", 20)])
def test_any_checkpoint_can_be_exported(
    checkpoint: str, step: int, trained_run: Path, tmp_path: Path
) -> None:
    arguments = [trained_run, "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    assert run(export_weights.main, *arguments).code == 0
    assert read_published(tmp_path / "out")[0]["step"] == step


@pytest.mark.parametrize("checkpoint", ["first", "9" * 5000, "3"])
def test_missing_checkpoints_are_refused(
    checkpoint: str, trained_run: Path, tmp_path: Path
) -> None:
    arguments = [trained_run, "--checkpoint", checkpoint, "--out", tmp_path / "out"]
    assert "checkpoint" in refusal(export_weights.main, *arguments)
    assert not (tmp_path / "out").exists()
