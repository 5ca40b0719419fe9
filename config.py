"""Every option of training, once: its name, default, help and check; and the presets."""

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, get_args, get_origin

import datasets
from errors import UserError
from execution import COMPILE, PRECISIONS
from likelihoods import LIKELIHOODS
from networks import ACTIVATIONS, MERGE_TYPES, RESIDUAL_TYPES, BlockStyle

# A check returns whether a value is right, and says what would be.
Check = tuple[Callable[[Any], bool], str]

SEED: Check = (lambda value: 0 <= value < 2**63, "at least 0 and below 2**63")
AT_LEAST_ONE: Check = (lambda value: value >= 1, "at least 1")
# What is larger fits into no memory.
CHANNELS: Check = (lambda value: 1 <= value <= 4096, "at least 1 and at most 4096")
BLOCKS: Check = (lambda value: 1 <= value <= 64, "at least 1 and at most 64")
PRINTABLE: Check = (str.isprintable, "printable text on one line")
NOT_NEGATIVE: Check = (lambda value: 0 <= value < math.inf, "finite and not negative")
POSITIVE: Check = (lambda value: 0 < value < math.inf, "finite and positive")
FRACTION: Check = (lambda value: 0 <= value < 1, "at least 0 and below 1")


def option(
    default: Any,
    help: str,
    *,
    flags: Sequence[str] = (),
    choices: Sequence[str] = (),
    check: Check | None = None,
) -> Any:
    """A field of `Config` that is also a command-line option, `--field-name` unless told."""
    metadata = {"help": help, "flags": flags, "choices": choices, "check": check}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What a run is: data, network, objective, optimisation and monitoring.

    Lists run from the bottom layer to the top one. Raises `UserError` where a value is wrong.
    """

    # Data
    dataset: str = option(
        "static_mnist", "data set", flags=("-d", "--dataset"), choices=datasets.NAMES
    )
    train_split: str = option(
        "train+valid",
        "images to train on; with `train`, evaluations during training use the validation images",
        choices=("train", "train+valid"),
    )
    # Network
    z_dims: list[int] = option(
        [32, 32, 32],
        "latent channels of each stochastic layer",
        flags=("--zdims",),
        check=CHANNELS,
    )
    downsample: list[int] = option(
        [1, 1, 1], "halvings of the feature map before each stochastic layer", check=NOT_NEGATIVE
    )
    blocks_per_layer: int = option(2, "residual blocks between stochastic layers", check=BLOCKS)
    n_filters: int = option(
        64, "channels of all deterministic feature maps", flags=("--nfilters",), check=CHANNELS
    )
    nonlin: str = option("elu", "activation", choices=tuple(ACTIVATIONS))
    residual_type: str = option(
        "bacdbacd",
        "order of a residual block's layers: a = activation, b = batch norm, c = convolution, "
        "d = dropout",
        choices=RESIDUAL_TYPES,
    )
    merge_layers: str = option(
        "residual", "merge of bottom-up and top-down features", choices=MERGE_TYPES
    )
    gated: bool = option(False, "gated residual blocks")
    skip: bool = option(False, "skip connections from all layers above in the generative model")
    batchnorm: bool = option(True, "batch normalisation", flags=("--bn",))
    sync_bn: bool = option(
        False, "batch normalisation over the whole batch where several GPUs share it"
    )
    dropout: float = option(0.2, "channel dropout probability", check=FRACTION)
    learn_top_prior: bool = option(False, "learn the prior of the top layer")
    initial_downscaling: bool = option(True, "halve the image at the start of inference")
    likelihood: str = option(
        "auto",
        "distribution of x given z; auto is bernoulli for binary images and discr_log_mix for "
        "8-bit ones",
        choices=("auto", *LIKELIHOODS),
    )
    data_dep_init: bool = option(False, "data-dependent initialisation of the weights")
    # Objective
    free_bits: float = option(
        0.0,
        "KL per layer and image below which it is not penalised, in nats",
        flags=("--freebits",),
        check=NOT_NEGATIVE,
    )
    analytical_kl: bool = option(False, "KL in closed form instead of the one-sample estimate")
    beta_anneal: int = option(
        0, "steps over which the KL weight rises from 0 to 1", check=NOT_NEGATIVE
    )
    # Optimisation
    batch_size: int = option(64, "images per training step", check=AT_LEAST_ONE)
    lr: float = option(3e-4, "learning rate of Adamax", check=POSITIVE)
    weight_decay: float = option(0.0, "weight decay", flags=("--wd",), check=NOT_NEGATIVE)
    lr_warmup: int = option(0, "steps of linear learning-rate warm-up", check=NOT_NEGATIVE)
    lr_decay: str = option(
        "none", "learning-rate decay over the run's length", choices=("none", "cosine")
    )
    ema: float = option(
        0.0,
        "decay of the moving average of the weights, which evaluation then uses; 0 for none",
        check=FRACTION,
    )
    grad_clip: float = option(
        0.0, "clip the gradient to this global norm; 0 for never", check=NOT_NEGATIVE
    )
    grad_skip: float = option(
        0.0,
        "skip updates whose gradient norm is above this; 0 for never",
        check=NOT_NEGATIVE,
    )
    grad_spike: float = option(
        100.0,
        "skip updates whose gradient norm is more than this many times the median of the last 100; "
        "0 for never",
        check=NOT_NEGATIVE,
    )
    seed: int = option(42, "random seed", check=SEED)
    # Speed
    precision: str = option(
        "float32",
        "of the networks; tf32 (on a GPU) and bf16 are faster and less precise; evaluations during "
        "training do without bf16",
        choices=PRECISIONS,
    )
    compile: str = option(
        "auto",
        "compile the residual blocks, which takes a minute at the start; auto: on a GPU",
        choices=COMPILE,
    )
    # Length; whichever comes first ends the run, and with none it runs until interrupted
    steps: int = option(0, "stop after this many steps; 0 for no bound", check=NOT_NEGATIVE)
    epochs: int = option(0, "stop after this many epochs; 0 for no bound", check=NOT_NEGATIVE)
    max_minutes: float = option(
        0.0, "stop after this many minutes; 0 for no bound", check=NOT_NEGATIVE
    )
    # Monitoring
    tr_log_interv: int = option(100, "steps between training log entries", check=AT_LEAST_ONE)
    ts_log_interv: int = option(
        5000, "steps between evaluations with pictures; 0 for only at the end", check=NOT_NEGATIVE
    )
    ll_interv: int = option(
        50000, "steps between importance-weighted bounds; 0 for never", check=NOT_NEGATIVE
    )
    ll_samples: int = option(100, "importance samples of those bounds", check=AT_LEAST_ONE)
    ll_images: int = option(
        0, "random images that those bounds are computed on; 0 for all", check=NOT_NEGATIVE
    )
    test_batch_size: int = option(
        500, "images (or images times samples) per evaluation pass", check=AT_LEAST_ONE
    )
    ckpt_interv: int = option(
        5000, "steps between checkpoints; 0 for only at the end", check=NOT_NEGATIVE
    )
    checkpoint_minutes: float = option(
        30.0,
        "write a checkpoint at least every so many minutes too; 0 for never",
        check=NOT_NEGATIVE,
    )
    keep_checkpoints: int = option(
        3, "how many of the newest to keep, besides the best", check=AT_LEAST_ONE
    )
    descr: str = option("", "a few words on the run, added to its name", check=PRINTABLE)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_field(field, getattr(self, field.name))
        binary = datasets.is_binary(self.dataset)
        if self.likelihood == "auto":
            object.__setattr__(self, "likelihood", "bernoulli" if binary else "discr_log_mix")
        if self.likelihood == "bernoulli" and not binary:
            raise UserError(
                f"--likelihood is bernoulli but the images of {self.dataset} are not binary; "
                "it must be one of discr_log_mix, discr_log, gaussian"
            )
        # Lists of our own: a caller's, or a preset's, may change.
        object.__setattr__(self, "z_dims", list(self.z_dims))
        object.__setattr__(self, "downsample", list(self.downsample))
        if len(self.z_dims) != len(self.downsample):
            raise UserError(
                f"--zdims lists {len(self.z_dims)} layers but --downsample {len(self.downsample)}; "
                "they need one number for each layer, bottom to top"
            )
        if max(self.downsample) > self.blocks_per_layer:
            raise UserError(
                f"--downsample asks for {max(self.downsample)} halvings in one layer but "
                f"--blocks-per-layer is {self.blocks_per_layer}; each halving needs a block"
            )
        if self.downscaling > 1024:
            raise UserError(
                f"--downsample asks for {sum(self.downsample)} halvings in all; it must be at most "
                f"{10 - self.initial_downscaling}, and no image has room for more"
            )
        if self.sync_bn and not self.batchnorm:
            raise UserError("--sync-bn does nothing with --no-bn; leave one of them out")
        if self.lr_decay != "none" and not (self.steps or self.epochs or self.max_minutes):
            raise UserError(
                "--lr-decay needs the run's length: give --steps, --epochs or --max-minutes"
            )

    @property
    def downscaling(self) -> int:
        """The factor between the padded image and the top feature map."""
        return 2 ** (sum(self.downsample) + self.initial_downscaling)

    def padded_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width that the image is padded to: multiples of `downscaling`."""
        height, width = (math.ceil(s / self.downscaling) * self.downscaling for s in image_size)
        return height, width

    def latent_sizes(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """Height and width of each layer's latents."""
        height, width = self.padded_size(image_size)
        factor = 1 + self.initial_downscaling
        sizes = []
        for halvings in self.downsample:
            factor *= 2**halvings
            sizes.append((height // factor, width // factor))
        return sizes

    def block_style(self) -> BlockStyle:
        """What the network's residual blocks have in common."""
        return BlockStyle(
            channels=self.n_filters,
            residual_type=self.residual_type,
            activation=self.nonlin,
            batchnorm=self.batchnorm,
            dropout=self.dropout,
            gated=self.gated,
        )

    def to_dict(self) -> dict[str, Any]:
        """As a dictionary that JSON can hold."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> "Config":
        """From `to_dict`'s dictionary, read from a file; raises `UserError` where it is not one."""
        if not isinstance(values, dict):
            raise UserError("the configuration is not a JSON object")
        unknown = values.keys() - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise UserError(f"the configuration has unknown entries: {', '.join(sorted(unknown))}")
        return cls(**values)


def _check_field(field: dataclasses.Field[Any], value: Any) -> None:
    name = flag_names(field)[-1]
    if not _has_type(value, field.type):
        raise UserError(f"{name} is {value!r}; it must be {_type_name(field.type)}")
    choices, check = field.metadata["choices"], field.metadata["check"]
    if choices and value not in choices:
        raise UserError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
    items = value if isinstance(value, list) else [value]
    for item in items:
        # As a float or in a tensor nothing larger has a place.
        if type(item) is int and abs(item) >= 2**63:
            raise UserError(
                f"{name} is a number of {item.bit_length()} bits; it must be below 2**63"
            )
    if check is not None:
        is_right, requirement = check
        for item in items:
            if not is_right(item):
                raise UserError(f"{name} is {item}; it must be {requirement}")


def _has_type(value: Any, expected: Any) -> bool:
    if get_origin(expected) is list:
        return (
            isinstance(value, list)
            and len(value) > 0
            and all(_has_type(item, get_args(expected)[0]) for item in value)
        )
    if expected is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is expected


def _type_name(expected: Any) -> str:
    if get_origin(expected) is list:
        return "a list of whole numbers, one for each layer"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[expected]


# Networks of the seed's likelihood table; see "Experimental details" there.
_FULL_SIZE: dict[str, Any] = {
    "blocks_per_layer": 4,
    "gated": True,
    "skip": True,
    "learn_top_prior": True,
    "data_dep_init": True,
}


# Halvings before each layer of 28x28 and 32x32 images; the top feature map is 2x2.
_DOWNSAMPLE = {
    3: [1, 1, 1],
    6: [1, 0, 1, 0, 1, 0],
    12: [0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0],
    15: [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0],
}


def _full_size(dataset: str, downsample: list[int]) -> dict[str, Any]:
    depth = len(downsample)
    return _FULL_SIZE | {
        "dataset": dataset,
        "z_dims": [32] * depth,
        "downsample": downsample,
        "free_bits": 1.0 if depth > 6 else 0.5,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Small enough to learn legible digits in two minutes on a laptop's processor.
    "digits": {
        "dataset": "digits",
        "z_dims": [16, 16, 16],
        "downsample": [1, 1, 1],
        "blocks_per_layer": 1,
        "n_filters": 32,
        "gated": True,
        "skip": True,
        "dropout": 0.05,
        "learn_top_prior": True,
        "initial_downscaling": False,
        "data_dep_init": True,
        "free_bits": 0.5,
        "beta_anneal": 400,
        "batch_size": 128,
        "lr": 5e-3,
        "lr_decay": "cosine",
        "ema": 0.99,
        "steps": 800,
        "ts_log_interv": 400,
        "ll_interv": 0,
        "ckpt_interv": 400,
    },
    "mnist-3": _full_size("static_mnist", _DOWNSAMPLE[3]),
    "mnist-6": _full_size("static_mnist", _DOWNSAMPLE[6]),
    "mnist-12": _full_size("static_mnist", _DOWNSAMPLE[12]),
    "multi-dsprites-12": _full_size("multi_dsprites", [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1]),
    "svhn-15": _full_size("svhn", _DOWNSAMPLE[15]),
    "cifar10-3": _full_size("cifar10", _DOWNSAMPLE[3]),
    "cifar10-6": _full_size("cifar10", _DOWNSAMPLE[6]),
    "cifar10-15": _full_size("cifar10", _DOWNSAMPLE[15]),
    "celeba-20": _full_size("celeba", [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0]),
}

# The rows of the likelihood table, in the order to reproduce them.
ROWS = (
    *("mnist-3", "mnist-12", "mnist-6", "cifar10-15", "cifar10-3", "cifar10-6"),
    *("multi-dsprites-12", "svhn-15", "celeba-20"),
)
# What takes the same networks further within a short budget; see results/recipes.md.
_FAST: dict[str, Any] = {
    "batch_size": 256,
    "lr": 5e-3,
    "lr_warmup": 500,
    "lr_decay": "cosine",
    "ema": 0.999,
    "epochs": 200,
    "precision": "bf16",
}
PRESETS |= {f"{row}-fast": PRESETS[row] | _FAST for row in ROWS}
# Scored on the validation images, as the original is, so that these are not to be trained on.
PRESETS["celeba-20-fast"]["train_split"] = "train"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s: one line, no usage."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def flag_names(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The option's names on the command line, the long one last."""
    return tuple(field.metadata["flags"]) or ("--" + field.name.replace("_", "-"),)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options of `Config` and `--preset`; only those given appear in the result."""
    parser.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="a named setting; the options given beside it change it",
    )
    add_config_options(parser)


def add_config_options(parser: argparse._ActionsContainer) -> None:
    """Add all options of `Config`; only those given appear in the result."""
    for field in dataclasses.fields(Config):
        _add_option(parser, field)


def _add_option(parser: argparse._ActionsContainer, field: dataclasses.Field[Any]) -> None:
    default = field.default_factory() if callable(field.default_factory) else field.default
    shown = " ".join(map(str, default)) if isinstance(default, list) else default
    settings: dict[str, Any] = {
        "dest": field.name,
        "default": argparse.SUPPRESS,
        "help": f"{field.metadata['help']} (default: {shown!s})".replace("%", "%%"),
    }
    if field.type is bool:
        settings["action"] = argparse.BooleanOptionalAction
    elif get_origin(field.type) is list:
        settings |= {"nargs": "+", "type": get_args(field.type)[0], "metavar": "N"}
    elif field.metadata["choices"]:
        settings["choices"] = field.metadata["choices"]
    else:
        settings |= {"type": field.type, "metavar": "TEXT" if field.type is str else "N"}
    parser.add_argument(*flag_names(field), **settings)


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `Config` that the command line gave itself, without the preset's."""
    names = {field.name for field in dataclasses.fields(Config)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def config_from(arguments: argparse.Namespace) -> Config:
    """The defaults, changed by the preset, changed by the options given."""
    preset = PRESETS[arguments.preset] if arguments.preset else {}
    return Config(**(preset | given_options(arguments)))
