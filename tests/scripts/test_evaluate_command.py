"""evaluate.py's command line: bounds of a run, its options, and mistakes."""

import errno
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import evaluate
from ladder_vae.runs.checkpoint import write_checkpoint
from ladder_vae.runs.run import Run
from tests.commands import Result, content, refusal, run, script, words

pytestmark = pytest.mark.usefixtures("own_folder")


def evaluated(folder: Path, *options: object) -> tuple[Result, dict[str, Any]]:
    """Evaluate a run; must succeed. Returns what was printed and the metrics of step 30."""
    result = run(evaluate.main, folder, "--device", "cpu", *options)
    assert result.code == 0, result.err
    assert result.err == ""
    return result, json.loads((evaluated_folder(result) / "metrics.json").read_text())


def evaluated_folder(result: Result) -> Path:
    """Where the evaluation says that its report is."""
    printed = re.search(r"(?m)^report +(.*)/report.html$", result.out)
    assert printed is not None
    return Path(printed[1])


def test_an_evaluation_by_the_command_line(trained_copy: Path) -> None:
    """In another process with the same seed and blocks: the same digits."""
    result = script("evaluate.py", trained_copy, "--samples", 1, 3, "--device", "cpu")
    assert result.code == 0, result.err
    assert result.err == ""
    folder = trained_copy / "eval" / "30-samples-1-3"
    assert "digits, 297 test images, step 30, moving average of the weights" in result.out
    for name in ("metrics.json", "per_image.npz", "report.html"):
        assert str(folder / name) in result.out
        assert (folder / name).is_file()
    found = json.loads((folder / "metrics.json").read_text())
    shown = {"ELBO": found["elbo"]}
    shown |= {"1 importance sample": found["iw"]["1"], "3 importance samples": found["iw"]["3"]}
    for name, value in shown.items():
        assert re.search(rf"(?m)^\| {name} +\| +{value:.2f} \|", result.out)
    _, again = evaluated(trained_copy, "--samples", 1, 3)
    assert again["elbo"] == pytest.approx(found["elbo"], rel=1e-6)
    assert again["iw"] == pytest.approx(found["iw"], rel=1e-6)


def test_metrics_are_consistent(trained_copy: Path) -> None:
    """For one pass over 297 images of 64 pixels."""
    _, found = evaluated(trained_copy, "--samples", 1, 3)
    assert list(found["iw"]) == ["1", "3"]
    assert found["n_images"] == 297
    assert (found["dataset"], found["split"], found["step"]) == ("digits", "test", 30)
    assert len(found["kl_per_layer"]) == 2
    total = found["reconstruction"] + sum(found["kl_per_layer"])
    assert found["elbo"] == pytest.approx(total, rel=1e-9)
    bounds = {"elbo": found["elbo"]} | found["iw"]
    assert found["bits_per_dim"].keys() == found["standard_error"].keys() == bounds.keys()
    for name, nats in bounds.items():
        assert found["bits_per_dim"][name] == pytest.approx(nats / (64 * math.log(2)), rel=1e-9)
        assert 0 < found["standard_error"][name] < nats
    # log-mean-exp of the same three samples is at least their mean
    assert found["iw"]["3"] <= found["elbo"]


def test_layers_are_listed_from_the_bottom(trained_copy: Path) -> None:
    """A top layer whose posterior and prior are made equal has no KL, and it comes last."""
    found = Run.open(trained_copy)
    state = found.load_checkpoint(30, torch.device("cpu"))
    for name, value in state["average"]["weights"].items():
        if "top_posterior" in name or "top_prior" in name:
            value.zero_()
    write_checkpoint(found.checkpoint_path(30), state)
    kl = evaluated(trained_copy, "--samples", 1, "--limit", 20)[1]["kl_per_layer"]
    assert kl[0] != 0
    assert kl[1] == 0


def test_options_choose_checkpoint_weights_split_and_images(trained_copy: Path) -> None:
    arguments = words("--checkpoint 20 --no-average --split valid --limit 20 --samples 2 --seed 3")
    result = run(evaluate.main, trained_copy, *arguments, "--batch-size", 7, "--device", "cpu")
    assert result.code == 0, result.err
    assert "digits, 20 valid images, step 20, last weights" in result.out
    assert "note      the run was trained on valid images" in result.out
    found = json.loads(
        (trained_copy / "eval" / "20-valid-limit-20-seed-3-samples-2" / "metrics.json").read_text()
    )
    expected = {"step": 20, "weights": "last", "split": "valid", "n_images": 20}
    expected |= {"seed": 3, "batch_size": 7}
    assert {name: found[name] for name in expected} == expected
    assert list(found["iw"]) == ["2"]


def test_a_single_image_has_no_standard_error(trained_copy: Path) -> None:
    _, found = evaluated(trained_copy, "--limit", 1, "--samples", 1)
    assert found["standard_error"] == {"elbo": None, "1": None}


# --- Mistakes ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--samples 0", ["--samples", "at least 1"]),
        ("--samples -1 5", ["--samples"]),
        ("--samples 3 2", ["--samples is 3 2", "ascend"]),
        ("--samples 3 3", ["--samples is 3 3", "ascend"]),
        ("--samples", ["--samples"]),
        ("--samples ten", ["--samples", "'ten'"]),
        ("--split validation", ["--split", "'validation'", "valid"]),
        ("--limit 0", ["--limit", "at least 1"]),
        ("--limit -3", ["--limit", "at least 1"]),
        ("--limit 298", ["--limit is 298", "297"]),
        ("--batch-size 0", ["--batch-size", "at least 1"]),
        ("--checkpoint 5", ["no checkpoint of step 5", "20, 30"]),
        ("--checkpoint first", ["--checkpoint is 'first'", "last"]),
        ("--checkpoint -4", ["--checkpoint"]),
        ("--checkpoint 4.0", ["--checkpoint is '4.0'"]),
        ("--seed -1", ["--seed"]),
        ("--seed 99999999999999999999999", ["--seed"]),
        ("--device tpu", ["'tpu'"]),
        ("--precision tf32", ["--precision tf32 needs a GPU"]),
        ("--steps 3", ["--steps"]),
    ],
)
def test_wrong_options_are_refused(options: str, named: list[str], trained_copy: Path) -> None:
    before = content(trained_copy)
    arguments = ["--samples", 1, *options.split()]
    line = refusal(evaluate.main, trained_copy, "--device", "cpu", *arguments)
    for name in named:
        assert name in line
    assert content(trained_copy) == before


def test_the_run_is_required() -> None:
    assert "RUN" in refusal(evaluate.main)


def test_a_run_without_checkpoints_cannot_be_evaluated(trained_copy: Path) -> None:
    shutil.rmtree(trained_copy / "checkpoints")
    line = refusal(evaluate.main, trained_copy, "--device", "cpu", "--samples", 1)
    assert f"{trained_copy} has no checkpoint" in line


def test_a_full_disk_is_reported(trained_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress file stays, for the next try."""

    def full(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = content(trained_copy)
    monkeypatch.setattr(os, "replace", full)
    line = refusal(evaluate.main, trained_copy, "--samples", 1, "--limit", 20, "--device", "cpu")
    assert "No space left on device" in line
    after = content(trained_copy)
    assert {name: after[name] for name in after if not name.startswith("eval")} == before
