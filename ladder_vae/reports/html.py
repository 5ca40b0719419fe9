"""HTML reports of a training run and of an evaluation.

A report is a single file that contains its pictures, loads nothing and runs no scripts. The Jinja
templates in the folder templates/ escape all values.
"""

import base64
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ladder_vae.evaluation.folders import evaluation_folders
from ladder_vae.evaluation.metrics import Metrics
from ladder_vae.reports.comparison import Scored, columns
from ladder_vae.reports.curves import learning_curves
from ladder_vae.reports.figures import ladder_pictures
from ladder_vae.reports.tables import (
    Column,
    bounds_table,
    density_note,
    layer_name,
    number,
    sandwich_notes,
    sandwich_table,
    weights_in_words,
)
from ladder_vae.reports.unconverged import unconverged_table
from ladder_vae.runs.command_line import OPTIONS, flag
from ladder_vae.runs.metrics_log import Entry, finite_entries, held_out_split, newest
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from runtime.files import exists, names_in, reading, write_text

if TYPE_CHECKING:
    from jinja2 import Environment


class Image(NamedTuple):
    """A picture on a page."""

    title: str
    caption: str
    source: str  # a data URL
    style: str = ""  # "pixels" for grids of small images, "paper" for charts on white
    folded: bool = False  # hidden until its title is clicked

    @classmethod
    def of(
        cls, title: str, caption: str, content: bytes, kind: str = "png", **more: Any
    ) -> "Image":
        """From the content of a file of the given kind, "png" or "svg+xml"."""
        source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
        return cls(title, caption, source, **more)


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _write(path: Path, template: str, run: Run, **values: Any) -> Path:
    """Write a page about a run."""
    page = _environment().get_template(template)
    text = page.render(title=run.path.resolve().name, options=_options(run.config), **values)
    write_text(path, text)
    return path


# --- Evaluations ---


def write_evaluation_report(folder: Path, run: Run, results: Mapping[str, Any]) -> Path:
    """Write `report.html` into an evaluation's folder; returns its path.

    `results` is the content of metrics.json. The report shows the pictures in the folder. Raises
    `UserError` if the file cannot be written.
    """
    return _write_evaluation_report(folder, run, Metrics.from_dict(results))


def update_evaluation_report(folder: Path, run: Run) -> None:
    """If `folder` holds an evaluation, write its report again with the pictures now in it."""
    file = folder / "metrics.json"
    if exists(file):
        _write_evaluation_report(folder, run, Metrics.read(file))


def _write_evaluation_report(folder: Path, run: Run, metrics: Metrics) -> Path:
    return _write(
        folder / "report.html",
        "evaluation.html",
        run,
        subtitle=(
            f"{metrics.n_images:,} {metrics.split} images of {metrics.dataset}, "
            f"step {metrics.step:,}, {weights_in_words(metrics.weights)}; "
            f"{number(metrics.layers, ',')} layers, {number(metrics.parameters, ',')} parameters"
        ),
        bounds=bounds_table(metrics),
        warning=_sentence(metrics.warning or ""),
        notes=[*filter(None, [density_note(metrics)]), *_weight_notes(metrics)],
        unconverged=unconverged_table(folder, metrics),
        sandwich=sandwich_table(metrics) if metrics.sandwich else [],
        sandwich_notes=sandwich_notes(metrics) if metrics.sandwich else [],
        layers=_layers(run, metrics.kl_per_layer),
        total_kl=f"{sum(kl or 0.0 for kl in metrics.kl_per_layer):.2f}",
        images=_evaluation_images(folder, len(metrics.kl_per_layer)),
        provenance=_provenance({"training": run.provenance, "evaluation": metrics.provenance}),
    )


def _weight_notes(metrics: Metrics) -> list[str]:
    """Sentences about the importance weights."""
    notes = []
    if effective := metrics.effective_samples:
        most = max(map(int, metrics.iw), default=1)
        median, least = (number(effective.get(name), ".1f") for name in ("median", "min"))
        notes.append(
            f"Effective samples: {median} of {most:,} for the median image, {least} for the worst. "
            "The more effective samples, the closer the approximate posterior is to the true one."
        )
    if pareto := metrics.pareto_k:
        threshold, median = (number(pareto.get(name), ".2g") for name in ("threshold", "median"))
        notes.append(
            f"Pareto k-hat is above {threshold} for {number(pareto.get('share_above'), '.1%')} of "
            "the images: a few samples dominate their importance weights. Its median is "
            f"{median}."
        )
    return notes


def _layers(run: Run, kl_per_layer: Sequence[float | None]) -> list[dict[str, str]]:
    """The rows of the table of layers, top to bottom."""
    ladder = run.config.ladder
    sizes = ladder.latent_sizes((run.image_shape[1], run.image_shape[2]))
    known = [max(kl or 0.0, 0.0) for kl in kl_per_layer]
    most = max([*known, 1e-9])
    rows = [
        {
            "name": layer_name(i + 1, len(sizes)).removeprefix("layer "),
            "latents": f"{channels} x {height} x {width}",
            "nats": number(kl, ".2f"),
            "width": f"{100 * positive / most:.1f}",
        }
        for i, (channels, (height, width), kl, positive) in enumerate(
            zip(ladder.z_dims, sizes, kl_per_layer, known, strict=False)
        )
    ]
    return rows[::-1]


def _evaluation_images(folder: Path, layers: int) -> list[Image]:
    """The evaluation's pictures that are in the folder; titles are drawn in the pictures."""
    return [
        Image.of(
            picture.title,
            picture.caption,
            _content(file),
            style="paper" if picture.chart else "pixels",
            folded=picture.folded,
        )
        for picture in ladder_pictures(layers)
        for file in sorted(folder.glob(picture.file))
    ]


def _content(file: Path) -> bytes:
    with reading(file):
        return file.read_bytes()


# --- Runs ---


def write_training_report(run: Run) -> Path:
    """Write `report.html` into a run's folder, during training or after it; returns its path.

    Raises `UserError` if the run's files are damaged, or the report cannot be written.
    """
    entries = finite_entries(run.path / "metrics.jsonl")
    config = run.config
    channels, height, width = run.image_shape
    folders = evaluation_folders(run.path)
    return _write(
        run.path / "report.html",
        "training.html",
        run,
        subtitle=(
            f"{config.dataset} ({config.train_split}), {channels} x {height} x {width}, "
            f"{len(config.ladder.z_dims)} layers; {_progress(config, entries)}"
        ),
        newest=_newest_metrics(entries),
        curves=[
            Image.of(chart.title, chart.caption, chart.svg, "svg+xml")
            for chart in learning_curves(entries)
        ],
        images=_newest_images(run.path / "images"),
        evaluations=columns(
            [Scored.read(folder) for folder in folders],
            ("step", "weights", "data", "bounds", "kl"),
        ),
        reports=[
            report.relative_to(run.path).as_posix() if exists(report) else ""
            for report in (folder / "report.html" for folder in folders)
        ],
        provenance=_provenance({"training": run.provenance}),
    )


def _progress(config: RunConfig, entries: Sequence[Entry]) -> str:
    """The step and time of the last log entry, in words."""
    if not entries:
        return "nothing logged yet"
    step = f"step {int(entries[-1]['step']):,}" + (f" of {config.steps:,}" if config.steps else "")
    time = entries[-1].get("time", 0)
    if not 0 < time < 1e11:  # not a date, in seconds since 1970
        return step
    return f"{step}, logged {datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"


def _newest_metrics(entries: Sequence[Entry]) -> list[Column]:
    """The latest metrics of the training images and of the held-out ones."""
    groups = {"train": "training"}
    if split := held_out_split(entries):
        groups[split] = f"{split} images"
    rows = {
        name: (group, entry)
        for group, name in groups.items()
        if (entry := newest(entries, f"{group}/negative_elbo"))
    }
    tags = {
        "negative ELBO": "negative_elbo",
        "reconstruction": "reconstruction",
        "KL": "kl",
        "bits/dim": "bits_per_dim",
    }
    found = [
        Column("", list(rows), is_number=False),
        Column("step", [f"{int(entry['step']):,}" for _, entry in rows.values()]),
    ]
    for header, tag in tags.items():
        values = [number(entry.get(f"{group}/{tag}"), ".3f") for group, entry in rows.values()]
        if any(values) or tag != "bits_per_dim":  # which binary images and densities do not have
            found.append(Column(header, values))
    return found


def _newest_images(folder: Path) -> list[Image]:
    """The latest samples and reconstructions of the training."""
    captions = {picture.file: picture.caption for picture in ladder_pictures(0)}
    found = []
    for name in ("samples", "reconstructions"):
        found_names = (re.fullmatch(rf"{name}-([0-9]+)\.png", file) for file in names_in(folder))
        if numbers := [match[1] for match in found_names if match]:
            step = max(numbers, key=int)
            title = f"{name.capitalize()} at step {int(step):,}"
            caption = captions[f"{name}.png"]
            found.append(
                Image.of(title, caption, _content(folder / f"{name}-{step}.png"), style="pixels")
            )
    return found


# --- Parts of both reports ---


def _options(config: RunConfig) -> dict[str, Any]:
    """The options that differ from their defaults, the other options, and a command for the run."""
    # An option that is `auto` by default has the value that auto means for this data set.
    of_data = RunConfig.of(dataset=config.dataset, own=config.own)
    defaults = of_data.options() | {"dataset": RunConfig.dataset}
    values = {name: config.options()[name] for name in OPTIONS}
    changed = [name for name, value in values.items() if value != defaults[name]]
    kept = [name for name in values if name not in changed]
    return {
        "changed": [
            Column("option", [flag(name) for name in changed], is_number=False),
            Column(
                "value",
                [_shown(values[name]) for name in changed],
                is_number=False,
                best=frozenset(range(len(changed))),
            ),
            Column("default", [_shown(defaults[name]) for name in changed], is_number=False),
        ],
        "kept": [
            Column("option", [flag(name) for name in kept], is_number=False),
            Column("value", [_shown(values[name]) for name in kept], is_number=False),
        ],
        "command": command_line(config, changed),
    }


def command_line(config: RunConfig, names: Sequence[str]) -> str:
    """A shell command that sets the options `names` as in `config`, and leaves out the others."""
    lines = ["python train_svi.py"]
    for name, value in config.options().items():
        if name not in names:
            continue
        if isinstance(value, bool):
            lines.append(flag(name) if value else flag(name).replace("--", "--no-", 1))
        else:
            values = value if isinstance(value, list) else [value]
            lines.append(shlex.join([flag(name), *map(str, values)]))
    return " \\\n    ".join(lines)


def _shown(value: Any) -> str:
    """An option's value, as on the command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _provenance(origins: Mapping[str, Mapping[str, Any]]) -> list[Column]:
    """A table of provenances, with one column for each of `origins`."""
    entries = list(dict.fromkeys(name for origin in origins.values() for name in origin))
    return [
        Column("", entries, is_number=False),
        *(
            Column(
                title,
                ["" if origin.get(name) is None else str(origin[name]) for name in entries],
                is_number=False,
            )
            for title, origin in origins.items()
        ),
    ]


def _sentence(text: str) -> str:
    return text and text[:1].upper() + text[1:] + "." * (not text.endswith("."))
