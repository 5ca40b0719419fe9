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

import comparison
import datasets
from comparison import Scored
from config import PRESETS, ROWS, Config
from guide import build_ladder
from networks import count_parameters

RESULTS = Path(__file__).parent
README = RESULTS.parent / "README.md"
PRETRAINED = RESULTS.parent / "pretrained"


def read(name: str) -> dict[str, Any]:
    """A JSON file of results/."""
    return json.loads((RESULTS / name).read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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
    """One run's bounds, and where they come from."""
    rows = [["ELBO", _with_error(metrics, "elbo"), f"{metrics['bits_per_dim']['elbo']:.3f}"]]
    for k in metrics["iw"]:
        bits = f"{metrics['bits_per_dim'][k]:.3f}"
        rows.append([f"{k} importance sample{'s' * (k != '1')}", _with_error(metrics, k), bits])
    images = f"{metrics['n_images']:,} test images"
    table = markdown([f"negative bound, {images}", "nats", "bits/dim"], rows)
    return f"{table}\n\nObtained on {comparison.origin(metrics)}."


def presets_table() -> str:
    """The presets and how large their networks are; those of the same network are one row."""
    rows = []
    for name, options in PRESETS.items():
        if name.removesuffix("-fast") in ROWS and name not in ROWS:
            continue
        config = Config(**options)
        with torch.device("meta"):
            pair = build_ladder(config, datasets.image_shape(config.dataset))
        row = [f"`{name}`", f"`{config.dataset}`", str(len(config.z_dims)), f"{config.free_bits}"]
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


def evaluation_table() -> str:
    """Time and memory of the importance-weighted bound, as benchmarks/evaluation.py measured it."""
    measured = read("benchmarks/evaluation.json")
    rows = []
    for preset, batches in measured["figures"].items():
        for found in batches:
            times = found["median_ms_per_image_and_sample"]
            gain = times["straightforward"] / times["ours"]
            row = [f"`{preset}`", str(found["batch_size"]), f"{times['ours']:.3g} ms"]
            row += [f"{times['straightforward']:.3g} ms", f"{gain:.2f}"]
            rows.append([*row, f"{found['peak_bytes']['ours'] / 2**30:.1f} GiB"])
    origin = measured["provenance"]
    header = ["preset", "batch", "ours", "whole network each time", "gain", "peak memory"]
    note = f"Measured on {origin['machine']}, commit {origin['commit']}."
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
    "presets": presets_table,
    "likelihood": likelihood_table,
    "pretrained": pretrained_table,
    "learning": learning_table,
    "memory": memory_table,
    "evaluation": evaluation_table,
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
