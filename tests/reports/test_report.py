"""HTML reports: one valid file that loads nothing, and escapes what it shows."""

import base64
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ladder_vae.evaluation.folders import evaluation_folder
from ladder_vae.reports import comparison
from ladder_vae.reports.curves import Curve, learning_curves
from ladder_vae.reports.html import write_evaluation_report, write_training_report
from ladder_vae.runs.command_line import OPTIONS, OneLineParser, add_options, flag
from ladder_vae.runs.config_file import config_from
from ladder_vae.runs.metrics_log import finite_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from runtime.errors import UserError
from tools import report

VOID = {"meta", "img"}
ORIGIN = {"commit": "abc", "machine": "a GPU"}
HOSTILE = "\"'><script>alert(1)<&amp;"


class Parsed(HTMLParser):
    """A page's text and pictures; fails if a tag is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.images: dict[str, bytes] = {}  # by their title
        self.folded: list[str] = []  # titles of pictures that are shown when asked for
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            values = dict(attributes)
            start, _, encoded = str(values["src"]).partition(";base64,")
            assert start in ("data:image/png", "data:image/svg+xml")
            title = str(values["alt"])
            self.images[title] = base64.b64decode(encoded, validate=True)
            if "details" in self.open:
                self.folded.append(title)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        self.text += data
        if set(self.open) & {"td", "th"}:
            self.rows[-1][-1] += data


def read(path: Path) -> Parsed:
    """A report, which must be valid HTML and load nothing."""
    text = path.read_text()
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    parsed = Parsed(text)
    assert set(parsed.tags) & {"script", "link", "iframe", "object", "base", "form"} == set()
    assert not re.search(r"url\(|@import", text)
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if name == "src":
            assert value.startswith("data:image/")
        if name == "href":
            assert (path.parent / value).is_file()
    return parsed


@pytest.fixture
def run(tmp_path: Path, tiny_config: Callable[..., RunConfig]) -> Run:
    """A run folder with an empty log."""
    return Run.create(tmp_path / "a run", tiny_config(), (1, 28, 28), ORIGIN)


def results(**changes: Any) -> dict[str, Any]:
    """The content of a metrics.json."""
    content = {
        "elbo": 82.123,
        "iw": {"1": 82.0, "1000": 79.456},
        "standard_error": {"elbo": 0.25, "1": 0.25, "1000": None},
        "bits_per_dim": {"elbo": 0.1511, "1": 0.1509, "1000": 0.1462},
        "kl_per_layer": [20.0, 0.0, 5.0],
        "n_images": 10000,
        "dataset": "static_mnist",
        "split": "test",
        "levels": 2,
        "likelihood": "bernoulli",
        "likelihood_kind": "probability of 2 levels",
        "step": 1500,
        "weights": "average",
        "layers": 3,
        "parameters": 123456,
        "provenance": {"commit": "def", "machine": "a CPU", "torch": "2.15"},
    }
    return content | changes


# --- Of an evaluation ---


def evaluated(run: Run, content: dict[str, Any]) -> Parsed:
    """The report of an evaluation."""
    folder = run.path / "eval" / "1500"
    path = write_evaluation_report(folder, run, content)
    assert path == folder / "report.html"
    return read(path)


def test_the_report_of_an_evaluation(run: Run) -> None:
    parsed = evaluated(run, results())
    assert "a run" in parsed.text
    assert (
        "10,000 test images of static_mnist, step 1,500, moving average of the weights; "
        "3 layers, 123,456 parameters"
    ) in parsed.text
    assert parsed.rows[:4] == [
        ["negative bound", "nats", "std. error", "bits/dim"],
        ["ELBO", "82.12", "0.25", "0.151"],
        ["1 importance sample", "82.00", "0.25", "0.151"],
        ["1,000 importance samples", "79.46", "", "0.146"],
    ]
    # The ladder from its top, 28x28 images padded to 32x32, halved at the start and twice more.
    assert parsed.rows[4:9] == [
        ["layer", "latents", "nats", ""],
        ["3 (top)", "2 x 4 x 4", "5.00", ""],
        ["2", "3 x 8 x 8", "0.00", ""],
        ["1 (bottom)", "2 x 16 x 16", "20.00", ""],
        ["all", "", "25.00", ""],
    ]
    widths = [value for name, value in parsed.attributes if name == "style"]
    assert widths == ["width:25.0%", "width:0.0%", "width:100.0%"]
    assert parsed.rows[-4:] == [
        ["", "training", "evaluation"],
        ["commit", "abc", "def"],
        ["machine", "a GPU", "a CPU"],
        ["torch", "", "2.15"],
    ]


def test_the_report_says_if_the_bound_is_reliable(run: Run) -> None:
    """It says nothing if there were too few samples."""
    parsed = evaluated(
        run,
        results(
            effective_samples={"mean": 300.0, "median": 251.25, "min": 1.5},
            pareto_k={"median": 0.625, "threshold": 0.667, "share_above": 0.125},
            warning="the bound is loose",
        ),
    )
    assert "Effective samples: 251.2 of 1,000 for the median image, 1.5 for the worst." in (
        parsed.text
    )
    assert "above 0.67 for 12.5% of the images" in parsed.text
    assert "The bound is loose." in parsed.text
    assert ("class", "alarm") in parsed.attributes
    for unknown in ({}, {"pareto_k": None, "warning": None}):
        text = evaluated(run, results(**unknown)).text
        assert "Effective" not in text
        assert "Pareto" not in text
        assert ("class", "alarm") not in evaluated(run, results(**unknown)).attributes


def test_metrics_that_are_not_finite_are_empty(run: Run) -> None:
    parsed = evaluated(run, results(elbo=None, kl_per_layer=[None, 1.0, 2.0]))
    assert parsed.rows[1][:2] == ["ELBO", ""]
    assert parsed.rows[7][:3] == ["1 (bottom)", "2 x 16 x 16", ""]


def test_the_pictures_that_exist_are_shown_in_order(run: Run) -> None:
    """Each is the file, byte for byte; single layers are folded."""
    folder = run.path / "eval" / "1500"
    folder.mkdir(parents=True)
    contents = {
        name: f"the bytes of {name}".encode()
        for name in ("kl.png", "layer_01.png", "layer_03.png", "samples.png", "other.png")
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    parsed = evaluated(run, results())
    assert list(parsed.images.items()) == [
        ("Samples", contents["samples.png"]),
        ("Layer 3 (top)", contents["layer_03.png"]),
        ("Layer 1 (bottom)", contents["layer_01.png"]),
        ("KL by layer", contents["kl.png"]),
    ]
    assert parsed.folded == ["Layer 3 (top)", "Layer 1 (bottom)"]


def test_the_report_of_a_density(run: Run) -> None:
    density = {"likelihood": "gaussian", "likelihood_kind": "density", "bits_per_dim": {}}
    parsed = evaluated(run, results(**density))
    assert ["negative bound", "nats", "std. error"] in parsed.rows
    assert "gaussian, is a density of real pixel values" in parsed.text
    assert "is a density" not in evaluated(run, results()).text


def test_whatever_is_shown_is_escaped(
    tmp_path: Path, tiny_config: Callable[..., RunConfig]
) -> None:
    """Names, options and provenance from files."""
    config = tiny_config(descr=HOSTILE)
    path = tmp_path / HOSTILE.replace("/", "")
    run = Run.create(path, config, (1, 28, 28), {HOSTILE: HOSTILE})
    content = results(dataset=HOSTILE, split=HOSTILE, warning=HOSTILE)
    assert evaluated(run, content).text.count(HOSTILE) >= 7
    entry = {"step": 1, f"{HOSTILE}/negative_elbo": 1.0}
    (path / "metrics.jsonl").write_text(json.dumps(entry) + "\n")
    assert read(write_training_report(run)).text.count(HOSTILE) >= 4


# --- Configuration ---


def test_options_that_differ_from_the_defaults_come_first(run: Run) -> None:
    parsed = evaluated(run, results())
    start = parsed.rows.index(["option", "value", "default"])
    assert parsed.rows[start + 1 : start + 6] == [
        ["--zdims", "2 3 2", "32 32 32"],
        ["--downsample", "0 1 1", "1 1 1"],
        ["--blocks-per-layer", "1", "2"],
        ["--nfilters", "4", "64"],
        ["option", "value"],  # the others
    ]
    shown = [row[0] for row in parsed.rows if row[0].startswith("--")]
    assert sorted(shown) == sorted(map(flag, OPTIONS))
    assert ["--likelihood", "bernoulli"] in parsed.rows


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "cifar10"},
        {"dataset": "cifar10", "likelihood": "gaussian", "descr": "it's `here`; $HOME"},
        {"batchnorm": False, "gated": True, "initial_downscaling": False},
    ],
)
def test_the_command_trains_such_a_run(
    tmp_path: Path, tiny_config: Callable[..., RunConfig], options: dict[str, Any]
) -> None:
    config = tiny_config(**options)
    run = Run.create(tmp_path / "run", config, (3, 32, 32), ORIGIN)
    text = read(write_training_report(run)).text
    (command,) = re.findall(r"python train_svi\.py(?:.*\\\n)*.*", text)
    words = shlex.split(command.replace("\\\n", ""))
    parser = OneLineParser()
    add_options(parser)
    assert config_from(parser.parse_args(words[2:])) == config


# --- Of a run ---


def log(run: Run, *entries: dict[str, Any], rest: str = "") -> None:
    lines = "".join(f"{json.dumps(entry)}\n" for entry in entries)
    (run.path / "metrics.jsonl").write_text(lines + rest)


def training_entry(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "time": 1.8e9,
        "train/negative_elbo": 100.0 / step,
        "train/reconstruction": 60.0,
        "train/kl": 40.0,
        "train/gradient_norm": 2.0,
        "train/images_per_second": 1000.0,
        "train_kl/layer_01": 30.0,
        "train_kl/layer_02": 10.0,
    } | changes


def test_a_run_without_a_log(run: Run) -> None:
    parsed = read(write_training_report(run))
    assert "nothing logged yet" in parsed.text
    assert parsed.images == {}
    assert "Learning curves" not in parsed.text


def test_a_run_in_progress(run: Run) -> None:
    """An incomplete last entry is skipped; the latest pictures are those of the largest step."""
    images = run.path / "images"
    images.mkdir()
    for step in (90, 100):
        (images / f"samples-{step}.png").write_bytes(str(step).encode())
    (images / "reconstructions-90.png").write_bytes(b"reconstructions")
    held_out = {"step": 100, "valid/negative_elbo": 90.5, "valid/kl": None}
    log(run, training_entry(50), held_out, training_entry(100), rest='{"step": 150, "tra')
    parsed = read(write_training_report(run))
    assert "step 100, logged 2027-01-15 08:00 UTC" in parsed.text
    assert parsed.rows[:3] == [
        ["", "step", "negative ELBO", "reconstruction", "KL"],
        ["training", "100", "1.000", "60.000", "40.000"],
        ["valid images", "100", "90.500", "", ""],
    ]
    charts = ["Negative ELBO", "KL by layer", "Gradient norm", "Speed"]
    assert list(parsed.images)[:4] == charts
    assert parsed.images["Samples at step 100"] == b"100"
    assert parsed.images["Reconstructions at step 90"] == b"reconstructions"
    first = (run.path / "report.html").read_bytes()
    assert write_training_report(run).read_bytes() == first


def test_evaluations_of_a_run(run: Run) -> None:
    """By step, and other splits before the test set."""
    for step, split, elbo in ((900, "test", 82.0), (1000, "valid", 80.0), (1000, "test", 81.5)):
        folder = evaluation_folder(run.path, step, split)
        folder.mkdir(parents=True)
        content = results(step=step, split=split, elbo=elbo, limit=None)
        (folder / "metrics.json").write_text(json.dumps(content))
    write_evaluation_report(folder, run, content)
    parsed = read(write_training_report(run))
    header = ["step", "weights", "data", "ELBO", "1 sample", "1,000 samples", "KL"]
    start = parsed.rows.index(header)
    same = ["82.00 ± 0.25", "79.46", "25.00"]
    assert parsed.rows[start + 1 : start + 4] == [
        ["900", "average", "static_mnist", "82.00 ± 0.25", *same],
        ["1,000", "average", "static_mnist, valid", "80.00 ± 0.25", *same],
        ["1,000", "average", "static_mnist", "81.50 ± 0.25", *same],
    ]
    links = [value for name, value in parsed.attributes if name == "href"]
    assert links == ["eval/1000/report.html"]
    assert '<a href="eval/1000/report.html">1,000</a>' in (run.path / "report.html").read_text()
    assert "<strong>81.50 ± 0.25</strong>" in (run.path / "report.html").read_text()


def test_a_real_run(
    evaluated_copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, evaluated, compared and reported."""
    path = evaluated_copy
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out == f"report    {path / 'report.html'}\n"
    parsed = read(path / "report.html")
    assert "step 30 of 30" in parsed.text
    assert len(parsed.images) == 6
    samples = path / "images" / "samples-30.png"
    assert parsed.images["Samples at step 30"] == samples.read_bytes()
    assert list(read(path / "eval/30/report.html").images)[:2] == ["Samples", "Reconstructions"]
    metrics = json.loads((path / "eval/30/metrics.json").read_text())
    shown = f"{metrics['iw']['30']:.2f} ± {metrics['standard_error']['30']:.2f}"
    assert shown in parsed.text
    assert shown in comparison.compare([path], tmp_path)


# --- Learning curves ---


def test_a_long_curve_is_averaged_over_intervals() -> None:
    entries = [{"step": float(step), "a": float(step % 2)} for step in range(600)]
    curve = Curve.of([*entries, {"step": 600.0, "a": 7.0}, {"step": 700.0}], "a", "")
    assert len(curve.steps) == 201
    assert (curve.steps[0], curve.values[0]) == (1.0, 1 / 3)  # steps 0, 1 and 2
    assert (curve.steps[-1], curve.values[-1]) == (600.0, 7.0)
    short = Curve.of(entries[:3], "a", "")
    assert (short.steps, short.values) == ([0.0, 1.0, 2.0], [0.0, 1.0, 0.0])


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ((18.0, 24.0), {"18", "20", "22", "24"}),
        ((0.5, 500.0), {"1", "10", "100"}),
        ((0.02, 0.05), {"0.02", "0.03", "0.04", "0.05"}),
        ((900.0, 40_000.0), {"1,000", "10,000"}),
    ],
)
def test_logarithmic_axes_have_plain_numbers(
    norms: tuple[float, float], expected: set[str]
) -> None:
    """21, not 2.1 times ten to the first."""
    entries = [
        training_entry(step) | {"train/gradient_norm": norm}
        for step, norm in zip((50, 100), norms, strict=True)
    ]
    (chart,) = [chart for chart in learning_curves(entries) if chart.title == "Gradient norm"]
    words = {text.text for text in ElementTree.fromstring(chart.svg).iter() if text.text}
    assert expected <= words
    assert not any("\N{MULTIPLICATION SIGN}" in word for word in words)


def test_charts_are_labelled() -> None:
    entries = [training_entry(step) for step in (50, 100)]
    entries += [{"step": step, "test/negative_bound_100_samples": 80.0} for step in (50, 100)]
    entries += [{"step": step, "test/negative_elbo": 90.0} for step in (50, 100)]
    charts = {chart.title: chart for chart in learning_curves(entries)}
    words = {
        title: {text.text for text in ElementTree.fromstring(chart.svg).iter() if text.text}
        for title, chart in charts.items()
    }
    assert {"training", "test images", "test, 100 samples", "nats", "step"} <= (
        words["Negative ELBO"]
    )
    assert {"layer", "1", "2", "nats"} <= words["KL by layer"]
    assert "training images" in charts["KL by layer"].caption
    assert learning_curves(entries[:1]) == []


def test_kl_is_of_the_held_out_images_if_there_is_a_curve() -> None:
    entries = [training_entry(step) for step in (50, 100)]
    kl = {"test/negative_elbo": 90.0, "test_kl/layer_01": 1.0, "test_kl/layer_02": 2.0}
    entries += [{"step": step} | kl for step in (50, 100)]
    (chart,) = [chart for chart in learning_curves(entries) if chart.title == "KL by layer"]
    assert "test images" in chart.caption


# --- Refusals ---


@pytest.mark.parametrize(
    "line", ["{", "[1]", '{"time": 1}', '{"step": "1"}', '{"step": 1, "a": "b"}', "[" * 100_000]
)
def test_a_damaged_log_is_refused(run: Run, line: str) -> None:
    log(run, rest=f"{line}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: .* is not a log entry"):
        write_training_report(run)
    assert not (run.path / "report.html").exists()


def test_metrics_that_were_not_finite_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": null, "b": NaN, "c": 2.5}\n')
    assert finite_entries(path) == [{"step": 1, "c": 2.5}]


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder: it has no config"):
        report.main([str(tmp_path)])
    with pytest.raises(UserError, match="the following arguments are required: RUN"):
        report.main([])


def test_a_report_that_cannot_be_written_is_refused(run: Run) -> None:
    (run.path / "eval").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*report\.html"):
        write_evaluation_report(run.path / "eval" / "1500", run, results())
