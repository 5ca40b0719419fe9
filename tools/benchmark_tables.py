"""Markdown tables of the benchmarks' measurements.

Each table's function takes the content of files that a benchmark wrote to results/.
"""

import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ladder_vae.reports.tables import markdown_rows

Results = dict[str, Any]

LINE_TITLES = {
    "ours": "this project",
    "plain": "plain loop",
    "convolutions": "convolutions only",
    "whole": "whole network per sample",
    "bottom_up": "bottom-up pass only",
    "channels_last": "channels last",
    "compile": "compiled",
    "graph": "CUDA graph",
}
INTERRUPTIONS = {
    "SIGKILL": "SIGKILL at a random time, then resumed",
    "SIGTERM": "SIGTERM at a random time, then resumed",
    "SIGKILL_of_one_of_2": "SIGKILL of one of two processes, then resumed",
    "SIGTERM_of_one_of_2": "SIGTERM of one of two processes, then resumed",
}


# --- Formatting ---


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns of numbers are aligned to the right."""
    cell = re.compile(r"[-+±>\d., ]*(%| GiB| MB| G)?")
    numbers = [i for i in range(len(header)) if all(cell.fullmatch(row[i]) for row in rows)]
    return markdown_rows(header, rows, numbers)


def measured_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    cases: Iterable[Results],
    note: str = "",
) -> str:
    """A table of measurements, and where its `cases` were measured."""
    return f"{markdown(header, rows)}\n\n{note}Measured on {places(cases)}."


def number(value: float) -> str:
    """A number with three significant digits, or as an integer from 100 on; no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def gibibytes(size: float | None) -> str:
    return "" if size is None else f"{size / 2**30:.1f} GiB"


def mean_and_spread(values: Sequence[float], sign: str = "") -> str:
    """Mean ± standard deviation over the seeds."""
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def ratio(numerator: Results | None, denominator: Results | None, key: str) -> str:
    """The ratio of two measurements, empty if one of them is missing."""
    if numerator is None or denominator is None:
        return ""
    return f"{numerator[key] / denominator[key]:.2f}"


def places(measured: Iterable[Results]) -> str:
    """The machines and commits of some measurements."""
    origins = [one["provenance"] for one in measured]
    return "; ".join(dict.fromkeys(f"{o['machine']}, commit {o['commit']}" for o in origins))


# --- Tables ---


def durability_table(measured: Results) -> str:
    """The results of benchmarks/durability.py."""
    rows = [
        [title, str(measured[name]["survived"]), _outcome(measured[name])]
        for name, title in INTERRUPTIONS.items()
        if name in measured
    ]
    damaged, full = measured["damaged_checkpoints"], measured["full_disk"]
    rows.append(["damaged checkpoint", str(damaged["of"]), f"{damaged['refused']} rejected"])
    if full is not None:
        rows.append(["disk full during training", "1", _outcome(full)])
    cases = sum(measured["made_up_cases"].values())
    outcome = "accepted, or rejected with a one-line error"
    rows.append(["random options, files and images", f"{cases:,}", outcome])
    return measured_table(["event", "times", "outcome"], rows, [measured])


def _outcome(found: Results) -> str:
    differences = ", ".join(found["differences"])
    return f"differs in: {differences}" if differences else "same result, bit for bit"


def recipes_table(runs: Sequence[Results]) -> str:
    """Recipes for a short time budget, which benchmarks/recipes.py compared on a small ladder."""
    found = sorted(_family(runs, "small"), key=lambda run: run["iw"]["100"])
    rows = []
    for run in found:
        last = run["elbo_of_last_weights"]
        row = [f"`{run['recipe']}`", _recipe_options(run), str(run["seed"]), f"{run['steps']:,}"]
        row.append(f"{run['elbo']:.2f} ± {run['elbo_standard_error']:.2f}")
        row.append("" if last is None else f"{last:.2f}")
        row.append(f"{run['iw']['100']:.2f} ± {run['iw_standard_error']['100']:.2f}")
        rows.append([*row, f"{run['skipped_updates']:.0f}"])
    header = ["recipe", "options", "seed", "steps", "ELBO", "ELBO of the last weights"]
    return measured_table([*header, "100 samples", "skipped updates"], rows, found)


def deep_recipes_table(runs: Sequence[Results]) -> str:
    """Learning rates of a deep ladder in its first steps."""
    found = _family(runs, "deep")
    rows = []
    for run in found:
        row = [f"`{run['recipe']}`", _recipe_options(run), f"{run['steps']:,}"]
        row += [f"{run['training_elbo']:.1f}", f"{run['gradient_norm']:.0f}"]
        rows.append([*row, f"{run['skipped_updates']:.0f}"])
    header = ["recipe", "options", "steps", "training ELBO", "gradient norm", "skipped updates"]
    return measured_table(header, rows, found)


def laptop_recipes_table(runs: Sequence[Results]) -> str:
    """Changes of the preset `mnist-laptop`, trained on the training images."""
    found = sorted(_family(runs, "laptop"), key=lambda run: run["iw"]["100"])
    rows = []
    for run in found:
        row = [f"`{run['recipe']}`", _recipe_options(run), str(run["seed"])]
        row += [f"{run['minutes']:.0f}", f"{run['steps'] * run['batch_size']:,}"]
        row += [f"{run['elbo_of_training_images']:.2f}", f"{run['elbo']:.2f}"]
        row.append(f"{run['iw']['100']:.2f}")
        rows.append([*row, ", ".join(f"{kl:.1f}" for kl in run["kl_per_layer"])])
    header = ["recipe", "options", "seed", "minutes", "images", "ELBO, training images", "ELBO"]
    return measured_table([*header, "100 samples", "KL, from the bottom"], rows, found)


def _family(runs: Sequence[Results], name: str) -> list[Results]:
    return [run for run in runs if run["family"] == name]


def _recipe_options(run: Results) -> str:
    """The options in which recipes of a family differ."""
    return f"`{' '.join(run['options'])}`" if run["options"] else "defaults"


def time_to_quality_table(measured: Results) -> str:
    """Minutes to each ELBO, as benchmarks/time_to_quality.py measured them."""
    rows = []
    for way in measured["ways"].values():
        minutes = [f"> {measured['limit']:g}" if m is None else number(m) for m in way["minutes"]]
        rows.append([way["says"], number(way["images_per_second"]), *minutes])
    header = ["network and recipe", "images/s", *(f"{mark:g} nats" for mark in measured["marks"])]
    note = f"Trained on {places(measured['ways'].values())}. "
    return measured_table(header, rows, [measured], note)


def annealing_table(measured: Results) -> str:
    """Both bounds in about equal time, as benchmarks/annealing.py measured them."""
    rows = []
    for run in measured["rows"]:
        row = [f"{run['samples']:,}", f"{-run['importance_weighted']:.2f}"]
        row.append(number(run["importance_seconds_per_image"]))
        row += [f"{run['temperatures']:,}", f"{-run['annealed']:.2f}"]
        row.append(number(run["annealed_seconds_per_image"]))
        rows.append([*row, f"{run['gain']:.2f} ± {run['standard_error']:.2f}"])
    header = ["samples", "importance-weighted", "seconds", "temperatures", "annealed", "seconds"]
    note = (
        f"{measured['images']:,} random test images; negative bounds in nats, seconds per image, "
        f"{measured['chains']} chains per image. "
    )
    return measured_table([*header, "gain"], rows, [measured], note)


def memory_table(measured: Results) -> str:
    """Peak memory, as benchmarks/memory.py measured it."""
    rows = []
    for preset, passes in measured["figures"].items():
        cells = []
        for found in (passes["training"], passes["evaluation"]):
            note = " (extrapolated)" if found["extrapolated"] else ""
            cells.append(gibibytes(found["at_batch_size"]) + note)
        rows.append([f"`{preset}`", *cells])
    return measured_table(["preset", "training step", "evaluation pass"], rows, [measured])


def training_table(cases: Sequence[Results]) -> str:
    """Time and memory of a training step, as benchmarks/training.py measured it."""
    rows = []
    for lines, name, found, head in _benchmark_lines(cases):
        # Convolutions are timed without compilation and without a CUDA graph.
        options = re.sub(r"(\+compile|\+graph)*$", "", name.partition("/")[2]) or "float32"
        row = [*head, *(number(found[key]) for key in ("images_per_second", "ms_per_step"))]
        row.append(ratio(lines.get("plain"), found, "ms_per_step"))
        row.append(ratio(found, lines.get(f"convolutions/{options}"), "ms_per_step"))
        rows.append([*row, gibibytes(found.get("peak_bytes"))])
    header = ["preset", "batch", "step", "images/s", "ms per step", "speed, plain PyTorch = 1"]
    return measured_table([*header, "time, convolutions = 1", "peak memory"], rows, cases)


def evaluation_table(cases: Sequence[Results]) -> str:
    """Time and memory of the importance-weighted bound, as benchmarks/evaluation.py measured it."""
    rows = []
    for lines, _, found, head in _benchmark_lines(cases):
        difference = found.get("largest_difference_nats")
        row = [*head, number(found["ms_per_image_and_sample"])]
        row.append(ratio(lines.get("plain"), found, "ms_per_image_and_sample"))
        row.append("" if difference is None else f"{difference:.1g}")
        rows.append([*row, gibibytes(found.get("peak_bytes"))])
    header = ["preset", "batch", "method", "ms per image and sample", "speed, plain PyTorch = 1"]
    return measured_table([*header, "largest difference, nats", "peak memory"], rows, cases)


def _benchmark_lines(
    cases: Iterable[Results],
) -> Iterator[tuple[Results, str, Results, list[str]]]:
    """For each line of each case: the case's lines, the line's name, results and first cells."""
    for case in cases:
        for name, found in case["lines"].items():
            head = [f"`{case['preset']}`", str(case["batch_size"]), line_title(name)]
            yield case["lines"], name, found, head


def line_title(name: str) -> str:
    """A benchmark line such as `ours/bf16+channels_last`, in words."""
    if name == "plain":
        return "plain PyTorch"
    return ", ".join(LINE_TITLES.get(word, word) for word in re.split(r"[/+]", name))


def scaling_table(measured: Results) -> str:
    """Cost of a step against the ladder's size, as benchmarks/scaling.py measured it."""
    rows = []
    for name, points in measured["series"].items():
        for point in points:
            slope = point["ms_per_gflop_more"]
            row = [f"{point['value']} {name}", number(point["operations"] / 1e9)]
            row += [number(point["ours_ms"]), number(point["convolutions_ms"])]
            row.append(f"{point['ours_ms'] / point['convolutions_ms']:.2f}")
            rows.append([*row, "" if slope is None else number(slope)])
    header = ["size", "GFLOP per step", "ms per step", "ms, convolutions only", "ratio"]
    base = ", ".join(f"{value} {name}" for name, value in measured["base"].items())
    note = f"All other sizes: {base}. "
    return measured_table([*header, "ms per additional GFLOP"], rows, [measured], note)


def fast_paths_table(runs: dict[str, dict[str, Results]]) -> str:
    """What each precision learns, as benchmarks/learning.py measured it."""
    plain = {seed: _test_elbo(run) for seed, run in runs["float32"].items()}
    rows = []
    for options, by_seed in runs.items():
        row = [line_title(options), mean_and_spread([_final_loss(run) for run in by_seed.values()])]
        row.append(mean_and_spread([_test_elbo(run) for run in by_seed.values()]))
        apart = [_test_elbo(run) - plain[seed] for seed, run in by_seed.items() if seed in plain]
        row.append("" if options == "float32" else mean_and_spread(apart, "+"))
        tests = [run["test"]["bf16_less_float32"]["negative_elbo"] for run in by_seed.values()]
        rows.append([*row, mean_and_spread([test["mean"] for test in tests], "+")])
    header = ["trained in", "training, last 500 steps", "test", "test, minus float32's"]
    header.append("test, evaluated in bf16 minus in float32")
    cases = [run for by_seed in runs.values() for run in by_seed.values()]
    return measured_table(header, rows, cases)


def _test_elbo(run: Results) -> float:
    return run["test"]["by_precision"]["float32"]["negative_elbo"]["mean"]


def _final_loss(run: Results) -> float:
    """The training's negative ELBO, mean over the last 500 steps."""
    points = zip(run["curve"]["step"], run["curve"]["negative_elbo"], strict=True)
    return statistics.fmean(value for step, value in points if step > run["steps"] - 500)


def parallel_table(measured: Results) -> str:
    """Throughput by number of processes, as benchmarks/parallel.py measured it."""
    rows = []
    for preset, found in measured["throughput"].items():
        one, two = (found["images_per_second"][n] for n in "12")
        apart = measured["batch_norm"][preset]
        row = [f"`{preset}`", str(found["batch_size"]), f"{one:,.0f}", f"{two:,.0f}"]
        differences = [f"{apart[n]['gradient']:.1%}" for n in ("2", "8")]
        rows.append([*row, f"{two / one:.2f}", *differences])
    header = ["preset", "batch", "images/s, 1 process", "images/s, 2 processes", "ratio"]
    header += [f"gradient difference, {n} parts" for n in (2, 8)]
    note = f"Medians of {measured['repeats'] * measured['steps']} steps. "
    return measured_table(header, rows, [measured], note)


def communication_table(measured: Results) -> str:
    """The bytes that processes exchange at each step, and the operations that they compute."""
    rates = measured["assumed"]["bytes_per_second"]
    speed = measured["assumed"]["multiply_adds_per_second"]
    rows = []
    for preset, found in measured["counted"].items():
        size = found["gradient_bytes"]
        work = found["forward_multiply_adds"] + found["backward_multiply_adds"]
        row = [f"`{preset}`", f"{size / 1e6:.1f} MB", f"{2 * 7 / 8 * size / 1e6:.1f} MB"]
        # With many GPUs each sends 2 (N - 1) / N -> 2 times the gradients.
        even = [2 * size / rate / (work / speed) for rate in rates.values()]
        images = [f"{n:.2g}" if n < 10 else f"{n:,.0f}" for n in even]
        rows.append([*row, f"{work / 1e9:.2f} G", *images])
    header = ["preset", "gradients", "sent by each of 8 GPUs", "multiply-adds per image"]
    header += [f"break-even, {name}" for name in rates]
    return f"{markdown(header, rows)}\n\nCounted by commit {measured['provenance']['commit']}."
