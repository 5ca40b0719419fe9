"""The images of an evaluation whose importance-weighted bound has not converged."""

from pathlib import Path

import numpy as np

from ladder_vae.evaluation.metrics import Metrics
from ladder_vae.reports.tables import Column
from runtime.files import exists, reading

# The number of images in the table; per_image.npz holds all of them.
_SHOWN = 20


def unconverged_table(folder: Path, metrics: Metrics) -> tuple[str, list[Column]]:
    """A sentence about these images, and a table of the worst ones; empty without any.

    An image has not converged if its Pareto k-hat is above the threshold for the number of samples.
    Reads per_image.npz in the evaluation's folder.
    """
    file, threshold = folder / "per_image.npz", metrics.pareto_k.get("threshold")
    if threshold is None or not exists(file):
        return "", []
    with reading(file), np.load(file, allow_pickle=False) as arrays:
        found = dict(arrays)
    k_hat = found["pareto_k"]
    order = np.argsort(-k_hat, kind="stable")  # nan last
    worst = order[k_hat[order] > threshold]
    if not len(worst):
        return "", []
    samples = int(found["samples"][-1])
    columns = {
        "ELBO": -found["elbo"],
        f"{samples:,} samples": -found["bound"][:, -1],
        "Pareto-smoothed": -found["pareto_smoothed"] if "pareto_smoothed" in found else None,
        "annealed": -found["annealed"] if "annealed" in found else None,
        "k-hat": k_hat,
        "effective samples": found["effective_samples"],
    }
    shown = worst[:_SHOWN]
    sentence = (
        f"For {len(worst):,} of {len(k_hat):,} images the bound with {samples:,} samples has not "
        f"converged: Pareto k-hat is above {threshold:.2g}."
    )
    if len(worst) > len(shown):
        sentence += f" The {len(shown)} worst of them; per_image.npz holds all images."
    return sentence, [
        Column("image", [str(number) for number in found["image"][shown]]),
        *(
            Column(header, [f"{value:.2f}" for value in values[shown]])
            for header, values in columns.items()
            if values is not None
        ),
    ]
