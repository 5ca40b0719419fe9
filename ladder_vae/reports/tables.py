"""Tables of results, and the Markdown writer that all of them share."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ladder_vae.evaluation.metrics import Metrics
from ladder_vae.evaluation.pareto import UNRELIABLE


@dataclass(frozen=True)
class Column:
    """A column of a table; the cells of the rows `best` are printed in bold."""

    header: str
    cells: list[str]
    is_number: bool = True
    best: frozenset[int] = frozenset()


def markdown(columns: Sequence[Column]) -> str:
    """A Markdown table whose columns are also aligned in its source."""
    rendered = [_rendered(column) for column in columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*rendered, strict=True))


def markdown_rows(
    header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()
) -> str:
    """A Markdown table from its rows; `numbers` are the indices of columns that hold numbers."""
    return markdown(
        [
            Column(title, [row[i] for row in rows], is_number=i in numbers)
            for i, title in enumerate(header)
        ]
    )


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


def number(value: float | None, form: str) -> str:
    """A number in the given format; empty if it is not known."""
    return "" if value is None else format(value, form)


def layer_name(layer: int, layers: int) -> str:
    """A layer's name, such as "layer 1 (bottom)"."""
    place = " (top)" if layer == layers else " (bottom)" if layer == 1 else ""
    return f"layer {layer}{place}"


def bounds_table(metrics: Metrics) -> list[Column]:
    """The bounds of one evaluation, with a row for each number of samples."""
    keys = ["elbo", *metrics.iw]
    names = ["ELBO", *(f"{int(k):,} importance sample{'s' * (k != '1')}" for k in metrics.iw)]
    return [
        Column("negative bound", names, is_number=False),
        Column("nats", [number(metrics.bound(k), ".2f") for k in keys]),
        Column("std. error", [number(metrics.standard_error.get(k), ".2f") for k in keys]),
        Column("bits/dim", [number(metrics.bits_per_dim.get(k), ".3f") for k in keys]),
    ]


def summary(metrics: Metrics) -> str:
    """The bounds of one evaluation, its KL by layer, and the quality of its importance weights."""
    kl = "  ".join(number(value, ".2f") for value in metrics.kl_per_layer)
    lines = [markdown(bounds_table(metrics)), f"KL by layer, bottom to top: {kl} nats"]
    if (effective := metrics.effective_samples.get("median")) is not None:
        most = max(map(int, metrics.iw), default=1)
        line = f"effective samples: {effective:.1f} of {most:,} (median)"
        if (share := metrics.pareto_k.get(f"share_above_{UNRELIABLE}")) is not None:
            line += f"; Pareto k-hat above {UNRELIABLE} for {share:.1%} of the images"
        lines.append(line)
    return "\n".join(lines)
