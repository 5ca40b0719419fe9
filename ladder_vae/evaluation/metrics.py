"""Summary metrics of an evaluation, as JSON and as per-image arrays."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ladder_vae.evaluation.annealed import Annealed, Annealing
from ladder_vae.evaluation.importance import Bounds
from ladder_vae.evaluation.pareto import reliable_below
from ladder_vae.networks.likelihoods import DENSITY, LIKELIHOODS
from runtime.errors import UserError
from runtime.files import read_json, write_atomically

# There is a warning if a larger share of the images has unreliable weights.
_TOLERATED = 0.05


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The content of a metrics.json; None stands for a value that is not finite or not known.

    Bounds are negative bounds on the log-likelihood in nats: lower is better. The keys of
    `standard_error` and `bits_per_dim` are "elbo" and the numbers of samples.
    """

    elbo: float | None
    iw: dict[str, float | None]
    standard_error: dict[str, float | None]
    bits_per_dim: dict[str, float | None]  # empty for a density
    kl_per_layer: list[float | None]  # bottom to top
    n_images: int
    dataset: str
    split: str
    levels: int | None  # of a pixel: 2 for binary images, 256 for 8-bit ones
    likelihood: str  # "" if the file does not say, and its kind too
    likelihood_kind: str
    limit: int | None  # None for the whole split, 0 if the file does not say
    step: int
    weights: str
    seed: int | None
    layers: int | None
    parameters: int | None
    minutes: float | None  # of training
    training_seed: int | None
    effective_samples: dict[str, float | None]
    pareto_k: dict[str, float | None]  # "median", "threshold", "share_above"
    pareto_smoothed: dict[str, float | None]  # "nats", "standard_error"
    warning: str | None
    ais: dict[str, Any]  # see `annealed_metrics`; empty without annealed bounds
    sandwich: dict[str, Any]  # see `sandwich.sandwich_metrics`
    trained: dict[str, Any]  # provenance of the training
    provenance: dict[str, Any]  # and of the evaluation

    @classmethod
    def from_dict(cls, content: Any) -> "Metrics":
        """From the content of a metrics.json; any exception means that it is something else."""

        def numbers(name: str) -> dict[str, float | None]:
            return {key: _float(value) for key, value in (content.get(name) or {}).items()}

        return cls(
            elbo=_float(content["elbo"]),
            iw={str(int(k)): _float(bound) for k, bound in content["iw"].items()},
            standard_error=numbers("standard_error"),
            bits_per_dim=numbers("bits_per_dim"),
            kl_per_layer=[_float(kl) for kl in content["kl_per_layer"]],
            n_images=int(content["n_images"]),
            dataset=str(content["dataset"]),
            split=str(content["split"]),
            levels=_int(content.get("levels")),
            likelihood=str(content.get("likelihood") or ""),
            likelihood_kind=str(content.get("likelihood_kind") or ""),
            limit=_int(content.get("limit", 0)),
            step=int(content["step"]),
            weights=str(content.get("weights") or ""),
            seed=_int(content.get("seed")),
            layers=_int(content.get("layers")),
            parameters=_int(content.get("parameters")),
            minutes=_float(content.get("minutes")),
            training_seed=_int(content.get("training_seed")),
            effective_samples=numbers("effective_samples"),
            pareto_k=_of_any_age(numbers("pareto_k")),
            pareto_smoothed=numbers("pareto_smoothed"),
            warning=content.get("warning") and str(content["warning"]),
            ais=dict(content.get("ais") or {}),
            sandwich=dict(content.get("sandwich") or {}),
            trained=dict(content.get("trained") or {}),
            provenance=dict(content.get("provenance") or {}),
        )

    @classmethod
    def read(cls, file: Path) -> "Metrics":
        """From a metrics.json; raises `UserError` if it is damaged or something else."""
        content = read_json(file)
        try:
            return cls.from_dict(content)
        except Exception as error:  # of many kinds, depending on what the file holds
            raise UserError(
                f"{file} is damaged or does not hold the metrics of an evaluation ({error!r}); "
                "evaluate the run again"
            ) from None

    def bound(self, key: str) -> float | None:
        """The negative bound in nats for "elbo" or a number of samples; None if not known."""
        return self.elbo if key == "elbo" else self.iw.get(key)

    @property
    def is_density(self) -> bool:
        """Whether the likelihood is a density, not a probability."""
        return self.likelihood_kind == DENSITY

    @property
    def kl(self) -> float | None:
        """The KL in nats, summed over layers; None if a layer's KL is not known."""
        known = [kl for kl in self.kl_per_layer if kl is not None]
        return sum(known) if known and len(known) == len(self.kl_per_layer) else None


def _of_any_age(pareto_k: dict[str, float | None]) -> dict[str, float | None]:
    """Once the threshold was 0.7 for any number of samples, and part of a key."""
    if "share_above_0.7" in pareto_k:
        return {
            "median": pareto_k.get("median"),
            "threshold": 0.7,
            "share_above": pareto_k["share_above_0.7"],
        }
    return pareto_k


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _int(value: Any) -> int | None:
    return None if value is None else int(value)


def curve_samples(samples: Sequence[int]) -> list[int]:
    """The numbers of samples on the bound's curve: `samples`, and the powers of two below them."""
    powers = {2**i for i in range(samples[-1].bit_length()) if 2**i < samples[-1]}
    return sorted(powers | set(samples))


def metrics(
    bounds: Bounds, samples: Sequence[int], image_shape: Sequence[int], likelihood: str
) -> dict[str, Any]:
    """Summary metrics over the images, for metrics.json. Bounds are negated and in nats.

    `likelihood` is one of `LIKELIHOODS`; a density gets no bits per dimension. `elbo` averages
    over all samples. `iw` holds the importance-weighted bound at each K in `samples`, and `curve`
    that at each K in `bounds`. `effective_samples` and `pareto_k` summarise the importance weights
    of all samples.
    """
    per_image = {"elbo": -bounds.elbo}
    per_image |= {str(k): -bounds.importance_weighted[k] for k in samples}
    means = {name: values.mean().item() for name, values in per_image.items()}
    curve = [-bound for bound in bounds.importance_weighted.values()]
    effective = bounds.effective_samples
    in_bits = {} if is_density(likelihood) else means
    return {
        "likelihood": likelihood,
        "likelihood_kind": LIKELIHOODS[likelihood].kind,
        "elbo": means["elbo"],
        "iw": {name: mean for name, mean in means.items() if name != "elbo"},
        "standard_error": {name: standard_error(values) for name, values in per_image.items()},
        "bits_per_dim": {name: bits_per_dim(mean, image_shape) for name, mean in in_bits.items()},
        "reconstruction": -bounds.log_likelihood.mean().item(),
        "kl_per_layer": bounds.kl.mean(0).tolist(),
        "n_images": len(bounds.elbo),
        "effective_samples": {
            "mean": effective.mean().item(),
            "median": effective.median().item(),
            "min": effective.min().item(),
        },
        "pareto_k": _pareto(bounds.pareto_k, samples[-1]),
        "pareto_smoothed": _pareto_smoothed(bounds.pareto_smoothed),
        "warning": warning(bounds, samples[-1]),
        "curve": {
            "samples": list(bounds.importance_weighted),
            "nats": [values.mean().item() for values in curve],
            "standard_error": [standard_error(values) for values in curve],
        },
    }


def annealed_metrics(
    annealed: Annealed, annealing: Annealing, image_shape: Sequence[int], likelihood: str
) -> dict[str, Any]:
    """Summary metrics of annealed bounds, for metrics.json; the bound is negated and in nats."""
    nats = -annealed.bound.mean().item()
    return {
        "temperatures": annealing.temperatures,
        "chains": annealing.chains,
        "nats": nats,
        "standard_error": standard_error(annealed.bound),
        "bits_per_dim": None if is_density(likelihood) else bits_per_dim(nats, image_shape),
        "acceptance": annealed.acceptance.mean().item(),
        "seconds_per_image": annealed.seconds.mean().item(),
    }


def standard_error(values: Tensor) -> float | None:
    """The standard error of the mean of `values` (N,); None for a single value."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None


def _pareto(k_hat: Tensor, samples: int) -> dict[str, float] | None:
    if k_hat.isnan().all():
        return None
    threshold = reliable_below(samples)
    share = (k_hat > threshold).double().mean().item()
    return {"median": k_hat.median().item(), "threshold": threshold, "share_above": share}


def _pareto_smoothed(estimate: Tensor) -> dict[str, float | None] | None:
    if estimate.isnan().all():
        return None
    return {"nats": -estimate.mean().item(), "standard_error": standard_error(estimate)}


def warning(bounds: Bounds, samples: int) -> str | None:
    """A sentence that says why the bound does not approximate the log-likelihood.

    None if nothing speaks against it, or if there are too few samples to decide.
    """
    bound = bounds.importance_weighted[samples]
    if infinite := int((~bound.isfinite()).sum()):
        return (
            f"the bound with {samples:,} samples is not finite for {infinite:,} of {len(bound):,} "
            "images: the training may have diverged, so use an earlier checkpoint"
        )
    if bounds.pareto_k.isnan().all():
        return None
    threshold = reliable_below(samples)
    share = (bounds.pareto_k > threshold).double().mean().item()
    if share <= _TOLERATED:
        return None
    return (
        f"the bound with {samples:,} samples does not approximate the log-likelihood: for "
        f"{share:.0%} of the images a few samples dominate the importance weights (Pareto k-hat "
        f"above {threshold:.2g}), and more samples would give a tighter bound"
    )


def write_per_image(
    path: Path, bounds: Bounds, index: Tensor, annealed: Annealed | None = None
) -> None:
    """Write per_image.npz: the bounds of each image in nats, not negated.

    `image` (N,) is the index in the split; `elbo`, `log_likelihood`, `effective_samples`,
    `pareto_k` and `pareto_smoothed` (nan for too few samples) are (N,); `bound` is (N,
    len(samples)), with a column for each number in `samples`; `kl` is (N, L), bottom to top. With
    annealed bounds, `annealed` is (N,), and `annealed_log_weights` (N, chains).
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
        "pareto_smoothed": bounds.pareto_smoothed.numpy(),
    }
    if annealed is not None:
        arrays["annealed"] = annealed.bound.numpy()
        arrays["annealed_log_weights"] = annealed.log_weights.numpy()
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def is_density(likelihood: str) -> bool:
    """Whether the likelihood of that name is a density, not a probability."""
    return LIKELIHOODS[likelihood].kind == DENSITY


def bits_per_dim(nats: float, image_shape: Sequence[int]) -> float:
    """Nats per image converted to bits per dimension; dimensions are pixels times channels."""
    return nats / (math.prod(image_shape) * math.log(2))
