"""Write the tables of README.md and docs/, and learning curves, from the files in results/.

    python -m tools.readme_tables

Each table is between `<!-- table NAME -->` and `<!-- end -->`; NAME is a key of `TABLES`. A run
whose metrics.jsonl is in results/ gets its learning curve beside it.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

import datasets
from guide import build_ladder
from ladder_vae.evaluation.metrics import Metrics
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.reports import tables
from ladder_vae.reports.comparison import Scored, columns, origin, place
from ladder_vae.reports.curves import learning_curves
from ladder_vae.runs.metrics_log import finite_entries
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import LAPTOPS, PRESETS, ROWS
from tools import benchmark_tables as measured
from tools.benchmark_tables import markdown

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PRETRAINED = ROOT / "pretrained"


def read(name: str) -> Any:
    """A JSON file of results/."""
    return json.loads((RESULTS / name).read_text())


def evaluation(folder: str) -> Metrics:
    """The metrics.json of a folder of results/."""
    return Metrics.read(RESULTS / folder / "metrics.json")


def bound(metrics: Metrics, key: str) -> str:
    """A negative bound with its standard error; `key` is "elbo" or a number of samples."""
    return f"{metrics.bound(key):.2f} ± {metrics.standard_error[key]:.2f}"


def ours(preset: str) -> list[Scored]:
    """Our results with a preset, from results/PRESET and results/PRESET-seed-N."""
    folders = [RESULTS / preset, *sorted(RESULTS.glob(f"{preset}-seed-*"))]
    files = [folder / "metrics.json" for folder in folders]
    return [Scored(f"`{preset}`", Metrics.read(file)) for file in files if file.exists()]


def likelihood_table() -> str:
    """The published results and ours: of the same preset, then those of a data set's laptop."""
    runs = []
    by_data = groupby(read("reference.json")["rows"], lambda row: row["dataset"].split(",")[0])
    for dataset, rows in by_data:
        for row in rows:
            published = {"step": 0, "kl_per_layer": []} | row | {"n_images": row["n_images"] or 0}
            runs.append(Scored("reference", Metrics.from_dict(published)))
            runs += ours(row["preset"])
        for name in LAPTOPS:
            if PRESETS[name]["dataset"] == dataset:
                runs += ours(name)
    text = plain_table(runs, "data", "layers", "run", "parameters", "bounds", "minutes", "seed")
    trained = [
        f"{run.name} (seed {run.metrics.training_seed}) on {place(run.metrics.trained)}"
        for run in runs
        if run.name != "reference"
    ]
    evaluated = "docs/reproduce.md tells on what machines they were evaluated."
    return f"{text}\n\nTrained: {'; '.join(trained)}. {evaluated}"


def plain_table(runs: list[Scored], *names: str) -> str:
    """The columns called `names`, without the bound with one sample, another estimate of the ELBO.

    Nothing is bold: the best bound would always be that of the deepest ladder or the longest run.
    """
    table = columns(runs, names)
    shown = [replace(column, best=frozenset()) for column in table if column.header != "1 sample"]
    return tables.markdown(shown)


def bounds_table(folder: str) -> str:
    """The bounds of an evaluation, with their provenance and a warning if they are loose."""
    metrics = evaluation(folder)
    notes = [f"{metrics.n_images:,} test images, measured on {origin(metrics)}."]
    share = metrics.pareto_k["share_above"] or 0
    if share > 0.05:
        notes.append(
            f"For {share:.0%} of the images a few importance samples dominate (Pareto k-hat above "
            f"{metrics.pareto_k['threshold']:.2g}). The bound is loose for them; more samples "
            "would tighten it."
        )
    return "\n\n".join([tables.markdown(tables.bounds_table(metrics)), *notes])


def laptop_table() -> str:
    """What `mnist-laptop` reaches in a given time, from the shortest run on."""
    found = [Metrics.read(path) for path in RESULTS.glob("mnist-laptop*/metrics.json")]
    found.sort(key=lambda metrics: (metrics.minutes or 0, metrics.training_seed or 0))
    runs = [Scored(f"{metrics.minutes:.0f} minutes", metrics) for metrics in found]
    return plain_table(runs, "data", "run", "step", "seed", "bounds", "origin")


def sandwich_table() -> str:
    """Bounds from both sides on generated images, by the number of temperatures."""
    metrics = evaluation("sandwich")
    note = (
        f"{metrics.sandwich['images']:,} generated images, {metrics.sandwich['chains']} forward "
        f"and reverse chains each, measured on {origin(metrics)}."
    )
    return f"{tables.markdown(tables.sandwich_table(metrics))}\n\n{note}"


def learning_table() -> str:
    """The bounds of the same small network, trained here and by the reference."""
    rows = []
    for steps, reference in read("reference.json")["small_static_mnist"].items():
        subset = reference.get("elbo_of_the_images_with_bounds")
        cells = [f"{reference['elbo']:.2f}", f"{subset or ''}", f"{reference['iw']['100']:.2f}"]
        rows.append([f"{int(steps):,}", "reference", *cells, ""])
        for folder in sorted((RESULTS / "small-static-mnist").glob(f"seed-*-step-{steps}")):
            name = f"this project, seed {folder.name.split('-')[1]}"
            rows.append([f"{int(steps):,}", name, *_learned(folder)])
    name = "the reference's weights, evaluated here"
    rows.append(["2,000", name, *_learned(RESULTS / "small-static-mnist" / "reference-weights")])
    images = ["ELBO, 10,000 images", "ELBO, 1,000 images", "100 samples, 1,000 images"]
    return markdown(["steps", "run", *images, "measured on"], rows)


def _learned(folder: Path) -> list[str]:
    whole, subset = (Metrics.read(folder / f"{name}.json") for name in ("elbo", "bound"))
    bounds = [bound(whole, "elbo"), bound(subset, "elbo"), bound(subset, "100")]
    return [*bounds, origin(whole).replace("1 threads", "1 thread")]


def pretrained_table() -> str:
    """The weights in pretrained/ and the commands that verify their bounds; empty without any."""
    names = [path.stem for path in sorted(PRETRAINED.glob("*.safetensors"))]
    if not names:
        return ""
    rows, commands = [], []
    found = {name: evaluation(name) for name in names}
    numbers = sorted({k for metrics in found.values() for k in metrics.iw}, key=int)
    for name, metrics in found.items():
        bounds = [bound(metrics, k) if k in metrics.iw else "" for k in numbers]
        bounds.insert(0, bound(metrics, "elbo"))
        link = f"[{name}](../pretrained/{name}.safetensors)"
        rows.append([link, f"{metrics.n_images:,}", *bounds, place(metrics.provenance)])
        limit = f"--limit {metrics.limit} " if metrics.limit else ""
        options = f"--samples {' '.join(metrics.iw)} {limit}--out runs/{name}-pretrained"
        commands.append(f"python evaluate.py pretrained/{name}.safetensors {options}")
    samples = [f"{int(k):,} sample{'s' * (k != '1')}" for k in numbers]
    header = ["weights", "test images", "ELBO", *samples, "evaluated on"]
    table = markdown(header, rows)
    text = "To verify these bounds, up to the noise of the samples:"
    return "\n".join([table, "", text, "", "```sh", *commands, "```"])


def presets_table() -> str:
    """The presets and the sizes of their networks, without the `-fast` presets."""
    rows = []
    for name, options in PRESETS.items():
        if name.removesuffix("-fast") in ROWS and name not in ROWS:
            continue
        config = RunConfig.of(**options)
        with torch.device("meta"):
            pair = build_ladder(config.ladder, datasets.image_shape(config.dataset))
        depth = str(len(config.ladder.z_dims))
        row = [f"`{name}`", f"`{config.dataset}`", depth, f"{config.free_bits}"]
        rows.append([*row, f"{count_parameters(*pair):,}"])
    return markdown(["preset", "data", "layers", "free bits", "parameters"], rows)


def recipe_runs() -> list[dict[str, Any]]:
    """The runs of benchmarks/recipes.py."""
    return [read(f"recipes/{path.name}") for path in sorted((RESULTS / "recipes").glob("*.json"))]


def benchmark(name: str) -> Any:
    """What benchmarks/NAME.py measured."""
    return read(f"benchmarks/{name}.json")


TABLES: dict[str, Callable[[], str]] = {
    "demo": lambda: bounds_table("demo"),
    "hour": lambda: bounds_table("hour"),
    "likelihood": likelihood_table,
    "learning": learning_table,
    "pretrained": pretrained_table,
    "presets": presets_table,
    "recipes": lambda: measured.recipes_table(recipe_runs()),
    "deep_recipes": lambda: measured.deep_recipes_table(recipe_runs()),
    "annealing": lambda: measured.annealing_table(benchmark("annealing")),
    "sandwich": sandwich_table,
    "laptop": laptop_table,
    "laptop_recipes": lambda: measured.laptop_recipes_table(recipe_runs()),
    "durability": lambda: measured.durability_table(read("durability.json")),
    "memory": lambda: measured.memory_table(benchmark("memory")),
    "training": lambda: measured.training_table(benchmark("training")["cases"]),
    "evaluation": lambda: measured.evaluation_table(benchmark("evaluation")["cases"]),
    "scaling": lambda: measured.scaling_table(benchmark("scaling")),
    "time_to_quality": lambda: measured.time_to_quality_table(benchmark("time_to_quality")),
    "fast_paths": lambda: measured.fast_paths_table(benchmark("learning")["runs"]),
    "parallel": lambda: measured.parallel_table(benchmark("parallel")),
    "communication": lambda: measured.communication_table(benchmark("parallel")),
}


def pages() -> list[Path]:
    """The pages that contain tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def written(text: str) -> str:
    """A page's `text` with its tables up to date."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


def draw_learning_curve(log: Path) -> None:
    """Draw the ELBO of a metrics.jsonl as learning.svg beside it."""
    elbo, *_ = learning_curves(finite_entries(log))
    (log.parent / "learning.svg").write_bytes(elbo.svg)


def main() -> None:
    for page in pages():
        page.write_text(written(page.read_text()))
    for log in RESULTS.glob("*/metrics.jsonl"):
        draw_learning_curve(log)


if __name__ == "__main__":
    main()
