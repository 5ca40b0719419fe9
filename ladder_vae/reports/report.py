"""Reports to read in a browser: of a run, and of its evaluation.

    python report.py runs/mnist-12

writes RUN/report.html: how the training goes, at any time during it or after. evaluate.py writes
the report of an evaluation beside its figures. Each is one file that holds all it shows.
"""

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ladder_vae.reports import page
from ladder_vae.reports.comparison import Scored, columns, evaluation_folders
from ladder_vae.reports.curves import learning_curves
from ladder_vae.reports.page import Markup
from ladder_vae.runs.command_line import OPTIONS, OneLineParser, flag
from ladder_vae.runs.metrics_log import Entry, finite_entries, held_out_split, newest
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.run import Run
from runtime.errors import run_command
from runtime.files import write_atomically


class Picture(NamedTuple):
    """A picture in an evaluation's folder, and what to say of it."""

    file: str
    title: str
    caption: str  # how to read it
    folded: bool = False  # shown when asked for
    chart: bool = False  # a drawing on white, not a grid of small images


def ladder_pictures(layers: int) -> list[Picture]:
    """The pictures of a ladder of so many layers, in the order to look at them."""
    return [
        Picture(
            "samples.png",
            "Samples",
            "Each image is the mean of p(x | z) for latents z drawn from the prior, layer by layer "
            "from the top. They should look like the data, and differ as much.",
        ),
        Picture(
            "reconstructions.png",
            "Reconstructions",
            "Rows of images, each above a row of their reconstructions: the means of p(x | z) for "
            "one draw of z from q(z | x).",
        ),
        Picture(
            "layers.png",
            "What each layer decides",
            "The images of a row share the latents above a layer and differ in that layer's "
            "sample; the layers below it are at the mode of their prior. Rows that hardly vary "
            "show a layer of details, rows that vary a layer of the whole.",
        ),
        *(
            Picture(
                f"layer_{layer:02d}.png",
                f"Layer {layer} of {layers}{_place(layer, layers)}",
                "Each row has latents of its own above this layer; within a row only this layer's "
                "sample differs.",
                folded=True,
            )
            for layer in range(layers, 0, -1)
        ),
        Picture(
            "interpolation.png",
            "Interpolation",
            "From one image to another, by the latents of the upper layers down to the "
            "one of the row. The upper rows change what is shown, the lowest one ends in the "
            "reconstructions.",
        ),
        Picture(
            "kl.png",
            "KL by layer",
            "How much each layer tells of an image: nats between posterior and prior, mean over "
            "the images. A layer near 0 is not used.",
            chart=True,
        ),
        Picture(
            "kl_maps.png",
            "Where the layers tell it",
            "The same by position in each layer's feature map, summed over channels.",
            chart=True,
        ),
        Picture(
            "bound.png",
            "The bound against the number of samples",
            "Negative bound in nats, with its standard error. Where the curve is flat, the bound "
            "is close to the log-likelihood; where it still falls, more samples would tighten it.",
            chart=True,
        ),
        Picture(
            "pareto_k.png",
            "Pareto k-hat of the importance weights",
            "One value for each image; above 0.7 a few samples carry most of the weight.",
            chart=True,
        ),
        Picture(
            "inpainting.png",
            "Completions",
            "Images with a part taken away, and samples of what the ladder puts there.",
        ),
        Picture(
            "roc.png",
            "Other images",
            "How well the scores tell other images from those of the data set: the further the "
            "curve is above the diagonal, the better.",
            chart=True,
        ),
    ]


def _place(layer: int, layers: int) -> str:
    return " (top)" if layer == layers else " (bottom)" if layer == 1 else ""


# --- Of an evaluation ---


def evaluation_report(
    folder: Path, run: Run, results: Mapping[str, Any], pictures: Sequence[Picture]
) -> Path:
    """Write `report.html` into an evaluation's folder; returns its path.

    `results` is the content of metrics.json. Those of `pictures` that are in the folder are shown,
    in their order. Raises `UserError` where the file cannot be written.
    """
    count, split = f"{results['n_images']:,}", results["split"]
    weights = "moving average of the weights" if results["weights"] == "average" else "last weights"
    subtitle = (
        f"{count} {split} images of {results['dataset']}, step {results['step']:,}, {weights}; "
        f"{results['layers']} layers, {results['parameters']:,} parameters"
    )
    text = page.page(
        _name(run),
        subtitle,
        page.section("Figures", *_figures(results)),
        page.section("KL by layer", _kl_table(run, results["kl_per_layer"])),
        page.section("Pictures", *_pictures(folder, pictures)),
        _configuration(run.config),
        _provenance({"training": run.provenance, "scoring": results["provenance"]}),
    )
    return _write(folder / "report.html", text)


def _figures(results: Mapping[str, Any]) -> list[Markup]:
    """The table of bounds, and how far they can be trusted."""
    names = {"elbo": "ELBO"}
    names |= {k: f"{int(k):,} importance sample{'s' * (k != '1')}" for k in results["iw"]}
    values = {"elbo": results["elbo"]} | results["iw"]
    rows = [
        [
            name,
            _number(values[key], ".2f"),
            _number(results["standard_error"].get(key), ".2f"),
            _number(results["bits_per_dim"].get(key), ".3f"),
        ]
        for key, name in names.items()
    ]
    header = ["negative bound", "nats", "std. error", "bits/dim"]
    parts = [page.table(header, rows, numbers=(1, 2, 3))]
    if results.get("warning"):
        parts.append(page.paragraph(_sentence(results["warning"]), "alarm"))
    note = (
        "Of the log-likelihood of an image: lower is better, and more samples bring the bound "
        "closer to it. Standard errors are over the images."
    )
    return [*parts, *_weights(results), page.paragraph(note, "quiet")]


def _weights(results: Mapping[str, Any]) -> list[Markup]:
    """What the importance weights are like; nothing in figures that are older than that."""
    parts = []
    if effective := results.get("effective_samples"):
        most = max(map(int, results["iw"]), default=1)
        median, least = (_number(effective.get(name), ".1f") for name in ("median", "min"))
        parts.append(
            page.paragraph(
                f"Effective samples: {median} of {most:,} for the median image, {least} for the "
                "worst. The nearer to all of them, the nearer the posterior is to the true one."
            )
        )
    if pareto := results.get("pareto_k"):
        share, median = pareto.get("share_above_0.7"), _number(pareto.get("median"), ".2f")
        parts.append(
            page.paragraph(
                "Pareto k-hat is above 0.7, where a few samples carry most of the weight, for "
                f"{_number(share, '.1%')} of the images; its median is {median}."
            )
        )
    return parts


def _kl_table(run: Run, kl: Sequence[float | None]) -> Markup:
    """The KL of each layer, the top one first, with the size of its latents."""
    sizes = run.config.ladder.latent_sizes((run.image_shape[1], run.image_shape[2]))
    known = [value or 0.0 for value in kl]
    most = max([*known, 1e-9])
    rows = [
        [
            f"{i + 1}{_place(i + 1, len(kl))}",
            f"{run.config.ladder.z_dims[i]} x {sizes[i][0]} x {sizes[i][1]}",
            _number(kl[i], ".2f"),
            page.bar(max(known[i], 0.0) / most),
        ]
        for i in reversed(range(len(kl)))
    ]
    rows.append(["all", "", f"{sum(known):.2f}", ""])
    return page.table(["layer", "latents", "nats", ""], rows, numbers=(1, 2))


def _pictures(folder: Path, pictures: Sequence[Picture]) -> list[Markup]:
    """Those of the pictures that there are."""
    parts = []
    for picture in pictures:
        if not (file := folder / picture.file).is_file():
            continue
        kind = "paper" if picture.chart else "pixels"
        drawn = page.image(file.read_bytes(), "image/png", picture.title, kind)
        if picture.folded:
            parts.append(page.folded(picture.title, page.figure(drawn, "", picture.caption)))
        else:
            # It carries its title itself.
            parts.append(page.figure(drawn, "", picture.caption))
    return parts


# --- Of a run ---


def training_report(run: Run) -> Path:
    """Write `report.html` into a run's folder, in whatever state it is; returns its path.

    Raises `UserError` where the run's files are damaged, or the report cannot be written.
    """
    entries = finite_entries(run.path / "metrics.jsonl")
    config = run.config
    channels, height, width = run.image_shape
    subtitle = (
        f"{config.dataset} ({config.train_split}), {channels} x {height} x {width}, "
        f"{len(config.ladder.z_dims)} layers; {_progress(config, entries)}"
    )
    text = page.page(
        _name(run),
        subtitle,
        page.section("Newest figures", *_newest_figures(entries)),
        page.section("Learning curves", *_curves(entries)),
        page.section("Pictures", *_newest_pictures(run.path / "images")),
        page.section("Evaluations", *_evaluations(run)),
        _configuration(config),
        _provenance({"training": run.provenance}),
    )
    return _write(run.path / "report.html", text)


def _progress(config: RunConfig, entries: Sequence[Entry]) -> str:
    """How far a run has come, in words."""
    if not entries:
        return "nothing logged yet"
    step = f"step {int(entries[-1]['step']):,}" + (f" of {config.steps:,}" if config.steps else "")
    time = entries[-1].get("time", 0)
    if not 0 < time < 1e11:  # in seconds; what is beyond is no date
        return step
    return f"{step}, logged {datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M} UTC"


def _newest_figures(entries: Sequence[Entry]) -> list[Markup]:
    """The last figures of the images trained on and of those held out."""
    rows = []
    names = {"train": "training"}
    if split := held_out_split(entries):
        names[split] = f"{split} images"
    for group, name in names.items():
        if entry := newest(entries, f"{group}/negative_elbo"):
            tags = ("negative_elbo", "reconstruction", "kl", "bits_per_dim")
            figures = [_number(entry.get(f"{group}/{tag}"), ".3f") for tag in tags]
            rows.append([name, f"{int(entry['step']):,}", *figures])
    if not rows:
        return []
    header = ["", "step", "negative ELBO", "reconstruction", "KL", "bits/dim"]
    if not any(row[-1] for row in rows):  # of binary images nats are what is compared
        header, rows = header[:-1], [row[:-1] for row in rows]
    note = "Nats per image; those of training are means since the log entry before."
    return [page.table(header, rows, numbers=range(1, 6)), page.paragraph(note, "quiet")]


def _curves(entries: Sequence[Entry]) -> list[Markup]:
    charts = learning_curves(entries)
    figures = [
        page.figure(page.image(c.svg, "image/svg+xml", c.title), c.title, c.caption) for c in charts
    ]
    return [page.beside(figures)] if figures else []


def _newest_pictures(folder: Path) -> list[Markup]:
    """The last samples and reconstructions of the training."""
    parts = []
    captions = {picture.file: picture.caption for picture in ladder_pictures(0)}
    for name in ("samples", "reconstructions"):
        steps = {file.stem.rpartition("-")[2]: file for file in folder.glob(f"{name}-*.png")}
        if numbers := [step for step in steps if step.isascii() and step.isdecimal()]:
            step = max(numbers, key=int)
            title = f"{name.capitalize()} at step {int(step):,}"
            drawn = page.image(steps[step].read_bytes(), "image/png", title, "pixels")
            parts.append(page.figure(drawn, title, captions[f"{name}.png"]))
    return parts


def _evaluations(run: Run) -> list[Markup]:
    """The figures that evaluate.py found, newest last; their steps are links to their reports."""
    folders = evaluation_folders(run.path)
    if not folders:
        return []
    scored = [Scored.read(folder) for folder in folders]
    table = columns(scored, ("step", "weights", "data", "bounds", "kl"))
    rows = [
        [page.strong(c.cells[i]) if i in c.best else c.cells[i] for c in table]
        for i in range(len(scored))
    ]
    # In the first column, which a narrow page shows too.
    for row, report in zip(rows, [folder / "report.html" for folder in folders], strict=True):
        if report.is_file():
            row[0] = page.link(report.relative_to(run.path).as_posix(), row[0])
    header = [column.header for column in table]
    numbers = [i for i, column in enumerate(table) if column.is_number]
    note = "Negative bounds in nats ± standard error, bits per dimension in brackets."
    return [page.table(header, rows, numbers), page.paragraph(note, "quiet")]


# --- Of both ---


def _configuration(config: RunConfig) -> Markup:
    """The options that differ from the defaults, then the others, and the command of such a run."""
    # What `auto` stands for is the default of this data set.
    defaults = RunConfig.of(dataset=config.dataset).options() | {"dataset": RunConfig.dataset}
    values = config.options()
    changed = [name for name, value in values.items() if value != defaults[name]]
    kept = [name for name in values if name not in changed]
    header = ["option", "value", "default"]
    flags = {name: flag(name) for name in OPTIONS}

    def rows(names: Sequence[str], mark: Callable[[str], str]) -> list[list[str]]:
        return [[flags[n], mark(_shown(values[n])), _shown(defaults[n])] for n in names]

    return page.section(
        "Configuration",
        page.table(header, rows(changed, page.strong)) if changed else Markup(),
        page.folded(
            f"{len(kept)} options at their defaults",
            page.table(header[:2], [row[:2] for row in rows(kept, page.escaped)]),
        ),
        page.folded("command", page.preformatted(command_line(config, changed))),
    )


def command_line(config: RunConfig, names: Sequence[str]) -> str:
    """The shell command that trains with the options `names` of `config`, the others by default."""
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
    """An option's value, as it is given on the command line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _provenance(origins: Mapping[str, Mapping[str, Any]]) -> Markup:
    """Code, libraries and machine of each."""
    entries = list(dict.fromkeys(name for origin in origins.values() for name in origin))
    rows = [
        [name, *("" if o.get(name) is None else str(o[name]) for o in origins.values())]
        for name in entries
    ]
    return page.section("Provenance", page.table(["", *origins], rows)) if rows else Markup()


def _name(run: Run) -> str:
    return run.path.resolve().name


def _number(value: float | None, form: str) -> str:
    """A figure; empty where it is not known."""
    return "" if value is None else format(value, form)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "." * (not text.endswith("."))


def _write(path: Path, text: str) -> Path:
    write_atomically(path, lambda file: file.write(text.encode(errors="replace")))
    return path


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        prog="report.py", description="Write RUN/report.html: how the training of a run goes."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of train_svi.py")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    print(f"report    {training_report(Run.open(arguments.run))}")
    return 0


if __name__ == "__main__":
    run_command(main)
