"""What evaluate.py writes, draws and refuses."""

import base64
import errno
import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import evaluate
from ladder_vae.evaluation.importance import ImportanceSampler
from ladder_vae.runs.checkpoint import read_checkpoint, write_checkpoint
from tests.commands import Result, content, refusal, run, words

PICTURES = [
    *("samples", "reconstructions", "layers", "layer_01", "layer_02", "interpolation"),
    *("kl", "kl_maps", "bound", "pareto_k"),
]
# As `evaluated_run` was evaluated.
SAME = words("--samples 1 30 --limit 40")

pytestmark = pytest.mark.usefixtures("own_folder")


def evaluated(folder: Path, *options: object) -> Result:
    result = run(evaluate.main, folder, "--device", "cpu", *options)
    assert result.code == 0, result.err
    return result


def test_metrics_are_means_over_the_images(evaluated_run: Path) -> None:
    """The means of per_image.npz are those of metrics.json; bounds there are not negated."""
    found = json.loads((evaluated_run / "eval" / "30" / "metrics.json").read_text())
    with np.load(evaluated_run / "eval" / "30" / "per_image.npz", allow_pickle=False) as arrays:
        by_image = dict(arrays)
    assert len(set(by_image["image"].tolist())) == found["n_images"] == found["limit"] == 40
    samples = by_image["samples"].tolist()
    assert samples == found["curve"]["samples"] == [1, 2, 4, 8, 16, 30]
    bounds = -by_image["bound"].mean(0)
    assert_close(found["curve"]["nats"], bounds.tolist())
    assert_close([found["iw"]["1"], found["iw"]["30"]], [bounds[0], bounds[-1]])
    assert found["elbo"] == pytest.approx(-by_image["elbo"].mean())
    assert found["reconstruction"] == pytest.approx(-by_image["log_likelihood"].mean())
    assert_close(found["kl_per_layer"], by_image["kl"].mean(0).tolist())
    assert found["effective_samples"]["min"] == by_image["effective_samples"].min() >= 1
    threshold = 1 - 1 / math.log10(30)
    share = (by_image["pareto_k"] > threshold).mean()
    assert found["pareto_k"]["threshold"] == pytest.approx(threshold)
    assert found["pareto_k"]["share_above"] == pytest.approx(share)
    assert found["pareto_smoothed"]["nats"] == pytest.approx(-by_image["pareto_smoothed"].mean())
    assert (share > 0.05) == (found["warning"] is not None)


def test_the_report_holds_the_pictures(evaluated_run: Path) -> None:
    folder = evaluated_run / "eval" / "30"
    report = (folder / "report.html").read_text()
    for name in PICTURES:
        picture = (folder / f"{name}.png").read_bytes()
        with Image.open(folder / f"{name}.png") as image:
            assert min(image.size) > 100
        assert base64.b64encode(picture).decode() in report
    expected = {"metrics.json", "per_image.npz", "report.html", *(f"{n}.png" for n in PICTURES)}
    assert set(content(folder)) == expected  # and no progress file


def test_the_temperature_only_changes_the_samples(evaluated_copy: Path) -> None:
    """At temperature 0, all samples are equal."""
    before = content(evaluated_copy / "eval" / "30")
    evaluated(evaluated_copy, *SAME, "--temperature", 0)
    folder = evaluated_copy / "eval" / "30-limit-40-samples-1-30-temperature-0.0"
    after = content(folder)
    assert content(evaluated_copy / "eval" / "30") == before
    changed = {name for name in before if before[name] != after[name]}
    assert changed - {"metrics.json"} == {"samples.png", "report.html"}
    with Image.open(folder / "samples.png") as image:
        pixels = np.asarray(image.convert("L"))
    grid = pixels[-16 - 466 : -16, 16 : 16 + 466]  # 8 x 8 images of 56, with 2 between and around
    tiles = {
        grid[2 + 58 * r :][:56, 2 + 58 * c :][:, :56].tobytes() for r in range(8) for c in range(8)
    }
    assert len(tiles) == 1


def test_out_is_another_folder(evaluated_copy: Path, tmp_path: Path) -> None:
    before = content(evaluated_copy)
    evaluated(evaluated_copy, *words("--samples 1 --limit 5 --out there"))
    assert content(evaluated_copy) == before
    assert (tmp_path / "there" / "metrics.json").exists()


def test_each_split_has_its_own_folder(evaluated_copy: Path) -> None:
    before = content(evaluated_copy / "eval" / "30")
    evaluated(evaluated_copy, *SAME, "--split", "valid")
    assert content(evaluated_copy / "eval" / "30") == before
    found, other = (
        json.loads((evaluated_copy / "eval" / name / "metrics.json").read_text())
        for name in ("30-valid-limit-40-samples-1-30", "30")
    )
    assert (found["split"], found["n_images"]) == ("valid", 40)
    assert found["elbo"] != other["elbo"]  # from the same noise
    folder = evaluated_copy / "eval" / "30-valid-limit-40-samples-1-30"
    report = (folder / "report.html").read_text()
    assert "40 valid images of digits" in report


def test_another_evaluation_in_the_folder_is_kept(evaluated_copy: Path) -> None:
    """An identical one may be repeated; --overwrite replaces any."""
    folder = evaluated_copy / "eval" / "30"
    before = content(folder)
    for options, named in {
        "--limit 10 --samples 1 30": "another limit (40 instead of 10)",
        "--limit 40 --samples 1": "another samples ([1, 30] instead of [1])",
        "--limit 40 --samples 1 30 --seed 1": "another seed (0 instead of 1)",
        "--limit 40 --samples 1 30 --split valid": "another split (test instead of valid)",
        "--limit 40 --samples 1 30 --temperature 0.5": "another temperature (1.0 instead of 0.5)",
        "--limit 40 --samples 1 30 --no-average": "another weights (average instead of last)",
        "--limit 40 --samples 1 30 --batch-size 30": "another batch size",
        "--limit 40 --samples 1 30 --checkpoint 20": "another step (30 instead of 20)",
    }.items():
        arguments = [evaluated_copy, "--device", "cpu", *options.split(), "--out", folder]
        line = refusal(evaluate.main, *arguments)
        assert named in line
        assert "--overwrite" in line
        assert content(folder) == before
    evaluated(evaluated_copy, *SAME, "--out", folder)
    assert content(folder)["per_image.npz"] == before["per_image.npz"]
    evaluated(evaluated_copy, *words("--limit 2 --samples 1 --overwrite --out"), folder)
    assert json.loads((folder / "metrics.json").read_text())["n_images"] == 2


def test_no_earlier_picture_remains(evaluated_copy: Path) -> None:
    """With too few samples for a k-hat, an earlier chart of it is removed."""
    folder = evaluated_copy / "eval" / "30"
    evaluated(evaluated_copy, *words("--samples 1 4 --limit 40 --overwrite --out"), folder)
    assert {path.stem for path in folder.glob("*.png")} == set(PICTURES) - {"pareto_k"}
    assert "k-hat" not in (folder / "report.html").read_text()


def test_all_noise_depends_on_the_seed(evaluated_copy: Path) -> None:
    """Another seed gives other metrics and pictures of the same model."""
    before = content(evaluated_copy / "eval" / "30")
    evaluated(evaluated_copy, *SAME, "--seed", 1)
    after = content(evaluated_copy / "eval" / "30-limit-40-seed-1-samples-1-30")
    assert {name for name in before if before[name] == after[name]} == set()


def test_the_moving_average_is_used_by_default(evaluated_copy: Path) -> None:
    """If the checkpoint has one, here with other weights than the last."""
    path = evaluated_copy / "checkpoints" / "30.pt"
    state = read_checkpoint(path, torch.device("cpu"))
    moved = {name: value + 0.1 for name, value in state["weights"].items()}
    found = []
    for last, average in ((moved, None), (state["weights"], {"weights": moved})):
        write_checkpoint(path, state | {"weights": last, "average": average})
        evaluated(evaluated_copy, *words("--samples 1 --limit 9 --out there --overwrite"))
        found.append(json.loads(Path("there/metrics.json").read_text()))
    assert [metrics["weights"] for metrics in found] == ["last", "average"]
    assert found[0]["elbo"] == found[1]["elbo"]


def test_weights_that_are_not_finite_are_refused(evaluated_copy: Path) -> None:
    path = evaluated_copy / "checkpoints" / "30.pt"
    state = read_checkpoint(path, torch.device("cpu"))
    next(iter(state["average"]["weights"].values())).fill_(torch.nan)
    write_checkpoint(path, state)
    line = refusal(evaluate.main, evaluated_copy, *words("--samples 1 --device cpu"))
    assert "the weights of step 30 are not all finite" in line
    assert "--checkpoint" in line


def test_the_precision_is_recorded(evaluated_copy: Path, tmp_path: Path) -> None:
    """Bounds in bf16 are close to those in float32."""
    found = []
    for precision in ("float32", "bf16"):
        evaluated(
            evaluated_copy, *words(f"--samples 1 4 --precision {precision} --out {precision}")
        )
        found.append(json.loads((tmp_path / precision / "metrics.json").read_text()))
    assert [metrics["precision"] for metrics in found] == ["float32", "bf16"]
    assert found[0]["elbo"] != found[1]["elbo"]
    assert found[0]["elbo"] == pytest.approx(found[1]["elbo"], rel=0.01)


def test_too_little_memory_is_reported(
    evaluated_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ImportanceSampler, "group", full)
    line = refusal(
        evaluate.main, evaluated_copy, *words("--samples 3 --batch-size 24 --device cpu")
    )
    assert "the GPU's memory is not enough: 24 images at a time" in line
    assert "--batch-size" in line


def test_the_table_is_printed(evaluated_copy: Path) -> None:
    result = evaluated(evaluated_copy, *words("--samples 1 --limit 3 --split train+valid"))
    lines = result.out.splitlines()
    assert lines[0] == ("digits, 3 train+valid images, step 30, moving average of the weights")
    assert lines[1].startswith("| negative bound")
    assert lines[-1] == "note      the run was trained on train and valid images"


# --- Refusals ---


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--temperature -1", ["temperature is -1"]),
        ("--temperature 1 1 1", ["temperature has 3 values", "2 layers"]),
        ("--temperature nan", ["temperature is nan"]),
        ("--samples 3 3", ["--samples is 3 3", "ascend"]),
        ("--samples 0 3", ["--samples", "0", "at least 1"]),
        ("--limit 0", ["--limit", "0", "at least 1"]),
        ("--limit 298", ["--limit is 298", "test has only 297 images"]),
        ("--batch-size 0", ["--batch-size", "0", "at least 1"]),
        ("--seed -1", ["--seed", "-1", "at least 0"]),
        ("--checkpoint first", ["--checkpoint", "first"]),
        ("--checkpoint 7", ["no checkpoint", "7"]),
        ("--precision tf32", ["--precision", "tf32"]),
        ("--mask left", ["--mask"]),
        ("--sam 3", ["--sam"]),
        ("--out file", ["cannot write file"]),
    ],
)
def test_invalid_options_are_refused(
    options: str, named: list[str], evaluated_copy: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    before = content(tmp_path)
    line = refusal(evaluate.main, evaluated_copy, "--device", "cpu", *options.split())
    for name in named:
        assert name in line
    assert content(tmp_path) == before


def test_a_full_disk_damages_nothing(evaluated_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = content(evaluated_copy)
    monkeypatch.setattr(os, "replace", full)
    line = refusal(evaluate.main, evaluated_copy, *words("--device cpu --limit 2 --samples 1"))
    assert "No space left on device" in line
    after = content(evaluated_copy)
    # The finished groups are kept for the next attempt.
    kept = {name: after[name] for name in after if not name.startswith("eval/30-")}
    assert kept == before
