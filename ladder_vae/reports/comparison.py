"""The figures of several runs in one table.

They come from the metrics.json files that evaluate.py wrote. Bounds are negative bounds on the
log-likelihood in nats, so that lower is better.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from runtime.errors import UserError
from runtime.files import write_atomically

# What a table can show, in its order; `bounds` stands for the ELBO and every number of samples.
COLUMNS = (
    *("run", "data", "layers", "parameters", "step", "weights"),
    *("bounds", "kl", "minutes", "origin"),
)
_INTRODUCTION = (
    "Negative bounds on the log-likelihood in nats ± standard error over the images (bits per "
    "dimension in brackets); lower is better, the best of the same images is in bold."
)
# A positive number as it stands in names.
_COUNT = r"[1-9][0-9]{0,17}"


def _is_whole(value: Any) -> bool:
    return type(value) is int


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    """A figure; None stands for one that was not finite."""
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (is_real and abs(value) < 1e300)


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_number, value))


def _are_named_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _are_by_samples(value: Any) -> bool:
    return _are_named_numbers(value) and all(re.fullmatch(_COUNT, k) for k in value)


# The entries of a metrics.json that are used here, and the form they must have.
_REQUIRED: dict[str, Callable[[Any], bool]] = {
    "elbo": _is_number,
    "iw": _are_by_samples,
    "kl_per_layer": _are_numbers,
    "n_images": _is_whole,
    "dataset": _is_text,
    "split": _is_text,
    "step": _is_whole,
}
_OPTIONAL: dict[str, Callable[[Any], bool]] = {
    "standard_error": _are_named_numbers,
    "bits_per_dim": _are_named_numbers,
    "layers": _is_whole,
    "parameters": _is_whole,
    "weights": _is_text,
    "seed": _is_whole,
    "minutes": _is_number,
    "training_seed": _is_whole,
    "trained": _is_object,
    "provenance": _is_object,
}


@dataclass(frozen=True)
class Scored:
    """The figures of one run, as evaluate.py wrote them, under a name for the table."""

    name: str
    figures: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Scored":
        """A run's newest evaluation, the one in an evaluation's folder, or a metrics.json.

        Raises `UserError` where there are no figures, or they are damaged.
        """
        file = _metrics_file(path)
        return cls(str(path) if path.name else path.resolve().name, _checked(file))

    def bound(self, key: str) -> float | None:
        """A negative bound in nats, of "elbo" or of a number of samples; None where not known."""
        figures = self.figures
        return figures["elbo"] if key == "elbo" else figures["iw"].get(key)

    @property
    def images(self) -> tuple[str, str, int]:
        """Data set, split and how many of its images."""
        return self.figures["dataset"], self.figures["split"], self.figures["n_images"]

    @property
    def kl(self) -> float | None:
        """The KL of all layers in nats."""
        layers = self.figures.get("kl_per_layer", [])
        return sum(layers) if layers and None not in layers else None


def evaluation_folder(run: Path, step: int, split: str) -> Path:
    """Where a run keeps its evaluation at a step: that of the test set by the step alone."""
    return run / "eval" / (str(step) if split == "test" else f"{step}-{split}")


def evaluation_folders(run: Path) -> list[Path]:
    """The folders of a run's evaluations by step, rising; of one step's, the test set's is last."""
    others = "|".join(re.escape(split) for split in datasets.SPLITS if split != "test")
    found = []
    for file in run.glob("eval/*/metrics.json"):
        if name := re.fullmatch(rf"(0|{_COUNT})(-(?:{others}))?", file.parent.name):
            step, split = name.groups()
            found.append((int(step), split is None, split or "", file.parent))
    return [folder for *_, folder in sorted(found)]


def _metrics_file(path: Path) -> Path:
    """The metrics.json that a path of the command line stands for."""
    if path.is_file():
        return path
    if (path / "metrics.json").is_file():
        return path / "metrics.json"
    if folders := evaluation_folders(path):
        return folders[-1] / "metrics.json"
    if (path / "config.json").is_file():
        raise UserError(f"{path} has not been evaluated yet; run: python evaluate.py {path}")
    if not path.exists():
        raise UserError(f"there is no {path}; give run folders")
    raise UserError(
        f"{path} is neither a run folder nor an evaluation: it has no config.json and no "
        "metrics.json"
    )


def _checked(file: Path) -> dict[str, Any]:
    """The content of a metrics.json; raises `UserError` unless it has the form of one."""
    try:
        content = json.loads(file.read_text(), parse_constant=lambda name: None)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} does not hold the figures of an evaluation")
    if missing := [name for name in _REQUIRED if name not in content]:
        raise UserError(f"{file} lacks {', '.join(missing)}; evaluate the run again")
    for name, has_form in (_REQUIRED | _OPTIONAL).items():
        value = content.get(name)
        unknown = value is None and name in _OPTIONAL
        if not unknown and not has_form(value):
            raise UserError(f"{file} is damaged: {name} is {str(value)[:40]!r}")
    return content


# --- Which rows can be compared ---


def same_images(runs: Sequence[Scored]) -> list[str]:
    """For each run the images that it was scored on, in words; the same words, the same images."""
    # A `limit` of null says that they are the whole split. Files without it are of the whole split
    # too if as many images are known to be.
    whole = {run.images for run in runs if run.figures.get("limit", 0) is None}
    return [_images_in_words(run, run.images in whole) for run in runs]


def _images_in_words(run: Scored, whole: bool) -> str:
    dataset, split, count = run.images
    words = [dataset] if split == "test" else [dataset, split]
    if not whole:
        # The seed chose them.
        seed = run.figures.get("seed")
        words.append(f"{count:,} images" + (f" of seed {seed}" if seed else ""))
    return ", ".join(words)


# --- Cells ---


@dataclass(frozen=True)
class Column:
    """A column of the table: a cell for each run, and which of them are the best."""

    header: str
    cells: list[str]
    is_number: bool = True
    best: frozenset[int] = frozenset()


def columns(runs: Sequence[Scored], names: Iterable[str] = COLUMNS) -> list[Column]:
    """The columns of `names` in that order, without those that would be empty.

    They are those of `COLUMNS`, and `seed`, that of the training.
    """
    images = same_images(runs)
    found = []
    for name in names:
        if name == "bounds":
            found += [_bound_column(runs, key, images) for key in _bound_keys(runs)]
        elif name == "data":
            found.append(Column(name, images, is_number=False))
        else:
            header, cell, is_number = _CELLS[name]
            found.append(Column(header, [cell(run) for run in runs], is_number))
    return [column for column in found if any(column.cells)]


def _bound_keys(runs: Sequence[Scored]) -> list[str]:
    """ "elbo" and every number of samples that there is a bound of, rising."""
    samples = {k for run in runs for k in run.figures["iw"]}
    return ["elbo", *sorted(samples, key=int)]


def _bound_column(runs: Sequence[Scored], key: str, images: Sequence[str]) -> Column:
    header = "ELBO" if key == "elbo" else f"{int(key):,} sample{'s' * (int(key) != 1)}"
    values = [run.bound(key) for run in runs]
    best = set()
    for group in set(images):
        # What looks the same in the table is as good.
        shown = {
            row: round(value, _decimals(value))
            for row, value in enumerate(values)
            if value is not None and images[row] == group
        }
        if len(shown) > 1:
            best |= {row for row, value in shown.items() if value == min(shown.values())}
    return Column(header, [_bound_cell(run, key) for run in runs], best=frozenset(best))


def _decimals(nats: float) -> int:
    """How many decimals of a bound to show: colour images have thousands of nats."""
    return 2 if abs(nats) < 1000 else 0


def _bound_cell(run: Scored, key: str) -> str:
    """A bound with its standard error and, for colour images, in bits per dimension."""
    value = run.bound(key)
    if value is None:
        return ""
    error, bits = (_named(run, name, key) for name in ("standard_error", "bits_per_dim"))
    dataset = run.figures["dataset"]
    binary = dataset in datasets.NAMES and datasets.is_binary(dataset)
    cell = f"{value:.{_decimals(value)}f}"
    cell += "" if error is None else f" ± {error:.{_decimals(value)}f}"
    return cell + ("" if bits is None or binary else f" ({bits:.2f})")


def _named(run: Scored, name: str, key: str) -> float | None:
    return (run.figures.get(name) or {}).get(key)


def _count(name: str) -> Callable[[Scored], str]:
    """A cell of the whole number called `name`."""

    def cell(run: Scored) -> str:
        value = run.figures.get(name)
        return "" if value is None else f"{value:,}"

    return cell


def _kl_cell(run: Scored) -> str:
    return "" if run.kl is None else f"{run.kl:.{_decimals(run.kl)}f}"


def _minutes_cell(run: Scored) -> str:
    minutes = run.figures.get("minutes")
    return "" if minutes is None else f"{minutes:,.1f}"


def origin(figures: Mapping[str, Any]) -> str:
    """Where a run was trained, and scored if elsewhere: machine and commit, in a few words."""
    trained, scored = (figures.get(name) or {} for name in ("trained", "provenance"))
    if trained.get("commit") in (None, scored.get("commit")):
        return _place(scored)
    return "; scored on ".join(filter(None, (_place(trained), _place(scored))))


def _place(provenance: Mapping[str, Any]) -> str:
    commit = provenance.get("commit")
    known = (provenance.get("machine"), commit and f"commit {commit}")
    return ", ".join(str(word) for word in known if word)


# By name: the column's header, what is in it, and whether that is a number.
_CELLS: dict[str, tuple[str, Callable[[Scored], str], bool]] = {
    "run": ("run", lambda run: run.name, False),
    "layers": ("layers", _count("layers"), True),
    "parameters": ("parameters", _count("parameters"), True),
    "step": ("step", _count("step"), True),
    "weights": ("weights", lambda run: run.figures.get("weights") or "", False),
    "kl": ("KL", _kl_cell, True),
    "minutes": ("minutes", _minutes_cell, True),
    "seed": ("seed", _count("training_seed"), True),
    "origin": ("obtained on", lambda run: origin(run.figures), False),
}


# --- Files ---


def markdown(table: Sequence[Column]) -> str:
    """A Markdown table whose columns are aligned in its text too, best cells in bold."""
    rendered = [_rendered(column) for column in table]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*rendered, strict=True))


def _rendered(column: Column) -> list[str]:
    """Header, separator and cells, all of the same width."""
    cells = [" ".join(cell.replace("|", "\\|").split()) for cell in column.cells]
    cells = [f"**{cell}**" if row in column.best else cell for row, cell in enumerate(cells)]
    width = max(map(len, ["---", column.header, *cells]))
    if column.is_number:
        header, *cells = (cell.rjust(width) for cell in [column.header, *cells])
        return [header, "-" * (width - 1) + ":", *cells]
    header, *cells = (cell.ljust(width) for cell in [column.header, *cells])
    return [header, "-" * width, *cells]


def comma_separated(runs: Sequence[Scored]) -> str:
    """The figures as CSV, one row a run: plain numbers in full, nothing for what is not known."""
    rows = [_record(run, _bound_keys(runs)) for run in runs]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _record(run: Scored, keys: Sequence[str]) -> dict[str, Any]:
    """A row of the CSV; the columns depend on `keys` alone."""
    figures = run.figures
    record: dict[str, Any] = {"run": run.name}
    for name in ("dataset", "split", "n_images", "limit", "seed"):
        record[name] = figures.get(name)
    for name in ("layers", "parameters", "step", "weights"):
        record[name] = figures.get(name)
    for key in keys:
        name = "negative_elbo" if key == "elbo" else f"negative_bound_{key}_samples"
        record[name] = run.bound(key)
        record[f"{name}_standard_error"] = _named(run, "standard_error", key)
        record[f"{name}_bits_per_dim"] = _named(run, "bits_per_dim", key)
    record |= {"kl": run.kl, "minutes": figures.get("minutes")}
    for name, entry in (("trained", "trained"), ("scored", "provenance")):
        provenance = figures.get(entry) or {}
        record[f"{name}_commit"] = provenance.get("commit")
        record[f"{name}_machine"] = provenance.get("machine")
    return record


def compare(paths: Sequence[Path], folder: Path) -> str:
    """One table of the runs at `paths`, in that order, as Markdown.

    A path is a run folder, of which the newest evaluation counts, an evaluation's folder or a
    metrics.json. Writes `comparison.md` and `comparison.csv` into `folder`. Raises `UserError`
    where a path has no figures, or a file cannot be written.
    """
    runs = [Scored.read(path) for path in paths]
    text = f"{_INTRODUCTION}\n\n{markdown(columns(runs))}\n"
    if len(images := dict.fromkeys(same_images(runs))) > 1:
        text += f"\nRows of different images cannot be compared: {'; '.join(images)}.\n"
    rows = comma_separated(runs)
    write_atomically(folder / "comparison.md", lambda file: file.write(text.encode()))
    write_atomically(folder / "comparison.csv", lambda file: file.write(rows.encode()))
    return text
