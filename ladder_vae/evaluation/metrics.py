"""What a scoring found, in figures for a file, for a table and for the eye."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ladder_vae.evaluation.importance import Bounds
from ladder_vae.evaluation.pareto import UNRELIABLE
from runtime.files import write_atomically

# Where more of the images than this have unreliable weights, a bound is said not to be trusted.
_TOLERATED = 0.05


def curve_samples(samples: Sequence[int]) -> list[int]:
    """The K at which the bound is drawn: `samples` and all powers of two below the last."""
    powers = {2**i for i in range(samples[-1].bit_length()) if 2**i < samples[-1]}
    return sorted(powers | set(samples))


def metrics(bounds: Bounds, samples: Sequence[int], image_shape: Sequence[int]) -> dict[str, Any]:
    """Negative bounds, positive as in the literature's tables, in nats; with their standard errors.

    `elbo` is the mean over all samples; `iw`, by number of samples, the importance-weighted bound;
    `curve` the same at every K that was computed. `effective_samples` and `pareto_k` are of the
    importance weights of all samples, over the images.
    """
    per_image = {"elbo": -bounds.elbo}
    per_image |= {str(k): -bounds.importance_weighted[k] for k in samples}
    means = {name: values.mean().item() for name, values in per_image.items()}
    curve = [-bound for bound in bounds.importance_weighted.values()]
    effective = bounds.effective_samples
    return {
        "elbo": means["elbo"],
        "iw": {name: mean for name, mean in means.items() if name != "elbo"},
        "standard_error": {name: standard_error(values) for name, values in per_image.items()},
        "bits_per_dim": {name: bits_per_dim(mean, image_shape) for name, mean in means.items()},
        "reconstruction": -bounds.log_likelihood.mean().item(),
        "kl_per_layer": bounds.kl.mean(0).tolist(),
        "n_images": len(bounds.elbo),
        "effective_samples": {
            "mean": effective.mean().item(),
            "median": effective.median().item(),
            "min": effective.min().item(),
        },
        "pareto_k": _pareto(bounds.pareto_k),
        "warning": warning(bounds, samples[-1]),
        "curve": {
            "samples": list(bounds.importance_weighted),
            "nats": [values.mean().item() for values in curve],
            "standard_error": [standard_error(values) for values in curve],
        },
    }


def standard_error(values: Tensor) -> float | None:
    """Of the mean of `values` (N,); None for a single one."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def _pareto(k_hat: Tensor) -> dict[str, float] | None:
    if k_hat.isnan().all():
        return None
    share = (k_hat > UNRELIABLE).double().mean().item()
    return {"median": k_hat.median().item(), f"share_above_{UNRELIABLE}": share}


def warning(bounds: Bounds, samples: int) -> str | None:
    """A sentence where the bound is no estimate of the log-likelihood.

    None where it may be one, or where the samples are too few to tell.
    """
    bound = bounds.importance_weighted[samples]
    if infinite := int((~bound.isfinite()).sum()):
        return (
            f"the bound with {samples:,} samples is not finite for {infinite:,} of {len(bound):,} "
            "images: the model's weights may have diverged, use an earlier checkpoint"
        )
    if bounds.pareto_k.isnan().all():
        return None
    share = (bounds.pareto_k > UNRELIABLE).double().mean().item()
    if share <= _TOLERATED:
        return None
    return (
        f"the bound with {samples:,} samples is a lower bound, but not to be trusted as the "
        f"log-likelihood itself: for {share:.0%} of the images a few samples carry most of the "
        f"weight (Pareto k-hat above {UNRELIABLE}), and more samples would raise it"
    )


def table(results: dict[str, Any]) -> str:
    """The figures of `metrics`, for reading."""
    names = {"elbo": "ELBO"}
    names |= {k: f"{int(k):,} importance sample{'s' * (k != '1')}" for k in results["iw"]}
    values = {"elbo": results["elbo"]} | results["iw"]
    lines = [f"{'negative bound':<26}{'nats':>10}{'std. error':>12}{'bits/dim':>10}"]
    for key, name in names.items():
        error = results["standard_error"][key]
        shown = f"{error:.2f}" if error is not None else "-"
        lines.append(
            f"{name:<26}{values[key]:>10.2f}{shown:>12}{results['bits_per_dim'][key]:>10.3f}"
        )
    kl = "  ".join(f"{value:.2f}" for value in results["kl_per_layer"])
    lines.append(f"KL by layer, bottom to top: {kl} nats")
    lines.append(_weights(results))
    return "\n".join(lines)


def _weights(results: dict[str, Any]) -> str:
    """What the importance weights are like, on a line."""
    most = results["curve"]["samples"][-1]
    line = f"effective samples: {results['effective_samples']['median']:.1f} of {most:,} (median)"
    if results["pareto_k"] is not None:
        share = results["pareto_k"][f"share_above_{UNRELIABLE}"]
        line += f"; Pareto k-hat above {UNRELIABLE} for {share:.1%} of the images"
    return line


def write_per_image(path: Path, bounds: Bounds, index: Tensor) -> None:
    """Write per_image.npz: bounds in nats (not negated), by image.

    `image` (N,) is the number in the split; `elbo`, `log_likelihood`, `effective_samples` and
    `pareto_k` (nan for too few samples) are (N,); `bound` is (N, len(samples)), one column for each
    of `samples`; `kl` is (N, L), bottom to top.
    """
    arrays: dict[str, Any] = {
        "image": index.numpy(),
        "samples": np.array(list(bounds.importance_weighted)),
        "elbo": bounds.elbo.numpy(),
        "bound": np.stack([bound.numpy() for bound in bounds.importance_weighted.values()], 1),
        "log_likelihood": bounds.log_likelihood.numpy(),
        "kl": bounds.kl.numpy(),
        "effective_samples": bounds.effective_samples.numpy(),
        "pareto_k": bounds.pareto_k.numpy(),
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def bits_per_dim(nats: float, image_shape: Sequence[int]) -> float:
    """A log-likelihood of an image in bits per dimension: pixels times channels."""
    return nats / (math.prod(image_shape) * math.log(2))
