"""Checks of options: a wrong value is a `ValueError` that names the option and valid values."""

import json
import math
from typing import Any

import pytest

from ladder_vae.networks import LadderConfig
from ladder_vae.runs.command_line import OPTIONS, as_user_errors, config_of, flag
from ladder_vae.runs.options import RunConfig
from ladder_vae.runs.presets import PRESETS
from runtime.errors import UserError

WRONG: list[tuple[dict[str, Any], str]] = [
    # What a type allows
    ({"blocks_per_layer": 2.0}, "`blocks_per_layer` is 2.0; it must be a whole number"),
    ({"blocks_per_layer": True}, "`blocks_per_layer` is True; it must be a whole number"),
    ({"steps": "10"}, "`steps` is '10'; it must be a whole number"),
    ({"seed": None}, "`seed` is None; it must be a whole number"),
    ({"lr": "1e-3"}, "`lr` is '1e-3'; it must be a number"),
    ({"free_bits": True}, "`free_bits` is True; it must be a number"),
    ({"dropout": [0.2]}, "`dropout` is [0.2]; it must be a number"),
    ({"gated": 1}, "`gated` is 1; it must be true or false"),
    ({"skip": "no"}, "`skip` is 'no'; it must be true or false"),
    ({"batchnorm": None}, "`batchnorm` is None; it must be true or false"),
    ({"descr": 3}, "`descr` is 3; it must be text"),
    ({"nonlin": 3}, "`nonlin` is 3; it must be text"),
    ({"z_dims": 32}, "`z_dims` is 32; it must be a list of whole numbers"),
    ({"z_dims": (32, 32, 32)}, "`z_dims` is (32, 32, 32); it must be a list of whole numbers"),
    ({"z_dims": [32, 32.0, 32]}, "`z_dims` is [32, 32.0, 32]; it must be a list of whole numbers"),
    ({"downsample": [True] * 3}, "`downsample` is [True, True, True]; it must be a list of whole"),
    ({"downsample": "111"}, "`downsample` is '111'; it must be a list of whole numbers"),
    # Choices
    ({"nonlin": "gelu"}, "`nonlin` is 'gelu'; it must be one of relu, leakyrelu, elu, selu"),
    ({"nonlin": "ELU"}, "`nonlin` is 'ELU'; it must be one of"),
    (
        {"residual_type": "cabd"},
        "`residual_type` is 'cabd'; it must be one of cabdcabd, bacdbac, bacdbacd",
    ),
    ({"merge_layers": "sum"}, "`merge_layers` is 'sum'; it must be one of linear, residual"),
    (
        {"likelihood": "poisson"},
        "`likelihood` is 'poisson'; it must be one of bernoulli, gaussian",
    ),
    ({"dataset": "minst"}, "`dataset` is 'minst'; it must be one of"),
    ({"train_split": "test"}, "`train_split` is 'test'; it must be one of train, train+valid"),
    ({"lr_decay": "linear"}, "`lr_decay` is 'linear'; it must be one of none, cosine"),
    # Ranges
    ({"z_dims": [2, 0, 2]}, "`z_dims` is 0; it must be at least 1 and at most 4096"),
    ({"downsample": [1, -1, 1]}, "`downsample` is -1; it must be finite and not negative"),
    ({"n_filters": 0}, "`n_filters` is 0; it must be at least 1 and at most 4096"),
    ({"blocks_per_layer": -1}, "`blocks_per_layer` is -1; it must be at least 1 and at most 64"),
    ({"batch_size": 0}, "`batch_size` is 0; it must be at least 1"),
    ({"seed": -1}, "`seed` is -1; it must be at least 0 and below 2**63"),
    ({"free_bits": -0.5}, "`free_bits` is -0.5; it must be finite and not negative"),
    ({"free_bits": math.nan}, "`free_bits` is nan; it must be finite and not negative"),
    ({"free_bits": math.inf}, "`free_bits` is inf; it must be finite and not negative"),
    ({"dropout": 1.0}, "`dropout` is 1.0; it must be at least 0 and below 1"),
    ({"dropout": -0.1}, "`dropout` is -0.1; it must be at least 0 and below 1"),
    ({"dropout": math.nan}, "`dropout` is nan; it must be at least 0 and below 1"),
    ({"ema": 1}, "`ema` is 1; it must be at least 0 and below 1"),
    ({"lr": 0.0}, "`lr` is 0.0; it must be finite and positive"),
    ({"lr": -1e-3}, "`lr` is -0.001; it must be finite and positive"),
    ({"lr": math.nan}, "`lr` is nan; it must be finite and positive"),
    ({"lr": math.inf}, "`lr` is inf; it must be finite and positive"),
    ({"weight_decay": -1.0}, "`weight_decay` is -1.0; it must be finite and not negative"),
    ({"grad_clip": math.nan}, "`grad_clip` is nan; it must be finite and not negative"),
    ({"max_minutes": -1}, "`max_minutes` is -1; it must be finite and not negative"),
    # Options that do not fit together
    ({"z_dims": [2, 2]}, "`z_dims` lists 2 layers but `downsample` 3; they need one number for"),
    ({"downsample": [1]}, "`z_dims` lists 3 layers but `downsample` 1; they need one number for"),
    (
        {"downsample": [0, 3, 0]},
        "`downsample` asks for 3 halvings in one layer but `blocks_per_layer` is 2; each halving",
    ),
    (
        {"pixel_shuffle": True, "initial_downscaling": False},
        "`pixel_shuffle` doubles the size of the last feature map, which is the image's if "
        "`initial_downscaling` is off; switch one of them",
    ),
    (
        {"lr_decay": "cosine"},
        "`lr_decay` needs the run's length: give `steps`, `epochs` or `max_minutes`",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=[str(options) for options, _ in WRONG])
def test_wrong_values_are_refused(options: dict[str, Any], message: str) -> None:
    """In one line with the option, the value, and what is right; command lines name the flag."""
    with pytest.raises(ValueError, match="`") as caught:
        RunConfig.of(**options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError) as refusal:
        config_of(options)
    (name,) = options.keys() & {message.split("`")[1]} or {message.split("`")[1]}
    assert str(refusal.value).startswith(flag(name))
    assert "`" not in str(refusal.value)


@pytest.mark.parametrize("empty", ["z_dims", "downsample"])
def test_a_ladder_has_layers(empty: str) -> None:
    options: dict[str, Any] = {empty: []}
    with pytest.raises(ValueError, match="it must be a list"):
        RunConfig.of(**options)


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
def test_values_at_the_limits_are_kept(options: dict[str, Any]) -> None:
    values = RunConfig.of(**options).options()
    assert {name: values[name] for name in options} == options


@pytest.mark.parametrize(
    "values",
    [
        {"ladder": {}, "zdims": [1]},
        {"ladder": {"layers": 3}},
        {"skip": True},
        {},
        None,
        [],
        "gated",
        3,
        [["gated", True]],
    ],
    ids=repr,
)
def test_other_dictionaries_are_refused(values: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        RunConfig.from_dict(values)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = RunConfig.of(**PRESETS[name])
    options = config.options()
    assert {key: options[key] for key in PRESETS[name]} == PRESETS[name]
    values = config.to_dict()
    assert RunConfig.from_dict(json.loads(json.dumps(values, allow_nan=False))) == config
    assert RunConfig.of(**options) == config


def test_every_option_has_a_default() -> None:
    assert RunConfig.from_dict({"ladder": {}}) == RunConfig.of() == RunConfig()
    assert RunConfig.of().ladder == LadderConfig()
    assert RunConfig.from_dict({"ladder": {"skip": True}}).ladder.skip
    assert OPTIONS.keys() == RunConfig.of().options().keys()


def test_sizes() -> None:
    """The padded size and the latents' sizes of the MNIST networks."""
    three = RunConfig.of(**PRESETS["mnist-3"]).ladder
    assert three.downscaling == 16
    assert three.padded_size((28, 28)) == (32, 32)
    assert three.latent_sizes((28, 28)) == [(8, 8), (4, 4), (2, 2)]
    full = LadderConfig(downsample=[0, 1, 0], initial_downscaling=False)
    assert full.downscaling == 2
    assert full.padded_size((5, 6)) == (6, 6)
    assert full.latent_sizes((5, 6)) == [(6, 6), (3, 3), (3, 3)]


def test_a_configuration_copies_its_lists() -> None:
    """Later changes of the caller's lists, or a preset's, do not reach it."""
    sizes = [4, 4, 4]
    config = RunConfig.of(z_dims=sizes)
    sizes.append(4)
    assert config.ladder.z_dims == [4, 4, 4]
    preset = PRESETS["mnist-3"]
    assert RunConfig.of(**preset).ladder.downsample is not preset["downsample"]


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
def test_the_default_likelihood_suits_the_images(dataset: str, likelihood: str) -> None:
    """As in the original implementation: Bernoulli for binary images, else the logistic mixture."""
    assert RunConfig.of(dataset=dataset).ladder.likelihood == likelihood
    assert RunConfig.of(dataset=dataset, likelihood="auto").ladder.likelihood == likelihood
    given = RunConfig.of(dataset=dataset, likelihood="discr_log")
    assert given.ladder.likelihood == "discr_log"


def test_bernoulli_pixels_are_refused_for_colour_images() -> None:
    """The Bernoulli log-probability of a grey level is not a likelihood of the image."""
    with pytest.raises(
        ValueError, match=r"`likelihood` is bernoulli but .* cifar10 are not binary"
    ):
        RunConfig.of(dataset="cifar10", likelihood="bernoulli")


def test_synchronised_statistics_need_batch_normalisation() -> None:
    with pytest.raises(ValueError, match="`sync_bn` has no effect if `batchnorm` is off"):
        RunConfig.of(sync_bn=True, batchnorm=False)


@pytest.mark.parametrize(("train_split", "held_out"), [("train", "valid"), ("train+valid", "test")])
def test_the_test_set_stays_unseen_if_there_is_a_validation_set(
    train_split: str, held_out: str
) -> None:
    assert RunConfig.of(train_split=train_split).held_out_split == held_out


def test_only_options_become_flags() -> None:
    """Other words in backticks stay as they are."""
    with pytest.raises(UserError, match="--zdims and `z`"), as_user_errors():
        raise ValueError("`z_dims` and `z`")
