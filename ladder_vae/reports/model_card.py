"""The model card of a published ladder: README.md, as the Hugging Face hub reads it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ladder_vae.evaluation.folders import evaluation_folders
from ladder_vae.evaluation.metrics import Metrics
from ladder_vae.reports.tables import bounds_table, layer_name, markdown, markdown_rows
from ladder_vae.runs.run import Run

_LIKELIHOODS = {
    "bernoulli": "independent Bernoulli pixels",
    "gaussian": "independent Normal pixels (a density)",
    "discr_log": "independent discretized logistic pixels of 256 levels",
    "discr_log_mix": "PixelCNN++'s mixture of discretized logistics",
}
_OPTIMIZERS = {"adamax": "Adamax", "muon": "Muon and Adamax"}


def model_card(run: Run, description: Mapping[str, Any], parameters: int, license: str) -> str:
    """The card of the weights that `description` describes; see `published.published_weights`.

    Its bounds are those of the run's most general evaluation of these weights, if there is one.
    Raises `UserError` if that is damaged.
    """
    metrics = _evaluation(run, description)
    dataset = Path(run.config.dataset).name
    sections = [
        _front_matter(dataset, license, metrics),
        f"# Ladder VAE on {dataset}",
        "A ladder variational autoencoder (Sønderby et al., 2016) in Pyro. It samples images, "
        "encodes images into a hierarchy of latents, and bounds their log-likelihood.",
        "## Load it",
        _USE,
        "## Data",
        _data(run, dataset),
        "## Architecture",
        _architecture(run, parameters),
        "## Training",
        _training(run, description),
        "## Metrics",
        _bounds(metrics),
        "## Provenance",
        _provenance(run, description, metrics),
        "## Licence",
        f"The weights are published under the licence `{license}`.",
    ]
    return "\n\n".join(sections) + "\n"


_USE = """\
With the project's code in the current folder or in `PYTHONPATH`:

```python
from ladder import Ladder

ladder = Ladder.load("PATH/TO/THIS/FOLDER")  # or Ladder.from_pretrained("OWNER/NAME")
images = ladder.sample(64)  # (64, C, H, W) in [0, 1]
```

`python evaluate.py PATH/TO/THIS/FOLDER` computes the bounds again."""


def _evaluation(run: Run, description: Mapping[str, Any]) -> Metrics | None:
    """The metrics of the last of `evaluation_folders` with the same weights."""
    for folder in reversed(evaluation_folders(run.path)):
        metrics = Metrics.read(folder / "metrics.json")
        if (metrics.step, metrics.weights) == (description["step"], description["weights"]):
            return metrics
    return None


def _front_matter(dataset: str, license: str, metrics: Metrics | None) -> str:
    """The card's metadata in YAML; strings are quoted as in JSON, which YAML includes."""
    lines = [
        "library_name: ladder-vae-pyro",
        "pipeline_tag: unconditional-image-generation",
        f"license: {json.dumps(license)}",
        *("tags:", "- pyro", "- pytorch", "- ladder-vae", "- variational-autoencoder"),
        *("datasets:", f"- {json.dumps(dataset)}"),
    ]
    if metrics is not None:
        names = ["negative_elbo", *(f"negative_bound_{k}_samples" for k in metrics.iw)]
        lines += ["metrics:", *(f"- {name}" for name in names)]
    return "\n".join(["---", *lines, "---"])


def _data(run: Run, dataset: str) -> str:
    channels, height, width = run.image_shape
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels}-channel")
    return (
        f"`{dataset}`, {colours} images, {height} high and {width} wide, with pixels in [0, 1]. "
        f"Trained on the split `{run.config.train_split}`."
    )


def _architecture(run: Run, parameters: int) -> str:
    ladder = run.config.ladder
    sizes = ladder.latent_sizes((run.image_shape[1], run.image_shape[2]))
    depth = len(sizes)
    rows = [
        [layer_name(i + 1, depth), f"{ladder.z_dims[i]} x {sizes[i][0]} x {sizes[i][1]}"]
        for i in range(depth - 1, -1, -1)
    ]
    return (
        f"{depth} stochastic layers, {parameters:,} parameters; p(x | z): "
        f"{_LIKELIHOODS[ladder.likelihood]}. `config.json` lists all options.\n\n"
        + markdown_rows(["layer", "latents"], rows)
    )


def _training(run: Run, description: Mapping[str, Any]) -> str:
    config, minutes = run.config, description["minutes"]
    kind = {"average": "the moving average of the weights", "last": "the last weights"}
    words = [
        f"{description['step']:,} steps of {config.batch_size} images by "
        f"{_OPTIMIZERS[config.optimizer]}, learning rate {config.lr:g}, free bits "
        f"{config.free_bits:g} nats per layer, random seed {config.seed}"
    ]
    if minutes is not None:
        words.append(f"{minutes:,.1f} minutes")
    return f"{'; '.join(words)}. Published are {kind[description['weights']]}."


def _bounds(metrics: Metrics | None) -> str:
    if metrics is None:
        return "These weights have not been evaluated."
    limit = "" if metrics.limit is None else " (a random subset)"
    warning = "" if metrics.warning is None else f"\n\nWarning: {metrics.warning}."
    return (
        "Negative bounds on the log-likelihood with their standard errors over "
        f"{metrics.n_images:,} {metrics.split} images{limit} of {metrics.dataset}; lower is "
        f"better.\n\n{markdown(bounds_table(metrics))}{warning}"
    )


def _provenance(run: Run, description: Mapping[str, Any], metrics: Metrics | None) -> str:
    origins = {"trained": run.provenance}
    if metrics is not None:
        origins["evaluated"] = metrics.provenance
    lines = [
        f"- {title}: " + ", ".join(f"{name} {value}" for name, value in origin.items())
        for title, origin in origins.items()
    ]
    return "\n".join([*lines, f"- SHA-256 of the weights: `{description['sha256']}`"])
