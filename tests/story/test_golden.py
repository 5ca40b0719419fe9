"""Agreement with the reference network: the same numbers from its weights and its noise.

Every case runs through the actual model, guide and ELBO; the noise enters by a Pyro handler.
GOLDEN_DIR in the environment points to another folder of cases.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.testing import assert_close

import datasets
from elbo import FreeBitsELBO
from guide import build_ladder
from ladder_vae.networks.blocks import count_parameters
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from tools.import_reference import config_from_case, from_reference, reference_tensors

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent.parent / "golden"))
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN_DIR / "cases.json").read_text())
NAMES = sorted(name for name in CASES if (GOLDEN_DIR / f"{name}.npz").exists())

# Nats: relative and absolute agreement of log-likelihoods and KLs.
NATS: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-3}


class Noise(Messenger):
    """Draws each reparameterised latent from recorded noise: z_i = mean + scale * eps_i."""

    def __init__(self, noise: list[Tensor]) -> None:
        super().__init__()
        self.noise = noise

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"].startswith("z_") and not msg["is_observed"]:
            normal = msg["fn"].base_dist
            eps = self.noise[int(msg["name"].removeprefix("z_")) - 1]
            msg["value"] = normal.loc + normal.scale * eps
            msg["done"] = True


class Case:
    def __init__(self, name: str) -> None:
        self.options = CASES[name]
        self.config = config_from_case(self.options)
        self.arrays: NpzFile = np.load(GOLDEN_DIR / f"{name}.npz")
        state = {
            key.removeprefix("state/"): self.arrays[key]
            for key in self.arrays.files
            if key.startswith("state/")
        }
        self.model: Any
        self.guide: Any
        self.model, self.guide = from_reference(self.options, state)
        self.depth = len(self.config.z_dims)
        self.elbo = FreeBitsELBO(
            self.options.get("free_bits", 0.0),
            analytic_kl=self.options.get("analytical_kl", False),
        )

    def __getitem__(self, key: str) -> Tensor:
        return torch.as_tensor(self.arrays[key])

    def layers(self, key: str) -> list[Tensor]:
        return [self[f"{key}{i}"] for i in range(self.depth)]

    def noise(self, part: str) -> Noise:
        # Inside the guide, so that it draws from the posterior that the guide has put in place.
        return Noise(self.layers(f"{part}/eps"))

    def mode(self, training: bool) -> None:
        for module in (self.model, self.guide):
            module.train(training)
            for layer in module.modules():
                if isinstance(layer, nn.Dropout2d):
                    layer.p = 0.0


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_evaluation_terms(case: Case) -> None:
    """Latents, log-likelihood and KL by layer in evaluation mode."""
    case.mode(training=False)
    with torch.no_grad(), case.noise("eval"):
        terms = case.elbo.compute_terms(case.model, case.guide, case["x"])
    for i, z in enumerate(case.layers("eval/z")):
        assert_close(case.guide.trace.nodes[f"z_{i + 1}"]["value"], z, rtol=1e-4, atol=1e-4)
    assert_close(terms.log_likelihood, case["eval/ll"], **NATS)
    assert_close(terms.kl, case["eval/kl"], **NATS)


def test_evaluation_kl_maps(case: Case) -> None:
    """KL by layer and position, in closed form and summed over channels."""
    case.mode(training=False)
    with torch.no_grad(), case.noise("eval"):
        case.guide(case["x"])
    model_trace, guide_trace = case.guide.get_traces()
    for i, expected in enumerate(case.layers("eval/kl_spatial")):
        q, p = (trace.nodes[f"z_{i + 1}"] for trace in (guide_trace, model_trace))
        kl = kl_divergence(q["fn"].base_dist, p["fn"].base_dist)
        assert_close(kl.sum(1), expected, **NATS)


def test_evaluation_loss(case: Case) -> None:
    """The objective with its free bits, as the reference clamps them."""
    case.mode(training=False)
    with torch.no_grad(), case.noise("eval"):
        terms = case.elbo.compute_terms(case.model, case.guide, case["x"])
    kl_loss = (case.elbo.objective(terms) + terms.log_likelihood.sum()) / len(case["x"])
    assert_close(kl_loss, case["eval/kl_loss"], **NATS)


def test_prior(case: Case) -> None:
    """The likelihood's parameters, decoded from latents of the prior."""
    decoded = decode_prior(case)
    keys = {key for key in case.arrays.files if key.startswith("prior/params_")}
    assert {f"prior/params_{name}" for name in decoded} == keys
    for name, ours in decoded.items():
        assert_close(ours, case[f"prior/params_{name}"], rtol=1e-4, atol=1e-5)


def decode_prior(case: Case) -> dict[str, Tensor]:
    """The likelihood's parameters as the reference names them."""
    case.mode(training=False)
    z = {f"z_{i + 1}": value for i, value in enumerate(case.layers("prior/z"))}
    n = len(z["z_1"])
    with torch.no_grad():
        trace = poutine.trace(poutine.condition(case.model, z)).get_trace(n=n)
    fn = trace.nodes["x"]["fn"]
    match case.config.likelihood:
        case "bernoulli":
            return {"mean": fn.mean}
        case "gaussian":
            return {"mean": fn.mean, "logvar": 2 * fn.base_dist.scale.log()}
        case "discr_log":
            return {"mean": fn.base_dist.loc, "logscale": fn.base_dist.log_scale}
        case _:
            by_colour = torch.stack([fn.loc, fn.log_scale, fn.coefficients.atanh()], dim=-4)
            return {"all_params": torch.cat([fn.logits, by_colour.flatten(1, 3)], dim=1)}


def test_training_terms(case: Case) -> None:
    """Latents, log-likelihood, KL and loss with batch statistics."""
    case.mode(training=True)
    x = case["train/x"]
    with case.noise("train"):
        loss = case.elbo(case.model, case.guide)(x) / len(x)
    terms = case.elbo.terms
    assert terms is not None
    for i, z in enumerate(case.layers("train/z")):
        assert_close(case.guide.trace.nodes[f"z_{i + 1}"]["value"], z, rtol=1e-4, atol=1e-4)
    assert_close(terms.log_likelihood, case["train/ll"], **NATS)
    assert_close(terms.kl.mean(0), case["train/kl_avg_layerwise"], **NATS)
    assert_close(loss, case["train/loss"], **NATS)


def test_training_gradients(case: Case) -> None:
    """The norm of the loss's gradient, parameter by parameter."""
    case.mode(training=True)
    x = case["train/x"]
    with case.noise("train"):
        (case.elbo(case.model, case.guide)(x) / len(x)).backward()
    norms = {
        key.removeprefix("grad_norm/"): float(case.arrays[key])
        for key in case.arrays.files
        if key.startswith("grad_norm/")
    }
    names = [k.removeprefix("state/") for k in case.arrays.files if k.startswith("state/")]
    ours = reference_tensors(case.model, case.guide, names)
    trained = {name for name, p in ours.items() if p.requires_grad}
    assert norms.keys() == trained
    # Where batch norm follows a convolution, its bias has no gradient but rounding errors.
    floor = 1e-5 * max(norms.values())
    for name, expected in norms.items():
        gradient = ours[name].grad
        assert gradient is not None, name
        assert gradient.norm().item() == pytest.approx(expected, rel=1e-3, abs=floor), name


def test_parameter_count(case: Case) -> None:
    assert count_parameters(case.model, case.guide) == case.options["n_params"]


def test_latent_shapes(case: Case) -> None:
    height, width = case.options["img_shape"]
    sizes = case.config.latent_sizes((height, width))
    shapes = [[z, *size] for z, size in zip(case.config.z_dims, sizes, strict=True)]
    assert shapes == case.options["z_shapes"]
    assert case.config.downscaling == case.options["overall_downscale_factor"]


# The presets' names for the reference's networks of the likelihood table.
FULL_SIZE = {
    {"cifar-15": "cifar10-15"}.get(name, name): expected
    for name, expected in CASES.get("full_size", {}).items()
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_parameter_count(name: str) -> None:
    """The presets are as large as the reference's networks of the likelihood table."""
    preset, expected = RunConfig.of(**PRESETS[name]), FULL_SIZE[name]
    for downsample in (preset.ladder.downsample, expected["downsample"]):
        config = dataclasses.replace(preset.ladder, downsample=downsample)
        with torch.device("meta"):
            pair = build_ladder(config, datasets.image_shape(preset.dataset))
        assert count_parameters(*pair) == expected["n_params"]
