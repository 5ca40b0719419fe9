"""What a run logs: metrics.jsonl, TensorBoard, pictures, and reports of collapsed layers."""

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.durability import untimed_entries
from datasets.images import ColourImages
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.runs.metrics_log import read_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.training import logger
from ladder_vae.training.logger import Logger, Monitor, collapsed_layers
from ladder_vae.training.tag_descriptions import description
from runtime.errors import UserError
from tests.tiny_runs import LADDER, train

# --- metrics.jsonl of a resumed run ---


def test_later_and_cut_off_entries_are_dropped(tmp_path: Path) -> None:
    """So is a last line without a line break, which a killed run leaves; the next is complete."""
    lines = ['{"step": 1, "a": 0.5}\n', '{"step": 3, "a": 0.25}\n', '{"step": 2, "a": 0.75}']
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    with Monitor(tmp_path, 2, None) as monitor:
        monitor.scalars(3, {"a": 1.0})
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["a"]) for entry in entries] == [(1, 0.5), (3, 1.0)]


@pytest.mark.parametrize("line", ["[1, 2]", "3", '{"loss": 1.0}', '{"step": ', "not JSON"])
def test_a_damaged_file_is_refused_and_left_alone(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{line}\n{{"step": 1}}\n')
    with pytest.raises(UserError) as refusal:
        Monitor(tmp_path, 2, None)
    assert f"{path} is damaged" in str(refusal.value)
    assert path.read_text() == f'{line}\n{{"step": 1}}\n'


# --- TensorBoard and metrics.jsonl of a whole run ---

TRAINING_TAGS = {
    "train/loss",
    "train/negative_elbo",
    "train/reconstruction",
    "train/kl",
    "train/gradient_norm",
    "train/learning_rate",
    "train/kl_weight",
    "train/images_per_second",
    "train/skipped_updates",
    "train/gradient_spikes",
    "train_kl/layer_01",
    "train_kl/layer_02",
    "train_kl_collapsed/layer_01",
    "train_kl_collapsed/layer_02",
}
TEST_TAGS = {
    "test/negative_elbo",
    "test/reconstruction",
    "test/kl",
    "test_kl/layer_01",
    "test_kl/layer_02",
    "test_active_channels/layer_01",
    "test_active_channels/layer_02",
}
BOUND_TAGS = {"test/negative_bound_2_samples"}


@pytest.fixture(scope="module")
def events(trained_run: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    guidance = {"scalars": 0, "images": 0, "tensors": 0}
    return EventAccumulator(str(trained_run), size_guidance=guidance).Reload()


@pytest.fixture(scope="module")
def entries(trained_run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (trained_run / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_shows_scalars_pictures_and_configuration(events: Any) -> None:
    tags = events.Tags()
    assert set(tags["scalars"]) == TRAINING_TAGS | TEST_TAGS | BOUND_TAGS
    assert set(tags["images"]) == {"samples", "reconstructions"}
    assert tags["tensors"] == ["configuration/text_summary", "custom_scalars__config__"]
    for name in tags["images"]:
        pictures = events.Images(name)
        assert [picture.step for picture in pictures] == [15, 30]
        assert {(p.width, p.height) for p in pictures} == {(466, 466)}
    (text,) = events.Tensors("configuration/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "| n_filters | 4 |" in shown
    assert "| z_dims | [2, 2] |" in shown
    assert shown.count("\n") == 2 + len(RunConfig.of().options())


def test_tensorboard_says_which_rows_are_originals(trained_run: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (path,) = trained_run.glob("events.out.tfevents.*")
    titles = {
        (value.tag, value.metadata.display_name)
        for event in EventFileLoader(str(path)).Load()
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "images"
    }
    assert titles == {
        ("samples", "samples"),
        (
            "reconstructions",
            "reconstructions (rows 1, 3, ...: originals; below each: reconstructions)",
        ),
    }


def test_tensorboard_shows_hyperparameters(events: Any) -> None:
    """The options stand beside the test ELBO in the table of runs."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    contents = {
        tag: HParamsPluginData.FromString(data)
        for tag, data in events.PluginTagToContent("hparams").items()
    }
    session = contents["_hparams_/session_start_info"].session_start_info.hparams
    assert set(session) == set(RunConfig.of().options())
    assert session["n_filters"].number_value == 4
    assert session["lr"].number_value == 0.005
    # Versions of torch differ in how they store true.
    assert session["gated"].bool_value or session["gated"].number_value == 1
    assert session["downsample"].string_value == "[0, 1]"
    experiment = contents["_hparams_/experiment"].experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["test/negative_elbo"]


def test_metrics_jsonl_holds_the_scalars_of_tensorboard(
    entries: list[dict[str, float]], events: Any
) -> None:
    kinds = (TRAINING_TAGS, TEST_TAGS, BOUND_TAGS)
    found = [(entry["step"], entry.keys() - {"step", "time"}) for entry in entries]
    due = [(10, 0), (15, 1), (15, 2), (20, 0), (30, 0), (30, 1), (30, 2)]
    assert found == [(step, kinds[kind]) for step, kind in due]
    times = [entry["time"] for entry in entries]
    assert times == sorted(times)
    for tag in TRAINING_TAGS | TEST_TAGS | BOUND_TAGS:
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert shown == [(e["step"], float(np.float32(e[tag]))) for e in entries if tag in e]


def test_logged_metrics_are_consistent(entries: list[dict[str, float]]) -> None:
    for entry in entries:
        for split in ("train", "test"):
            if f"{split}/kl" in entry:
                layers = entry[f"{split}_kl/layer_01"] + entry[f"{split}_kl/layer_02"]
                assert entry[f"{split}/kl"] == pytest.approx(layers, rel=1e-6)
                total = entry[f"{split}/reconstruction"] + entry[f"{split}/kl"]
                assert entry[f"{split}/negative_elbo"] == pytest.approx(total, rel=1e-6)
        if "train/loss" in entry:
            assert entry["train/skipped_updates"] == 0
        else:
            active = [v for tag, v in entry.items() if "active_channels" in tag]
            assert all(value in (0, 1, 2) for value in active)
    rates = [entry["train/learning_rate"] for entry in entries if "train/loss" in entry]
    # Of the last step of each entry; steps are counted from 0.
    expected = [0.005 * (1 + math.cos(math.pi * step / 30)) / 2 for step in (9, 19, 29)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("step", [15, 30])
def test_pictures_have_the_right_size(trained_run: Path, step: int) -> None:
    """Digits are enlarged seven times: 8 by 8 tiles of 56 pixels, with 2 between and around."""
    for name in ("samples", "reconstructions"):
        with Image.open(trained_run / "images" / f"{name}-{step}.png") as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.mode == "RGB"
            assert picture.size == (8 * 58 + 2, 8 * 58 + 2)


@pytest.mark.parametrize("likelihood", ["discr_log", "gaussian"])
def test_a_density_has_no_bits_per_dimension(
    likelihood: str,
    tmp_path: Path,
    tiny_config: Callable[..., RunConfig],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of 8-bit images, in metrics.jsonl and in the lines."""
    config = tiny_config(dataset="cifar10", likelihood=likelihood, ll_samples=2)
    levels = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8)
    images = ColourImages("cifar10", "test", (3, 32, 32), levels)
    module: Any = FreeBitsELBO()(*build_ladder(config.ladder, images.shape))
    with Monitor(tmp_path, 0, None) as monitor:
        log = Logger(config, images, monitor, 0)
        log.evaluation(1, module, lambda _: None)
        log.bound(1, module, lambda _: None)
    tags = {tag for entry in read_entries(tmp_path / "metrics.jsonl") for tag in entry}
    in_bits = {"test/bits_per_dim", "test/negative_bound_2_samples_bits_per_dim"}
    expected = set() if likelihood == "gaussian" else in_bits
    assert {tag for tag in tags if "bits" in tag} == expected
    assert capsys.readouterr().err.count("bits/dim") == len(expected)


# --- Collapsed layers ---


@pytest.mark.parametrize(
    ("kl", "free_bits", "expected"),
    [
        ([0.5, 0.52, 0.53], 0.5, {1, 2}),
        ([0.009, 0.011, -0.1], 0.0, {1, 3}),
        ([2.0, 3.0], 1.0, set()),
    ],
)
def test_a_layer_at_the_free_bits_has_collapsed(
    kl: Sequence[float], free_bits: float, expected: set[int]
) -> None:
    assert collapsed_layers(kl, free_bits) == expected


@pytest.mark.usefixtures("own_folder")
def test_collapse_and_recovery_are_reported_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And shown at every entry, in the line and as a scalar."""
    calls = iter([set(), {2}, {1, 2}, {1, 2}, {1}, set()])
    monkeypatch.setattr(logger, "collapsed_layers", lambda kl, free_bits: next(calls))
    options = "--tr-log-interv 1 --ts-log-interv 0 --ll-interv 0 --steps 6 --out run".split()
    assert train(*LADDER, *options) == 0
    err = capsys.readouterr().err
    reported = re.findall(r"(?m)^step (\d): KL of (.*)$", err)
    assert reported == [
        ("2", "layer 2 has collapsed"),
        ("3", "layer 1 has collapsed"),
        ("5", "layer 2 has recovered"),
        ("6", "layer 1 has recovered"),
    ]
    flags = re.findall(r"(?m)^step \d: ELBO .*images/s(?:, KL collapsed in (.*))?$", err)
    assert flags == ["", "layer 2", "layers 1, 2", "layers 1, 2", "layer 1", ""]
    logged = [e for e in untimed_entries(Path("run")) if "train/loss" in e]
    assert [e["train_kl_collapsed/layer_02"] for e in logged] == [0, 1, 1, 1, 0, 0]


# --- The progress bar ---


def test_the_progress_bar_shows_the_elbo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In a terminal it replaces the lines of training entries."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setattr("time.monotonic", iter(range(10**6)).__next__)
    options = "--tr-log-interv 2 --ts-log-interv 0 --steps 4".split()
    assert train(*LADDER, *options, "--out", tmp_path / "run") == 0
    err = capsys.readouterr().err
    assert re.search(r"4/4 .*ELBO=-\d+\.\d\d nats", err)
    assert "step 2: ELBO" not in err
    assert "step 4: test ELBO" in err


# --- What TensorBoard says about the tags ---


def test_every_tag_has_a_description(trained_run: Path) -> None:
    """One line each, also for colour images, of which bounds are logged in bits."""
    shown = tensorboard(trained_run)
    for tag in TRAINING_TAGS | TEST_TAGS | BOUND_TAGS | {"samples", "reconstructions"}:
        found = shown.SummaryMetadata(tag).summary_description
        assert found == description(tag) != ""
        assert "\n" not in found
    assert "nats per image" in description("valid/negative_elbo")
    assert "of 1,000 samples, in bits" in description(
        "test/negative_bound_1000_samples_bits_per_dim"
    )
    assert "layer 12 in nats" in description("test_kl/layer_12")
    assert "originals" in description("reconstructions")


def test_all_layers_share_a_chart(trained_run: Path) -> None:
    """In the tab Custom Scalars: each chart's pattern matches the tags of all layers."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    (event,) = tensorboard(trained_run).Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    tags = TRAINING_TAGS | TEST_TAGS
    charts = {chart.title: chart.multiline.tag[0] for chart in category.chart}
    matched = {
        title: sorted(tag for tag in tags if re.fullmatch(pattern, tag))
        for title, pattern in charts.items()
    }
    assert matched == {
        "KL by layer, training (nats)": ["train_kl/layer_01", "train_kl/layer_02"],
        "KL by layer, test (nats)": ["test_kl/layer_01", "test_kl/layer_02"],
        "Active channels by layer, test": [
            "test_active_channels/layer_01",
            "test_active_channels/layer_02",
        ],
    }


def tensorboard(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()
