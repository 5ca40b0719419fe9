"""Write the tables of README.md from the figures in results/.

    python -m results.readme

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Figures come from metrics.json
files that evaluate.py wrote, and from reference.json, which holds the published ones.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from benchmarks.lines import Line

import datasets
from benchmarks import learning
from guide import build_ladder
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.reports import comparison
from ladder_vae.reports.comparison import Scored
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS, ROWS

RESULTS = Path(__file__).parent
README = RESULTS.parent / "README.md"
PRETRAINED = RESULTS.parent / "pretrained"


def read(name: str) -> dict[str, Any]:
    """A JSON file of results/."""
    return json.loads((RESULTS / name).read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure(value: float) -> str:
    """Three digits at least, and no power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def likelihood_table() -> str:
    """The published figures, and below each of them ours where we have them."""
    runs = []
    for reference in read("reference.json")["rows"]:
        runs.append(Scored("reference", reference))
        ours = f"{reference['preset']}/metrics.json"
        if (RESULTS / ours).exists():
            runs.append(Scored("ours", Scored.read(RESULTS / ours).figures))
    # The best of a data set would be the deepest ladder: it says nothing of the two.
    names = ("data", "layers", "run", "bounds", "minutes", "seed", "origin")
    table = comparison.columns(runs, names)
    return comparison.markdown([replace(column, best=frozenset()) for column in table])


def learning_table() -> str:
    """The same small network after the same number of steps, here and in the reference."""
    rows = []
    for steps, reference in read("reference.json")["small_static_mnist"].items():
        some = reference.get("elbo_of_the_images_with_bounds")
        row = [f"{int(steps):,}", "reference", f"{reference['elbo']:.2f}", f"{some or ''}"]
        rows.append([*row, f"{reference['iw']['100']:.2f}", ""])
        for folder in sorted((RESULTS / "small-static-mnist").glob(f"seed-*-step-{steps}")):
            seed = folder.name.split("-")[1]
            rows.append([f"{int(steps):,}", f"ours, seed {seed}", *_learned(folder.name)])
    label = "the reference's weights, scored here"
    rows.append(["2,000", label, *_learned("reference-weights")])
    images = ["ELBO, 10,000 images", "ELBO, 1,000 images", "100 samples, 1,000 images"]
    return markdown(["steps", "run", *images, "obtained on"], rows)


def _learned(folder: str) -> list[str]:
    """One run's cells: its ELBO, and the bounds of a random subset of the images."""
    whole = read(f"small-static-mnist/{folder}/elbo.json")
    some = read(f"small-static-mnist/{folder}/bound.json")
    bounds = [_with_error(whole, "elbo"), _with_error(some, "elbo"), _with_error(some, "100")]
    return [*bounds, comparison.origin(whole)]


def _with_error(metrics: dict[str, Any], key: str) -> str:
    value = metrics["elbo"] if key == "elbo" else metrics["iw"][key]
    return f"{value:.2f} ± {metrics['standard_error'][key]:.2f}"


def demo_table() -> str:
    """What `make demo` prints."""
    return _bounds_table(read("demo/metrics.json"))


def hour_table() -> str:
    """The bounds of a small ladder after an hour."""
    return _bounds_table(read("hour/metrics.json"))


def _bounds_table(metrics: dict[str, Any]) -> str:
    """One run's bounds, whether they can be trusted, and where they come from."""
    rows = [["ELBO", _with_error(metrics, "elbo"), f"{metrics['bits_per_dim']['elbo']:.3f}"]]
    for k in metrics["iw"]:
        bits = f"{metrics['bits_per_dim'][k]:.3f}"
        rows.append([f"{k} importance sample{'s' * (k != '1')}", _with_error(metrics, k), bits])
    images = f"{metrics['n_images']:,} test images"
    table = markdown([f"negative bound, {images}", "nats", "bits/dim"], rows)
    notes = [f"Obtained on {comparison.origin(metrics)}."]
    if warning := metrics.get("warning"):
        notes.insert(0, f"{warning[0].upper()}{warning[1:]}.")
    return "\n\n".join([table, *notes])


def presets_table() -> str:
    """The presets and how large their networks are; those of the same network are one row."""
    rows = []
    for name, options in PRESETS.items():
        if name.removesuffix("-fast") in ROWS and name not in ROWS:
            continue
        config = RunConfig.of(**options)
        with torch.device("meta"):
            pair = build_ladder(config.ladder, datasets.image_shape(config.dataset))
        row = [
            f"`{name}`",
            f"`{config.dataset}`",
            str(len(config.ladder.z_dims)),
            f"{config.free_bits}",
        ]
        rows.append([*row, f"{count_parameters(*pair):,}"])
    return markdown(["preset", "data", "layers", "free bits", "parameters"], rows)


def memory_table() -> str:
    """Peak memory, as benchmarks/memory.py measured it."""
    measured = read("benchmarks/memory.json")
    rows = []
    for preset, passes in measured["figures"].items():
        row = [f"`{preset}`"]
        for found in (passes["training"], passes["evaluation"]):
            note = " (extrapolated)" if found["extrapolated"] else ""
            row.append(f"{found['at_batch_size'] / 2**30:.1f} GiB{note}")
        rows.append(row)
    origin = measured["provenance"]
    table = markdown(["preset", "training step", "evaluation pass"], rows)
    return f"{table}\n\nMeasured on {origin['machine']}, commit {origin['commit']}."


KIND_TITLES = {
    "ours": "ours",
    "plain": "plain loop",
    "convolutions": "its convolutions alone",
    "whole": "whole network each time",
    "bottom_up": "its bottom-up pass",
}
OPTION_TITLES = {"channels_last": "channels last", "compile": "compiled"}


def line_title(name: str) -> str:
    """A line of a benchmark, such as `ours/bf16+channels_last`, in words."""
    if name == "plain":
        return "plain PyTorch"
    kind, _, options = name.partition("/")
    words = [OPTION_TITLES.get(option, option) for option in options.split("+")]
    return ", ".join([KIND_TITLES[kind], *words])


def training_table() -> str:
    """Time and memory of a training step, as benchmarks/training.py measured it."""
    cases = read("benchmarks/training.json")["cases"]
    rows = []
    for case in cases:
        lines = case["lines"]
        for name, found in lines.items():
            cells = [_figure(found[key]) for key in ("images_per_second", "ms_per_step")]
            cells += [_ratio(lines.get("plain"), found, "ms_per_step")]
            cells += [_ratio(found, lines.get(Line(*name.split("/")).floor), "ms_per_step")]
            rows.append([*_row_head(case, name), *cells, _peak(found)])
    header = ["preset", "batch", "step", "images/s", "ms"]
    header += ["times plain PyTorch's images/s", "times its convolutions' ms", "peak memory"]
    return f"{markdown(header, rows)}\n\nMeasured on {_origins(cases)}."


def evaluation_table() -> str:
    """Time and memory of the importance-weighted bound, as benchmarks/evaluation.py measured it."""
    cases = read("benchmarks/evaluation.json")["cases"]
    rows = []
    for case in cases:
        for name, found in case["lines"].items():
            apart = found.get("largest_difference_nats")
            cells = [_figure(found["ms_per_image_and_sample"])]
            cells += [_ratio(case["lines"].get("plain"), found, "ms_per_image_and_sample")]
            cells += ["" if apart is None else f"{apart:.1g}", _peak(found)]
            rows.append([*_row_head(case, name), *cells])
    header = ["preset", "batch", "bound", "ms per image and sample", "times as fast as plain"]
    header += ["nats apart", "peak memory"]
    return f"{markdown(header, rows)}\n\nMeasured on {_origins(cases)}."


def _row_head(case: dict[str, Any], line: str) -> list[str]:
    return [f"`{case['preset']}`", str(case["batch_size"]), line_title(line)]


def _ratio(over: dict[str, Any] | None, under: dict[str, Any] | None, key: str) -> str:
    """Of two lines' figures; empty where one of them was not measured."""
    return "" if over is None or under is None else f"{over[key] / under[key]:.2f}"


def _peak(found: dict[str, Any]) -> str:
    return f"{found['peak_bytes'] / 2**30:.1f} GiB" if "peak_bytes" in found else ""


def _origins(cases: list[dict[str, Any]]) -> str:
    origins = [case["provenance"] for case in cases]
    return "; ".join(dict.fromkeys(f"{o['machine']}, commit {o['commit']}" for o in origins))


def scaling_table() -> str:
    """Cost of a step against the ladder's size, as benchmarks/scaling.py measured it."""
    measured = read("benchmarks/scaling.json")
    rows = []
    for name, points in measured["series"].items():
        for point in points:
            slope = point["ms_per_gflop_more"]
            times = [_figure(point[key]) for key in ("ours_ms", "convolutions_ms")]
            row = [f"{point['value']} {name}", _figure(point["operations"] / 1e9), *times]
            rows.append(
                [
                    *row,
                    f"{point['ours_ms'] / point['convolutions_ms']:.2f}",
                    "" if slope is None else _figure(slope),
                ]
            )
    origin = measured["provenance"]
    header = [
        "",
        "GFLOP",
        "ms a step",
        "ms, convolutions alone",
        "ratio",
        "ms for a GFLOP more",
    ]
    base = ", ".join(f"{value} {name}" for name, value in measured["base"].items())
    note = f"All else as in {base}. Measured on {origin['machine']}, commit {origin['commit']}."
    return f"{markdown(header, rows)}\n\n{note}"


def fast_paths_table() -> str:
    """What fast paths learn, as benchmarks/learning.py measured it."""
    runs = read("benchmarks/learning.json")["runs"]
    rows = []
    for row in learning.summary(runs):
        of_options = runs[row["options"]].values()
        precision = [
            run["test"]["bf16_less_float32"]["negative_elbo"]["mean"] for run in of_options
        ]
        cells = [learning.shown(row[name]) for name in ("training", "test")]
        cells += [learning.shown(row.get("test_difference"), "+")]
        cells += [learning.shown(learning.mean_and_spread(precision), "+")]
        rows.append([line_title(f"ours/{row['options']}").removeprefix("ours, "), *cells])
    header = ["trained in", "training, last 500 steps", "test", "test, less plain float32"]
    header += ["test, scored in bf16 less in float32"]
    cases = [run for by_seed in runs.values() for run in by_seed.values()]
    return f"{markdown(header, rows)}\n\nObtained on {_origins(cases)}."


def durability_table() -> str:
    """What training survived in benchmarks/durability.py."""
    measured = read("durability.json")
    killed = {
        "SIGKILL": "SIGKILL at random moments, resumed each time",
        "SIGTERM": "SIGTERM at random moments, resumed each time",
        "SIGKILL_of_one_of_2": "SIGKILL of one of two processes that share each batch",
        "SIGTERM_of_one_of_2": "SIGTERM of one of two processes that share each batch",
    }
    rows = []
    for name, what in killed.items():
        if name in measured:
            found = measured[name]
            differences = ", ".join(found["differences"]) or "none"
            rows.append([what, f"{found['survived']}", f"differences in the end: {differences}"])
    damaged, full = measured["damaged_checkpoints"], measured["full_disk"]
    rows.append(["damaged checkpoints", str(damaged["of"]), f"{damaged['refused']} refused"])
    if full is not None:
        differences = ", ".join(full["differences"]) or "none"
        rows.append(["disk full in the middle", "1", f"differences in the end: {differences}"])
    cases = sum(measured["made_up_cases"].values())
    rows.append(["made-up input", f"{cases:,}", "taken or refused in one line, all of it"])
    origin = measured["provenance"]
    note = f"Obtained on {origin['machine']}, commit {origin['commit']}."
    return f"{markdown(['what', 'how often', 'outcome'], rows)}\n\n{note}"


def parallel_table() -> str:
    """Throughput by number of processes, as benchmarks/parallel.py measured it."""
    measured = read("benchmarks/parallel.json")
    rows = []
    for preset, found in measured["throughput"].items():
        one, two = (found["images_per_second"][n] for n in "12")
        apart = measured["batch_norm"][preset]
        row = [f"`{preset}`", str(found["batch_size"]), f"{one:,.0f}", f"{two:,.0f}"]
        row.append(f"{two / one:.2f}")
        rows.append([*row, *(f"{apart[n]['gradient']:.1%}" for n in ("2", "8"))])
    header = ["preset", "batch", "1 process, 2 threads", "2 processes, 1 thread each", "ratio"]
    header += [f"gradient apart, {n} parts" for n in (2, 8)]
    origin = measured["provenance"]
    steps = measured["repeats"] * measured["steps"]
    note = f"Medians of {steps} steps on {origin['machine']} in all, commit {origin['commit']}."
    return f"{markdown(header, rows)}\n\n{note}"


def communication_table() -> str:
    """What ranks exchange at each step beside what they compute, as counted."""
    measured = read("benchmarks/parallel.json")
    rates = measured["assumed"]["bytes_per_second"]
    speed = measured["assumed"]["multiply_adds_per_second"]
    rows = []
    for preset, found in measured["counted"].items():
        size = found["gradient_bytes"]
        work = found["forward_multiply_adds"] + found["backward_multiply_adds"]
        row = [f"`{preset}`", f"{size / 1e6:.1f} MB", f"{2 * 7 / 8 * size / 1e6:.1f} MB"]
        row.append(f"{work / 1e9:.2f} G")
        # Images whose computation takes as long as the exchange among many: 2 (N - 1) / N -> 2.
        even = [2 * size / rate / (work / speed) for rate in rates.values()]
        rows.append(
            [*row, *(f"{images:.2g}" if images < 10 else f"{images:.0f}" for images in even)]
        )
    header = ["preset", "gradients", "sent by each of 8", "multiply-adds of an image"]
    note = f"Counted by commit {measured['provenance']['commit']}."
    header += [f"even at, {name}" for name in rates]
    return f"{markdown(header, rows)}\n\n{note}"


def pretrained_table() -> str:
    """How to check the figures of the weights in pretrained/; nothing where there are none."""
    names = [path.stem for path in sorted(PRETRAINED.glob("*.safetensors"))]
    if not names:
        return ""
    rows, commands = [], []
    for name in names:
        figures = read(f"{name}/metrics.json")
        bounds = [_with_error(figures, key) for key in ("elbo", *figures["iw"])]
        rows.append([f"[{name}](pretrained/{name}.safetensors)", *bounds])
        run = f"runs/{name}-pretrained"
        commands += [
            f"python published.py import pretrained/{name}.safetensors --out {run}",
            f"python evaluate.py {run} --samples {' '.join(figures['iw'])}",
        ]
    samples = [f"{int(k):,} sample{'s' * (k != '1')}" for k in figures["iw"]]
    shown = markdown(["weights", "ELBO", *samples], rows)
    text = "Their figures can be checked on a processor, to within the noise of the samples:"
    return "\n".join([shown, "", text, "", "```sh", *commands, "```"])


TABLES: dict[str, Callable[[], str]] = {
    "durability": durability_table,
    "parallel": parallel_table,
    "communication": communication_table,
    "presets": presets_table,
    "likelihood": likelihood_table,
    "pretrained": pretrained_table,
    "learning": learning_table,
    "memory": memory_table,
    "training": training_table,
    "evaluation": evaluation_table,
    "scaling": scaling_table,
    "fast_paths": fast_paths_table,
    "demo": demo_table,
    "hour": hour_table,
}


def written(text: str) -> str:
    """README.md's `text` with its tables as results/ has them."""

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(written(README.read_text()))
