"""Compares several evaluations in one table.

Evaluations are read from the metrics.json files that evaluate.py wrote. Bounds are negative bounds
on the log-likelihood in nats: lower is better.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ladder_vae.evaluation.folders import evaluation_folders
from ladder_vae.evaluation.metrics import Metrics
from ladder_vae.reports.sweep import (
    Options,
    mean_and_deviation,
    option_columns,
    seed_groups,
    training_options,
)
from ladder_vae.reports.tables import Column, markdown, number
from runtime.errors import UserError
from runtime.files import exists, write_text

# The columns in their order; `bounds` stands for the ELBO and every number of samples.
COLUMNS = (
    *("run", "data", "likelihood", "layers", "parameters", "seed", "options", "step", "weights"),
    *("bounds", "kl", "minutes", "origin"),
)
_INTRODUCTION = (
    "Negative bounds on the log-likelihood in nats ± standard error over the images (in brackets: "
    "bits per dimension). Lower is better; the best bound on the same images with the same kind of "
    "likelihood is in bold."
)

_SEEDS = (
    "Runs that differ by their training seed alone: mean of their bounds ± standard deviation over "
    "the runs."
)


class Scored(NamedTuple):
    """An evaluation, its name in the table, and the training options if they are known."""

    name: str
    metrics: Metrics
    options: Options | None = None

    @classmethod
    def read(cls, path: Path) -> "Scored":
        """Read a run's newest evaluation, the evaluation in a folder, or a metrics.json.

        Raises `UserError` if there is no evaluation, or it is damaged.
        """
        name = str(path) if path.name else path.resolve().name
        file = _metrics_file(path)
        return cls(name, Metrics.read(file), training_options(file))


def _metrics_file(path: Path) -> Path:
    """The metrics.json that a path on the command line refers to."""
    if exists(path) and path.is_file():
        return path
    if exists(path / "metrics.json"):
        return path / "metrics.json"
    if folders := evaluation_folders(path):
        return folders[-1] / "metrics.json"
    if exists(path / "config.json"):
        raise UserError(f"{path} has not been evaluated yet; run: python evaluate.py {path}")
    raise UserError(
        f"{path} is neither a run folder nor an evaluation: it has no config.json and no "
        "metrics.json"
    )


# --- Which rows can be compared ---


def comparable(runs: Sequence[Scored]) -> list[str | None]:
    """A description of each run's images, their values and the kind of likelihood.

    Bounds compare if and only if their descriptions are equal; None compares with nothing, since
    its file does not say all of that.
    """
    return [
        f"{images} ({run.metrics.levels} levels), {run.metrics.likelihood_kind}"
        if run.metrics.levels and run.metrics.likelihood_kind
        else None
        for run, images in zip(runs, same_images(runs), strict=True)
    ]


def same_images(runs: Sequence[Scored]) -> list[str]:
    """A description of each run's images; equal descriptions mean the same images."""
    # A file without a limit is of the whole split if it has as many images as another file that
    # says so.
    whole = {_images(run.metrics) for run in runs if run.metrics.limit is None}
    return [_describe_images(run.metrics, _images(run.metrics) in whole) for run in runs]


def _images(metrics: Metrics) -> tuple[str, str, int]:
    return metrics.dataset, metrics.split, metrics.n_images


def _describe_images(metrics: Metrics, is_whole: bool) -> str:
    words = [metrics.dataset] if metrics.split == "test" else [metrics.dataset, metrics.split]
    if not is_whole:
        # The random seed of the evaluation chose these images.
        seed = f" of seed {metrics.seed}" if metrics.seed else ""
        words.append(f"{metrics.n_images:,} images{seed}")
    return ", ".join(words)


# --- Columns ---


def columns(runs: Sequence[Scored], names: Iterable[str] = COLUMNS) -> list[Column]:
    """The columns called `names`, in that order; empty columns are skipped.

    The names are those of `COLUMNS`; `seed` is the random seed of the training, and `options`
    stands for the training options that differ.
    """
    groups = comparable(runs)
    found = []
    for name in names:
        if name == "bounds":
            found += [_bound_column(runs, key, groups) for key in _bound_keys(runs)]
        elif name == "options":
            found += option_columns([run.options for run in runs])
        elif name == "data":
            found.append(Column(name, same_images(runs), is_number=False))
        else:
            header, cell, is_number = _CELLS[name]
            found.append(Column(header, [cell(run) for run in runs], is_number))
    return [column for column in found if any(column.cells)]


def _bound_keys(runs: Sequence[Scored]) -> list[str]:
    """The keys of the bounds that any run has: "elbo", then the numbers of samples, ascending."""
    samples = {k for run in runs for k in run.metrics.iw}
    return ["elbo", *sorted(samples, key=int)]


def _bound_column(runs: Sequence[Scored], key: str, groups: Sequence[str | None]) -> Column:
    values = [run.metrics.bound(key) for run in runs]
    best = set()
    for group in set(groups) - {None}:
        # Bounds are equally good if the table shows the same digits.
        shown = {
            row: round(value, _decimals(value))
            for row, value in enumerate(values)
            if value is not None and groups[row] == group
        }
        if len(shown) > 1:
            best |= {row for row, value in shown.items() if value == min(shown.values())}
    return Column(
        _bound_name(key), [_bound_cell(run.metrics, key) for run in runs], best=frozenset(best)
    )


def _bound_name(key: str) -> str:
    return "ELBO" if key == "elbo" else f"{int(key):,} sample{'s' * (int(key) != 1)}"


def _decimals(nats: float) -> int:
    """The number of decimals of a bound; those of colour images are thousands of nats."""
    return 2 if abs(nats) < 1000 else 0


def _bound_cell(metrics: Metrics, key: str) -> str:
    """A bound with its standard error and, for 8-bit images, in bits per dimension."""
    value = metrics.bound(key)
    if value is None:
        return ""
    error, bits = metrics.standard_error.get(key), metrics.bits_per_dim.get(key)
    cell = f"{value:.{_decimals(value)}f}"
    cell += "" if error is None else f" ± {error:.{_decimals(value)}f}"
    return cell + ("" if bits is None or metrics.levels == 2 else f" ({bits:.2f})")


def _likelihood(metrics: Metrics) -> str:
    return metrics.likelihood + " (density)" * metrics.is_density


def _kl_cell(run: Scored) -> str:
    kl = run.metrics.kl
    return "" if kl is None else f"{kl:.{_decimals(kl)}f}"


def origin(metrics: Metrics) -> str:
    """The machine and commit of the training, and of the evaluation if they differ."""
    places = [place(known) for known in (metrics.trained, metrics.provenance)]
    return "; scored on ".join(dict.fromkeys(filter(None, places)))


def place(provenance: dict[str, Any]) -> str:
    """The machine and commit of a training or an evaluation, as far as they are known."""
    commit = provenance.get("commit")
    known = (provenance.get("machine"), commit and f"commit {commit}")
    return ", ".join(str(word) for word in known if word)


# By name: the column's header, a function that returns a cell, and whether the cells are numbers.
_CELLS: dict[str, tuple[str, Callable[[Scored], str], bool]] = {
    "run": ("run", lambda run: run.name, False),
    "likelihood": ("likelihood", lambda run: _likelihood(run.metrics), False),
    "layers": ("layers", lambda run: number(run.metrics.layers, ","), True),
    "parameters": ("parameters", lambda run: number(run.metrics.parameters, ","), True),
    "step": ("step", lambda run: number(run.metrics.step, ","), True),
    "weights": ("weights", lambda run: run.metrics.weights, False),
    "kl": ("KL", _kl_cell, True),
    "minutes": ("minutes", lambda run: number(run.metrics.minutes, ",.1f"), True),
    "seed": ("seed", lambda run: number(run.metrics.training_seed, ","), True),
    "origin": ("obtained on", lambda run: origin(run.metrics), False),
}


# --- Files ---


def comma_separated(runs: Sequence[Scored]) -> str:
    """The metrics as CSV, one row per run: numbers are not rounded, unknown ones are empty."""
    rows = [_record(run, _bound_keys(runs)) for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _record(run: Scored, keys: Sequence[str]) -> dict[str, Any]:
    """A row of the CSV; its columns depend on `keys` alone."""
    metrics = run.metrics
    record: dict[str, Any] = {"run": run.name}
    for name in (
        *("dataset", "split", "n_images", "levels", "limit"),
        *("likelihood", "likelihood_kind"),
        *("layers", "parameters", "step", "weights"),
    ):
        record[name] = getattr(metrics, name)
    record["limit"] = metrics.limit or None
    record |= {"seed": metrics.training_seed, "evaluation_seed": metrics.seed}
    for key in keys:
        name = "negative_elbo" if key == "elbo" else f"negative_bound_{key}_samples"
        record[name] = metrics.bound(key)
        record[f"{name}_standard_error"] = metrics.standard_error.get(key)
        record[f"{name}_bits_per_dim"] = metrics.bits_per_dim.get(key)
    record |= {"kl": metrics.kl, "minutes": metrics.minutes}
    for name, provenance in (("trained", metrics.trained), ("scored", metrics.provenance)):
        record[f"{name}_commit"] = provenance.get("commit")
        record[f"{name}_machine"] = provenance.get("machine")
    return record


def in_order(runs: Sequence[Scored]) -> list[Scored]:
    """Comparable runs beside each other, and of those the best first.

    The best has the lowest of the tightest bounds that all runs of the group have.
    """
    groups: dict[str | None, list[Scored]] = {}
    for run, name in zip(runs, comparable(runs), strict=True):
        groups.setdefault(name, []).append(run)
    ordered = []
    for group in groups.values():
        shared = [k for k in _bound_keys(group) if all(_finite(run, k) for run in group)]
        key = shared[-1] if shared else "elbo"
        ordered += sorted(group, key=lambda run: _finite(run, key) or (math.inf,))
    return ordered


def _finite(run: Scored, key: str) -> tuple[float, ...]:
    """The bound, as a tuple that is empty if it is not known."""
    value = run.metrics.bound(key)
    return () if value is None else (value,)


def over_seeds(runs: Sequence[Scored]) -> str:
    """A table of the runs that differ by their training seed alone; empty if there are none."""
    images = same_images(runs)
    groups = seed_groups(
        [
            (run.options, run.metrics.training_seed, (image, run.metrics.step, run.metrics.weights))
            for run, image in zip(runs, images, strict=True)
        ]
    )
    if not groups:
        return ""
    keys = _bound_keys(runs)
    found = [
        Column("runs", [", ".join(runs[row].name for row in rows) for rows in groups], False),
        Column("data", [images[rows[0]] for rows in groups], False),
        Column(
            "seeds",
            [" ".join(str(runs[r].metrics.training_seed) for r in g) for g in groups],
            False,
        ),
        *(
            Column(_bound_name(key), [_over_seeds([runs[r] for r in g], key) for g in groups])
            for key in keys
        ),
    ]
    table = markdown([column for column in found if any(column.cells)])
    return f"\n{_SEEDS}\n\n{table}\n"


def _over_seeds(runs: Sequence[Scored], key: str) -> str:
    values = [value for run in runs for value in _finite(run, key)]
    return mean_and_deviation(values, _decimals(values[0])) if len(values) == len(runs) else ""


def compare(paths: Sequence[Path], folder: Path | None = None) -> str:
    """The runs at `paths` as Markdown: a table, and one of those that differ by seed alone.

    A path is a run folder (its newest evaluation), the folder of an evaluation, or a metrics.json.
    Writes `comparison.md` and `comparison.csv` into `folder`, if there is one. Raises `UserError`
    if a path has no evaluation, or a file cannot be written.
    """
    runs = in_order([Scored.read(path) for path in paths])
    text = f"{_INTRODUCTION}\n\n{markdown(columns(runs))}\n"
    groups = dict.fromkeys(comparable(runs))
    if len(groups) > 1:
        text += (
            "\nRows with different images or kinds of likelihood cannot be compared: "
            f"{'; '.join(group or 'rows of unknown likelihood' for group in groups)}.\n"
        )
    text += over_seeds(runs)
    if folder is not None:
        rows = comma_separated(runs)
        write_text(folder / "comparison.md", text)
        write_text(folder / "comparison.csv", rows)
    return text
