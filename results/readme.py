"""Write the tables of README.md from the figures in results/.

    python -m results.readme          rewrites the tables in place
    python -m results.readme --check  exits with 1 where README.md is not what it would write

A table stands between `<!-- table NAME -->` and `<!-- end -->`. Figures come from metrics.json
files that evaluate.py wrote, and from reference.json, which holds the published ones.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import datasets
from config import PRESETS, Config
from guide import build_ladder
from networks import count_parameters

RESULTS = Path(__file__).parent
README = RESULTS.parent / "README.md"


def read(name: str) -> dict[str, Any]:
    """A JSON file of results/."""
    return json.loads((RESULTS / name).read_text())


def read_if_there(name: str) -> dict[str, Any]:
    """A JSON file of results/, or an empty object."""
    return read(name) if (RESULTS / name).exists() else {}


def figure(metrics: dict[str, Any], key: str) -> str:
    """One bound of a metrics.json, with bits per dimension for colour; empty where missing."""
    value = metrics.get("elbo") if key == "elbo" else metrics.get("iw", {}).get(key)
    if value is None:
        return ""
    bits = metrics.get("bits_per_dim", {}).get(key)
    if value > 1000 and bits is not None:
        return f"{value:.0f} ({bits:.2f})"
    return f"{value:.2f}"


def source(metrics: dict[str, Any]) -> str:
    """Where a metrics.json comes from, in a few words."""
    if not metrics:
        return ""
    scored, trained = metrics["provenance"], metrics["trained"]
    if trained.get("commit") in (None, scored["commit"]):
        return f"{scored['machine']}, commit {scored['commit']}"
    return (
        f"{trained['machine']}, commit {trained['commit']}; "
        f"scored on {scored['machine']}, commit {scored['commit']}"
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def likelihood_table() -> str:
    """The reference's table beside ours."""
    bounds = {"elbo": "ELBO", "100": "100 samples", "1000": "1000 samples"}
    header = ["data", "layers"]
    header += [f"{who}: {name}" for name in bounds.values() for who in ("reference", "ours")]
    rows = []
    for reference in read("reference.json")["rows"]:
        ours = read_if_there(f"{reference['preset']}/metrics.json")
        row = [reference["data"], str(reference["layers"])]
        row += [figure(m, key) for key in bounds for m in (reference, ours)]
        rows.append([*row, source(ours)])
    return markdown([*header, "ours obtained on"], rows)


def learning_table() -> str:
    """The same small network after the same number of steps, here and in the reference."""
    rows = []
    for steps, reference in read("reference.json")["small_static_mnist"].items():
        rows.append([f"{int(steps):,}", "reference", figure(reference, "elbo"), _iw(reference), ""])
        for file in sorted((RESULTS / "small-static-mnist").glob(f"seed-*-step-{steps}")):
            ours = read(f"small-static-mnist/{file.name}/elbo.json")
            bound = read(f"small-static-mnist/{file.name}/bound.json")
            seed = file.name.split("-")[1]
            rows.append(
                [f"{int(steps):,}", f"ours, seed {seed}", _elbo(ours), _iw(bound), source(ours)]
            )
    imported = read("small-static-mnist/reference-weights/elbo.json")
    bound = read("small-static-mnist/reference-weights/bound.json")
    label = "reference's weights, scored here"
    rows.append(["2,000", label, _elbo(imported), _iw(bound), source(imported)])
    header = ["steps", "run", "ELBO, 10,000 images", "100 samples, 1,000 images", "obtained on"]
    return markdown(header, rows)


def _elbo(metrics: dict[str, Any]) -> str:
    return f"{metrics['elbo']:.2f} ± {metrics['standard_error']['elbo']:.2f}"


def _iw(metrics: dict[str, Any]) -> str:
    error = metrics.get("standard_error")
    return figure(metrics, "100") + (f" ± {error['100']:.2f}" if error else "")


def demo_table() -> str:
    """What `make demo` prints."""
    metrics = read("demo/metrics.json")
    rows = [["ELBO", _elbo(metrics), f"{metrics['bits_per_dim']['elbo']:.3f}"]]
    for k, value in metrics["iw"].items():
        error = metrics["standard_error"][k]
        bits = metrics["bits_per_dim"][k]
        rows.append([f"{k} importance samples", f"{value:.2f} ± {error:.2f}", f"{bits:.3f}"])
    table = markdown(["negative bound, test images", "nats", "bits/dim"], rows)
    return f"{table}\n\nObtained on {source(metrics)}."


def presets_table() -> str:
    """The presets and how large their networks are."""
    rows = []
    for name, options in PRESETS.items():
        config = Config(**options)
        with torch.device("meta"):
            pair = build_ladder(config, datasets.image_shape(config.dataset))
        row = [f"`{name}`", f"`{config.dataset}`", str(len(config.z_dims)), f"{config.free_bits}"]
        rows.append([*row, f"{count_parameters(*pair):,}"])
    return markdown(["preset", "data", "layers", "free bits", "parameters"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "presets": presets_table,
    "likelihood": likelihood_table,
    "learning": learning_table,
    "demo": demo_table,
}


def written(text: str) -> str:
    """README.md's `text` with its tables as results/ has them."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end -->)", replace, text, flags=re.DOTALL)


def main() -> int:
    text = README.read_text()
    new = written(text)
    if "--check" in sys.argv[1:]:
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
