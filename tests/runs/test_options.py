"""The options' checks: a wrong value is a `UserError` that names the option and what is right."""

import json
import math
from typing import Any

import pytest

from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from runtime.errors import UserError

WRONG: list[tuple[dict[str, Any], str]] = [
    # What a type allows
    ({"blocks_per_layer": 2.0}, "--blocks-per-layer is 2.0; it must be a whole number"),
    ({"blocks_per_layer": True}, "--blocks-per-layer is True; it must be a whole number"),
    ({"steps": "10"}, "--steps is '10'; it must be a whole number"),
    ({"seed": None}, "--seed is None; it must be a whole number"),
    ({"lr": "1e-3"}, "--lr is '1e-3'; it must be a number"),
    ({"free_bits": True}, "--freebits is True; it must be a number"),
    ({"dropout": [0.2]}, "--dropout is [0.2]; it must be a number"),
    ({"gated": 1}, "--gated is 1; it must be true or false"),
    ({"skip": "no"}, "--skip is 'no'; it must be true or false"),
    ({"batchnorm": None}, "--bn is None; it must be true or false"),
    ({"descr": 3}, "--descr is 3; it must be text"),
    ({"nonlin": 3}, "--nonlin is 3; it must be text"),
    ({"z_dims": 32}, "--zdims is 32; it must be a list of whole numbers"),
    ({"z_dims": (32, 32, 32)}, "--zdims is (32, 32, 32); it must be a list of whole numbers"),
    ({"z_dims": [32, 32.0, 32]}, "--zdims is [32, 32.0, 32]; it must be a list of whole numbers"),
    ({"downsample": [True] * 3}, "--downsample is [True, True, True]; it must be a list of whole"),
    ({"downsample": "111"}, "--downsample is '111'; it must be a list of whole numbers"),
    # Choices
    ({"nonlin": "gelu"}, "--nonlin is 'gelu'; it must be one of relu, leakyrelu, elu, selu"),
    ({"nonlin": "ELU"}, "--nonlin is 'ELU'; it must be one of"),
    (
        {"residual_type": "cabd"},
        "--residual-type is 'cabd'; it must be one of cabdcabd, bacdbac, bacdbacd",
    ),
    ({"merge_layers": "sum"}, "--merge-layers is 'sum'; it must be one of linear, residual"),
    (
        {"likelihood": "poisson"},
        "--likelihood is 'poisson'; it must be one of auto, bernoulli, gaussian",
    ),
    ({"dataset": "minst"}, "--dataset is 'minst'; it must be one of"),
    ({"train_split": "test"}, "--train-split is 'test'; it must be one of train, train+valid"),
    ({"lr_decay": "linear"}, "--lr-decay is 'linear'; it must be one of none, cosine"),
    # Ranges
    ({"z_dims": [2, 0, 2]}, "--zdims is 0; it must be at least 1"),
    ({"downsample": [1, -1, 1]}, "--downsample is -1; it must be finite and not negative"),
    ({"n_filters": 0}, "--nfilters is 0; it must be at least 1"),
    ({"blocks_per_layer": -1}, "--blocks-per-layer is -1; it must be at least 1"),
    ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
    ({"seed": -1}, "--seed is -1; it must be at least 0 and below 2**63"),
    ({"free_bits": -0.5}, "--freebits is -0.5; it must be finite and not negative"),
    ({"free_bits": math.nan}, "--freebits is nan; it must be finite and not negative"),
    ({"free_bits": math.inf}, "--freebits is inf; it must be finite and not negative"),
    ({"dropout": 1.0}, "--dropout is 1.0; it must be at least 0 and below 1"),
    ({"dropout": -0.1}, "--dropout is -0.1; it must be at least 0 and below 1"),
    ({"dropout": math.nan}, "--dropout is nan; it must be at least 0 and below 1"),
    ({"ema": 1}, "--ema is 1; it must be at least 0 and below 1"),
    ({"lr": 0.0}, "--lr is 0.0; it must be finite and positive"),
    ({"lr": -1e-3}, "--lr is -0.001; it must be finite and positive"),
    ({"lr": math.nan}, "--lr is nan; it must be finite and positive"),
    ({"lr": math.inf}, "--lr is inf; it must be finite and positive"),
    ({"weight_decay": -1.0}, "--wd is -1.0; it must be finite and not negative"),
    ({"grad_clip": math.nan}, "--grad-clip is nan; it must be finite and not negative"),
    ({"max_minutes": -1}, "--max-minutes is -1; it must be finite and not negative"),
    # What options ask of each other
    ({"z_dims": [2, 2]}, "--zdims lists 2 layers but --downsample 3; they need one number for"),
    ({"downsample": [1]}, "--zdims lists 3 layers but --downsample 1; they need one number for"),
    (
        {"downsample": [0, 3, 0]},
        "--downsample asks for 3 halvings in one layer but --blocks-per-layer is 2; each halving",
    ),
    (
        {"lr_decay": "cosine"},
        "--lr-decay needs the run's length: give --steps, --epochs or --max-minutes",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_wrong_value(options: dict[str, Any], message: str) -> None:
    """One line that names the option as the command line does, the value, and what is right."""
    with pytest.raises(UserError) as caught:
        RunConfig.of(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    # The same when the value comes from a file.
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict(options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("empty", ["z_dims", "downsample"])
def test_empty_list(empty: str) -> None:
    """A ladder without layers is refused."""
    with pytest.raises(UserError, match="it must be"):
        RunConfig.from_dict({empty: []})


@pytest.mark.parametrize(
    "options",
    [
        {"free_bits": 0},
        {"lr": 1},
        {"dropout": 0},
        {"blocks_per_layer": 1, "downsample": [1, 0, 1]},
        {"downsample": [2, 2, 2]},
        {"lr_decay": "cosine", "steps": 1},
        {"lr_decay": "cosine", "epochs": 1},
        {"lr_decay": "cosine", "max_minutes": 0.5},
        {"z_dims": [1], "downsample": [0]},
        {"seed": 0},
    ],
    ids=str,
)
def test_right_values_at_the_edges(options: dict[str, Any]) -> None:
    """Values at the edge of what is allowed are kept as given."""
    config = RunConfig.of(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_unknown_entries() -> None:
    """A file's entries that are no options are named, in order."""
    with pytest.raises(UserError) as caught:
        RunConfig.from_dict({"zdims": [1], "gated": True, "layers": 3})
    assert str(caught.value) == "the configuration has unknown entries: layers, zdims"


@pytest.mark.parametrize("values", [None, [], "gated", 3, [["gated", True]]], ids=repr)
def test_not_an_object(values: Any) -> None:
    """What is no JSON object is no configuration."""
    with pytest.raises(UserError, match="not a JSON object"):
        RunConfig.from_dict(values)


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str) -> None:
    """A preset's configuration goes through JSON and comes back equal."""
    config = RunConfig.of(**PRESETS[name])
    values = config.to_dict()
    assert {key: values[key] for key in PRESETS[name]} == PRESETS[name]
    again = RunConfig.from_dict(json.loads(json.dumps(values, allow_nan=False)))
    assert again == config
    assert again.to_dict() == values


def test_defaults_round_trip() -> None:
    """All options have a default, and only what a file names differs from it."""
    assert RunConfig.from_dict({}) == RunConfig.of()
    assert RunConfig.from_dict({"skip": True}) != RunConfig.of()
    assert RunConfig.from_dict(RunConfig.of().to_dict()) == RunConfig.of()


def test_sizes() -> None:
    """The padded size and the latents' sizes of the MNIST networks."""
    three = RunConfig.of(**PRESETS["mnist-3"])
    assert three.downscaling == 16
    assert three.padded_size((28, 28)) == (32, 32)
    assert three.latent_sizes((28, 28)) == [(8, 8), (4, 4), (2, 2)]
    full = RunConfig.of(downsample=[0, 1, 0], initial_downscaling=False)
    assert full.downscaling == 2
    assert full.padded_size((5, 6)) == (6, 6)
    assert full.latent_sizes((5, 6)) == [(6, 6), (3, 3), (3, 3)]


def test_lists_are_the_configs_own() -> None:
    """Changing a preset's list, or the caller's, changes no configuration made of it."""
    sizes = [4, 4, 4]
    config = RunConfig.of(z_dims=sizes)
    sizes.append(4)
    assert config.z_dims == [4, 4, 4]
    assert RunConfig.of(**PRESETS["mnist-3"]).downsample is not PRESETS["mnist-3"]["downsample"]


@pytest.mark.parametrize(
    ("dataset", "likelihood"),
    [
        ("digits", "bernoulli"),
        ("static_mnist", "bernoulli"),
        ("multi_dsprites", "bernoulli"),
        ("svhn", "discr_log_mix"),
        ("cifar10", "discr_log_mix"),
        ("celeba", "discr_log_mix"),
    ],
)
def test_likelihood_suits_the_images(dataset: str, likelihood: str) -> None:
    """As in the reference: Bernoulli for binary images, the mixture of logistics for others."""
    assert RunConfig.of(dataset=dataset).likelihood == likelihood
    assert RunConfig.of(dataset=dataset, likelihood="discr_log").likelihood == "discr_log"


def test_bernoulli_pixels_are_refused_for_colour_images() -> None:
    """A Bernoulli's log-probability of a grey level is no likelihood of the image."""
    with pytest.raises(UserError) as refusal:
        RunConfig.of(dataset="cifar10", likelihood="bernoulli")
    assert "--likelihood is bernoulli but the images of cifar10 are not binary" in str(
        refusal.value
    )
